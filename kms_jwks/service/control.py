"""What the use cases of the control plane share: transactions that wait for the workers, and checks of a request."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from msgspec import UNSET, UnsetType

from kms_jwks import errors, wire
from kms_jwks.access import Permission, Scope
from kms_jwks.algorithms import ALGORITHMS, Algorithm
from kms_jwks.backends.calling import Backends
from kms_jwks.model import KID_RULE, MAX_KID, Epoch, Id, Instant, Key, KeyVersion, VersionState, kid_error, name_error
from kms_jwks.service.guard import Entered, Guard, RequestContext
from kms_jwks.store import ReadTx, Store, WriteTx
from kms_jwks.times import to_instant
from kms_jwks.worker.confirmation import Confirmation

CUSTODIAN_WAIT = 10.0
"""Seconds a call waits for the custodian before it answers 202."""
_POLL_INTERVAL = 0.05
"""Seconds between two reads of the registry while a call waits for the custodian."""


@dataclass(frozen=True)
class Control:
    """The parts that use cases are made of. `public_url` has no trailing slash."""

    store: Store
    guard: Guard
    confirmation: Confirmation
    backends: Backends
    public_url: str
    default_key_set: str = ""
    """The key set that the paths without a name serve."""

    @contextlib.contextmanager
    def change(self) -> Iterator[WriteTx]:
        """A write transaction; after the commit, wait (at most 2 s) until live workers have confirmed the change."""
        with self.store.write() as tx:
            yield tx
        self.confirmation.wait_for_live_workers(tx.committed_epoch)

    @contextlib.contextmanager
    def change_everywhere(self) -> Iterator[WriteTx]:
        """A write transaction; after the commit, wait until no worker acts on the older state any more.

        That is when every registered worker has confirmed, or when the longest lease + 1 s has passed. The call waits
        also where nothing changed: a caller that lost the first answer repeats the call and gets the same certainty.
        """
        with self.store.write() as tx:
            yield tx
            lease, epoch_before = self.confirmation.lease(tx), tx.epoch()
        self.confirmation.wait_until_confirmed(tx.committed_epoch or epoch_before, lease)

    def wait_for_custodian(self, ids: list[Id]) -> bool:
        """Wait until the versions `ids` are published everywhere, and sign if they may sign at once. False after 10 s.

        The versions are committed already, so keep waiting while the database is down. Raises the module's refusal, as
        `creation_error` words it, for a version whose key pair will never be made.
        """
        end = time.monotonic() + CUSTODIAN_WAIT
        while True:
            with contextlib.suppress(errors.StoreUnavailable):
                epoch = self._read_settled_epoch(ids)
                if epoch is not None:
                    self.confirmation.wait_for_live_workers(epoch)
                    return True
            if time.monotonic() >= end:
                return False
            time.sleep(_POLL_INTERVAL)

    def _read_settled_epoch(self, ids: list[Id]) -> Epoch | None:
        """The epoch under which the versions are settled, None while one is not."""
        with self.store.read() as tx:
            versions = [v for v in (tx.version(i) for i in ids) if v is not None]
            for version in versions:
                if version.failure is not None or (version.state is VersionState.DESTROYED and version.kid is None):
                    raise creation_error(tx, version)
            return tx.epoch() if all(is_settled(tx, v) for v in versions) else None

    def check_break_glass(self, context: RequestContext, found: Entered, request: wire.BreakGlassRequest) -> str | None:
        """The reason for which this call may override an invariant, None where the call does not ask for that.

        Raises Forbidden without the permission and InvalidField without a reason, whether there is something to
        override or not.
        """
        if not request.break_glass:
            return None
        self.guard.require(context, Permission.BREAK_GLASS, Scope(found.key_set.id, found.key.id))
        if not request.reason.strip():
            raise errors.InvalidField("reason: break_glass needs one", fields={"field": "reason"})
        return request.reason


def creation_error(tx: ReadTx, version: KeyVersion) -> errors.Error:
    """Why a version's pair was not made, as the answer to the call that asked for it. Names the key and the version."""
    given_up = {"code": errors.Conflict.code, "detail": "The version was given up before its key pair was made."}
    failure = version.failure or given_up
    cls = errors.BY_CODE.get(failure["code"], errors.Conflict)
    key = tx.key_by_id(version.key_id)
    fields = {"key": key.name if key else None, "number": version.number}
    if cls is errors.UnsupportedAlgorithm:
        return errors.UnsupportedAlgorithmRequested(failure["detail"], fields=fields)
    return cls(failure["detail"], fields=fields)


def is_settled(tx: ReadTx, version: KeyVersion) -> bool:
    """Whether the creation of `version` needs no more waiting: visible everywhere, and active where it may be."""
    if version.state is VersionState.CREATING:
        return False
    if version.state is not VersionState.PUBLISHED:
        return True
    if version.visible_since is None:
        return False
    if not version.first_fill or tx.versions(key_id=version.key_id, states={VersionState.ACTIVE}):
        return True
    key = tx.key_by_id(version.key_id)
    return key is not None and key.policy.hold_until is not None and key.policy.hold_until > tx.now()


# --- checks of a request ----------------------------------------------------------------------------------------------


def check_revision(found: int, if_match: int | None) -> None:
    """If-Match of a PATCH against the object's revision. Raises RevisionRequired, RevisionMismatch."""
    if if_match is None:
        raise errors.RevisionRequired(f"The object is at revision {found}.", fields={"revision": found})
    if if_match != found:
        raise errors.RevisionMismatch(
            f"The object is at revision {found}, the request names {if_match}.", fields={"revision": found}
        )


def check_name(name: str) -> str:
    """The name of a new object. Raises InvalidField."""
    problem = name_error(name)
    if problem is not None:
        raise errors.InvalidField(f"name: {problem}", fields={"field": "name"})
    return name


def check_kid(kid: str, field: str = "kid") -> str:
    """A kid that is given to a key. Raises InvalidField, which names `field`."""
    problem = kid_error(kid)
    if problem is not None:
        raise errors.InvalidField(
            f"kid: {problem}",
            next_step=f"A kid has {KID_RULE}.",
            fields={"field": field},
        )
    return kid


def take_kid(given: str | UnsetType, own: object, field: str = "kid") -> str | None:
    """The kid that is given, or the JWK's `own` one; None where there is neither.

    Raises InvalidField where they differ: it is not known which of them the tokens carry.
    """
    if own is not None and not isinstance(own, str):
        raise errors.InvalidField("kid: the JWK's own kid is not a string", fields={"field": field})
    if given is UNSET:
        return own
    if own is not None and own != given:
        raise errors.InvalidField(
            f"kid: the JWK's own kid is {own[:MAX_KID]!r}, the one beside it {given!r}",
            next_step="Leave out the kid that the tokens do not carry in their header.",
            fields={"field": field},
        )
    return given


def find_algorithm(name: str) -> Algorithm:
    """The algorithm of that name. Raises UnsupportedAlgorithmRequested."""
    alg = ALGORITHMS.get(name)
    if alg is None:
        names = sorted(ALGORITHMS)
        raise errors.UnsupportedAlgorithmRequested(
            f"The algorithm is none of {', '.join(names)}.", fields={"algorithms": names}
        )
    return alg


def read_instant(moment: datetime, name: str, *, field: str | None = None) -> Instant:
    """A datetime of a request as an instant; `field` is its path where that is not its name. Raises InvalidField."""
    try:
        return to_instant(moment)
    except ValueError as error:
        raise errors.InvalidField(f"{name}: {error}", fields={"field": field or name}) from None


def find_version(tx: ReadTx, key: Key, version: str) -> KeyVersion:
    """A version of `key` by number or kid; a kid that looks like a number is found by kid when no number fits.

    `01` is no number: each version has one path with its number. Raises VersionNotFound.
    """
    value = None
    if looks_like_number(version) and not version.startswith("0"):
        value = tx.version_by_number(key.id, int(version))
    if value is None:
        by_kid = tx.version_by_kid(key.key_set_id, version)
        value = by_kid if by_kid is not None and by_kid.key_id == key.id else None
    if value is None:
        raise errors.VersionNotFound(f"Key {key.name!r} has no such version.")
    return value


def looks_like_number(version: str) -> bool:
    """Whether `version` is read as the number of a version before it is read as a kid."""
    return version.isascii() and version.isdigit() and len(version) < 10


def require_enabled(key: Key) -> None:
    """Raise KeyRetired, KeyDisabled."""
    if key.retired_at is not None:
        raise errors.KeyRetired(f"Key {key.name!r} is retired.")
    if key.disabled_at is not None:
        raise errors.KeyDisabled(f"Key {key.name!r} is disabled.")
