"""Every use case of the service, guarded by one choke point; put together here from a store, backends and settings."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import structlog

from kms_jwks.backends.calling import Backends
from kms_jwks.config import Settings
from kms_jwks.service.clients import Clients
from kms_jwks.service.context import RequestContext
from kms_jwks.service.control import Control
from kms_jwks.service.external_keys import ExternalKeys
from kms_jwks.service.guard import Guard
from kms_jwks.service.key_sets import KeySets
from kms_jwks.service.keys import Keys
from kms_jwks.service.operation import Operation
from kms_jwks.service.revocation import Revocation
from kms_jwks.service.signing import Signing
from kms_jwks.service.verifiers import Verifiers
from kms_jwks.service.versions import Versions
from kms_jwks.store import Store
from kms_jwks.worker.clocks import DatabaseClock, boot_clock
from kms_jwks.worker.confirmation import Confirmation
from kms_jwks.worker.restart_limit import RestartLimit
from kms_jwks.worker.sync import RegistrySync

__all__ = ["RequestContext", "Service"]

log = structlog.get_logger(__name__)


class Service:
    """One worker's service. Made after the fork; opens nothing until `start`."""

    def __init__(
        self, settings: Settings, store: Store, backends: Backends, *, boot: Callable[[], int] = boot_clock
    ) -> None:
        self._complain_at = 0.0
        self.settings = settings
        self.store = store
        self.backends = backends
        guard = self.guard = Guard()
        self.sync = RegistrySync(
            store,
            node=settings.node_name,
            lease=settings.signing_lease,
            poll_interval=settings.poll_interval_ms / 1000,
            state_dir=settings.state_dir,
            used=guard.drain_used,
            bind=backends.bind,
            backends=lambda: backends.states,
            clock=DatabaseClock(boot),
        )
        self.confirmation = Confirmation(
            store,
            node=settings.node_name,
            state_dir=settings.state_dir,
            lease=settings.signing_lease,
            kick=self.sync.kick,
        )
        control = Control(store, guard, self.confirmation, backends, settings.public_url)
        self.signing = Signing(self.sync, guard, backends)
        self.verifiers = Verifiers(
            self.sync, guard, public_url=settings.public_url, default_key_set=settings.default_key_set
        )
        self.key_sets = KeySets(control)
        self.keys = Keys(control)
        self.versions = Versions(control)
        self.revocation = Revocation(control)
        self.external_keys = ExternalKeys(control)
        self.clients = Clients(control)
        self.restart_limit = RestartLimit(settings.state_dir, settings.workers)
        self.operation = Operation(control, self.sync, self.restart_limit)

    def start(self) -> None:
        """Register, start watching the registry, wait shortly for the first look. Never raises for its absence."""
        self.sync.start()
        self.sync.first_poll.wait(timeout=5)

    def stop(self) -> None:
        """Leave the register and give the modules back. Idempotent."""
        self.sync.stop()
        self.backends.close()
        self.store.dispose()

    def authenticate(self, context: RequestContext, *, data_plane: bool) -> None:
        """Set `context.caller`, before anything else of the call is read or decoded.

        The data plane asks the snapshot, the control plane the registry. Raises Unauthenticated, StoreUnavailable.
        """
        if data_plane:
            self.guard.authenticate(self.sync.snapshot(), context, self.sync.clock.now())
        else:
            with self.store.read() as tx:
                self.guard.authenticate(tx, context, tx.now())

    def worn_out(self) -> str | None:
        """Why this worker should end now so that a fresh one takes its place; None while it need not or may not.

        To be asked about once a second. A reason is given once: the caller acts on it.
        """
        reason = self.backends.worn_out()
        if reason is None:
            return None
        if wait := self.restart_limit.permit():
            if time.monotonic() >= self._complain_at:
                self._complain_at = time.monotonic() + 60
                log.error("worker_is_worn_out", reason=reason, replaced_in=round(wait))
            return None
        log.error("worker_recycled", reason=reason, pid=os.getpid())
        return reason

    def pin(self) -> Callable[[], None]:
        """Take part in the confirmation of epochs; call what is returned once the answer has been written."""
        return self.sync.pin()
