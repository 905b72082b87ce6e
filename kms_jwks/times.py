"""Instants of the registry as the API's datetimes and back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from kms_jwks.model import Instant

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_datetime(instant: Instant) -> datetime:
    """Microseconds since the epoch as an aware datetime in UTC, exact."""
    return _EPOCH + timedelta(microseconds=instant)


def optional(instant: Instant | None) -> datetime | None:
    """The same, where there may be none."""
    return None if instant is None else to_datetime(instant)


def from_numeric_date(seconds: int) -> datetime:
    """A NumericDate (RFC 7519 §2) as an aware datetime in UTC."""
    return _EPOCH + timedelta(seconds=seconds)


def to_instant(moment: datetime) -> Instant:
    """An aware datetime as microseconds since the epoch. Raises ValueError for one without a zone."""
    if moment.tzinfo is None:
        raise ValueError("an instant needs a time zone")
    return Instant((moment - _EPOCH) // timedelta(microseconds=1))
