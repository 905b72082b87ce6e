"""A worker's sync with the registry: it registers, polls the epoch, rebuilds its snapshot, confirms, and holds a lease.

The rules: a worker registers before its first read. The signing lease counts from before the read, on the boot clock,
and only a read whose epoch equals the snapshot's renews it. An epoch is confirmed once all answers made under older
snapshots have left. Without a lease the worker does not sign, but keeps serving the last JWKS. A registry that has lost
changes which this node confirmed is refused: no lease, no new snapshot, no confirmation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import structlog

from kms_jwks import errors, timeline
from kms_jwks.model import SECOND, Epoch, Id, Instant, KeyVersion
from kms_jwks.store import RegistryContents, Store
from kms_jwks.worker.clocks import DatabaseClock
from kms_jwks.worker.epoch_record import EpochRecord
from kms_jwks.worker.jwks_cache import JwksCache
from kms_jwks.worker.registration import Registration, deregister_dead_workers, lock_folder
from kms_jwks.worker.snapshot import Snapshot, compile_snapshot

log = structlog.get_logger(__name__)

_LAST_USED_INTERVAL = 60 * SECOND
_LAST_USED_BATCH = 100
"""Tokens whose last use is written in one transaction: the writers of all nodes wait for it."""
_DEAD_WORKERS_INTERVAL = SECOND
OVERDUE = 15 * 60 * SECOND
"""Without a confirmation for so many microseconds, a worker that reaches the database is not ready."""


_RECORD_ATTEMPTS = 4
"""How often one poll reads the registry again because another worker of this node has recorded a later epoch."""
_DEFECT = errors.StoreUnavailable("defect")


class _PinnedSnapshot:
    """A snapshot, and how many answers are in flight under it."""

    __slots__ = ("count", "snapshot")

    def __init__(self, snapshot: Snapshot | None) -> None:
        self.snapshot = snapshot
        self.count = 0


class RegistrySync:
    """One per serving process; made before its threads, started after the fork.

    `lease` and `poll_interval` are seconds. `bind` tells the backends where the keys are, `used` returns and clears
    the last uses of API tokens, `backends` returns the state of each backend as signing and health last saw it.
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
        backends: Callable[[], Mapping[str, str]],
        clock: DatabaseClock,
        record: EpochRecord,
    ) -> None:
        self.clock = clock
        self._record = record
        self._store = store
        self._lease = lease
        self._poll_interval = poll_interval
        self._used = used
        self._bind = bind
        self._backends = backends
        self._jwks_cache = JwksCache(state_dir)
        self._lock_folder = lock_folder(state_dir)
        self._lock = threading.Lock()
        self._current = _PinnedSnapshot(None)
        self._older: list[_PinnedSnapshot] = []
        self._lease_until = 0
        self._lease_lost_at: int | None = None
        self._registration = Registration(store, node=node, lease=lease, state_dir=state_dir, clock=clock)
        self._kick = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._last_used_at = self._dead_workers_at = self._confirmed_at = self.clock.boot()
        self._unflushed: dict[Id, Instant] = {}
        self._trouble: errors.Error | None = None
        self._database_lost_at: int | None = None
        self._rolled_back: errors.RegistryRolledBack | None = None
        self._rolled_back_at = 0
        self._departed = False
        self.first_poll = threading.Event()
        """Set after the first attempt to reach the database, successful or not."""

    # --- what the data plane reads

    def snapshot(self) -> Snapshot:
        """The current snapshot, of any age. Raises StoreUnavailable if there is none yet."""
        snapshot = self._current.snapshot
        if snapshot is None:
            self._require_believed()
            raise errors.StoreUnavailable("This worker has not read the registry yet.", retry_after=1)
        return snapshot

    def complete_snapshot(self) -> Snapshot:
        """The current snapshot, if callers can be authenticated with it. Raises StoreUnavailable."""
        snapshot = self.snapshot()
        if not snapshot.complete:
            self._require_believed()
            raise errors.StoreUnavailable("This worker has not read the registry yet.", retry_after=1)
        return snapshot

    def leased(self) -> Snapshot:
        """The current snapshot, if this worker may sign under it. Raises RegistryStale, StoreUnavailable."""
        # Read the lease before the snapshot: a lease is renewed for the snapshot that is current then, or a later one.
        held = self.clock.boot() < self._lease_until
        snapshot = self.snapshot()
        if not held:
            self._require_believed()
            raise errors.RegistryStale(
                f"This worker could not confirm the registry within its lease of {self._lease} s.", retry_after=1
            )
        return snapshot

    def pin(self) -> Callable[[], None]:
        """Delay the confirmation of later epochs until the returned function is called, once the answer has left.

        The returned function is idempotent and thread-safe.
        """
        with self._lock:
            pinned = self._current
            pinned.count += 1
        released = threading.Lock()

        def release() -> None:
            if not released.acquire(blocking=False):
                return
            with self._lock:
                pinned.count -= 1
                if pinned is not self._current and pinned.count == 0:
                    self._older = [p for p in self._older if p.count]
                    self._kick.set()

        return release

    @property
    def worker_id(self) -> Id | None:
        """The id under which this process is registered now."""
        worker = self._registration.worker
        return worker.id if worker is not None else None

    @property
    def trouble(self) -> errors.Error | None:
        """The error of the last poll, with its cause and the next step; None while the database answers."""
        return self._trouble

    @property
    def rolled_back(self) -> bool:
        """Whether this worker refuses the registry, which has lost changes."""
        return self._rolled_back is not None

    def has_lease(self) -> bool:
        """Whether this worker may sign now."""
        return self._current.snapshot is not None and self.clock.boot() < self._lease_until

    def overdue(self) -> bool:
        """Whether this worker reaches the database but could not confirm an epoch for 15 minutes."""
        return self._trouble is None and self.clock.boot() - self._confirmed_at > OVERDUE

    # --- start and stop

    def start(self) -> None:
        """Start polling in a thread of this process. Does not raise if the database is away. Idempotent."""
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=self._run, name="registry-sync", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop polling and deregister, if the database answers. Idempotent."""
        self._stop.set()
        self._kick.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)
        self._lease_until = 0
        self._registration.deregister()

    def kick(self) -> None:
        """Make the thread poll now, because something has changed."""
        self._kick.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.poll()
                self._deregister_dead_workers()
            except Exception:
                # A defect must not end the thread: the lease runs out, signing stops, and the log says why, once.
                if self._trouble is not _DEFECT:
                    log.exception("registry_sync_failed")
                self._trouble = _DEFECT
            self.first_poll.set()
            self._kick.wait(self._poll_interval)
            self._kick.clear()

    # --- one round

    def poll(self) -> None:
        """One round: register if necessary, read the epoch, rebuild if it differs, renew the lease, confirm."""
        before = self.clock.boot()
        try:
            if self._registration.worker is None:
                self._lease_until = 0
                self._registration.register()
                before = self.clock.boot()
            known = self._record.load()
            epoch, now = self._store.poll()
            self.clock.observe(before, now)
            self._note_departure()
            if not (epoch.is_same(self._current_epoch()) and epoch.is_same(known)):
                epoch = self._rebuild()
            elif self._record.unwritten:
                self._record.advance(known, epoch)
            try:
                self._confirm(epoch)
            finally:
                if not self._stop.is_set() and self._registration.worker is not None:
                    self._renew_lease(before)
            self._write_last_uses()
        except errors.Error as error:
            self._database_failed(error, before)
        else:
            if self._trouble is not None:
                self._database_answered()

    def _note_departure(self) -> None:
        """Log once that the database's clock was set, and once that it agrees with the boot clock again."""
        departed = abs(self.clock.departure) > timeline.MIN_CLOCK_SKEW * SECOND
        if departed is not self._departed:
            seconds = round(self.clock.departure / SECOND, 1)
            if departed:
                log.error("database_clock_stepped", seconds=seconds)
            else:
                log.info("database_clock_agrees", seconds=seconds)
        self._departed = departed

    def _renew_lease(self, before: int) -> None:
        """Extend the lease, counted from `before` the read and from the last heartbeat, whichever is older.

        Reads alone do not renew it: a worker that cannot send heartbeats counts as dead and must not sign.
        """
        now = self.clock.boot()
        self._rolled_back_ended(now)
        if self._lease_until <= now:
            self._log_expired_lease(now)
        self._lease_until = min(before, self._registration.last_heartbeat) + self._lease * SECOND
        if self._lease_lost_at is not None and now < self._lease_until:
            log.info("lease_regained", seconds=round((now - self._lease_lost_at) / SECOND, 3))
            self._lease_lost_at = None

    def _log_expired_lease(self, now: int) -> None:
        if 0 < self._lease_until <= now:
            trouble = self._trouble
            detail = trouble.detail if trouble is not None else "no poll of the registry ended within the lease"
            self._log_lost_lease(self._lease_until, detail)

    def _log_lost_lease(self, at: int, detail: str) -> None:
        """Log once that this worker cannot sign since `at` (boot clock)."""
        if self._lease_lost_at is None:
            self._lease_lost_at = at
            log.warning("lease_lost", lease=self._lease, detail=detail)

    def _database_failed(self, error: errors.Error, since: int) -> None:
        """Note a poll that failed; `since`: when it began (boot clock). The loss of the database is logged once."""
        self._trouble = error
        if isinstance(error, errors.RegistryRolledBack):
            self._log_database_recovery()
            self._refuse_registry(error)
        elif self._database_lost_at is None:
            self._database_lost_at = since
            log.warning("database_lost", process="worker", **error.explanation)
        self._log_expired_lease(self.clock.boot())
        if self._current.snapshot is None:
            self._serve_from_disk()

    def _refuse_registry(self, error: errors.RegistryRolledBack) -> None:
        """Stop signing at once: the registry has lost changes. It is logged once."""
        now = self.clock.boot()
        if self._rolled_back is None:
            self._rolled_back_at = now
            log.error("registry_rolled_back", process="worker", detail=error.detail, next_step=error.next_step)
        self._rolled_back = error
        if now < self._lease_until:
            self._log_lost_lease(now, error.detail)
        self._lease_until = 0

    def _rolled_back_ended(self, now: int) -> None:
        if self._rolled_back is not None:
            seconds = round((now - self._rolled_back_at) / SECOND, 3)
            self._rolled_back = None
            log.info("registry_accepted", process="worker", seconds=seconds)

    def _require_believed(self) -> None:
        """Raise RegistryRolledBack while this worker refuses the registry."""
        error = self._rolled_back
        if error is not None:
            raise errors.RegistryRolledBack(error.detail, next_step=error.next_step)

    def _database_answered(self) -> None:
        """Note that a poll succeeded again."""
        self._trouble = None
        self._log_database_recovery()

    def _log_database_recovery(self) -> None:
        if self._database_lost_at is not None:
            seconds = round((self.clock.boot() - self._database_lost_at) / SECOND, 3)
            log.info("database_recovered", process="worker", seconds=seconds)
            self._database_lost_at = None

    def _deregister_dead_workers(self) -> None:
        """Deregister dead workers of this node: other nodes cannot detect them, and changes wait for them."""
        if self._trouble is not None or self.clock.boot() - self._dead_workers_at < _DEAD_WORKERS_INTERVAL:
            return
        self._dead_workers_at = self.clock.boot()
        try:
            deregister_dead_workers(self._store, self._lock_folder)
        except errors.Error as error:
            log.warning("dead_workers_not_deregistered", code=error.code, detail=error.detail)

    def _current_epoch(self) -> Epoch | None:
        return self._current.snapshot.epoch if self._current.snapshot is not None else None

    def _rebuild(self) -> Epoch:
        """Take the registry's present state, and record its epoch on this node before it is confirmed.

        Raises RegistryRolledBack, and StoreUnavailable where the epoch cannot be recorded; the new snapshot is in use
        then (it may hold a revocation), but it is not confirmed, and the lease is not renewed.
        """
        for _ in range(_RECORD_ATTEMPTS):
            with self._store.read() as tx:
                tx.require_known_history()
                contents, known = tx.contents(), tx.known_epoch
            if not contents.epoch.is_same(self._current_epoch()):
                self._use(contents)
            if self._record.advance(known, contents.epoch):
                return contents.epoch
        raise errors.StoreUnavailable("Other workers of this node record epochs faster than this one.", retry_after=1)

    def _use(self, contents: RegistryContents) -> None:
        snapshot = compile_snapshot(contents)
        self._bind(contents.versions)
        with self._lock:
            if self._current.count:
                self._older.append(self._current)
            self._current = _PinnedSnapshot(snapshot)
        self._jwks_cache.store(snapshot)

    def _serve_from_disk(self) -> None:
        snapshot = self._jwks_cache.snapshot()
        if snapshot is not None:
            with self._lock:
                self._current = _PinnedSnapshot(snapshot)
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
        # A changed backend state is reported at most once a second, so that a flapping module does not write each poll.
        due = self._registration.heartbeat_due(changed=backends != (worker.backends or {}))
        if due or (drained and worker.confirmed != epoch):
            self._registration.send_heartbeat(epoch if drained else None, backends)
            if self._registration.worker is None:
                self._log_lost_lease(self.clock.boot(), "another process or an admin deregistered this worker")
                self._lease_until = 0
                self._kick.set()

    def _write_last_uses(self) -> None:
        """Write when API tokens were last used: once a minute, in batches."""
        if not self._unflushed and self.clock.boot() - self._last_used_at >= _LAST_USED_INTERVAL:
            self._last_used_at = self.clock.boot()
            self._unflushed = self._used()
        if not self._unflushed:
            return
        batch = dict(islice(self._unflushed.items(), _LAST_USED_BATCH))
        with self._store.write() as tx:
            for token_id, seen in batch.items():
                token = tx.token(token_id)
                if token is not None and (token.last_used_at or 0) < seen:
                    tx.save(replace(token, last_used_at=seen))
        for token_id in batch:
            del self._unflushed[token_id]
