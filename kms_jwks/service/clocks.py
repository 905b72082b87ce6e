"""The two clocks of a process: the boot clock, which never steps, and database time, kept as an offset to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kms_jwks.model import SECOND, Instant


def boot_clock() -> int:
    """Microseconds since boot, counting suspension; monotonic, and the same for all processes of a machine."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)) // 1000


class DatabaseClock:
    """Database time without asking the database: the boot clock plus the offset taken at the last poll.

    Deciding times, `iat` and `exp` are the database's, so that nodes whose clocks differ agree.
    """

    def __init__(self, boot: Callable[[], int] = boot_clock) -> None:
        self.boot = boot
        self._offset: int | None = None
        self._lock = threading.Lock()

    def observe(self, before: int, database_now: Instant) -> None:
        """Take the offset from a poll that began at `before` (boot clock) and answered `database_now`."""
        middle = (before + self.boot()) // 2
        with self._lock:
            self._offset = database_now - middle

    def now(self) -> Instant:
        """Database time; this machine's own until the database was seen once."""
        offset = self._offset
        if offset is None:
            return Instant(time.time_ns() // 1000)
        return Instant(self.boot() + offset)

    def seconds(self) -> int:
        """Database time as a NumericDate (RFC 7519 §2), whole seconds."""
        return self.now() // SECOND
