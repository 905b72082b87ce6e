"""The control plane's endpoints for clients, their API tokens, and grants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kms_jwks.http.exchange import Request, Response, added, gone, ok

if TYPE_CHECKING:
    from kms_jwks import wire
    from kms_jwks.service import Service


def list_clients(service: Service, request: Request) -> Response:
    """The clients."""
    return ok(service.clients.list(request.context, *request.page()))


def create_client(service: Service, request: Request, body: wire.ClientCreate) -> Response:
    """A client, without tokens and grants."""
    return added(service.clients.create(request.context, body), "v1", "clients", body.name)


def get_client(service: Service, request: Request) -> Response:
    """One client."""
    return ok(service.clients.get(request.context, request.params["client"]))


def delete_client(service: Service, request: Request) -> Response:
    """Delete a client; its tokens stop working."""
    service.clients.delete(request.context, request.params["client"])
    return gone()


def list_tokens(service: Service, request: Request) -> Response:
    """A client's API tokens; never their secrets."""
    return ok(service.clients.tokens(request.context, request.params["client"], *request.page()))


def create_token(service: Service, request: Request, body: wire.TokenCreate) -> Response:
    """An API token, shown this once."""
    return ok(service.clients.create_token(request.context, request.params["client"], body), 201)


def revoke_token(service: Service, request: Request) -> Response:
    """Revoke an API token everywhere before this is answered."""
    service.clients.revoke_token(request.context, request.params["client"], request.params["token"])
    return gone()


def list_grants(service: Service, request: Request) -> Response:
    """The grants."""
    return ok(service.clients.grants(request.context, *request.page()))


def create_grant(service: Service, request: Request, body: wire.GrantCreate) -> Response:
    """Give a client a role within a scope."""
    grant = service.clients.create_grant(request.context, body)
    return added(grant, "v1", "grants", grant.id)


def get_grant(service: Service, request: Request) -> Response:
    """One grant."""
    return ok(service.clients.grant(request.context, request.params["grant"]))


def delete_grant(service: Service, request: Request) -> Response:
    """Take a grant back."""
    service.clients.delete_grant(request.context, request.params["grant"])
    return gone()
