"""Proof that a process of this node lives: it holds a lock on a file for as long as it runs.

The kernel lets the lock go when the process ends, however it ends, so a free lock means a dead worker. A file that is
not there proves nothing: the worker may belong to another node.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from kms_jwks.model import Id


class LivenessLock:
    """The lock this process holds while it lives."""

    def __init__(self, folder: Path, worker: Id) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = folder / f"{worker}.lock"
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self, *, keep_proof: bool = False) -> None:
        """Let go in an orderly way; idempotent. With `keep_proof` as a death does: the file stays, held by nobody."""
        if self._fd >= 0:
            if not keep_proof:
                with contextlib.suppress(OSError):
                    self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def dead(folder: Path) -> list[Id]:
    """The workers of this node that have certainly ended and were not cleared yet."""
    try:
        found = [Id(path.stem) for path in folder.glob("*.lock")]
    except OSError:
        return []
    return [worker for worker in found if is_dead(folder, worker)]


def age(folder: Path, worker: Id) -> float:
    """Seconds since the worker's file was made; 0 where there is none."""
    try:
        return max(time.time() - (folder / f"{worker}.lock").stat().st_mtime, 0.0)
    except OSError:
        return 0.0


def is_dead(folder: Path, worker: Id) -> bool:
    """Whether a worker of this node has certainly ended."""
    try:
        fd = os.open(folder / f"{worker}.lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(fd)


def clear(folder: Path, worker: Id) -> None:
    """Remove a dead worker's file."""
    (folder / f"{worker}.lock").unlink(missing_ok=True)
