"""Every use case of the service, guarded by one choke point. `wiring` assembles a worker's `Service` from its parts."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

import structlog

from kms_jwks.backends.calling import Backends
from kms_jwks.config import Settings
from kms_jwks.service.clients import Clients
from kms_jwks.service.external_keys import ExternalKeys
from kms_jwks.service.guard import Guard, RequestContext
from kms_jwks.service.key_sets import KeySets
from kms_jwks.service.keys import Keys
from kms_jwks.service.operation import Operation
from kms_jwks.service.revocation import Revocation
from kms_jwks.service.signing import Signing
from kms_jwks.service.verifiers import Verifiers
from kms_jwks.service.versions import Versions
from kms_jwks.store import Store
from kms_jwks.worker.confirmation import Confirmation
from kms_jwks.worker.restart_limit import RestartLimit
from kms_jwks.worker.sync import RegistrySync

__all__ = ["RequestContext", "Service"]

log = structlog.get_logger(__name__)

_COMPLAINT_INTERVAL = 60.0
"""Seconds between two log lines about a worker that should be replaced and must wait."""


@dataclass(eq=False, kw_only=True)
class Service:
    """The parts of one worker: what it keeps, and its use cases. Opens nothing until `start`."""

    settings: Settings
    store: Store
    backends: Backends
    guard: Guard
    sync: RegistrySync
    confirmation: Confirmation
    restart_limit: RestartLimit
    signing: Signing
    verifiers: Verifiers
    key_sets: KeySets
    keys: Keys
    versions: Versions
    revocation: Revocation
    external_keys: ExternalKeys
    clients: Clients
    operation: Operation
    _complain_at: float = field(default=0.0, init=False)

    def start(self) -> None:
        """Register the worker, start polling the registry and wait up to 5 s for the first poll.

        Raises nothing while the database is down.
        """
        self.sync.start()
        self.sync.first_poll.wait(timeout=5)

    def stop(self) -> None:
        """Deregister the worker and close its modules and database connections. Idempotent."""
        self.sync.stop()
        self.backends.close()
        self.store.dispose()

    def authenticate(self, context: RequestContext, *, data_plane: bool) -> None:
        """Set `context.caller`, before anything else of the call is read or decoded.

        The data plane looks the token up in the snapshot, the control plane in the registry. Raises Unauthenticated,
        StoreUnavailable.
        """
        if data_plane:
            self.guard.authenticate(self.sync.complete_snapshot(), context, self.sync.clock.now())
        else:
            with self.store.read() as tx:
                self.guard.authenticate(tx, context, tx.now())

    def worn_out(self) -> str | None:
        """Why this worker should end now, so that a fresh one replaces it; None while it need not or may not end.

        To be called about once a second. A reason is returned once: the caller must act on it.
        """
        reason = self.backends.worn_out()
        if reason is None:
            return None
        if wait := self.restart_limit.permit():
            if time.monotonic() >= self._complain_at:
                self._complain_at = time.monotonic() + _COMPLAINT_INTERVAL
                log.error("worker_is_worn_out", reason=reason, replaced_in=round(wait))
            return None
        log.error("worker_recycled", reason=reason, pid=os.getpid())
        return reason
