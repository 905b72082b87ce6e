"""One process's way to the token: opens it once for all callers, waits after failures, replaces what is lost."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

from pkcs11 import PKCS11Error

from kms_jwks.backends.pkcs11.error_map import (
    Garbled,
    Lost,
    Meaning,
    Rebuilt,
    meaning_of,
    said,
    translated,
    unavailable,
)
from kms_jwks.backends.pkcs11.opening import open_token
from kms_jwks.errors import BackendError, BackendRefused, BackendTimeout, BackendUnavailable

if TYPE_CHECKING:
    from kms_jwks.backends.pkcs11.connection import Connection, Pool, Seat
    from kms_jwks.backends.pkcs11.module import Module
    from kms_jwks.backends.pkcs11.options import Pkcs11Options

T = TypeVar("T")

_TRIES: Final = 4
"""Of one call: as it stands, with a new session, with a new connection, and one for a race with another thread."""
_PAUSE: Final = 0.02
"""Seconds before a call that failed for no reason given is repeated: about as long as a login rewrites a token."""
_FIRST_BACKOFF: Final = 0.1
_LONGEST_BACKOFF: Final = 0.8
"""Seconds between two looks at a token that is away: it signs again within a second or so of its return."""
_REFUSED_BACKOFF: Final = 1.0
"""Seconds. What only an operator can mend is looked at again this often; no PIN is tried twice meanwhile."""
_PATIENCE: Final = 0.3
"""Seconds that other callers wait while one opens again a token that was lost; it takes that long when it is there."""
_YOUNG: Final = 1.0
"""Seconds. A connection of that age is opened anew only where the token's health bears out what an answer says."""


class Access:
    """Everything one process keeps about one token. A forked child makes its own and never touches the parent's."""

    def __init__(
        self,
        module: Module,
        options: Pkcs11Options,
        *,
        bound_to: str | None = None,
        opened: Callable[[float], None] = lambda _: None,
    ) -> None:
        """`opened` is told the instant of each opening."""
        self.module = module
        self._options = options
        self._opened = opened
        self._opening = threading.Lock()
        self._connection: Connection | None = None
        self._serial = bound_to
        self._was_open = False
        self._restart = False
        """The module said that it has to be initialised anew."""
        self._failures = 0
        self._failure: BackendError | None = None
        self._closed_until = 0.0
        self._is_ailing = False
        """The last call was tried in vain as often as it may be; until one succeeds each is tried once."""
        self._used = threading.local()

    def run(
        self,
        work: Callable[[Seat], T],
        deadline: float,
        *,
        doing: str,
        pool: Callable[[Connection], Pool] | None = None,
    ) -> T:
        """Do `work` inside the module in a seat of this token, again where it failed for a reason that can be mended.

        `work` must bear being repeated. Raises BackendError alone.
        """
        failed: Exception | None = None
        for _ in range(1 if self._is_ailing else _TRIES):
            if failed is not None:
                self._pause_after(failed, deadline)
            connection = self._connected(deadline)
            seats = connection.working if pool is None else pool(connection)
            seat = seats.take(deadline)
            try:
                turn = self.module.gate.enter(deadline)
                try:
                    connection.check()
                    if seat.is_suspect:
                        seat.replace()
                    done = work(seat)
                    self._is_ailing = False
                    self._used.seat = seat
                    return done
                except PKCS11Error as error:
                    failed = error
                    self._after(error, seat, doing)
                except Lost as error:
                    failed = error
                    seat.replace()
                    self._drop(connection)
                except (Garbled, ValueError, struct.error) as error:
                    failed = error
                    seat.replace()
                except BackendError:
                    raise
                except BaseException:
                    # Interrupted, or a value nobody foresaw: the session may be in the middle of an operation.
                    seat.replace()
                    raise
                finally:
                    if connection.is_closed or seats.is_superfluous(seat):
                        seat.replace()
                    self.module.gate.leave(turn)
            finally:
                seats.give_back(seat)
        self._is_ailing = True
        raise unavailable(f"The module goes on answering {_words(failed)} to {doing}.") from failed

    def distrust(self) -> None:
        """What this thread was last given came from a session that is not to be used again."""
        seat = getattr(self._used, "seat", None)
        if seat is not None:
            seat.is_suspect = True

    def bind(self, serial: str) -> None:
        """No token with another serial will do; one that is open is given up at the next call."""
        self._serial = serial

    def close(self, deadline: float) -> None:
        """Give up the sessions of this process."""
        connection = self._connection
        if connection is not None:
            with self.module.gate.inside(deadline):
                self._drop(connection)

    def _after(self, error: PKCS11Error, seat: Seat, doing: str) -> None:
        """Inside: make the next try differ from the one that failed; raise where there is nothing to try."""
        meaning, connection = meaning_of(error), seat.connection
        if meaning.rebuilt is Rebuilt.HANDLES:
            seat.handles.clear()
            return
        seat.replace()
        if meaning.is_final:
            raise translated(error, doing) from error
        if meaning.rebuilt is Rebuilt.SESSION and meaning is not Meaning.DOUBTFUL:
            return
        is_believed = meaning is not Meaning.DOUBTFUL and time.monotonic() > connection.opened_at + _YOUNG
        if is_believed or not connection.is_healthy():
            self._restart = self._restart or meaning.rebuilt is Rebuilt.MODULE
            self._drop(connection)

    def _pause_after(self, failed: Exception, deadline: float) -> None:
        if isinstance(failed, PKCS11Error) and meaning_of(failed) is Meaning.DOUBTFUL:
            time.sleep(_PAUSE)
        if time.monotonic() >= deadline:
            raise BackendTimeout(f"The module failed ({_words(failed)}) and the deadline came first.") from failed

    # --- one connection for all threads ---------------------------------------------------------------------------

    def _connected(self, deadline: float) -> Connection:
        connection = self._connection
        if connection is not None and self._serves(connection):
            return connection
        self._fail_at_once()
        with self._alone(deadline):
            connection = self._connection
            if connection is not None:
                if self._serves(connection):
                    return connection
                if not connection.is_closed:
                    with self.module.gate.inside(deadline):
                        self._drop(connection)
            self._fail_at_once()
            try:
                connection = open_token(
                    self.module,
                    self._options,
                    self._serial,
                    deadline,
                    failed_before=self._failures > 0,
                    restart=self._restart,
                )
            except (BackendUnavailable, BackendRefused, BackendTimeout) as error:
                self._remember(error)
                raise
            self._failures = 0
            self._failure = None
            self._restart = False
            self._was_open = True
            self._serial = connection.serial
            self._opened(connection.opened_at)
            self._connection = connection
            return connection

    @contextmanager
    def _alone(self, deadline: float) -> Iterator[None]:
        """One thread opens the token. For the first opening others wait; when it was lost they are answered soon."""
        again = self._was_open or self._failure is not None
        left = max(0.0, deadline - time.monotonic())
        if not self._opening.acquire(timeout=min(left, _PATIENCE) if again else left):
            if again:
                raise unavailable("The token was lost and is being opened again.") from self._failure
            raise BackendTimeout("Waited too long for another thread that opens the token.")
        try:
            yield
        finally:
            self._opening.release()

    def _serves(self, connection: Connection) -> bool:
        return (
            connection.generation == self.module.generation
            and not connection.is_closed
            and connection.serial == self._serial
        )

    def _drop(self, connection: Connection) -> None:
        """Inside the gate: give a connection up, once."""
        if self._connection is connection:
            self._connection = None
        connection.close()

    def _fail_at_once(self) -> None:
        """Within the back-off after a failure, give its answer again without asking the module."""
        left, failure = self._closed_until - time.monotonic(), self._failure
        if failure is None or left <= 0:
            return
        if isinstance(failure, BackendRefused):
            raise BackendRefused(failure.detail, next_step=failure.next_step)
        raise unavailable(failure.detail, left, next_step=failure.next_step)

    def _remember(self, error: BackendError) -> None:
        wait = _REFUSED_BACKOFF
        if not isinstance(error, BackendRefused):
            wait = min(_FIRST_BACKOFF * 2 ** min(self._failures, 10), _LONGEST_BACKOFF)
        self._failures += 1
        self._failure = error.with_traceback(None)
        self._closed_until = time.monotonic() + wait


def _words(failed: Exception | None) -> str:
    if failed is None or isinstance(failed, Lost):
        return "as if the token were gone"
    is_known = isinstance(failed, PKCS11Error | Garbled)
    return said(failed) if is_known else f"what cannot be read ({type(failed).__name__})"
