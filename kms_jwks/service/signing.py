"""The signing path: prepare, submit, finish. No database, no web framework.

`prepare` authorises the call and makes plain data of it. `submit` asks the module; it alone may take long, so it is
waited for, by a thread or by an event loop. `finish` checks lease, caller and version once more, under the snapshot of
that moment, and builds the answer: a revocation that overtook the signature keeps it back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Protocol

from kms_jwks import errors, jose, wire
from kms_jwks.access import Permission, Scope, allow
from kms_jwks.backends.calling import Backends, PendingSignature
from kms_jwks.model import SECOND, Instant, Purpose
from kms_jwks.service.guard import Guard, RequestContext
from kms_jwks.service.signing_job import (
    Preparer,
    SigningJob,
    SigningOperation,
    active_of,
    check_handover,
    finish,
    preparer_of,
)
from kms_jwks.times import to_datetime
from kms_jwks.worker.snapshot import PublishedSet, SigningKey, Snapshot
from kms_jwks.worker.sync import RegistrySync

BATCH_SECONDS = 20
"""How long a batch may take; an item that is not signed by then is answered with an error."""


class Pending(Protocol):
    """Something that has to be waited for before the next step."""

    def wait(self) -> None:
        """Block until it has ended, well or not, or is late."""

    def on_done(self, callback: Callable[[], object]) -> None:
        """Have `callback` called when it has ended, from another thread or at once; it must not block."""


class Ticket(Pending, Protocol):
    """The record of a signature on its way to durable storage."""

    def result(self) -> object:
        """Return once the record is durable; raise Unavailable where it is not: then no answer leaves."""


Recorder = Callable[[RequestContext, SigningJob], Ticket]
"""Told of every signature between its making and its answer."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Answers in the order of the items; an item that failed has its error in its place."""

    items: list[wire.Answer | errors.Error]


Steps = Generator[Pending, None, wire.Answer | Batch]
"""Yields whatever has to be waited for before it is resumed; returns the answer."""


class Signing:
    """The data plane's use cases that sign."""

    def __init__(self, sync: RegistrySync, guard: Guard, backends: Backends, record: Recorder | None = None) -> None:
        self._sync = sync
        self._guard = guard
        self._backends = backends
        self._record = record

    def handle(
        self, operation: SigningOperation, context: RequestContext, key_set: str, key: str, body: Mapping[str, object]
    ) -> wire.Answer | Batch:
        """Take the steps in this thread. Raises what they raise."""
        steps = self.steps(operation, context, key_set, key, body)
        while True:
            try:
                pending = next(steps)
            except StopIteration as end:
                answer: wire.Answer | Batch = end.value
                return answer
            pending.wait()

    def steps(
        self, operation: SigningOperation, context: RequestContext, key_set: str, key: str, body: Mapping[str, object]
    ) -> Steps:
        """Sign what `body` asks for, one item or ``{"batch": […]}``.

        Raises every error of a single call; in a batch, an item's error stands in its place, and only what concerns
        the whole call is raised.
        """
        call = _Call(operation, context, key_set, key)
        snapshot = self._sync.complete_snapshot()
        found_set, found_key = self._admit(call, snapshot)
        self._sync.leased()
        prepare = preparer_of(operation, found_set.purpose)
        if found_key.retired:
            raise errors.KeyRetired(f"Key {key!r} of key set {key_set!r} is retired.")
        if not found_key.enabled:
            raise errors.KeyDisabled(f"Key {key!r} of key set {key_set!r} is disabled.")
        if "batch" not in body:
            made = yield from self._make(_Attempt(call, prepare, snapshot, found_key), body, wait=True)
            return finish(made.job, made.signature)
        if set(body) != {"batch"}:
            raise errors.InvalidField("A batch stands alone in its body.", fields={"field": "batch"})
        items = body["batch"]
        if not isinstance(items, list) or not 1 <= len(items) <= wire.MAX_BATCH:
            raise errors.InvalidBatch(f"A batch is a list of 1 to {wire.MAX_BATCH} items.")
        return (yield from self._many(_Attempt(call, prepare, snapshot, found_key), items))

    def active(self, context: RequestContext, key_set: str, key: str) -> wire.Active:
        """Which version signs now and which comes next: what a caller that pins the kid needs."""
        now = self._sync.clock.now()
        _, found = self._guard.admit_key(
            self._sync.complete_snapshot(), context, lambda _: Permission.KEY_READ, key_set, key, now
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
            # A kid that is deactivated right after this answer is honoured for the handover. Half of it is left for the
            # caller's next look, and for signing with what it saw before.
            refresh_after=to_datetime(Instant(now + found.handover * SECOND // 2)),
        )

    def refuse_early(self, operation: SigningOperation, context: RequestContext, key_set: str, key: str) -> None:
        """Raise before a body is read what `steps` would raise after it where no grant lets the caller sign here.

        `context.caller` is known. A caller that may sign is not reported: `steps` admits it under the snapshot it uses.
        Raises Forbidden, KeySetNotFound, KeyNotFound.
        """
        assert context.caller is not None
        snapshot = self._sync.snapshot()
        found = snapshot.key_sets.get(key_set)
        found_key = found.keys.get(key) if found else None
        if found and found_key:
            permission = _PERMISSIONS[operation, found.purpose]
            if allow(context.caller.grants, permission, Scope(found.id, found_key.id)):
                return
        self._admit(_Call(operation, context, key_set, key), snapshot)

    # --- inside

    def _admit(self, call: _Call, snapshot: Snapshot) -> tuple[PublishedSet, SigningKey]:
        return self._guard.admit_key(
            snapshot,
            call.context,
            lambda key_set: _PERMISSIONS[call.operation, key_set.purpose],
            call.key_set,
            call.key,
            self._sync.clock.now(),
        )

    def _make(self, attempt: _Attempt, item: object, *, wait: bool) -> Generator[Pending, None, _Made]:
        """Prepare one item, have it signed and recorded, and check it; with `wait` its record is durable then.

        A call that pinned no kid follows a rotation or revocation that overtook it.
        """
        context = attempt.call.context
        for last in (False, False, True):
            self._sync.clock.require_agreement(attempt.key.rules.clock_skew)
            job = attempt.prepare(attempt.key, item, self._sync.clock.now())
            context.backend = job.signer.backend
            signature = self._backends.submit(job.signer, job.what)
            if not isinstance(signature, bytes):
                signature = yield from _result(signature)
            made = _Made(job, signature, self._record(context, job) if self._record is not None else None)
            if wait and made.ticket is not None:
                yield made.ticket
                made.ticket.result()
            latest = self._sync.leased()
            if latest is attempt.snapshot:
                return made
            try:
                self._check(attempt, job, latest)
            except errors.KidNotActive:
                if job.pinned or last:
                    raise
                snapshot = self._sync.leased()
                attempt = _Attempt(attempt.call, attempt.prepare, snapshot, self._admit(attempt.call, snapshot)[1])
                continue
            return made
        raise errors.InternalError  # unreachable: the last round returns or raises

    def _many(self, attempt: _Attempt, items: list[object]) -> Generator[Pending, None, Batch]:
        results: list[_Made | errors.Error] = []
        stopped: errors.BackendError | None = None
        end = time.monotonic() + BATCH_SECONDS
        for item in items:
            try:
                if stopped is None and time.monotonic() > end:
                    stopped = errors.BackendTimeout(f"The batch took more than {BATCH_SECONDS} s; send smaller ones.")
                if stopped is not None:
                    raise stopped
                results.append((yield from self._make(attempt, item, wait=False)))
            except errors.BackendError as error:
                # The rest of the batch does not wait for a module that has just failed.
                stopped = error
                results.append(error)
            except (errors.Unavailable, errors.Unauthenticated, errors.Forbidden):
                raise
            except errors.Error as error:
                results.append(error)
        for result in results:
            if isinstance(result, _Made) and result.ticket is not None:
                yield result.ticket
                result.ticket.result()
        return Batch([self._checked(attempt, result) for result in results])

    def _checked(self, attempt: _Attempt, result: _Made | errors.Error) -> wire.Answer | errors.Error:
        if isinstance(result, errors.Error):
            return result
        try:
            self._check(attempt, result.job, self._sync.leased())
        except errors.Conflict as error:
            return error
        return finish(result.job, result.signature)

    def _check(self, attempt: _Attempt, job: SigningJob, snapshot: Snapshot) -> None:
        """Check caller and version under `snapshot`, this moment's. Raises Unauthenticated, Forbidden, Conflict."""
        if snapshot is attempt.snapshot:
            return
        self._admit(attempt.call, snapshot)
        found = snapshot.signers.get((attempt.key.id, job.signer.kid))
        if found is None:
            raise errors.KidNotActive("The version was withdrawn while its signature was being made.")
        key, signer = found
        if key.retired:
            raise errors.KeyRetired(f"Key {key.name!r} was retired while the signature was being made.")
        if not key.enabled:
            raise errors.KeyDisabled(f"Key {key.name!r} was disabled while the signature was being made.")
        if signer.until is not None:
            # Rotated meanwhile: within the handover the answer is as good as a pinned one.
            check_handover(signer, key, self._sync.clock.now())


@dataclass(frozen=True, slots=True)
class _Call:
    """One request: enough to admit it again under another snapshot."""

    operation: SigningOperation
    context: RequestContext
    key_set: str
    key: str


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A call that was admitted under `snapshot`, and what that snapshot says of its key."""

    call: _Call
    prepare: Preparer
    snapshot: Snapshot
    key: SigningKey


@dataclass(frozen=True, slots=True)
class _Made:
    """A signature that was made and must not leave before `ticket` is durable and `_check` has passed."""

    job: SigningJob
    signature: bytes
    ticket: Ticket | None


def _result(pending: PendingSignature) -> Generator[Pending, None, bytes]:
    try:
        yield pending
    except GeneratorExit:
        pending.give_up()  # the driver was cancelled
        raise
    return pending.result()


_PERMISSIONS: Mapping[tuple[SigningOperation, Purpose], Permission] = {
    (SigningOperation.JWT, Purpose.JWT): Permission.JWT_SIGN,
    (SigningOperation.JWT, Purpose.RAW): Permission.JWT_SIGN,
    (SigningOperation.JWS, Purpose.JWT): Permission.JWS_SIGN,
    (SigningOperation.JWS, Purpose.RAW): Permission.JWS_SIGN,
    (SigningOperation.SIGNATURE, Purpose.JWT): Permission.JWT_SIGN,
    (SigningOperation.SIGNATURE, Purpose.RAW): Permission.RAW_SIGN,
}
