"""Instants in words, the weekly hours in which planned steps may happen, and the jitter of a scheduled rotation.

Everything is UTC: there is no daylight saving time, so every week has the same 10,080 minutes.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from kms_jwks.model import DAY, SECOND, Instant, KeyVersion, Policy

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_MINUTES = 24 * 60
_WEEK_MINUTES = 7 * _DAY_MINUTES
_MINUTE = 60 * SECOND
_WEEK = _WEEK_MINUTES * _MINUTE
_MONDAY = 3 * DAY * SECOND
"""From the Monday before the epoch, which was a Thursday, to the epoch."""
_SPAN = re.compile(r"(?:([a-z,-]+) )?([0-9]{2}):([0-9]{2})-([0-9]{2}):([0-9]{2})")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // timedelta(microseconds=1)


def later(instant: Instant, seconds: int) -> Instant:
    """`instant` moved by whole seconds."""
    return Instant(instant + seconds * SECOND)


def shown(instant: Instant) -> str:
    """An instant in words, to the second: ``2027-01-15T08:00:00Z``. What lies after the year 9999 is its end."""
    return (_EPOCH + timedelta(microseconds=min(instant, _LAST))).strftime("%Y-%m-%dT%H:%M:%SZ")


def jitter(version: KeyVersion, policy: Policy) -> int:
    """By how many seconds the rotation away from `version` comes early: fixed for a version, spread over versions.

    At most `rotate_jitter` and at most a tenth of `rotate_every`.
    """
    most = max(0, min(policy.rotate_jitter, policy.rotate_every // 10))
    digest = hashlib.sha256(version.id.encode()).digest()
    return int.from_bytes(digest[:8], "big") % (most + 1)


@dataclass(frozen=True, slots=True)
class Window:
    """When planned steps may happen: spans of minutes since Monday 00:00 UTC, half open. None: at any time."""

    spans: tuple[tuple[int, int], ...]

    def opens(self, instant: Instant) -> Instant:
        """The first instant from `instant` on at which the window is open."""
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
    """Read `rotate_window`: ``[DAYS ]HH:MM-HH:MM`` in UTC, several separated by ``;``; empty is any time.

    DAYS are days or ranges of days separated by commas (``mon-thu``, ``sat,sun``, ``fri-mon``), absent every day. Hours
    that end no later than they begin go on into the next day, and 24:00 is the end of a day. Raises ValueError.
    """
    if not text:
        return Window(())
    spans: list[tuple[int, int]] = []
    for piece in text.split(";"):
        spans += _spans(piece.strip().lower())
    return Window(tuple(sorted(spans)))


def _spans(piece: str) -> list[tuple[int, int]]:
    match = _SPAN.fullmatch(piece)
    if match is None:
        raise ValueError(f"{piece!r} is not DAYS HH:MM-HH:MM (UTC), such as mon-thu 09:00-16:00 or sat,sun 22:00-04:00")
    begin, end = _minutes(match[2], match[3]), _minutes(match[4], match[5])
    if begin in (_DAY_MINUTES, end):
        raise ValueError(f"{piece!r} has no hours; a whole day is 00:00-24:00")
    length = (end - begin) % _DAY_MINUTES or _DAY_MINUTES
    found: list[tuple[int, int]] = []
    for day in _days(match[1]) if match[1] else range(7):
        start = day * _DAY_MINUTES + begin
        found.append((start, min(start + length, _WEEK_MINUTES)))
        if start + length > _WEEK_MINUTES:
            found.append((0, start + length - _WEEK_MINUTES))
    return found


def _minutes(hours: str, minutes: str) -> int:
    found = int(hours) * 60 + int(minutes)
    if int(minutes) > 59 or found > _DAY_MINUTES:
        raise ValueError(f"{hours}:{minutes} is no time of day (00:00 to 24:00)")
    return found


def _days(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        for name in (first, last or first):
            if name not in _DAYS:
                raise ValueError(f"{name!r} is none of {', '.join(_DAYS)}")
        begin, end = _DAYS.index(first), _DAYS.index(last or first)
        found += [(begin + n) % 7 for n in range((end - begin) % 7 + 1)]
    return found
