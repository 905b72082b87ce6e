"""The leader lease: which custodian acts, fenced by a term, and only while database time can be trusted."""

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
"""Seconds for which a custodian may act without renewing its lease."""
LONGEST_STEP = 300.0
"""Seconds for which the lease is renewed during a module step; a step that hangs longer loses it."""
LONG_STEP = 30.0
"""Seconds after which a step that is still in the module is logged, again after each further interval."""
CLOCK_DRIFT = 60
"""Seconds that database time may depart from the boot clock between two checks."""


class Fenced(Exception):
    """Another custodian holds the lease; it takes over the step that was under way."""


class LeaderLease:
    """One custodian's share in the one leader lease of an installation. `lease` in seconds, also fractions of one.

    `on_stuck_step` is called when only the end of the process can free a step that hangs in its module: by
    `abandon_stuck_step`, or from another thread when the step has hung for as long as the lease may be renewed.
    """

    def __init__(
        self,
        store: Store,
        *,
        node: str,
        lease: float = LEASE,
        boot: Callable[[], int] = boot_clock,
        on_stuck_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.term = 0
        """The term of the lease while this custodian holds it, otherwise 0."""
        self.boot = boot
        """The boot clock, in microseconds."""
        self._store = store
        self._node = node
        self._lease = lease
        self._on_stuck_step = on_stuck_step
        self._holder = new_id()
        self._last_clocks: tuple[int, Instant] | None = None
        self._halted: str | None = None

    def acquire_or_renew(self, on_new_term: Callable[[WriteTx], None]) -> bool:
        """Acquire the lease or keep it; False while another custodian holds it or the clocks disagree.

        `on_new_term` runs in the transaction that begins a new term. Raises StoreUnavailable, also for a registry that
        has lost changes: every tick begins here.
        """
        with self._store.read() as tx:
            tx.require_known_history()
            lease = tx.custodian_lease()
            if lease is not None:
                left, mine = lease.expires_at - tx.now(), self._is_mine(lease)
                if not mine and left > 0:
                    self.note_loss(lease.node)
                    return False
                sound = lease.halted is None and self._clock_trouble(tx.now()) is None
                if mine and sound and left > self._lease * SECOND / 2:
                    return True
        return self._write(on_new_term)

    def release(self) -> None:
        """End the lease, so that another custodian can act at once. Never raises."""
        if not self.term:
            return
        try:
            with self.fenced_write() as tx:
                lease = tx.custodian_lease()
                if lease is not None:
                    tx.set_custodian_lease(replace(lease, expires_at=tx.now()))
        except (errors.Error, Fenced) as error:
            log.warning("leader_lease_not_released", term=self.term, detail=str(error))
        else:
            log.info("leader_lease_released", term=self.term)
        self.term = 0

    @contextmanager
    def fenced_write(self) -> Iterator[WriteTx]:
        """A write transaction that commits only while this custodian's term holds the lease. Raises Fenced."""
        with self._store.write() as tx:
            lease = tx.custodian_lease()
            if lease is None or (lease.term, lease.holder) != (self.term, self._holder):
                raise Fenced
            yield tx

    @contextmanager
    def renew_during_step(self) -> Iterator[None]:
        """Renew the lease from a thread while a module works, for 5 minutes at most.

        A step that takes long is logged, and so is one that hangs: nothing else would show it.
        """
        done = threading.Event()

        def renew() -> None:
            started, logged = time.monotonic(), 0
            while not done.wait(self._lease / 3):
                seconds = time.monotonic() - started
                if seconds >= LONGEST_STEP:
                    log.error("module_step_abandoned", seconds=round(seconds), term=self.term)
                    self._on_stuck_step()
                    return
                if seconds // LONG_STEP > logged:
                    logged = int(seconds // LONG_STEP)
                    log.warning("module_step_takes_long", seconds=round(seconds), term=self.term)
                try:
                    with self.fenced_write() as tx:
                        lease, now = tx.custodian_lease(), tx.now()
                        if lease is not None:
                            tx.set_custodian_lease(replace(lease, renewed_at=now, expires_at=self._expiry(now)))
                except Fenced:
                    return
                except errors.Error:
                    continue

        thread = threading.Thread(target=renew, name="leader-lease-renewal", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def abandon_stuck_step(self, stuck: int) -> None:
        """Release the lease after a step that timed out in its module.

        The module still holds `stuck` calls and whatever they have locked; `on_stuck_step` is called.
        """
        log.error("module_step_abandoned", stuck=stuck, term=self.term)
        self.release()
        self._on_stuck_step()

    def note_loss(self, holder_node: str | None = None) -> None:
        """Note that another custodian holds the lease, on node `holder_node` if known."""
        if self.term:
            log.warning("leader_lease_lost", term=self.term, holder_node=holder_node)
            self.term = 0

    def _is_mine(self, lease: CustodianLease) -> bool:
        return self.term != 0 and (lease.term, lease.holder) == (self.term, self._holder)

    def _write(self, on_new_term: Callable[[WriteTx], None]) -> bool:
        with self._store.write() as tx:
            now, lease = tx.now(), tx.custodian_lease()
            halted = self._clock_trouble(now)
            mine = lease is not None and self._is_mine(lease)
            if lease is not None and not mine and lease.expires_at > now:
                self.note_loss(lease.node)
                return False
            term = (lease.term if lease is not None else 0) + (0 if mine else 1)
            since = lease.since if lease is not None and mine else now
            tx.set_custodian_lease(
                CustodianLease(term, self._holder, self._node, now, self._expiry(now), since=since, halted=halted)
            )
            if not mine:
                on_new_term(tx)
        if not mine:
            self.note_loss()
            log.info("leader_lease_acquired", term=term)
        self.term = term
        if halted is not None and self._halted is None:
            log.error("custodian_halted", reason=halted)
        elif halted is None and self._halted is not None:
            log.info("custodian_resumed", term=term)
        self._halted = halted
        return halted is None

    def _expiry(self, now: Instant) -> Instant:
        return Instant(now + int(self._lease * SECOND))

    def _clock_trouble(self, now: Instant) -> str | None:
        """Why database time cannot be trusted, or None. The doubt ends when it agrees with the boot clock again."""
        boot = self.boot()
        if self._last_clocks is not None:
            passed, passed_there = boot - self._last_clocks[0], now - self._last_clocks[1]
            if passed_there < 0:
                return f"database time went back by {-passed_there / SECOND:.1f} s"
            if abs(passed_there - passed) > CLOCK_DRIFT * SECOND:
                return f"database time moved {passed_there / SECOND:.0f} s while {passed / SECOND:.0f} s passed"
        self._last_clocks = (boot, now)
        return None
