"""Finding key pairs in an open session, reading them, signing with them. Every function is called inside the gate."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import Attribute, KeyType, Object, ObjectClass, Session

from kms_jwks import strictjson
from kms_jwks.backends.base import Digest, KeyRef, Message, PublicJwk
from kms_jwks.backends.pkcs11 import keys
from kms_jwks.backends.pkcs11.connection import Handle
from kms_jwks.backends.pkcs11.error_map import Garbled, Lost
from kms_jwks.backends.pkcs11.mechanisms import ROWS, prepared
from kms_jwks.backends.pkcs11.searching import searched
from kms_jwks.errors import (
    BackendKeyNotFound,
    BackendRefused,
    UnsupportedAlgorithm,
)

if TYPE_CHECKING:
    from kms_jwks.algorithms import Algorithm
    from kms_jwks.backends.pkcs11.connection import Connection, Seat

_LOOKS: Final = (0.0, 0.01, 0.05)
"""Seconds before each look for a key, until it counts as absent: a look may meet the store while it is rewritten."""
_HEXADECIMAL: Final = re.compile("(?:[0-9a-f]{2})*")
_SIGNATURE_ROOM: Final = 1024
"""Bytes python-pkcs11 sets aside for a signature, where none is longer; its default of 8192 costs time in each call."""


# --- finding ----------------------------------------------------------------------------------------------------------


def find(connection: Connection, session: Session, template: keys.Template) -> list[Object]:
    """The objects that fit. Raises Lost where the session is no longer logged in to a healthy token."""
    # A search in a dead session makes python-pkcs11 print from a destructor, so ask first.
    connection.check()
    if not connection.is_healthy():
        raise Lost
    return searched(session, template)


def look(connection: Connection, session: Session, template: keys.Template) -> list[Object]:
    """`find`, again where there is nothing, until it is certain that there is nothing. Raises Lost.

    A search may meet SoftHSM's store while another process rewrites it; and a token that is gone shows no objects.
    """
    for wait in _LOOKS:
        time.sleep(wait)
        found = find(connection, session, template)
        if found:
            return found
    if not connection.is_healthy():
        raise Lost
    return []


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
    """The one private key of a reference. Raises BackendKeyNotFound only when the token was well around each look."""
    check_ref(seat, ref)
    found = look(seat.connection, seat.session, locator(ref, ObjectClass.PRIVATE_KEY))
    if not found:
        raise BackendKeyNotFound(
            f"The token with serial {seat.connection.serial} holds no private key {described(ref)}."
        )
    if len(found) > 1:
        raise BackendRefused(
            f"The token holds {len(found)} private keys with this label and CKA_ID.",
            next_step="Give each key a CKA_ID of its own with the vendor's tool.",
        )
    return found[0]


def the_one(seat: Seat, template: keys.Template, locator: str) -> KeyRef:
    """The reference of the one private key that fits. Raises BackendKeyNotFound, BackendRefused where several do."""
    found = look(seat.connection, seat.session, {**template, Attribute.CLASS: ObjectClass.PRIVATE_KEY})
    if len(found) > 1:
        raise BackendRefused(
            f"The token holds {len(found)} private keys that fit {locator!r}.", next_step="Name one of them by id=…"
        )
    if not found:
        raise BackendKeyNotFound(f"The token with serial {seat.connection.serial} holds no private key {locator!r}.")
    return ref_of(seat, str(keys.optional(found[0], Attribute.LABEL) or ""), found[0])


def ref_of(seat: Seat, label: str, private: Object) -> KeyRef:
    """The reference of a private key that was found. A label that is no UTF-8 cannot be searched for."""
    id_: bytes = keys.optional(private, Attribute.ID) or b""
    if "\ufffd" in label and id_:
        label = ""
    return KeyRef.of(label=label, id=id_.hex(), serial=seat.connection.serial)


def described(ref: KeyRef) -> str:
    """A reference in words."""
    return " ".join(f"{name}={value}" for name, value in ref.locator if name in ("id", "label"))


def jwk_of(seat: Seat, ref: KeyRef, private: Object) -> PublicJwk:
    """The public half as the token holds it, or as it was given when a key without one was adopted.

    Raises UnsupportedAlgorithm, BackendRefused.
    """
    half = public_half(seat, ref, private)
    if half is not None:
        return half
    given = ref.as_dict().get("public")
    if given is None:
        raise lacks_public_half()
    return {name: str(value) for name, value in strictjson.loads_object(given.encode()).items()}


def lacks_public_half() -> BackendRefused:
    """Why a private key alone is not enough."""
    return BackendRefused(
        "The token holds the private key without its public key.",
        next_step="Import the public key beside it, with the same CKA_ID and CKA_LABEL.",
    )


def public_half(seat: Seat, ref: KeyRef, private: Object) -> PublicJwk | None:
    """The public half: from the public key object, or from the private key where it carries it (RSA).

    Other people's pairs share the CKA_ID and not always the label. Raises UnsupportedAlgorithm, BackendRefused.
    """
    template = locator(ref, ObjectClass.PUBLIC_KEY)
    has_id = Attribute.ID in template
    halves = find(seat.connection, seat.session, {Attribute.ID: b"", **template})
    if not halves and (not has_id or template.pop(Attribute.LABEL, None)):
        halves = find(seat.connection, seat.session, template)
        if not has_id and len(halves) > 1:
            halves = []  # of several with one label none is known to be its half
    kind = private[Attribute.KEY_TYPE]
    if kind == KeyType.RSA:
        modulus = _first([*halves, private], Attribute.MODULUS)
        exponent = _first([*halves, private], Attribute.PUBLIC_EXPONENT)
        return keys.rsa_jwk(modulus, exponent) if modulus and exponent else None
    if kind in (KeyType.EC, KeyType.EC_EDWARDS):
        parameters = _first([*halves, private], Attribute.EC_PARAMS)
        point = _first([*halves, private], Attribute.EC_POINT)
        return keys.ec_jwk(keys.crv_of(parameters), point) if parameters and point else None
    if kind == KeyType.ML_DSA:
        parameter_set = _first([*halves, private], Attribute.PARAMETER_SET)
        # Never asked of the private half: its CKA_VALUE is the private key itself.
        value = _first(halves, Attribute.VALUE)
        return keys.ml_dsa_jwk(parameter_set, value) if parameter_set is not None and value else None
    raise UnsupportedAlgorithm(f"The key has CKA_KEY_TYPE {kind:#x}, with which no JOSE signature is made.")


def may_belong(private: Object, jwk: PublicJwk) -> bool:
    """Whether a private key, by what it says of itself, can be the other half of a public key.

    Raises UnsupportedAlgorithm.
    """
    kind = private[Attribute.KEY_TYPE]
    if kind == KeyType.RSA:
        modulus = keys.optional(private, Attribute.MODULUS)
        return jwk["kty"] == "RSA" and (not modulus or int.from_bytes(modulus, "big") == keys.modulus(jwk))
    if kind in (KeyType.EC, KeyType.EC_EDWARDS):
        parameters = keys.optional(private, Attribute.EC_PARAMS)
        return jwk.get("crv") in keys.CURVES and (not parameters or keys.crv_of(parameters) == jwk["crv"])
    if kind == KeyType.ML_DSA:
        parameter_set = keys.optional(private, Attribute.PARAMETER_SET)
        return jwk["kty"] == "AKP" and (parameter_set is None or keys.PARAMETER_SETS.get(parameter_set) == jwk["alg"])
    return False


def _first(halves: list[Object], attribute: Attribute) -> Any:
    return next((value for half in halves if (value := keys.optional(half, attribute))), None)


# --- signing ----------------------------------------------------------------------------------------------------------


def signed(seat: Seat, ref: KeyRef, alg: Algorithm, what: Message | Digest) -> bytes:
    """One signature in JOSE form. A handle is found once per session and kept."""
    handle = seat.handles.get(ref)
    if handle is None:
        handle = seat.handles[ref] = _handle(seat, ref)
    if handle.kty != alg.kty or handle.crv != keys.variant(alg) or not _size_fits(handle, alg):
        kind = f"{handle.rsa_bits}-bit RSA" if handle.rsa_bits else f"{handle.kty} {handle.crv}"
        raise BackendRefused(f"The key {described(ref)} is {kind}, which {alg.name} does not sign with.")
    data, mechanism = prepared(alg, what, handle.mechanisms)
    pss = ROWS[alg.name].pss
    room = max(_SIGNATURE_ROOM, alg.signature_bytes)
    signature: bytes = handle.key.sign(data, mechanism=mechanism, mechanism_param=pss, buffer_size=room)
    if len(signature) != alg.signature_length(handle.rsa_bits or None):
        raise Garbled(f"a signature of {len(signature)} bytes, which {alg.name} never has")
    return signature


def _handle(seat: Seat, ref: KeyRef) -> Handle:
    key = private_key(seat, ref)
    jwk = jwk_of(seat, ref, key)
    variant = jwk.get("crv") or jwk.get("alg")
    mechanisms = seat.connection.mechanisms
    allowed = keys.optional(key, Attribute.ALLOWED_MECHANISMS)
    if allowed:
        mechanisms = frozenset(m for m in mechanisms if m in allowed)
    return Handle(key, jwk["kty"], variant, keys.modulus_bits(jwk) if jwk["kty"] == "RSA" else 0, mechanisms)


def _size_fits(handle: Handle, alg: Algorithm) -> bool:
    return not handle.rsa_bits or handle.rsa_bits in alg.rsa_bits
