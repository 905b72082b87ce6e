"""Waiting until the workers work under an epoch: what makes a control-plane answer true everywhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kms_jwks import errors
from kms_jwks.model import SECOND, Epoch, Instant, Worker
from kms_jwks.store import ReadTx, Store
from kms_jwks.worker import liveness

CHANGE_WAIT = 2.0
"""Seconds an ordinary change waits for live workers."""
_PACE = 0.015
_PACE_WITHOUT_DATABASE = 0.2
_CERTAINLY_UNKNOWN = 60.0
"""Seconds after which a dead worker that the register does not know will not appear there any more."""


class Confirmation:
    """Asks the register. `node` and `state_dir` tell which workers' deaths can be seen from here."""

    def __init__(self, store: Store, *, node: str, state_dir: Path, lease: int, kick: Callable[[], None]) -> None:
        self._store = store
        self._node = node
        self._folder = state_dir / "workers"
        self._lease = lease
        self._kick = kick

    def lease(self, tx: ReadTx) -> int:
        """The longest signing lease in force, in seconds."""
        return max([self._lease, *(w.lease for w in tx.workers())])

    def changed(self, epoch: Epoch | None) -> None:
        """Wait (at most 2 s) until every live worker has confirmed; a worker that is silent is not waited for."""
        if epoch is not None:
            # It is committed: an answer that says otherwise would have it made again.
            with contextlib.suppress(errors.StoreUnavailable):
                self._wait(epoch, CHANGE_WAIT, only_live=True)

    def revoked(self, epoch: Epoch | None, lease: int) -> list[Worker]:
        """Wait until every registered worker has confirmed, or `lease` + 1 s; then nobody signs under an older epoch.

        Returns the workers that have not confirmed and may still publish the older JWKS. Raises StoreUnavailable when
        nobody could be asked.
        """
        if epoch is None:
            return []
        return self._wait(epoch, lease + 1.0, only_live=False)

    def unconfirmed(self, tx: ReadTx, epoch: Epoch) -> list[Worker]:
        """Registered workers that have not confirmed `epoch`."""
        return [w for w in tx.workers() if w.confirmed is None or not w.confirmed.reaches(epoch)]

    def silent(self, worker: Worker, now: Instant) -> bool:
        """Whether a worker has missed its heartbeats and has no lease left."""
        return now - worker.heartbeat_at > (worker.lease + 1) * SECOND

    def reap(self) -> list[Worker]:
        """Strike off this node's workers that have certainly ended. Returns them. Asks the database only if need be."""
        ended = liveness.dead(self._folder)
        if not ended:
            return []
        with self._store.read() as tx:
            # Their locks lie in our own folder, whatever the node was called when they registered.
            suspects = [w.id for w in tx.workers() if w.id in ended]
        struck = []
        if suspects:
            with self._store.write() as tx:
                for worker in suspects:
                    known = tx.worker(worker)
                    if known is not None and known.stopped_at is None:
                        tx.save(replace(known, stopped_at=tx.now(), stop_reason="died"))
                        struck.append(known)
        for worker in ended:
            # Who is not registered may have been about to be: the database can be slower to know than we to look.
            if worker in suspects or liveness.age(self._folder, worker) > _CERTAINLY_UNKNOWN:
                liveness.clear(self._folder, worker)
        return struck

    def _wait(self, epoch: Epoch, seconds: float, *, only_live: bool) -> list[Worker]:
        """Raises StoreUnavailable when the database was away all the time."""
        self._kick()
        end = time.monotonic() + seconds
        waiting: list[Worker] | None = None
        while True:
            try:
                with self._store.read() as tx:
                    waiting, now = self.unconfirmed(tx, epoch), tx.now()
            except errors.StoreUnavailable:
                # The change is committed, and leases run out without the database too.
                if time.monotonic() < end:
                    time.sleep(_PACE_WITHOUT_DATABASE)
                    continue
                if waiting is None:
                    raise
                return waiting
            if only_live:
                waiting = [w for w in waiting if not self.silent(w, now)]
            if not waiting or time.monotonic() >= end:
                return waiting
            if any(liveness.is_dead(self._folder, w.id) for w in waiting):
                self.reap()
                continue
            time.sleep(_PACE)
