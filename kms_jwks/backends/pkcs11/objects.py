"""Finding, making, reading and destroying key pairs in an open session. Every function is called inside the gate."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pkcs11
from pkcs11 import Attribute, KeyType, MechanismFlag, Object, ObjectClass, PKCS11Error, Session

from kms_jwks import jose
from kms_jwks.backends.base import Digest, GeneratedKey, KeyRef, Message, PublicJwk
from kms_jwks.backends.pkcs11 import keys
from kms_jwks.backends.pkcs11.connection import Handle
from kms_jwks.backends.pkcs11.meanings import Lost, Meaning, meaning_of, said
from kms_jwks.backends.pkcs11.mechanisms import ROWS, prepared
from kms_jwks.errors import (
    BackendRefused,
    KeyExists,
    KeyNotFound,
    TokenSignatureInvalid,
    UnsupportedAlgorithm,
)

if TYPE_CHECKING:
    from kms_jwks.algorithms import Algorithm
    from kms_jwks.backends.pkcs11.connection import Connection, Seat

_LOOKS: Final = (0.0, 0.01, 0.05)
"""Seconds before each look for a key, until it counts as absent: a look may meet the store while it is rewritten."""
_ID_BYTES: Final = 16
_HEXADECIMAL: Final = re.compile("(?:[0-9a-f]{2})*")
_SIGNATURE_ROOM: Final = 1024
"""Bytes python-pkcs11 sets aside for a signature; its default of 8192 costs time in each call."""


# --- finding ----------------------------------------------------------------------------------------------------------


def find(connection: Connection, session: Session, template: keys.Template) -> list[Object]:
    """The objects that fit. Raises Lost where the session is no longer logged in to a healthy token."""
    # A search in a dead session makes python-pkcs11 print from a destructor, so ask first.
    connection.check()
    if not connection.is_healthy():
        raise Lost
    return list(session.get_objects(template))


def locator(ref: KeyRef, kind: ObjectClass) -> keys.Template:
    """The search for one half of a key pair."""
    parts = ref.as_dict()
    template: keys.Template = {Attribute.CLASS: kind}
    if parts.get("id"):
        template[Attribute.ID] = bytes.fromhex(parts["id"])
    if parts.get("label"):
        template[Attribute.LABEL] = parts["label"]
    return template


def check_ref(seat: Seat, ref: KeyRef) -> None:
    """A reference names its token: the same label on another one is another key. Raises BackendRefused."""
    parts = ref.as_dict()
    serial = parts.get("serial")
    id_ = parts.get("id", "")
    if serial is None or not (id_ or parts.get("label")) or not _HEXADECIMAL.fullmatch(id_):
        raise BackendRefused(f"The reference {parts} is none of a PKCS#11 backend.")
    if serial != seat.connection.serial:
        raise BackendRefused(
            f"The key {described(ref)} is on the token with serial {serial}, not on this one with serial "
            f"{seat.connection.serial}.",
            next_step="Put the right token back, or correct the backend's token in the configuration.",
        )


def private_key(seat: Seat, ref: KeyRef) -> Object:
    """The one private key of a reference. Raises KeyNotFound only when the token was well around each look."""
    check_ref(seat, ref)
    connection = seat.connection
    for wait in _LOOKS:
        time.sleep(wait)
        found = find(connection, seat.session, locator(ref, ObjectClass.PRIVATE_KEY))
        if len(found) == 1:
            return found[0]
        if found:
            raise BackendRefused(
                f"The token holds {len(found)} private keys with this label and CKA_ID.",
                next_step="Give each key an CKA_ID of its own with the vendor's tool.",
            )
    if not connection.is_healthy():
        raise Lost
    raise KeyNotFound(f"The token with serial {connection.serial} holds no private key {described(ref)}.")


def the_one(seat: Seat, template: keys.Template, locator: str) -> KeyRef:
    """The reference of the one private key that fits. Raises KeyNotFound, BackendRefused where several do."""
    found = find(seat.connection, seat.session, {**template, Attribute.CLASS: ObjectClass.PRIVATE_KEY})
    if len(found) > 1:
        raise BackendRefused(f"The token holds {len(found)} private keys that fit {locator!r}: name one by id=…")
    if not found:
        if not seat.connection.is_healthy():
            raise Lost
        raise KeyNotFound(f"The token with serial {seat.connection.serial} holds no private key {locator!r}.")
    return ref_of(seat, str(keys.optional(found[0], Attribute.LABEL) or ""), found[0])


def ref_of(seat: Seat, label: str, private: Object) -> KeyRef:
    """The reference of a private key that was found."""
    id_: bytes = keys.optional(private, Attribute.ID) or b""
    return KeyRef.of(label=label, id=id_.hex(), serial=seat.connection.serial)


def described(ref: KeyRef) -> str:
    """A reference in words."""
    return " ".join(f"{name}={value}" for name, value in ref.locator if name != "serial")


def jwk_of(seat: Seat, ref: KeyRef, private: Object) -> PublicJwk:
    """The public half: from the public key object, or from the private key where it carries it (RSA)."""
    halves: list[Object] = [private]
    halves[:0] = find(seat.connection, seat.session, locator(ref, ObjectClass.PUBLIC_KEY))
    kind = private[Attribute.KEY_TYPE]
    if kind == KeyType.RSA:
        modulus = _first(halves, Attribute.MODULUS)
        exponent = _first(halves, Attribute.PUBLIC_EXPONENT)
        if modulus and exponent:
            return keys.rsa_jwk(modulus, exponent)
    elif kind in (KeyType.EC, KeyType.EC_EDWARDS):
        parameters = _first(halves, Attribute.EC_PARAMS)
        point = _first(halves, Attribute.EC_POINT)
        if parameters and point:
            return keys.ec_jwk(keys.crv_of(parameters), point)
    else:
        raise UnsupportedAlgorithm(f"The key has CKA_KEY_TYPE {kind:#x}, with which no JOSE signature is made.")
    raise BackendRefused(
        "The token holds the private key without its public key.",
        next_step="Import the public key beside it, with the same CKA_ID and CKA_LABEL.",
    )


def _first(halves: list[Object], attribute: Attribute) -> Any:
    return next((value for half in halves if (value := keys.optional(half, attribute))), None)


# --- signing ----------------------------------------------------------------------------------------------------------


def signed(seat: Seat, ref: KeyRef, alg: Algorithm, what: Message | Digest) -> bytes:
    """One signature in JOSE form. A handle is found once per session and kept."""
    handle = seat.handles.get(ref)
    if handle is None:
        handle = seat.handles[ref] = _handle(seat, ref)
    if handle.kty != alg.kty or handle.crv != alg.crv or (handle.rsa_bits and handle.rsa_bits not in alg.rsa_bits):
        kind = f"{handle.rsa_bits}-bit RSA" if handle.rsa_bits else f"{handle.kty} {handle.crv}"
        raise BackendRefused(f"The key {described(ref)} is {kind}, which {alg.name} does not sign with.")
    data, mechanism = prepared(alg, what, seat.connection.mechanisms)
    pss = ROWS[alg.name].pss
    signature: bytes = handle.key.sign(data, mechanism=mechanism, mechanism_param=pss, buffer_size=_SIGNATURE_ROOM)
    if len(signature) != alg.signature_length(handle.rsa_bits or None):
        raise BackendRefused(f"The module made a signature of {len(signature)} bytes, which {alg.name} never has.")
    return signature


def _handle(seat: Seat, ref: KeyRef) -> Handle:
    key = private_key(seat, ref)
    jwk = jwk_of(seat, ref, key)
    return Handle(key, jwk["kty"], jwk.get("crv"), keys.modulus_bits(jwk) if jwk["kty"] == "RSA" else 0)


# --- making -----------------------------------------------------------------------------------------------------------


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
    """Make a pair, read it back, and sign with it once. `made` learns the CKA_ID before anything exists under it.

    Raises BackendRefused when the module made another key than it was asked for; the caller destroys what was made.
    """
    connection, session = seat.connection, seat.session
    connection.check()
    row = ROWS.get(request.alg.name)
    if row is None or row.generate not in connection.mechanisms:
        raise UnsupportedAlgorithm(f"The module makes no keys for {request.alg.name}.")
    id_ = os.urandom(_ID_BYTES)
    made.append(id_)
    _make(session, request, id_, row.generate)
    ref = KeyRef.of(label=request.label, id=id_.hex(), serial=connection.serial)
    private = private_key(seat, ref)
    jwk = jwk_of(seat, ref, private)
    if not keys.fits(request.alg, jwk) or (request.rsa_bits and keys.modulus_bits(jwk) != request.rsa_bits):
        raise BackendRefused(f"The module made another key than one for {request.alg.name}; it was destroyed.")
    weak = keys.weakness(keys.evidence_of(private))
    if weak:
        raise BackendRefused(
            f"The module's own attributes of the new key say that {weak}; it was destroyed.",
            next_step="Look at the token's policy: keys must be made in it, non-extractable, for signing alone.",
        )
    # SoftHSM does not sync its store: what was read back and signs is at least what every later search will find.
    trial = os.urandom(32)
    try:
        jose.verify_signature(request.alg, jwk, trial, signed(seat, ref, request.alg, Message(trial)))
    except TokenSignatureInvalid as error:
        raise BackendRefused("The new key's public half does not verify what it signs; it was destroyed.") from error
    return GeneratedKey(ref, jwk)


def _make(session: Session, request: Request, id_: bytes, mechanism: pkcs11.Mechanism) -> None:
    """C_GenerateKeyPair with the strictest template the module takes."""
    if request.alg.is_rsa:
        key_type = KeyType.RSA
        domains: list[keys.Template] = [{}]
    else:
        curve = keys.CURVES[request.alg.crv or ""]
        key_type = curve.key_type
        domains = [{Attribute.EC_PARAMS: parameters} for parameters in curve.parameters]
    refusal: PKCS11Error | None = None
    for domain in domains:
        for frozen in (keys.FROZEN, {}):
            try:
                session.generate_keypair(
                    key_type,
                    request.rsa_bits,
                    id=id_,
                    label=request.label,
                    store=True,
                    capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
                    mechanism=mechanism,
                    public_template={**keys.PUBLIC, **frozen, **domain},
                    private_template={**keys.PRIVATE, **frozen},
                )
                return
            except PKCS11Error as error:
                if meaning_of(error) not in (Meaning.REFUSED, Meaning.UNSUPPORTED):
                    raise
                refusal = error
    assert refusal is not None
    raise refusal


# --- destroying -------------------------------------------------------------------------------------------------------


def destroy_all(seat: Seat, template: keys.Template) -> None:
    """Destroy every half of every pair that fits, and see that none is left. Raises PKCS11Error, Lost."""
    for kind in (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY):
        for key in find(seat.connection, seat.session, {**template, Attribute.CLASS: kind}):
            with suppress(pkcs11.ObjectHandleInvalid):
                key.destroy()
    for kind in (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY):
        left = find(seat.connection, seat.session, {**template, Attribute.CLASS: kind})
        if left:
            raise BackendRefused(f"The token still shows {len(left)} object(s) that it said it destroyed.")
    if not seat.connection.is_healthy():
        raise Lost


def clear(seat: Seat, made: list[bytes]) -> str:
    """Destroy what an attempt left under these CKA_IDs; what stands in the way, in words, empty when nothing does."""
    try:
        while made:
            destroy_all(seat, {Attribute.ID: made[-1]})
            made.pop()
    except PKCS11Error as error:
        return said(error)
    except (BackendRefused, Lost):
        return "the token does not answer"
    return ""
