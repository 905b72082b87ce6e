"""Making key pairs and destroying them. Called inside the gate, by one process and thread of all at a time."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pkcs11
from pkcs11 import Attribute, KeyType, MechanismFlag, ObjectClass, PKCS11Error, Session

from kms_jwks import jose
from kms_jwks.backends.base import GeneratedKey, KeyRef, Message
from kms_jwks.backends.pkcs11 import keys
from kms_jwks.backends.pkcs11.error_map import Garbled, Lost, meaning_of, said, unavailable
from kms_jwks.backends.pkcs11.mechanisms import ROWS, Row
from kms_jwks.backends.pkcs11.objects import find, jwk_of, locator, look, private_key, signed
from kms_jwks.errors import (
    BackendError,
    BackendKeyNotFound,
    BackendRefused,
    KeyExists,
    TokenSignatureInvalid,
    UnsupportedAlgorithm,
)

if TYPE_CHECKING:
    from kms_jwks.algorithms import Algorithm
    from kms_jwks.backends.pkcs11.connection import Seat

_ID_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Request:
    """A key pair to be made."""

    label: str
    alg: Algorithm
    rsa_bits: int | None


def check_label_free(seat: Seat, label: str) -> None:
    """Raise KeyExists where any half of a pair has the label."""
    for kind in (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY):
        if find(seat.connection, seat.session, {Attribute.CLASS: kind, Attribute.LABEL: label}):
            raise KeyExists(f"The token with serial {seat.connection.serial} holds a key labelled {label!r}.")


def generated(seat: Seat, request: Request, made: list[bytes]) -> GeneratedKey:
    """Make a pair, or leave nothing behind. `made` holds the CKA_IDs of earlier attempts that are still to be cleared.

    Raises PKCS11Error and Lost, after which it may be called again; KeyExists, UnsupportedAlgorithm, BackendRefused.
    """
    clear(seat, made)
    check_label_free(seat, request.label)
    try:
        finished = _generated(seat, request, made)
        made.clear()
        return finished
    except BaseException as error:
        try:
            # In a session of its own: an operation of the one that failed may be in the way.
            seat.replace()
            clear(seat, made)
        except (PKCS11Error, Lost, Garbled) as failure:
            if isinstance(error, BackendError):
                raise BackendRefused(
                    f"{error.detail} Destroying what was made of it failed too: {said(failure)}.",
                    next_step=f"Remove the key pair labelled {request.label!r}; `kms-jwks doctor` lists it.",
                ) from error
            # The next attempt, if there is one, begins with what is left.
        raise


def _generated(seat: Seat, request: Request, made: list[bytes]) -> GeneratedKey:
    """Make a pair, read it back, and sign with it once. `made` learns the CKA_ID before anything exists under it."""
    connection, session = seat.connection, seat.session
    connection.check()
    row = ROWS.get(request.alg.name)
    if row is None or row.generate not in connection.mechanisms:
        raise UnsupportedAlgorithm(f"The module makes no keys for {request.alg.name}.")
    id_ = os.urandom(_ID_BYTES)
    made.append(id_)
    _make(session, request, id_, row)
    ref = KeyRef.of(label=request.label, id=id_.hex(), serial=connection.serial)
    try:
        private = private_key(seat, ref)
    except BackendKeyNotFound as error:
        raise unavailable("The module does not show the key that it said it made.") from error
    jwk = jwk_of(seat, ref, private)
    if not keys.fits(request.alg, jwk) or (request.rsa_bits and keys.modulus_bits(jwk) != request.rsa_bits):
        raise BackendRefused(f"The module made another key than one for {request.alg.name}.")
    weaknesses = keys.evidence_of(private).weaknesses
    if weaknesses:
        raise BackendRefused(
            f"The module's own attributes of the new key say that {', '.join(weaknesses)}.",
            next_step="Look at the token's policy: keys must be made in it, non-extractable, for signing alone.",
        )
    # SoftHSM does not sync its store: what was read back and signs is at least what every later search will find.
    trial = os.urandom(32)
    try:
        jose.verify_signature(request.alg, jwk, trial, signed(seat, ref, request.alg, Message(trial)))
    except TokenSignatureInvalid as error:
        raise BackendRefused("The new key's public half does not verify what it signs.") from error
    finally:
        seat.handles.clear()  # others sign with it, this seat does not
    return GeneratedKey(ref, jwk)


def _make(session: Session, request: Request, id_: bytes, row: Row) -> None:
    """C_GenerateKeyPair with the strictest template the module takes."""
    if request.alg.is_rsa:
        key_type = KeyType.RSA
        domains: list[keys.Template] = [{}]
    elif request.alg.is_post_quantum:
        key_type = KeyType.ML_DSA
        domains = [
            {Attribute.PARAMETER_SET: number}
            for number, name in keys.PARAMETER_SETS.items()
            if name == request.alg.name
        ]
    else:
        curve = keys.CURVES[request.alg.crv or ""]
        key_type = curve.key_type
        domains = [{Attribute.EC_PARAMS: parameters} for parameters in curve.parameters]
    refusal: PKCS11Error | None = None
    for domain in domains:
        for private, public in keys.strict(row.signing):
            try:
                session.generate_keypair(
                    key_type,
                    request.rsa_bits,
                    id=id_,
                    label=request.label,
                    store=True,
                    capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
                    mechanism=row.generate,
                    public_template={**keys.PUBLIC, **public, **domain},
                    private_template={**keys.PRIVATE, **private},
                )
                return
            except PKCS11Error as error:
                if not meaning_of(error).is_final:
                    raise
                refusal = error
    assert refusal is not None
    raise refusal


def destroyed(seat: Seat, ref: KeyRef) -> None:
    """Destroy a pair, or find that it is gone. Refused where the reference fits several: one of them is another key."""
    with suppress(BackendKeyNotFound):
        private_key(seat, ref)
    seat.handles.pop(ref, None)
    # A pair that has no CKA_ID is known by its label, which the public key of somebody else's pair may have too.
    destroy_all(seat, {Attribute.ID: b"", **locator(ref, ObjectClass.PRIVATE_KEY)})


def destroy_all(seat: Seat, template: keys.Template) -> None:
    """Destroy all halves of pairs that fit, and see that none is left. Raises PKCS11Error, Lost, Garbled."""
    for kind in (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY):
        # Nothing there is as good as destroyed, so it has to be certain.
        for key in look(seat.connection, seat.session, {**template, Attribute.CLASS: kind}):
            with suppress(pkcs11.ObjectHandleInvalid):
                key.destroy()
    for kind in (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY):
        left = find(seat.connection, seat.session, {**template, Attribute.CLASS: kind})
        if left:
            raise Garbled(f"that it destroyed {len(left)} object(s) which it still shows")
    if not seat.connection.is_healthy():
        raise Lost


def clear(seat: Seat, made: list[bytes]) -> None:
    """Destroy what an attempt left under these CKA_IDs, and strike them off. Raises like `destroy_all`."""
    while made:
        destroy_all(seat, {Attribute.ID: made[-1]})
        made.pop()
