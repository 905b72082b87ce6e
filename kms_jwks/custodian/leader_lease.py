"""The custodian's office: who acts, fenced by a term, and only while database time can be trusted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import structlog

from kms_jwks import errors
from kms_jwks.model import SECOND, CustodianLease, Instant, new_id
from kms_jwks.store import Store, WriteTx
from kms_jwks.worker.clocks import boot_clock

log = structlog.get_logger(__name__)

LEASE = 10
"""Seconds a custodian acts without renewing."""
LONGEST_STEP = 300.0
"""Seconds for which a module step keeps the office; a step that hangs longer loses it."""
LONG_STEP = 30.0
"""Seconds after which a step that is still in the module is logged, and again after each such while."""
CLOCK_DRIFT = 60
"""Seconds that database time may depart from the boot clock between two looks."""


class Fenced(Exception):
    """Another custodian has taken over; what was being done is left to it."""


class LeaderLease:
    """One candidate for the one office of an installation. `lease` in seconds, or parts of one.

    `given_up` is called when nothing but the end of the process gets a step out of its module: from another thread
    when it has kept the office for as long as it may, or by `give_up`.
    """

    def __init__(
        self,
        store: Store,
        *,
        node: str,
        lease: float = LEASE,
        boot: Callable[[], int] = boot_clock,
        given_up: Callable[[], None] = lambda: None,
    ) -> None:
        self.term = 0
        """The term in office, 0 out of it."""
        self._store = store
        self._node = node
        self._lease = lease
        self._given_up = given_up
        self._boot = boot
        self._holder = new_id()
        self._last_clocks: tuple[int, Instant] | None = None
        self._halted: str | None = None

    def hold(self, take_over: Callable[[WriteTx], None]) -> bool:
        """Take or keep the office; False while another holds it or the clocks disagree.

        `take_over` runs in the transaction that begins a new term.
        """
        with self._store.read() as tx:
            lease, left = tx.custodian_lease(), 0
            if lease is not None:
                left = lease.expires_at - tx.now()
                mine = self.term != 0 and (lease.term, lease.holder) == (self.term, self._holder)
                if not mine and left > 0:
                    self.term = 0
                    return False
                sound = lease.halted is None and self._clock_trouble(tx.now()) is None
                if mine and sound and left > self._lease * SECOND / 2:
                    return True
        return self._write(take_over)

    def resign(self) -> None:
        """Let another custodian act at once. Never raises."""
        if not self.term:
            return
        try:
            with self.mutation() as tx:
                lease = tx.custodian_lease()
                if lease is not None:
                    tx.set_custodian_lease(replace(lease, expires_at=tx.now()))
        except (errors.Error, Fenced) as error:
            log.warning("custodian_did_not_resign", error=str(error))
        self.term = 0

    @contextmanager
    def mutation(self) -> Iterator[WriteTx]:
        """A write transaction that commits only while this term is in office. Raises Fenced."""
        with self._store.write() as tx:
            lease = tx.custodian_lease()
            if lease is None or (lease.term, lease.holder) != (self.term, self._holder):
                raise Fenced
            yield tx

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the office while a module works, for 5 minutes at most, from a thread of its own.

        A module that takes long is in the log, and one that hangs is more than that: nothing else would show it.
        """
        done = threading.Event()

        def renew() -> None:
            started, said = time.monotonic(), 0
            while not done.wait(self._lease / 3):
                seconds = time.monotonic() - started
                if seconds >= LONGEST_STEP:
                    log.error("module_step_given_up", seconds=round(seconds), term=self.term)
                    self._given_up()
                    return
                if seconds // LONG_STEP > said:
                    said = int(seconds // LONG_STEP)
                    log.warning("module_step_takes_long", seconds=round(seconds), term=self.term)
                try:
                    with self.mutation() as tx:
                        lease, now = tx.custodian_lease(), tx.now()
                        if lease is not None:
                            tx.set_custodian_lease(replace(lease, renewed_at=now, expires_at=self._expiry(now)))
                except Fenced:
                    return
                except errors.Error:
                    continue

        thread = threading.Thread(target=renew, name="custodian-office", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def give_up(self, stuck: int) -> None:
        """A step was answered without its module, which still holds `stuck` calls and what they have locked."""
        log.error("module_step_given_up", stuck=stuck, term=self.term)
        self.resign()
        self._given_up()

    def _write(self, take_over: Callable[[WriteTx], None]) -> bool:
        with self._store.write() as tx:
            now, lease = tx.now(), tx.custodian_lease()
            halted = self._clock_trouble(now)
            mine = lease is not None and self.term != 0 and (lease.term, lease.holder) == (self.term, self._holder)
            if lease is not None and not mine and lease.expires_at > now:
                self.term = 0
                return False
            term = (lease.term if lease is not None else 0) + (0 if mine else 1)
            since = lease.since if lease is not None and mine else now
            tx.set_custodian_lease(
                CustodianLease(term, self._holder, self._node, now, self._expiry(now), since=since, halted=halted)
            )
            if not mine:
                take_over(tx)
        if term != self.term:
            log.info("custodian_acts", term=term)
        self.term = term
        if halted is not None and self._halted is None:
            log.error("custodian_halted", reason=halted)
        self._halted = halted
        return halted is None

    def _expiry(self, now: Instant) -> Instant:
        return Instant(now + int(self._lease * SECOND))

    def _clock_trouble(self, now: Instant) -> str | None:
        """Why database time cannot be trusted, or None. It stays in doubt until it agrees with the boot clock again."""
        boot = self._boot()
        if self._last_clocks is not None:
            passed, passed_there = boot - self._last_clocks[0], now - self._last_clocks[1]
            if passed_there < 0:
                return f"database time went back by {-passed_there / SECOND:.1f} s"
            if abs(passed_there - passed) > CLOCK_DRIFT * SECOND:
                return f"database time moved {passed_there / SECOND:.0f} s while {passed / SECOND:.0f} s passed"
        self._last_clocks = (boot, now)
        return None
