"""`serve`: the parent of gunicorn and of the custodian. It starts, watches and ends these two, and does nothing else.

The custodian is started again when it dies, ever more slowly while it keeps dying; gunicorn's end is the end of all.
On Linux the kernel ends the children when the parent is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog

from kms_jwks.config import CONFIG_VARIABLE, load_settings, variable_name
from kms_jwks.http import logs

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from kms_jwks.config import Settings

log = structlog.get_logger(__name__)

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds between two starts of a custodian that keeps dying."""
LONG_LIFE = 60.0
"""Seconds after which a custodian's death is not counted with the ones before."""
CUSTODIAN_GRACE = 15.0
"""Seconds a custodian has to finish its step when the service ends."""

_WATCHED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_PR_SET_PDEATHSIG: Final = 1
_OVERRIDABLE: Final = ("bind", "routes", "workers", "threads", "log_level", "log_format")
"""Settings that the command line may change; the children get them by environment variable."""


def serve(settings: Settings, config_path: Path | None) -> int:
    """Run the service until it is told to end. Returns the exit code: gunicorn's, or 128 + the signal it died of."""
    logs.configure(settings.log_level, settings.log_format)
    return _Supervisor(settings, _environment(settings, config_path)).run()


def _environment(settings: Settings, config_path: Path | None) -> dict[str, str]:
    """The children's environment: the same file, and whatever the command line changed."""
    environment = dict(os.environ)
    if config_path is not None:
        environment[CONFIG_VARIABLE] = str(config_path.absolute())
    filed = load_settings(config_path)
    for name in _OVERRIDABLE:
        value = getattr(settings, name)
        if value != getattr(filed, name):
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            environment[variable_name([name])] = text
    return environment


@dataclass
class _Child:
    """One role and its process. `pause` is how long the next start waits if this one dies early."""

    name: str
    arguments: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = FIRST_PAUSE
    start_at: float | None = None
    """When to start it again; None while it runs or is not wanted."""
    expected: bool = False
    """Whether its end was asked for."""
    returncode: int | None = field(default=None)

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


class _Supervisor:
    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        self._settings = settings
        self._environment = environment
        self._http = _Child("http", ("serve", "--role", "http"))
        self._custodian = _Child("custodian", ("custodian",)) if settings.routes != "public" else None
        self._children = [c for c in (self._http, self._custodian) if c is not None]
        self._ending = False
        self._pin: bytes | None = None
        """The line that standard input gave, for each child that is to find it on its own."""

    def run(self) -> int:
        """Until gunicorn has ended."""
        if any(backend.reads_stdin for backend in self._settings.backends.values()):
            self._pin = sys.stdin.buffer.readline()
        # Blocked and waited for, so that none gets lost between two looks.
        before = self._child_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
        try:
            for child in self._children:
                self._start(child)
            while self._http.process is not None:
                self._wait(self._http_or_restart())
            self._end_custodian()
        finally:
            for child in self._children:
                child.signal(signal.SIGKILL)  # reached with a child alive only when we fail ourselves
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        code = self._http.returncode or 0
        return 128 - code if code < 0 else code

    # --- one look

    def _http_or_restart(self) -> float:
        """Start what is due; seconds until the next thing is."""
        custodian = self._custodian
        if custodian is None or custodian.start_at is None or self._ending:
            return 3600.0
        if (remaining := custodian.start_at - time.monotonic()) > 0:
            return remaining
        self._start(custodian)
        return 3600.0

    def _wait(self, seconds: float) -> None:
        """Wait for one signal and act on it."""
        info = signal.sigtimedwait(_WATCHED, max(seconds, 0.0))
        number = signal.Signals(info.si_signo) if info is not None else None
        if number in (signal.SIGTERM, signal.SIGINT):
            # Ctrl-C means the same as TERM; a second one does not wait for answers that are under way.
            log.info("ending", signal=number.name)
            self._http.signal(signal.SIGINT if self._ending else signal.SIGTERM)
            self._ending = True
        elif number == signal.SIGHUP:
            log.info("reloading")
            self._http.signal(signal.SIGHUP)
            if self._custodian is not None and self._custodian.process is not None:
                self._custodian.expected = True
                self._custodian.signal(signal.SIGTERM)
        self._reap()

    def _reap(self) -> None:
        """Take note of every process that ended, orphans that PID 1 inherited included."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for child in self._children:
                if child.process is not None and child.process.pid == pid:
                    self._ended(child, os.waitstatus_to_exitcode(status))

    def _ended(self, child: _Child, code: int) -> None:
        assert child.process is not None
        child.process.returncode = code
        child.process, child.returncode = None, code
        if child is self._http or self._ending:
            log.info("process_ended", role=child.name, code=code)
            return
        now = time.monotonic()
        if child.expected:
            child.expected, child.pause, wait = False, FIRST_PAUSE, 0.0
        else:
            if now - child.started >= LONG_LIFE:
                child.pause = FIRST_PAUSE
            wait = child.pause
            child.pause = min(child.pause * 2, LONGEST_PAUSE)
            log.error("process_died", role=child.name, code=code, restart_in=wait)
        child.start_at = now + wait

    # --- starting and ending

    def _start(self, child: _Child) -> None:
        child.start_at = None
        child.started = time.monotonic()
        child.process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-m", "kms_jwks", *child.arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL if self._pin is None else subprocess.PIPE,
            process_group=0,  # a Ctrl-C of the terminal reaches them through us alone
            preexec_fn=_Prepare(os.getpid(), self._child_mask),  # noqa: PLW1509 - this process has one thread
        )
        if child.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError), child.process.stdin as stdin:
                stdin.write(self._pin or b"")
        log.info("process_started", role=child.name, pid=child.process.pid)

    def _end_custodian(self) -> None:
        custodian = self._custodian
        if custodian is None or custodian.process is None:
            return
        self._ending = True
        custodian.signal(signal.SIGTERM)
        end = time.monotonic() + CUSTODIAN_GRACE
        while custodian.process is not None:
            if (remaining := end - time.monotonic()) <= 0:
                log.warning("process_killed", role=custodian.name)
                custodian.signal(signal.SIGKILL)
                end += CUSTODIAN_GRACE
            signal.sigtimedwait((signal.SIGCHLD,), max(remaining, 0.1))
            self._reap()


class _Prepare:
    """Runs in the child between fork and exec: the signals of before, and an end when the parent ends."""

    def __init__(self, parent: int, mask: set[int | signal.Signals]) -> None:
        self._parent = parent
        self._mask = mask
        # Loaded before the fork: the child may not import.
        self._prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def __call__(self) -> None:
        if self._prctl is not None:
            self._prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
            if os.getppid() != self._parent:  # it ended before the kernel was asked
                os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
