"""Use cases on external keys: foreign public keys that a key set publishes, verify-only, until a date."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

import structlog
from msgspec import UNSET

from kms_jwks import errors, jose, wire
from kms_jwks.access import Permission
from kms_jwks.algorithms import Algorithm
from kms_jwks.custodian import document_limits, transitions
from kms_jwks.model import ExternalKey, ExternalKeyChange, Id, Instant, KeySet, VersionState, new_id
from kms_jwks.service import adoption, views
from kms_jwks.service.control import Control, check_kid, find_algorithm, read_instant, take_kid
from kms_jwks.service.guard import RequestContext
from kms_jwks.service.idempotency import find_created, record_created
from kms_jwks.store import ReadTx

log = structlog.get_logger(__name__)

_MOST_CHANGES: Final = 100
"""Changes of one record; each snapshot reads them all."""


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
            return views.page(rows, limit, lambda e: views.external_key(tx, e))

    def get(self, context: RequestContext, key_set: str, kid: str) -> wire.ExternalKey:
        """One external key. Raises ExternalKeyNotFound."""
        with self._control.store.read() as tx:
            found = self._control.guard.enter_set(tx, context, Permission.KEY_READ, key_set)
            return views.external_key(tx, _find(tx, found.key_set, kid))

    def create(self, context: RequestContext, key_set: str, request: wire.ExternalKeyCreate) -> wire.ExternalKey:
        """Publish a foreign public key until `remove_at`; one that was removed comes back by the same call.

        Raises InvalidJwk, KeyTaken, KidTaken, LimitReached.
        """
        with self._control.change() as tx:
            found = self._control.guard.enter_set(tx, context, Permission.EXTERNAL_KEY_MANAGE, key_set)
            every = {e.id: e for e in tx.external_keys(found.key_set.id, include_removed=True)}
            earlier = find_created(tx, context, request, every.get, key_set)
            if earlier is not None:
                return views.external_key(tx, earlier)
            given = _read_key(request)
            remove_at = _read_date(request.remove_at, found.now)
            adoption.require_not_revoked(tx, given.jwk)
            _require_unpublished(tx, found.key_set, given)
            document_limits.check_compatible_algorithms(tx, found.key_set, given.alg.name)
            document_limits.require_room(tx, found.key_set, given.alg.name, more_externals=1)
            value = ExternalKey(
                id=new_id(),
                key_set_id=found.key_set.id,
                kid=given.kid,
                alg=given.alg.name,
                public_jwk=given.jwk,
                created_at=found.now,
                remove_at=remove_at,
                created_by=found.caller.client,
                changes=(ExternalKeyChange("added", found.now, remove_at, found.caller.client),),
            )
            tx.add(value)
            record_created(tx, context, request, value.id, key_set)
            document_limits.require_small_document(tx, found.key_set)
            if found.key_set.first_published_at is None:
                published = replace(found.key_set, first_published_at=found.now, updated_at=found.now)
                tx.save(replace(published, revision=published.revision + 1))
            answer = views.external_key(tx, value)
        log.warning("external_key_added", key_set=key_set, kid=value.kid, client=value.created_by)
        answer.ignored = given.ignored
        return answer

    def update(
        self, context: RequestContext, key_set: str, kid: str, request: wire.ExternalKeyPatch
    ) -> wire.ExternalKey:
        """Move the date at which an external key leaves the JWKS.

        Raises ExternalKeyNotFound, InvalidField, and KeyTaken for a later date of a key that was revoked anywhere.
        """
        with self._control.change() as tx:
            found = self._control.guard.enter_set(tx, context, Permission.EXTERNAL_KEY_MANAGE, key_set)
            value = _find(tx, found.key_set, kid)
            remove_at = _read_date(request.remove_at, found.now)
            if remove_at > value.remove_at:
                adoption.require_not_revoked(tx, value.public_jwk)
            if remove_at != value.remove_at:
                if len(value.changes) >= _MOST_CHANGES:
                    raise errors.LimitReached(
                        f"The record of this external key holds {_MOST_CHANGES} changes.",
                        next_step="Remove the key and add it again, with a date that can stay.",
                        fields={"limit": _MOST_CHANGES},
                    )
                moved = ExternalKeyChange("moved", found.now, remove_at, found.caller.client)
                value = replace(value, remove_at=remove_at, changes=(*value.changes, moved))
                tx.save(value)
            return views.external_key(tx, value)

    def delete(self, context: RequestContext, key_set: str, kid: str) -> None:
        """Take an external key out of the JWKS before its date. Its kid stays its own. Raises ExternalKeyNotFound."""
        with self._control.change() as tx:
            found = self._control.guard.enter_set(tx, context, Permission.EXTERNAL_KEY_REMOVE, key_set)
            value = _find(tx, found.key_set, kid)
            transitions.withdraw_external(tx, value, "removed", who=found.caller.client)


@dataclass(frozen=True, slots=True)
class _GivenKey:
    """A foreign public key as a request gives it, checked. `ignored` are the members of its JWK that are dropped."""

    kid: str
    alg: Algorithm
    jwk: dict[str, str]
    ignored: list[str]


def _find(tx: ReadTx, key_set: KeySet, kid: str) -> ExternalKey:
    value = tx.external_key(key_set.id, kid)
    if value is None:
        raise errors.ExternalKeyNotFound("The key set publishes no external key under this kid.")
    return value


def _require_unpublished(tx: ReadTx, key_set: KeySet, given: _GivenKey) -> None:
    """Raise KidTaken where the document holds the kid already, or the kid is bound to another key."""
    published = tx.external_key(key_set.id, given.kid)
    if published is not None and dict(published.public_jwk) == given.jwk:
        raise errors.KidTaken(
            "The key set publishes this very key under this kid already.",
            next_step="To move its date, send PATCH with remove_at, or use `kms-jwks external-key update`.",
        )
    version = tx.version_by_kid(key_set.id, given.kid)
    if version is not None and (version.state.in_jwks or version.state is VersionState.CREATING):
        raise errors.KidTaken(
            f"The kid is that of version {version.number} of a key in this set, which is {version.state.value}.",
            next_step="Nothing needs to be added where it is the same key; another key needs another kid.",
        )
    bound = tx.kid_binding(key_set.id, given.kid)
    if bound is not None and bound != jose.thumbprint(given.jwk):
        raise errors.KidTaken(
            "The kid is bound to another public key of this key set, for ever.",
            next_step="Publish the key under the kid that its tokens carry. A key with a kid that was used before "
            "needs a key set of its own.",
        )


def _read_date(moment: datetime, now: Instant) -> Instant:
    remove_at = read_instant(moment, "remove_at")
    if remove_at <= now:
        raise errors.InvalidField("remove_at: lies in the past", fields={"field": "remove_at"})
    return remove_at


def _read_key(request: wire.ExternalKeyCreate) -> _GivenKey:
    if (request.jwk is UNSET) == (request.pem is UNSET):
        raise errors.InvalidField("Exactly one of jwk and pem must be there.", fields={"field": "jwk"})
    if request.jwk is not UNSET:
        jwk = request.jwk
    else:
        assert request.pem is not UNSET
        jwk = dict(jose.jwk_from_pem(request.pem))
    if "keys" in jwk and "kty" not in jwk:
        raise errors.InvalidJwk(
            "That is a JWKS, not a JWK.",
            next_step="Send each of its keys in a call of its own, or use `kms-jwks external-key add --jwks`.",
        )
    kid = take_kid(request.kid, jwk.get("kid"))
    if kid is None:
        raise errors.InvalidField("kid: missing, and the key names none", fields={"field": "kid"})
    if request.alg is UNSET and not isinstance(jwk.get("alg"), str):
        raise errors.InvalidField(
            "alg: missing, and the key names none",
            next_step="Give the algorithm that the header of its tokens names.",
            fields={"field": "alg"},
        )
    alg = find_algorithm(request.alg if request.alg is not UNSET else str(jwk["alg"]))
    return _GivenKey(check_kid(kid), alg, jose.check_public_jwk(jwk, alg), jose.ignored_members(jwk))
