"""Key pairs in an open session: finding them, reading their public halves, adopting them, signing with them.

Every function that takes a session is called while the module's lock is held.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import Attribute, KeyType, Object, ObjectClass, PKCS11Error, _pkcs11

from kms_jwks import strictjson
from kms_jwks.backends.base import Digest, GeneratedKey, KeyRef, Message, PublicJwk, StoredKey
from kms_jwks.backends.pkcs11 import mechanisms, uri
from kms_jwks.backends.pkcs11.connection import KeyHandle
from kms_jwks.backends.pkcs11.error_map import ConnectionLost, InvalidAnswer, Meaning, meaning_of
from kms_jwks.backends.pkcs11.mechanisms import prepare
from kms_jwks.errors import BackendKeyNotFound, BackendRefused, UnsupportedAlgorithm

if TYPE_CHECKING:
    from pathlib import Path

    from kms_jwks.algorithms import Algorithm
    from kms_jwks.backends.pkcs11.connection import PooledSession
    from kms_jwks.backends.pkcs11.mechanisms import Template

_SEARCH_PAUSES: Final = (0.0, 0.01, 0.05)
"""Seconds before each search for a key until it counts as absent: SoftHSM's store may be in the middle of a rewrite."""
_SEARCH_BATCH: Final = 10
"""Objects asked for in one C_FindObjects."""
_HEXADECIMAL: Final = re.compile("(?:[0-9a-f]{2})*")
_SIGNATURE_BUFFER: Final = 1024
"""Bytes python-pkcs11 allocates for a signature; no shorter signature needs more. Its default of 8192 costs time."""


# --- searching --------------------------------------------------------------------------------------------------------


class _Search(_pkcs11.SearchIter):  # type: ignore[name-defined,misc]  # python-pkcs11's stubs leave it out
    """python-pkcs11's C_FindObjects; a search that could not begin is ended at once.

    python-pkcs11 leaves the end to a destructor, which calls the module once more and prints what it answers.
    """

    def __enter__(self) -> Any:
        try:
            return super().__enter__()
        except PKCS11Error:
            with suppress(PKCS11Error):
                self._finalize()
            raise


def find(pooled: PooledSession, template: Template) -> list[Object]:
    """The objects that match. Raises PKCS11Error, and ConnectionLost where the token fails the health check."""
    # A search in a dead session makes python-pkcs11 print from a destructor, so the session is checked first.
    pooled.connection.check()
    if not pooled.connection.is_healthy():
        raise ConnectionLost
    with _Search(pooled.session, template, _SEARCH_BATCH) as batches:
        return [found for batch in batches for found in batch]


def find_surely(pooled: PooledSession, template: Template) -> list[Object]:
    """`find`, repeated while there is no object, until it is certain that there is none. Raises like `find`.

    A search may meet SoftHSM's store while another process rewrites it, and a token that is gone shows no objects.
    """
    for pause in _SEARCH_PAUSES:
        time.sleep(pause)
        found = find(pooled, template)
        if found:
            return found
    if not pooled.connection.is_healthy():
        raise ConnectionLost
    return []


def read_optional(key: Object, attribute: Attribute) -> Any:
    """An attribute; None where this kind of object has none. Raises PKCS11Error when the module fails."""
    try:
        return key[attribute]
    except PKCS11Error as error:
        if meaning_of(error) is Meaning.ABSENT:
            return None
        raise


# --- references -------------------------------------------------------------------------------------------------------


def template_of(ref: KeyRef, kind: ObjectClass) -> Template:
    """The search template for one half of a key pair."""
    parts = ref.as_dict()
    template: Template = {Attribute.CLASS: kind}
    if parts.get("id"):
        template[Attribute.ID] = bytes.fromhex(parts["id"])
    if parts.get("label"):
        template[Attribute.LABEL] = parts["label"]
    return template


def find_private_key(pooled: PooledSession, ref: KeyRef) -> Object:
    """The one private key of a reference.

    Raises BackendKeyNotFound, only where the token was healthy around each search; BackendRefused where the reference
    names another token (the same label on another token is another key), matches several keys, or is none.
    """
    parts, serial = ref.as_dict(), pooled.connection.serial
    id_ = parts.get("id", "")
    if "serial" not in parts or not (id_ or parts.get("label")) or not _HEXADECIMAL.fullmatch(id_):
        raise BackendRefused(f"The reference {parts} is none of a PKCS#11 backend.")
    if parts["serial"] != serial:
        raise BackendRefused(
            f"The key {_describe(ref)} is on the token with serial {parts['serial']}, not on this one with serial "
            f"{serial}.",
            next_step="Put the right token back, or correct the backend's token in the configuration.",
        )
    found = find_surely(pooled, template_of(ref, ObjectClass.PRIVATE_KEY))
    if not found:
        raise BackendKeyNotFound(f"The token with serial {serial} holds no private key {_describe(ref)}.")
    if len(found) > 1:
        raise BackendRefused(
            f"The token holds {len(found)} private keys with this label and CKA_ID.",
            next_step="Give each key a CKA_ID of its own with the vendor's tool.",
        )
    return found[0]


def list_keys(pooled: PooledSession, label_prefix: str) -> list[StoredKey]:
    """Every private key whose label begins with the prefix."""
    found = find(pooled, {Attribute.CLASS: ObjectClass.PRIVATE_KEY})
    labelled = ((str(read_optional(key, Attribute.LABEL) or ""), key) for key in found)
    return [StoredKey(_ref_of(pooled, label, key), label) for label, key in labelled if label.startswith(label_prefix)]


def _ref_of(pooled: PooledSession, label: str, private: Object) -> KeyRef:
    """The reference of a private key that was found. A label that is no UTF-8 cannot be searched for."""
    id_: bytes = read_optional(private, Attribute.ID) or b""
    if "\ufffd" in label and id_:
        label = ""
    return KeyRef.of(label=label, id=id_.hex(), serial=pooled.connection.serial)


def _describe(ref: KeyRef) -> str:
    return " ".join(f"{name}={value}" for name, value in ref.locator if name in ("id", "label"))


# --- public halves ----------------------------------------------------------------------------------------------------


def read_jwk(pooled: PooledSession, ref: KeyRef, private: Object) -> PublicJwk:
    """The public half as the token holds it, or as it was given when a key without one was adopted.

    Raises UnsupportedAlgorithm, BackendRefused.
    """
    half = _public_half(pooled, ref, private)
    if half is not None:
        return half
    given = ref.as_dict().get("public")
    if given is None:
        raise _without_public_half()
    return {name: str(value) for name, value in strictjson.loads_object(given.encode()).items()}


def _without_public_half() -> BackendRefused:
    return BackendRefused(
        "The token holds the private key without its public key.",
        next_step="Import the public key beside it, with the same CKA_ID and CKA_LABEL. To adopt the pair as it is, "
        "give its public key in the request (public_key, with accept).",
    )


def _public_half(pooled: PooledSession, ref: KeyRef, private: Object) -> PublicJwk | None:
    """The public half: from the public key object, or from the private key where it carries it (RSA).

    Key pairs of other programs share the CKA_ID and not always the label. Raises UnsupportedAlgorithm, BackendRefused.
    """
    template = template_of(ref, ObjectClass.PUBLIC_KEY)
    has_id = Attribute.ID in template
    halves = find(pooled, {Attribute.ID: b"", **template})
    if not halves and (not has_id or template.pop(Attribute.LABEL, None)):
        halves = find(pooled, template)
        if len(halves) > 1:
            halves = []  # none of several with the same label or CKA_ID is known to be the half
    kind = private[Attribute.KEY_TYPE]
    if kind == KeyType.RSA:
        modulus = _first([*halves, private], Attribute.MODULUS)
        exponent = _first([*halves, private], Attribute.PUBLIC_EXPONENT)
        return mechanisms.rsa_jwk(modulus, exponent) if modulus and exponent else None
    if kind in (KeyType.EC, KeyType.EC_EDWARDS):
        parameters = _first([*halves, private], Attribute.EC_PARAMS)
        point = _first([*halves, private], Attribute.EC_POINT)
        return mechanisms.ec_jwk(mechanisms.crv_of(parameters), point) if parameters and point else None
    if kind == KeyType.ML_DSA:
        parameter_set = _first([*halves, private], Attribute.PARAMETER_SET)
        # Never read from the private half: its CKA_VALUE is the private key itself.
        value = _first(halves, Attribute.VALUE)
        return mechanisms.ml_dsa_jwk(parameter_set, value) if parameter_set is not None and value else None
    raise UnsupportedAlgorithm(f"The key has CKA_KEY_TYPE {kind:#x}, with which no JOSE signature is made.")


def _first(halves: list[Object], attribute: Attribute) -> Any:
    return next((value for half in halves if (value := read_optional(half, attribute))), None)


# --- adopting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Locator:
    """A parsed locator: the search template of the private key, and the URI whose token attributes must fit."""

    text: str
    template: Template
    uri: uri.Uri | None = None


def parse_locator(text: str, module: Path) -> Locator:
    """Parse a bare label, ``id=<hexadecimal CKA_ID>``, or a PKCS#11 URI of one private key in `module`.

    A label that begins like one of the others is written as a URI. Raises BackendRefused.
    """
    if text[: len(uri.SCHEME)].lower() == uri.SCHEME:
        return _parse_key_uri(text, module)
    if not text.startswith("id="):
        return Locator(text, {Attribute.LABEL: text})
    try:
        id_ = bytes.fromhex(text[3:])
    except ValueError:
        raise BackendRefused(
            f"The locator {text!r} is no label and no id=<hexadecimal CKA_ID>.",
            next_step="Write the CKA_ID in hexadecimal (id=0a1b), or a label that begins like this as a URI: "
            f"{uri.Uri({'object': text})}",
        ) from None
    if not id_:
        raise BackendRefused("The locator names an empty CKA_ID, which is none.", next_step=_HOW_TO_NAME)
    return Locator(text, {Attribute.ID: id_})


def _parse_key_uri(text: str, module: Path) -> Locator:
    try:
        parsed = uri.parse(text)
    except ValueError as error:
        # The text may hold a PIN, so it is not repeated.
        raise BackendRefused(
            f"The PKCS#11 URI is not accepted: {error}.",
            next_step="Write it as pkcs11:token=…;object=… or with id=%…; without a PIN.",
        ) from None
    if parsed.text.get("type", "private") != "private":
        raise BackendRefused(
            "The PKCS#11 URI names no private key: its type is another.",
            next_step="Leave its type out, or write type=private.",
        )
    if problem := uri.module_mismatch(parsed, module):
        raise BackendRefused(
            f"The PKCS#11 URI is not of this backend: {problem}.",
            next_step="Name the backend that uses that module, or leave module-path and module-name out.",
        )
    template: Template = {}
    if parsed.id is not None:
        template[Attribute.ID] = parsed.id
    if "object" in parsed.text:
        template[Attribute.LABEL] = parsed.text["object"]
    if not any(template.values()):
        raise BackendRefused(
            "The PKCS#11 URI names no key: it has neither an object nor an id.", next_step=_HOW_TO_NAME
        )
    return Locator(str(parsed), template, parsed)


def adopt(pooled: PooledSession, locator: Locator, public_jwk: PublicJwk | None) -> GeneratedKey:
    """The one private key that the locator names, with its public half, or with `public_jwk` where it has none.

    Raises BackendKeyNotFound, UnsupportedAlgorithm, BackendRefused.
    """
    connection = pooled.connection
    if locator.uri is not None:
        wrong = locator.uri.contradictions(connection.module.uri_attributes(connection.token))
        if wrong:
            raise BackendRefused(
                f"The PKCS#11 URI is not of this backend's token: {'; '.join(wrong)}.",
                next_step="Name the backend whose token it is, or leave out what does not fit.",
            )
    found = find_surely(pooled, {**locator.template, Attribute.CLASS: ObjectClass.PRIVATE_KEY})
    if len(found) > 1:
        raise BackendRefused(
            f"The token holds {len(found)} private keys that fit {locator.text!r}.",
            next_step=_how_to_tell_apart(found),
        )
    if not found:
        raise BackendKeyNotFound(f"The token with serial {connection.serial} holds no private key {locator.text!r}.")
    ref = _ref_of(pooled, str(read_optional(found[0], Attribute.LABEL) or ""), found[0])
    private = find_private_key(pooled, ref)
    half = _public_half(pooled, ref, private)
    if half is not None:
        if public_jwk is not None and dict(half) != dict(public_jwk):
            raise BackendRefused(
                "The public key that was given is not the one that the token holds.",
                next_step="Leave public_key out: the token holds the public half.",
            )
        return GeneratedKey(ref, half)
    if public_jwk is None:
        raise _without_public_half()
    if not _may_belong(private, public_jwk):
        raise BackendRefused(
            "The public key that was given cannot be that of the private key.",
            next_step="Give the public key of this very pair, or check the label or id of the pair.",
        )
    # The token cannot show it later, so it is kept in the reference.
    text = strictjson.dumps(dict(sorted(public_jwk.items()))).decode("ascii")
    return GeneratedKey(KeyRef.of(**ref.as_dict(), public=text), public_jwk)


_HOW_TO_NAME: Final = "Write a label, id=<hexadecimal CKA_ID>, or a URI: pkcs11:object=…;id=%…"


def _how_to_tell_apart(found: list[Object]) -> str:
    """The next step where a locator fits several private keys: the URI of each one that a URI can name alone."""
    names = [
        (bytes(read_optional(k, Attribute.ID) or b""), str(read_optional(k, Attribute.LABEL) or "")) for k in found
    ]
    uris = []
    for id_, label in names:
        text = {"object": label} if label and "\ufffd" not in label else {}
        fitting = [n for n in names if n[0] == id_ and (not text or n[1] == label)]
        if id_ and len(fitting) == 1:
            uris.append(str(uri.Uri(text, id_)))
    rest = len(found) - len(uris)
    steps = []
    if uris:
        steps.append(f"Name one of them: {', '.join(uris[:_SHOWN])}{', …' if len(uris) > _SHOWN else ''}")
    if rest:
        steps.append(f"No locator tells {rest} of them apart: give each a CKA_ID of its own with the vendor's tool")
    return ". ".join(steps) + "."


_SHOWN: Final = 8
"""Keys that a next step names at most."""


def _may_belong(private: Object, jwk: PublicJwk) -> bool:
    """Whether the attributes of a private key allow `jwk` to be its public half. Raises UnsupportedAlgorithm."""
    kind = private[Attribute.KEY_TYPE]
    if kind == KeyType.RSA:
        modulus = read_optional(private, Attribute.MODULUS)
        return jwk["kty"] == "RSA" and (not modulus or int.from_bytes(modulus, "big") == mechanisms.modulus_of(jwk))
    if kind in (KeyType.EC, KeyType.EC_EDWARDS):
        parameters = read_optional(private, Attribute.EC_PARAMS)
        return jwk.get("crv") in mechanisms.CURVES and (not parameters or mechanisms.crv_of(parameters) == jwk["crv"])
    if kind == KeyType.ML_DSA:
        number = read_optional(private, Attribute.PARAMETER_SET)
        return jwk["kty"] == "AKP" and (number is None or mechanisms.PARAMETER_SETS.get(number) == jwk["alg"])
    return False


# --- signing ----------------------------------------------------------------------------------------------------------


def sign(pooled: PooledSession, ref: KeyRef, alg: Algorithm, what: Message | Digest) -> bytes:
    """One signature in JOSE form. The key's handle is found once per session and kept."""
    handle = pooled.handles.get(ref)
    if handle is None:
        handle = pooled.handles[ref] = _find_handle(pooled, ref)
    is_key_of = handle.kty == alg.kty and handle.variant == mechanisms.variant_of(alg)
    if not is_key_of or (handle.rsa_bits and handle.rsa_bits not in alg.rsa_bits):
        kind = f"{handle.rsa_bits}-bit RSA" if handle.rsa_bits else f"{handle.kty} {handle.variant}"
        raise BackendRefused(f"The key {_describe(ref)} is {kind}, which {alg.name} does not sign with.")
    data, mechanism = prepare(alg, what, handle.mechanisms)
    size = max(_SIGNATURE_BUFFER, alg.signature_bytes)
    pss = mechanisms.ROWS[alg.name].pss
    signature: bytes = handle.key.sign(data, mechanism=mechanism, mechanism_param=pss, buffer_size=size)
    if len(signature) != alg.signature_length(handle.rsa_bits or None):
        raise InvalidAnswer(f"a signature of {len(signature)} bytes, which {alg.name} never has")
    return signature


def _find_handle(pooled: PooledSession, ref: KeyRef) -> KeyHandle:
    key = find_private_key(pooled, ref)
    jwk = read_jwk(pooled, ref, key)
    usable = pooled.connection.mechanisms
    allowed = read_optional(key, Attribute.ALLOWED_MECHANISMS)
    if allowed:
        usable = frozenset(mechanism for mechanism in usable if mechanism in allowed)
    bits = mechanisms.modulus_bits(jwk) if jwk["kty"] == "RSA" else 0
    return KeyHandle(key, jwk["kty"], jwk.get("crv") or jwk.get("alg"), bits, usable)
