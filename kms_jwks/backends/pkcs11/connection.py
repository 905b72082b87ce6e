"""A token that is open in this process: the session that logged in, the seats that work, and whether it is well."""

from __future__ import annotations

import math
import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import Session, Token

from kms_jwks.backends.pkcs11.error_map import Lost
from kms_jwks.backends.pkcs11.keys import Mapper
from kms_jwks.errors import BackendTimeout

if TYPE_CHECKING:
    from collections.abc import Collection

    from kms_jwks.backends.base import KeyRef
    from kms_jwks.backends.pkcs11.cryptoki import TokenFacts
    from kms_jwks.backends.pkcs11.module import Module

_STUCK: Final = 1.0
"""Seconds after which a seat that was lent for signing or reading counts as lost, where others wait for one."""
_LOOK_FOR_STUCK: Final = 0.1
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
        self.is_suspect = False
        """A signature made here did not verify: the session is replaced before its next use."""
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
        self.is_suspect = False
        if session is not None:
            self.connection.close_session(session)


class Pool:
    """So many seats, lent to one thread at a time.

    A seat that does not come back, because a call hangs in it, is counted as lost and another takes its place: once for
    each, so that a module in which everything hangs is not asked for sessions without end.
    """

    def __init__(self, connection: Connection, seats: int, *, rw: bool, stuck_after: float = math.inf) -> None:
        self._connection = connection
        self._rw = rw
        self._count = seats
        self._stuck_after = stuck_after
        self._idle: queue.SimpleQueue[Seat] = queue.SimpleQueue()
        self._lent: dict[Seat, float] = {}
        self._stuck: set[Seat] = set()
        self._judging = threading.Lock()
        for _ in range(seats):
            self._idle.put(Seat(connection, rw=rw))

    def take(self, deadline: float) -> Seat:
        """A seat, to be given back. Raises BackendTimeout."""
        try:
            seat = self._idle.get_nowait()
        except queue.Empty:
            seat = self._wait(deadline)
        self._lent[seat] = time.monotonic()
        return seat

    def give_back(self, seat: Seat) -> None:
        """To be called outside, once for each `take`."""
        del self._lent[seat]
        with self._judging:
            was_stuck = seat in self._stuck
            self._stuck.discard(seat)
        if not was_stuck:
            self._idle.put(seat)

    def is_superfluous(self, seat: Seat) -> bool:
        """Whether its place was taken while it was lent: its session is to be closed."""
        return seat in self._stuck

    def _wait(self, deadline: float) -> Seat:
        while True:
            left = deadline - time.monotonic()
            try:
                return self._idle.get(timeout=min(max(0.0, left), _LOOK_FOR_STUCK))
            except queue.Empty:
                if self._replaces_one_that_is_stuck():
                    return Seat(self._connection, rw=self._rw)
                if left <= 0:
                    raise BackendTimeout(f"All sessions with the token ({self._count}) were busy.") from None

    def _replaces_one_that_is_stuck(self) -> bool:
        since = time.monotonic() - self._stuck_after
        with self._judging:
            stuck = [seat for seat, lent in list(self._lent.items()) if lent < since and seat not in self._stuck]
            if not stuck or len(self._stuck) >= self._count:
                return False
            self._stuck.add(stuck[0])
            return True

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
        self.opened_at = time.monotonic()
        self._counting = threading.Lock()
        self._asking = 0
        """Threads that ask about the login's session now: it is closed by the last of them."""
        self._mapper = Mapper()
        # The session that logs in does nothing else, so no call that fails can end it and with it the login.
        self.login_session = self.open_session(rw=False)
        self.working = Pool(self, seats, rw=False, stuck_after=_STUCK)
        self.mutating = Pool(self, 1, rw=True)
        """Makes and destroys; whoever takes its seat holds the token's mutation lock."""

    # All of these are called inside the module's gate.

    def open_session(self, *, rw: bool) -> Session:
        """A session without a PIN: the login counts for the process. Raises PKCS11Error."""
        self.module.close_leftovers()
        session = self.token.open(rw=rw, attribute_mapper=self._mapper)
        with self._counting:
            self.sessions += 1
        return session

    def close_session(self, session: Session) -> None:
        """Close it if there is something to close. It never logs out: no session was opened with a PIN."""
        with self._counting:
            self.sessions -= 1
        if self.generation == self.module.generation:
            self.module.close_session(session)

    def login(self, pin: bytes) -> int:
        """C_Login's return value."""
        return self.module.cryptoki.login(_handle(self.login_session), pin)

    def check(self) -> None:
        """Raise Lost unless this is an open connection to the module as it is now initialised."""
        if self.is_closed or self.generation != self.module.generation:
            raise Lost

    def is_healthy(self) -> bool:
        """Whether the token answers, is the same one, and we are logged in. A vanished SoftHSM token fails here."""
        if not self._is_logged_in():
            return False
        facts = self.facts()
        return facts is not None and facts.serial == self.serial

    def _is_logged_in(self) -> bool:
        with self._counting:
            if self.is_closed or self.generation != self.module.generation:
                return False
            self._asking += 1
        try:
            return self.module.cryptoki.logged_in(_handle(self.login_session))
        finally:
            self._asked()

    def _asked(self) -> None:
        with self._counting:
            self._asking -= 1
            is_last = self.is_closed and not self._asking
        if is_last:
            self.close_session(self.login_session)

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
        with self._counting:
            if self.is_closed:
                return
            self.is_closed = True
            is_last = not self._asking
        self.module.tenants.discard(self)
        self.working.close()
        self.mutating.close()
        if is_last:
            self.close_session(self.login_session)


def _handle(session: Session) -> int:
    number: int = session.handle  # type: ignore[attr-defined]  # python-pkcs11's stubs leave it out
    return number
