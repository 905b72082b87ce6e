"""The algorithm table, against the RFCs that define its rows and against joserfc's own."""

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric import mldsa
from joserfc.jwa import JWS_ALGORITHMS

from kms_jwks.algorithms import ALGORITHMS, DEFAULT_RSA_BITS, RSA_BITS, Algorithm, Family

# name, family, kty, hash, crv, signature length (None: as long as the modulus)
ROWS = [
    ("RS256", Family.RSA_PKCS1, "RSA", "sha256", None, None),  # RFC 7518 §3.3
    ("RS384", Family.RSA_PKCS1, "RSA", "sha384", None, None),
    ("RS512", Family.RSA_PKCS1, "RSA", "sha512", None, None),
    ("PS256", Family.RSA_PSS, "RSA", "sha256", None, None),  # §3.5
    ("PS384", Family.RSA_PSS, "RSA", "sha384", None, None),
    ("PS512", Family.RSA_PSS, "RSA", "sha512", None, None),
    ("ES256", Family.ECDSA, "EC", "sha256", "P-256", 64),  # §3.4
    ("ES384", Family.ECDSA, "EC", "sha384", "P-384", 96),
    ("ES512", Family.ECDSA, "EC", "sha512", "P-521", 132),
    ("ES256K", Family.ECDSA, "EC", "sha256", "secp256k1", 64),  # RFC 8812 §3.2
    ("EdDSA", Family.EDDSA, "OKP", None, "Ed25519", 64),  # RFC 8037 §3.1
    ("Ed25519", Family.EDDSA, "OKP", None, "Ed25519", 64),  # RFC 9864 §2.2
    ("ML-DSA-44", Family.ML_DSA, "AKP", None, None, 2420),  # RFC 9964 §4, FIPS 204 table 2
    ("ML-DSA-65", Family.ML_DSA, "AKP", None, None, 3309),
    ("ML-DSA-87", Family.ML_DSA, "AKP", None, None, 4627),
]


@pytest.mark.parametrize(("name", "family", "kty", "digest", "crv", "length"), ROWS, ids=[row[0] for row in ROWS])
def test_row(name: str, family: Family, kty: str, digest: str | None, crv: str | None, length: int | None) -> None:
    row = ALGORITHMS[name]
    assert (row.name, row.family, row.kty, row.hash, row.crv) == (name, family, kty, digest, crv)
    assert row.is_rsa is (kty == "RSA")
    if length is None:
        assert row.rsa_bits == RSA_BITS
        assert row.crv is None
        assert [row.signature_length(bits) for bits in RSA_BITS] == [256, 384, 512]
        with pytest.raises(ValueError, match="modulus"):
            row.signature_length()
    else:
        assert row.rsa_bits == ()
        assert row.signature_length() == length


def test_there_is_no_other_row() -> None:
    assert list(ALGORITHMS) == [row[0] for row in ROWS]
    assert DEFAULT_RSA_BITS in RSA_BITS


@pytest.mark.parametrize("row", [row for row in ALGORITHMS.values() if not row.is_post_quantum], ids=str)
def test_joserfc_knows_it_and_hashlib_its_hash(row: Algorithm) -> None:
    assert row.name in {model.name for model in JWS_ALGORITHMS}
    if row.hash is not None:
        assert hashlib.new(row.hash).digest_size * 8 == int(row.name.rstrip("K")[2:])


@pytest.mark.parametrize("row", [row for row in ALGORITHMS.values() if row.is_post_quantum], ids=str)
def test_cryptography_knows_it_and_its_lengths(row: Algorithm) -> None:
    pairs = (mldsa.MLDSA44PrivateKey, mldsa.MLDSA65PrivateKey, mldsa.MLDSA87PrivateKey)
    private = next(pair for pair in pairs if pair.__name__.startswith(row.name.replace("-", ""))).generate()
    assert len(private.public_key().public_bytes_raw()) == row.public_bytes
    assert len(private.sign(b"x")) == row.signature_length()


def test_only_es256k_needs_a_key_set_of_its_own() -> None:
    assert [row.name for row in ALGORITHMS.values() if row.exclusive] == ["ES256K"]


@pytest.mark.parametrize("name", ["none", "HS256", "RS1", "es256", "ES256 ", "", "Ed448", "RSA-OAEP", "ES521"])
def test_what_is_not_there(name: str) -> None:
    assert name not in ALGORITHMS


def test_the_table_is_frozen() -> None:
    with pytest.raises(TypeError):
        ALGORITHMS["none"] = ALGORITHMS["ES256"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        ALGORITHMS["ES256"].name = "none"  # type: ignore[misc]
