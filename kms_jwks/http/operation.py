"""Endpoints that operators and their machines ask: health, workers, backends, and the description of the API."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from kms_jwks import wire
from kms_jwks.http.exchange import JSON, NO_STORE, Request, Response, encode, gone, ok

if TYPE_CHECKING:
    from kms_jwks.service import Service


def list_nodes(service: Service, request: Request) -> Response:
    """The workers of all nodes and how far each has followed."""
    return ok(service.operation.nodes(request.context, *request.page()))


def forget_worker(service: Service, request: Request) -> Response:
    """Count a worker out that will not come back."""
    service.operation.forget(request.context, request.params["worker"])
    return gone()


def get_custodian(service: Service, request: Request) -> Response:
    """Who makes, rotates and destroys keys now."""
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


def openapi(service: Service, request: Request) -> Response:
    """This API in OpenAPI 3.1."""
    return Response(200, [("Content-Type", JSON), NO_STORE], _openapi(service.settings.public_url))


def docs(service: Service, request: Request) -> Response:
    """This API on one page for people."""
    from kms_jwks.http import docs as page

    body, policy = page.rendered(service.settings.public_url)
    return Response(
        200,
        [("Content-Type", "text/html; charset=utf-8"), ("Content-Security-Policy", policy), NO_STORE],
        body,
    )


def _readiness(readiness: wire.Readiness) -> Response:
    return ok(readiness, 200 if readiness.status == "ok" else 503)


@lru_cache(maxsize=1)
def _openapi(public_url: str) -> bytes:
    from kms_jwks.http.openapi import document

    return encode(document(public_url))
