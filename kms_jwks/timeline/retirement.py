"""How a version leaves: out of the JWKS, and out of its module."""

from __future__ import annotations

from kms_jwks.model import DAY, SECOND, Instant, Key, KeyVersion, VersionState
from kms_jwks.timeline.calendar import later, shown, window
from kms_jwks.timeline.invariants import destructible_at, retirable_at
from kms_jwks.timeline.policies import TELL_DAYS
from kms_jwks.timeline.steps import Obstacle, Step, StepKind, due_after, waiting_words

_S = VersionState


def withdrawal_at(key: Key, version: KeyVersion, *, urgent: bool) -> Instant | None:
    """When a retiring version leaves the JWKS: I2, then the window unless it is `urgent`."""
    soonest = retirable_at(version)
    if soonest is None or urgent:
        return soonest
    return window(key.policy.rotate_window).opens(soonest)


def withdrawal(key: Key, version: KeyVersion, now: Instant, *, urgent: bool) -> list[Step]:
    """A retiring version leaves the JWKS once no token it signed can be alive (I2)."""
    wanted = retirable_at(version)
    if version.state is not _S.RETIRING or wanted is None:
        return []
    b = version.bounds
    reason = (
        f"no token that version {version.number} signed can be alive (I2): deactivated at "
        f"{shown(version.deactivated_at or wanted)} + handover {b.handover} s + lease {b.lease} s + max_token_ttl "
        f"{b.max_token_ttl} s + clock_skew {b.clock_skew} s"
    )
    waits = waiting_words(wanted, [], None if urgent else key.policy, now)
    return [Step(StepKind.WITHDRAW, withdrawal_at(key, version, urgent=urgent), version.id, reason, waits, wanted)]


def destruction(key: Key, version: KeyVersion, now: Instant) -> list[Step]:
    """A retired or revoked version is destroyed on its date; its module is told the date before, or taken back."""
    if version.state not in (_S.RETIRED, _S.REVOKED):
        return []
    gone = destructible_at(version)
    if version.destroy_at is None or gone is None:
        if version.destroy_told is None:
            return []
        return [Step(StepKind.TELL, now, version.id, "the destruction that its module was told is taken back")]
    alive = [Obstacle(gone, f"a token it signed can be alive until {shown(gone)} (I2)")]
    destroy = Step(
        StepKind.DESTROY,
        due_after(version.destroy_at, alive, key.policy),
        version.id,
        f"its destruction is dated {shown(version.destroy_at)}",
        waiting_words(version.destroy_at, alive, key.policy, now),
        version.destroy_at,
    )
    if destroy.is_due(now) or version.destroy_told == version.destroy_at:
        return [destroy]
    told = later(gone, -TELL_DAYS[1] * DAY)
    ended = version.revoked_at or version.retired_at or now
    words = f"its module is told its destruction date {shown(gone)}, at most {TELL_DAYS[1]} d ahead"
    return [Step(StepKind.TELL, max(told, ended), version.id, words), destroy]


def days_until(gone: Instant, now: Instant) -> int:
    """In how many days a module is to destroy a key that goes at `gone`: rounded up, so that it never does before."""
    days = -((now - gone) // (DAY * SECOND))
    return min(max(days, TELL_DAYS[0]), TELL_DAYS[1])
