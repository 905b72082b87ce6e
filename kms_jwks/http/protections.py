"""What protects a serving process: a deadline for reading each request, counts of what it refused, and its end once a
module holds its threads.

Plain classes that know no server; a gunicorn worker of either kind connects them to its connections and its clock tick.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from enum import Enum, auto
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from kms_jwks.service import Service

C = TypeVar("C")


class RequestDeadlines(Generic[C]):
    """Limits how long a sender may take from a request's first byte to its last.

    A caller that sends a request byte by byte would otherwise hold a thread for ever: every byte restarts the socket's
    own timeout. Requests are known by a key of the server's choice (a thread id, a task), `C` is its connection type.
    """

    def __init__(
        self, seconds: float, stop_reading: Callable[[C], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`stop_reading` ends the reading of a connection; an answer that is being sent still leaves."""
        self._seconds = seconds
        self._stop_reading = stop_reading
        self._clock = clock
        self._reading: dict[Hashable, tuple[float, C]] = {}

    def begin(self, request: Hashable, connection: C) -> None:
        """The server starts to read a request."""
        self._reading[request] = (self._clock() + self._seconds, connection)

    def received(self, request: Hashable) -> bool:
        """The request has been read; False when it was too late and its connection cannot be used again."""
        return self._reading.pop(request, None) is not None

    def forget(self, request: Hashable) -> None:
        """The request is over, whether it was read or not."""
        self._reading.pop(request, None)

    def enforce(self) -> None:
        """Stop the reading of every request whose deadline has passed. To be called about once a second."""
        now = self._clock()
        for request, (deadline, connection) in list(self._reading.items()):
            # The thread that reads may have finished meanwhile; only one of the two gets the entry.
            if deadline <= now and self._reading.pop(request, None) is not None:
                self._stop_reading(connection)


class RefusalCounts:
    """How many requests a server process refused before any route, by reason. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, reason: str) -> int:
        """Count one more; how many of this reason there were."""
        with self._lock:
            self._counts[reason] += 1
            return self._counts[reason]


class Verdict(Enum):
    """What a worker process does next."""

    SERVE = auto()
    STOP = auto()
    """Accept no new connections, finish the requests under way, then end."""
    EXIT = auto()
    """End at once: only threads that a module holds are left."""


class WornOutCheck:
    """Decides when a worker process ends because a module holds its threads; gunicorn then starts a fresh process.

    `threads` is how many requests the worker handles at a time.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._handling: set[int] = set()
        self._lost: frozenset[int] = frozenset()

    def enter(self, thread: int) -> None:
        """A thread begins to handle a request, or to wait for the first request of a new connection."""
        self._handling.add(thread)

    def leave(self, thread: int) -> None:
        """The thread is free again."""
        self._handling.discard(thread)

    @property
    def has_threads(self) -> bool:
        """Whether a thread is left that could handle a new connection."""
        return len(self._lost) < self._threads

    @property
    def has_lost_threads(self) -> bool:
        """Whether a module held a thread at the last check."""
        return bool(self._lost)

    def check(self, service: Service, *, stopping: bool, open_connections: bool) -> Verdict:
        """To be called about once a second until it returns EXIT.

        `stopping` says that the worker accepts no new connections any more, `open_connections` that a kept-alive
        connection may still bring a request.
        """
        self._lost = service.backends.lost_threads()
        if not stopping:
            return Verdict.SERVE if service.worn_out() is None else Verdict.STOP
        if self._lost and self._handling <= self._lost and not (open_connections and self.has_threads):
            return Verdict.EXIT
        return Verdict.STOP
