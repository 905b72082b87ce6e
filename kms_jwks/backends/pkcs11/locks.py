"""Locks that are waited for until a deadline: lock files between processes, and the lock on a module's lifetime."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kms_jwks.backends.pkcs11.error_map import unavailable
from kms_jwks.errors import BackendRefused, BackendTimeout

_FIRST_PAUSE = 0.002
_LONGEST_PAUSE = 0.05
"""Seconds between two attempts to take a lock file; the pause doubles from the first to the longest."""
_EXCLUSIVE_WAIT = 0.5
"""Seconds to wait while another thread holds a module exclusively. After that the module counts as away."""
_DRAIN_WAIT = 0.5
"""Seconds to wait for calls that are inside the module before it is held exclusively. New calls, those on other tokens
of the module too, wait meanwhile."""


def lock_path(folder: Path, purpose: str, name: str) -> Path:
    """The lock file for one purpose and one module or token. `name` is hashed: a file name takes no odd characters."""
    return folder / f"{purpose}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock"


@contextmanager
def file_lock(path: Path, deadline: float) -> Iterator[None]:
    """Hold an exclusive flock on `path` (made where missing). Raises BackendTimeout, BackendRefused.

    The kernel releases it when the process ends. It excludes threads as well, because each call opens a file
    description of its own. It is unlocked explicitly, because a child that is forked meanwhile shares the description.
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
        _take(handle, path, deadline)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def _take(handle: int, path: Path, deadline: float) -> None:
    pause = _FIRST_PAUSE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            left = deadline - time.monotonic()
            if left <= 0:
                raise BackendTimeout(f"Another process or thread holds {path}.") from None
            time.sleep(min(pause, left))
            pause = min(pause * 2, _LONGEST_PAUSE)
        except OSError as error:
            raise BackendRefused(
                f"The lock {path} cannot be taken: {error.strerror}.",
                next_step=f"Put {path.parent} on a file system with locks (flock).",
            ) from error


class ModuleLock:
    """Calls into a module hold it shared; C_Initialize and C_Finalize hold it exclusively (softhsm issue 446).

    With `serial` set it admits one call at a time: for modules that cannot lock for themselves. It is not re-entrant:
    a thread that holds it and acquires it again waits for itself.
    """

    def __init__(self) -> None:
        self.serial = False
        self._one_call = threading.Lock()
        self._state = threading.Lock()
        self._changed = threading.Condition(self._state)
        self._calls = 0
        self._is_exclusive = False

    def acquire_shared(self, deadline: float) -> bool:
        """Admit a call. The result is to be given to `release_shared`. Raises BackendTimeout, BackendUnavailable."""
        serial = self.serial
        if serial and not self._one_call.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise BackendTimeout("Another call was inside the module, which takes one at a time.")
        with self._state:
            if self._is_exclusive and not self._changed.wait_for(self._is_open, _left(deadline, _EXCLUSIVE_WAIT)):
                if serial:
                    self._one_call.release()
                raise unavailable("The module is being started again.")
            self._calls += 1
        return serial

    def release_shared(self, serial: bool) -> None:
        """The call has ended. `serial` is what `acquire_shared` returned."""
        with self._state:
            self._calls -= 1
            if self._is_exclusive:
                self._changed.notify_all()
        if serial:
            self._one_call.release()

    @contextmanager
    def shared(self, deadline: float) -> Iterator[None]:
        """`acquire_shared` and `release_shared` as a context manager, where its cost does not matter."""
        serial = self.acquire_shared(deadline)
        try:
            yield
        finally:
            self.release_shared(serial)

    @contextmanager
    def exclusive(self, deadline: float) -> Iterator[None]:
        """Admit no call, and wait a little until those inside have ended.

        Raises BackendUnavailable when a call hangs in the module, or when another thread holds the lock exclusively.
        """
        with self._state:
            if not self._changed.wait_for(self._is_open, _left(deadline, _EXCLUSIVE_WAIT)):
                raise unavailable("The module is being started again.")
            self._is_exclusive = True
            try:
                if not self._changed.wait_for(lambda: not self._calls, _left(deadline, _DRAIN_WAIT)):
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
            with self._state:
                self._reopen()

    def _is_open(self) -> bool:
        return not self._is_exclusive

    def _reopen(self) -> None:
        self._is_exclusive = False
        self._changed.notify_all()


def _left(deadline: float, longest: float) -> float:
    return min(max(0.0, deadline - time.monotonic()), longest)
