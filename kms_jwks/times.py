"""Instants: microseconds since the epoch, shifted, printed, and converted to and from datetimes and NumericDates."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from kms_jwks.model import SECOND, Instant

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // timedelta(microseconds=1)


def later(instant: Instant, seconds: int) -> Instant:
    """`instant` moved by whole seconds."""
    return Instant(instant + seconds * SECOND)


def format_instant(instant: Instant) -> str:
    """An instant as text, to the second: ``2027-01-15T08:00:00Z``. Instants after the year 9999 show its end."""
    return (_EPOCH + timedelta(microseconds=min(instant, _LAST))).strftime("%Y-%m-%dT%H:%M:%SZ")


def format_earliest(instant: Instant) -> str:
    """The same, rounded up: for a time from which on something is allowed."""
    return format_instant(Instant(-(-instant // SECOND) * SECOND))


def to_datetime(instant: Instant) -> datetime:
    """Microseconds since the epoch as an aware datetime in UTC, exact."""
    return _EPOCH + timedelta(microseconds=instant)


def optional(instant: Instant | None) -> datetime | None:
    """`to_datetime`, or None for None."""
    return None if instant is None else to_datetime(instant)


def from_numeric_date(seconds: int) -> datetime:
    """A NumericDate (RFC 7519 §2) as an aware datetime in UTC."""
    return _EPOCH + timedelta(seconds=seconds)


def to_instant(moment: datetime) -> Instant:
    """An aware datetime as microseconds since the epoch. Raises ValueError for one without a time zone."""
    if moment.tzinfo is None:
        raise ValueError("an instant needs a time zone")
    return Instant((moment - _EPOCH) // timedelta(microseconds=1))
