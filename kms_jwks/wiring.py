"""The composition root: settings → store, backends, service. Imported by entry points alone."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from kms_jwks.backends import make_backend
from kms_jwks.backends.calling import Backends, CallLimits
from kms_jwks.config import Settings, load_settings
from kms_jwks.custodian.leader_lease import LeaderLease
from kms_jwks.custodian.loop import Custodian
from kms_jwks.service import Service
from kms_jwks.store import ConnectionSettings, Store
from kms_jwks.worker.confirmation import Confirmation

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication


def make_store(settings: Settings) -> Store:
    """The registry's store; opens nothing."""
    connection = ConnectionSettings(
        pool_size=settings.database_pool_size,
        timeout=settings.database_timeout_ms / 1000,
        application_name=f"kms-jwks {settings.node_name}",
    )
    return Store(settings.database_url, connection_settings=connection)


def make_backends(settings: Settings, *, management: bool = False) -> Backends:
    """The configured backends; opens nothing. A service that only publishes has none: it needs no PIN and no module.

    With `management` they are the custodian's, by credentials of its own where the configuration has them.
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


def build(settings: Settings) -> Service:
    """The service of one process; opens nothing until it is started."""
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Service(settings, make_store(settings), make_backends(settings))


def custodian(settings: Settings) -> Custodian:
    """The custodian of this node."""
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    store = make_store(settings)
    confirmation = Confirmation(
        store,
        node=settings.node_name,
        state_dir=settings.state_dir,
        lease=settings.signing_lease,
        kick=lambda: None,
    )
    leader_lease = LeaderLease(store, node=settings.node_name, on_stuck_step=_end_at_once)
    return Custodian(store, make_backends(settings, management=True), confirmation, leader_lease)


def _end_at_once() -> None:
    """End this process: a call hangs in a module, and only exiting frees it. The supervisor starts a new custodian."""
    logging.shutdown()
    os._exit(1)


def wsgi(config: Path | None = None) -> WSGIApplication:
    """The WSGI application of one gunicorn worker, started. Call it after the fork."""
    from kms_jwks.http.app import create_app

    service = build(load_settings(config))
    service.start()
    return create_app(service)
