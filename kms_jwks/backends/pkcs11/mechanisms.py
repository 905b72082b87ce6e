"""JOSE algorithm → PKCS#11 mechanism, one row each, and what is handed to the module to be signed. No sessions here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

from pkcs11 import MGF, Mechanism

from kms_jwks.algorithms import Algorithm
from kms_jwks.backends.base import Digest, Message
from kms_jwks.errors import BackendRefused, UnsupportedAlgorithm

Pss: TypeAlias = tuple[Mechanism, MGF, int]


@dataclass(frozen=True, slots=True)
class Row:
    """How one JOSE algorithm is asked for.

    `plain` signs a hash made here (EdDSA: the message itself); `prefix` goes before the hash. `hashing` hashes in the
    module, for modules that do not offer `plain`. `pss` is hash, mask function and salt length in bytes (RFC 7518
    §3.5). `digest_size` is the length of the hash in bytes, 0 for EdDSA.
    """

    generate: Mechanism
    plain: Mechanism
    hashing: Mechanism | None = None
    prefix: bytes = b""
    pss: Pss | None = None
    digest_size: int = 0


def _pss(hash_: Mechanism, mgf: MGF, size: int) -> Pss:
    return (hash_, mgf, size)


# DER of DigestInfo up to the hash, RFC 8017 §9.2 note 1.
_SHA256 = bytes.fromhex("3031300d060960864801650304020105000420")
_SHA384 = bytes.fromhex("3041300d060960864801650304020205000430")
_SHA512 = bytes.fromhex("3051300d060960864801650304020305000440")

_M = Mechanism
_RSA, _EC, _ED = _M.RSA_PKCS_KEY_PAIR_GEN, _M.EC_KEY_PAIR_GEN, _M.EC_EDWARDS_KEY_PAIR_GEN
_ED25519 = Row(_ED, _M.EDDSA)

ROWS: Final[Mapping[str, Row]] = MappingProxyType(
    {
        "RS256": Row(_RSA, _M.RSA_PKCS, _M.SHA256_RSA_PKCS, prefix=_SHA256, digest_size=32),
        "RS384": Row(_RSA, _M.RSA_PKCS, _M.SHA384_RSA_PKCS, prefix=_SHA384, digest_size=48),
        "RS512": Row(_RSA, _M.RSA_PKCS, _M.SHA512_RSA_PKCS, prefix=_SHA512, digest_size=64),
        "PS256": Row(
            _RSA, _M.RSA_PKCS_PSS, _M.SHA256_RSA_PKCS_PSS, pss=_pss(_M.SHA256, MGF.SHA256, 32), digest_size=32
        ),
        "PS384": Row(
            _RSA, _M.RSA_PKCS_PSS, _M.SHA384_RSA_PKCS_PSS, pss=_pss(_M.SHA384, MGF.SHA384, 48), digest_size=48
        ),
        "PS512": Row(
            _RSA, _M.RSA_PKCS_PSS, _M.SHA512_RSA_PKCS_PSS, pss=_pss(_M.SHA512, MGF.SHA512, 64), digest_size=64
        ),
        "ES256": Row(_EC, _M.ECDSA, _M.ECDSA_SHA256, digest_size=32),
        "ES384": Row(_EC, _M.ECDSA, _M.ECDSA_SHA384, digest_size=48),
        "ES512": Row(_EC, _M.ECDSA, _M.ECDSA_SHA512, digest_size=64),
        "ES256K": Row(_EC, _M.ECDSA, _M.ECDSA_SHA256, digest_size=32),
        "EdDSA": _ED25519,
        "Ed25519": _ED25519,
    }
)


def offered(mechanisms: Collection[object]) -> frozenset[str]:
    """The `alg` names a token with these mechanisms can make keys for and sign with. Curves are not among them."""
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
        if not row.digest_size:
            raise BackendRefused(f"{alg.name} signs the message itself, not a digest.")
        if len(what.value) != row.digest_size:
            raise BackendRefused(f"A digest for {alg.name} has {row.digest_size} bytes, not {len(what.value)}.")
    if row.plain in mechanisms:
        if isinstance(what, Digest):
            return row.prefix + what.value, row.plain
        return (row.prefix + what.digest(alg) if row.digest_size else what.data), row.plain
    if row.hashing in mechanisms and row.hashing is not None and isinstance(what, Message):
        return what.data, row.hashing
    raise UnsupportedAlgorithm(f"The module offers no mechanism for {alg.name} over a {type(what).__name__.lower()}.")
