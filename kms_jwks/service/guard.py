"""The choke point: every use case begins here. It authenticates the caller, authorises the call, and reports both.

The data plane reads a snapshot, the control plane its own transaction; both give the same answers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from kms_jwks import errors
from kms_jwks.access import EVERYTHING, INSTALLATION_WIDE, Caller, Permission, Scope, allow, allow_within
from kms_jwks.authn import Credential, credential_from_header
from kms_jwks.model import Id, Instant, Key, KeySet
from kms_jwks.store import ReadTx
from kms_jwks.worker.snapshot import KnownToken, PublishedSet, SigningKey, Snapshot, known_token


@dataclass(slots=True, eq=False)
class RequestContext:
    """One call: what the server knew when it came in, and what the use case found out about it.

    `authorization` is the Authorization header and `peer_certificate` the client certificate in DER; neither is shown
    or logged. `peer` is the address of the connection's other end, `route` the path template that matched.
    """

    authorization: str | None = field(default=None, repr=False)
    peer_certificate: bytes | None = field(default=None, repr=False)
    request_id: str = ""
    peer: str | None = None
    route: str | None = None
    idempotency_key: str | None = None
    """The Idempotency-Key of a creation, without its quotes."""
    credential: Credential | None = field(default=None, repr=False)
    """Set by the guard: what the Authorization header holds, parsed once."""
    caller: Caller | None = None
    """Set by the guard once the credentials are known, also where the call is refused for missing rights."""
    backend: str | None = None
    """Set by the signing path before it asks a backend, so that a failure's log line names the backend."""


@dataclass(slots=True)
class Decision:
    """What the guard decided about one call, or is deciding.

    `permission` is None where the credentials were refused before a permission was looked at. `key_set` and `key` are
    the names in the request, known or not. `error` is the problem code of the refusal, None where the call was let in.
    """

    permission: Permission | None
    key_set: str | None
    key: str | None
    error: str | None = None


Observer = Callable[[RequestContext, Decision], None]
"""Called once for each decision, with the context whose `caller` is set where the credentials are good."""


@dataclass(frozen=True, slots=True)
class Entered:
    """A control-plane call that was let in, with the things it named."""

    caller: Caller
    now: Instant
    key_set: KeySet
    key: Key


@dataclass(frozen=True, slots=True)
class EnteredSet:
    """The same for calls that name a key set alone."""

    caller: Caller
    now: Instant
    key_set: KeySet


_REFUSALS = (errors.Unauthenticated, errors.Forbidden, errors.NotFound)


class Guard:
    """Authenticates and authorises; `observe` is told of every decision. Remembers when each token was last used."""

    def __init__(self, observe: Observer | None = None) -> None:
        self._observe = observe
        self._lock = threading.Lock()
        self._used: dict[Id, Instant] = {}
        self.fallback: Callable[[], Snapshot] | None = None
        """The last snapshot of this worker; it raises where there is none. Set once, after the worker is assembled."""

    # --- before a body is decoded

    def authenticate(self, source: Snapshot | ReadTx, context: RequestContext, now: Instant) -> None:
        """Set `context.caller`. What the caller may do is decided by the use case. Raises Unauthenticated."""
        try:
            self._authenticate(source, context, now)
        except errors.Unauthenticated as error:
            if self._observe is not None:
                self._observe(context, Decision(None, None, None, error.code))
            raise

    # --- data plane

    def admit_set(
        self, snapshot: Snapshot, context: RequestContext, permission: Permission, name: str, now: Instant
    ) -> PublishedSet:
        """Let a data-plane call in to the public side of a key set; a grant on one of its keys is enough.

        Raises Unauthenticated, Forbidden, KeySetNotFound.
        """
        with self._deciding(context, Decision(permission, name, None)):
            caller = self._authenticate(snapshot, context, now)
            key_set = self._known_to(caller, snapshot.key_sets.get(name), name)
            if not allow_within(caller.grants, permission, key_set.id):
                raise _forbidden(caller, permission)
            return key_set

    def admit_key(
        self,
        snapshot: Snapshot,
        context: RequestContext,
        permission: Callable[[PublishedSet], Permission],
        key_set_name: str,
        key_name: str,
        now: Instant,
    ) -> tuple[PublishedSet, SigningKey]:
        """Let a data-plane call in to a key; the permission may depend on the set's purpose.

        Raises Unauthenticated, Forbidden, KeySetNotFound, KeyNotFound.
        """
        with self._deciding(context, Decision(None, key_set_name, key_name)) as decision:
            caller = self._authenticate(snapshot, context, now)
            key_set = self._known_to(caller, snapshot.key_sets.get(key_set_name), key_set_name)
            decision.permission = wanted = permission(key_set)
            key = key_set.keys.get(key_name)
            if not allow(caller.grants, wanted, Scope(key_set.id, key.id if key else None)):
                raise _forbidden(caller, wanted)
            if key is None:
                raise errors.KeyNotFound(f"There is no key {key_name!r} in key set {key_set_name!r}.")
            return key_set, key

    def identify(self, snapshot: Snapshot, context: RequestContext, now: Instant) -> Caller | None:
        """The caller of a route that needs no credentials and shows more to some callers; None without good ones."""
        if context.authorization is None or not snapshot.complete:
            return None
        try:
            return self._authenticate(snapshot, context, now)
        except errors.Unauthenticated:
            return None

    # --- control plane

    def enter(self, tx: ReadTx, context: RequestContext, permission: Permission) -> Caller:
        """Let a call in that concerns the installation as a whole."""
        with self._deciding(context, Decision(permission, None, None)):
            caller = self._authenticate(tx, context, tx.now())
            if not allow(caller.grants, permission, EVERYTHING):
                raise _forbidden(caller, permission)
            return caller

    def enter_any(self, tx: ReadTx, context: RequestContext, permission: Permission) -> Caller:
        """Let a listing in that shows each caller what its grants cover; it must have the permission somewhere."""
        with self._deciding(context, Decision(permission, None, None)):
            caller = self._authenticate(tx, context, tx.now())
            if not any(allow([g], permission, Scope(g.key_set_id, g.key_id)) for g in caller.grants):
                raise _forbidden(caller, permission)
            return caller

    def enter_set(self, tx: ReadTx, context: RequestContext, permission: Permission, name: str) -> EnteredSet:
        """Let a call in that names a key set. Raises Unauthenticated, Forbidden, KeySetNotFound."""
        with self._deciding(context, Decision(permission, name, None)):
            caller = self._authenticate(tx, context, tx.now())
            key_set = tx.key_set(name)
            if not allow(caller.grants, permission, Scope(key_set.id) if key_set else EVERYTHING):
                raise _forbidden(caller, permission)
            if key_set is None:
                raise errors.KeySetNotFound(f"There is no key set {name!r}.")
            return EnteredSet(caller, tx.now(), key_set)

    def enter_key(self, tx: ReadTx, context: RequestContext, permission: Permission, key_set: str, key: str) -> Entered:
        """Let a call in that names a key. Raises Unauthenticated, Forbidden, KeySetNotFound, KeyNotFound."""
        with self._deciding(context, Decision(permission, key_set, key)):
            caller = self._authenticate(tx, context, tx.now())
            found_set = tx.key_set(key_set)
            found_key = tx.key(found_set.id, key) if found_set else None
            scope = Scope(found_set.id, found_key.id if found_key else None) if found_set else EVERYTHING
            if not allow(caller.grants, permission, scope):
                raise _forbidden(caller, permission)
            if found_set is None:
                raise errors.KeySetNotFound(f"There is no key set {key_set!r}.")
            if found_key is None:
                raise errors.KeyNotFound(f"There is no key {key!r} in key set {key_set!r}.")
            return Entered(caller, tx.now(), found_set, found_key)

    def require(self, context: RequestContext, permission: Permission, scope: Scope) -> None:
        """A further permission, or the same for a further scope, of a caller that was let in. Raises Forbidden."""
        with self._deciding(context, Decision(permission, None, None)):
            assert context.caller is not None, "only a caller that was let in can be asked for more"
            if not allow(context.caller.grants, permission, scope):
                raise _forbidden(context.caller, permission)

    # --- last use

    def drain_used(self) -> dict[Id, Instant]:
        """Token ids and when they were last seen, since the last drain."""
        with self._lock:
            used, self._used = self._used, {}
        return used

    # --- inside

    @contextmanager
    def _deciding(self, context: RequestContext, decision: Decision) -> Iterator[Decision]:
        """Report the decision when the block ends: as a refusal where one of `_REFUSALS` leaves it, else as let in."""
        try:
            yield decision
        except _REFUSALS as error:
            decision.error = error.code
            if self._observe is not None:
                self._observe(context, decision)
            raise
        if self._observe is not None:
            self._observe(context, decision)

    def _authenticate(self, source: Snapshot | ReadTx, context: RequestContext, now: Instant) -> Caller:
        if not isinstance(source, Snapshot):
            source = self._believed(source)
        if isinstance(source, Snapshot) and not source.complete:
            raise errors.StoreUnavailable("This worker has not read the registry yet.", retry_after=1)
        credential = context.credential
        if credential is None:
            credential = context.credential = credential_from_header(context.authorization)
        sha256 = credential.sha256
        known = source.tokens.get(sha256) if isinstance(source, Snapshot) else _token_in(source, sha256)
        if known is None:
            raise errors.CredentialsUnknown
        if known.revoked:
            raise errors.CredentialsRevoked
        if known.expires_at <= now:
            raise errors.CredentialsExpired
        self._used[known.id] = now
        context.caller = known.caller
        return known.caller

    def _believed(self, tx: ReadTx) -> Snapshot | ReadTx:
        """Where a control-plane call looks its token up: in its own transaction.

        A registry that has lost changes is not believed: a token that was revoked since would work again. Its readers
        are let in by this worker's last snapshot; changes are refused when they begin (`Store.write`). Raises
        RegistryRolledBack where there is no such snapshot.
        """
        try:
            tx.require_known_history()
        except errors.RegistryRolledBack:
            if self.fallback is None:
                raise
            return self.fallback()
        return tx

    def _known_to(self, caller: Caller, key_set: PublishedSet | None, name: str) -> PublishedSet:
        """A caller without a grant in a set gets the same answer whether the set exists or not."""
        known = {grant.key_set_id for grant in caller.grants}
        if None not in known and (key_set is None or key_set.id not in known):
            raise errors.Forbidden("No grant of this client covers that key set.")
        if key_set is None:
            raise errors.KeySetNotFound(f"There is no key set {name!r}.")
        return key_set


def _forbidden(caller: Caller, permission: Permission) -> errors.Forbidden:
    if permission in INSTALLATION_WIDE:
        return errors.Forbidden(
            f"Client {caller.client!r} has no grant over everything with the permission {permission.value}.",
            next_step="Ask an administrator of the whole installation to do this: a grant over a key set or a key does "
            "not give this permission.",
            fields={"permission": permission.value},
        )
    return errors.Forbidden(
        f"Client {caller.client!r} has no grant with the permission {permission.value} here.",
        fields={"permission": permission.value},
    )


def _token_in(tx: ReadTx, sha256: str) -> KnownToken | None:
    token = tx.token_by_sha256(sha256)
    client = tx.client_by_id(token.client_id) if token else None
    if token is None or client is None or client.deleted_at is not None:
        return None
    return known_token(token, client.name, tx.grants(client.id))
