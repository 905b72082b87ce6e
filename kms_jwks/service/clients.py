"""Use cases on callers: clients, their API tokens, and grants."""

from __future__ import annotations

from dataclasses import replace

import structlog
from msgspec import UNSET

from kms_jwks import authn, errors, wire
from kms_jwks.access import Caller, Permission, Role, combined_duties
from kms_jwks.model import ApiToken, Client, Grant, Id, Instant, KeySet, new_id
from kms_jwks.service import views
from kms_jwks.service.control import Control, check_name
from kms_jwks.service.guard import RequestContext
from kms_jwks.service.idempotency import find_created, record_created
from kms_jwks.store import ReadTx, WriteTx
from kms_jwks.times import later, to_datetime

log = structlog.get_logger(__name__)


class Clients:
    """Clients, tokens and grants, for administrators."""

    def __init__(self, control: Control) -> None:
        self._control = control

    # --- clients

    def list(self, context: RequestContext, limit: int, cursor: str | None) -> wire.Page:
        """Every client."""
        with self._control.store.read() as tx:
            self._control.guard.enter(tx, context, Permission.CLIENT_READ)
            rows = tx.clients(after=Id(cursor) if cursor else None, limit=limit + 1)
        return views.page(rows, limit, views.client)

    def get(self, context: RequestContext, name: str) -> wire.Client:
        """One client. Raises ClientNotFound."""
        with self._control.store.read() as tx:
            self._control.guard.enter(tx, context, Permission.CLIENT_READ)
            return views.client(find_client(tx, name))

    def create(self, context: RequestContext, request: wire.ClientCreate) -> wire.Client:
        """A new client, without token or grant."""
        with self._control.change() as tx:
            self._control.guard.enter(tx, context, Permission.CLIENT_MANAGE)
            value = find_created(tx, context, request, tx.client_by_id)
            if value is None:
                value = add_client(tx, request.name)
                record_created(tx, context, request, value.id)
            return views.client(value)

    def delete(self, context: RequestContext, name: str) -> None:
        """Remove a client with its tokens and grants; its name stays taken. No worker admits it once this returns."""
        with self._control.change_everywhere() as tx:
            caller = self._control.guard.enter(tx, context, Permission.CLIENT_MANAGE)
            value = find_client(tx, name)
            if caller.client_id == value.id:
                raise errors.Conflict("A client cannot delete its own client.", next_step="Use another administrator.")
            now = tx.now()
            for token in tx.tokens(value.id):
                if token.revoked_at is None:
                    tx.save(replace(token, revoked_at=now))
            for grant in tx.grants(value.id):
                tx.save(replace(grant, deleted_at=now))
            tx.save(replace(value, deleted_at=now))

    # --- tokens

    def tokens(
        self, context: RequestContext, client: str, limit: int, cursor: str | None, *, state: str | None = None
    ) -> wire.Page:
        """A client's tokens, without their secrets: all, or those that are `valid`, `expired` or `revoked`."""
        with self._control.store.read() as tx:
            self._control.guard.enter(tx, context, Permission.CLIENT_READ)
            owner = find_client(tx, client)
            after, now = Id(cursor) if cursor else None, tx.now()
            rows = tx.tokens(owner.id, after=after, limit=None if state else limit + 1)
        if state is not None:
            rows = [t for t in rows if token_state(t, now) == state]
        return views.page(rows, limit, lambda t: views.token(owner, t, now))

    def create_token(self, context: RequestContext, client: str, request: wire.TokenCreate) -> wire.TokenCreated:
        """A new API token. The registry keeps its SHA-256; the token itself is in this answer and nowhere else.

        Raises TokenNotShownAgain for a call that is sent again with its Idempotency-Key.
        """
        with self._control.change() as tx:
            self._control.guard.enter(tx, context, Permission.CLIENT_MANAGE)
            _require_first(find_created(tx, context, request, tx.token, client))
            made, row = add_token(tx, find_client(tx, client), request.expires_in)
            record_created(tx, context, request, row.id, client)
        return wire.TokenCreated(token=made.token, id=row.id, expires_at=to_datetime(row.expires_at))

    def rotate_token(
        self, context: RequestContext, client: str, token_id: str, request: wire.TokenRotate
    ) -> wire.TokenRotated:
        """A new token in place of `token_id`, which ends after `overlap` or at its own end, whichever comes first.

        Every worker knows the old one's end once this returns. Raises Conflict for a token that was revoked or has
        expired. A client cannot rotate its own token without `client:manage`: a thief would renew a stolen one for
        ever.
        """
        with self._control.change_everywhere() as tx:
            self._control.guard.enter(tx, context, Permission.CLIENT_MANAGE)
            owner = find_client(tx, client)
            _require_first(find_created(tx, context, request, tx.token, client, token_id))
            old = _find_token(tx, owner, token_id)
            _require_valid(owner, old, tx.now())
            made, row = add_token(tx, owner, request.expires_in)
            record_created(tx, context, request, row.id, client, token_id)
            end = min(old.expires_at, later(tx.now(), request.overlap))
            tx.save(replace(old, expires_at=end, replaced_by=row.id))
        return wire.TokenRotated(
            token=made.token,
            id=row.id,
            expires_at=to_datetime(row.expires_at),
            replaces=old.id,
            replaced_expires_at=to_datetime(end),
        )

    def revoke_token(self, context: RequestContext, client: str, token_id: str) -> None:
        """Revoke a token. No worker accepts it once this returns."""
        with self._control.change_everywhere() as tx:
            self._control.guard.enter(tx, context, Permission.CLIENT_MANAGE)
            token = _find_token(tx, find_client(tx, client), token_id)
            if token.revoked_at is None:
                tx.save(replace(token, revoked_at=tx.now()))

    # --- grants

    def grants(
        self,
        context: RequestContext,
        limit: int,
        cursor: str | None,
        *,
        client: str | None = None,
        role: str | None = None,
        key_set: str | None = None,
    ) -> wire.Page:
        """Every grant, or those of a client, of a role, or that name a key set. Raises ClientNotFound, KeySetNotFound.

        A grant for everything names no key set.
        """
        with self._control.store.read() as tx:
            self._control.guard.enter(tx, context, Permission.CLIENT_READ)
            rows = tx.grants(
                None if client is None else find_client(tx, client).id,
                role=role,
                key_set_id=None if key_set is None else _find_key_set(tx, key_set).id,
                after=Id(cursor) if cursor else None,
                limit=limit + 1,
            )
            return views.page(rows, limit, lambda g: views.grant(tx, g))

    def grant(self, context: RequestContext, grant_id: str) -> wire.Grant:
        """One grant. Raises GrantNotFound."""
        with self._control.store.read() as tx:
            self._control.guard.enter(tx, context, Permission.CLIENT_READ)
            return views.grant(tx, _find_grant(tx, grant_id))

    def create_grant(self, context: RequestContext, request: wire.GrantCreate) -> wire.Grant:
        """Give a client a role in a scope; the same grant twice is one. A client cannot change its own grants.

        Raises CombinedDuties where the client would administrate what it signs or overrides, unless the request
        accepts that.
        """
        with self._control.change() as tx:
            caller = self._control.guard.enter(tx, context, Permission.GRANT_MANAGE)
            earlier = find_created(tx, context, request, tx.grant)
            if earlier is not None:
                return views.grant(tx, earlier)
            owner = find_client(tx, request.client)
            scope = request.scope
            key_set_id = key_id = None
            if scope.key_set is not UNSET:
                key_set = _find_key_set(tx, scope.key_set)
                key_set_id = key_set.id
                if scope.key is not UNSET:
                    key = tx.key(key_set.id, scope.key)
                    if key is None:
                        raise errors.KeyNotFound(f"There is no key {scope.key!r} in key set {scope.key_set!r}.")
                    key_id = key.id
            elif scope.key is not UNSET:
                raise errors.InvalidField("scope: a key needs its key_set", fields={"field": "scope"})
            _require_other_client(caller, owner.id)
            held = {grant.id for grant in tx.grants(owner.id)}
            made = add_grant(
                tx,
                owner,
                Role(request.role),
                key_set_id,
                key_id,
                created_by=caller.client,
                accept_combined_duties=request.accept_combined_duties,
            )
            record_created(tx, context, request, made.id)
            answer = views.grant(tx, made)
        if answer.combined_with and answer.id not in held:
            log.warning("combined_duties", grant=answer.id, client=answer.client, role=answer.role, by=caller.client)
        return answer

    def delete_grant(self, context: RequestContext, grant_id: str) -> None:
        """Take a grant away from another client. No worker honours it once this returns."""
        with self._control.change_everywhere() as tx:
            caller = self._control.guard.enter(tx, context, Permission.GRANT_MANAGE)
            grant = _find_grant(tx, grant_id)
            _require_other_client(caller, grant.client_id)
            tx.save(replace(grant, deleted_at=tx.now()))


def find_client(tx: ReadTx, name: str) -> Client:
    """The client of that name. Raises ClientNotFound."""
    found = tx.client(name)
    if found is None:
        raise errors.ClientNotFound(f"There is no client {name!r}.")
    return found


def add_client(tx: WriteTx, name: str) -> Client:
    """Write a client. Raises InvalidField, NameTaken."""
    value = Client(new_id(), check_name(name), tx.now())
    tx.add(value)
    return value


def add_token(tx: WriteTx, owner: Client, expires_in: int) -> tuple[authn.NewToken, ApiToken]:
    """A new token of `owner` that lives `expires_in` seconds."""
    made = authn.new_token()
    now = tx.now()
    row = ApiToken(new_id(), owner.id, made.sha256, now, later(now, expires_in))
    tx.add(row)
    return made, row


def add_grant(
    tx: WriteTx,
    owner: Client,
    role: Role,
    key_set_id: Id | None,
    key_id: Id | None,
    *,
    created_by: str | None = None,
    accept_combined_duties: bool = False,
) -> Grant:
    """A new grant, or the one that the client has already. Raises CombinedDuties unless they are accepted."""
    held = tx.grants(owner.id)
    for existing in held:
        if (existing.role, existing.key_set_id, existing.key_id) == (role.value, key_set_id, key_id):
            return existing
    value = Grant(new_id(), owner.id, role.value, tx.now(), key_set_id, key_id, created_by=created_by)
    if others := combined_duties(held, value):
        if not accept_combined_duties:
            raise errors.CombinedDuties(
                f"Client {owner.name!r} has the role {' and '.join(sorted({g.role for g in others}))} within the same "
                f"scope, which may not be combined with {role.value}.",
                fields={"grants": [g.id for g in others]},
            )
        value = replace(value, accepted_combined_duties=True)
    tx.add(value)
    return value


def _find_token(tx: ReadTx, owner: Client, token_id: str) -> ApiToken:
    found = tx.token(Id(token_id))
    if found is None or found.client_id != owner.id:
        raise errors.ApiTokenNotFound(f"Client {owner.name!r} has no such token.")
    return found


def _require_valid(owner: Client, token: ApiToken, now: Instant) -> None:
    if token.revoked_at is not None or token.expires_at <= now:
        what = "has expired" if token.revoked_at is None else "was revoked"
        raise errors.Conflict(
            f"Token {token.id} {what} and cannot be rotated.",
            next_step=f"Create a new one: kms-jwks client token create {owner.name}",
        )


def _require_first(made: ApiToken | None) -> None:
    """Raise TokenNotShownAgain for the token that an earlier call made: its plain text is kept nowhere."""
    if made is not None:
        raise errors.TokenNotShownAgain(
            f"The first call with this Idempotency-Key made token {made.id}.", fields={"token_id": made.id}
        )


def _require_other_client(caller: Caller, owner: Id) -> None:
    if caller.client_id == owner:
        raise errors.Forbidden(
            "A client cannot change its own grants.",
            next_step="Ask another administrator to change them.",
        )


def _find_key_set(tx: ReadTx, name: str) -> KeySet:
    found = tx.key_set(name)
    if found is None:
        raise errors.KeySetNotFound(f"There is no key set {name!r}.")
    return found


def token_state(token: ApiToken, now: Instant) -> str:
    """`valid`, `expired` or `revoked`; a revoked token stays revoked when its time is over."""
    if token.revoked_at is not None:
        return "revoked"
    return "valid" if token.expires_at > now else "expired"


def _find_grant(tx: ReadTx, grant_id: str) -> Grant:
    found = tx.grant(Id(grant_id))
    if found is None or found.deleted_at is not None:
        raise errors.GrantNotFound("There is no such grant.")
    return found
