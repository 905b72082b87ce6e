"""A worker's view of the registry: it registers, polls the epoch, rebuilds its snapshot, confirms, and holds a lease.

The rules: register before the first read; the lease counts from before the read, on the boot clock,
and only a read whose epoch equals the snapshot's renews it; an epoch is confirmed once the answers that passed under
older snapshots have left; without a lease nothing is signed, while the last JWKS is served on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from kms_jwks import errors
from kms_jwks.model import SECOND, Epoch, Id, Instant, KeyVersion, Worker, new_id
from kms_jwks.service.clocks import DatabaseClock
from kms_jwks.service.liveness import LifeLine
from kms_jwks.service.shelf import Shelf
from kms_jwks.service.snapshot import Snapshot, compile_snapshot
from kms_jwks.store import Store

log = structlog.get_logger(__name__)

_LAST_USED_EVERY = 60 * SECOND
_REAP_EVERY = SECOND
_OVERDUE = 15 * 60 * SECOND


class _Pins:
    """How many answers are on their way under one snapshot."""

    __slots__ = ("count", "snapshot")

    def __init__(self, snapshot: Snapshot | None) -> None:
        self.snapshot = snapshot
        self.count = 0


class Watcher:
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
        self._node = node
        self._lease = lease
        self._poll_interval = poll_interval
        self._state_dir = state_dir
        self._used = used
        self._bind = bind
        self._reap = reap
        self._backends = backends
        self._shelf = Shelf(state_dir)
        self._lock = threading.Lock()
        self._current = _Pins(None)
        self._older: list[_Pins] = []
        self._lease_until = 0
        self._worker: Worker | None = None
        self._life: LifeLine | None = None
        self._registering: tuple[Id, LifeLine] | None = None
        self._kick = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._used_flushed = self._reaped = self.clock.boot()
        self._confirmed_at = self._beat_at = self.clock.boot()
        self._trouble: str | None = None
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
        return self._worker.id if self._worker else None

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
        known = [self._worker.id] if self._worker is not None else []
        # A registration without an answer may have been written all the same.
        known += [self._registering[0]] if self._registering is not None else []
        self._worker = None
        left = self._leave(known)
        for life in (self._life, self._registering[1] if self._registering is not None else None):
            if life is not None:
                life.release(keep_proof=not left)

    def _leave(self, workers: list[Id]) -> bool:
        """Whether the register knows that we have stopped. Otherwise somebody of this node has to see it."""
        if not workers:
            return True
        try:
            with self._store.write() as tx:
                for worker in workers:
                    known = tx.worker(worker)
                    if known is not None and known.stopped_at is None:
                        tx.save(replace(known, stopped_at=tx.now(), stop_reason="stopped"))
        except errors.Error as error:
            log.warning("worker_not_deregistered", workers=workers, error=error.detail)
            return False
        return True

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
            if self._worker is None:
                self._register()
            before = self.clock.boot()
            epoch, now = self._store.poll()
            self.clock.observe(before, now)
            if self._current.snapshot is None or self._current.snapshot.epoch != epoch:
                self._refuse_the_past(epoch)
                epoch = self._rebuild()
            try:
                self._confirm(epoch)
            finally:
                if not self._stop.is_set() and self._worker is not None:
                    # Reads alone renew nothing: who cannot be seen to live must not sign either.
                    self._lease_until = min(before, self._beat_at) + self._lease * SECOND
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

    def _register(self) -> None:
        if self._registering is None:
            worker_id = new_id()
            try:
                self._registering = worker_id, LifeLine(self._state_dir / "workers", worker_id)
            except OSError as error:
                raise errors.StoreUnavailable(
                    f"This worker cannot prove that it lives: {self._state_dir}/workers: {error.strerror}."
                ) from error
        worker_id, life = self._registering
        self._beat_at = self.clock.boot()
        with self._store.write() as tx:
            worker = Worker(worker_id, self._node, os.getpid(), self._lease, tx.now(), tx.now())
            # An attempt whose answer was lost may have been written; under another id nobody would hear of it again.
            if tx.worker(worker_id) is None:
                tx.add(worker)
            else:
                tx.save(worker)
        self._registering = None
        if self._life is not None:
            self._life.release()
        self._worker, self._life = worker, life
        self._lease_until = 0

    def _refuse_the_past(self, epoch: Epoch) -> None:
        """A registry that went back (a standby that had not caught up, an old file) may have forgotten a revocation."""
        known = self._current.snapshot.epoch if self._current.snapshot is not None else None
        if known is not None and known.incarnation == epoch.incarnation and known.counter > epoch.counter:
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
        self._shelf.store(snapshot)
        return snapshot.epoch

    def _serve_from_shelf(self) -> None:
        snapshot = self._shelf.snapshot()
        if snapshot is not None:
            with self._lock:
                self._current = _Pins(snapshot)
            log.warning("serving_jwks_from_disk", key_sets=sorted(snapshot.key_sets))

    def _confirm(self, epoch: Epoch) -> None:
        worker = self._worker
        if worker is None:
            return
        with self._lock:
            drained = not self._older
        now = self.clock.now()
        beat = min(self._lease / 2, 5.0) * SECOND
        if drained:
            self._confirmed_at = self.clock.boot()
        news = drained and worker.confirmed != epoch
        flush = self.clock.boot() - self._used_flushed >= _LAST_USED_EVERY
        backends = dict(self._backends())
        # A module that comes and goes must not have the registry written at each poll.
        told = backends == (worker.backends or {}) or now - worker.heartbeat_at < SECOND
        if not news and not flush and told and now - worker.heartbeat_at < beat:
            return
        beat_at = self.clock.boot()
        with self._store.write() as tx:
            known = tx.worker(worker.id)
            if known is None or known.stopped_at is not None:
                # Somebody took us for dead, or an admin forgot us: come back as a new worker.
                log.warning("worker_was_struck_off", worker=worker.id)
                self._worker = None
                self._lease_until = 0
                self._kick.set()
                return
            known = replace(
                known, heartbeat_at=tx.now(), confirmed=epoch if drained else known.confirmed, backends=backends
            )
            tx.save(known)
            if flush:
                self._used_flushed = self.clock.boot()
                for token_id, seen in self._used().items():
                    token = tx.token(token_id)
                    if token is not None and (token.last_used_at or 0) < seen:
                        tx.save(replace(token, last_used_at=seen))
        self._worker, self._beat_at = known, beat_at
