"""The two clocks of a process: the boot clock, which never steps, and database time, kept as an offset to it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from kms_jwks import errors
from kms_jwks.model import SECOND, Instant


def boot_clock() -> int:
    """Microseconds since boot, including suspension; monotonic, and the same for all processes of a machine."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)) // 1000


_SAMPLES = 8
"""How many polls' offsets are compared: while no clock steps, the poll with the fastest answer is the most exact."""
_DRIFT = 1000
"""Two clocks that are not set drift apart by less than one second in this many seconds."""


class DatabaseClock:
    """Database time without a query: the boot clock plus an offset taken from the last polls.

    Deciding times, `iat` and `exp` are the database's, so that nodes whose clocks differ agree. The result may be late
    by the duration of a poll, never early: a verifier without leeway refuses a token from the future.

    A database clock that is set is followed at once. By how much it was set shows in `departure`, until it is set back.
    """

    def __init__(self, boot: Callable[[], int] = boot_clock) -> None:
        self.boot = boot
        self.departure = 0
        """By how many microseconds database time is ahead (or behind: negative) of where the boot clock expects it."""
        self._offset: int | None = None
        self._expected: int | None = None
        self._observed_at = 0
        self._samples: deque[int] = deque(maxlen=_SAMPLES)
        self._lock = threading.Lock()

    def observe(self, before: int, database_now: Instant) -> None:
        """Take the offset from a poll that began at `before` (boot clock) and has just answered `database_now`."""
        after = self.boot()
        at_least, at_most = database_now - after, database_now - before
        with self._lock:
            self._compare(at_least, at_most, after)
            if self._samples and max(self._samples) > at_most:
                self._samples.clear()  # a clock was set back: the offsets of older polls are wrong
            self._samples.append(at_least)
            self._offset = max(self._samples)

    def _compare(self, at_least: int, at_most: int, boot: int) -> None:
        """Set `departure`. The expected offset follows the drift of the clocks, and no step of one."""
        if self._expected is None:
            self._expected, self._observed_at = at_least, boot
        ahead, behind = at_least - self._expected, at_most - self._expected
        self.departure = ahead if ahead > 0 else min(behind, 0)
        drift = (boot - self._observed_at) // _DRIFT
        self._expected += max(-drift, min(self.departure, drift))
        self._observed_at = boot

    def require_agreement(self, clock_skew: int) -> None:
        """Raise ClocksDisagree where database time departs from the boot clock by more than `clock_skew` seconds."""
        if abs(self.departure) > clock_skew * SECOND:
            raise errors.ClocksDisagree(
                f"{self.describe_departure()}; {clock_skew} s are allowed (clock_skew).", retry_after=10
            )

    def describe_departure(self) -> str:
        """The departure in words."""
        return f"Database time moved by {self.departure / SECOND:+.1f} s against this node's boot clock"

    def now(self) -> Instant:
        """Database time; this machine's time until the first poll."""
        offset = self._offset
        if offset is None:
            return Instant(time.time_ns() // 1000)
        return Instant(self.boot() + offset)

    def seconds(self) -> int:
        """Database time as a NumericDate (RFC 7519 §2), whole seconds."""
        return self.now() // SECOND
