"""Rotation policies: limits, warnings, the weekly rotation window, the jitter, and the bounds a version records (I2).

The window is in UTC: there is no daylight saving time, so every week has the same 10,080 minutes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from kms_jwks.model import DAY, SECOND, Bounds, Instant, KeyVersion, Policy

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
"""The farthest date that is accepted for a hold or a destruction, in seconds from now."""
TELL_DAYS = (7, 30)
"""How many days ahead a module with a deletion schedule of its own accepts a destruction: at least, at most."""

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_MINUTES = 24 * 60
_WEEK_MINUTES = 7 * _DAY_MINUTES
_MINUTE = 60 * SECOND
_WEEK = _WEEK_MINUTES * _MINUTE
_MONDAY = 3 * DAY * SECOND
"""From the Monday before the epoch, which was a Thursday, to the epoch."""
_SPAN = re.compile(r"(?:([a-z,-]+) )?([0-9]{2}):([0-9]{2})-([0-9]{2}):([0-9]{2})")


def publish_lead_floor(cache_lifetime: int) -> int:
    """The shortest publish lead, in seconds, that known verifiers' caches allow (AWS API Gateway keeps 2 h)."""
    return max(MIN_PUBLISH_LEAD, cache_lifetime + 60)


def policy_problems(policy: Policy, *, cache_lifetime: int, lease: int) -> list[str]:
    """Every rule that `policy` breaks, each with its numbers (seconds); empty for a valid policy."""
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
    """What every report must show about a policy that was allowed to be unsafe."""
    floor = publish_lead_floor(cache_lifetime)
    if policy.publish_lead < floor:
        return [
            f"unsafe publish_lead: {policy.publish_lead} s is under {floor} s; verifiers that cache may reject tokens"
        ]
    return []


def stale_if_error(wanted: int, *, cache_lifetime: int, publish_leads: Iterable[int]) -> int:
    """Seconds of stale-if-error a JWKS may carry: at most the smallest publish lead − max-age − 300."""
    return max(0, min([wanted, *(lead - cache_lifetime - STALE_MARGIN for lead in publish_leads)]))


def bounds(policy: Policy, *, lease: int, cache_lifetime: int) -> Bounds:
    """The durations that I2 counts with while `policy` is in force."""
    return Bounds(policy.max_token_ttl, policy.clock_skew, policy.handover, lease, cache_lifetime)


def jitter(version: KeyVersion, policy: Policy) -> int:
    """By how many seconds the rotation away from `version` comes early: fixed per version, spread over versions.

    At most `rotate_jitter` and at most a tenth of `rotate_every`.
    """
    most = max(0, min(policy.rotate_jitter, policy.rotate_every // 10))
    digest = hashlib.sha256(version.id.encode()).digest()
    return int.from_bytes(digest[:8], "big") % (most + 1)


# --- the rotation window ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Window:
    """When planned steps may happen: spans of minutes since Monday 00:00 UTC, half open. No spans: at any time."""

    spans: tuple[tuple[int, int], ...]

    def opens(self, instant: Instant) -> Instant:
        """The first instant at or after `instant` at which the window is open."""
        if not self.spans:
            return instant
        position = (instant + _MONDAY) % _WEEK
        waits = []
        for begin, end in self.spans:
            if begin * _MINUTE <= position < end * _MINUTE:
                return instant
            waits.append((begin * _MINUTE - position) % _WEEK)
        return Instant(instant + min(waits))


@lru_cache(maxsize=256)
def window(text: str) -> Window:
    """Parse `rotate_window`: ``[DAYS ]HH:MM-HH:MM`` in UTC, several separated by ``;``; empty is any time.

    DAYS are days or ranges of days separated by commas (``mon-thu``, ``sat,sun``, ``fri-mon``); without DAYS the hours
    apply every day. Hours that end no later than they begin continue into the next day, and 24:00 is the end of a day.
    Raises ValueError.
    """
    if not text:
        return Window(())
    spans: list[tuple[int, int]] = []
    for piece in text.split(";"):
        spans += _parse_spans(piece.strip().lower())
    return Window(tuple(sorted(spans)))


def _parse_spans(piece: str) -> list[tuple[int, int]]:
    match = _SPAN.fullmatch(piece)
    if match is None:
        raise ValueError(f"{piece!r} is not DAYS HH:MM-HH:MM (UTC), such as mon-thu 09:00-16:00 or sat,sun 22:00-04:00")
    begin, end = _parse_minutes(match[2], match[3]), _parse_minutes(match[4], match[5])
    if begin in (_DAY_MINUTES, end):
        raise ValueError(f"{piece!r} has no hours; a whole day is 00:00-24:00")
    length = (end - begin) % _DAY_MINUTES or _DAY_MINUTES
    found: list[tuple[int, int]] = []
    for day in _parse_days(match[1]) if match[1] else range(7):
        start = day * _DAY_MINUTES + begin
        found.append((start, min(start + length, _WEEK_MINUTES)))
        if start + length > _WEEK_MINUTES:
            found.append((0, start + length - _WEEK_MINUTES))
    return found


def _parse_minutes(hours: str, minutes: str) -> int:
    found = int(hours) * 60 + int(minutes)
    if int(minutes) > 59 or found > _DAY_MINUTES:
        raise ValueError(f"{hours}:{minutes} is no time of day (00:00 to 24:00)")
    return found


def _parse_days(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        for name in (first, last or first):
            if name not in _DAYS:
                raise ValueError(f"{name!r} is none of {', '.join(_DAYS)}")
        begin, end = _DAYS.index(first), _DAYS.index(last or first)
        found += [(begin + n) % 7 for n in range((end - begin) % 7 + 1)]
    return found
