"""Checks of a module and the keys in it, and its orphans: key pairs of this installation that no key version refers to.

A module must answer, offer the algorithms that are needed, and hold what the registry says. Orphans are removed on
request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from kms_jwks import errors
from kms_jwks.backends.base import KeyRef
from kms_jwks.backends.calling import Backends
from kms_jwks.doctor.checks import Check, State, failed, some
from kms_jwks.doctor.registry import Registry
from kms_jwks.model import IntentKind, IntentState, KeyVersion, VersionState
from kms_jwks.store import Store

WAITING_DAYS = 7
"""Days for which a module that has a waiting period keeps an orphan before it destroys it."""


def module(name: str, backends: Backends, store: Store, registry: Registry | None) -> Iterator[Check]:
    """The checks of one backend and its keys; without a registry only whether it answers."""
    step = f"Check that the module and its token are present and match [backends.{name}] in the settings."
    try:
        seconds = backends.timeouts(name).read
        health = backends.ask(name, "ping", lambda backend: backend.ping(), seconds)
        offered = backends.ask(name, "capabilities", lambda backend: backend.capabilities(), seconds)
    except errors.BackendError as error:
        yield failed(f"backend {name}", error, step)
        return
    yield Check(f"backend {name}", State.OK, f"{health.description}; logged in")
    if registry is None:
        yield Check(f"mechanisms of {name}", State.OK, f"it offers {', '.join(sorted(offered))}")
        return
    yield _mechanisms(name, offered, registry)
    try:
        yield from _keys(name, backends, registry)
        yield from _accepted(name, registry)
        yield from _orphans(name, backends, store)
    except errors.BackendError as error:
        yield failed(f"backend {name}", error, step)


def _mechanisms(name: str, offered: frozenset[str], registry: Registry) -> Check:
    needed: dict[str, list[str]] = {}
    for version in registry.versions:
        if version.backend == name and version.alg not in offered:
            needed.setdefault(version.alg, []).append(registry.name_of(version))
    if not needed:
        return Check(f"mechanisms of {name}", State.OK, "it offers the algorithms of all its keys")
    missing = "; ".join(f"{alg} for {some(names)}" for alg, names in sorted(needed.items()))
    return Check(
        f"mechanisms of {name}",
        State.FAILURE,
        f"it does not offer {missing}",
        "Allow these mechanisms in the module's configuration, or move the keys to another backend.",
    )


def _keys(name: str, backends: Backends, registry: Registry) -> Iterator[Check]:
    good = 0
    for version in registry.versions:
        if version.backend != name or version.ref is None:
            continue
        trouble = _trouble(backends, version)
        if trouble is None:
            good += not version.weaknesses
            continue
        what, step = trouble
        yield Check(f"key {registry.name_of(version)}", State.FAILURE, f"{what} (kid {version.kid})", step)
    yield Check(f"keys in {name}", State.OK, f"{good} read back: made there, not extractable, sign-only, as recorded")


def _accepted(name: str, registry: Registry) -> Iterator[Check]:
    """The weaknesses that were accepted when a key was adopted."""
    for version in registry.versions:
        if version.backend == name and version.weaknesses:
            yield Check(
                f"key {registry.name_of(version)}",
                State.WARNING,
                f"adopted although {', '.join(version.weaknesses)} (kid {version.kid})",
                "Rotate to a key that this service generated, and destroy this one unless it is used elsewhere.",
            )


def _trouble(backends: Backends, version: KeyVersion) -> tuple[str, str] | None:
    """What is wrong with a version's key pair, and what to do; None if it is as the registry says."""
    assert version.ref is not None
    ref, name = KeyRef.of(**version.ref), version.backend
    seconds = backends.timeouts(name).read
    replace_it = "Revoke the version: its standby takes over."
    try:
        public = dict(backends.ask(name, "public_key", lambda backend: backend.public_key(ref), seconds))
        evidence = backends.ask(name, "attributes", lambda backend: backend.attributes(ref), seconds)
    except errors.BackendKeyNotFound:
        return "the module does not hold it", f"Bring the token back from its backup. If the key is lost: {replace_it}"
    except errors.BackendRefused as error:
        waits = version.state in (VersionState.RETIRED, VersionState.REVOKED) and version.destroy_at is not None
        if waits and error.fields.get("key_state") in ("PendingDeletion", "PendingReplicaDeletion"):
            return None
        return error.detail, error.next_step
    if public != dict(version.public_jwk or {}):
        return "the module holds another public key than the registry", f"Find out who replaced it. {replace_it}"
    recorded = (version.evidence or {}).get("attributes")
    then: Mapping[str, object] = recorded if isinstance(recorded, Mapping) else {}
    changed = [
        f"{attribute} was {then[attribute]} and is {value}"
        for attribute, value in evidence.attributes.items()
        if attribute in then and then[attribute] != value
    ]
    if changed:
        return "; ".join(changed), f"Find out who changed it. {replace_it}"
    if worse := [words for words in evidence.weaknesses if words not in version.weaknesses]:
        return f"the module reports: {', '.join(worse)}", replace_it
    return None


def _orphans(name: str, backends: Backends, store: Store) -> Iterator[Check]:
    try:
        labels = [orphan.label for orphan in find_orphans(store, backends, [name])]
    except errors.BackendRefused as error:
        # The credentials of a node that only signs need not allow listing keys.
        yield Check(f"orphans in {name}", State.WARNING, f"not searched: {error.detail}", error.next_step)
        return
    if not labels:
        yield Check(f"orphans in {name}", State.OK, "every key pair of this installation belongs to a key version")
        return
    yield Check(
        f"orphans in {name}",
        State.WARNING,
        f"{len(labels)} key pair(s) that no key version refers to: {some(labels)}",
        "kms-jwks doctor --remove-orphans destroys them. Not after the registry was restored from a backup: keys that "
        "were made since look the same.",
    )


# --- orphans ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Orphan:
    """A key pair of this installation in a module that no key version refers to."""

    backend: str
    label: str
    ref: KeyRef


def find_orphans(store: Store, backends: Backends, names: Iterable[str] | None = None) -> list[Orphan]:
    """Key pairs labelled for this installation that no version refers to and no open intent may be generating.

    `names` are the backends to search, by default all. Raises BackendError, StoreUnavailable.
    """
    with store.read() as tx:
        prefix = f"kj-{tx.installation().id}-"
    # List the modules before reading the registry: a key pair that is generated in between must not count as orphan.
    listed = [
        Orphan(name, stored.label, stored.ref)
        for name in (backends.by_name if names is None else names)
        for stored in backends.ask(
            name, "list_keys", lambda backend: backend.list_keys(prefix), backends.timeouts(name).read
        )
        if stored.label.startswith(prefix)
    ]
    used = _UsedKeyPairs.of(Registry.of(store))
    return [orphan for orphan in listed if not used.contains(orphan)]


class Removal(StrEnum):
    """What became of an orphan."""

    DESTROYED = "destroyed"
    SCHEDULED = f"destroyed by its module in {WAITING_DAYS} days"
    NEEDED = "in use now, not removed"


def remove_orphan(orphan: Orphan, store: Store, backends: Backends) -> Removal:
    """Destroy an orphan in its module, or schedule that; does nothing if a version refers to it by now."""
    if _UsedKeyPairs.of(Registry.of(store)).contains(orphan):
        return Removal.NEEDED
    ref, name = orphan.ref, orphan.backend
    seconds = backends.timeouts(name).change
    if backends.ask(name, "schedule_destroy", lambda backend: backend.schedule_destroy(ref, WAITING_DAYS), seconds):
        return Removal.SCHEDULED
    backends.ask(name, "destroy", lambda backend: backend.destroy(ref), seconds)
    return Removal.DESTROYED


@dataclass(frozen=True, slots=True)
class _UsedKeyPairs:
    """The key pairs that the registry refers to, or may refer to once an open intent is done."""

    refs: frozenset[tuple[str, KeyRef]]
    labels: frozenset[str]

    @classmethod
    def of(cls, registry: Registry) -> _UsedKeyPairs:
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

    def contains(self, orphan: Orphan) -> bool:
        return orphan.label in self.labels or (orphan.backend, orphan.ref) in self.refs
