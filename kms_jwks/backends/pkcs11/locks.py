"""Waiting with a deadline: locks between processes (flock) and the gate that every call into a module passes."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kms_jwks.backends.pkcs11.error_map import unavailable
from kms_jwks.errors import BackendRefused, BackendTimeout

_FIRST_WAIT = 0.002
_LONGEST_WAIT = 0.05
_AT_THE_DOOR = 0.5
"""Seconds to wait at a gate that is closed. A module that takes longer to start is away, and callers are told so."""
_UNTIL_ALL_ARE_OUT = 0.5
"""Seconds to keep everybody out while waiting for calls to come back: those of other tokens wait too."""


@contextmanager
def locked(path: Path, deadline: float) -> Iterator[None]:
    """Hold an exclusive flock on `path` (made where missing). Raises BackendTimeout, BackendRefused.

    The kernel lets go of it when the process dies. It excludes threads too: each call has a file description of its
    own. Unlocked explicitly, because a child forked meanwhile shares the description.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BackendRefused(
            f"The lock {path} cannot be opened: {error.strerror}.",
            next_step=f"Make {path.parent} a folder that this user may write to.",
        ) from error
    try:
        wait = _FIRST_WAIT
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise BackendTimeout(f"Another process or thread holds {path}.") from None
                time.sleep(min(wait, left))
                wait = min(wait * 2, _LONGEST_WAIT)
            except OSError as error:
                raise BackendRefused(
                    f"The lock {path} cannot be taken: {error.strerror}.",
                    next_step=f"Put {path.parent} on a file system with locks (flock).",
                ) from error
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


class Gate:
    """Counts the threads inside a module, so that nobody finalises it under them (softhsm issue 446).

    With `serial` set, one thread at a time gets in: for modules that cannot lock for themselves. Not re-entrant: a
    thread that is inside and enters again waits for itself.
    """

    def __init__(self) -> None:
        self.serial = False
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._inside = 0
        self._closed = False

    def enter(self, deadline: float) -> bool:
        """Come in; the answer is to be given to `leave`. Raises BackendTimeout, BackendUnavailable."""
        turn = self.serial
        if turn and not self._turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise BackendTimeout("Another call was inside the module, which takes one at a time.")
        with self._lock:
            if self._closed and not self._changed.wait_for(self._is_open, _left(deadline, _AT_THE_DOOR)):
                if turn:
                    self._turn.release()
                raise unavailable("The module is being started again.")
            self._inside += 1
        return turn

    def leave(self, turn: bool) -> None:
        """Go out again."""
        with self._lock:
            self._inside -= 1
            if self._closed:
                self._changed.notify_all()
        if turn:
            self._turn.release()

    @contextmanager
    def inside(self, deadline: float) -> Iterator[None]:
        """`enter` and `leave`, where speed does not matter."""
        turn = self.enter(deadline)
        try:
            yield
        finally:
            self.leave(turn)

    @contextmanager
    def alone(self, deadline: float) -> Iterator[None]:
        """Let nobody in and wait a little until everybody is out. Raises BackendUnavailable when a call is stuck."""
        with self._lock:
            if not self._changed.wait_for(self._is_open, _left(deadline, _AT_THE_DOOR)):
                raise unavailable("The module is being started again.")
            self._closed = True
            try:
                if not self._changed.wait_for(lambda: not self._inside, _left(deadline, _UNTIL_ALL_ARE_OUT)):
                    raise unavailable(
                        "A call into the module does not come back, so it cannot be started again.",
                        next_step="Repeat the call after Retry-After; a process with a stuck call has to be replaced.",
                    )
            except BaseException:
                self._reopen()
                raise
        try:
            yield
        finally:
            with self._lock:
                self._reopen()

    def _is_open(self) -> bool:
        return not self._closed

    def _reopen(self) -> None:
        self._closed = False
        self._changed.notify_all()


def _left(deadline: float, longest: float) -> float:
    return min(max(0.0, deadline - time.monotonic()), longest)
