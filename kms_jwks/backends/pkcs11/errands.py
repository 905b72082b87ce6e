"""Calls with a deadline that holds even where the module hangs: made in a thread of their own, left behind if need be.

Signing is not among them: the service has a pool for that, or makes signatures in place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from kms_jwks.backends.base import MOST_LEFT_BEHIND
from kms_jwks.backends.pkcs11.error_map import unavailable
from kms_jwks.errors import BackendTimeout

T = TypeVar("T")

_GRACE: Final = 0.25
"""Seconds after the deadline that a call has to say for itself that it was not done in time."""
_STUCK_AT_MOST: Final = MOST_LEFT_BEHIND
"""Threads that may be left behind in the module; with so many stuck another one would not come back either."""


class Errands:
    """Counts the threads of one backend that were left behind."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stuck = 0

    @property
    def stuck(self) -> int:
        """How many calls did not come back in time and are still inside."""
        return self._stuck

    def run(self, work: Callable[[], T], deadline: float, *, doing: str, undo: Callable[[T], None] | None = None) -> T:
        """What `work` returns or raises. `undo` takes back what it did after nobody was waiting for it any more.

        Raises BackendTimeout, and BackendUnavailable at once while too many calls are stuck or there is no thread.
        """
        if self._stuck >= _STUCK_AT_MOST:
            raise unavailable(
                f"{self._stuck} calls into the module do not come back.",
                next_step="Look at the module; a process with stuck calls has to be replaced.",
            )
        errand = _Errand(work, undo)
        thread = threading.Thread(target=self._go, args=(errand,), name=f"module: {doing}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise unavailable("The system gives this process no thread.") from error
        errand.done.wait(max(0.0, deadline - time.monotonic()) + _GRACE)
        with self._lock:
            if not errand.done.is_set():
                errand.is_late = True
                self._stuck += 1
                raise BackendTimeout(f"The module did not come back in time from {doing}.")
        if errand.error is not None:
            raise errand.error
        return errand.result[0]

    def _go(self, errand: _Errand[T]) -> None:
        try:
            errand.result.append(errand.work())
        except BaseException as error:  # noqa: BLE001 — handed to whoever waits
            errand.error = error
        with self._lock:
            errand.done.set()
            if not errand.is_late:
                return
            self._stuck -= 1
        if errand.result and errand.undo is not None:
            errand.undo(errand.result[0])


class _Errand(Generic[T]):
    def __init__(self, work: Callable[[], T], undo: Callable[[T], None] | None) -> None:
        self.work = work
        self.undo = undo
        self.done = threading.Event()
        self.is_late = False
        self.result: list[T] = []
        self.error: BaseException | None = None
