"""JOSE algorithm → PKCS#11 mechanism, one row each, and what is handed to the module to be signed. No sessions here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256, sha384, sha512
from types import MappingProxyType
from typing import Final, Protocol, TypeAlias

from pkcs11 import MGF, Mechanism

from kms_jwks.algorithms import Algorithm
from kms_jwks.backends.base import Digest, Message
from kms_jwks.errors import BackendRefused, UnsupportedAlgorithm

Pss: TypeAlias = tuple[Mechanism, MGF, int]


class _Digest(Protocol):
    def digest(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Hash:
    """A hash function: `size` in bytes, `digest_info` the DER before it (RFC 8017 §9.2 note 1), `pss` its parameters.

    The salt is as long as the hash (RFC 7518 §3.5).
    """

    make: Callable[[bytes], _Digest]
    size: int
    digest_info: bytes
    pss: Pss


@dataclass(frozen=True, slots=True)
class Row:
    """How one JOSE algorithm is asked for.

    `plain` signs a `hash` made here, with `prefix` before it; EdDSA and ML-DSA have none and take the message itself.
    `hashing` hashes in the module, for modules that do not offer `plain`.
    """

    generate: Mechanism
    plain: Mechanism
    hashing: Mechanism | None = None
    hash: Hash | None = None
    prefix: bytes = b""
    pss: Pss | None = None

    @property
    def signing(self) -> tuple[Mechanism, ...]:
        """Every mechanism that may be asked to sign with the algorithm: all that a new key is allowed."""
        return (self.plain,) if self.hashing is None else (self.plain, self.hashing)


_M = Mechanism
_S256 = Hash(sha256, 32, bytes.fromhex("3031300d060960864801650304020105000420"), (_M.SHA256, MGF.SHA256, 32))
_S384 = Hash(sha384, 48, bytes.fromhex("3041300d060960864801650304020205000430"), (_M.SHA384, MGF.SHA384, 48))
_S512 = Hash(sha512, 64, bytes.fromhex("3051300d060960864801650304020305000440"), (_M.SHA512, MGF.SHA512, 64))
_RSA, _EC, _ED = _M.RSA_PKCS_KEY_PAIR_GEN, _M.EC_KEY_PAIR_GEN, _M.EC_EDWARDS_KEY_PAIR_GEN
_ML = _M.ML_DSA_KEY_PAIR_GEN

ROWS: Final[Mapping[str, Row]] = MappingProxyType(
    {
        "RS256": Row(_RSA, _M.RSA_PKCS, _M.SHA256_RSA_PKCS, _S256, prefix=_S256.digest_info),
        "RS384": Row(_RSA, _M.RSA_PKCS, _M.SHA384_RSA_PKCS, _S384, prefix=_S384.digest_info),
        "RS512": Row(_RSA, _M.RSA_PKCS, _M.SHA512_RSA_PKCS, _S512, prefix=_S512.digest_info),
        "PS256": Row(_RSA, _M.RSA_PKCS_PSS, _M.SHA256_RSA_PKCS_PSS, _S256, pss=_S256.pss),
        "PS384": Row(_RSA, _M.RSA_PKCS_PSS, _M.SHA384_RSA_PKCS_PSS, _S384, pss=_S384.pss),
        "PS512": Row(_RSA, _M.RSA_PKCS_PSS, _M.SHA512_RSA_PKCS_PSS, _S512, pss=_S512.pss),
        "ES256": Row(_EC, _M.ECDSA, _M.ECDSA_SHA256, _S256),
        "ES384": Row(_EC, _M.ECDSA, _M.ECDSA_SHA384, _S384),
        "ES512": Row(_EC, _M.ECDSA, _M.ECDSA_SHA512, _S512),
        "ES256K": Row(_EC, _M.ECDSA, _M.ECDSA_SHA256, _S256),
        "EdDSA": Row(_ED, _M.EDDSA),
        "Ed25519": Row(_ED, _M.EDDSA),
        # CKM_ML_DSA without a parameter is pure ML-DSA with an empty context, as RFC 9964 §4 has it (PKCS#11 v3.2).
        "ML-DSA-44": Row(_ML, _M.ML_DSA),
        "ML-DSA-65": Row(_ML, _M.ML_DSA),
        "ML-DSA-87": Row(_ML, _M.ML_DSA),
    }
)


def offered(mechanisms: Collection[object]) -> frozenset[str]:
    """The `alg` names a token with these mechanisms can make keys for and sign with.

    Curves and parameter sets are not among them.
    """
    return frozenset(
        name
        for name, row in ROWS.items()
        if row.generate in mechanisms and (row.plain in mechanisms or row.hashing in mechanisms)
    )


def prepared(alg: Algorithm, what: Message | Digest, mechanisms: Collection[object]) -> tuple[bytes, Mechanism]:
    """The bytes for the module and the mechanism that makes the signature of them.

    Raises UnsupportedAlgorithm, and BackendRefused for a digest that `alg` does not sign.
    """
    row = ROWS.get(alg.name)
    if row is None:
        raise UnsupportedAlgorithm(f"PKCS#11 backends do not know {alg.name}.")
    if isinstance(what, Digest):
        if row.hash is None:
            raise BackendRefused(f"{alg.name} signs the message itself, not a digest.")
        if len(what.value) != row.hash.size:
            raise BackendRefused(f"A digest for {alg.name} has {row.hash.size} bytes, not {len(what.value)}.")
    if row.plain in mechanisms:
        if isinstance(what, Digest):
            return row.prefix + what.value, row.plain
        return (what.data if row.hash is None else row.prefix + row.hash.make(what.data).digest()), row.plain
    if row.hashing is not None and row.hashing in mechanisms and isinstance(what, Message):
        return what.data, row.hashing
    raise UnsupportedAlgorithm(f"The module offers no mechanism for {alg.name} over a {type(what).__name__.lower()}.")
