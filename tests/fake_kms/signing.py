"""The private keys of the fake KMS: how each KeySpec is made and signs. The signatures are real (cryptography)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, padding, rsa, utils
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

MlDsa = mldsa.MLDSA44PrivateKey | mldsa.MLDSA65PrivateKey | mldsa.MLDSA87PrivateKey
Private = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | MlDsa

_RSA = tuple(f"RSASSA_{padding_}_SHA_{bits}" for padding_ in ("PKCS1_V1_5", "PSS") for bits in (256, 384, 512))
SPECS: Mapping[str, tuple[Callable[[], Private], tuple[str, ...]]] = {
    "RSA_2048": (lambda: rsa.generate_private_key(65537, 2048), _RSA),
    "RSA_3072": (lambda: rsa.generate_private_key(65537, 3072), _RSA),
    "RSA_4096": (lambda: rsa.generate_private_key(65537, 4096), _RSA),
    "ECC_NIST_P256": (lambda: ec.generate_private_key(ec.SECP256R1()), ("ECDSA_SHA_256",)),
    "ECC_NIST_P384": (lambda: ec.generate_private_key(ec.SECP384R1()), ("ECDSA_SHA_384",)),
    "ECC_NIST_P521": (lambda: ec.generate_private_key(ec.SECP521R1()), ("ECDSA_SHA_512",)),
    "ECC_SECG_P256K1": (lambda: ec.generate_private_key(ec.SECP256K1()), ("ECDSA_SHA_256",)),
    "ECC_NIST_EDWARDS25519": (ed25519.Ed25519PrivateKey.generate, ("ED25519_SHA_512", "ED25519_PH_SHA_512")),
    "ML_DSA_44": (mldsa.MLDSA44PrivateKey.generate, ("ML_DSA_SHAKE_256",)),
    "ML_DSA_65": (mldsa.MLDSA65PrivateKey.generate, ("ML_DSA_SHAKE_256",)),
    "ML_DSA_87": (mldsa.MLDSA87PrivateKey.generate, ("ML_DSA_SHAKE_256",)),
}
"""KeySpec → how a key is made, and its SigningAlgorithms."""

_HASHES: Mapping[str, Callable[[], hashes.HashAlgorithm]] = {
    "256": hashes.SHA256,
    "384": hashes.SHA384,
    "512": hashes.SHA512,
}
MESSAGE_BYTES = 4096
MU_BYTES = 64


class Refused(Exception):
    """The code and text of an error answer; `status` is its HTTP status."""

    def __init__(self, code: str, text: str = "", *, status: int = 400) -> None:
        super().__init__(code)
        self.code, self.text, self.status = code, text, status


def spki(key: Private) -> bytes:
    """The public key in GetPublicKey's answer."""
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def sign(key: Private, algorithm: str, message: bytes, kind: str) -> bytes:
    """Sign as KMS does: DER for ECDSA, PSS salt as long as the hash; DIGEST and EXTERNAL_MU are not hashed again."""
    if not 1 <= len(message) <= MESSAGE_BYTES:
        raise Refused("ValidationException", "Member must have length between 1 and 4096")
    if isinstance(key, ed25519.Ed25519PrivateKey):
        if algorithm != "ED25519_SHA_512" or kind != "RAW":
            raise Refused("ValidationException", f"{algorithm} does not take MessageType {kind}")
        return key.sign(message)
    if isinstance(key, MlDsa):
        return _ml_dsa(key, message, kind)
    hash_ = _HASHES[algorithm[-3:]]()
    if kind not in ("RAW", "DIGEST") or (kind == "DIGEST" and len(message) != hash_.digest_size):
        raise Refused("ValidationException", f"{len(message)} bytes are no {kind} for {algorithm}")
    hashed: Any = utils.Prehashed(hash_) if kind == "DIGEST" else hash_
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(message, ec.ECDSA(hashed))
    if "PSS" in algorithm:
        return key.sign(message, padding.PSS(padding.MGF1(hash_), hash_.digest_size), hashed)
    return key.sign(message, padding.PKCS1v15(), hashed)


def _ml_dsa(key: MlDsa, message: bytes, kind: str) -> bytes:
    if kind == "RAW":
        return key.sign(message)
    if kind == "EXTERNAL_MU" and len(message) == MU_BYTES:
        return key.sign_mu(message)
    raise Refused("ValidationException", f"{len(message)} bytes are no {kind} for ML-DSA")
