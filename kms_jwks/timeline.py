"""The life of key versions in time: invariants I1, I2, I4, I5, what is due next, and why. Pure; the clock is injected.

Every function takes what the registry holds and an instant, and reads nothing else. `plan` says what the custodian
does, `safety` shows each invariant with both sides, and the service refuses with the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from kms_jwks.model import (
    DAY,
    SECOND,
    Bounds,
    ExternalKey,
    Id,
    Instant,
    Key,
    KeySet,
    KeyVersion,
    Policy,
    VersionState,
)

MAX_KIDS = 10
MAX_DOCUMENT = 50 * 1024
"""Bytes of a JWKS (Nimbus reads no more)."""
CACHE_LIFETIME = (60, 900)
HANDOVER = (0, 600)
MIN_CLOCK_SKEW = 60
MIN_DESTROY_AFTER = 7 * DAY
MIN_PUBLISH_LEAD = 2 * 3600
STALE_MARGIN = 300

_S = VersionState


def later(instant: Instant, seconds: int) -> Instant:
    """`instant` moved by whole seconds."""
    return Instant(instant + seconds * SECOND)


# --- policies ---------------------------------------------------------------------------------------------------------


def publish_lead_floor(cache_lifetime: int) -> int:
    """The shortest publish lead, in seconds, that known verifiers' caches allow (AWS API Gateway keeps 2 h)."""
    return max(MIN_PUBLISH_LEAD, cache_lifetime + 60)


def policy_problems(policy: Policy, *, cache_lifetime: int, lease: int) -> list[str]:
    """Every rule that `policy` breaks, each with its numbers (seconds); empty when it is sound."""
    found: list[str] = []
    floor = publish_lead_floor(cache_lifetime)
    if policy.publish_lead < floor and not policy.allow_unsafe_publish_lead:
        found.append(
            f"publish_lead {policy.publish_lead} is under the floor {floor}; "
            "a smaller one needs allow_unsafe_publish_lead"
        )
    least = policy.publish_lead + policy.max_token_ttl + policy.clock_skew + lease
    if policy.rotate_every < least:
        found.append(
            f"rotate_every {policy.rotate_every} is under publish_lead + max_token_ttl + clock_skew + lease = {least}"
        )
    if policy.max_token_ttl < 1:
        found.append("max_token_ttl must be at least 1")
    if policy.clock_skew < MIN_CLOCK_SKEW:
        found.append(f"clock_skew {policy.clock_skew} is under {MIN_CLOCK_SKEW}")
    if not HANDOVER[0] <= policy.handover <= HANDOVER[1]:
        found.append(f"handover {policy.handover} is outside {HANDOVER[0]} to {HANDOVER[1]}")
    if policy.destroy_after < MIN_DESTROY_AFTER:
        found.append(f"destroy_after {policy.destroy_after} is under {MIN_DESTROY_AFTER}")
    return found


def policy_warnings(policy: Policy, *, cache_lifetime: int) -> list[str]:
    """What every report must show of a policy that was allowed to be unsafe."""
    floor = publish_lead_floor(cache_lifetime)
    if policy.publish_lead < floor:
        return [
            f"unsafe publish_lead: {policy.publish_lead} s is under {floor} s; verifiers that cache may reject tokens"
        ]
    return []


def stale_if_error(wanted: int, *, cache_lifetime: int, publish_leads: Iterable[int]) -> int:
    """Seconds of stale-if-error a JWKS may carry: never beyond the smallest publish lead − max-age − 300."""
    return max(0, min([wanted, *(lead - cache_lifetime - STALE_MARGIN for lead in publish_leads)]))


def bounds(policy: Policy, *, lease: int, cache_lifetime: int) -> Bounds:
    """What I2 has to count with while `policy` is in force."""
    return Bounds(policy.max_token_ttl, policy.clock_skew, policy.handover, lease, cache_lifetime)


# --- instants ---------------------------------------------------------------------------------------------------------


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
    """I2: the first instant at which a deactivated version may leave the JWKS."""
    last = last_possible_signature(version)
    if last is None:
        return None
    return later(last, version.bounds.max_token_ttl + version.bounds.clock_skew)


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


def rotation_blocker(key_id: Id, versions: Iterable[KeyVersion]) -> KeyVersion | None:
    """The retiring version of *another* key of the set that must leave the document first, or None (I5)."""
    blocking = [v for v in versions if v.state is _S.RETIRING and v.key_id != key_id]
    return max(blocking, key=lambda v: retirable_at(v) or 0, default=None)


# --- the plan ---------------------------------------------------------------------------------------------------------


class StepKind(StrEnum):
    """What the custodian does by itself."""

    CREATE = "create"
    ACTIVATE = "activate"
    WITHDRAW = "withdraw"
    DESTROY = "destroy"
    REMOVE_EXTERNAL = "remove-external"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do at `due`, with the reason in words. `subject` is a key's, version's or external key's id."""

    kind: StepKind
    due: Instant
    subject: Id
    reason: str
    breach: str | None = None
    """The invariant that the step overrides (an emergency), to be recorded on the version."""


def plan(
    keys: Sequence[Key],
    versions: Sequence[KeyVersion],
    externals: Sequence[ExternalKey],
    now: Instant,
) -> list[Step]:
    """Every step of one key set that can be foreseen, soonest first; the custodian executes those with `due` ≤ now.

    A key that is disabled is only withdrawn from and destroyed in.
    """
    steps: list[Step] = []
    for key in keys:
        own = [v for v in versions if v.key_id == key.id]
        if key.disabled_at is None:
            steps += _growth(key, own, now)
        steps += _decay(own, now)
    steps += [
        Step(StepKind.REMOVE_EXTERNAL, e.remove_at, e.id, "its removal date has come")
        for e in externals
        if e.removed_at is None
    ]
    return sorted(steps, key=lambda step: step.due)


def _growth(key: Key, versions: Sequence[KeyVersion], now: Instant) -> list[Step]:
    waiting = sorted((v for v in versions if v.state is _S.PUBLISHED), key=lambda v: v.number)
    coming = any(v.state is _S.CREATING for v in versions)
    if any(v.state is _S.ACTIVE for v in versions):
        if not waiting and not coming:
            return [Step(StepKind.CREATE, now, key.id, "an active version has a published standby (I4)")]
        return []
    was_revoked = _lost_by_revocation(versions)
    if not waiting:
        if was_revoked and not coming:
            return [Step(StepKind.CREATE, now, key.id, "the active version was revoked and nothing succeeds it")]
        return []
    first = waiting[0]
    due = usable_at(first, key.policy)
    if was_revoked and (due is None or due > now):
        # Signing has ended: the successor takes over however young it is, and the breach stays on it.
        return [Step(StepKind.ACTIVATE, now, first.id, "emergency: the active version was revoked", breach="I1")]
    if due is None:
        return []
    return [Step(StepKind.ACTIVATE, due, first.id, "the key has no active version, and verifiers can hold this one")]


def _lost_by_revocation(versions: Sequence[KeyVersion]) -> bool:
    """Whether the version that signed last was revoked while it was active."""
    signed = [v for v in versions if v.activated_at is not None]
    if not signed:
        return False
    last = max(signed, key=lambda v: v.activated_at or 0)
    return last.revoked_at is not None and last.deactivated_at == last.revoked_at


def _decay(versions: Sequence[KeyVersion], now: Instant) -> list[Step]:
    steps: list[Step] = []
    for version in versions:
        if version.state is _S.RETIRING:
            due = retirable_at(version)
            assert due is not None
            steps.append(Step(StepKind.WITHDRAW, due, version.id, "no token it signed can be alive (I2)"))
        elif version.state in (_S.RETIRED, _S.REVOKED) and version.destroy_at is not None:
            steps.append(Step(StepKind.DESTROY, version.destroy_at, version.id, "its destruction date has come"))
    return steps


# --- safety -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant with both sides as instants: it holds when `left` is there and not before `right`."""

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
    """What `safety` finds: the checks, and what happens next to the version and when."""

    checks: tuple[Check, ...]
    next: str
    next_at: Instant | None


def safety(version: KeyVersion, key: Key, key_set: KeySet, now: Instant) -> SafetyReport:
    """Each invariant of `version` with both sides: as recorded where the step was taken, else as if taken now."""
    checks: list[Check] = []
    if version.state is not _S.CREATING:
        lead = "visible_since" if version.first_fill else f"visible_since + publish_lead ({key.policy.publish_lead} s)"
        checks.append(
            Check(
                "I1",
                f"activated_at ≥ {lead}" if version.activated_at else f"activation now ≥ {lead}",
                version.activated_at or now,
                usable_at(version, key.policy),
            )
        )
    if version.deactivated_at is not None and version.revoked_at is None:
        b = version.bounds
        checks.append(
            Check(
                "I2",
                f"{'retired_at' if version.retired_at else 'withdrawal now'} ≥ deactivated_at"
                f" + handover ({b.handover} s) + lease ({b.lease} s)"
                f" + max_token_ttl ({b.max_token_ttl} s) + clock_skew ({b.clock_skew} s)",
                version.retired_at or now,
                retirable_at(version),
            )
        )
    words, at = _next(version, key, now)
    return SafetyReport(tuple(checks), words, at)


def _next(version: KeyVersion, key: Key, now: Instant) -> tuple[str, Instant | None]:
    match version.state:
        case _S.CREATING:
            return "the custodian makes its key pair and publishes it", None
        case _S.PUBLISHED:
            at = usable_at(version, key.policy)
            if at is None:
                return "it becomes visible once every live worker publishes it", None
            return ("it may be activated" if at <= now else "it may be activated from then on"), at
        case _S.ACTIVE:
            return "it signs until it is rotated or revoked", None
        case _S.RETIRING:
            return "it leaves the JWKS", retirable_at(version)
        case _S.RETIRED | _S.REVOKED if version.destroy_at is not None:
            return (
                "its private key is destroyed in the module; the destruction can be cancelled until then",
                version.destroy_at,
            )
        case _S.RETIRED | _S.REVOKED:
            return "its private key stays in the module until somebody schedules its destruction", None
        case _:
            return "nothing: the record stays", None
