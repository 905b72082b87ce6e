"""A worker's view of the registry: it registers, polls the epoch, rebuilds its snapshot, confirms, and holds a lease.

The rules: register before the first read; the lease counts from before the read, on the boot clock,
and only a read whose epoch equals the snapshot's renews it; an epoch is confirmed once the answers that passed under
older snapshots have left; without a lease nothing is signed, while the last JWKS is served on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import structlog

from kms_jwks import errors
from kms_jwks.model import SECOND, Epoch, Id, Instant, KeyVersion
from kms_jwks.store import Store
from kms_jwks.worker.clocks import DatabaseClock
from kms_jwks.worker.jwks_cache import JwksCache
from kms_jwks.worker.registration import Registration
from kms_jwks.worker.snapshot import Snapshot, compile_snapshot

log = structlog.get_logger(__name__)

_LAST_USED_EVERY = 60 * SECOND
_LAST_USED_AT_ONCE = 100
"""Tokens whose last use is written in one transaction: the writers of all nodes wait for it."""
_REAP_EVERY = SECOND
_OVERDUE = 15 * 60 * SECOND


class _Pins:
    """How many answers are on their way under one snapshot."""

    __slots__ = ("count", "snapshot")

    def __init__(self, snapshot: Snapshot | None) -> None:
        self.snapshot = snapshot
        self.count = 0


class RegistrySync:
    """One per serving process; made before its threads, started after the fork.

    `lease` and `poll_interval` are seconds; `bind` tells the backends where the keys are,
    `used` drains the last uses of API tokens, `reap` strikes off this node's dead workers: nobody else can see that
    they are dead, and everybody waits for them; `backends` tells what signing and health last saw of each backend.
    """

    def __init__(
        self,
        store: Store,
        *,
        node: str,
        lease: int,
        poll_interval: float,
        state_dir: Path,
        used: Callable[[], dict[Id, Instant]],
        bind: Callable[[Sequence[KeyVersion]], None],
        reap: Callable[[], object],
        backends: Callable[[], Mapping[str, str]],
        clock: DatabaseClock,
    ) -> None:
        self.clock = clock
        self._store = store
        self._lease = lease
        self._poll_interval = poll_interval
        self._used = used
        self._bind = bind
        self._reap = reap
        self._backends = backends
        self._jwks_cache = JwksCache(state_dir)
        self._lock = threading.Lock()
        self._current = _Pins(None)
        self._older: list[_Pins] = []
        self._lease_until = 0
        self._registration = Registration(store, node=node, lease=lease, state_dir=state_dir, clock=clock)
        self._kick = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._used_flushed = self._reaped = self._confirmed_at = self.clock.boot()
        self._unflushed: dict[Id, Instant] = {}
        self._trouble: str | None = None
        self._went_back = False
        """The registry lost changes: once it has come as far again, the same epoch may stand for something else."""
        self.first_poll = threading.Event()
        """Set after the first attempt to reach the database, whatever it gave."""

    # --- what the data plane reads

    def snapshot(self) -> Snapshot:
        """The current snapshot, however old. Raises StoreUnavailable when there never was one."""
        snapshot = self._current.snapshot
        if snapshot is None:
            raise errors.StoreUnavailable("This worker has not read the registry yet.", retry_after=1)
        return snapshot

    def leased(self) -> Snapshot:
        """The current snapshot, if this worker may sign under it. Raises RegistryStale, StoreUnavailable."""
        # The lease first: one that was renewed in between was renewed for the snapshot that is read then.
        held = self.clock.boot() < self._lease_until
        snapshot = self.snapshot()
        if not held:
            raise errors.RegistryStale(
                f"This worker could not confirm the registry within its lease of {self._lease} s.", retry_after=1
            )
        return snapshot

    def pin(self) -> Callable[[], None]:
        """Take part in the confirmation: call what is returned once the answer has left. Idempotent, thread-safe."""
        with self._lock:
            pins = self._current
            pins.count += 1
        released = threading.Lock()

        def release() -> None:
            if not released.acquire(blocking=False):
                return
            with self._lock:
                pins.count -= 1
                if pins is not self._current and pins.count == 0:
                    self._older = [p for p in self._older if p.count]
                    self._kick.set()

        return release

    @property
    def worker_id(self) -> Id | None:
        """Under which id this process is registered now."""
        worker = self._registration.worker
        return worker.id if worker is not None else None

    @property
    def trouble(self) -> str | None:
        """What the last poll failed with, in words; None while the database answers."""
        return self._trouble

    def has_lease(self) -> bool:
        """Whether this worker may sign now."""
        return self._current.snapshot is not None and self.clock.boot() < self._lease_until

    def overdue(self) -> bool:
        """Whether this worker reaches the database and still could not confirm an epoch for 15 minutes."""
        return self._trouble is None and self.clock.boot() - self._confirmed_at > _OVERDUE

    # --- life

    def start(self) -> None:
        """Start polling in a thread of this process. Never raises for a database that is away. Idempotent."""
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=self._run, name="registry-watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop polling and leave the register, as far as the database lets us. Idempotent."""
        self._stop.set()
        self._kick.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)
        self._lease_until = 0
        self._registration.leave()

    def kick(self) -> None:
        """Poll now: something has changed."""
        self._kick.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.poll()
                self._look_after_the_others()
            except Exception:
                # A defect must not end the thread: the lease runs out, signing stops, and the log says why.
                self._trouble = "defect"
                log.exception("watcher_failed")
            self.first_poll.set()
            self._kick.wait(self._poll_interval)
            self._kick.clear()

    # --- one round

    def poll(self) -> None:
        """One round: register if need be, read the epoch, rebuild if it differs, renew the lease, confirm."""
        try:
            if self._registration.worker is None:
                self._lease_until = 0
                self._registration.enter()
            before = self.clock.boot()
            epoch, now = self._store.poll()
            self.clock.observe(before, now)
            if self._current.snapshot is None or self._current.snapshot.epoch != epoch or self._went_back:
                self._refuse_the_past(epoch)
                epoch = self._rebuild()
                self._went_back = False
            try:
                self._confirm(epoch)
            finally:
                if not self._stop.is_set() and self._registration.worker is not None:
                    # Reads alone renew nothing: who cannot be seen to live must not sign either.
                    self._lease_until = min(before, self._registration.beat_at) + self._lease * SECOND
            self._flush_used()
        except errors.Error as error:
            if self._trouble is None:
                log.warning("registry_unreachable", error=error.detail)
            self._trouble = error.detail
            if self._current.snapshot is None:
                self._serve_from_shelf()
        else:
            if self._trouble is not None:
                log.info("registry_reached")
            self._trouble = None

    def _look_after_the_others(self) -> None:
        if self._trouble is not None or self.clock.boot() - self._reaped < _REAP_EVERY:
            return
        self._reaped = self.clock.boot()
        try:
            self._reap()
        except errors.Error as error:
            log.warning("dead_workers_not_struck_off", error=error.detail)

    def _refuse_the_past(self, epoch: Epoch) -> None:
        """A registry that went back (a standby that had not caught up, an old file) may have forgotten a revocation."""
        known = self._current.snapshot.epoch if self._current.snapshot is not None else None
        if known is not None and known.incarnation == epoch.incarnation and known.counter > epoch.counter:
            self._went_back = True
            raise errors.StoreUnavailable(
                f"The registry went back from epoch {known.counter} to {epoch.counter}: it has lost changes."
            )

    def _rebuild(self) -> Epoch:
        with self._store.read() as tx:
            contents = tx.contents()
        snapshot = compile_snapshot(contents)
        self._bind(contents.versions)
        with self._lock:
            if self._current.count:
                self._older.append(self._current)
            self._current = _Pins(snapshot)
        self._jwks_cache.store(snapshot)
        return snapshot.epoch

    def _serve_from_shelf(self) -> None:
        snapshot = self._jwks_cache.snapshot()
        if snapshot is not None:
            with self._lock:
                self._current = _Pins(snapshot)
            log.warning("serving_jwks_from_disk", key_sets=sorted(snapshot.key_sets))

    def _confirm(self, epoch: Epoch) -> None:
        worker = self._registration.worker
        if worker is None:
            return
        with self._lock:
            drained = not self._older
        if drained:
            self._confirmed_at = self.clock.boot()
        backends = dict(self._backends())
        # A module that comes and goes must not have the registry written at each poll.
        news = backends != (worker.backends or {}) and self._registration.rested(SECOND)
        if news or (drained and worker.confirmed != epoch) or self._registration.due():
            self._registration.beat(epoch if drained else None, backends)
            if self._registration.worker is None:
                self._lease_until = 0
                self._kick.set()

    def _flush_used(self) -> None:
        if not self._unflushed and self.clock.boot() - self._used_flushed >= _LAST_USED_EVERY:
            self._used_flushed = self.clock.boot()
            self._unflushed = self._used()
        if not self._unflushed:
            return
        some = dict(islice(self._unflushed.items(), _LAST_USED_AT_ONCE))
        with self._store.write() as tx:
            for token_id, seen in some.items():
                token = tx.token(token_id)
                if token is not None and (token.last_used_at or 0) < seen:
                    tx.save(replace(token, last_used_at=seen))
        for token_id in some:
            del self._unflushed[token_id]
