"""A worker's registration: its row in the registry, and the liveness lock that proves on its node that it runs.

Every change that has to reach all workers waits for each registered one, so a process must not be registered twice, and
a worker that has ended must be deregistered: by itself, or by another worker of its node. A worker holds a lock on a
file as long as it runs. The kernel releases the lock when the process ends, however it ends, so a free lock means a
dead worker. A missing file proves nothing: the worker may belong to another node. A worker that cannot deregister
leaves its lock file behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import structlog

from kms_jwks import errors
from kms_jwks.model import SECOND, Epoch, Id, Instant, Worker, new_id
from kms_jwks.store import Store
from kms_jwks.store.error_map import unavailable_file
from kms_jwks.worker.clocks import DatabaseClock

log = structlog.get_logger(__name__)

MAX_HEARTBEAT_INTERVAL = 5.0
"""Seconds between two heartbeats at most; half a lease where that is less."""
_REGISTRATION_TIMEOUT = 60.0
"""Seconds after which a dead worker that is not registered will not appear in the registry any more."""
_NAMESAKE_PAUSE = 0.2


class Registration:
    """One per serving process, used by one thread. `lease` is in seconds. Its methods raise StoreUnavailable."""

    def __init__(self, store: Store, *, node: str, lease: int, state_dir: Path, clock: DatabaseClock) -> None:
        self.worker: Worker | None = None
        """This process's row in the registry; None before registration, and after another one deregistered it."""
        self.last_heartbeat = clock.boot()
        """The boot clock before the last registration or heartbeat that was answered."""
        self._store = store
        self._node = node
        self._lease = lease
        self._folder = lock_folder(state_dir)
        self._boot = clock.boot
        self._lock: LivenessLock | None = None
        self._registering: tuple[Id, LivenessLock] | None = None

    def register(self) -> None:
        """Register as a new worker."""
        if self._registering is None:
            worker_id = new_id()
            try:
                self._registering = worker_id, LivenessLock(self._folder, worker_id)
            except OSError as error:
                what = f"This worker cannot create its liveness lock in {self._folder}"
                raise unavailable_file(what, error) from error
        worker_id, lock = self._registering
        began = self._boot()
        with self._store.write() as tx:
            worker = Worker(worker_id, self._node, os.getpid(), self._lease, tx.now(), tx.now())
            # An attempt whose answer was lost may have been committed: its row is used again, because a row under
            # another id would never be deregistered.
            if tx.worker(worker_id) is None:
                tx.add(worker)
            else:
                tx.save(worker)
        if self._lock is not None:
            self._lock.release()
        self.worker, self._lock, self._registering, self.last_heartbeat = worker, lock, None, began

    def heartbeat_due(self, *, changed: bool) -> bool:
        """Whether to send a heartbeat now: half a lease or 5 s after the last one, 1 s if there is something to report.

        By the boot clock: the database's clock may be set back.
        """
        interval = min(self._lease / 2, 1.0 if changed else MAX_HEARTBEAT_INTERVAL)
        return self._boot() - self.last_heartbeat >= int(interval * SECOND)

    def send_heartbeat(self, confirmed: Epoch | None, backends: Mapping[str, str]) -> None:
        """Record that this worker runs, has confirmed the epoch `confirmed`, and sees `backends` in these states.

        `worker` is None afterwards if another process deregistered this one.
        """
        worker = self.worker
        assert worker is not None
        began = self._boot()
        with self._store.write() as tx:
            known = tx.worker(worker.id)
            if known is None or known.stopped_at is not None:
                # Another process took this one for dead, or an admin forgot it: it registers again as a new worker.
                log.warning("worker_deregistered_by_other", worker=worker.id)
                self.worker = None
                return
            known = replace(
                known, heartbeat_at=tx.now(), confirmed=confirmed or known.confirmed, backends=dict(backends)
            )
            tx.save(known)
        self.worker, self.last_heartbeat = known, began

    def deregister(self) -> None:
        """Leave the registry, if the database answers; never raises. Idempotent."""
        workers = [self.worker.id] if self.worker is not None else []
        workers += [self._registering[0]] if self._registering is not None else []
        self.worker = None
        done = self._mark_stopped(workers)
        for lock in (self._lock, self._registering[1] if self._registering is not None else None):
            if lock is not None:
                lock.release(keep_file=not done)

    def _mark_stopped(self, workers: list[Id]) -> bool:
        if not workers:
            return True
        try:
            with self._store.write() as tx:
                for worker in workers:
                    known = tx.worker(worker)
                    if known is not None and known.stopped_at is None:
                        tx.save(replace(known, stopped_at=tx.now(), stop_reason="stopped"))
        except errors.Error as error:
            log.warning("worker_not_deregistered", workers=workers, code=error.code, detail=error.detail)
            return False
        return True


def deregister_dead_workers(store: Store, folder: Path) -> list[Worker]:
    """Deregister the workers of this node that have certainly ended, and return them.

    `folder` holds the liveness locks. Queries the database only if a worker has ended. Raises StoreUnavailable.
    """
    ended = dead_workers(folder)
    if not ended:
        return []
    with store.read() as tx:
        # The locks are in this node's folder, so these are its workers even if the node had another name before.
        registered = [w.id for w in tx.workers() if w.id in ended]
    deregistered = []
    if registered:
        with store.write() as tx:
            for worker in registered:
                known = tx.worker(worker)
                if known is not None and known.stopped_at is None:
                    tx.save(replace(known, stopped_at=tx.now(), stop_reason="died"))
                    deregistered.append(known)
    for worker in ended:
        # The registration of a worker that is not registered may still be on its way to the database: keep its lock
        # file for a while, so that the worker is found when it appears there.
        if worker in registered or lock_age(folder, worker) > _REGISTRATION_TIMEOUT:
            remove_lock(folder, worker)
    return deregistered


def living_namesake(
    store: Store, node: str, state_dir: Path, pause: Callable[[float], None] = time.sleep
) -> Worker | None:
    """A worker that runs under the name of this node and not from its state directory; None where there is none.

    A worker whose last heartbeat is recent may have been killed since, so this waits for another heartbeat of it, for
    as long as one can take. `pause` sleeps for some seconds. Raises StoreUnavailable.
    """
    seen: dict[Id, Instant] = {}
    waited = 0.0
    while True:
        with store.read() as tx:
            now, workers = tx.now(), [w for w in tx.workers() if w.node == node and w.stopped_at is None]
        others = [w for w in workers if not _lock_file(lock_folder(state_dir), w.id).exists()]
        lively = [w for w in others if now - w.heartbeat_at <= (w.lease + 1) * SECOND]
        for worker in lively:
            if seen.setdefault(worker.id, worker.heartbeat_at) < worker.heartbeat_at:
                return worker
        if not lively or waited > max(min(w.lease / 2, MAX_HEARTBEAT_INTERVAL) for w in lively) + 1:
            return None
        pause(_NAMESAKE_PAUSE)
        waited += _NAMESAKE_PAUSE


# --- liveness locks ---------------------------------------------------------------------------------------------------


class LivenessLock:
    """The lock that this process holds while it runs. Raises OSError when the file cannot be created or locked."""

    def __init__(self, folder: Path, worker: Id) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = _lock_file(folder, worker)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self, *, keep_file: bool = False) -> None:
        """Unlock and remove the file; idempotent. `keep_file` leaves it unlocked, as the death of a process does."""
        if self._fd >= 0:
            if not keep_file:
                with contextlib.suppress(OSError):
                    self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def lock_folder(state_dir: Path) -> Path:
    """Where the workers of a node keep their liveness locks."""
    return state_dir / "workers"


def _lock_file(folder: Path, worker: Id) -> Path:
    return folder / f"{worker}.lock"


def is_dead(folder: Path, worker: Id) -> bool:
    """Whether a worker of this node has certainly ended."""
    try:
        fd = os.open(_lock_file(folder, worker), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(fd)


def dead_workers(folder: Path) -> list[Id]:
    """The workers of this node that have certainly ended and whose lock files are still there."""
    try:
        found = [Id(path.stem) for path in folder.glob("*.lock")]
    except OSError:
        return []
    return [worker for worker in found if is_dead(folder, worker)]


def lock_age(folder: Path, worker: Id) -> float:
    """Seconds since a worker's lock file was made; 0 if there is none."""
    try:
        return max(time.time() - _lock_file(folder, worker).stat().st_mtime, 0.0)
    except OSError:
        return 0.0


def remove_lock(folder: Path, worker: Id) -> None:
    """Remove a dead worker's lock file."""
    _lock_file(folder, worker).unlink(missing_ok=True)
