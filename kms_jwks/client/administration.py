"""The client's calls for administrators and operators: key sets, keys, versions, callers, operation.

Lists are iterators that fetch page after page; their keyword arguments leave items out. The service answers some
changes only when every worker works under them; these calls wait up to a minute longer than the usual timeout.
Creations carry an Idempotency-Key and are repeated after a lost answer.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from kms_jwks import errors, wire
from kms_jwks.client.problems import marked
from kms_jwks.client.transport import Repeat, Reply, Transport, decode, segment

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime

PATIENCE: Final = 65.0
"""Seconds: the longest signing lease, and what the service adds to it."""
CREATION_PATIENCE: Final = 15.0
"""Seconds: how long the service waits for the custodian, and what it adds to that."""
PAGE: Final = 200
"""Items of one page."""

T = TypeVar("T")


class _Page(msgspec.Struct, Generic[T]):
    items: list[T]
    next: str | UnsetType = UNSET


class Administration:
    """Mixed into `Client`. `version` is a number or a kid everywhere."""

    _transport: Transport

    # --- key sets

    def key_sets(self, *, purpose: str | None = None, access: str | None = None) -> Iterator[wire.KeySetSummary]:
        """The key sets that the caller's grants cover, each with its keys in short; `key_set` has one of them whole."""
        return self._pages("/v1/key-sets", _Page[wire.KeySetSummary], purpose=purpose, access=access)

    def key_set(self, name: str) -> wire.KeySet:
        """One key set with its keys."""
        return decode(self._get(_set(name)), wire.KeySet)

    def create_key_set(self, request: wire.KeySetCreate) -> wire.KeySet:
        """Create a key set, with its first keys in the same call. A version still `creating` is made later."""
        return decode(self._create("/v1/key-sets", request), wire.KeySet)

    def update_key_set(self, name: str, changes: wire.KeySetPatch, *, revision: int) -> wire.KeySet:
        """Change a key set that is still at `revision`. Raises RevisionMismatch, Immutable, PolicyRefused."""
        return decode(self._change("PATCH", _set(name), changes, revision=revision), wire.KeySet)

    def retire_key_set(self, name: str) -> wire.KeySet:
        """Retire a key set with its keys, for ever; when this returns no worker signs with them."""
        return decode(self._change("POST", f"{_set(name)}/retire"), wire.KeySet)

    def delete_key_set(self, name: str) -> None:
        """Delete a key set that has never published anything. Raises AlreadyPublished."""
        self._change("DELETE", _set(name))

    # --- keys

    def keys(self, key_set: str, *, state: str | None = None, backend: str | None = None) -> Iterator[wire.Key]:
        """The keys of a key set; `state` is `enabled` or `disabled`."""
        return self._pages(f"{_set(key_set)}/keys", _Page[wire.Key], state=state, backend=backend)

    def key(self, key_set: str, key: str) -> wire.Key:
        """One key with its versions."""
        return decode(self._get(_key(key_set, key)), wire.Key)

    def timeline(self, key_set: str, key: str) -> wire.Timeline:
        """The past, present and planned states of a key's versions."""
        return decode(self._get(f"{_key(key_set, key)}/timeline"), wire.Timeline)

    def create_key(self, key_set: str, request: wire.KeyCreate) -> wire.Key:
        """Create a key. A version still `creating` in the answer is made later."""
        return decode(self._create(f"{_set(key_set)}/keys", request), wire.Key)

    def update_key(self, key_set: str, key: str, changes: wire.KeyPatch, *, revision: int) -> wire.Key:
        """Change the policy or profile of a key that is still at `revision`. Raises RevisionMismatch, PolicyRefused."""
        return decode(self._change("PATCH", _key(key_set, key), changes, revision=revision), wire.Key)

    def rotate(
        self, key_set: str, key: str, *, expected_kid: str | None = None, break_glass: str | None = None
    ) -> wire.Key:
        """Activate the standby now. Raises NotYetUsable (`fields["usable_at"]`), NoStandby, RotationInProgress.

        `expected_kid` makes it safe to repeat: raises ActiveKidMismatch when another kid is active already.
        `break_glass` is the reason to override I1 with; it needs its own permission and stays on the version.
        """
        request = wire.RotateRequest(
            expected_kid=UNSET if expected_kid is None else expected_kid,
            break_glass=break_glass is not None,
            reason=break_glass or "",
        )
        return decode(self._change("POST", f"{_key(key_set, key)}/rotate", request), wire.Key)

    def disable_key(self, key_set: str, key: str) -> wire.Key:
        """Stop a key from signing on every worker; its versions stay published."""
        return decode(self._change("POST", f"{_key(key_set, key)}/disable"), wire.Key)

    def enable_key(self, key_set: str, key: str) -> wire.Key:
        """Let a disabled key sign again."""
        return decode(self._change("POST", f"{_key(key_set, key)}/enable"), wire.Key)

    def retire_key(self, key_set: str, key: str) -> wire.Key:
        """Retire a key, for ever; when this returns no worker signs with it."""
        return decode(self._change("POST", f"{_key(key_set, key)}/retire"), wire.Key)

    def delete_key(self, key_set: str, key: str) -> None:
        """Delete a key that has never published anything. Raises AlreadyPublished."""
        self._change("DELETE", _key(key_set, key))

    # --- versions

    def versions(self, key_set: str, key: str, *, states: Iterable[str] = ()) -> Iterator[wire.Version]:
        """The versions of a key, destroyed ones included, or those in some states."""
        state = ",".join(states) or None
        return self._pages(f"{_key(key_set, key)}/versions", _Page[wire.Version], state=state)

    def version(self, key_set: str, key: str, version: str | int) -> wire.Version:
        """One version."""
        return decode(self._get(_version(key_set, key, version)), wire.Version)

    def create_version(self, key_set: str, key: str, *, adopt: wire.Adopt | None = None) -> wire.Version:
        """Ask for a standby version, or adopt a pair as one. Raises TransitionRefused when one is to be made and is
        there already; AdoptionRefused (`fields["weaknesses"]`), KeyTaken, KidTaken."""
        request = wire.VersionCreate(adopt=UNSET if adopt is None else adopt)
        return decode(self._create(f"{_key(key_set, key)}/versions", request), wire.Version)

    def activate(self, key_set: str, key: str, version: str | int, *, break_glass: str | None = None) -> wire.Version:
        """Make a published version the one that signs. Raises NotYetUsable, TransitionRefused.

        `break_glass` is the reason to override I1 with; it needs its own permission and stays on the version.
        """
        request = wire.ActivateRequest(break_glass=break_glass is not None, reason=break_glass or "")
        return decode(self._change("POST", f"{_version(key_set, key, version)}/activate", request), wire.Version)

    def retire(self, key_set: str, key: str, version: str | int, *, break_glass: str | None = None) -> wire.Version:
        """Take a retiring version out of the JWKS. Raises TransitionRefused while a token it signed can be alive.

        `break_glass` is the reason to override I2 with; it needs its own permission and stays on the version.
        """
        request = wire.RetireRequest(break_glass=break_glass is not None, reason=break_glass or "")
        return decode(self._change("POST", f"{_version(key_set, key, version)}/retire", request), wire.Version)

    def revoke(
        self, key_set: str, key: str, version: str | int, *, reason: str = "", dry_run: bool = False
    ) -> wire.Revoked:
        """Emergency: when this returns no worker signs with the version, and its successor is active.

        With `dry_run` it returns what would happen, and changes nothing.
        """
        path = f"{_version(key_set, key, version)}/revoke"
        return decode(self._change("POST", path, wire.RevokeRequest(reason=reason, dry_run=dry_run)), wire.Revoked)

    def revoke_everything(self, request: wire.RevocationCreate) -> wire.Revocation:
        """Emergency: every version of a key set, or with its pair in a backend, is revoked in one transaction.

        Raises Forbidden, and changes nothing, where the caller may not revoke in one of the keys.
        """
        return decode(self._change("POST", "/v1/revocations", request), wire.Revocation)

    def destroy(
        self, key_set: str, key: str, version: str | int, *, destroy_at: datetime | None = None
    ) -> wire.Version:
        """Set when a retired or revoked version's key pair is destroyed; by default the key's policy decides."""
        request = wire.DestroyRequest(destroy_at=UNSET if destroy_at is None else destroy_at)
        return decode(self._change("POST", f"{_version(key_set, key, version)}/destroy", request), wire.Version)

    def cancel_destroy(self, key_set: str, key: str, version: str | int) -> wire.Version:
        """Cancel a destruction that has not happened yet."""
        return decode(self._change("POST", f"{_version(key_set, key, version)}/cancel-destroy"), wire.Version)

    def safety(self, key_set: str, key: str, version: str | int) -> wire.Safety:
        """Each invariant of a version with both sides as instants, and what happens next."""
        return decode(self._get(f"{_version(key_set, key, version)}/safety"), wire.Safety)

    def attributes(self, key_set: str, key: str, version: str | int) -> wire.Attributes:
        """The module's evidence that the private key was made there and stays there, read for this call."""
        return decode(self._get(f"{_version(key_set, key, version)}/attributes"), wire.Attributes)

    def public_jwk(self, key_set: str, key: str, version: str | int) -> dict[str, Any]:
        """A version's public key as the JWKS shows it (RFC 7517 §4)."""
        return decode(self._public_key(key_set, key, version, "application/jwk+json"), dict[str, Any])

    def public_pem(self, key_set: str, key: str, version: str | int) -> str:
        """A version's public key as a PEM SubjectPublicKeyInfo (RFC 7468 §13)."""
        reply = self._public_key(key_set, key, version, "application/x-pem-file")
        try:
            return reply.body.decode("ascii")
        except UnicodeDecodeError:
            unexpected = errors.UnexpectedAnswer(f"GET {reply.path}: the body is not PEM.")
            raise marked(unexpected, reply.status, reply.request_id) from None

    def public_der(self, key_set: str, key: str, version: str | int) -> bytes:
        """A version's public key as a DER SubjectPublicKeyInfo (RFC 5280 §4.1.2.7)."""
        return self._public_key(key_set, key, version, "application/octet-stream").body

    # --- external keys

    def external_keys(self, key_set: str) -> Iterator[wire.ExternalKey]:
        """The foreign public keys that a key set publishes."""
        return self._pages(f"{_set(key_set)}/external-keys", _Page[wire.ExternalKey])

    def external_key(self, key_set: str, kid: str) -> wire.ExternalKey:
        """One external key."""
        return decode(self._get(_external_key(key_set, kid)), wire.ExternalKey)

    def add_external_key(self, key_set: str, request: wire.ExternalKeyCreate) -> wire.ExternalKey:
        """Publish a foreign public key until `remove_at`. Raises InvalidJwk, KidTaken, KeyTaken, LimitReached."""
        return decode(self._create(f"{_set(key_set)}/external-keys", request), wire.ExternalKey)

    def update_external_key(self, key_set: str, kid: str, request: wire.ExternalKeyPatch) -> wire.ExternalKey:
        """Move the date at which an external key leaves the JWKS."""
        return decode(self._change("PATCH", _external_key(key_set, kid), request), wire.ExternalKey)

    def remove_external_key(self, key_set: str, kid: str) -> None:
        """Stop publishing an external key before its date. The same key may be added again under its kid."""
        self._change("DELETE", _external_key(key_set, kid))

    # --- clients, tokens, grants

    def clients(self) -> Iterator[wire.Client]:
        """Every client."""
        return self._pages("/v1/clients", _Page[wire.Client])

    def client(self, name: str) -> wire.Client:
        """One client."""
        return decode(self._get(_client(name)), wire.Client)

    def create_client(self, name: str) -> wire.Client:
        """Create a client. It has no permission until it gets a grant."""
        return decode(self._create("/v1/clients", wire.ClientCreate(name=name)), wire.Client)

    def delete_client(self, name: str) -> None:
        """Delete a client with its tokens and grants; its name stays taken."""
        self._change("DELETE", _client(name))

    def tokens(self, client: str, *, state: str | None = None) -> Iterator[wire.Token]:
        """A client's API tokens without the secrets; `state` is `valid`, `expired` or `revoked`."""
        return self._pages(f"{_client(client)}/tokens", _Page[wire.Token], state=state)

    def create_token(self, client: str, *, expires_in: int | None = None) -> wire.TokenCreated:
        """Make an API token; `expires_in` in seconds, by default 90 days. It is not shown again.

        Raises TokenNotShownAgain where the token was made and the answer that shows it was lost.
        """
        request = wire.TokenCreate() if expires_in is None else wire.TokenCreate(expires_in=expires_in)
        return decode(self._create(f"{_client(client)}/tokens", request), wire.TokenCreated)

    def rotate_token(
        self, client: str, token_id: str, *, overlap: int | None = None, expires_in: int | None = None
    ) -> wire.TokenRotated:
        """Make an API token in place of another one, which ends `overlap` seconds later, by default 24 h.

        `expires_in` as for `create_token`. Raises Conflict for a token that has ended, TokenNotShownAgain where the
        answer that shows the new one was lost.
        """
        fields = {"overlap": overlap, "expires_in": expires_in}
        request = wire.TokenRotate(**{name: value for name, value in fields.items() if value is not None})
        path = f"{_client(client)}/tokens/{segment(token_id, 'token')}/rotate"
        return decode(self._create(path, request, patience=PATIENCE), wire.TokenRotated)

    def revoke_token(self, client: str, token_id: str) -> None:
        """Revoke an API token; no worker accepts it once this returns."""
        self._change("DELETE", f"{_client(client)}/tokens/{segment(token_id, 'token')}")

    def grants(
        self, *, client: str | None = None, role: str | None = None, key_set: str | None = None
    ) -> Iterator[wire.Grant]:
        """Every grant, or those of a client, a role or a key set. Raises ClientNotFound, KeySetNotFound."""
        return self._pages("/v1/grants", _Page[wire.Grant], client=client, role=role, key_set=key_set)

    def grant(self, grant_id: str) -> wire.Grant:
        """One grant."""
        return decode(self._get(f"/v1/grants/{segment(grant_id, 'grant')}"), wire.Grant)

    def create_grant(self, request: wire.GrantCreate) -> wire.Grant:
        """Give a client a role within a scope; an empty scope is everything."""
        return decode(self._create("/v1/grants", request), wire.Grant)

    def delete_grant(self, grant_id: str) -> None:
        """Delete a grant; every worker has applied that once this returns."""
        self._change("DELETE", f"/v1/grants/{segment(grant_id, 'grant')}")

    # --- operation

    def nodes(self, *, node: str | None = None, state: str | None = None) -> Iterator[wire.Node]:
        """Every worker and the epoch it has confirmed, or those of a node, or the `live` or `silent` ones."""
        return self._pages("/v1/nodes", _Page[wire.Node], node=node, state=state)

    def custodian(self) -> wire.Custodian:
        """The custodian that makes, rotates and destroys keys now, and since when."""
        return decode(self._get("/v1/custodian"), wire.Custodian)

    def forget_worker(self, worker: str) -> None:
        """Stop counting a worker that will not come back."""
        self._change("DELETE", f"/v1/nodes/{segment(worker, 'worker')}")

    def backends(self) -> list[wire.Backend]:
        """Every backend of the node that answers, with its state."""
        return decode(self._get("/v1/backends"), _Page[wire.Backend]).items

    def backend(self, name: str) -> wire.Backend:
        """One backend."""
        return decode(self._get(f"/v1/backends/{segment(name, 'backend')}"), wire.Backend)

    # --- inside

    def _get(self, path: str) -> Reply:
        return self._transport.call("GET", path, repeat=Repeat.READ)

    def _change(
        self, method: str, path: str, request: wire.Request | None = None, *, revision: int | None = None
    ) -> Reply:
        body: object = request
        if request is None and method == "POST":
            body = {}
        headers = {} if revision is None else {"If-Match": f'"{revision}"'}
        return self._transport.call(method, path, repeat=Repeat.CHANGE, body=body, headers=headers, patience=PATIENCE)

    def _create(self, path: str, request: wire.Request, *, patience: float = CREATION_PATIENCE) -> Reply:
        """A creation, which is sent again after a lost answer: its Idempotency-Key makes that safe."""
        headers = {"Idempotency-Key": f'"{uuid.uuid4()}"'}
        return self._transport.call(
            "POST", path, repeat=Repeat.CREATE, body=request, headers=headers, patience=patience
        )

    def _pages(self, path: str, into: type[_Page[T]], **filters: str | None) -> Iterator[T]:
        seen: set[str] = set()
        cursor: str | None = None
        while True:
            query = {**filters, "limit": PAGE, "cursor": cursor}
            reply = self._transport.call("GET", path, repeat=Repeat.READ, query=query)
            page = decode(reply, into)
            yield from page.items
            if page.next is UNSET:
                return
            cursor = page.next
            if cursor in seen:
                unexpected = errors.UnexpectedAnswer(f"GET {path}: the pages form a loop.")
                raise marked(unexpected, reply.status, reply.request_id)
            seen.add(cursor)

    def _public_key(self, key_set: str, key: str, version: str | int, media_type: str) -> Reply:
        path = f"{_version(key_set, key, version)}/public-key"
        return self._transport.call("GET", path, repeat=Repeat.READ, headers={"Accept": media_type})


def _set(name: str) -> str:
    return f"/v1/key-sets/{segment(name, 'key_set')}"


def _key(key_set: str, key: str) -> str:
    return f"{_set(key_set)}/keys/{segment(key, 'key')}"


def _version(key_set: str, key: str, version: str | int) -> str:
    return f"{_key(key_set, key)}/versions/{wire.kid_segment(str(version))}"


def _external_key(key_set: str, kid: str) -> str:
    return f"{_set(key_set)}/external-keys/{wire.kid_segment(kid)}"


def _client(name: str) -> str:
    return f"/v1/clients/{segment(name, 'client')}"
