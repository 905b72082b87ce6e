"""The control plane's endpoints: key sets, keys, versions, external keys, clients, API tokens and grants."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kms_jwks import jose, wire
from kms_jwks.access import Role
from kms_jwks.http.exchange import NO_STORE, Empty, Filter, Request, Response, added, created, encode, gone, ok, revised
from kms_jwks.model import Access, Purpose, VersionState

if TYPE_CHECKING:
    from kms_jwks.service import Service

# --- what lists can be narrowed by ------------------------------------------------------------------------------------

_PURPOSE = Filter("purpose", "What the set's keys may sign.", tuple(Purpose))
_ACCESS = Filter("access", "Who may fetch the set's JWKS.", tuple(Access))
_KEY_STATE = Filter("state", "Whether the key may sign.", ("enabled", "disabled"))
_BACKEND = Filter("backend", "The module that the key's next version is made in.")
_VERSION_STATE = Filter("state", "The states of the versions.", tuple(VersionState), several=True)
_TOKEN_STATE = Filter("state", "Whether the API token works, and if not why.", ("valid", "expired", "revoked"))
_CLIENT = Filter("client", "The client that holds the grant.")
_ROLE = Filter("role", "The role that the grant gives.", tuple(Role))
_IN_KEY_SET = Filter("key_set", "The key set that the grant names, for the whole set or for one of its keys.")

KEY_SET_FILTERS = (_PURPOSE, _ACCESS)
KEY_FILTERS = (_KEY_STATE, _BACKEND)
VERSION_FILTERS = (_VERSION_STATE,)
TOKEN_FILTERS = (_TOKEN_STATE,)
GRANT_FILTERS = (_CLIENT, _ROLE, _IN_KEY_SET)


# --- key sets ---------------------------------------------------------------------------------------------------------


def list_key_sets(service: Service, request: Request) -> Response:
    """The key sets that the caller's grants cover, each with its keys in short."""
    purpose, access = request.one(_PURPOSE), request.one(_ACCESS)
    return ok(service.key_sets.list(request.context, *request.page(), purpose=purpose, access=access))


def create_key_set(service: Service, request: Request, body: wire.KeySetCreate) -> Response:
    """Create a key set, with its first keys where the body names some."""
    return created(service.key_sets.create(request.context, body))


def get_key_set(service: Service, request: Request) -> Response:
    """One key set with its keys."""
    return revised(request, service.key_sets.get(request.context, request.params["key_set"]))


def patch_key_set(service: Service, request: Request, body: wire.KeySetPatch) -> Response:
    """Change a key set under If-Match."""
    return revised(
        request, service.key_sets.patch(request.context, request.params["key_set"], body, request.revision())
    )


def retire_key_set(service: Service, request: Request, body: Empty) -> Response:
    """Retire a key set with its keys, for ever: they stop signing and leave the JWKS when no token is alive."""
    return _changed(service.key_sets.retire(request.context, request.params["key_set"]))


def delete_key_set(service: Service, request: Request) -> Response:
    """Delete a key set that has never published anything."""
    service.key_sets.delete(request.context, request.params["key_set"])
    return gone()


# --- keys -------------------------------------------------------------------------------------------------------------


def list_keys(service: Service, request: Request) -> Response:
    """The keys of a key set."""
    state, backend = request.one(_KEY_STATE), request.one(_BACKEND)
    key_set = request.params["key_set"]
    return ok(service.keys.list(request.context, key_set, *request.page(), state=state, backend=backend))


def key_timeline(service: Service, request: Request) -> Response:
    """The timeline of a key's versions: past, present and planned."""
    return ok(service.keys.timeline(request.context, *_key(request)))


def create_key(service: Service, request: Request, body: wire.KeyCreate) -> Response:
    """Create a key, one of at most 4 in a set; the custodian makes its first versions, or the first is adopted."""
    return created(service.keys.create(request.context, request.params["key_set"], body))


def get_key(service: Service, request: Request) -> Response:
    """One key with its versions."""
    return revised(request, service.keys.get(request.context, *_key(request)))


def patch_key(service: Service, request: Request, body: wire.KeyPatch) -> Response:
    """Change a key's policy or profile under If-Match."""
    return revised(request, service.keys.patch(request.context, *_key(request), body, request.revision()))


def rotate_key(service: Service, request: Request, body: wire.RotateRequest) -> Response:
    """Activate the standby now; a refusal says when that is possible."""
    return _changed(service.keys.rotate(request.context, *_key(request), body))


def disable_key(service: Service, request: Request, body: Empty) -> Response:
    """Stop a key from signing; its versions stay published."""
    return _changed(service.keys.disable(request.context, *_key(request)))


def enable_key(service: Service, request: Request, body: Empty) -> Response:
    """Let a disabled key sign again."""
    return _changed(service.keys.enable(request.context, *_key(request)))


def retire_key(service: Service, request: Request, body: Empty) -> Response:
    """Retire a key, for ever: it stops signing and leaves the JWKS when no token is alive."""
    return _changed(service.keys.retire(request.context, *_key(request)))


def delete_key(service: Service, request: Request) -> Response:
    """Delete a key that has never published anything."""
    service.keys.delete(request.context, *_key(request))
    return gone()


# --- versions ---------------------------------------------------------------------------------------------------------


def list_versions(service: Service, request: Request) -> Response:
    """The versions of a key, destroyed ones included."""
    states = request.chosen(_VERSION_STATE)
    return ok(service.versions.list(request.context, *_key(request), *request.page(), states=states))


def create_version(service: Service, request: Request, body: wire.VersionCreate) -> Response:
    """Create a further version as standby, made by the custodian or adopted."""
    return created(service.versions.create(request.context, *_key(request), body))


def get_version(service: Service, request: Request) -> Response:
    """One version, by number or kid."""
    return ok(service.versions.get(request.context, *_version(request)))


def public_key(service: Service, request: Request) -> Response:
    """The public key: JWK, or PEM or DER where Accept names one of them first."""
    jwk = service.versions.public_jwk(request.context, *_version(request))
    media_type = _public_key_type(request.header("accept") or "")
    write = {JWK: encode, PEM: lambda jwk: jose.to_pem(jwk).encode(), DER: jose.to_der}[media_type]
    return Response(200, [("Content-Type", media_type), ("Vary", "Accept"), NO_STORE], write(jwk))


def safety(service: Service, request: Request) -> Response:
    """Each invariant of a version with both sides as instants."""
    return ok(service.versions.safety(request.context, *_version(request)))


def attributes(service: Service, request: Request) -> Response:
    """The module's evidence that it generated the private key and that the key cannot leave it."""
    return ok(service.versions.attributes(request.context, *_version(request)))


def activate_version(service: Service, request: Request, body: wire.ActivateRequest) -> Response:
    """Make a published version the active one."""
    return ok(service.versions.activate(request.context, *_version(request), body))


def retire_version(service: Service, request: Request, body: wire.RetireRequest) -> Response:
    """Withdraw a retiring version from the JWKS, once no token it signed can be alive."""
    return ok(service.versions.retire(request.context, *_version(request), body))


def revoke_version(service: Service, request: Request, body: wire.RevokeRequest) -> Response:
    """Emergency: withdraw a version for ever; the standby becomes active at once."""
    return ok(service.revocation.revoke_version(request.context, *_version(request), body))


def create_revocation(service: Service, request: Request, body: wire.RevocationCreate) -> Response:
    """Emergency: revoke every version of a backend or key set in one transaction."""
    return ok(service.revocation.revoke_scope(request.context, body))


def destroy_version(service: Service, request: Request, body: wire.DestroyRequest) -> Response:
    """Set when the module destroys the key pair."""
    return ok(service.versions.destroy(request.context, *_version(request), body))


def cancel_destroy(service: Service, request: Request, body: Empty) -> Response:
    """Clear `destroy_at`."""
    return ok(service.versions.cancel_destroy(request.context, *_version(request)))


# --- external keys ----------------------------------------------------------------------------------------------------


def list_external_keys(service: Service, request: Request) -> Response:
    """The external keys of a key set, removed ones included."""
    return ok(service.external_keys.list(request.context, request.params["key_set"], *request.page()))


def create_external_key(service: Service, request: Request, body: wire.ExternalKeyCreate) -> Response:
    """Publish a foreign public key until a date."""
    key_set = request.params["key_set"]
    answer = service.external_keys.create(request.context, key_set, body)
    return added(answer, "v1", "key-sets", key_set, "external-keys", wire.kid_segment(answer.kid))


def get_external_key(service: Service, request: Request) -> Response:
    """One external key."""
    return ok(service.external_keys.get(request.context, *_external_key(request)))


def patch_external_key(service: Service, request: Request, body: wire.ExternalKeyPatch) -> Response:
    """Move the date at which an external key leaves the JWKS."""
    return ok(service.external_keys.update(request.context, *_external_key(request), body))


def delete_external_key(service: Service, request: Request) -> Response:
    """Stop publishing an external key now."""
    service.external_keys.delete(request.context, *_external_key(request))
    return gone()


# --- clients, API tokens, grants --------------------------------------------------------------------------------------


def list_clients(service: Service, request: Request) -> Response:
    """The clients."""
    return ok(service.clients.list(request.context, *request.page()))


def create_client(service: Service, request: Request, body: wire.ClientCreate) -> Response:
    """Create a client, without tokens and grants."""
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
    state = request.one(_TOKEN_STATE)
    return ok(service.clients.tokens(request.context, request.params["client"], *request.page(), state=state))


def create_token(service: Service, request: Request, body: wire.TokenCreate) -> Response:
    """Create an API token; only this answer shows it."""
    return ok(service.clients.create_token(request.context, request.params["client"], body), 201)


def revoke_token(service: Service, request: Request) -> Response:
    """Revoke an API token; no worker accepts it once this is answered."""
    service.clients.revoke_token(request.context, request.params["client"], request.params["token"])
    return gone()


def rotate_token(service: Service, request: Request, body: wire.TokenRotate) -> Response:
    """Create a token in place of another one, which ends after an overlap; only this answer shows the new one."""
    client, token = request.params["client"], request.params["token"]
    return ok(service.clients.rotate_token(request.context, client, token, body), 201)


def list_grants(service: Service, request: Request) -> Response:
    """The grants."""
    client, role, key_set = (request.one(by) for by in GRANT_FILTERS)
    return ok(service.clients.grants(request.context, *request.page(), client=client, role=role, key_set=key_set))


def create_grant(service: Service, request: Request, body: wire.GrantCreate) -> Response:
    """Give a client a role within a scope."""
    grant = service.clients.create_grant(request.context, body)
    return added(grant, "v1", "grants", grant.id)


def get_grant(service: Service, request: Request) -> Response:
    """One grant."""
    return ok(service.clients.grant(request.context, request.params["grant"]))


def delete_grant(service: Service, request: Request) -> Response:
    """Delete a grant."""
    service.clients.delete_grant(request.context, request.params["grant"])
    return gone()


# --- inside -----------------------------------------------------------------------------------------------------------

JWK = "application/jwk+json"
PEM = "application/x-pem-file"
"""In common use; no type is registered for a public key in PEM."""
DER = "application/octet-stream"
_PUBLIC_KEY_TYPES = {JWK: JWK, "application/json": JWK, PEM: PEM, "text/plain": PEM, DER: DER}


def _public_key_type(accept: str) -> str:
    """The offered type that Accept prefers (RFC 9110 §12.5.1); without one the JWK, never 406."""
    best, best_quality = JWK, 0.0
    for part in accept.lower().split(","):
        name, _, parameters = part.partition(";")
        offered = _PUBLIC_KEY_TYPES.get(name.strip())
        quality = _QUALITY.search(parameters)
        weight = float(quality[1]) if quality else 1.0
        if offered is not None and weight > best_quality:
            best, best_quality = offered, weight
    return best


_QUALITY = re.compile(r"(?:^|;)\s*q=([01](?:\.[0-9]{0,3})?)\s*(?:;|$)")


def _changed(answer: wire.KeySet | wire.Key) -> Response:
    response = ok(answer)
    response.headers.append(("ETag", f'"{answer.revision}"'))
    return response


def _key(request: Request) -> tuple[str, str]:
    return request.params["key_set"], request.params["key"]


def _version(request: Request) -> tuple[str, str, str]:
    return request.params["key_set"], request.params["key"], wire.kid_of_segment(request.params["version"])


def _external_key(request: Request) -> tuple[str, str]:
    return request.params["key_set"], wire.kid_of_segment(request.params["kid"])
