"""The composition root: from settings to a worker's service, a custodian, or the parts that `init` needs.

Workers, the custodian, `init` and the tests' worlds are all assembled here, and only entry points import this module.
What a function is not given it makes from the settings. Nothing here opens a database, a module or a thread.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kms_jwks.backends import make_backend
from kms_jwks.backends.calling import Backends, CallLimits
from kms_jwks.config import Settings, load_settings, prepare_state_dir, require_registry
from kms_jwks.custodian.leader_lease import LeaderLease
from kms_jwks.custodian.loop import Custodian
from kms_jwks.doctor import refuse_exposed
from kms_jwks.service import Service
from kms_jwks.service.clients import Clients
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
from kms_jwks.store import ConnectionSettings, Store
from kms_jwks.worker.clocks import DatabaseClock, boot_clock
from kms_jwks.worker.confirmation import Confirmation
from kms_jwks.worker.epoch_record import EpochRecord
from kms_jwks.worker.restart_limit import RestartLimit
from kms_jwks.worker.sync import RegistrySync

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

# --- parts ------------------------------------------------------------------------------------------------------------


def make_store(settings: Settings) -> Store:
    """The registry's store."""
    connection = ConnectionSettings(
        pool_size=settings.database_pool_size,
        timeout=settings.database_timeout_ms / 1000,
        application_name=f"kms-jwks {settings.node_name}",
    )
    return Store(settings.database_url, connection_settings=connection)


def make_backends(settings: Settings, *, management: bool = False) -> Backends:
    """The configured backends. A service that only publishes has none: it needs neither PIN nor module.

    With `management` they use the custodian's own credentials where the configuration has them.
    """
    if settings.routes == "public":
        return Backends({}, default=None)
    return Backends(
        {
            name: make_backend(name, options, settings.state_dir, management=management)
            for name, options in settings.backends.items()
        },
        default=settings.default_backend,
        limits={
            name: CallLimits(
                timeout=options.sign_timeout_ms / 1000,
                waiting=options.waiting,
                stuck_limit=options.stuck_limit,
                check_signatures=options.check_signatures,
                parallel=getattr(options, "sessions", None),
                callers=settings.threads,
            )
            for name, options in settings.backends.items()
        },
    )


def make_confirmation(settings: Settings, store: Store, kick: Callable[[], None] = lambda: None) -> Confirmation:
    """Waits until workers confirm an epoch. `kick` makes the worker of this process, if it is one, poll at once."""
    return Confirmation(
        store, node=settings.node_name, state_dir=settings.state_dir, lease=settings.signing_lease, kick=kick
    )


def make_control(settings: Settings, store: Store, backends: Backends) -> Control:
    """The parts that control-plane use cases share, in a process that is no worker (`init`)."""
    return Control(store, Guard(), make_confirmation(settings, store), backends, settings.public_url)


# --- processes --------------------------------------------------------------------------------------------------------


def assemble(
    settings: Settings,
    *,
    store: Store | None = None,
    backends: Backends | None = None,
    boot: Callable[[], int] = boot_clock,
    confirmation: Confirmation | None = None,
    control: type[Control] = Control,
) -> Service:
    """The service of one worker process. Call it after the fork; it opens nothing until it is started.

    `boot` is the boot clock in microseconds. A simulation gives a `confirmation` and a `control` that wait in its time.
    """
    store = make_store(settings) if store is None else store
    record = EpochRecord(settings.state_dir)
    store.known_epoch = record.load
    backends = make_backends(settings) if backends is None else backends
    guard = Guard()
    sync = RegistrySync(
        store,
        node=settings.node_name,
        lease=settings.signing_lease,
        poll_interval=settings.poll_interval_ms / 1000,
        state_dir=settings.state_dir,
        used=guard.drain_used,
        bind=backends.bind,
        backends=lambda: backends.states,
        clock=DatabaseClock(boot),
        record=record,
    )
    guard.fallback = sync.complete_snapshot
    if confirmation is None:
        confirmation = make_confirmation(settings, store, kick=sync.kick)
    parts = control(store, guard, confirmation, backends, settings.public_url, settings.default_key_set)
    restart_limit = RestartLimit(settings.state_dir, settings.workers)
    return Service(
        settings=settings,
        store=store,
        backends=backends,
        guard=guard,
        sync=sync,
        confirmation=confirmation,
        restart_limit=restart_limit,
        signing=Signing(sync, guard, backends),
        verifiers=Verifiers(sync, guard, public_url=settings.public_url, default_key_set=settings.default_key_set),
        key_sets=KeySets(parts),
        keys=Keys(parts),
        versions=Versions(parts),
        revocation=Revocation(parts),
        external_keys=ExternalKeys(parts),
        clients=Clients(parts),
        operation=Operation(parts, sync, restart_limit),
    )


def assemble_custodian(
    settings: Settings,
    *,
    store: Store | None = None,
    backends: Backends | None = None,
    confirmation: Confirmation | None = None,
    leader_lease: LeaderLease | None = None,
    monotonic: Callable[[], float] = time.monotonic,
) -> Custodian:
    """The custodian of this node. `monotonic` is in seconds."""
    store = make_store(settings) if store is None else store
    record = EpochRecord(settings.state_dir)
    store.known_epoch = record.load
    backends = make_backends(settings, management=True) if backends is None else backends
    if leader_lease is None:
        leader_lease = LeaderLease(store, node=settings.node_name, on_stuck_step=_exit_at_once)
    if confirmation is None:
        confirmation = make_confirmation(settings, store)
    return Custodian(store, backends, confirmation, leader_lease, record=record, monotonic=monotonic)


def _exit_at_once() -> None:
    """End this process: a call hangs in a module, and only exiting frees it. The supervisor starts a new custodian."""
    logging.shutdown()
    os._exit(1)


def wsgi(config: Path | None = None) -> WSGIApplication:
    """The WSGI application of one worker under a gunicorn of the operator's own, started. Call it after the fork."""
    from kms_jwks.http import logs
    from kms_jwks.http.app import create_app

    settings = load_settings(config)
    require_registry(settings)
    refuse_exposed(settings)
    logs.configure(settings.log_level, settings.log_format)
    prepare_state_dir(settings)
    service = assemble(settings)
    service.start()
    return create_app(service)
