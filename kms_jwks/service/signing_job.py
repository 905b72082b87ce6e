"""One signature as plain data: which version signs which bytes, and how the answer is built from the signature.

Pure: nothing here signs or waits. Each route and purpose has one function in the table that prepares its jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from msgspec import UNSET

from kms_jwks import errors, jose, profiles, wire
from kms_jwks.algorithms import Family
from kms_jwks.backends.base import Digest, Message
from kms_jwks.model import SECOND, Instant, Purpose
from kms_jwks.times import from_numeric_date, to_datetime
from kms_jwks.worker.snapshot import Signer, SigningKey


class SigningOperation(StrEnum):
    """The three signing routes; the last segment of their paths."""

    JWT = "jwt"
    JWS = "jws"
    SIGNATURE = "signature"


class AnswerForm(Enum):
    """What the caller gets."""

    JWT = auto()
    JWS = auto()
    DETACHED_JWS = auto()
    SIGNATURE = auto()


@dataclass(frozen=True, slots=True)
class SigningJob:
    """One signature to make, before a module is asked.

    `pinned`: the caller named the kid, so no other version may sign instead. `profile`, `jti` and `expires_at` (a
    NumericDate) are those of a JWT, None where there is none.
    """

    signer: Signer
    what: Message | Digest
    form: AnswerForm
    pinned: bool = False
    profile: str | None = None
    jti: str | None = None
    expires_at: int | None = None


Preparer = Callable[[SigningKey, object, Instant], SigningJob]


def preparer_of(operation: SigningOperation, purpose: Purpose) -> Preparer:
    """The function that prepares this route's jobs in a set of this purpose. Raises PurposeMismatch."""
    preparer = _PREPARERS.get((operation, purpose))
    if preparer is None:
        raise errors.PurposeMismatch(f"A key set with purpose {purpose.value} has no route {operation.value}.")
    return preparer


def finish(job: SigningJob, signature: bytes) -> wire.Answer:
    """The answer to a job whose signature, in JOSE form, may be released."""
    signer = job.signer
    kid, alg = signer.kid, signer.alg.name
    if job.form is AnswerForm.SIGNATURE:
        return wire.Signature(signature=jose.b64u_encode(signature), kid=kid, alg=alg)
    assert isinstance(job.what, Message)
    token = jose.compact(job.what.data, signature, detached=job.form is AnswerForm.DETACHED_JWS)
    if job.form is not AnswerForm.JWT:
        return wire.SignedJws(jws=token, kid=kid, alg=alg)
    assert job.jti is not None and job.expires_at is not None
    return wire.SignedJwt(token=token, kid=kid, alg=alg, jti=job.jti, expires_at=from_numeric_date(job.expires_at))


def active_of(key: SigningKey) -> Signer:
    """The version that signs now. Raises KeyRetired, KeyDisabled, NoActiveVersion (with usable_at where known)."""
    if key.retired:
        raise errors.KeyRetired(f"Key {key.name!r} is retired.")
    if not key.enabled:
        raise errors.KeyDisabled(f"Key {key.name!r} is disabled.")
    if key.active is None:
        fields: dict[str, object] = {}
        if key.standby is not None and key.standby[1] is not None:
            fields["usable_at"] = to_datetime(key.standby[1])
        raise errors.NoActiveVersion(f"Key {key.name!r} has no active version.", fields=fields)
    return key.active


def _pinned(key: SigningKey, kid: str, now: Instant) -> Signer:
    active = active_of(key)
    if active.kid == kid:
        return active
    signer = key.pinned.get(kid)
    if signer is None:
        raise errors.KidNotActive("The pinned kid is not this key's active one.", fields={"active_kid": active.kid})
    check_handover(signer, key, now)
    return signer


def check_handover(signer: Signer, key: SigningKey, now: Instant) -> None:
    """Raise KidNotActive once the handover of a retiring version is over."""
    if signer.until is not None and now >= signer.until:
        fields: dict[str, object] = {"active_kid": key.active.kid} if key.active else {}
        raise errors.KidNotActive("The pinned kid was deactivated and its handover is over.", fields=fields)


# --- one preparer for each route and purpose --------------------------------------------------------------------------


def _prepare_jwt(key: SigningKey, item: object, now: Instant) -> SigningJob:
    request = wire.convert(item, wire.JwtRequest)
    signer = active_of(key)
    if request.profile is not UNSET and request.profile != key.profile:
        raise errors.InvalidField(f"profile: key {key.name!r} has no profile of that name", fields={"field": "profile"})
    expires_in = None if request.expires_in is UNSET else request.expires_in
    issued = profiles.issue(key.rules, request.claims, now=now // SECOND, expires_in=expires_in)
    data = jose.signing_input(signer.jwt_header, issued.payload)
    return SigningJob(
        signer,
        Message(data),
        AnswerForm.JWT,
        profile=key.profile,
        jti=issued.jti,
        expires_at=issued.expires_at,
    )


def _prepare_signing_input(key: SigningKey, item: object, now: Instant) -> SigningJob:
    _refuse_form(item, ("input", "digest"), "jwt", "signing_input (header.payload of a JWT) and kid")
    request = wire.convert(item, wire.SigningInputRequest)
    signer = _pinned(key, request.kid, now)
    checked = profiles.check_signing_input(
        key.rules, request.signing_input, alg=signer.alg.name, kid=signer.kid, now=now // SECOND
    )
    return SigningJob(
        signer,
        Message(checked.data),
        AnswerForm.SIGNATURE,
        pinned=True,
        profile=key.profile,
        jti=checked.jti,
        expires_at=checked.expires_at,
    )


def _prepare_jws(key: SigningKey, item: object, now: Instant) -> SigningJob:
    request = wire.convert(item, wire.JwsRequest)
    signer = active_of(key)
    payload = _binary(request.payload, "payload")
    header = jose.header_segment(
        alg=signer.alg.name,
        kid=signer.kid,
        typ=None if request.typ is UNSET else request.typ,
        cty=None if request.cty is UNSET else request.cty,
    )
    form = AnswerForm.DETACHED_JWS if request.detached else AnswerForm.JWS
    return SigningJob(signer, Message(jose.signing_input(header, payload)), form)


def _prepare_raw(key: SigningKey, item: object, now: Instant) -> SigningJob:
    _refuse_form(item, ("signing_input",), "raw", "input or digest (base64url), and kid if it is to be pinned")
    request = wire.convert(item, wire.RawSignatureRequest)
    if (request.input is UNSET) == (request.digest is UNSET):
        raise errors.InvalidField("Exactly one of input and digest must be there.", fields={"field": "input"})
    signer = active_of(key) if request.kid is UNSET else _pinned(key, request.kid, now)
    what: Message | Digest
    if request.input is not UNSET:
        what = Message(_binary(request.input, "input"))
    else:
        assert request.digest is not UNSET
        what = _digest(signer, _binary(request.digest, "digest"))
    return SigningJob(signer, what, AnswerForm.SIGNATURE, pinned=request.kid is not UNSET)


_PREPARERS: Mapping[tuple[SigningOperation, Purpose], Preparer] = {
    (SigningOperation.JWT, Purpose.JWT): _prepare_jwt,
    (SigningOperation.SIGNATURE, Purpose.JWT): _prepare_signing_input,
    (SigningOperation.JWS, Purpose.RAW): _prepare_jws,
    (SigningOperation.SIGNATURE, Purpose.RAW): _prepare_raw,
}


def _refuse_form(item: object, wrong: tuple[str, ...], purpose: str, right: str) -> None:
    """The route `signature` has a form for each purpose: refuse the other purpose's by name, and name the right one."""
    for field in wrong:
        if isinstance(item, dict) and field in item:
            raise errors.InvalidField(
                f"{field}: not in a key set with purpose {purpose}; send {right}", fields={"field": field}
            )


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
