"""A token that is open in this process: the session that logged in, the seats that work, and whether it is well."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import PKCS11Error, Session, Token

from kms_jwks.backends.pkcs11.keys import Mapper
from kms_jwks.backends.pkcs11.meanings import Lost
from kms_jwks.errors import BackendTimeout

if TYPE_CHECKING:
    from collections.abc import Collection

    from kms_jwks.backends.base import KeyRef
    from kms_jwks.backends.pkcs11.cryptoki import TokenFacts
    from kms_jwks.backends.pkcs11.module import Module

_GLANCES: Final = (0.0, 0.005, 0.01, 0.02, 0.04, 0.08)
"""Seconds before each look at the token until it counts as gone. A login in another process, which rewrites SoftHSM's
token, makes C_GetTokenInfo fail for up to 12 ms (measured)."""


@dataclass(frozen=True, slots=True)
class Handle:
    """A private key as one session knows it: python-pkcs11's object, and what its signatures must look like."""

    key: Any
    kty: str
    crv: str | None
    """Of an ML-DSA key: its parameter set, which is the JWK's `alg`."""
    rsa_bits: int
    """Of the modulus; 0 where the key is no RSA key."""
    mechanisms: Collection[object]
    """Those of the token that the key is allowed."""


class Seat:
    """One session and the handles it found, used by one thread at a time. The session opens at the first use."""

    def __init__(self, connection: Connection, *, rw: bool) -> None:
        self.connection = connection
        self.handles: dict[KeyRef, Handle] = {}
        self._rw = rw
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        """To be called inside. Raises PKCS11Error."""
        if self._session is None:
            self._session = self.connection.open_session(rw=self._rw)
        return self._session

    def replace(self) -> None:
        """Close the session, inside: after a call in it failed it may be dead or in the middle of an operation."""
        session, self._session = self._session, None
        self.handles.clear()
        if session is not None:
            self.connection.close_session(session)


class Pool:
    """So many seats, lent to one thread at a time."""

    def __init__(self, connection: Connection, seats: int, *, rw: bool) -> None:
        self._count = seats
        self._idle: queue.SimpleQueue[Seat] = queue.SimpleQueue()
        for _ in range(seats):
            self._idle.put(Seat(connection, rw=rw))
        self.give_back = self._idle.put

    def take(self, deadline: float) -> Seat:
        """A seat, to be given back. Raises BackendTimeout."""
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            pass
        try:
            return self._idle.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise BackendTimeout(f"All sessions with the token ({self._count}) were busy.") from None

    def close(self) -> None:
        """Close the sessions that are idle, inside. The seats stay, so that nobody waits for one in vain."""
        idle = []
        with suppress(queue.Empty):
            while True:
                idle.append(self._idle.get_nowait())
        for seat in idle:
            seat.replace()
            self._idle.put(seat)


class Connection:
    """One opening of a token in one process, until it is lost.

    Whoever finds it lost drops it and opens a new one; nothing in it is repaired, except that a seat replaces its
    session. `generation` is the module's: when the module was initialised again, everything here is dead.
    """

    def __init__(self, module: Module, token: Token, serial: str, *, seats: int) -> None:
        self.module = module
        self.generation = module.generation
        self.token = token
        self.serial = serial
        self.mechanisms = frozenset(token.slot.get_mechanisms())
        self.sessions = 0
        """How many sessions this connection has open now."""
        self.is_closed = False
        self._counting = threading.Lock()
        self._mapper = Mapper()
        # The session that logs in does nothing else, so no call that fails can end it and with it the login.
        self.login_session = self.open_session(rw=False)
        self.working = Pool(self, seats, rw=False)
        self.mutating = Pool(self, 1, rw=True)
        """Makes and destroys; whoever takes its seat holds the token's mutation lock."""

    # All of these are called inside the module's gate.

    def open_session(self, *, rw: bool) -> Session:
        """A session without a PIN: the login counts for the process. Raises PKCS11Error."""
        session = self.token.open(rw=rw, attribute_mapper=self._mapper)
        with self._counting:
            self.sessions += 1
        return session

    def close_session(self, session: Session) -> None:
        """Close it if there is something to close. It never logs out: no session was opened with a PIN."""
        with self._counting:
            self.sessions -= 1
        if self.generation == self.module.generation:
            with suppress(PKCS11Error):
                session.close()

    def login(self, pin: bytes) -> int:
        """C_Login's return value."""
        return self.module.cryptoki.login(_handle(self.login_session), pin)

    def check(self) -> None:
        """Raise Lost unless this is an open connection to the module as it is now initialised."""
        if self.is_closed or self.generation != self.module.generation:
            raise Lost

    def is_healthy(self) -> bool:
        """Whether the token answers, is the same one, and we are logged in. A vanished SoftHSM token fails here."""
        if self.is_closed or self.generation != self.module.generation:
            return False
        if not self.module.cryptoki.logged_in(_handle(self.login_session)):
            return False
        facts = self.facts()
        return facts is not None and facts.serial == self.serial

    def facts(self) -> TokenFacts | None:
        """What the module says about the token now; None when it goes on failing, as it does when the token is gone."""
        for wait in _GLANCES:
            time.sleep(wait)
            facts = self.module.cryptoki.token_facts(self.token.slot.slot_id)
            if facts is not None:
                return facts
        return None

    def close(self) -> None:
        """Close what is idle. A seat in use is given back to a closed connection, and its session is closed then."""
        if self.is_closed:
            return
        self.is_closed = True
        self.module.tenants.discard(self)
        self.working.close()
        self.mutating.close()
        self.close_session(self.login_session)


def _handle(session: Session) -> int:
    number: int = session.handle  # type: ignore[attr-defined]  # python-pkcs11's stubs leave it out
    return number
