"""One process's way to the token: opens it once for all callers, waits after failures, replaces what is lost."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

from pkcs11 import PKCS11Error

from kms_jwks.backends.pkcs11.locks import held
from kms_jwks.backends.pkcs11.meanings import Lost, Meaning, meaning_of, said, translated, unavailable
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
_FIRST_BACKOFF: Final = 0.25
_LONGEST_BACKOFF: Final = 5.0
_REFUSED_BACKOFF: Final = 1.0
"""Seconds. What only an operator can mend is looked at again this often; no PIN is tried twice meanwhile."""


class Access:
    """Everything one process keeps about one token. A forked child makes its own and never touches the parent's."""

    def __init__(self, module: Module, options: Pkcs11Options, *, bound_to: str | None = None) -> None:
        self.module = module
        self._options = options
        self._opening = threading.Lock()
        self._connection: Connection | None = None
        self._serial = bound_to
        self._failures = 0
        self._failure: BackendError | None = None
        self._closed_until = 0.0

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
        failed: PKCS11Error | Lost | None = None
        for _ in range(_TRIES):
            connection = self._connected(deadline)
            seats = connection.working if pool is None else pool(connection)
            seat = seats.take(deadline)
            try:
                turn = self.module.gate.enter(deadline)
                try:
                    connection.check()
                    return work(seat)
                except PKCS11Error as error:
                    failed = error
                    self._after(error, seat, doing)
                except Lost as error:
                    failed = error
                    seat.replace()
                    self._drop(connection)
                except BackendError:
                    raise
                except (ValueError, struct.error) as error:
                    seat.replace()
                    raise BackendRefused(
                        f"The module's answer to {doing} cannot be read ({type(error).__name__})."
                    ) from error
                except BaseException:
                    # Interrupted, or a value nobody foresaw: the session may be in the middle of an operation.
                    seat.replace()
                    raise
                finally:
                    if connection.is_closed:
                        seat.replace()
                    self.module.gate.leave(turn)
            finally:
                seats.give_back(seat)
            if time.monotonic() >= deadline:
                raise BackendTimeout(f"The module failed ({_words(failed)}) and the deadline came first.") from failed
        raise unavailable(f"The module goes on answering {_words(failed)} to {doing}.") from failed

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
        """Make the next try differ from the one that failed; raise where there is nothing to try."""
        match meaning_of(error):
            case Meaning.HANDLE:
                seat.handles.clear()
            case Meaning.SESSION:
                seat.replace()
            case Meaning.LOST:
                seat.replace()
                self._drop(seat.connection)
            case Meaning.DOUBTFUL:
                seat.replace()
                time.sleep(_PAUSE)
                if not seat.connection.is_healthy():
                    self._drop(seat.connection)
            case Meaning.UNSUPPORTED | Meaning.REFUSED:
                seat.replace()
                raise translated(error, doing) from error

    # --- one connection for all threads ---------------------------------------------------------------------------

    def _connected(self, deadline: float) -> Connection:
        connection = self._connection
        if connection is not None and self._serves(connection):
            return connection
        with held(self._opening, deadline, "another thread that opens the token"):
            connection = self._connection
            if connection is not None:
                if self._serves(connection):
                    return connection
                if not connection.is_closed:
                    with self.module.gate.inside(deadline):
                        self._drop(connection)
            self._fail_at_once()
            try:
                connection = open_token(self.module, self._options, self._serial, deadline)
            except (BackendUnavailable, BackendRefused) as error:
                self._remember(error)
                raise
            self._failures = 0
            self._failure = None
            self._serial = connection.serial
            self._connection = connection
            return connection

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
        left = self._closed_until - time.monotonic()
        if self._failure is None or left <= 0:
            return
        if isinstance(self._failure, BackendUnavailable):
            raise unavailable(self._failure.detail, left)
        raise BackendRefused(self._failure.detail, next_step=self._failure.next_step)

    def _remember(self, error: BackendError) -> None:
        self._failures += 1
        wait = _REFUSED_BACKOFF
        if isinstance(error, BackendUnavailable):
            wait = min(_FIRST_BACKOFF * 2 ** min(self._failures - 1, 10), _LONGEST_BACKOFF)
        self._failure = error.with_traceback(None)
        self._closed_until = time.monotonic() + wait


def _words(failed: BaseException | None) -> str:
    return "as if the token were gone" if isinstance(failed, Lost) or failed is None else said(failed)
