"""The endpoints for operation: health and readiness, workers, the custodian, backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kms_jwks import wire
from kms_jwks.http.exchange import Filter, Request, Response, gone, ok

if TYPE_CHECKING:
    from kms_jwks.service import Service

_NODE = Filter("node", "The node that the worker runs on.")
_STATE = Filter("state", "Whether the worker reports.", ("live", "silent"))
NODE_FILTERS = (_NODE, _STATE)
"""What the list of workers can be narrowed by."""
SIGNING_READINESS_FILTERS = (
    Filter("key_set", "The key set of the one key that is asked for."),
    Filter("key", "That key."),
)
"""`/readyz/sign` asks for one key with both."""


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
    return _readiness(service.operation.ready())


def readyz_sign(service: Service, request: Request) -> Response:
    """Whether signing works; the cause where it does not."""
    return _readiness(service.operation.ready_sign())


def _readiness(readiness: wire.Readiness) -> Response:
    if readiness.status == "ok":
        return ok(readiness)
    response = ok(readiness, 503)
    response.notes = {"failing": [f"{d.name}: {d.state}" for d in readiness.dependencies if d.state != "ok"]}
    return response
