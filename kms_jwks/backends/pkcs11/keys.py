"""Keys as PKCS#11 attributes: templates of new ones, public JWKs, curves, and the evidence of promise 1."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from pkcs11 import Attribute, KeyType, Mechanism, Object, PKCS11Error
from pkcs11.attributes import AttributeMapper, handle_ulong

from kms_jwks import jose
from kms_jwks.algorithms import ALGORITHMS, Algorithm
from kms_jwks.backends.base import Evidence, PublicJwk
from kms_jwks.backends.pkcs11.error_map import Meaning, meaning_of
from kms_jwks.errors import BackendRefused, InvalidJwk, UnsupportedAlgorithm

Template: TypeAlias = dict[Attribute, Any]


class Mapper(AttributeMapper):
    """python-pkcs11's attribute coding, made to survive what other people's objects hold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_handler(Attribute.LABEL, str.encode, lambda value: value.decode("utf-8", "replace"))
        for attribute in (Attribute.KEY_TYPE, Attribute.KEY_GEN_MECHANISM):
            # As numbers: vendors define their own, which python-pkcs11's enumerations refuse.
            self.register_handler(attribute, *handle_ulong)
        # One that python-pkcs11 leaves out: CK_MECHANISM_TYPE, one after the other.
        self.register_handler(Attribute.ALLOWED_MECHANISMS, _packed, _unpacked)


def _packed(mechanisms: Iterable[int]) -> bytes:
    return array("L", mechanisms).tobytes()


def _unpacked(value: bytes) -> tuple[int, ...]:
    return tuple(array("L", value))


@dataclass(frozen=True, slots=True)
class Curve:
    """`parameters` are the values of CKA_EC_PARAMS in use for it; the first that a module takes makes new keys."""

    key_type: KeyType
    parameters: tuple[bytes, ...]
    point_size: int
    """Bytes of the public point as X9.62 (uncompressed) or RFC 8032 has it."""
    curve: ec.EllipticCurve | None = None


CURVES: Final[Mapping[str, Curve]] = MappingProxyType(
    {
        "P-256": Curve(KeyType.EC, (bytes.fromhex("06082a8648ce3d030107"),), 65, ec.SECP256R1()),
        "P-384": Curve(KeyType.EC, (bytes.fromhex("06052b81040022"),), 97, ec.SECP384R1()),
        "P-521": Curve(KeyType.EC, (bytes.fromhex("06052b81040023"),), 133, ec.SECP521R1()),
        "secp256k1": Curve(KeyType.EC, (bytes.fromhex("06052b8104000a"),), 65, ec.SECP256K1()),
        "Ed25519": Curve(
            KeyType.EC_EDWARDS,
            (
                bytes.fromhex("130c") + b"edwards25519",  # PrintableString, PKCS#11 v3.0: SoftHSM
                bytes.fromhex("06032b6570"),  # 1.3.101.112, RFC 8410
                bytes.fromhex("06092b06010401da470f01"),  # 1.3.6.1.4.1.11591.15.1, GNU's, before RFC 8410
            ),
            32,
        ),
    }
)
PARAMETER_SETS: Final[Mapping[int, str]] = MappingProxyType({1: "ML-DSA-44", 2: "ML-DSA-65", 3: "ML-DSA-87"})
"""CKA_PARAMETER_SET of ML-DSA keys (CKP_ML_DSA_…, PKCS#11 v3.2) → `alg`."""
_CRV: Final = {parameters: crv for crv, row in CURVES.items() for parameters in row.parameters}


# --- templates --------------------------------------------------------------------------------------------------------

PRIVATE: Final[Mapping[Attribute, Any]] = MappingProxyType(
    {
        Attribute.TOKEN: True,
        Attribute.PRIVATE: True,
        Attribute.SENSITIVE: True,
        Attribute.EXTRACTABLE: False,
        Attribute.SIGN: True,
        Attribute.DECRYPT: False,
        Attribute.SIGN_RECOVER: False,
        Attribute.UNWRAP: False,
        Attribute.DERIVE: False,
    }
)
"""Signing is all that a new private key can do."""
PUBLIC: Final[Mapping[Attribute, Any]] = MappingProxyType(
    {
        Attribute.TOKEN: True,
        Attribute.PRIVATE: False,
        Attribute.VERIFY: True,
        Attribute.ENCRYPT: False,
        Attribute.WRAP: False,
    }
)
FROZEN: Final[Mapping[Attribute, Any]] = MappingProxyType({Attribute.MODIFIABLE: False, Attribute.COPYABLE: False})
"""Added where the module takes it: else whoever has the PIN could give a key, or a copy of it, further uses."""


def strict(mechanisms: Collection[Mechanism]) -> Iterator[tuple[Template, Template]]:
    """What to add to a private and a public key's template, strictest first; the last adds nothing.

    `mechanisms` are all that the key is to sign with (CKA_ALLOWED_MECHANISMS).
    """
    restricted: Template = {Attribute.ALLOWED_MECHANISMS: mechanisms}
    frozen = dict(FROZEN)
    yield {**frozen, **restricted}, frozen
    yield frozen, frozen
    yield restricted, {}
    yield {}, {}


# --- public keys ------------------------------------------------------------------------------------------------------


def rsa_jwk(modulus: bytes, exponent: bytes) -> PublicJwk:
    """The JWK of an RSA key (RFC 7518 §6.3.1). Raises BackendRefused."""
    try:
        numbers = rsa.RSAPublicNumbers(int.from_bytes(exponent, "big"), int.from_bytes(modulus, "big"))
        return jose.public_jwk(numbers.public_key())
    except (ValueError, InvalidJwk) as error:
        raise BackendRefused("The module holds a public key that is no RSA key.") from error


def ec_jwk(crv: str, point: bytes) -> PublicJwk:
    """The JWK of CKA_EC_POINT, which modules give bare or wrapped in an OCTET or BIT STRING. Raises BackendRefused."""
    row = CURVES[crv]
    bare = _unwrapped(point, row.point_size)
    try:
        if row.curve is not None:
            return jose.public_jwk(ec.EllipticCurvePublicKey.from_encoded_point(row.curve, bare))
        return jose.public_jwk(ed25519.Ed25519PublicKey.from_public_bytes(bare))
    except (ValueError, InvalidJwk) as error:
        raise BackendRefused(f"The module holds a public key that is no point of {crv}.") from error


def _unwrapped(point: bytes, size: int) -> bytes:
    """The last `size` bytes, when what is before them is a DER header that says so."""
    header, bare = point[:-size], point[-size:]
    length = bytes([size]) if size < 0x80 else bytes([0x81, size])
    bit_length = bytes([size + 1, 0]) if size + 1 < 0x80 else bytes([0x81, size + 1, 0])
    return bare if header in (b"", b"\x04" + length, b"\x03" + bit_length) else point


def crv_of(parameters: bytes) -> str:
    """The JOSE name of the curve of CKA_EC_PARAMS. Raises UnsupportedAlgorithm."""
    crv = _CRV.get(parameters)
    if crv is None:
        raise UnsupportedAlgorithm(f"The key is on a curve that JOSE does not sign with ({parameters.hex()}).")
    return crv


def ml_dsa_jwk(parameter_set: int, value: bytes) -> PublicJwk:
    """The JWK of CKA_PARAMETER_SET and a public key's CKA_VALUE (PKCS#11 v3.2, RFC 9964 §3).

    Raises UnsupportedAlgorithm, BackendRefused.
    """
    name = PARAMETER_SETS.get(parameter_set)
    if name is None:
        raise UnsupportedAlgorithm(f"The key has CKA_PARAMETER_SET {parameter_set:#x}, which FIPS 204 does not have.")
    if len(value) != ALGORITHMS[name].public_bytes:
        raise BackendRefused(f"The module holds a public key of {len(value)} bytes, which {name} never has.")
    return {"kty": "AKP", "alg": name, "pub": jose.b64u_encode(value)}


def variant(alg: Algorithm) -> str | None:
    """What tells keys of one `kty` apart: the curve, or the parameter set, None for RSA."""
    return alg.name if alg.is_post_quantum else alg.crv


def fits(alg: Algorithm, jwk: PublicJwk) -> bool:
    """Whether the key is one that `alg` signs with."""
    if jwk["kty"] != alg.kty or (jwk.get("crv") or jwk.get("alg")) != variant(alg):
        return False
    return not alg.is_rsa or modulus_bits(jwk) in alg.rsa_bits


def modulus(jwk: PublicJwk) -> int:
    """Of an RSA key."""
    return int.from_bytes(jose.b64u_decode(jwk["n"]), "big")


def modulus_bits(jwk: PublicJwk) -> int:
    """The length of an RSA key's modulus."""
    return modulus(jwk).bit_length()


# --- evidence ---------------------------------------------------------------------------------------------------------

# A module that does not know a use cannot put the key to it; SENSITIVE and its kin have to be known.
_USES: Final = (
    Attribute.DECRYPT,
    Attribute.UNWRAP,
    Attribute.DERIVE,
    Attribute.SIGN_RECOVER,
    Attribute.ENCRYPT,
    Attribute.WRAP,
)
_EVIDENCE: Final = (
    Attribute.SENSITIVE,
    Attribute.ALWAYS_SENSITIVE,
    Attribute.EXTRACTABLE,
    Attribute.NEVER_EXTRACTABLE,
    Attribute.LOCAL,
    Attribute.KEY_GEN_MECHANISM,
    Attribute.TOKEN,
    Attribute.PRIVATE,
    Attribute.MODIFIABLE,
    Attribute.COPYABLE,
    Attribute.DESTROYABLE,
    Attribute.ALLOWED_MECHANISMS,
    Attribute.ALWAYS_AUTHENTICATE,
    Attribute.WRAP_WITH_TRUSTED,
    Attribute.SIGN,
    *_USES,
)


def optional(key: Object, attribute: Attribute) -> Any:
    """An attribute, None where this kind of object has none. Raises PKCS11Error when the module fails."""
    try:
        return key[attribute]
    except PKCS11Error as error:
        if meaning_of(error) is Meaning.ABSENT:
            return None
        raise


def evidence_of(private: Object) -> Evidence:
    """Read a private key's attributes back and judge them."""
    read = {attribute: optional(private, attribute) for attribute in _EVIDENCE}
    return Evidence(
        attributes={f"CKA_{attribute.name}": _shown(value) for attribute, value in read.items()},
        generated_in_module=read[Attribute.LOCAL] is True,
        non_extractable=(
            read[Attribute.SENSITIVE] is True
            and read[Attribute.ALWAYS_SENSITIVE] is True
            and read[Attribute.EXTRACTABLE] is False
            and read[Attribute.NEVER_EXTRACTABLE] is True
        ),
        sign_only=read[Attribute.SIGN] is True and not any(read[use] for use in _USES),
    )


def _shown(value: Any) -> Any:
    """An attribute as evidence keeps it: mechanisms by their names, an empty list as no restriction."""
    if not isinstance(value, tuple):
        return value
    return ", ".join(_mechanism(number) for number in sorted(value)) or None


def _mechanism(number: int) -> str:
    try:
        return f"CKM_{Mechanism(number).name}"
    except ValueError:
        return f"{number:#x}"
