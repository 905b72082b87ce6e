"""Use cases on external keys: foreign public keys that a key set publishes, verify-only, until a date."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from msgspec import UNSET

from kms_jwks import errors, jose, wire
from kms_jwks.access import Permission
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.custodian import document_limits
from kms_jwks.model import ExternalKey, Id, Instant, VersionState, new_id
from kms_jwks.service import views
from kms_jwks.service.context import RequestContext
from kms_jwks.service.control import Control
from kms_jwks.service.keys import check_compatible_algorithms
from kms_jwks.store import ReadTx
from kms_jwks.times import to_instant


class ExternalKeys:
    """External keys, for administrators."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def list(self, context: RequestContext, key_set: str, limit: int, cursor: str | None) -> wire.Page:
        """The external keys that the set publishes."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_set(tx, context, Permission.KEY_READ, key_set)
            after = Id(cursor) if cursor else None
            rows = tx.external_keys(found.key_set.id, after=after, limit=limit + 1)
        return views.page([views.external_key(e) for e in rows], [e.id for e in rows], limit)

    def get(self, context: RequestContext, key_set: str, kid: str) -> wire.ExternalKey:
        """One external key. Raises ExternalKeyNotFound."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_set(tx, context, Permission.KEY_READ, key_set)
            value = tx.external_key(found.key_set.id, kid)
        if value is None:
            raise errors.ExternalKeyNotFound("The key set publishes no external key under this kid.")
        return views.external_key(value)

    def create(self, context: RequestContext, key_set: str, request: wire.ExternalKeyCreate) -> wire.ExternalKey:
        """Publish a foreign public key until `remove_at`. Raises InvalidJwk, KidTaken, LimitReached."""
        control = self._control
        with control.store.write() as tx:
            found = control.guard.enter_set(tx, context, Permission.EXTERNAL_KEY_MANAGE, key_set)
            alg = ALGORITHMS.get(request.alg)
            if alg is None:
                raise errors.UnsupportedAlgorithmRequested(f"The algorithm is none of {', '.join(sorted(ALGORITHMS))}.")
            remove_at = _remove_at(request)
            if remove_at <= found.now:
                raise errors.InvalidField("remove_at: lies in the past", fields={"field": "remove_at"})
            jwk = jose.check_public_jwk(_jwk(request), alg)
            _require_not_revoked(tx, jwk)
            check_compatible_algorithms(tx, found.key_set, alg.name)
            document_limits.require_room(tx, found.key_set, alg.name, more_externals=1)
            value = ExternalKey(
                id=new_id(),
                key_set_id=found.key_set.id,
                kid=request.kid,
                alg=alg.name,
                public_jwk=jwk,
                created_at=found.now,
                remove_at=remove_at,
            )
            tx.add(value)
            document_limits.require_small_document(tx, found.key_set)
            if found.key_set.first_published_at is None:
                tx.save(
                    replace(
                        found.key_set,
                        first_published_at=found.now,
                        updated_at=found.now,
                        revision=found.key_set.revision + 1,
                    )
                )
        control.confirmation.wait_for_live_workers(tx.committed_epoch)
        return views.external_key(value)

    def delete(self, context: RequestContext, key_set: str, kid: str) -> None:
        """Take an external key out of the JWKS before its date. Its kid stays taken."""
        control = self._control
        with control.store.write() as tx:
            found = control.guard.enter_set(tx, context, Permission.EXTERNAL_KEY_MANAGE, key_set)
            value = tx.external_key(found.key_set.id, kid)
            if value is None:
                raise errors.ExternalKeyNotFound("The key set publishes no external key under this kid.")
            tx.save(replace(value, removed_at=found.now))
        control.confirmation.wait_for_live_workers(tx.committed_epoch)


def _require_not_revoked(tx: ReadTx, jwk: Mapping[str, str]) -> None:
    """Raise KeyTaken for the public key of a revoked version: under whatever kid, nobody may trust it again."""
    for version in tx.versions(states={VersionState.REVOKED, VersionState.DESTROYED}):
        if version.revoked_at is not None and dict(version.public_jwk or {}) == dict(jwk):
            raise errors.KeyTaken(
                f"The key is a version that was revoked, with kid {version.kid}.",
                next_step="Publish another key: this one may be in the wrong hands.",
                fields={"kid": version.kid},
            )


def _jwk(request: wire.ExternalKeyCreate) -> dict[str, object]:
    if (request.jwk is UNSET) == (request.pem is UNSET):
        raise errors.InvalidField("Exactly one of jwk and pem must be there.", fields={"field": "jwk"})
    if request.jwk is not UNSET:
        return request.jwk
    assert request.pem is not UNSET
    return dict(jose.jwk_from_pem(request.pem))


def _remove_at(request: wire.ExternalKeyCreate) -> Instant:
    try:
        return to_instant(request.remove_at)
    except ValueError as error:
        raise errors.InvalidField(f"remove_at: {error}", fields={"field": "remove_at"}) from None
