"""Keys in the terms of KMS: KeySpecs and signing algorithms, ARNs, aliases, references, public keys, evidence. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm as UnknownKey
from cryptography.hazmat.primitives.asymmetric import mldsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from kms_jwks import jose
from kms_jwks.algorithms import ALGORITHMS, Algorithm, Family
from kms_jwks.backends.base import Digest, Evidence, KeyRef, Message, PublicJwk
from kms_jwks.errors import BackendRefused, InvalidJwk, UnsupportedAlgorithm

MESSAGE_BYTES: Final = 4096
"""The longest message that KMS hashes itself."""

# --- algorithms -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AlgorithmRow:
    """One JOSE algorithm in KMS: SigningAlgorithm, and the KeySpec by modulus size (None for keys that are not RSA)."""

    signing_algorithm: str
    specs: Mapping[int | None, str]


_RSA: Final[Mapping[int | None, str]] = {2048: "RSA_2048", 3072: "RSA_3072", 4096: "RSA_4096"}
ROWS: Final[Mapping[str, AlgorithmRow]] = MappingProxyType(
    {
        "RS256": AlgorithmRow("RSASSA_PKCS1_V1_5_SHA_256", _RSA),
        "RS384": AlgorithmRow("RSASSA_PKCS1_V1_5_SHA_384", _RSA),
        "RS512": AlgorithmRow("RSASSA_PKCS1_V1_5_SHA_512", _RSA),
        "PS256": AlgorithmRow("RSASSA_PSS_SHA_256", _RSA),
        "PS384": AlgorithmRow("RSASSA_PSS_SHA_384", _RSA),
        "PS512": AlgorithmRow("RSASSA_PSS_SHA_512", _RSA),
        "ES256": AlgorithmRow("ECDSA_SHA_256", {None: "ECC_NIST_P256"}),
        "ES384": AlgorithmRow("ECDSA_SHA_384", {None: "ECC_NIST_P384"}),
        "ES512": AlgorithmRow("ECDSA_SHA_512", {None: "ECC_NIST_P521"}),
        "ES256K": AlgorithmRow("ECDSA_SHA_256", {None: "ECC_SECG_P256K1"}),
        # ED25519_PH_SHA_512 is Ed25519ph, another signature scheme, which JOSE does not have.
        "EdDSA": AlgorithmRow("ED25519_SHA_512", {None: "ECC_NIST_EDWARDS25519"}),
        "Ed25519": AlgorithmRow("ED25519_SHA_512", {None: "ECC_NIST_EDWARDS25519"}),
        "ML-DSA-44": AlgorithmRow("ML_DSA_SHAKE_256", {None: "ML_DSA_44"}),
        "ML-DSA-65": AlgorithmRow("ML_DSA_SHAKE_256", {None: "ML_DSA_65"}),
        "ML-DSA-87": AlgorithmRow("ML_DSA_SHAKE_256", {None: "ML_DSA_87"}),
    }
)
"""By `alg`. A region may lack some of them; KMS then refuses to make the key."""

SPECS: Final = frozenset(spec for row in ROWS.values() for spec in row.specs.values())
"""The KeySpecs whose keys make JOSE signatures."""


@dataclass(frozen=True, slots=True)
class PublicKeyFacts:
    """What never changes about a key pair in KMS: its public key and what follows from it."""

    jwk: PublicJwk
    public: jose.PublicKey

    @property
    def rsa_bits(self) -> int | None:
        """Bits of the modulus; None for keys that are not RSA."""
        return self.public.key_size if self.jwk["kty"] == "RSA" else None  # type: ignore[union-attr]

    def fits(self, alg: Algorithm) -> bool:
        """Whether such a key signs with `alg`."""
        if self.jwk["kty"] != alg.kty or self.jwk.get("crv") != alg.crv:
            return False
        if alg.is_rsa:
            return self.rsa_bits in alg.rsa_bits
        return alg.family is not Family.ML_DSA or self.jwk["alg"] == alg.name

    @property
    def description(self) -> str:
        """The kind of key, in words."""
        if self.rsa_bits:
            return f"a {self.rsa_bits}-bit RSA key"
        return f"a key of {self.jwk.get('crv') or self.jwk.get('alg')}"


def parse_public_key(spki: bytes) -> PublicKeyFacts:
    """The key in GetPublicKey's DER (SubjectPublicKeyInfo, RFC 5280). Raises UnsupportedAlgorithm, BackendRefused."""
    try:
        jwk = jose.public_jwk(load_der_public_key(spki))
        return PublicKeyFacts(jwk, jose.public_key(jwk))
    except (UnknownKey, InvalidJwk) as error:
        raise UnsupportedAlgorithm("The key is of a kind that no JOSE algorithm uses.") from error
    except ValueError as error:
        raise BackendRefused("KMS answered a public key that is not a SubjectPublicKeyInfo.") from error


def prepare_message(alg: Algorithm, what: Message | Digest, facts: PublicKeyFacts) -> tuple[str, bytes]:
    """MessageType and Message of a Sign call. Raises BackendRefused for a message that KMS cannot sign."""
    if isinstance(what, Digest):
        if alg.hash is None:
            raise BackendRefused(f"{alg.name} signs the message itself, not a digest.")
        length = len(Message(b"").digest(alg))
        if len(what.value) != length:
            raise BackendRefused(f"A digest for {alg.name} has {length} bytes, this one {len(what.value)}.")
        return "DIGEST", what.value
    if 0 < len(what.data) <= MESSAGE_BYTES:
        return "RAW", what.data
    if alg.hash is not None:
        return "DIGEST", what.digest(alg)
    if isinstance(facts.public, jose.MlDsaPublicKey):
        hasher = mldsa.MLDSAMuHasher(facts.public)
        hasher.update(what.data)
        return "EXTERNAL_MU", hasher.finalize()
    raise BackendRefused(
        f"KMS signs messages of 1 to {MESSAGE_BYTES} bytes with {alg.name}; this one has {len(what.data)}.",
        next_step="Send less: fewer or shorter claims. ECDSA, RSA and ML-DSA keys have no such limit.",
    )


def to_jose_signature(alg: Algorithm, signature: bytes, facts: PublicKeyFacts) -> bytes:
    """KMS's signature in JOSE form: r‖s for ECDSA (RFC 7518 §3.4). Raises BackendRefused if it is not one of `alg`."""
    try:
        raw = jose.der_to_raw(alg, signature) if alg.family is Family.ECDSA else signature
    except ValueError as error:
        raise BackendRefused(f"KMS made an ECDSA signature that is not one of {alg.name}.") from error
    if len(raw) != alg.signature_length(facts.rsa_bits):
        raise BackendRefused(f"KMS made a signature of {len(raw)} bytes, which {alg.name} never has.")
    return raw


# --- names ------------------------------------------------------------------------------------------------------------

_ARN: Final = re.compile(
    r"arn:(?P<partition>aws[a-z-]*):kms:(?P<region>[a-z0-9-]+):(?P<account>\d{12}):(?P<kind>key|alias)/(?P<name>.+)"
)
_KEY_ID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|mrk-[0-9a-f]{32}")
_ALIAS: Final = re.compile(r"[a-zA-Z0-9/_-]+")
_LABEL_BYTES: Final = 40


@dataclass(frozen=True, slots=True)
class Arn:
    """The parts of the ARN of a key or an alias."""

    region: str
    account: str
    is_alias: bool
    name: str
    text: str

    @classmethod
    def parse(cls, text: str) -> Arn | None:
        """The parts of `text`; None if it is not the ARN of a key or an alias of KMS."""
        found = _ARN.fullmatch(text)
        if found is None:
            return None
        return cls(found["region"], found["account"], found["kind"] == "alias", found["name"], text)

    def with_key(self, key_id: str) -> str:
        """The ARN of a key of the same account and region."""
        return f"{self.text.partition(':alias/')[0].partition(':key/')[0]}:key/{key_id}"


def make_alias(label: str) -> str:
    """The alias of a label, which KMS keeps unique. Raises BackendRefused for a label that cannot be an alias."""
    if not 0 < len(label) <= _LABEL_BYTES or not _ALIAS.fullmatch(label) or label.startswith("aws/"):
        raise BackendRefused(f"A key's label in KMS is 1 to {_LABEL_BYTES} letters, digits and /_- (an alias).")
    return f"alias/{label}"


def parse_locator(locator: str) -> str:
    """The KeyId parameter for a locator: a key id, an ARN, alias/NAME, or the name of an alias without the prefix.

    Raises BackendRefused.
    """
    if Arn.parse(locator) is not None or _KEY_ID.fullmatch(locator):
        return locator
    name = locator.removeprefix("alias/")
    if not _ALIAS.fullmatch(name):
        raise BackendRefused(
            f"The locator {locator!r} is not one of a KMS key.",
            next_step="Give a key id, a key ARN, an alias or its ARN.",
        )
    return f"alias/{name}"


def make_reference(metadata: Mapping[str, Any], account: str) -> KeyRef:
    """The reference of a key. `account` is the one whose credentials use it; the account that owns it is in the ARN."""
    arn = Arn.parse(metadata["Arn"])
    if arn is None:
        raise BackendRefused("KMS answered an ARN that is not one of a key.")
    return KeyRef.of(arn=arn.text, key_id=arn.name, account=account, region=arn.region)


# --- evidence ---------------------------------------------------------------------------------------------------------

_SHOWN: Final = ("Origin", "KeyUsage", "KeySpec", "KeyState", "KeyManager", "MultiRegion", "Arn", "AWSAccountId")


def read_evidence(metadata: Mapping[str, Any]) -> Evidence:
    """The evidence in DescribeKey's KeyMetadata.

    Key material of Origin EXTERNAL was imported, so a copy may exist outside KMS. Material of an EXTERNAL_KEY_STORE is
    in a key manager outside AWS, about which KMS has no information.
    """
    origin = metadata.get("Origin")
    inside = origin in ("AWS_KMS", "AWS_CLOUDHSM")
    attributes: dict[str, bool | str | int | None] = {name: metadata[name] for name in _SHOWN if name in metadata}
    for name in ("ExpirationModel", "CustomKeyStoreId"):
        if name in metadata:
            attributes[name] = metadata[name]
    return Evidence(
        attributes,
        generated_in_module=inside,
        non_extractable=inside,
        sign_only=metadata.get("KeyUsage") == "SIGN_VERIFY",
    )


def supported_algorithms() -> frozenset[str]:
    """The `alg` names that KMS offers."""
    return frozenset(ROWS) & frozenset(ALGORITHMS)
