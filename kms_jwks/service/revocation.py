"""Revocation: one version, or every version in a backend or a key set in one transaction; rehearsed first on request.

The answer comes when no worker signs with what was revoked, and says which verifiers may go on trusting it. No module
is asked: the custodian destroys the key pairs when their module answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from msgspec import UNSET

from kms_jwks import errors, exposure, timeline, wire
from kms_jwks.access import Permission, Scope
from kms_jwks.custodian import transitions
from kms_jwks.model import SECOND, Epoch, Instant, Key, KeySet, KeyVersion, VersionState
from kms_jwks.service import views
from kms_jwks.service.control import Control, find_version
from kms_jwks.service.guard import RequestContext
from kms_jwks.store import ReadTx, WriteTx
from kms_jwks.times import to_datetime

_S = VersionState
_ORDER = (_S.CREATING, _S.PUBLISHED, _S.RETIRING, _S.RETIRED, _S.REVOKED, _S.ACTIVE)
"""The order in which the versions of a key are revoked: the active one last, so that no version that is about to be
revoked becomes its successor."""


class _RollBack(Exception):
    """Ends the transaction of a dry run without a commit."""


@dataclass(frozen=True, slots=True)
class _RevokedVersion:
    """One version that is revoked, as the transaction that did it knows it.

    `successor_visible_for` is in seconds, None where no successor was served by every worker. `changed` is False for a
    version that was revoked before.
    """

    key_set: KeySet
    key: Key
    version: KeyVersion
    successor: KeyVersion | None
    successor_visible_for: int | None
    changed: bool


class Revocation:
    """For operators, in an emergency."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def revoke_version(
        self, context: RequestContext, key_set: str, key: str, version: str, request: wire.RevokeRequest
    ) -> wire.Revoked:
        """Revoke one version now, or say what that would do.

        Repeated for a version that is revoked already, it changes nothing and waits as before: a caller that lost the
        first answer gets the same certainty.
        """
        control = self._control
        with self._begin(dry_run=request.dry_run) as tx:
            found = control.guard.enter_key(tx, context, Permission.VERSION_REVOKE, key_set, key)
            lease = control.confirmation.lease(tx)
            done = _revoke(tx, found.key_set, found.key, find_version(tx, found.key, version), request.reason, lease)
            answer = wire.Revoked(
                version=views.version(tx, done.key, done.version),
                successor=views.version(tx, done.key, done.successor) if done.successor else None,
                successor_visible_for=done.successor_visible_for,
                without_successor=_is_without_successor(tx, done.key),
                changed=done.changed,
                unconfirmed=[],
                exposure=_assess_exposure(tx, [done], lease),
                dry_run=request.dry_run,
            )
            epoch = tx.epoch()
        if not request.dry_run:
            answer.unconfirmed = self._wait_for_workers(tx.committed_epoch or epoch, lease)
        return answer

    def revoke_scope(self, context: RequestContext, request: wire.RevocationCreate) -> wire.Revocation:
        """Revoke every version with a key pair in a backend, or of a key set: all in one transaction, or none.

        Needs the permission for each key it touches. It can be repeated like the revocation of one version.
        """
        with self._begin(dry_run=request.dry_run) as tx:
            lease = self._control.confirmation.lease(tx)
            keys = self._find_keys(tx, context, request)
            disabled = [k for k in keys if _is_to_be_disabled(k, request)]
            for key in disabled:
                tx.save(replace(key, disabled_at=tx.now(), updated_at=tx.now(), revision=key.revision + 1))
            done = [d for key in keys for d in _revoke_all(tx, key, request, lease)]
            answer = _summarise(tx, done, disabled, request, lease)
            epoch = tx.epoch()
        if not request.dry_run:
            answer.unconfirmed = self._wait_for_workers(tx.committed_epoch or epoch, lease)
        return answer

    # --- inside

    @contextlib.contextmanager
    def _begin(self, *, dry_run: bool) -> Iterator[WriteTx]:
        """A write transaction; that of a dry run is rolled back at its end."""
        with contextlib.suppress(_RollBack), self._control.store.write() as tx:
            yield tx
            if dry_run:
                raise _RollBack

    def _wait_for_workers(self, epoch: Epoch, lease: int) -> list[wire.UnconfirmedWorker]:
        """Wait until every worker has confirmed or has lost its lease; the workers that have not confirmed."""
        return [
            wire.UnconfirmedWorker(worker=w.id, node=w.node, heartbeat_at=to_datetime(w.heartbeat_at))
            for w in self._control.confirmation.wait_until_confirmed(epoch, lease)
        ]

    def _find_keys(self, tx: ReadTx, context: RequestContext, request: wire.RevocationCreate) -> list[Key]:
        """The keys that the revocation is about, after a check that the caller may revoke versions of each."""
        guard = self._control.guard
        if (request.backend is UNSET) == (request.key_set is UNSET):
            guard.enter_any(tx, context, Permission.VERSION_REVOKE)
            raise errors.InvalidField("Exactly one of backend and key_set must be there.", fields={"field": "backend"})
        if request.key_set is not UNSET:
            found = guard.enter_set(tx, context, Permission.VERSION_REVOKE, request.key_set)
            return tx.keys(found.key_set.id)
        guard.enter_any(tx, context, Permission.VERSION_REVOKE)
        owners = {v.key_id for v in tx.versions() if v.backend == request.backend and _has_pair(v)}
        keys = [k for k in tx.keys(None) if k.id in owners or k.backend == request.backend]
        if not keys and request.backend not in self._control.backends.by_name:
            raise errors.BackendUnknown(f"No backend {request.backend!r} is configured, and no key was made in one.")
        for key in keys:
            guard.require(context, Permission.VERSION_REVOKE, Scope(key.key_set_id, key.id))
        return keys


def _is_to_be_disabled(key: Key, request: wire.RevocationCreate) -> bool:
    """Whether to disable the key too: by default where its next version would come from the untrusted module."""
    wanted = request.backend is not UNSET if request.disable_keys is UNSET else request.disable_keys
    return wanted and key.disabled_at is None and request.backend in (UNSET, key.backend)


def _has_pair(version: KeyVersion) -> bool:
    return version.kid is not None and version.state is not _S.DESTROYED


def _revoke_all(tx: WriteTx, key: Key, request: wire.RevocationCreate, lease: int) -> list[_RevokedVersion]:
    key_set, current = tx.key_set_by_id(key.key_set_id), tx.key_by_id(key.id)
    assert key_set is not None and current is not None
    if request.backend is not UNSET:
        # A pair that the backend is making at this moment is not trusted either: it becomes a surplus pair.
        for version in tx.versions(key_id=key.id, states={_S.CREATING}):
            if version.kid is None and version.backend == request.backend:
                tx.save(replace(version, state=_S.DESTROYED, destroyed_at=tx.now()))
    doomed = [v for v in tx.versions(key_id=key.id) if _has_pair(v) and request.backend in (UNSET, v.backend)]
    doomed.sort(key=lambda v: (_ORDER.index(v.state), v.number))
    return [_revoke(tx, key_set, current, v, request.reason, lease) for v in doomed]


def _revoke(tx: WriteTx, key_set: KeySet, key: Key, version: KeyVersion, reason: str, lease: int) -> _RevokedVersion:
    """Revoke a version unless it is revoked already."""
    changed = version.state is not _S.REVOKED
    successor = transitions.revoke(tx, key_set, key, version, reason, lease=lease) if changed else None
    visible_for = None
    if successor is not None and successor.visible_since is not None:
        visible_for = (tx.now() - successor.visible_since) // SECOND
    return _RevokedVersion(key_set, key, tx.version(version.id) or version, successor, visible_for, changed)


def _summarise(
    tx: ReadTx, done: Sequence[_RevokedVersion], disabled: Sequence[Key], request: wire.RevocationCreate, lease: int
) -> wire.Revocation:
    exposures = []
    for key_set in {d.key_set.id: d.key_set for d in done}.values():
        found = _assess_exposure(tx, [d for d in done if d.key_set.id == key_set.id], lease)
        if found is not None:
            exposures.append(wire.SetExposure(key_set=key_set.name, exposure=found))
    stopped = {d.key.id: d.key for d in done if _is_without_successor(tx, d.key)}
    return wire.Revocation(
        reason=request.reason,
        versions=[
            wire.RevokedVersion(
                key_set=d.key_set.name,
                key=d.key.name,
                version=views.version(tx, d.key, d.version),
                successor=views.version(tx, d.key, d.successor) if d.successor else None,
                successor_visible_for=d.successor_visible_for,
                changed=d.changed,
            )
            for d in done
        ],
        disabled=[views.key_place(tx, key) for key in disabled],
        without_successor=[views.key_place(tx, key) for key in stopped.values()],
        unconfirmed=[],
        exposures=exposures,
        dry_run=request.dry_run,
    )


def _is_without_successor(tx: ReadTx, key: Key) -> bool:
    return key.disabled_at is None and not tx.versions(key_id=key.id, states={_S.ACTIVE})


# --- exposure ---------------------------------------------------------------------------------------------------------


def _assess_exposure(tx: ReadTx, done: Sequence[_RevokedVersion], lease: int) -> wire.Exposure | None:
    """Which verifiers go on trusting revoked versions of one key set, by the worst of them; None for unpublished ones.

    The workers that confirm stop publishing a version within lease + 1 s after its revocation.
    """
    published = [d for d in done if d.version.published_at is not None]
    if not published:
        return None
    key_set = published[0].key_set
    left = [t for d in published if (t := d.version.retired_at or d.version.revoked_at) is not None]
    successors = [_find_successor(tx, d) for d in published]
    second = [at for _, at in successors if at is not None]
    # A successor that was never published before has a kid that is new to every verifier, so verifiers fetch the set.
    known = [t for v, at in successors if v is not None and at is not None and (t := v.visible_since or v.published_at)]
    case = exposure.Case(
        withdrawn_at=timeline.later(max(left), lease + 1),
        cache_lifetime=max(key_set.cache_lifetime, *(d.version.bounds.cache_lifetime for d in published)),
        stale_if_error=timeline.stale_if_error(
            key_set.stale_if_error,
            cache_lifetime=key_set.cache_lifetime,
            publish_leads=[k.policy.publish_lead for k in tx.keys(key_set.id)],
        ),
        has_successor=all(v is not None for v, _ in successors),
        successor_visible_since=max(known) if len(known) == len(successors) else None,
        second_rotation_at=max(second) if len(second) == len(successors) else None,
        is_retired=all(d.key.retired_at is not None for d in published),
    )
    return views.exposure(case, exposure.report(case))


def _find_successor(tx: ReadTx, done: _RevokedVersion) -> tuple[KeyVersion | None, Instant | None]:
    """Which version signs for the key now, and when a kid may sign that no copy from before the revocation holds.

    The instant is None where that is so already.
    """
    versions = tx.versions(key_id=done.key.id)
    active = next((v for v in versions if v.state is _S.ACTIVE), None)
    revoked_at = done.version.revoked_at
    assert revoked_at is not None
    # `published_at`, not `visible_since`: without the confirmation of every worker, most verifiers hold the kid anyway.
    if active is None or (active.published_at or 0) > revoked_at:
        return active, None
    waiting = [v for v in versions if v.state is _S.PUBLISHED and (v.published_at or 0) > revoked_at]
    usable = [t for v in waiting if (t := timeline.usable_at(v, done.key.policy)) is not None]
    return active, min(usable, default=timeline.later(revoked_at, done.key.policy.publish_lead))
