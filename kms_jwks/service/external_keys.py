"""Use cases on external keys: foreign public keys that a key set publishes, verify-only, until a date."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import structlog
from msgspec import UNSET

from kms_jwks import errors, jose, wire
from kms_jwks.access import Permission
from kms_jwks.custodian import document_limits
from kms_jwks.model import ExternalKey, Id, KeySet, VersionState, new_id
from kms_jwks.service import views
from kms_jwks.service.control import Control, find_algorithm, read_instant
from kms_jwks.service.guard import RequestContext
from kms_jwks.service.idempotency import find_created, record_created
from kms_jwks.store import ReadTx

log = structlog.get_logger(__name__)


class ExternalKeys:
    """External keys, for administrators."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def list(self, context: RequestContext, key_set: str, limit: int, cursor: str | None) -> wire.Page:
        """Every external key that was added to the set, removed ones included."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_set(tx, context, Permission.KEY_READ, key_set)
            after = Id(cursor) if cursor else None
            rows = tx.external_keys(found.key_set.id, include_removed=True, after=after, limit=limit + 1)
        return views.page(rows, limit, views.external_key)

    def get(self, context: RequestContext, key_set: str, kid: str) -> wire.ExternalKey:
        """One external key. Raises ExternalKeyNotFound."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_set(tx, context, Permission.KEY_READ, key_set)
            return views.external_key(_find(tx, found.key_set, kid))

    def create(self, context: RequestContext, key_set: str, request: wire.ExternalKeyCreate) -> wire.ExternalKey:
        """Publish a foreign public key until `remove_at`. Raises InvalidJwk, KeyTaken, KidTaken, LimitReached."""
        with self._control.change() as tx:
            found = self._control.guard.enter_set(tx, context, Permission.EXTERNAL_KEY_MANAGE, key_set)
            every = {e.id: e for e in tx.external_keys(found.key_set.id, include_removed=True)}
            earlier = find_created(tx, context, request, every.get, key_set)
            if earlier is not None:
                return views.external_key(earlier)
            alg = find_algorithm(request.alg)
            remove_at = read_instant(request.remove_at, "remove_at")
            if remove_at <= found.now:
                raise errors.InvalidField("remove_at: lies in the past", fields={"field": "remove_at"})
            jwk = jose.check_public_jwk(_read_jwk(request), alg)
            _require_not_revoked(tx, jwk)
            document_limits.check_compatible_algorithms(tx, found.key_set, alg.name)
            document_limits.require_room(tx, found.key_set, alg.name, more_externals=1)
            value = ExternalKey(
                id=new_id(),
                key_set_id=found.key_set.id,
                kid=request.kid,
                alg=alg.name,
                public_jwk=jwk,
                created_at=found.now,
                remove_at=remove_at,
                created_by=found.caller.client,
            )
            tx.add(value)
            record_created(tx, context, request, value.id, key_set)
            document_limits.require_small_document(tx, found.key_set)
            if found.key_set.first_published_at is None:
                published = replace(found.key_set, first_published_at=found.now, updated_at=found.now)
                tx.save(replace(published, revision=published.revision + 1))
        log.warning("external_key_added", key_set=key_set, kid=value.kid, client=value.created_by)
        return views.external_key(value)

    def delete(self, context: RequestContext, key_set: str, kid: str) -> None:
        """Take an external key out of the JWKS before its date. Its kid stays taken. Raises ExternalKeyNotFound."""
        with self._control.change() as tx:
            found = self._control.guard.enter_set(tx, context, Permission.EXTERNAL_KEY_REMOVE, key_set)
            tx.save(replace(_find(tx, found.key_set, kid), removed_at=found.now))


def _find(tx: ReadTx, key_set: KeySet, kid: str) -> ExternalKey:
    value = tx.external_key(key_set.id, kid)
    if value is None:
        raise errors.ExternalKeyNotFound("The key set publishes no external key under this kid.")
    return value


def _require_not_revoked(tx: ReadTx, jwk: Mapping[str, str]) -> None:
    """Raise KeyTaken for the public key of a revoked version: no verifier may trust it again, under any kid."""
    for version in tx.versions(states={VersionState.REVOKED, VersionState.DESTROYED}):
        if version.revoked_at is not None and dict(version.public_jwk or {}) == dict(jwk):
            raise errors.KeyTaken(
                f"The public key is that of a revoked version, with kid {version.kid}.",
                next_step="Publish another key: this one may be in the wrong hands.",
                fields={"kid": version.kid},
            )


def _read_jwk(request: wire.ExternalKeyCreate) -> dict[str, object]:
    if (request.jwk is UNSET) == (request.pem is UNSET):
        raise errors.InvalidField("Exactly one of jwk and pem must be there.", fields={"field": "jwk"})
    if request.jwk is not UNSET:
        return request.jwk
    assert request.pem is not UNSET
    return dict(jose.jwk_from_pem(request.pem))
