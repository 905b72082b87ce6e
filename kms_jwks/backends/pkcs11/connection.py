"""An open token in this process: the session that logged in, the pool of sessions that work, and the health check."""

from __future__ import annotations

import math
import queue
import threading
import time
from array import array
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import Attribute, Session, Token
from pkcs11.attributes import AttributeMapper, handle_ulong

from kms_jwks.backends.pkcs11.error_map import ConnectionLost
from kms_jwks.errors import BackendTimeout

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from kms_jwks.backends.base import KeyRef
    from kms_jwks.backends.pkcs11.module import Module, TokenFacts

_STUCK_AFTER: Final = 1.0
"""Seconds after which a session that signs or reads counts as stuck, where other threads wait for one."""
_STUCK_CHECK_INTERVAL: Final = 0.1
_HEALTH_PAUSES: Final = (0.0, 0.005, 0.01, 0.02, 0.04, 0.08)
"""Seconds before each C_GetTokenInfo until the token counts as gone. A login in another process rewrites SoftHSM's
token, and makes C_GetTokenInfo fail for up to 12 ms (measured)."""


class TolerantMapper(AttributeMapper):
    """python-pkcs11's coding of attributes, which also reads what objects of other programs and vendors hold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_handler(Attribute.LABEL, str.encode, lambda value: value.decode("utf-8", "replace"))
        for attribute in (Attribute.KEY_TYPE, Attribute.KEY_GEN_MECHANISM):
            # As numbers: vendors define their own, which python-pkcs11's enumerations refuse.
            self.register_handler(attribute, *handle_ulong)
        # python-pkcs11 leaves this one out: an array of CK_MECHANISM_TYPE.
        self.register_handler(Attribute.ALLOWED_MECHANISMS, _pack_ulongs, _unpack_ulongs)


def _pack_ulongs(values: Iterable[int]) -> bytes:
    return array("L", values).tobytes()


def _unpack_ulongs(value: bytes) -> tuple[int, ...]:
    return tuple(array("L", value))


@dataclass(frozen=True, slots=True)
class KeyHandle:
    """A private key as one session knows it: python-pkcs11's object, and what its signatures must look like."""

    key: Any
    kty: str
    variant: str | None
    """The curve; of an ML-DSA key its parameter set, which is the JWK's `alg`; None of an RSA key."""
    rsa_bits: int
    """Of the modulus; 0 where the key is no RSA key."""
    mechanisms: Collection[object]
    """Those of the token that the key allows."""


class PooledSession:
    """One session and the handles found in it, used by one thread at a time. The session opens at its first use."""

    def __init__(self, connection: Connection, *, rw: bool) -> None:
        self.connection = connection
        self.handles: dict[KeyRef, KeyHandle] = {}
        self.is_suspect = False
        """A signature made here did not verify: the session is replaced before its next use."""
        self._rw = rw
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        """python-pkcs11's session. Hold the module's lock. Raises PKCS11Error."""
        if self._session is None:
            self._session = self.connection.open_session(rw=self._rw)
        return self._session

    def replace(self) -> None:
        """Close the session: after a call that failed it may be dead or in the middle of an operation.

        The next use opens another. Hold the module's lock.
        """
        session, self._session = self._session, None
        self.handles.clear()
        self.is_suspect = False
        if session is not None:
            self.connection.close_session(session)


class SessionPool:
    """A fixed number of sessions, each lent to one thread at a time.

    A session that does not come back, because a call hangs in it, counts as stuck, and another takes its place: once
    for each, so that the number of sessions is bounded where every call hangs in the module.
    """

    def __init__(self, connection: Connection, size: int, *, rw: bool, stuck_after: float = math.inf) -> None:
        self._connection = connection
        self._rw = rw
        self._size = size
        self._stuck_after = stuck_after
        self._idle: queue.SimpleQueue[PooledSession] = queue.SimpleQueue()
        self._acquired_at: dict[PooledSession, float] = {}
        self._stuck: set[PooledSession] = set()
        self._stuck_lock = threading.Lock()
        for _ in range(size):
            self._idle.put(PooledSession(connection, rw=rw))

    def acquire(self, deadline: float) -> PooledSession:
        """A session, to be given to `release`. Raises BackendTimeout."""
        try:
            pooled = self._idle.get_nowait()
        except queue.Empty:
            pooled = self._wait(deadline)
        self._acquired_at[pooled] = time.monotonic()
        return pooled

    def release(self, pooled: PooledSession) -> None:
        """To be called once for each `acquire`, without the module's lock."""
        del self._acquired_at[pooled]
        with self._stuck_lock:
            was_stuck = pooled in self._stuck
            self._stuck.discard(pooled)
        if not was_stuck:
            self._idle.put(pooled)

    def is_surplus(self, pooled: PooledSession) -> bool:
        """Whether another session took its place while it was stuck: it is to be closed."""
        return pooled in self._stuck

    def close_idle(self) -> None:
        """Close the idle sessions; they stay in the pool, so that no thread waits for one in vain.

        Hold the module's lock.
        """
        idle = []
        with suppress(queue.Empty):
            while True:
                idle.append(self._idle.get_nowait())
        for pooled in idle:
            pooled.replace()
            self._idle.put(pooled)

    def _wait(self, deadline: float) -> PooledSession:
        while True:
            left = deadline - time.monotonic()
            try:
                return self._idle.get(timeout=min(max(0.0, left), _STUCK_CHECK_INTERVAL))
            except queue.Empty:
                if self._mark_one_stuck():
                    return PooledSession(self._connection, rw=self._rw)
                if left <= 0:
                    raise BackendTimeout(f"All sessions with the token ({self._size}) were busy.") from None

    def _mark_one_stuck(self) -> bool:
        since = time.monotonic() - self._stuck_after
        with self._stuck_lock:
            stuck = [
                pooled for pooled, at in list(self._acquired_at.items()) if at < since and pooled not in self._stuck
            ]
            if not stuck or len(self._stuck) >= self._size:
                return False
            self._stuck.add(stuck[0])
            return True


class Connection:
    """One opening of a token in one process, until it is lost.

    A thread that finds it lost discards it and opens a new one. Nothing in it is repaired, except that a pooled session
    replaces its session. `generation` is the module's: when the module was initialised again, the connection is dead.
    """

    def __init__(self, module: Module, token: Token, serial: str, *, sessions: int) -> None:
        self.module = module
        self.generation = module.generation
        self.token = token
        self.serial = serial
        self.mechanisms = frozenset(token.slot.get_mechanisms())
        self.sessions = 0
        """How many sessions this connection has open now."""
        self.is_closed = False
        self.opened_at = time.monotonic()
        self._counter_lock = threading.Lock()
        self._health_checks = 0
        """Threads that are in C_GetSessionInfo with the login session: the last of them closes it."""
        self._mapper = TolerantMapper()
        # The session that logs in does nothing else, so no call that fails can end it and with it the login.
        self.login_session = self.open_session(rw=False)
        self.working = SessionPool(self, sessions, rw=False, stuck_after=_STUCK_AFTER)
        self.mutating = SessionPool(self, 1, rw=True)
        """Makes and destroys keys; the thread that acquires its session holds the token's mutation lock."""

    # Hold the module's lock shared for all of these.

    def open_session(self, *, rw: bool) -> Session:
        """A session without a PIN: the login counts for the process. Raises PKCS11Error."""
        self.module.retry_closing()
        session = self.token.open(rw=rw, attribute_mapper=self._mapper)
        with self._counter_lock:
            self.sessions += 1
        return session

    def close_session(self, session: Session) -> None:
        """Close a session that is not dead yet. It never logs out: no session was opened with a PIN."""
        with self._counter_lock:
            self.sessions -= 1
        if self.generation == self.module.generation:
            self.module.close_session(session)

    def login(self, pin: bytes) -> int:
        """C_Login's return value."""
        return self.module.cryptoki.login(_handle(self.login_session), pin)

    def check(self) -> None:
        """Raise ConnectionLost unless this connection is open and belongs to the module's present initialisation."""
        if self.is_closed or self.generation != self.module.generation:
            raise ConnectionLost

    def is_healthy(self) -> bool:
        """Whether the token answers, is the same one, and the process is logged in.

        A SoftHSM token whose folder vanished fails here.
        """
        if not self._is_logged_in():
            return False
        facts = self.facts()
        return facts is not None and facts.serial == self.serial

    def _is_logged_in(self) -> bool:
        with self._counter_lock:
            if self.is_closed or self.generation != self.module.generation:
                return False
            self._health_checks += 1
        try:
            return self.module.cryptoki.logged_in(_handle(self.login_session))
        finally:
            self._end_health_check()

    def _end_health_check(self) -> None:
        with self._counter_lock:
            self._health_checks -= 1
            is_last = self.is_closed and not self._health_checks
        if is_last:
            self.close_session(self.login_session)

    def facts(self) -> TokenFacts | None:
        """C_GetTokenInfo, repeated while it fails; None when it goes on failing, as it does when the token is gone."""
        for pause in _HEALTH_PAUSES:
            time.sleep(pause)
            facts = self.module.cryptoki.token_facts(self.token.slot.slot_id)
            if facts is not None:
                return facts
        return None

    def close(self) -> None:
        """Close the idle sessions. A session in use is closed when its thread releases it."""
        with self._counter_lock:
            if self.is_closed:
                return
            self.is_closed = True
            is_last = not self._health_checks
        self.module.connections.discard(self)
        self.working.close_idle()
        self.mutating.close_idle()
        if is_last:
            self.close_session(self.login_session)


def _handle(session: Session) -> int:
    number: int = session.handle  # type: ignore[attr-defined]  # python-pkcs11's stubs leave it out
    return number
