"""Revocation: one version, or everything in a backend or a key set in one transaction; rehearsed first if asked to.

The answer comes when no worker anywhere signs with what was revoked, and says who may go on trusting it. Nothing here
needs a module: the destruction of the pairs follows when their module answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from msgspec import UNSET

from kms_jwks import errors, exposure, timeline, wire
from kms_jwks.access import Permission, Scope
from kms_jwks.custodian import transitions
from kms_jwks.model import SECOND, Epoch, Instant, Key, KeySet, KeyVersion, VersionState, Worker
from kms_jwks.service import views
from kms_jwks.service.context import RequestContext
from kms_jwks.service.control import Control, find_version
from kms_jwks.store import ReadTx, WriteTx
from kms_jwks.times import to_datetime

T = TypeVar("T")
_S = VersionState
_ORDER = (_S.CREATING, _S.PUBLISHED, _S.RETIRING, _S.RETIRED, _S.REVOKED, _S.ACTIVE)
"""The active version last, so that no version that is about to be revoked becomes its successor."""


class _Rehearsed(Exception):
    """Ends the transaction of a dry run."""


@dataclass(frozen=True, slots=True)
class _Done:
    """One version that is revoked, in the transaction that did it."""

    key_set: KeySet
    key: Key
    version: KeyVersion
    successor: KeyVersion | None
    visible_for: int | None
    changed: bool


class Revocation:
    """For operators, in an emergency."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def version(
        self, context: RequestContext, key_set: str, key: str, version: str, request: wire.RevokeRequest
    ) -> wire.Revoked:
        """Revoke one version now.

        Said again of a version that is revoked already, it changes nothing and waits as before: who lost the first
        answer gets the same certainty.
        """
        control = self._control

        def step(tx: WriteTx) -> tuple[wire.Revoked, int]:
            found = control.guard.enter_key(tx, context, Permission.VERSION_REVOKE, key_set, key)
            lease = control.confirmation.lease(tx)
            done = _revoke(tx, found.key_set, found.key, find_version(tx, found.key, version), request.reason, lease)
            answer = wire.Revoked(
                version=views.version(done.key, done.version),
                successor=views.version(done.key, done.successor) if done.successor else None,
                successor_visible_for=done.visible_for,
                without_successor=_is_without_successor(tx, done.key),
                changed=done.changed,
                unconfirmed=[],
                exposure=_exposure(tx, [done], lease),
                dry_run=request.dry_run,
            )
            return answer, lease

        (answer, lease), epoch = self._run(step, dry_run=request.dry_run)
        if epoch is not None:
            answer.unconfirmed = _unconfirmed(control.confirmation.wait_until_confirmed(epoch, lease))
        return answer

    def everything(self, context: RequestContext, request: wire.RevocationCreate) -> wire.Revocation:
        """Revoke every version with a key pair in a backend, or of a key set: all in one transaction, or none.

        Needs the permission for each key it touches. Can be repeated as the revocation of one version can.
        """
        control = self._control

        def step(tx: WriteTx) -> tuple[wire.Revocation, int]:
            lease = control.confirmation.lease(tx)
            touched = self._touched(tx, context, request)
            disabled = [k for k in touched if self._is_to_be_disabled(k, request)]
            for key in disabled:
                tx.save(replace(key, disabled_at=tx.now(), updated_at=tx.now(), revision=key.revision + 1))
            done = [d for key in touched for d in _revoke_all(tx, key, request, lease)]
            return _summary(tx, done, disabled, request, lease), lease

        (answer, lease), epoch = self._run(step, dry_run=request.dry_run)
        if epoch is not None:
            answer.unconfirmed = _unconfirmed(control.confirmation.wait_until_confirmed(epoch, lease))
        return answer

    # --- inside

    def _run(self, step: Callable[[WriteTx], T], *, dry_run: bool) -> tuple[T, Epoch | None]:
        """`step` in a transaction, with the epoch to be confirmed; after a dry run nothing has changed."""
        answer: list[T] = []
        try:
            with self._control.store.write() as tx:
                answer.append(step(tx))
                here = tx.epoch()
                if dry_run:
                    raise _Rehearsed
        except _Rehearsed:
            return answer[0], None
        return answer[0], tx.committed_epoch or here

    def _touched(self, tx: ReadTx, context: RequestContext, request: wire.RevocationCreate) -> list[Key]:
        """The keys that have something to revoke, each with the caller's right to do it."""
        guard = self._control.guard
        if (request.backend is UNSET) == (request.key_set is UNSET):
            guard.enter_any(tx, context, Permission.VERSION_REVOKE)
            raise errors.InvalidField("Exactly one of backend and key_set must be there.", fields={"field": "backend"})
        if request.key_set is not UNSET:
            found = guard.enter_set(tx, context, Permission.VERSION_REVOKE, request.key_set)
            return tx.keys(found.key_set.id)
        guard.enter_any(tx, context, Permission.VERSION_REVOKE)
        owners = {v.key_id for v in tx.versions() if v.backend == request.backend and _has_pair(v)}
        touched = [k for k in tx.keys(None) if k.id in owners or k.backend == request.backend]
        if not touched and request.backend not in self._control.backends.by_name:
            raise errors.BackendUnknown(f"No backend {request.backend!r} is configured, and no key was made in one.")
        for key in touched:
            guard.require(context, Permission.VERSION_REVOKE, Scope(key.key_set_id, key.id))
        return touched

    def _is_to_be_disabled(self, key: Key, request: wire.RevocationCreate) -> bool:
        """A key whose next version would come from the very module that is not trusted."""
        wanted = request.backend is not UNSET if request.disable_keys is UNSET else request.disable_keys
        if not wanted or key.disabled_at is not None:
            return False
        return request.backend in (UNSET, key.backend)


def _has_pair(version: KeyVersion) -> bool:
    return version.kid is not None and version.state is not _S.DESTROYED


def _revoke_all(tx: WriteTx, key: Key, request: wire.RevocationCreate, lease: int) -> list[_Done]:
    key_set, current = tx.key_set_by_id(key.key_set_id), tx.key_by_id(key.id)
    assert key_set is not None and current is not None
    if request.backend is not UNSET:
        # A pair that is being made there right now is no better: it is surplus when it comes.
        for version in tx.versions(key_id=key.id, states={_S.CREATING}):
            if version.kid is None and version.backend == request.backend:
                tx.save(replace(version, state=_S.DESTROYED, destroyed_at=tx.now()))
    doomed = [v for v in tx.versions(key_id=key.id) if _has_pair(v) and request.backend in (UNSET, v.backend)]
    doomed.sort(key=lambda v: (_ORDER.index(v.state), v.number))
    return [_revoke(tx, key_set, current, v, request.reason, lease) for v in doomed]


def _revoke(tx: WriteTx, key_set: KeySet, key: Key, version: KeyVersion, reason: str, lease: int) -> _Done:
    """Revoke a version unless it is revoked already."""
    changed = version.state is not _S.REVOKED
    successor = None
    if changed:
        successor = transitions.revoke(tx, key_set, key, version, reason, lease=lease)
    visible = None
    if successor is not None and successor.visible_since is not None:
        visible = (tx.now() - successor.visible_since) // SECOND
    return _Done(key_set, key, tx.version(version.id) or version, successor, visible, changed)


def _summary(
    tx: ReadTx, done: Sequence[_Done], disabled: Sequence[Key], request: wire.RevocationCreate, lease: int
) -> wire.Revocation:
    sets = {d.key_set.id: d.key_set for d in done}
    exposures = []
    for set_id, key_set in sets.items():
        found = _exposure(tx, [d for d in done if d.key_set.id == set_id], lease)
        if found is not None:
            exposures.append(wire.SetExposure(key_set=key_set.name, exposure=found))
    stopped = {d.key.id: d.key for d in done if _is_without_successor(tx, d.key)}
    return wire.Revocation(
        reason=request.reason,
        versions=[
            wire.RevokedVersion(
                key_set=d.key_set.name,
                key=d.key.name,
                version=views.version(d.key, d.version),
                successor=views.version(d.key, d.successor) if d.successor else None,
                successor_visible_for=d.visible_for,
                changed=d.changed,
            )
            for d in done
        ],
        disabled=[_place(tx, key) for key in disabled],
        without_successor=[_place(tx, key) for key in stopped.values()],
        unconfirmed=[],
        exposures=exposures,
        dry_run=request.dry_run,
    )


def _is_without_successor(tx: ReadTx, key: Key) -> bool:
    return key.disabled_at is None and not tx.versions(key_id=key.id, states={_S.ACTIVE})


def _place(tx: ReadTx, key: Key) -> wire.KeyPlace:
    owner = tx.key_set_by_id(key.key_set_id)
    assert owner is not None
    return wire.KeyPlace(key_set=owner.name, key=key.name)


def _unconfirmed(workers: Sequence[Worker]) -> list[wire.UnconfirmedWorker]:
    return [wire.UnconfirmedWorker(worker=w.id, node=w.node, heartbeat_at=to_datetime(w.heartbeat_at)) for w in workers]


# --- exposure ---------------------------------------------------------------------------------------------------------


def _exposure(tx: ReadTx, done: Sequence[_Done], lease: int) -> wire.Exposure | None:
    """What the revocation of versions of one key set leaves open, by the worst of them; None for unpublished ones."""
    shown = [d for d in done if d.version.published_at is not None]
    if not shown:
        return None
    key_set = shown[0].key_set
    heirs = [_heir(tx, d) for d in shown]
    second = [at for _, at in heirs if at is not None]
    # Where one key's successor was never published before, its kid is new to everybody, and they fetch the whole set.
    known = [t for h, at in heirs if h is not None and at is not None and (t := h.visible_since or h.published_at)]
    case = exposure.Case(
        withdrawn_at=max(_withdrawn_at(d.version, lease) for d in shown),
        cache_lifetime=max(key_set.cache_lifetime, *(d.version.bounds.cache_lifetime for d in shown)),
        stale_if_error=timeline.stale_if_error(
            key_set.stale_if_error,
            cache_lifetime=key_set.cache_lifetime,
            publish_leads=[k.policy.publish_lead for k in tx.keys(key_set.id)],
        ),
        has_successor=all(h is not None for h, _ in heirs),
        successor_visible_since=max(known) if len(known) == len(heirs) else None,
        second_rotation_at=max(second) if len(second) == len(heirs) else None,
    )
    return views.exposure(case, exposure.report(case))


def _withdrawn_at(version: KeyVersion, lease: int) -> Instant:
    """When every worker that confirms has stopped publishing it."""
    left = version.retired_at or version.revoked_at
    assert left is not None
    return timeline.later(left, lease + 1)


def _heir(tx: ReadTx, done: _Done) -> tuple[KeyVersion | None, Instant | None]:
    """Who signs for the key now, and when a kid may sign that no copy from before the revocation can hold."""
    versions = tx.versions(key_id=done.key.id)
    active = next((v for v in versions if v.state is _S.ACTIVE), None)
    revoked_at = done.version.revoked_at
    assert revoked_at is not None
    if active is None or (active.published_at or 0) > revoked_at:
        # Where some worker does not confirm, it was never visible everywhere, and most verifiers hold it all the same.
        return active, None
    waiting = [v for v in versions if v.state is _S.PUBLISHED and (v.published_at or 0) > revoked_at]
    known = [t for v in waiting if (t := timeline.usable_at(v, done.key.policy)) is not None]
    return active, min(known, default=timeline.later(revoked_at, done.key.policy.publish_lead))
