"""The endpoints for operation: health and readiness, workers, the custodian, backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kms_jwks import errors, wire
from kms_jwks.http.exchange import Filter, Request, Response, gone, ok

if TYPE_CHECKING:
    from kms_jwks.service import Service

_NODE = Filter("node", "The node that the worker runs on.")
_STATE = Filter("state", "Whether the worker reports.", ("live", "silent"))
NODE_FILTERS = (_NODE, _STATE)
"""What the list of workers can be narrowed by."""
_KEY_SET = Filter("key_set", "Only the keys of this key set.")
_KEY = Filter("key", "Only this key of that key set.")
SIGNING_READINESS_FILTERS = (_KEY_SET, _KEY)
"""The keys that `/readyz/sign` is asked about; without them all that are enabled."""


def list_nodes(service: Service, request: Request) -> Response:
    """The workers of all nodes, each with the epoch it has confirmed."""
    node, state = request.one(_NODE), request.one(_STATE)
    return ok(service.operation.nodes(request.context, *request.page(), node=node, state=state))


def forget_worker(service: Service, request: Request) -> Response:
    """Forget a worker that will not come back."""
    service.operation.forget(request.context, request.params["worker"])
    return gone()


def get_custodian(service: Service, request: Request) -> Response:
    """Which custodian makes, rotates and destroys keys now."""
    return ok(service.operation.custodian(request.context))


def list_backends(service: Service, request: Request) -> Response:
    """The configured modules and their state."""
    return ok(service.operation.backends(request.context))


def get_backend(service: Service, request: Request) -> Response:
    """One configured module."""
    return ok(service.operation.backend(request.context, request.params["backend"]))


def healthz(service: Service, request: Request) -> Response:
    """The process answers."""
    return ok(wire.Readiness(status="ok", dependencies=[wire.Dependency(name="process", state="ok")]))


def readyz(service: Service, request: Request) -> Response:
    """Whether a JWKS can be served."""
    return _readiness(service, request, service.operation.ready())


def readyz_sign(service: Service, request: Request) -> Response:
    """Whether this worker can sign with every enabled key, those of `?key_set=`, or one (`&key=`); else the cause."""
    key_set, key = request.one(_KEY_SET), request.one(_KEY)
    if key is not None and key_set is None:
        raise errors.InvalidField("key: name its key_set too", fields={"field": "key"})
    return _readiness(service, request, service.operation.ready_sign(request.context, key_set, key))


def _readiness(service: Service, request: Request, readiness: wire.Readiness) -> Response:
    """The log has all of it, the answer what the caller may see."""
    shown = service.operation.shown(request.context, readiness)
    if readiness.status == "ok":
        return ok(shown)
    response = ok(shown, 503)
    failing = [d for d in readiness.dependencies if d.state != "ok"]
    response.notes = {"failing": [f"{d.name}: {d.state}" for d in failing]}
    if causes := [f"{d.name}: {d.detail}" for d in failing if d.detail]:
        response.notes["causes"] = causes
    return response
