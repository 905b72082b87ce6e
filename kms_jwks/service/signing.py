"""The signing path: authorise and prepare, sign in the module, look once more, answer. No database, no web framework.

`prepare` is pure and quick; `Modules.sign` may wait; `_check` looks at the lease and the version again under the
snapshot of that moment, so that nothing leaves that a revocation has overtaken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from msgspec import UNSET

from kms_jwks import errors, jose, profiles, wire
from kms_jwks.access import Permission
from kms_jwks.algorithms import Family
from kms_jwks.backends.base import Digest, Message
from kms_jwks.model import SECOND, Instant, Purpose
from kms_jwks.service.guard import Guard, Presented
from kms_jwks.service.instants import from_numeric_date, to_datetime
from kms_jwks.service.modules import Modules
from kms_jwks.service.snapshot import PublishedSet, Signer, SigningKey
from kms_jwks.service.watcher import Watcher

MAX_BATCH = 256


class Operation(StrEnum):
    """The three signing routes; the last segment of their paths."""

    JWT = "jwt"
    JWS = "jws"
    SIGNATURE = "signature"


@dataclass(frozen=True, slots=True)
class Batch:
    """Answers in the order of the items; an item that failed has its error in its place."""

    items: list[wire.Answer | errors.Error]


@dataclass(frozen=True, slots=True)
class Job:
    """One signature to make: by which version, over what, and how the answer is built from it.

    `pinned`: the caller named the kid, so no other version may step in.
    """

    signer: Signer
    pinned: bool
    what: Message | Digest
    answer: Callable[[bytes], wire.Answer]


class Signing:
    """The data plane's use cases that sign."""

    def __init__(self, watcher: Watcher, guard: Guard, modules: Modules) -> None:
        self._watcher = watcher
        self._guard = guard
        self._modules = modules

    def handle(
        self, operation: Operation, who: Presented, key_set: str, key: str, body: Mapping[str, object]
    ) -> wire.Answer | Batch:
        """Sign what `body` asks for, one item or ``{"batch": […]}``.

        Raises every error of a single call; in a batch, an item's error stands in its place, and only what concerns
        the whole call is raised.
        """
        snapshot = self._watcher.snapshot()
        now = self._watcher.clock.now()
        found_set, found_key = self._guard.admit_key(
            snapshot, who, lambda s: _permission(operation, s.purpose), key_set, key, now
        )
        self._watcher.leased()
        prepare = _preparer(operation, found_set.purpose)
        if not found_key.enabled:
            raise errors.KeyDisabled(f"Key {key!r} of key set {key_set!r} is disabled.")
        if "batch" not in body:
            return self._one(prepare, (key_set, key), (found_set, found_key), body)[1]
        if set(body) != {"batch"}:
            raise errors.InvalidField("A batch stands alone in its body.", fields={"field": "batch"})
        items = body["batch"]
        if not isinstance(items, list) or not 1 <= len(items) <= MAX_BATCH:
            raise errors.InvalidBatch(f"A batch is a list of 1 to {MAX_BATCH} items.")
        return self._many(prepare, (key_set, key), (found_set, found_key), items)

    def active(self, who: Presented, key_set: str, key: str) -> wire.Active:
        """Which version signs now and which comes next: what a caller that pins the kid needs."""
        now = self._watcher.clock.now()
        _, found = self._guard.admit_key(
            self._watcher.snapshot(), who, lambda _: Permission.KEY_READ, key_set, key, now
        )
        signer = _active(found)
        coming = None
        if found.standby is not None:
            kid, not_before = found.standby
            coming = wire.NextVersion(kid=kid, not_before=to_datetime(not_before) if not_before is not None else None)
        return wire.Active(
            kid=signer.kid,
            alg=signer.alg.name,
            public_jwk=dict(signer.public_jwk),
            next=coming,
            refresh_after=to_datetime(Instant(now + found.handover * SECOND)),
        )

    # --- inside

    def _one(self, prepare: Preparer, names: tuple[str, str], found: Found, item: object) -> tuple[Signer, wire.Answer]:
        """Prepare, sign, look again. A call that pinned nothing follows a rotation or revocation that overtook it."""
        for last in (False, False, True):
            job = prepare(*found, item, self._watcher.clock.now())
            signature = self._modules.sign(job.signer.backend, job.signer.ref, job.signer.alg, job.what)
            try:
                self._check(job.signer)
            except errors.KidNotActive:
                if job.pinned or last:
                    raise
                found = self._again(names)
                continue
            return job.signer, job.answer(signature)
        raise errors.InternalError  # unreachable: the last round returns or raises

    def _many(self, prepare: Preparer, names: tuple[str, str], found: Found, items: list[object]) -> Batch:
        results: list[tuple[Signer, wire.Answer] | errors.Error] = []
        module_down: errors.BackendError | None = None
        for item in items:
            try:
                if module_down is not None:
                    raise module_down
                results.append(self._one(prepare, names, found, item))
            except errors.BackendError as error:
                # The rest of the batch does not wait for a module that has just failed.
                module_down = error
                results.append(error)
            except errors.Unavailable:
                raise
            except errors.Error as error:
                results.append(error)
        return Batch([self._still_good(result) for result in results])

    def _still_good(self, result: tuple[Signer, wire.Answer] | errors.Error) -> wire.Answer | errors.Error:
        if isinstance(result, errors.Error):
            return result
        try:
            self._check(result[0])
        except errors.Conflict as error:
            return error
        return result[1]

    def _again(self, names: tuple[str, str]) -> Found:
        key_set = self._watcher.snapshot().key_sets[names[0]]
        return key_set, key_set.keys[names[1]]

    def _check(self, signed_by: Signer) -> None:
        """The second look: lease and version under the snapshot of this moment. Raises RegistryStale, Conflict."""
        snapshot = self._watcher.leased()
        found = snapshot.signers.get(signed_by.kid)
        if found is None:
            raise errors.KidNotActive("The version was withdrawn while its signature was being made.")
        key, signer = found
        if not key.enabled:
            raise errors.KeyDisabled(f"Key {key.name!r} was disabled while the signature was being made.")
        if signer.until is not None:
            # Rotated meanwhile: within the handover the answer is as good as a pinned one.
            _within_handover(signer, key, self._watcher.clock.now())


Found = tuple[PublishedSet, SigningKey]
Preparer = Callable[[PublishedSet, SigningKey, object, Instant], Job]


def _permission(operation: Operation, purpose: Purpose) -> Permission:
    if operation is Operation.JWT:
        return Permission.JWT_SIGN
    if operation is Operation.JWS:
        return Permission.JWS_SIGN
    return Permission.JWT_SIGN if purpose is Purpose.JWT else Permission.RAW_SIGN


def _preparer(operation: Operation, purpose: Purpose) -> Preparer:
    preparer = _PREPARERS.get((operation, purpose))
    if preparer is None:
        raise errors.PurposeMismatch(f"A key set with purpose {purpose.value} has no route {operation.value}.")
    return preparer


def _active(key: SigningKey) -> Signer:
    if not key.enabled:
        raise errors.KeyDisabled(f"Key {key.name!r} is disabled.")
    if key.active is None:
        fields: dict[str, object] = {}
        if key.standby is not None and key.standby[1] is not None:
            fields["usable_at"] = to_datetime(key.standby[1])
        raise errors.NoActiveVersion(f"Key {key.name!r} has no active version.", fields=fields)
    return key.active


def _pinned(key: SigningKey, kid: str, now: Instant) -> Signer:
    active = _active(key)
    if active.kid == kid:
        return active
    signer = key.pinned.get(kid)
    if signer is None:
        raise errors.KidNotActive("The pinned kid is not this key's active one.", fields={"active_kid": active.kid})
    _within_handover(signer, key, now)
    return signer


def _within_handover(signer: Signer, key: SigningKey, now: Instant) -> None:
    if signer.until is not None and now >= signer.until:
        fields: dict[str, object] = {"active_kid": key.active.kid} if key.active else {}
        raise errors.KidNotActive("The pinned kid was deactivated and its handover is over.", fields=fields)


# --- one preparer per route and purpose -------------------------------------------------------------------------------


def _prepare_jwt(key_set: PublishedSet, key: SigningKey, item: object, now: Instant) -> Job:
    request = wire.convert(item, wire.JwtRequest)
    signer = _active(key)
    if request.profile is not UNSET and request.profile != key.profile:
        raise errors.InvalidField(f"profile: key {key.name!r} has no profile of that name", fields={"field": "profile"})
    expires_in = None if request.expires_in is UNSET else request.expires_in
    issued = profiles.issue(key.rules, request.claims, now=now // SECOND, expires_in=expires_in)
    data = jose.signing_input(signer.jwt_header, issued.payload)

    def answer(signature: bytes) -> wire.Answer:
        return wire.SignedJwt(
            token=jose.compact(data, signature),
            kid=signer.kid,
            alg=signer.alg.name,
            jti=issued.jti,
            expires_at=from_numeric_date(issued.expires_at),
        )

    return Job(signer, False, Message(data), answer)


def _prepare_signing_input(key_set: PublishedSet, key: SigningKey, item: object, now: Instant) -> Job:
    request = wire.convert(item, wire.SigningInputRequest)
    signer = _pinned(key, request.kid, now)
    checked = profiles.check_signing_input(
        key.rules, request.signing_input, alg=signer.alg.name, kid=signer.kid, now=now // SECOND
    )
    return Job(signer, True, Message(checked.data), _signature_answer(signer))


def _prepare_jws(key_set: PublishedSet, key: SigningKey, item: object, now: Instant) -> Job:
    request = wire.convert(item, wire.JwsRequest)
    signer = _active(key)
    payload = _binary(request.payload, "payload")
    header = jose.header_segment(
        alg=signer.alg.name,
        kid=signer.kid,
        typ=None if request.typ is UNSET else request.typ,
        cty=None if request.cty is UNSET else request.cty,
    )
    data = jose.signing_input(header, payload)

    def answer(signature: bytes) -> wire.Answer:
        jws = jose.compact(data, signature, detached=request.detached)
        return wire.SignedJws(jws=jws, kid=signer.kid, alg=signer.alg.name)

    return Job(signer, False, Message(data), answer)


def _prepare_raw(key_set: PublishedSet, key: SigningKey, item: object, now: Instant) -> Job:
    request = wire.convert(item, wire.RawSignatureRequest)
    if (request.input is UNSET) == (request.digest is UNSET):
        raise errors.InvalidField("Exactly one of input and digest must be there.", fields={"field": "input"})
    pinned = request.kid is not UNSET
    signer = _active(key) if request.kid is UNSET else _pinned(key, request.kid, now)
    what: Message | Digest
    if request.input is not UNSET:
        what = Message(_binary(request.input, "input"))
    else:
        assert request.digest is not UNSET
        what = _digest(signer, _binary(request.digest, "digest"))
    return Job(signer, pinned, what, _signature_answer(signer))


_PREPARERS: Mapping[tuple[Operation, Purpose], Preparer] = {
    (Operation.JWT, Purpose.JWT): _prepare_jwt,
    (Operation.SIGNATURE, Purpose.JWT): _prepare_signing_input,
    (Operation.JWS, Purpose.RAW): _prepare_jws,
    (Operation.SIGNATURE, Purpose.RAW): _prepare_raw,
}


def _signature_answer(signer: Signer) -> Callable[[bytes], wire.Answer]:
    return lambda signature: wire.Signature(signature=jose.b64u_encode(signature), kid=signer.kid, alg=signer.alg.name)


def _binary(text: str, field: str) -> bytes:
    try:
        return jose.b64u_decode(text)
    except ValueError as error:
        raise errors.InvalidPayload(f"{field}: {error}", fields={"field": field}) from None


def _digest(signer: Signer, value: bytes) -> Digest:
    if signer.alg.family is Family.EDDSA or signer.alg.hash is None:
        raise errors.InvalidDigest(f"{signer.alg.name} signs the message itself; send it as input.")
    wanted = Message(b"").digest(signer.alg)
    if len(value) != len(wanted):
        raise errors.InvalidDigest(
            f"A digest for {signer.alg.name} has {len(wanted)} bytes, this one {len(value)}.",
            fields={"expected": len(wanted), "given": len(value)},
        )
    return Digest(value)
