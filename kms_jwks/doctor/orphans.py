"""Key pairs of this installation that no key version refers to: finding them, and removing one on request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from kms_jwks.backends.base import Backend, KeyRef
from kms_jwks.doctor.registry import Registry
from kms_jwks.model import IntentKind, IntentState
from kms_jwks.store import Store

DAYS = 7
"""How long a module that has a waiting period keeps an orphan."""


@dataclass(frozen=True, slots=True)
class Orphan:
    """A key pair of this installation in a module that no key version refers to."""

    backend: str
    label: str
    ref: KeyRef


def orphans(store: Store, backends: Mapping[str, Backend]) -> list[Orphan]:
    """Pairs labelled for this installation that no version refers to and no attempt may still be making.

    Raises BackendError, StoreUnavailable.
    """
    with store.read() as tx:
        prefix = f"kj-{tx.installation().id}-"
    # The modules first: a pair that is made after this look is not in it.
    listed = [
        Orphan(name, stored.label, stored.ref)
        for name, backend in backends.items()
        for stored in backend.list_keys(prefix)
        if stored.label.startswith(prefix)
    ]
    known = _Known.of(Registry.of(store))
    return [orphan for orphan in listed if not known.needs(orphan)]


class Removal(StrEnum):
    """What became of an orphan."""

    DESTROYED = "destroyed"
    SCHEDULED = f"destroyed by its module in {DAYS} days"
    NEEDED = "needed after all, and left alone"


def remove(orphan: Orphan, store: Store, backends: Mapping[str, Backend]) -> Removal:
    """Destroy an orphan's pair in its module, or have the module do it; nothing is done when it is none any more."""
    if _Known.of(Registry.of(store)).needs(orphan):
        return Removal.NEEDED
    backend = backends[orphan.backend]
    if backend.schedule_destroy(orphan.ref, DAYS):
        return Removal.SCHEDULED
    backend.destroy(orphan.ref)
    return Removal.DESTROYED


@dataclass(frozen=True, slots=True)
class _Known:
    """What the registry refers to in modules, or may come to refer to."""

    refs: frozenset[tuple[str, KeyRef]]
    labels: frozenset[str]

    @classmethod
    def of(cls, registry: Registry) -> _Known:
        held = {v.id for v in registry.versions if v.ref is not None}
        unfinished = (IntentState.PENDING, IntentState.STARTED)
        return cls(
            refs=frozenset((v.backend, KeyRef.of(**v.ref)) for v in registry.versions if v.ref is not None),
            labels=frozenset(
                i.label
                for i in registry.intents
                if i.kind is IntentKind.GENERATE
                and (i.state in unfinished or (i.state is IntentState.DONE and i.version_id in held))
            ),
        )

    def needs(self, orphan: Orphan) -> bool:
        return orphan.label in self.labels or (orphan.backend, orphan.ref) in self.refs
