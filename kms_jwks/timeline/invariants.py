"""Invariants I1, I2 and I5 as instants and numbers, and `safety`, which shows both sides of each for one version.

They say when a version may sign, when it may leave the JWKS, when its key may be destroyed and what a document holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.model import ExternalKey, Id, Instant, Key, KeySet, KeyVersion, Policy, VersionState
from kms_jwks.timeline.policies import MAX_KIDS, jitter
from kms_jwks.times import later

_S = VersionState
T = TypeVar("T", Key, KeyVersion, ExternalKey)


def is_to_be_published(version: KeyVersion) -> bool:
    """Whether `version` is published once its key pair is made. Not so after its key was retired or deleted."""
    return version.state is _S.CREATING and version.failure is None


def usable_at(version: KeyVersion, policy: Policy) -> Instant | None:
    """I1: the first instant at which `version` may sign; None until every live worker publishes it."""
    if version.visible_since is None:
        return None
    if version.first_fill:
        return version.visible_since
    return later(version.visible_since, policy.publish_lead)


def pinned_until(version: KeyVersion, policy: Policy) -> Instant | None:
    """Until when a call that pinned a retiring version's kid is signed; None for a version that is not retiring.

    A handover that was raised after the deactivation does not count: I2 was computed with the recorded one.
    """
    if version.state is not _S.RETIRING or version.deactivated_at is None:
        return None
    return later(version.deactivated_at, min(policy.handover, version.bounds.handover))


def last_possible_signature(version: KeyVersion) -> Instant | None:
    """The last instant at which any worker could have signed with a deactivated version (I2)."""
    if version.deactivated_at is None:
        return None
    return later(version.deactivated_at, version.bounds.handover + version.bounds.lease)


def retirable_at(version: KeyVersion) -> Instant | None:
    """I2: the first instant at which no token that a deactivated version signed can be alive.

    A retiring version may leave the JWKS then. None for a version that never signed or still signs.

    clock_skew is the most by which two clocks differ: of issuer, service and verifier, any two. A token's lifetime
    counts from its iat, which the issuer may state up to clock_skew ahead of the service (I3, profiles.py), so by the
    service's clock its exp is at most the last signature + clock_skew + max_token_ttl: the sum here. The sum holds for
    a verifier whose clock is behind as well, because it is not further behind the issuer's clock than clock_skew. An
    issuer that states a later iat than its own clock shows gains nothing: verifiers that are behind may only find the
    key withdrawn in the last moments of such a token.
    """
    last = last_possible_signature(version)
    if last is None:
        return None
    return later(last, version.bounds.max_token_ttl + version.bounds.clock_skew)


def destructible_at(version: KeyVersion) -> Instant | None:
    """When the key may be destroyed: on its date, and not while a token it signed can be alive; None without a date.

    This applies to a revoked version too: verifiers that cached its key may trust its tokens until these expire.
    """
    if version.destroy_at is None:
        return None
    return max(version.destroy_at, retirable_at(version) or version.destroy_at)


def lost_by_revocation(versions: Iterable[KeyVersion]) -> bool:
    """Whether the version of a key that signed last was revoked while active."""
    signed = [v for v in versions if v.activated_at is not None]
    if not signed:
        return False
    last = max(signed, key=lambda v: v.activated_at or 0)
    return last.revoked_at is not None and last.deactivated_at == last.revoked_at


def rotation_wanted(active: KeyVersion, policy: Policy) -> Instant:
    """When the schedule replaces `active`: `rotate_every` after its activation, minus its jitter."""
    return later(active.activated_at or active.created_at, policy.rotate_every - jitter(active, policy))


# --- room (I5) --------------------------------------------------------------------------------------------------------


def kids_reserved(keys: int, externals: int) -> int:
    """How many kids a set has to have room for: two versions per key, one retiring, one spare, and external keys."""
    return 2 * keys + (2 if keys else 0) + externals


def room_problem(keys: int, externals: int) -> str | None:
    """Why a set cannot hold that many keys and external keys, or None (I5: at most 10 kids, at most 4 keys)."""
    reserved = kids_reserved(keys, externals)
    if reserved <= MAX_KIDS:
        return None
    return (
        f"{keys} keys (two versions each, one retiring, one spare) and {externals} external keys "
        f"need {reserved} kids; a document holds {MAX_KIDS}"
    )


def of_document(alg: str, things: Iterable[T]) -> list[T]:
    """Those in the same document as the keys of `alg`: post-quantum keys have a document of their own."""
    post_quantum = ALGORITHMS[alg].is_post_quantum
    return [thing for thing in things if ALGORITHMS[thing.alg].is_post_quantum is post_quantum]


def rotation_blocker(key_id: Id, versions: Iterable[KeyVersion]) -> KeyVersion | None:
    """The retiring version of *another* key that must leave the document before `key_id` rotates, or None (I5)."""
    blocking = [v for v in versions if v.state is _S.RETIRING and v.key_id != key_id]
    return max(blocking, key=lambda v: retirable_at(v) or 0, default=None)


def kids_after_rotation(key_id: Id, versions: Sequence[KeyVersion], externals: Iterable[ExternalKey]) -> int:
    """How many kids the document holds after a key has rotated and its next standby is published."""
    shown = sum(1 for v in versions if v.state.in_jwks or is_to_be_published(v))
    own = [v.state for v in versions if v.key_id == key_id]
    has_standby = _S.CREATING in own or own.count(_S.PUBLISHED) > 1
    return shown + sum(1 for e in externals if e.removed_at is None) + (0 if has_standby else 1)


# --- safety -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant with both sides as instants: it holds when both are known and `left` is not before `right`."""

    invariant: str
    statement: str
    left: Instant | None
    right: Instant | None

    @property
    def holds(self) -> bool:
        """Whether both sides are known and in order."""
        return self.left is not None and self.right is not None and self.left >= self.right


@dataclass(frozen=True, slots=True)
class SafetyReport:
    """The checks of one version, and what happens to it next and when."""

    checks: tuple[Check, ...]
    next: str
    next_at: Instant | None


def safety(version: KeyVersion, key: Key, key_set: KeySet, now: Instant) -> SafetyReport:
    """Each invariant of `version` with both sides: as recorded where the step was taken, otherwise as if taken now."""
    checks: list[Check] = []
    if version.activated_at is not None or version.state is _S.PUBLISHED:
        lead = "visible_since" if version.first_fill else f"visible_since + publish_lead ({key.policy.publish_lead} s)"
        checks.append(
            Check(
                "I1",
                f"activated_at ≥ {lead}" if version.activated_at else f"activation now ≥ {lead}",
                version.activated_at or now,
                usable_at(version, key.policy),
            )
        )
    if version.deactivated_at is not None:
        b = version.bounds
        end = (
            f"deactivated_at + handover ({b.handover} s) + lease ({b.lease} s)"
            f" + max_token_ttl ({b.max_token_ttl} s) + clock_skew ({b.clock_skew} s)"
        )
        if version.revoked_at is None:
            step = "retired_at" if version.retired_at else "retirement now"
            checks.append(Check("I2", f"{step} ≥ {end}", version.retired_at or now, retirable_at(version)))
        elif version.destroy_at is not None:
            # A revoked version left the JWKS at once; its tokens only limit the destruction of the key.
            when = version.destroyed_at or version.destroy_at
            checks.append(Check("I2", f"destruction ≥ {end}", when, retirable_at(version)))
    words, at = _next(version, key, now)
    return SafetyReport(tuple(checks), words, at)


def _next(version: KeyVersion, key: Key, now: Instant) -> tuple[str, Instant | None]:
    match version.state:
        case _S.CREATING if version.failure is not None:
            return "its key pair is destroyed in the module; it is never published", None
        case _S.CREATING:
            return "the custodian makes its key pair and publishes it", None
        case _S.PUBLISHED:
            at = usable_at(version, key.policy)
            if at is None:
                return "it becomes visible once every live worker publishes it", None
            return ("it may be activated" if at <= now else "it may be activated from then on"), at
        case _S.ACTIVE if version.emergency:
            return "it signs until its standby is usable: the second rotation after the emergency", None
        case _S.ACTIVE:
            return "it signs until its scheduled rotation, or until it is revoked", rotation_wanted(version, key.policy)
        case _S.RETIRING:
            return "it leaves the JWKS", retirable_at(version)
        case _S.RETIRED | _S.REVOKED if version.destroy_at is not None:
            return (
                "its private key is destroyed in the module; the destruction can be cancelled until then",
                destructible_at(version),
            )
        case _S.RETIRED | _S.REVOKED:
            return "its private key stays in the module until its destruction is scheduled", None
        case _:
            return "nothing: the record stays", None
