"""The two clocks of a process: the boot clock, which never steps, and database time, kept as an offset to it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from kms_jwks.model import SECOND, Instant


def boot_clock() -> int:
    """Microseconds since boot, including suspension; monotonic, and the same for all processes of a machine."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)) // 1000


_SAMPLES = 8
"""How many polls' offsets are compared: while no clock steps, the poll with the fastest answer is the most exact."""


class DatabaseClock:
    """Database time without a query: the boot clock plus an offset taken from the last polls.

    Deciding times, `iat` and `exp` are the database's, so that nodes whose clocks differ agree. The result may be late
    by the duration of a poll, never early: a verifier without leeway refuses a token from the future.
    """

    def __init__(self, boot: Callable[[], int] = boot_clock) -> None:
        self.boot = boot
        self._offset: int | None = None
        self._samples: deque[int] = deque(maxlen=_SAMPLES)
        self._lock = threading.Lock()

    def observe(self, before: int, database_now: Instant) -> None:
        """Take the offset from a poll that began at `before` (boot clock) and has just answered `database_now`."""
        at_least, at_most = database_now - self.boot(), database_now - before
        with self._lock:
            if self._samples and max(self._samples) > at_most:
                self._samples.clear()  # a clock was set back: the offsets of older polls are wrong
            self._samples.append(at_least)
            self._offset = max(self._samples)

    def now(self) -> Instant:
        """Database time; this machine's time until the first poll."""
        offset = self._offset
        if offset is None:
            return Instant(time.time_ns() // 1000)
        return Instant(self.boot() + offset)

    def seconds(self) -> int:
        """Database time as a NumericDate (RFC 7519 §2), whole seconds."""
        return self.now() // SECOND
