"""The examination of a node: what is wrong with its files, registry, clocks, modules and keys, and how to fix it.

The checks only read. `remove_orphan` alone changes something: it destroys one orphan, on request. A check that depends
on something that has already failed is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from kms_jwks import errors
from kms_jwks.backends.calling import Backends
from kms_jwks.config import Settings
from kms_jwks.doctor import registry as registry_checks
from kms_jwks.doctor.certificates import certificates
from kms_jwks.doctor.checks import Check, State, failed, worst
from kms_jwks.doctor.files import files, refuse_exposed, registry_file
from kms_jwks.doctor.modules import Orphan, find_orphans, module, remove_orphan
from kms_jwks.doctor.registry import Registry, find_rollback
from kms_jwks.model import Instant
from kms_jwks.store import Store

__all__ = [
    "Check",
    "Orphan",
    "State",
    "certificates",
    "examine",
    "find_orphans",
    "find_rollback",
    "refuse_exposed",
    "registry_file",
    "remove_orphan",
    "worst",
]


def examine(
    settings: Settings,
    store: Store,
    backends: Backends,
    *,
    wall: Callable[[], int] = lambda: time.time_ns() // 1000,
) -> Iterator[Check]:
    """Run every check and yield each result. `wall` is this node's clock in microseconds."""
    yield from files(settings)
    yield from certificates(settings, Instant(wall()))
    registry = None
    try:
        store.check_schema()
        registry = Registry.of(store)
    except errors.Error as error:
        yield failed("registry", error, "Check database_url, and that this user may read the registry.")
    if registry is not None:
        yield Check(
            "registry", State.OK, f"{store.url}: epoch {registry.epoch.counter} of {registry.epoch.incarnation}"
        )
        yield registry_checks.history(settings, registry.epoch, find_rollback(settings, store))
        yield from registry_checks.clocks(registry, registry.now - wall())
        yield from registry_checks.custodian(registry)
        yield from registry_checks.intents(registry)
        yield from registry_checks.given_up(registry)
        yield from registry_checks.workers(registry)
        yield from registry_checks.policies(registry)
        yield from registry_checks.external_keys(registry)
        yield from registry_checks.duties(registry)
        yield from registry_checks.expiry(registry)
        yield from registry_checks.same_keys(registry)
    if settings.routes == "public":
        yield Check("modules", State.OK, "this node only publishes and needs no module")
        return
    if not backends.by_name:
        yield Check(
            "modules", State.FAILURE, "no backend is configured", "Add a [backends.NAME] table to the settings."
        )
    for name in backends.by_name:
        yield from module(name, backends, store, registry)
    if registry is not None:
        yield from registry_checks.unknown_backends(registry, backends.by_name)
