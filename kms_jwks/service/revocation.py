"""Revocation: one version, or every version in a backend or a key set in one transaction; rehearsed first on request.

The answer comes when no worker signs with what was revoked, and says which verifiers may go on trusting it. No module
is asked: the custodian destroys the key pairs when their module answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from msgspec import UNSET

from kms_jwks import errors, exposure, jose, timeline, wire
from kms_jwks.access import Permission, Scope
from kms_jwks.custodian import transitions
from kms_jwks.model import SECOND, Epoch, ExternalKey, Id, Instant, Key, KeySet, KeyVersion, VersionState
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


@dataclass(frozen=True, slots=True)
class _AffectedKey:
    """An external key that was withdrawn, or that stays. `same_key_as`: the kid of the revoked version that it is."""

    key_set: KeySet
    external: ExternalKey
    same_key_as: str | None


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
            copies = _withdraw_copies(tx, [done], request.reason, found.caller.client, within=found.key_set.id)
            answer = wire.Revoked(
                version=views.version(tx, done.key, done.version),
                successor=views.version(tx, done.key, done.successor) if done.successor else None,
                successor_visible_for=done.successor_visible_for,
                without_successor=_is_without_successor(tx, done.key),
                changed=done.changed,
                unconfirmed=[],
                exposure=_assess_exposure(tx, [done], lease, with_copies=bool(copies)),
                dry_run=request.dry_run,
                external_keys=_affected(tx, copies),
                same_key=_find_same_keys(tx, [done], copies),
            )
            epoch = tx.epoch()
        if not request.dry_run:
            answer.unconfirmed = self._wait_for_workers(tx.committed_epoch or epoch, lease)
        return answer

    def revoke_scope(self, context: RequestContext, request: wire.RevocationCreate) -> wire.Revocation:
        """Revoke every version with a key pair in a backend, or of a key set: all in one transaction, or none.

        A backend's key pairs are revoked wherever they are known: as copies in other backends, and as external keys.
        Of a key set, external keys are withdrawn where they are a revoked key, and on request all of them. Needs the
        permission for each key and key set it touches. It can be repeated like the revocation of one version.
        """
        with self._begin(dry_run=request.dry_run) as tx:
            lease = self._control.confirmation.lease(tx)
            keys = self._find_keys(tx, context, request)
            disabled = [k for k in keys if _is_to_be_disabled(k, request)]
            for key in disabled:
                tx.save(replace(key, disabled_at=tx.now(), updated_at=tx.now(), revision=key.revision + 1))
            doomed = _doomed_keys(tx, request)
            done = [d for key in keys for d in _revoke_all(tx, key, request, lease, doomed)]
            externals = self._withdraw_externals(tx, context, request, done)
            answer = _summarise(tx, done, disabled, request, lease, externals)
            epoch = tx.epoch()
        if not request.dry_run:
            answer.unconfirmed = self._wait_for_workers(tx.committed_epoch or epoch, lease)
        return answer

    # --- inside

    def _withdraw_externals(
        self, tx: WriteTx, context: RequestContext, request: wire.RevocationCreate, done: Sequence[_RevokedVersion]
    ) -> list[_AffectedKey]:
        """Withdraw the external keys that the revocation reaches; with a key set, those that stay are listed too."""
        assert context.caller is not None
        who = context.caller.client
        if request.key_set is UNSET:
            copies = _withdraw_copies(tx, done, request.reason, who)
            for key_set_id in {c.external.key_set_id for c in copies}:
                self._control.guard.require(context, Permission.VERSION_REVOKE, Scope(key_set_id))
            return copies
        key_set = tx.key_set(request.key_set)
        assert key_set is not None
        copies = _withdraw_copies(tx, done, request.reason, who, within=key_set.id)
        others = tx.external_keys(key_set.id)
        if request.external_keys:
            others = [
                transitions.withdraw_external(tx, e, "revoked", who=who, revoke_reason=request.reason) for e in others
            ]
        return [*copies, *(_AffectedKey(key_set, e, None) for e in others)]

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
        if request.external_keys and request.key_set is UNSET:
            guard.enter_any(tx, context, Permission.VERSION_REVOKE)
            raise errors.InvalidField(
                "external_keys: it goes with key_set",
                next_step="Leave it out: external keys that are a key of the backend are withdrawn anyway, the others "
                "are in no backend.",
                fields={"field": "external_keys"},
            )
        if request.key_set is not UNSET:
            found = guard.enter_set(tx, context, Permission.VERSION_REVOKE, request.key_set)
            return tx.keys(found.key_set.id)
        guard.enter_any(tx, context, Permission.VERSION_REVOKE)
        doomed = _doomed_keys(tx, request)
        owners = {v.key_id for v in tx.versions() if _has_pair(v) and _is_doomed(v, request, doomed)}
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


def _doomed_keys(tx: ReadTx, request: wire.RevocationCreate) -> frozenset[str]:
    """The thumbprints of the key pairs in the backend that is revoked: a copy in another backend is the same key."""
    if request.backend is UNSET:
        return frozenset()
    return frozenset(
        jose.thumbprint(v.public_jwk or {}) for v in tx.versions() if v.backend == request.backend and _has_pair(v)
    )


def _is_doomed(version: KeyVersion, request: wire.RevocationCreate, doomed: frozenset[str]) -> bool:
    return request.backend in (UNSET, version.backend) or jose.thumbprint(version.public_jwk or {}) in doomed


def _revoke_all(
    tx: WriteTx, key: Key, request: wire.RevocationCreate, lease: int, doomed_keys: frozenset[str]
) -> list[_RevokedVersion]:
    key_set, current = tx.key_set_by_id(key.key_set_id), tx.key_by_id(key.id)
    assert key_set is not None and current is not None
    if request.backend is not UNSET:
        # A pair that the backend is making at this moment is not trusted either: it becomes a surplus pair.
        for version in tx.versions(key_id=key.id, states={_S.CREATING}):
            if version.kid is None and version.backend == request.backend:
                tx.save(replace(version, state=_S.DESTROYED, destroyed_at=tx.now()))
    doomed = [v for v in tx.versions(key_id=key.id) if _has_pair(v) and _is_doomed(v, request, doomed_keys)]
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


def _withdraw_copies(
    tx: WriteTx, done: Sequence[_RevokedVersion], reason: str, who: str, *, within: Id | None = None
) -> list[_AffectedKey]:
    """Withdraw the external keys that are the public key of a revoked version, `within` one key set or everywhere.

    Otherwise verifiers would go on accepting what the revoked key signs, under the external key's kid.
    """
    found = []
    for each in done:
        assert each.version.public_jwk is not None
        for external in tx.external_keys(within, public_jwk=each.version.public_jwk):
            gone = transitions.withdraw_external(tx, external, "revoked", who=who, revoke_reason=reason)
            owner = tx.key_set_by_id(external.key_set_id)
            assert owner is not None
            found.append(_AffectedKey(owner, gone, each.version.kid))
    return found


def _affected(tx: ReadTx, found: Sequence[_AffectedKey]) -> list[wire.AffectedExternalKey]:
    return [
        wire.AffectedExternalKey(
            key_set=f.key_set.name,
            kid=f.external.kid,
            alg=f.external.alg,
            remove_at=to_datetime(f.external.remove_at),
            withdrawn=f.external.removed_at is not None,
            same_key_as=f.same_key_as,
        )
        for f in found
    ]


def _find_same_keys(
    tx: ReadTx, done: Sequence[_RevokedVersion], externals: Sequence[_AffectedKey]
) -> list[wire.SameKey]:
    """Where a public key that was revoked is still published or in use."""
    gone = [d.version for d in done]
    withdrawn = [f.external for f in externals if f.external.removed_at is not None]
    found: dict[Id, wire.SameKey] = {}
    holders: list[KeyVersion | ExternalKey] = [*gone, *withdrawn]
    for revoked in holders:
        for other in views.same_key(tx, revoked):
            if other.revoked_at is not None:
                continue
            owner = tx.key_set_by_id(other.key_set_id)
            key = tx.key_by_id(other.key_id) if isinstance(other, KeyVersion) else None
            assert owner is not None and other.kid is not None
            found[other.id] = wire.SameKey(
                key_set=owner.name,
                key=key.name if key else None,
                kid=other.kid,
                state=other.state.value if isinstance(other, KeyVersion) else "external",
                same_key_as=revoked.kid or "",
            )
    return list(found.values())


def _summarise(
    tx: ReadTx,
    done: Sequence[_RevokedVersion],
    disabled: Sequence[Key],
    request: wire.RevocationCreate,
    lease: int,
    externals: Sequence[_AffectedKey],
) -> wire.Revocation:
    exposures = []
    withdrawn = [f for f in externals if f.external.removed_at is not None]
    touched = [d.key_set for d in done] + [f.key_set for f in withdrawn]
    for key_set in {s.id: s for s in touched}.values():
        with_copies = any(f.key_set.id == key_set.id for f in withdrawn)
        found = _assess_exposure(tx, [d for d in done if d.key_set.id == key_set.id], lease, with_copies=with_copies)
        if found is None and with_copies:
            found = _assess_withdrawal(tx, key_set, lease)
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
        external_keys=_affected(tx, externals),
        same_key=_find_same_keys(tx, done, externals),
    )


def _is_without_successor(tx: ReadTx, key: Key) -> bool:
    return key.disabled_at is None and not tx.versions(key_id=key.id, states={_S.ACTIVE})


# --- exposure ---------------------------------------------------------------------------------------------------------


def _assess_exposure(
    tx: ReadTx, done: Sequence[_RevokedVersion], lease: int, *, with_copies: bool
) -> wire.Exposure | None:
    """Which verifiers go on trusting revoked versions of one key set, by the worst of them; None for unpublished ones.

    The workers that confirm stop publishing a version within lease + 1 s after its revocation. `with_copies`: external
    keys of the set were withdrawn now, also where the versions left the JWKS long ago.
    """
    published = [d for d in done if d.version.published_at is not None]
    if not published:
        return None
    key_set = published[0].key_set
    left = [t for d in published if (t := d.version.retired_at or d.version.revoked_at) is not None]
    left += [tx.now()] if with_copies else []
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


def _assess_withdrawal(tx: ReadTx, key_set: KeySet, lease: int) -> wire.Exposure:
    """The same for a key set of which external keys alone were withdrawn; they have no successor."""
    case = exposure.Case(
        withdrawn_at=timeline.later(tx.now(), lease + 1),
        cache_lifetime=key_set.cache_lifetime,
        stale_if_error=timeline.stale_if_error(
            key_set.stale_if_error,
            cache_lifetime=key_set.cache_lifetime,
            publish_leads=[k.policy.publish_lead for k in tx.keys(key_set.id)],
        ),
        has_successor=False,
        successor_visible_since=None,
        second_rotation_at=None,
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
