"""The connection of one process to its token: opened once for all callers, replaced when lost, with a back-off."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

import structlog
from pkcs11 import PKCS11Error

from kms_jwks.backends.pkcs11.error_map import (
    ConnectionLost,
    InvalidAnswer,
    Meaning,
    Rebuilt,
    describe_error,
    meaning_of,
    translate,
    unavailable,
)
from kms_jwks.errors import BackendError, BackendRefused, BackendTimeout, BackendUnavailable

if TYPE_CHECKING:
    from kms_jwks.backends.pkcs11.connection import Connection, PooledSession, SessionPool
    from kms_jwks.backends.pkcs11.module import Module
    from kms_jwks.backends.pkcs11.opening import TokenOpener

T = TypeVar("T")
log = structlog.get_logger(__name__)

_TRIES: Final = 4
"""Of one call: as it stands, with a new session, with a new connection, and one for a race with another thread."""
_RETRY_PAUSE: Final = 0.02
"""Seconds before a call that failed for no reason given is repeated: about as long as a login rewrites a token."""
_FIRST_BACKOFF: Final = 0.1
_LONGEST_BACKOFF: Final = 0.8
"""Seconds between two attempts to open a token that is away: it signs again about a second after its return."""
_REFUSED_BACKOFF: Final = 1.0
"""Seconds between two attempts after a refusal, which an operator has to mend. No PIN is tried twice meanwhile."""
_REOPENING_WAIT: Final = 0.3
"""Seconds that other callers wait while one thread reopens a lost token, which takes that long when it is there."""
_YOUNG: Final = 1.0
"""Seconds. A connection of that age is reopened only where the health check confirms that it is lost."""


class RecoveringConnection:
    """A token as one process uses it. A forked child makes its own and never touches the parent's."""

    def __init__(
        self,
        module: Module,
        opener: TokenOpener,
        *,
        bound_to: str | None = None,
        on_opened: Callable[[float], None] = lambda _: None,
    ) -> None:
        """`on_opened` is called with the instant (`time.monotonic()`) of each opening."""
        self.module = module
        self.current: Connection | None = None
        """The connection in use; None before the first call and while the token is lost."""
        self._opener = opener
        self._on_opened = on_opened
        self._open_lock = threading.Lock()
        self._serial = bound_to
        self._was_open = False
        self._needs_restart = False
        """The module answered that it has to be initialised anew."""
        self._failures = 0
        self._failure: BackendError | None = None
        self._retry_at = 0.0
        self._is_failing = False
        """The last call failed in all its tries. Until one succeeds, each call is tried once."""
        self._last_used = threading.local()

    def run(
        self,
        work: Callable[[PooledSession], T],
        deadline: float,
        *,
        doing: str,
        pool: Callable[[Connection], SessionPool] | None = None,
    ) -> T:
        """Do `work` in a session with the token, again where it failed for a reason that recovery can mend.

        `work` must bear being repeated. `doing` names it in messages; `pool` is the working sessions' by default.
        Raises BackendError alone.
        """
        failure: Exception | None = None
        for _ in range(1 if self._is_failing else _TRIES):
            if failure is not None:
                self._pause_after(failure, deadline)
            connection = self._open(deadline)
            sessions = connection.working if pool is None else pool(connection)
            pooled = sessions.acquire(deadline)
            try:
                serial = self.module.lock.acquire_shared(deadline)
                try:
                    connection.check()
                    if pooled.is_suspect:
                        pooled.replace()
                    result = work(pooled)
                    self._is_failing = False
                    self._last_used.pooled = pooled
                    return result
                except PKCS11Error as error:
                    failure = error
                    self._recover(error, pooled, doing)
                except ConnectionLost as error:
                    failure = error
                    pooled.replace()
                    self._discard(connection, "the token cannot be reached")
                except (InvalidAnswer, ValueError, struct.error) as error:
                    failure = error
                    pooled.replace()
                except BackendError:
                    raise
                except BaseException:
                    # Interrupted, or an unforeseen value: the session may be in the middle of an operation.
                    pooled.replace()
                    raise
                finally:
                    if connection.is_closed or sessions.is_surplus(pooled):
                        pooled.replace()
                    self.module.lock.release_shared(serial)
            finally:
                sessions.release(pooled)
        self._is_failing = True
        raise unavailable(f"The module goes on answering {_describe(failure)} to {doing}.") from failure

    def distrust(self) -> None:
        """The session of this thread's last call is replaced before its next use."""
        pooled = getattr(self._last_used, "pooled", None)
        if pooled is not None:
            pooled.is_suspect = True

    def bind(self, serial: str) -> None:
        """Accept the token with this serial alone; an open connection to another one is discarded at the next call."""
        self._serial = serial

    def close(self, deadline: float) -> None:
        """Close the sessions of this process."""
        connection = self.current
        if connection is not None:
            with self.module.lock.shared(deadline):
                self._discard(connection)

    # --- after a failure ------------------------------------------------------------------------------------------

    def _recover(self, error: PKCS11Error, pooled: PooledSession, doing: str) -> None:
        """Discard what has to be rebuilt before the next try. Raises BackendError where another try has no point.

        The module's lock is held.
        """
        meaning, connection = meaning_of(error), pooled.connection
        if meaning.rebuilt is Rebuilt.HANDLES:
            pooled.handles.clear()
            return
        pooled.replace()
        if meaning.is_final:
            raise translate(error, doing) from error
        if meaning.rebuilt is Rebuilt.SESSION and meaning is not Meaning.DOUBTFUL:
            return
        is_believed = meaning is not Meaning.DOUBTFUL and time.monotonic() > connection.opened_at + _YOUNG
        if is_believed or not connection.is_healthy():
            self._needs_restart = self._needs_restart or meaning.rebuilt is Rebuilt.MODULE
            self._discard(connection, describe_error(error))

    def _pause_after(self, failure: Exception, deadline: float) -> None:
        if isinstance(failure, PKCS11Error) and meaning_of(failure) is Meaning.DOUBTFUL:
            time.sleep(_RETRY_PAUSE)
        if time.monotonic() >= deadline:
            raise BackendTimeout(f"The module failed ({_describe(failure)}) and the deadline came first.") from failure

    def _discard(self, connection: Connection, cause: str | None = None) -> None:
        """Close a connection, once; without a `cause` because it is needed no more. The module's lock is held."""
        if self.current is connection:
            self.current = None
            if cause is not None:
                log.warning("token_connection_discarded", serial=connection.serial, cause=cause)
        connection.close()

    # --- opening --------------------------------------------------------------------------------------------------

    def _open(self, deadline: float) -> Connection:
        """The current connection, or a new one. Raises BackendUnavailable, BackendRefused, BackendTimeout."""
        connection = self.current
        if connection is not None and self._is_usable(connection):
            return connection
        self._raise_recent_failure()
        with self._only_opener(deadline):
            connection = self.current
            if connection is not None:
                if self._is_usable(connection):
                    return connection
                if not connection.is_closed:
                    with self.module.lock.shared(deadline):
                        self._discard(connection, "the module was restarted, or the keys are in another token")
            self._raise_recent_failure()
            try:
                connection = self._opener.open(
                    self.module,
                    self._serial,
                    deadline,
                    failed_before=self._failures > 0,
                    restart=self._needs_restart,
                )
            except (BackendUnavailable, BackendRefused, BackendTimeout) as error:
                self._keep_failure(error)
                raise
            self._failures = 0
            self._failure = None
            self._needs_restart = False
            self._was_open = True
            self._serial = connection.serial
            self._on_opened(connection.opened_at)
            self.current = connection
            self.module.restart_logged = False
            log.info("token_opened", serial=connection.serial, module=self.module.path.name)
            return connection

    @contextmanager
    def _only_opener(self, deadline: float) -> Iterator[None]:
        """One thread opens the token. Others wait for the first opening; while it is reopened they are refused soon."""
        reopens = self._was_open or self._failure is not None
        left = max(0.0, deadline - time.monotonic())
        if not self._open_lock.acquire(timeout=min(left, _REOPENING_WAIT) if reopens else left):
            if reopens:
                raise unavailable("The token was lost and is being opened again.") from self._failure
            raise BackendTimeout("Waited too long for another thread that opens the token.")
        try:
            yield
        finally:
            self._open_lock.release()

    def _is_usable(self, connection: Connection) -> bool:
        return (
            connection.generation == self.module.generation
            and not connection.is_closed
            and connection.serial == self._serial
        )

    def _raise_recent_failure(self) -> None:
        """Within the back-off after a failure, raise it again without asking the module."""
        left, failure = self._retry_at - time.monotonic(), self._failure
        if failure is None or left <= 0:
            return
        if isinstance(failure, BackendRefused):
            raise BackendRefused(failure.detail, next_step=failure.next_step)
        raise unavailable(failure.detail, left, next_step=failure.next_step)

    def _keep_failure(self, error: BackendError) -> None:
        backoff = _REFUSED_BACKOFF
        if not isinstance(error, BackendRefused):
            backoff = min(_FIRST_BACKOFF * 2 ** min(self._failures, 10), _LONGEST_BACKOFF)
        self._failures += 1
        self._failure = error.with_traceback(None)
        self._retry_at = time.monotonic() + backoff


def _describe(failure: Exception | None) -> str:
    if failure is None or isinstance(failure, ConnectionLost):
        return "as if the token were gone"
    is_known = isinstance(failure, PKCS11Error | InvalidAnswer)
    return describe_error(failure) if is_known else f"what cannot be read ({type(failure).__name__})"
