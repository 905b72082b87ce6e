"""JOSE in the terms of PKCS#11: the mechanisms, curves and parameter sets of each algorithm, and JWKs from attributes.

An algorithm is one row of `ROWS`, and where it has a curve or a parameter set of its own, one row of `CURVES` or
`PARAMETER_SETS`. No session is used here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from pkcs11 import MGF, Attribute, KeyType, Mechanism

from kms_jwks import jose
from kms_jwks.algorithms import ALGORITHMS, Algorithm, Family
from kms_jwks.backends.base import Digest, Message, PublicJwk
from kms_jwks.errors import BackendRefused, InvalidJwk, UnsupportedAlgorithm

Template: TypeAlias = dict[Attribute, Any]
Pss: TypeAlias = tuple[Mechanism, MGF, int]


@dataclass(frozen=True, slots=True)
class Row:
    """The mechanisms of one JOSE algorithm.

    `plain` signs a hash made here, with `digest_info` before it (RFC 8017 §9.2 note 1); for EdDSA and ML-DSA, which
    have no hash, it signs the message itself. `hashing` makes the hash in the module, for modules that do not offer
    `plain`. `pss` are the parameters of RSASSA-PSS; the salt is as long as the hash (RFC 7518 §3.5).
    """

    generate: Mechanism
    plain: Mechanism
    hashing: Mechanism | None = None
    digest_info: bytes = b""
    pss: Pss | None = None

    @property
    def signing(self) -> tuple[Mechanism, ...]:
        """Every mechanism that may be asked to sign with the algorithm: all that a new key allows."""
        return (self.plain,) if self.hashing is None else (self.plain, self.hashing)


_M = Mechanism
_RSA, _EC, _ED = _M.RSA_PKCS_KEY_PAIR_GEN, _M.EC_KEY_PAIR_GEN, _M.EC_EDWARDS_KEY_PAIR_GEN
_ML = _M.ML_DSA_KEY_PAIR_GEN
_INFO_256 = bytes.fromhex("3031300d060960864801650304020105000420")
_INFO_384 = bytes.fromhex("3041300d060960864801650304020205000430")
_INFO_512 = bytes.fromhex("3051300d060960864801650304020305000440")

ROWS: Final[Mapping[str, Row]] = MappingProxyType(
    {
        "RS256": Row(_RSA, _M.RSA_PKCS, _M.SHA256_RSA_PKCS, digest_info=_INFO_256),
        "RS384": Row(_RSA, _M.RSA_PKCS, _M.SHA384_RSA_PKCS, digest_info=_INFO_384),
        "RS512": Row(_RSA, _M.RSA_PKCS, _M.SHA512_RSA_PKCS, digest_info=_INFO_512),
        "PS256": Row(_RSA, _M.RSA_PKCS_PSS, _M.SHA256_RSA_PKCS_PSS, pss=(_M.SHA256, MGF.SHA256, 32)),
        "PS384": Row(_RSA, _M.RSA_PKCS_PSS, _M.SHA384_RSA_PKCS_PSS, pss=(_M.SHA384, MGF.SHA384, 48)),
        "PS512": Row(_RSA, _M.RSA_PKCS_PSS, _M.SHA512_RSA_PKCS_PSS, pss=(_M.SHA512, MGF.SHA512, 64)),
        "ES256": Row(_EC, _M.ECDSA, _M.ECDSA_SHA256),
        "ES384": Row(_EC, _M.ECDSA, _M.ECDSA_SHA384),
        "ES512": Row(_EC, _M.ECDSA, _M.ECDSA_SHA512),
        "ES256K": Row(_EC, _M.ECDSA, _M.ECDSA_SHA256),
        "EdDSA": Row(_ED, _M.EDDSA),
        "Ed25519": Row(_ED, _M.EDDSA),
        # CKM_ML_DSA without a parameter is pure ML-DSA with an empty context, as RFC 9964 §4 has it (PKCS#11 v3.2).
        "ML-DSA-44": Row(_ML, _M.ML_DSA),
        "ML-DSA-65": Row(_ML, _M.ML_DSA),
        "ML-DSA-87": Row(_ML, _M.ML_DSA),
    }
)


@dataclass(frozen=True, slots=True)
class Curve:
    """`parameters` are the values of CKA_EC_PARAMS in use for it; the first that a module takes makes new keys."""

    key_type: KeyType
    parameters: tuple[bytes, ...]
    curve: ec.EllipticCurve | None = None


CURVES: Final[Mapping[str, Curve]] = MappingProxyType(
    {
        "P-256": Curve(KeyType.EC, (bytes.fromhex("06082a8648ce3d030107"),), ec.SECP256R1()),
        "P-384": Curve(KeyType.EC, (bytes.fromhex("06052b81040022"),), ec.SECP384R1()),
        "P-521": Curve(KeyType.EC, (bytes.fromhex("06052b81040023"),), ec.SECP521R1()),
        "secp256k1": Curve(KeyType.EC, (bytes.fromhex("06052b8104000a"),), ec.SECP256K1()),
        "Ed25519": Curve(
            KeyType.EC_EDWARDS,
            (
                bytes.fromhex("130c") + b"edwards25519",  # PrintableString, PKCS#11 v3.0: SoftHSM
                bytes.fromhex("06032b6570"),  # 1.3.101.112, RFC 8410
                bytes.fromhex("06092b06010401da470f01"),  # 1.3.6.1.4.1.11591.15.1, GNU's, before RFC 8410
            ),
        ),
    }
)
_CRV: Final = {parameters: crv for crv, row in CURVES.items() for parameters in row.parameters}
_POINT_BYTES: Final = {
    alg.crv: alg.coordinate if alg.family is Family.EDDSA else 1 + 2 * alg.coordinate
    for alg in ALGORITHMS.values()
    if alg.crv is not None
}
"""By `crv`: the length of the public point as X9.62 (uncompressed) or RFC 8032 has it."""

PARAMETER_SETS: Final[Mapping[int, str]] = MappingProxyType({1: "ML-DSA-44", 2: "ML-DSA-65", 3: "ML-DSA-87"})
"""CKA_PARAMETER_SET of ML-DSA keys (CKP_ML_DSA_…, PKCS#11 v3.2) → `alg`."""


# --- signing ----------------------------------------------------------------------------------------------------------


def supported_algorithms(mechanisms: Collection[object]) -> frozenset[str]:
    """The `alg` names for which a token with these mechanisms can make keys and sign.

    Curves and parameter sets are not considered: a token does not list them.
    """
    return frozenset(
        name
        for name, row in ROWS.items()
        if row.generate in mechanisms and (row.plain in mechanisms or row.hashing in mechanisms)
    )


def prepare(alg: Algorithm, what: Message | Digest, mechanisms: Collection[object]) -> tuple[bytes, Mechanism]:
    """The bytes to hand to the module, and the mechanism that signs them.

    Raises UnsupportedAlgorithm, and BackendRefused for a digest that `alg` does not sign.
    """
    row = ROWS.get(alg.name)
    if row is None:
        raise UnsupportedAlgorithm(f"PKCS#11 backends do not know {alg.name}.")
    if isinstance(what, Digest):
        if alg.hash is None:
            raise BackendRefused(f"{alg.name} signs the message itself, not a digest.")
        size = hashlib.new(alg.hash).digest_size
        if len(what.value) != size:
            raise BackendRefused(f"A digest for {alg.name} has {size} bytes, not {len(what.value)}.")
    if row.plain in mechanisms:
        if isinstance(what, Digest):
            return row.digest_info + what.value, row.plain
        return (what.data if alg.hash is None else row.digest_info + what.digest(alg)), row.plain
    if row.hashing is not None and row.hashing in mechanisms and isinstance(what, Message):
        return what.data, row.hashing
    raise UnsupportedAlgorithm(f"The module offers no mechanism for {alg.name} over a {type(what).__name__.lower()}.")


# --- public keys ------------------------------------------------------------------------------------------------------


def rsa_jwk(modulus: bytes, exponent: bytes) -> PublicJwk:
    """The JWK of an RSA key (RFC 7518 §6.3.1) from CKA_MODULUS and CKA_PUBLIC_EXPONENT. Raises BackendRefused."""
    try:
        numbers = rsa.RSAPublicNumbers(int.from_bytes(exponent, "big"), int.from_bytes(modulus, "big"))
        return jose.public_jwk(numbers.public_key())
    except (ValueError, InvalidJwk) as error:
        raise BackendRefused("The module holds a public key that is no RSA key.") from error


def ec_jwk(crv: str, point: bytes) -> PublicJwk:
    """The JWK of CKA_EC_POINT, which modules give bare or wrapped in an OCTET or BIT STRING. Raises BackendRefused."""
    curve = CURVES[crv].curve
    bare = _unwrap(point, _POINT_BYTES[crv])
    try:
        if curve is not None:
            return jose.public_jwk(ec.EllipticCurvePublicKey.from_encoded_point(curve, bare))
        return jose.public_jwk(ed25519.Ed25519PublicKey.from_public_bytes(bare))
    except (ValueError, InvalidJwk) as error:
        raise BackendRefused(f"The module holds a public key that is no point of {crv}.") from error


def _unwrap(point: bytes, size: int) -> bytes:
    """The last `size` bytes, where the bytes before them are the DER header of a string of that length."""
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


def variant_of(alg: Algorithm) -> str | None:
    """What distinguishes keys of one `kty`: the curve or the parameter set; None of RSA keys."""
    return alg.name if alg.is_post_quantum else alg.crv


def matches(alg: Algorithm, jwk: PublicJwk) -> bool:
    """Whether the key is one that `alg` signs with."""
    if jwk["kty"] != alg.kty or (jwk.get("crv") or jwk.get("alg")) != variant_of(alg):
        return False
    return not alg.is_rsa or modulus_bits(jwk) in alg.rsa_bits


def modulus_of(jwk: PublicJwk) -> int:
    """The modulus of an RSA key."""
    return int.from_bytes(jose.b64u_decode(jwk["n"]), "big")


def modulus_bits(jwk: PublicJwk) -> int:
    """The length of an RSA key's modulus in bits."""
    return modulus_of(jwk).bit_length()
