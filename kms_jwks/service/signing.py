"""The signing path: authorise and prepare, sign in the module, look once more, answer. No database, no web framework.

`prepare` is pure and quick; `Backends.sign` may wait; `_check` looks at the lease and the version again under the
snapshot of that moment, so that nothing leaves that a revocation has overtaken.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from kms_jwks import errors, jose, wire
from kms_jwks.access import Permission
from kms_jwks.backends.calling import Backends
from kms_jwks.model import SECOND, Instant, Purpose
from kms_jwks.service.context import RequestContext
from kms_jwks.service.guard import Guard
from kms_jwks.service.preparation import Found, Preparer, SigningOperation, active_of, check_handover, preparer_of
from kms_jwks.times import to_datetime
from kms_jwks.worker.snapshot import Signer, Snapshot
from kms_jwks.worker.sync import RegistrySync

BATCH_SECONDS = 20
"""How long a batch may take; what is not signed by then is answered with an error each."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Answers in the order of the items; an item that failed has its error in its place."""

    items: list[wire.Answer | errors.Error]


class Signing:
    """The data plane's use cases that sign."""

    def __init__(self, watcher: RegistrySync, guard: Guard, backends: Backends) -> None:
        self._sync = watcher
        self._guard = guard
        self._backends = backends

    def handle(
        self, operation: SigningOperation, context: RequestContext, key_set: str, key: str, body: Mapping[str, object]
    ) -> wire.Answer | Batch:
        """Sign what `body` asks for, one item or ``{"batch": […]}``.

        Raises every error of a single call; in a batch, an item's error stands in its place, and only what concerns
        the whole call is raised.
        """
        call = _Call(operation, context, key_set, key)
        snapshot = self._sync.snapshot()
        found_set, found_key = self._admit(call, snapshot)
        self._sync.leased()
        prepare = preparer_of(operation, found_set.purpose)
        if not found_key.enabled:
            raise errors.KeyDisabled(f"Key {key!r} of key set {key_set!r} is disabled.")
        if "batch" not in body:
            return self._one(call, snapshot, prepare, body)[1]
        if set(body) != {"batch"}:
            raise errors.InvalidField("A batch stands alone in its body.", fields={"field": "batch"})
        items = body["batch"]
        if not isinstance(items, list) or not 1 <= len(items) <= wire.MAX_BATCH:
            raise errors.InvalidBatch(f"A batch is a list of 1 to {wire.MAX_BATCH} items.")
        return self._many(call, snapshot, prepare, items)

    def active(self, context: RequestContext, key_set: str, key: str) -> wire.Active:
        """Which version signs now and which comes next: what a caller that pins the kid needs."""
        now = self._sync.clock.now()
        _, found = self._guard.admit_key(
            self._sync.snapshot(), context, lambda _: Permission.KEY_READ, key_set, key, now
        )
        signer = active_of(found)
        coming = None
        if found.standby is not None:
            kid, not_before = found.standby
            coming = wire.NextVersion(kid=kid, not_before=to_datetime(not_before) if not_before is not None else None)
        return wire.Active(
            kid=signer.kid,
            alg=signer.alg.name,
            public_jwk=jose.published_jwk(signer.public_jwk, alg=signer.alg.name, kid=signer.kid),
            next=coming,
            refresh_after=to_datetime(Instant(now + found.handover * SECOND)),
        )

    # --- inside

    def _admit(self, call: _Call, snapshot: Snapshot) -> Found:
        return self._guard.admit_key(
            snapshot,
            call.context,
            lambda s: _permission(call.operation, s.purpose),
            call.key_set,
            call.key,
            self._sync.clock.now(),
        )

    def _one(self, call: _Call, snapshot: Snapshot, prepare: Preparer, item: object) -> tuple[Signer, wire.Answer]:
        """Prepare, sign, look again. A call that pinned nothing follows a rotation or revocation that overtook it."""
        for last in (False, False, True):
            found = _found(snapshot, call)
            job = prepare(*found, item, self._sync.clock.now())
            signature = self._backends.sign(job.signer, job.what)
            try:
                self._check(call, snapshot, job.signer)
            except errors.KidNotActive:
                if job.pinned or last:
                    raise
                snapshot = self._sync.leased()
                self._admit(call, snapshot)
                continue
            return job.signer, job.answer(signature)
        raise errors.InternalError  # unreachable: the last round returns or raises

    def _many(self, call: _Call, snapshot: Snapshot, prepare: Preparer, items: list[object]) -> Batch:
        results: list[tuple[Signer, wire.Answer] | errors.Error] = []
        stopped: errors.BackendError | None = None
        end = time.monotonic() + BATCH_SECONDS
        for item in items:
            try:
                if stopped is None and time.monotonic() > end:
                    stopped = errors.BackendTimeout(f"The batch took more than {BATCH_SECONDS} s; send smaller ones.")
                if stopped is not None:
                    raise stopped
                results.append(self._one(call, snapshot, prepare, item))
            except errors.BackendError as error:
                # The rest of the batch does not wait for a module that has just failed.
                stopped = error
                results.append(error)
            except (errors.Unavailable, errors.Unauthenticated, errors.Forbidden):
                raise
            except errors.Error as error:
                results.append(error)
        return Batch([self._still_good(call, snapshot, result) for result in results])

    def _still_good(
        self, call: _Call, snapshot: Snapshot, result: tuple[Signer, wire.Answer] | errors.Error
    ) -> wire.Answer | errors.Error:
        if isinstance(result, errors.Error):
            return result
        try:
            self._check(call, snapshot, result[0])
        except errors.Conflict as error:
            return error
        return result[1]

    def _check(self, call: _Call, admitted_by: Snapshot, signed_by: Signer) -> None:
        """The second look under the snapshot of this moment: lease, caller, version.

        Raises RegistryStale, Unauthenticated, Forbidden, Conflict.
        """
        snapshot = self._sync.leased()
        if snapshot is admitted_by:
            return
        self._admit(call, snapshot)
        found = snapshot.signers.get(signed_by.kid)
        if found is None:
            raise errors.KidNotActive("The version was withdrawn while its signature was being made.")
        key, signer = found
        if not key.enabled:
            raise errors.KeyDisabled(f"Key {key.name!r} was disabled while the signature was being made.")
        if signer.until is not None:
            # Rotated meanwhile: within the handover the answer is as good as a pinned one.
            check_handover(signer, key, self._sync.clock.now())


@dataclass(frozen=True, slots=True)
class _Call:
    """Who asks for what: enough to admit it again under another snapshot."""

    operation: SigningOperation
    context: RequestContext
    key_set: str
    key: str


def _found(snapshot: Snapshot, call: _Call) -> Found:
    key_set = snapshot.key_sets[call.key_set]
    return key_set, key_set.keys[call.key]


def _permission(operation: SigningOperation, purpose: Purpose) -> Permission:
    if operation is SigningOperation.JWT:
        return Permission.JWT_SIGN
    if operation is SigningOperation.JWS:
        return Permission.JWS_SIGN
    return Permission.JWT_SIGN if purpose is Purpose.JWT else Permission.RAW_SIGN
