"""Waiting until workers have confirmed an epoch, so that a control-plane answer holds on every worker."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from kms_jwks import errors
from kms_jwks.model import SECOND, Epoch, Instant, Worker
from kms_jwks.store import ReadTx, Store
from kms_jwks.worker import registration

CHANGE_WAIT = 2.0
"""Seconds an ordinary change waits for live workers."""
_PACE = 0.015
_PACE_WITHOUT_DATABASE = 0.2


class Confirmation:
    """Reads the workers' confirmations in the registry. `state_dir` holds the liveness locks of this node's workers.

    `lease` is in seconds; `kick` makes this process poll the registry at once.
    """

    def __init__(self, store: Store, *, node: str, state_dir: Path, lease: int, kick: Callable[[], None]) -> None:
        self._store = store
        self._node = node
        self._folder = registration.lock_folder(state_dir)
        self._lease = lease
        self._kick = kick

    def lease(self, tx: ReadTx) -> int:
        """The longest signing lease in force, in seconds."""
        return max([self._lease, *(w.lease for w in tx.workers())])

    def wait_for_live_workers(self, epoch: Epoch | None) -> None:
        """Wait (at most 2 s) until every live worker has confirmed `epoch`; silent workers are not waited for.

        Returns at once for None: nothing was changed.
        """
        if epoch is not None:
            # The change is committed: an error would make the caller repeat it.
            with contextlib.suppress(errors.StoreUnavailable):
                self._wait(epoch, CHANGE_WAIT, only_live=True)

    def wait_until_confirmed(self, epoch: Epoch | None, lease: int) -> list[Worker]:
        """Wait until every registered worker has confirmed `epoch`, or `lease` + 1 s; no worker signs under an older
        epoch then.

        Returns the workers that have not confirmed and may still publish the older JWKS. Raises StoreUnavailable when
        the database did not answer once.
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

    def deregister_dead_workers(self) -> list[Worker]:
        """Deregister this node's workers that have certainly ended, and return them. Raises StoreUnavailable."""
        return registration.deregister_dead_workers(self._store, self._folder)

    def _wait(self, epoch: Epoch, seconds: float, *, only_live: bool) -> list[Worker]:
        """Raises StoreUnavailable when the database was away all the time."""
        self._kick()
        end = time.monotonic() + seconds
        waiting: list[Worker] | None = None
        while True:
            try:
                with self._store.read() as tx:
                    tx.require_known_history()
                    waiting, now = self.unconfirmed(tx, epoch), tx.now()
            except errors.StoreUnavailable:
                # The change is committed, and leases run out without the database too: keep waiting.
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
            if any(registration.is_dead(self._folder, w.id) for w in waiting):
                self.deregister_dead_workers()
                continue
            time.sleep(_PACE)
