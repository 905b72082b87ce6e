"""I1, I2 and I5 as instants and numbers: when a version may sign, when it may leave the JWKS, what a document holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.model import ExternalKey, Id, Instant, Key, KeyVersion, Policy, VersionState
from kms_jwks.timeline.calendar import later
from kms_jwks.timeline.policies import MAX_KIDS

_S = VersionState
T = TypeVar("T", Key, KeyVersion, ExternalKey)


def usable_at(version: KeyVersion, policy: Policy) -> Instant | None:
    """I1: the first instant at which `version` may sign; None while some live worker does not publish it yet."""
    if version.visible_since is None:
        return None
    if version.first_fill:
        return version.visible_since
    return later(version.visible_since, policy.publish_lead)


def pinned_until(version: KeyVersion, policy: Policy) -> Instant | None:
    """When a call that pinned a retiring version's kid is no longer signed; None for a version not retiring.

    A handover that was raised after the deactivation does not count: I2 was promised with the recorded one.
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

    A version that is retiring may leave the JWKS then. None for one that never signed, or that signs still.
    """
    last = last_possible_signature(version)
    if last is None:
        return None
    return later(last, version.bounds.max_token_ttl + version.bounds.clock_skew)


def destructible_at(version: KeyVersion) -> Instant | None:
    """When the key may be destroyed: on its date, and not while a token it signed can be alive; None without a date.

    That holds of a revoked version too, whose tokens may be trusted until they end wherever its key is cached.
    """
    if version.destroy_at is None:
        return None
    return max(version.destroy_at, retirable_at(version) or version.destroy_at)


def lost_by_revocation(versions: Iterable[KeyVersion]) -> bool:
    """Whether the version of a key that signed last was revoked while it was active."""
    signed = [v for v in versions if v.activated_at is not None]
    if not signed:
        return False
    last = max(signed, key=lambda v: v.activated_at or 0)
    return last.revoked_at is not None and last.deactivated_at == last.revoked_at


# --- room (I5) --------------------------------------------------------------------------------------------------------


def kids_reserved(keys: int, externals: int) -> int:
    """How many kids a set may come to publish: two versions a key, one retiring, one spare, and externals."""
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
    """Those that stand in the same document as the keys of `alg`: post-quantum keys have one of their own."""
    apart = ALGORITHMS[alg].is_post_quantum
    return [thing for thing in things if ALGORITHMS[thing.alg].is_post_quantum is apart]


def rotation_blocker(key_id: Id, versions: Iterable[KeyVersion]) -> KeyVersion | None:
    """The retiring version of *another* key of the document that must leave it first, or None (I5)."""
    blocking = [v for v in versions if v.state is _S.RETIRING and v.key_id != key_id]
    return max(blocking, key=lambda v: retirable_at(v) or 0, default=None)


def kids_after_rotation(key_id: Id, versions: Sequence[KeyVersion], externals: Iterable[ExternalKey]) -> int:
    """How many kids the document comes to once a key has rotated and its next standby is published."""
    shown = sum(1 for v in versions if v.state.in_jwks or v.state is _S.CREATING)
    own = [v.state for v in versions if v.key_id == key_id]
    has_standby = _S.CREATING in own or own.count(_S.PUBLISHED) > 1
    return shown + sum(1 for e in externals if e.removed_at is None) + (0 if has_standby else 1)
