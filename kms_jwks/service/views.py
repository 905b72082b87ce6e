"""The registry's values as the API's structs; reads what it needs in the caller's transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from msgspec import UNSET

from kms_jwks import exposure as exposures
from kms_jwks import issuers, jose, timeline, wire
from kms_jwks.access import combined_duties
from kms_jwks.model import (
    ApiToken,
    Client,
    ExternalKey,
    Grant,
    Id,
    Instant,
    Key,
    KeySet,
    KeyVersion,
    Purpose,
    VersionState,
)
from kms_jwks.store import ReadTx
from kms_jwks.times import optional, to_datetime
from kms_jwks.worker.snapshot import is_post_quantum


class Row(Protocol):
    """What a list can be made of."""

    @property
    def id(self) -> Id:
        """The value that a cursor holds."""


A = TypeVar("A", bound=wire.Answer)
R = TypeVar("R", bound=Row)


@dataclass(frozen=True, slots=True)
class Created(Generic[A]):
    """The answer to a creation. `complete` is False while the custodian still works on it (202 with a Location)."""

    answer: A
    complete: bool
    location: str


def key_set(tx: ReadTx, value: KeySet, public_url: str) -> wire.KeySet:
    """A key set with its keys."""
    return wire.KeySet(
        **_key_set_fields(value, public_url, post_quantum=_has_post_quantum(tx, value)),
        keys=[key(tx, value, k) for k in tx.keys(value.id)],
        external_keys=external_keys(tx, value),
        external_keys_removed=tx.count_removed_external_keys(value.id),
    )


def _key_set_fields(value: KeySet, public_url: str, *, post_quantum: bool) -> dict[str, Any]:
    """The members of `wire.KeySetFields`; `post_quantum` is whether the set has or had ML-DSA keys."""
    documents = f"{public_url}/{value.name}/.well-known"
    return {
        "name": value.name,
        "issuer": value.issuer,
        "access": value.access.value,
        "purpose": value.purpose.value,
        "cache_lifetime": value.cache_lifetime,
        "stale_if_error": value.stale_if_error,
        "existing_issuer": value.existing_issuer,
        "jwks_uri": f"{documents}/jwks.json",
        "jwks_pq_uri": f"{documents}/jwks-pq.json" if post_quantum else None,
        "warnings": _metadata_warnings(value, public_url),
        "first_published_at": optional(value.first_published_at),
        "created_at": to_datetime(value.created_at),
        "updated_at": to_datetime(value.updated_at),
        "revision": value.revision,
        "retired_at": optional(value.retired_at),
    }


def _metadata_warnings(value: KeySet, public_url: str) -> list[str]:
    """Where clients look for the issuer's metadata and this service does not serve it."""
    if value.purpose is not Purpose.JWT:
        return []
    places = issuers.metadata_urls(value.issuer)
    if f"{public_url}/{value.name}{issuers.OPENID_CONFIGURATION}" in places:
        return []
    if public_url + issuers.OPENID_CONFIGURATION in places:
        return ["The issuer's metadata is served only while this is the default key set (default_key_set)."]
    if not places:
        return ["The issuer is not a URL, so that no client discovers its metadata: give verifiers the jwks_uri."]
    where = f"Clients look for the issuer's metadata at {places[0]}, which is not served here"
    return [f"{where}: serve it there with this jwks_uri, or give verifiers the jwks_uri."]


def key_set_summaries(tx: ReadTx, public_url: str) -> Callable[[KeySet], wire.KeySetSummary]:
    """A function that makes the list's item of a key set. What all items are made from is read once."""
    keys: dict[Id, list[Key]] = {}
    for found in (every := tx.keys(None)):
        keys.setdefault(found.key_set_id, []).append(found)
    external: dict[Id, list[wire.ExternalKeySummary]] = {}
    for e in tx.external_keys():
        shown = wire.ExternalKeySummary(
            kid=e.kid, alg=e.alg, remove_at=to_datetime(e.remove_at), created_by=e.created_by
        )
        external.setdefault(e.key_set_id, []).append(shown)
    active = {v.key_id: v.kid for v in tx.versions(states={VersionState.ACTIVE})}
    post_quantum = {key_set_id for key_set_id, alg in tx.ever_published() if is_post_quantum(alg)}
    post_quantum |= {k.key_set_id for k in every if is_post_quantum(k.alg)}

    def summary(value: KeySet) -> wire.KeySetSummary:
        return wire.KeySetSummary(
            **_key_set_fields(value, public_url, post_quantum=value.id in post_quantum),
            keys=[
                wire.KeySummary(name=k.name, alg=k.alg, enabled=k.disabled_at is None, active_kid=active.get(k.id))
                for k in keys.get(value.id, [])
            ],
            external_keys=external.get(value.id, []),
        )

    return summary


def _has_post_quantum(tx: ReadTx, value: KeySet) -> bool:
    algs = [k.alg for k in tx.keys(value.id)] + [alg for _, alg in tx.ever_published(value.id)]
    return any(is_post_quantum(alg) for alg in algs)


def key(tx: ReadTx, owner: KeySet, value: Key) -> wire.Key:
    """A key with the versions that are not destroyed.

    A version adopted in spite of a weakness adds a warning, and so does the latest one if its pair was not made.
    """
    every = tx.versions(key_id=value.id)
    latest = max(every, key=lambda v: v.number, default=None)
    versions = [v for v in every if v.state is not VersionState.DESTROYED]
    active = next((v for v in versions if v.state is VersionState.ACTIVE), None)
    p = value.policy
    return wire.Key(
        name=value.name,
        key_set=owner.name,
        alg=value.alg,
        rsa_bits=value.rsa_bits,
        backend=value.backend,
        enabled=value.disabled_at is None,
        active_kid=active.kid if active else None,
        policy=wire.Policy(
            rotate_every=p.rotate_every,
            publish_lead=p.publish_lead,
            allow_unsafe_publish_lead=p.allow_unsafe_publish_lead,
            max_token_ttl=p.max_token_ttl,
            clock_skew=p.clock_skew,
            handover=p.handover,
            destroy_after=p.destroy_after,
            rotate_jitter=p.rotate_jitter,
            rotate_window=p.rotate_window,
            hold_until=optional(p.hold_until),
        ),
        profile=wire.Profile(
            name=value.profile.name,
            typ=value.profile.typ,
            default_lifetime=min(value.profile.default_lifetime, p.max_token_ttl),
        ),
        warnings=[
            *timeline.policy_warnings(p, cache_lifetime=owner.cache_lifetime),
            *(f"version {v.number} was adopted although {', '.join(v.weaknesses)}" for v in versions if v.weaknesses),
            *(_not_made(latest) if latest is not None and value.retired_at is None else ()),
            *(f"version {v.number}: {words}" for v in _shared(tx, versions) for words in same_key_warnings(tx, v)),
        ],
        created_at=to_datetime(value.created_at),
        updated_at=to_datetime(value.updated_at),
        revision=value.revision,
        versions=[version(tx, value, v) for v in versions],
        retired_at=optional(value.retired_at),
    )


def _not_made(value: KeyVersion) -> list[str]:
    if value.failure is None:
        return []
    return [f"version {value.number} was not made: {value.failure['detail']}"]


def checks(report: timeline.SafetyReport) -> list[wire.SafetyCheck]:
    """The invariants of a version."""
    return [
        wire.SafetyCheck(
            invariant=c.invariant,
            holds=c.holds,
            statement=c.statement,
            left=optional(c.left),
            right=optional(c.right),
        )
        for c in report.checks
    ]


def last_failure(tx: ReadTx, value: KeyVersion) -> str | None:
    """The error of the last failed attempt to make the version's pair, None where no attempt failed."""
    return next((i.error for i in reversed(tx.intents(version_id=value.id)) if i.error), None)


def version(tx: ReadTx, owner: Key, value: KeyVersion) -> wire.Version:
    """A version; `usable_at` only while it is published, `trouble` only while its pair is not made, or never was."""
    waiting = value.state is VersionState.PUBLISHED
    trouble = last_failure(tx, value) if value.state is VersionState.CREATING else None
    if value.failure is not None:
        trouble = value.failure["detail"]
    return wire.Version(
        kid=value.kid,
        number=value.number,
        state=value.state.value,
        alg=value.alg,
        public_jwk=published_jwk(value),
        created_at=to_datetime(value.created_at),
        backend=value.backend,
        trouble=trouble,
        published_at=optional(value.published_at),
        visible_since=optional(value.visible_since),
        usable_at=optional(timeline.usable_at(value, owner.policy)) if waiting else None,
        activated_at=optional(value.activated_at),
        deactivated_at=optional(value.deactivated_at),
        retired_at=optional(value.retired_at),
        revoked_at=optional(value.revoked_at),
        revoke_reason=value.revoke_reason,
        destroy_at=optional(value.destroy_at),
        destroyed_at=optional(value.destroyed_at),
        breaches=[
            wire.Breach(invariant=b.invariant, at=to_datetime(b.at), reason=b.reason, who=b.who) for b in value.breaches
        ],
        origin=value.origin.value,
        weaknesses=list(value.weaknesses),
        emergency=value.emergency,
        absence=None if value.absence is None else dict(value.absence),
    )


def published_jwk(value: KeyVersion) -> dict[str, object] | None:
    """The version's public JWK as the JWKS shows it; None while its pair is not made."""
    if value.kid is None or value.public_jwk is None:
        return None
    return jose.published_jwk(value.public_jwk, alg=value.alg, kid=value.kid, x5c=value.x5c)


def key_place(tx: ReadTx, value: Key) -> wire.KeyPlace:
    """The names that lead to a key."""
    owner = tx.key_set_by_id(value.key_set_id)
    assert owner is not None
    return wire.KeyPlace(key_set=owner.name, key=value.name)


def exposure(case: exposures.Case, rows: Sequence[exposures.Exposed]) -> wire.Exposure:
    """Which verifiers go on trusting what was revoked, and until when."""
    return wire.Exposure(
        withdrawn_at=to_datetime(case.withdrawn_at),
        cache_lifetime=case.cache_lifetime,
        stale_if_error=case.stale_if_error,
        trusted_until=optional(exposures.trusted_until(rows)),
        unbounded=exposures.unbounded(rows),
        second_rotation_not_before=optional(case.second_rotation_at),
        verifiers=[
            wire.ExposedVerifier(
                verifier=row.verifier.name,
                source=row.verifier.source,
                keeps=row.keeps,
                trusts_until=optional(row.trusts_until),
                trusts_until_behind_cache=optional(row.trusts_until_behind_cache),
                ends=row.ends.value,
                learns=row.learns.value,
                learns_by=optional(row.learns_by),
                words=row.words,
                cured_by_second_rotation=row.cured,
            )
            for row in rows
        ],
    )


def external_key(tx: ReadTx, value: ExternalKey) -> wire.ExternalKey:
    """An external key, with everything that happened under its kid."""
    records = tx.external_keys(value.key_set_id, include_removed=True, public_jwk=value.public_jwk)
    changes = [change for record in records if record.kid == value.kid for change in record.changes]
    is_shared = value.removed_at is None and bool(tx.shared_keys([value.public_jwk]))
    return wire.ExternalKey(
        kid=value.kid,
        alg=value.alg,
        public_jwk=jose.published_jwk(value.public_jwk, alg=value.alg, kid=value.kid),
        created_at=to_datetime(value.created_at),
        remove_at=to_datetime(value.remove_at),
        removed_at=optional(value.removed_at),
        created_by=value.created_by,
        warnings=same_key_warnings(tx, value) if is_shared else [],
        changes=[
            wire.ExternalKeyChange(what=c.what, at=to_datetime(c.at), remove_at=to_datetime(c.remove_at), who=c.who)
            for c in changes
        ],
    )


def _shared(tx: ReadTx, versions: Sequence[KeyVersion]) -> list[KeyVersion]:
    """The versions whose public key has a second kid somewhere: one query for all of them, since most have none."""
    made = [(v, v.public_jwk) for v in versions if v.public_jwk is not None]
    shared = tx.shared_keys([jwk for _, jwk in made]) if made else frozenset()
    return [v for v, jwk in made if shared and jose.thumbprint(jwk) in shared]


def same_key(tx: ReadTx, value: KeyVersion | ExternalKey) -> list[KeyVersion | ExternalKey]:
    """The other versions and external keys with the same public key: published ones, ones in use, and revoked ones."""
    if value.public_jwk is None:
        return []
    externals = tx.external_keys(public_jwk=value.public_jwk, include_removed=True)
    found: list[KeyVersion | ExternalKey] = [
        *(v for v in tx.versions(public_jwk=value.public_jwk) if v.revoked_at or v.state is not VersionState.DESTROYED),
        *(e for e in externals if e.removed_at is None or e.revoked_at is not None),
    ]
    return [other for other in found if other.id != value.id]


def same_key_warnings(tx: ReadTx, value: KeyVersion | ExternalKey) -> list[str]:
    """Where else the public key is, in words."""
    return [f"the same public key {_use(tx, other, value)}" for other in same_key(tx, value)]


def _use(tx: ReadTx, other: KeyVersion | ExternalKey, value: KeyVersion | ExternalKey) -> str:
    owner = tx.key_set_by_id(other.key_set_id)
    where = "this key set" if other.key_set_id == value.key_set_id else f"key set {owner.name if owner else '?'!r}"
    if other.revoked_at is not None:
        return f"was revoked in {where}, with kid {other.kid}"
    if isinstance(other, ExternalKey):
        return f"is an external key of {where}, with kid {other.kid}"
    return f"is version {other.number} of a key in {where}, with kid {other.kid} ({other.state.value})"


def external_keys(tx: ReadTx, owner: KeySet) -> list[wire.ExternalKey]:
    """The external keys that a key set publishes."""
    return [external_key(tx, e) for e in tx.external_keys(owner.id)]


def client(value: Client) -> wire.Client:
    """A client."""
    return wire.Client(name=value.name, id=value.id, created_at=to_datetime(value.created_at))


def token(owner: Client, value: ApiToken, now: Instant) -> wire.Token:
    """A token without its secret; a warning when it ends soon."""
    ending = f"ends soon; rotate it: kms-jwks client token rotate {owner.name} {value.id}"
    return wire.Token(
        id=value.id,
        client=owner.name,
        created_at=to_datetime(value.created_at),
        expires_at=to_datetime(value.expires_at),
        revoked_at=optional(value.revoked_at),
        last_used_at=optional(value.last_used_at),
        replaced_by=value.replaced_by,
        warnings=[ending] if value.ends_soon(now) else [],
    )


def grant(tx: ReadTx, value: Grant) -> wire.Grant:
    """A grant with names for its scope, and the client's other grants with which it combines duties."""
    owner = tx.client_by_id(value.client_id)
    scope: dict[str, str] = {}
    if value.key_set_id is not None:
        found_set = tx.key_set_by_id(value.key_set_id)
        scope["key_set"] = found_set.name if found_set else value.key_set_id
    if value.key_id is not None:
        found_key = tx.key_by_id(value.key_id)
        scope["key"] = found_key.name if found_key else value.key_id
    return wire.Grant(
        id=value.id,
        client=owner.name if owner else value.client_id,
        role=value.role,
        scope=scope,
        created_at=to_datetime(value.created_at),
        created_by=value.created_by,
        combined_with=[other.id for other in combined_duties(tx.grants(value.client_id), value)],
        accepted_combined_duties=value.accepted_combined_duties,
    )


def page(found: Sequence[R], limit: int, view: Callable[[R], object]) -> wire.Page:
    """One page of at most `limit` rows, from up to `limit` + 1 that were read; the cursor is the last id shown."""
    shown = found[:limit]
    return wire.Page(items=[view(row) for row in shown], next=shown[-1].id if len(found) > limit else UNSET)
