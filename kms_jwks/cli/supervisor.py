"""`serve`: the parent process of gunicorn and of the custodian, which starts, watches and stops the two.

The supervisor restarts a custodian that dies, with growing pauses while it keeps dying. When gunicorn exits, the
supervisor stops the custodian and exits too. On Linux the kernel sends the children TERM when the parent is killed.

While it runs it holds a lock in the state directory, so that a node is not served twice. The kernel releases the lock
with the process, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog

from kms_jwks.config import CONFIG_VARIABLE, load_settings, variable_name
from kms_jwks.errors import ConfigurationError
from kms_jwks.http import logs
from kms_jwks.model import Instant

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from kms_jwks.config import Settings

log = structlog.get_logger(__name__)

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds between two starts of a custodian that keeps dying."""
LONG_LIFE = 60.0
"""A custodian that ran for so many seconds is restarted after the first pause again."""
CERTIFICATE_INTERVAL = 86_400.0
"""Seconds between two log lines about the same certificate."""
CUSTODIAN_GRACE = 15.0
"""Seconds for the custodian to finish its step when the service stops."""

_WATCHED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_PR_SET_PDEATHSIG: Final = 1
_OVERRIDABLE: Final = ("bind", "routes", "workers", "threads", "log_level", "log_format")
"""Settings that the command line may change; the children get them in environment variables."""


def serve(settings: Settings, config_path: Path | None) -> int:
    """Run the service until a signal stops it. Returns gunicorn's exit code, or 128 + the signal that killed it."""
    logs.configure(settings.log_level, settings.log_format)
    locks = lock_node(settings)
    try:
        return _Supervisor(settings, _environment(settings, config_path)).run()
    finally:
        for lock in locks:
            os.close(lock)


def lock_node(settings: Settings) -> list[int]:
    """Lock the routes that this node serves, public and private apart. Returns the descriptors that hold the locks.

    Raises ConfigurationError where another process serves them with this state directory.
    """
    held: list[int] = []
    for side in ("public", "private") if settings.routes == "all" else (settings.routes,):
        path = settings.state_dir / f"serve-{side}.lock"
        try:
            held.append(lock := os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()} {settings.node_name}".encode(), 0)
        except OSError as error:
            holder = os.pread(held[-1], 100, 0).decode("utf-8", "replace") if isinstance(error, BlockingIOError) else ""
            for lock in held:
                os.close(lock)
            if not isinstance(error, BlockingIOError):
                raise ConfigurationError(f"state_dir: {path} cannot be locked: {error.strerror}.") from error
            pid, _, node = holder.partition(" ")
            raise ConfigurationError(
                f"Another process ({pid or 'unknown'}) serves the {side} routes of node {node or settings.node_name} "
                f"with the state directory {settings.state_dir}.",
                next_step="Stop it first; or give this one a node_name, a state_dir and a bind of its own.",
            ) from None
    return held


def _environment(settings: Settings, config_path: Path | None) -> dict[str, str]:
    """The environment of the children: the same settings file, and the settings that the command line changed."""
    environment = dict(os.environ)
    if config_path is not None:
        environment[CONFIG_VARIABLE] = str(config_path.absolute())
    from_file = load_settings(config_path)
    for name in _OVERRIDABLE:
        value = getattr(settings, name)
        if value != getattr(from_file, name):
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            environment[variable_name([name])] = text
    return environment


@dataclass
class _Child:
    """One child process. `pause` is the wait before the next start, in seconds, if this process dies early."""

    name: str
    arguments: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = FIRST_PAUSE
    start_at: float | None = None
    """When to start it again, on the monotonic clock; None while it runs or must not run."""
    expected: bool = False
    """Whether the supervisor asked it to exit."""
    returncode: int | None = field(default=None)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal if it runs."""
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
        self._stopping = False
        self._next_certificates = time.monotonic()
        self._pin: bytes | None = None
        """The PIN line from standard input; each child gets it on its own standard input."""

    def run(self) -> int:
        """Start the children, watch them until gunicorn has exited, and stop the custodian."""
        if any(backend.reads_stdin for backend in self._settings.backends.values()):
            self._pin = sys.stdin.buffer.readline()
        # Blocked signals stay pending until sigtimedwait takes them, so none is lost between two calls.
        before = self._child_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
        try:
            for child in self._children:
                self._start(child)
            while self._http.process is not None:
                self._report_certificates()
                self._handle_signal(within=self._start_what_is_due())
            self._stop_custodian()
        finally:
            for child in self._children:
                child.signal(signal.SIGKILL)  # a child is still alive only after an error in this process
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        code = self._http.returncode or 0
        if self._stopping and code == -signal.SIGTERM:
            return 0  # it was told to stop before gunicorn had its handlers, and before it listened
        return 128 - code if code < 0 else code

    # --- watching

    def _start_what_is_due(self) -> float:
        """Restart the custodian if that is due. Returns the seconds until it will be."""
        custodian = self._custodian
        if custodian is None or custodian.start_at is None or self._stopping:
            return 3600.0
        if (remaining := custodian.start_at - time.monotonic()) > 0:
            return remaining
        self._start(custodian)
        return 3600.0

    def _report_certificates(self) -> None:
        """Log once a day which certificates of this node are not valid or end soon. Each node has its own."""
        if time.monotonic() < self._next_certificates:
            return
        self._next_certificates = time.monotonic() + CERTIFICATE_INTERVAL
        if self._settings.tls_cert is None and not re.search("ssl(root)?cert=", self._settings.database_url):
            return  # the import would cost this process 25 MB
        from kms_jwks.doctor import State, certificates

        for check in certificates(self._settings, Instant(time.time_ns() // 1000), environment={}):
            if check.state is not State.OK:
                log.warning("certificate", what=check.name, detail=check.detail, next_step=check.next_step)

    def _handle_signal(self, *, within: float) -> None:
        """Wait up to `within` seconds for a signal, act on it, and reap the processes that exited."""
        info = signal.sigtimedwait(_WATCHED, max(within, 0.0))
        number = signal.Signals(info.si_signo) if info is not None else None
        if number in (signal.SIGTERM, signal.SIGINT):
            # INT (Ctrl-C) means the same as TERM; the second one stops gunicorn without waiting for running requests.
            log.info("service_stopping", signal=number.name)
            self._http.signal(signal.SIGINT if self._stopping else signal.SIGTERM)
            self._stopping = True
        elif number == signal.SIGHUP:
            log.info("service_reloading")
            self._http.signal(signal.SIGHUP)
            if self._custodian is not None and self._custodian.process is not None:
                self._custodian.expected = True
                self._custodian.signal(signal.SIGTERM)
        self._reap()

    def _reap(self) -> None:
        """Reap every process that exited; as PID 1 also the orphans that this process inherited."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for child in self._children:
                if child.process is not None and child.process.pid == pid:
                    self._note_exit(child, os.waitstatus_to_exitcode(status))

    def _note_exit(self, child: _Child, code: int) -> None:
        """Record and log the exit of a child, and set when it is started again."""
        assert child.process is not None
        child.process.returncode = code
        child.process, child.returncode = None, code
        if child is self._http or self._stopping:
            log.info("process_exited", role=child.name, code=code)
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

    # --- starting and stopping

    def _start(self, child: _Child) -> None:
        child.start_at = None
        child.started = time.monotonic()
        child.process = subprocess.Popen(  # noqa: S603 - this program itself
            [sys.executable, "-m", "kms_jwks", *child.arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL if self._pin is None else subprocess.PIPE,
            process_group=0,  # a Ctrl-C of the terminal reaches this process alone, which passes it on
            preexec_fn=_ChildSetup(os.getpid(), self._child_mask),  # noqa: PLW1509 - this process has one thread
        )
        if child.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError), child.process.stdin as stdin:
                stdin.write(self._pin or b"")
        log.info("process_started", role=child.name, pid=child.process.pid)

    def _stop_custodian(self) -> None:
        custodian = self._custodian
        if custodian is None or custodian.process is None:
            return
        self._stopping = True
        custodian.signal(signal.SIGTERM)
        end = time.monotonic() + CUSTODIAN_GRACE
        while custodian.process is not None:
            if (remaining := end - time.monotonic()) <= 0:
                log.warning("process_killed", role=custodian.name)
                custodian.signal(signal.SIGKILL)
                end += CUSTODIAN_GRACE
            signal.sigtimedwait((signal.SIGCHLD,), max(remaining, 0.1))
            self._reap()


class _ChildSetup:
    """Runs in the child between fork and exec: restores the signal mask, and lets the child die with its parent."""

    def __init__(self, parent: int, mask: set[int | signal.Signals]) -> None:
        self._parent = parent
        self._mask = mask
        # Loaded before the fork: a child must not import.
        self._prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def __call__(self) -> None:
        if self._prctl is not None:
            self._prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
            if os.getppid() != self._parent:  # the parent exited before the kernel was asked
                os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
