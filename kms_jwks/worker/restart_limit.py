"""Limits how often the workers of a node are replaced; a file keeps the count across restarts.

In the first round, one replacement per worker, workers are replaced one a second. Each further round within an hour
waits longer, so a module that hangs for hours does not make workers restart continuously.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from kms_jwks.model import SECOND
from kms_jwks.worker.clocks import boot_clock

FIRST_PAUSE = 1
"""Seconds between two replacements of the first round, so that the node keeps answering."""
SECOND_ROUND = 10
LONGEST_PAUSE = 300
REMEMBERED = 3600
"""Seconds for which a replacement counts."""
_FILE = "recycled.json"


class RestartLimit:
    """The limit of one node with `workers` workers. `clock` is the boot clock, in microseconds."""

    def __init__(self, state_dir: Path, workers: int, clock: Callable[[], int] = boot_clock) -> None:
        self._path = state_dir / _FILE
        self._workers = workers
        self._clock = clock

    def permit(self) -> float:
        """0.0 if a worker may be replaced now, which is recorded; otherwise the seconds it has to wait.

        Never raises: if the file cannot be written, the answer is the longest pause.
        """
        try:
            with self._locked() as file:
                now = self._clock()
                times = _recent(file, now)
                wait = times[-1] + _pause(len(times), self._workers) * SECOND - now if times else 0
                if wait > 0:
                    return wait / SECOND
                _write(file, [*times, now])
                return 0.0
        except OSError:
            return float(LONGEST_PAUSE)

    def count(self) -> int:
        """How many workers of this node were replaced within the last hour; 0 if the file cannot be read."""
        try:
            with self._locked() as file:
                return len(_recent(file, self._clock()))
        except OSError:
            return 0

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)


def _pause(done: int, workers: int) -> int:
    rounds = done // max(1, workers)
    return FIRST_PAUSE if rounds == 0 else min(SECOND_ROUND * 2 ** min(rounds - 1, 16), LONGEST_PAUSE)


def _recent(file: int, now: int) -> list[int]:
    """When workers were replaced, in order. Unreadable entries and those from before a reboot do not count."""
    text = os.pread(file, 65_536, 0)
    try:
        times = json.loads(text) if text else []
    except ValueError:
        return []
    if not isinstance(times, list):
        return []
    return sorted(t for t in times if isinstance(t, int) and now - REMEMBERED * SECOND < t <= now)


def _write(file: int, times: list[int]) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(times).encode("ascii"), 0)
