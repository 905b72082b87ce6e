"""A worker's place in the register: entered before its first read, kept by heartbeats, left at the end.

Everybody waits for whoever stands there. So nobody may stand there twice, and who cannot say that it goes leaves the
proof of it where the other workers of its node look.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import structlog

from kms_jwks import errors
from kms_jwks.model import SECOND, Epoch, Id, Worker, new_id
from kms_jwks.store import Store
from kms_jwks.worker.clocks import DatabaseClock
from kms_jwks.worker.liveness import LivenessLock

log = structlog.get_logger(__name__)

LONGEST_BEAT = 5.0
"""Seconds between two heartbeats at most; half a lease where that is less."""


class Registration:
    """One per serving process. `lease` in seconds; used by one thread. Everything raises StoreUnavailable."""

    def __init__(self, store: Store, *, node: str, lease: int, state_dir: Path, clock: DatabaseClock) -> None:
        self.worker: Worker | None = None
        """As which worker this process stands in the register; None before, and after it was struck off."""
        self.beat_at = clock.boot()
        """The boot clock before the last entry or heartbeat that was answered."""
        self._store = store
        self._node = node
        self._lease = lease
        self._folder = state_dir / "workers"
        self._boot = clock.boot
        self._life: LivenessLock | None = None
        self._entering: tuple[Id, LivenessLock] | None = None

    def enter(self) -> None:
        """Enter as a worker that nobody has heard of."""
        if self._entering is None:
            worker_id = new_id()
            try:
                self._entering = worker_id, LivenessLock(self._folder, worker_id)
            except OSError as error:
                raise errors.StoreUnavailable(
                    f"This worker cannot prove that it lives: {self._folder}: {error.strerror}."
                ) from error
        worker_id, life = self._entering
        began = self._boot()
        with self._store.write() as tx:
            worker = Worker(worker_id, self._node, os.getpid(), self._lease, tx.now(), tx.now())
            # An attempt whose answer was lost may have been written; under another id nobody would hear of it again.
            if tx.worker(worker_id) is None:
                tx.add(worker)
            else:
                tx.save(worker)
        if self._life is not None:
            self._life.release()
        self.worker, self._life, self._entering, self.beat_at = worker, life, None, began

    def due(self) -> bool:
        """Whether it is time for a heartbeat."""
        return self.rested(int(min(self._lease / 2, LONGEST_BEAT) * SECOND))

    def rested(self, microseconds: int) -> bool:
        """Whether the last heartbeat is that long ago, by the boot clock: the database's may be set back."""
        return self._boot() - self.beat_at >= microseconds

    def beat(self, confirmed: Epoch | None, backends: Mapping[str, str]) -> None:
        """Be seen to live, to work under the epoch `confirmed`, and to see `backends` in these states.

        `worker` is None afterwards if it was struck off.
        """
        worker = self.worker
        assert worker is not None
        began = self._boot()
        with self._store.write() as tx:
            known = tx.worker(worker.id)
            if known is None or known.stopped_at is not None:
                # Somebody took us for dead, or an admin forgot us: come back as a new worker.
                log.warning("worker_was_struck_off", worker=worker.id)
                self.worker = None
                return
            known = replace(
                known, heartbeat_at=tx.now(), confirmed=confirmed or known.confirmed, backends=dict(backends)
            )
            tx.save(known)
        self.worker, self.beat_at = known, began

    def leave(self) -> None:
        """Leave the register, as far as the database lets us; never raises. Idempotent."""
        entered = [self.worker.id] if self.worker is not None else []
        entered += [self._entering[0]] if self._entering is not None else []
        self.worker = None
        left = self._strike_off(entered)
        for life in (self._life, self._entering[1] if self._entering is not None else None):
            if life is not None:
                life.release(keep_proof=not left)

    def _strike_off(self, workers: list[Id]) -> bool:
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
