"""What a rotation policy may say: its limits, its warnings, and what of it a version has to count with (I2)."""

from __future__ import annotations

from collections.abc import Iterable

from kms_jwks.model import DAY, Bounds, Policy
from kms_jwks.timeline.calendar import window

MAX_KIDS = 10
MAX_DOCUMENT = 50 * 1024
"""Bytes of a JWKS (Nimbus reads no more)."""
CACHE_LIFETIME = (60, 900)
HANDOVER = (0, 600)
MIN_CLOCK_SKEW = 60
MIN_DESTROY_AFTER = 7 * DAY
MIN_PUBLISH_LEAD = 2 * 3600
STALE_MARGIN = 300
FARTHEST = 10 * 366 * DAY
"""Seconds ahead that a date may lie: a hold, a destruction."""
TELL_DAYS = (7, 30)
"""How many days ahead a module with a calendar of its own can be told a destruction."""


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
    if policy.rotate_jitter < 0:
        found.append(f"rotate_jitter {policy.rotate_jitter} is under 0")
    try:
        window(policy.rotate_window)
    except ValueError as error:
        found.append(f"rotate_window: {error}")
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
