"""Checks of a module and the keys in it: that it answers, offers what is needed, and holds what the registry says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kms_jwks import errors
from kms_jwks.backends.base import Backend, KeyRef
from kms_jwks.doctor.checks import Check, State, failed, some
from kms_jwks.doctor.orphans import orphans
from kms_jwks.doctor.registry import Registry
from kms_jwks.model import KeyVersion, VersionState
from kms_jwks.store import Store


def module(name: str, backend: Backend, store: Store, registry: Registry | None) -> Iterator[Check]:
    """One backend and its keys; without a registry only that it answers."""
    step = f"See that the module and its token are there and fit [backends.{name}] in the settings."
    try:
        health = backend.ping()
        offered = backend.capabilities()
    except errors.BackendError as error:
        yield failed(f"backend {name}", error, step)
        return
    yield Check(f"backend {name}", State.OK, f"{health.description}; logged in")
    if registry is None:
        yield Check(f"mechanisms of {name}", State.OK, f"it offers {', '.join(sorted(offered))}")
        return
    yield _mechanisms(name, offered, registry)
    try:
        yield from _keys(name, backend, registry)
        yield from _accepted(name, registry)
        yield from _orphans(name, backend, store)
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


def _keys(name: str, backend: Backend, registry: Registry) -> Iterator[Check]:
    good = 0
    for version in registry.versions:
        if version.backend != name or version.ref is None:
            continue
        trouble = _trouble(backend, version)
        if trouble is None:
            good += not version.weaknesses
            continue
        what, step = trouble
        yield Check(f"key {registry.name_of(version)}", State.FAILURE, f"{what} (kid {version.kid})", step)
    yield Check(f"keys in {name}", State.OK, f"{good} read back: made there, not extractable, sign-only, as recorded")


def _accepted(name: str, registry: Registry) -> Iterator[Check]:
    """What was accepted of adopted keys."""
    for version in registry.versions:
        if version.backend == name and version.weaknesses:
            yield Check(
                f"key {registry.name_of(version)}",
                State.WARNING,
                f"adopted although {', '.join(version.weaknesses)} (kid {version.kid})",
                "Rotate to a key that was made here, and have this one destroyed where nobody else uses it.",
            )


def _trouble(backend: Backend, version: KeyVersion) -> tuple[str, str] | None:
    """What is wrong with a version's key pair, and what to do; None when it is as the registry says."""
    assert version.ref is not None
    ref = KeyRef.of(**version.ref)
    replace_it = "Revoke the version: its standby takes over."
    try:
        public = dict(backend.public_key(ref))
        evidence = backend.attributes(ref)
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
        return f"the module says of it that {', '.join(worse)}", replace_it
    return None


def _orphans(name: str, backend: Backend, store: Store) -> Iterator[Check]:
    try:
        left = [orphan.label for orphan in orphans(store, {name: backend})]
    except errors.BackendRefused as error:
        # Those that only sign need not be able to list keys.
        yield Check(f"orphans in {name}", State.WARNING, f"not looked for: {error.detail}", error.next_step)
        return
    if not left:
        yield Check(f"orphans in {name}", State.OK, "every key pair of this installation belongs to a key version")
        return
    yield Check(
        f"orphans in {name}",
        State.WARNING,
        f"{len(left)} key pair(s) that no key version refers to: {some(left)}",
        "kms-jwks doctor --remove-orphans destroys them. Not after the registry was restored from a backup: keys that "
        "were made since look the same.",
    )
