"""JOSE signature algorithms: one frozen row each (RFC 7518 §3, RFC 8037, RFC 8812, RFC 9864, RFC 9964).

Every size, curve and hash of an algorithm stands in its row; other modules look them up here. Nothing here signs. No
module parses an algorithm's name or guesses an algorithm from a key's size.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal, TypeAlias, get_args


class Family(StrEnum):
    """The signature scheme; a backend selects its mechanism by it."""

    RSA_PKCS1 = "rsa-pkcs1"
    RSA_PSS = "rsa-pss"
    ECDSA = "ecdsa"
    EDDSA = "eddsa"
    ML_DSA = "ml-dsa"


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One JOSE algorithm.

    `name` is the `alg` value. `kty` and `crv` are those of its JWKs. `hash` is the hashlib name of the hash that is
    signed; None for EdDSA and ML-DSA, which sign the message itself. `coordinate` is the length in bytes of one
    coordinate of the curve and of each half of the signature (r and s, or R and S). `rsa_bits` are the modulus sizes
    allowed. `public_bytes` and `signature_bytes` are the lengths of an ML-DSA public key and signature (FIPS 204,
    table 2). `exclusive` marks an algorithm that widespread verifiers do not know; its keys live in key sets of their
    own (I5).
    """

    name: str
    family: Family
    kty: str
    hash: str | None = None
    crv: str | None = None
    coordinate: int = 0
    rsa_bits: tuple[int, ...] = ()
    public_bytes: int = 0
    signature_bytes: int = 0
    exclusive: bool = False

    @property
    def is_post_quantum(self) -> bool:
        """Whether its keys (kty AKP) are published in a document of their own: many verifiers reject a whole JWKS that
        holds one key of an unknown type."""
        return self.kty == "AKP"

    @property
    def is_rsa(self) -> bool:
        """Whether its keys have a modulus."""
        return self.kty == "RSA"

    def signature_length(self, rsa_bits: int | None = None) -> int:
        """Length in bytes of the JOSE-form signature; of an RSA signature that of the modulus."""
        if self.is_rsa:
            if rsa_bits is None:
                raise ValueError("the length of an RSA signature depends on the modulus")
            return rsa_bits // 8
        return self.signature_bytes or 2 * self.coordinate


RsaBits: TypeAlias = Literal[2048, 3072, 4096]
"""The modulus sizes of keys that the service makes, in bits."""
RSA_BITS: Final[tuple[int, ...]] = get_args(RsaBits)
DEFAULT_RSA_BITS: Final[RsaBits] = 3072

_ROWS = (
    Algorithm("RS256", Family.RSA_PKCS1, "RSA", hash="sha256", rsa_bits=RSA_BITS),
    Algorithm("RS384", Family.RSA_PKCS1, "RSA", hash="sha384", rsa_bits=RSA_BITS),
    Algorithm("RS512", Family.RSA_PKCS1, "RSA", hash="sha512", rsa_bits=RSA_BITS),
    Algorithm("PS256", Family.RSA_PSS, "RSA", hash="sha256", rsa_bits=RSA_BITS),
    Algorithm("PS384", Family.RSA_PSS, "RSA", hash="sha384", rsa_bits=RSA_BITS),
    Algorithm("PS512", Family.RSA_PSS, "RSA", hash="sha512", rsa_bits=RSA_BITS),
    Algorithm("ES256", Family.ECDSA, "EC", hash="sha256", crv="P-256", coordinate=32),
    Algorithm("ES384", Family.ECDSA, "EC", hash="sha384", crv="P-384", coordinate=48),
    Algorithm("ES512", Family.ECDSA, "EC", hash="sha512", crv="P-521", coordinate=66),
    Algorithm("ES256K", Family.ECDSA, "EC", hash="sha256", crv="secp256k1", coordinate=32, exclusive=True),
    Algorithm("EdDSA", Family.EDDSA, "OKP", crv="Ed25519", coordinate=32),
    Algorithm("Ed25519", Family.EDDSA, "OKP", crv="Ed25519", coordinate=32),
    Algorithm("ML-DSA-44", Family.ML_DSA, "AKP", public_bytes=1312, signature_bytes=2420),
    Algorithm("ML-DSA-65", Family.ML_DSA, "AKP", public_bytes=1952, signature_bytes=3309),
    Algorithm("ML-DSA-87", Family.ML_DSA, "AKP", public_bytes=2592, signature_bytes=4627),
)

ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType({row.name: row for row in _ROWS})
"""Every algorithm the service knows, by its `alg` value."""

COORDINATES: Mapping[str, int] = MappingProxyType({row.crv: row.coordinate for row in _ROWS if row.crv is not None})
"""The length in bytes of one coordinate of each curve, by its `crv` value."""

PRIVATE_MEMBERS: Final = ("d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv", "seed")
"""Members of a JWK that make it private or secret (RFC 7518 §6, RFC 9964)."""
JWK_PARAMETERS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x"), "AKP": ("alg", "pub")}
)
"""The members of a public JWK that make up the key, by its `kty` (RFC 7518 §6, RFC 8037 §2, RFC 9964 §3)."""


def repair_jwk(jwk: Mapping[str, object]) -> dict[str, object]:
    """The JWK with its parameters in their canonical encoding; members that cannot be read stay as they are.

    It takes padding and the plain base64 alphabet for base64url (RFC 7515 §2), drops leading zero octets of n and e
    (RFC 7518 §6.3.1), and brings coordinates to the curve's length (§6.2.1.2). The key itself does not change.
    """
    repaired = dict(jwk)
    kty = str(jwk.get("kty"))
    for name in JWK_PARAMETERS.get(kty, ()):
        value = jwk.get(name)
        if name in ("crv", "alg") or not isinstance(value, str):
            continue
        text = "".join(value.split()).replace("+", "-").replace("/", "_").rstrip("=")
        try:
            octets = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except ValueError:
            continue
        if octets and kty in ("RSA", "EC"):
            size = COORDINATES.get(str(jwk.get("crv")), 0) if kty == "EC" else 0
            octets = octets.lstrip(b"\0").rjust(size, b"\0")
        repaired[name] = base64.urlsafe_b64encode(octets).rstrip(b"=").decode("ascii")
    return repaired
