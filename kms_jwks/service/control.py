"""What every use case of the control plane shares: the store, the guard, waiting for workers and for the custodian."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

from kms_jwks import errors
from kms_jwks.backends.calling import Backends
from kms_jwks.model import Epoch, Id, Key, KeyVersion, VersionState
from kms_jwks.service.guard import Guard
from kms_jwks.store import ReadTx, Store
from kms_jwks.worker.confirmation import Confirmation

CUSTODIAN_WAIT = 10.0
"""Seconds a call waits for the custodian before it answers 202."""
_PACE = 0.05


@dataclass(frozen=True)
class Control:
    """The parts that use cases are made of. `public_url` has no trailing slash."""

    store: Store
    guard: Guard
    confirmation: Confirmation
    backends: Backends
    public_url: str

    def wait_for_custodian(self, ids: list[Id]) -> bool:
        """Wait until the versions `ids` are published everywhere and sign if they may at once. False after 10 s.

        They are in the registry already, so one that does not answer for a while is waited for as well.
        """
        end = time.monotonic() + CUSTODIAN_WAIT
        while True:
            with contextlib.suppress(errors.StoreUnavailable):
                epoch = self._settled_at(ids)
                if epoch is not None:
                    self.confirmation.wait_for_live_workers(epoch)
                    return True
            if time.monotonic() >= end:
                return False
            time.sleep(_PACE)

    def _settled_at(self, ids: list[Id]) -> Epoch | None:
        """The epoch under which they are, or None. Raises UnsupportedAlgorithmRequested when one will never be."""
        with self.store.read() as tx:
            versions = [v for v in (tx.version(i) for i in ids) if v is not None]
            failed = next((v for v in versions if v.state is VersionState.DESTROYED), None)
            reason = _failure(tx, failed) if failed else None
            settled = all(_settled(tx, v) for v in versions)
            epoch = tx.epoch()
        if reason is not None:
            raise errors.UnsupportedAlgorithmRequested(reason)
        return epoch if settled else None


def _settled(tx: ReadTx, version: KeyVersion) -> bool:
    if version.state is VersionState.CREATING:
        return False
    if version.state is not VersionState.PUBLISHED:
        return True
    if version.visible_since is None:
        return False
    siblings = tx.versions(key_id=version.key_id, states={VersionState.ACTIVE})
    return bool(siblings) or not version.first_fill or _held(tx, version)


def _held(tx: ReadTx, version: KeyVersion) -> bool:
    """Whether `hold_until` keeps a version from signing for now."""
    key = tx.key_by_id(version.key_id)
    return key is not None and key.policy.hold_until is not None and key.policy.hold_until > tx.now()


def _failure(tx: ReadTx, version: KeyVersion) -> str | None:
    if version.kid is not None:
        return None
    intents = tx.intents(version_id=version.id)
    return next((i.error for i in reversed(intents) if i.error), "The module could not make this key.")


def check_revision(found: int, if_match: int | None) -> None:
    """If-Match of a PATCH against the object's revision. Raises RevisionRequired, RevisionMismatch."""
    if if_match is None:
        raise errors.RevisionRequired(f"The object is at revision {found}.", fields={"revision": found})
    if if_match != found:
        raise errors.RevisionMismatch(
            f"The object is at revision {found}, the request names {if_match}.", fields={"revision": found}
        )


def find_version(tx: ReadTx, key: Key, version: str) -> KeyVersion:
    """A version of `key` by number or kid; a kid that looks like a number is found by kid when no number fits."""
    value = None
    if version.isascii() and version.isdigit() and len(version) < 10:
        value = tx.version_by_number(key.id, int(version))
    if value is None:
        by_kid = tx.version_by_kid(version)
        value = by_kid if by_kid is not None and by_kid.key_id == key.id else None
    if value is None:
        raise errors.VersionNotFound(f"Key {key.name!r} has no such version.")
    return value
