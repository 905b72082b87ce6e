"""base64url, JWS assembly, public JWKs in and out, thumbprints, and signatures of every algorithm."""

import base64
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, mldsa, padding, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from kms_jwks import jose
from kms_jwks.algorithms import ALGORITHMS, Algorithm, repair_jwk
from kms_jwks.errors import InvalidJwk, TokenSignatureInvalid

CURVES: dict[str, Callable[[], ec.EllipticCurve]] = {
    "ES256": ec.SECP256R1,
    "ES384": ec.SECP384R1,
    "ES512": ec.SECP521R1,
    "ES256K": ec.SECP256K1,
}
MlDsaKey = mldsa.MLDSA44PrivateKey | mldsa.MLDSA65PrivateKey | mldsa.MLDSA87PrivateKey
ML_DSA: dict[str, type[MlDsaKey]] = {
    "ML-DSA-44": mldsa.MLDSA44PrivateKey,
    "ML-DSA-65": mldsa.MLDSA65PrivateKey,
    "ML-DSA-87": mldsa.MLDSA87PrivateKey,
}
HASHES: dict[str, hashes.HashAlgorithm] = {
    "sha256": hashes.SHA256(), "sha384": hashes.SHA384(), "sha512": hashes.SHA512()
}  # fmt: skip


@cache
def rsa_key(bits: int = 2048, e: int = 65537) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(e, bits)


@cache
def private_key(name: str) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | MlDsaKey:
    if name in CURVES:
        return ec.generate_private_key(CURVES[name]())
    if name in ML_DSA:
        return ML_DSA[name].generate()
    if ALGORITHMS[name].is_rsa:
        return rsa_key()
    return ed25519.Ed25519PrivateKey.generate()


def public(name: str) -> dict[str, Any]:
    return dict(jose.public_jwk(private_key(name).public_key()))


def sign(alg: Algorithm, message: bytes, *, salt: int | None = None) -> bytes:
    """What a module does, with a key in memory."""
    key = private_key(alg.name)
    if isinstance(key, ed25519.Ed25519PrivateKey | MlDsaKey):
        return key.sign(message)
    assert alg.hash is not None
    digest = HASHES[alg.hash]
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return jose.der_to_raw(alg, key.sign(message, ec.ECDSA(digest)))
    if alg.family == "rsa-pss":
        return key.sign(
            message, padding.PSS(padding.MGF1(digest), digest.digest_size if salt is None else salt), digest
        )
    return key.sign(message, padding.PKCS1v15(), digest)


# --- base64url --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", ""),
        (b"f", "Zg"),
        (b"fo", "Zm8"),
        (b"foo", "Zm9v"),
        (b"\x00", "AA"),
        (b"\xfb\xff", "-_8"),
        (bytes([3, 236, 255, 224, 193]), "A-z_4ME"),  # RFC 7515 appendix C
    ],
)
def test_base64url(data: bytes, text: str) -> None:
    assert jose.b64u_encode(data) == text
    assert jose.b64u_decode(text) == data


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Zg==", "padding"),
        ("Zm8=", "padding"),
        ("Zg=", "padding"),
        ("Z=g", "padding"),
        ("=", "never 1"),
        ("====", "padding"),
        ("Z", "never 1"),
        ("Zm9vZ", "never 5"),
        ("Zm9+", "character 3"),
        ("Zm/v", "character 2"),
        ("Zm 9v", "never 5"),
        ("Zm 9", "character 2"),
        ("Zm8\n", "character 3"),
        ("\nZm8", "character 0"),
        ("Zm9\x00", "character 3"),
        ("Zmé", "character 2"),
        ("\u0661AAA", "character 0"),
        ("Zm.v", "character 2"),
        ("Zh", "trailing bits"),
        ("Zm9", "trailing bits"),
        ("_/", "character 1"),
    ],
)
def test_base64url_refuses_every_other_spelling(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        jose.b64u_decode(text)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_base64url_round_trip(data: bytes) -> None:
    assert jose.b64u_decode(jose.b64u_encode(data)) == data


@settings(deadline=None)
@given(st.text(max_size=40) | st.text("AQgwZz-_=+/ \n", max_size=12))
def test_one_text_per_value(text: str) -> None:
    try:
        data = jose.b64u_decode(text)
    except ValueError:
        return
    assert jose.b64u_encode(data) == text


# --- assembly ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typ", "cty", "expected"),
    [
        ("JWT", None, '{"alg":"ES256","kid":"k","typ":"JWT"}'),
        (None, None, '{"alg":"ES256","kid":"k"}'),
        (None, "json", '{"alg":"ES256","kid":"k","cty":"json"}'),
        ("at+jwt", "é", '{"alg":"ES256","kid":"k","typ":"at+jwt","cty":"é"}'),
    ],
)
def test_header_segment(typ: str | None, cty: str | None, expected: str) -> None:
    assert jose.b64u_decode(jose.header_segment(alg="ES256", kid="k", typ=typ, cty=cty)).decode() == expected


def test_signing_input_and_compact() -> None:
    data = jose.signing_input("aGVhZA", b"foo")
    assert data == b"aGVhZA.Zm9v"
    assert jose.compact(data, b"\xff") == "aGVhZA.Zm9v._w"
    assert jose.compact(data, b"\xff", detached=True) == "aGVhZA.._w"
    assert jose.compact(jose.signing_input("aGVhZA", b""), b"") == "aGVhZA.."


# --- JWKs -------------------------------------------------------------------------------------------------------------

ALL = list(ALGORITHMS.values())


@pytest.mark.parametrize("alg", ALL, ids=lambda alg: alg.name)
def test_a_public_key_survives_every_form(alg: Algorithm) -> None:
    jwk = public(alg.name)
    assert jose.check_public_jwk(jwk, alg) == jwk
    assert next(iter(jwk)) == "kty"
    assert jose.public_jwk(jose.public_key(jwk)) == jwk
    assert jose.jwk_from_pem(jose.to_pem(jwk)) == jwk
    spki = (
        private_key(alg.name)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    assert jose.to_der(jwk) == spki
    assert jose.to_pem(jwk).startswith("-----BEGIN PUBLIC KEY-----\n")
    assert len(jose.b64u_decode(jose.thumbprint(jwk))) == 32
    assert jose.thumbprint({**jwk, "use": "sig", "kid": "x", "alg": alg.name}) == jose.thumbprint(jwk)


@pytest.mark.parametrize("e", [3, 65537])
@pytest.mark.parametrize("bits", [2048, 3072])
def test_rsa_sizes(bits: int, e: int) -> None:
    jwk = jose.public_jwk(rsa_key(bits, e).public_key())
    assert jose.check_public_jwk(jwk, ALGORITHMS["RS256"]) == jwk
    assert jwk["e"] == {3: "Aw", 65537: "AQAB"}[e]


def test_coordinates_keep_their_leading_zeros() -> None:
    """One key in 256 has an x that begins with a zero octet."""
    for scalar in range(1, 2000):
        key = ec.derive_private_key(scalar, ec.SECP256R1()).public_key()
        if key.public_numbers().x >> 248 == 0:
            jwk = jose.public_jwk(key)
            assert len(jose.b64u_decode(jwk["x"])) == 32
            assert jose.check_public_jwk(jwk, ALGORITHMS["ES256"]) == jwk
            return
    raise AssertionError("no such key among the first 2000")


def test_extra_members_are_dropped() -> None:
    jwk = public("ES256")
    extra = {"use": "sig", "alg": "ES256", "key_ops": ["verify"], "kid": "k", "x5c": ["MII"], "x5u": "http://x", "n": 1}
    assert jose.check_public_jwk({**jwk, **extra}, ALGORITHMS["ES256"]) == jwk


@pytest.mark.parametrize("operations", [["verify"], ["sign", "verify"]])
def test_key_ops_that_hold_verify(operations: list[str]) -> None:
    assert jose.check_public_jwk({**public("ES256"), "key_ops": operations}, ALGORITHMS["ES256"])


B64 = jose.b64u_encode


def number(value: int, size: int | None = None) -> str:
    return B64(value.to_bytes(size or (value.bit_length() + 7) // 8, "big"))


def rsa_n() -> int:
    return rsa_key().public_key().public_numbers().n


# alg, members changed (None: taken away), what the detail says
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # private and symmetric
    ("ES256", {"d": "AQ"}, "private member 'd'"),
    ("EdDSA", {"d": "AQ"}, "private member 'd'"),
    ("RS256", {"p": "AQ"}, "private member 'p'"),
    ("RS256", {"oth": []}, "private member 'oth'"),
    ("RS256", {"qi": None, "dp": ""}, "private member 'dp'"),
    ("ES256", {"k": "AQ"}, "private member 'k'"),
    ("ES256", {"priv": "AQ"}, "private member 'priv'"),
    ("ES256", {"d": 7}, "private member 'd'"),
    ("ES256", {"kty": "oct"}, "symmetric"),
    # not the algorithm's
    ("ES256", {"kty": None}, "kty is missing"),
    ("ES256", {"kty": "ec"}, "kty is 'ec'"),
    ("ES256", {"kty": "AKP"}, "alg is missing"),
    ("ES256", {"kty": "XYZ"}, "kty is 'XYZ'"),
    ("ES256", {"kty": 5}, "kty is not a string"),
    ("ES256", {"kty": ["EC"]}, "kty is not a string"),
    ("ES256", {"kty": "RSA"}, "n is missing"),
    ("ES256", {"crv": "P-384"}, "needs crv P-256, not 'P-384'"),
    ("ES256", {"crv": "p-256"}, "needs crv P-256"),
    ("ES256", {"crv": None}, "crv is missing"),
    ("ES256", {"crv": 256}, "crv is not a string"),
    ("EdDSA", {"crv": "Ed448"}, "needs crv Ed25519"),
    ("EdDSA", {"crv": "X25519"}, "needs crv Ed25519"),
    # purpose
    ("ES256", {"use": "enc"}, "use is 'enc'"),
    ("ES256", {"use": 1}, "use is not a string"),
    ("ES256", {"alg": "ES384"}, "alg is 'ES384', not 'ES256'"),
    ("RS256", {"alg": "PS256"}, "alg is 'PS256'"),
    ("RS256", {"alg": "RSA-OAEP"}, "alg is 'RSA-OAEP'"),
    ("EdDSA", {"alg": "Ed25519"}, "alg is 'Ed25519'"),
    ("ES256", {"key_ops": ["sign"]}, "does not hold 'verify'"),
    ("ES256", {"key_ops": []}, "does not hold 'verify'"),
    ("ES256", {"key_ops": ["verify", "verify"]}, "twice"),
    ("ES256", {"key_ops": "verify"}, "not an array of strings"),
    ("ES256", {"key_ops": [["verify"]]}, "not an array of strings"),
    # EC coordinates
    ("ES256", {"x": None}, "x is missing"),
    ("ES256", {"y": None}, "y is missing"),
    ("ES256", {"x": 5}, "x is not a string"),
    ("ES256", {"x": ""}, "x has 0 octets"),
    ("ES256", {"x": B64(bytes(33))}, "x has 33 octets; P-256 needs exactly 32"),
    ("ES256", {"y": B64(bytes(31))}, "y has 31 octets"),
    ("ES256", {"x": "A" * 42 + "B"}, "trailing bits"),
    ("ES256", {"x": "A" * 42 + "="}, "padding"),
    ("ES256", {"x": "A" * 42 + "+"}, "alphabet"),
    ("ES256", {"x": B64(bytes(32)), "y": B64(bytes(32))}, "not on P-256"),
    ("ES256", {"x": B64(b"\xff" * 32)}, "not on P-256"),
    ("ES256", {"y": B64(bytes(31) + b"\x01")}, "not on P-256"),
    ("ES512", {"x": B64(bytes(65))}, "P-521 needs exactly 66"),
    ("ES256K", {"y": B64(bytes(31) + b"\x01")}, "not on secp256k1"),
    # Ed25519
    ("EdDSA", {"x": B64(bytes(31))}, "exactly 32"),
    ("EdDSA", {"x": B64(b"\x02" + bytes(31))}, "not on Ed25519"),
    ("EdDSA", {"x": B64(b"\xff" * 32)}, "canonically"),
    ("EdDSA", {"x": B64((2**255 - 19).to_bytes(32, "little"))}, "canonically"),
    ("EdDSA", {"x": B64(bytes(32))}, "small order"),
    ("EdDSA", {"x": B64(b"\x01" + bytes(31))}, "small order"),
    ("EdDSA", {"x": B64((2**255 - 20).to_bytes(32, "little"))}, "small order"),
    ("EdDSA", {"x": B64(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"))}, "small"),
    ("EdDSA", {"x": B64(bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa"))}, "small"),
    ("Ed25519", {"x": B64(bytes(32))}, "small order"),
    # RSA
    ("RS256", {"n": None}, "n is missing"),
    ("RS256", {"e": None}, "e is missing"),
    ("RS256", {"e": 65537}, "e is not a string"),
    ("RS256", {"n": ""}, "n is empty"),
    ("RS256", {"n": number(rsa_n(), 257)}, "begins with a zero octet"),
    ("RS256", {"e": "AAEAAQ"}, "e is empty, zero, or begins with a zero octet"),
    ("RS256", {"e": "AA"}, "zero"),
    ("RS256", {"e": number(1)}, "below 3"),
    ("RS256", {"e": number(2)}, "even"),
    ("RS256", {"e": number(65536)}, "even"),
    ("RS256", {"e": number(2**64 + 1)}, "longer than 64 bits"),
    ("RS256", {"n": number(rsa_n() - 1)}, "small factor"),
    ("RS256", {"n": number(rsa_n() >> 1 | 1)}, "2047 bits, fewer than 2048"),
    ("RS256", {"n": number(2**1023 + 1)}, "1024 bits, fewer"),
    ("RS256", {"n": number(2**512 + 1)}, "513 bits, fewer"),
    ("RS256", {"n": number(2**8192 + 1)}, "8193 bits, more than 8192"),
    ("RS256", {"n": number(2**60000 + 1)}, "more than 8192"),
    ("RS256", {"n": number(3 * (2**2047 + 1))}, "small factor"),
    ("RS256", {"n": number(65537**150)}, "ROCA"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "detail"), REFUSED, ids=[f"{n}-{d}" for n, _, d in REFUSED])
def test_what_is_no_good_public_jwk(name: str, changes: dict[str, Any], detail: str) -> None:
    jwk = public(name) | changes
    with pytest.raises(InvalidJwk, match=detail) as caught:
        jose.check_public_jwk({key: value for key, value in jwk.items() if value is not None}, ALGORITHMS[name])
    assert len(caught.value.detail) < 200


@pytest.mark.parametrize(
    "jwk",
    [
        {"kty": "EC", "crv": "P-224", "x": "AQ", "y": "AQ"},
        {"kty": "OKP", "crv": "X25519", "x": B64(bytes(32))},
        {"kty": "RSA", "n": "Aw", "e": "AQAB"},
        {"kty": "oct", "k": "AQ"},
        {},
    ],
    ids=range(5),
)
def test_what_is_no_key_at_all(jwk: dict[str, str]) -> None:
    for call in (jose.public_key, jose.to_pem, jose.to_der):
        with pytest.raises(InvalidJwk):
            call(jwk)


@pytest.mark.parametrize("alg", ALL, ids=lambda alg: alg.name)
@pytest.mark.parametrize("other", ALL, ids=lambda alg: alg.name)
def test_a_key_fits_only_the_algorithms_of_its_type(alg: Algorithm, other: Algorithm) -> None:
    jwk = public(other.name)
    if (alg.kty, alg.crv, alg.public_bytes) == (other.kty, other.crv, other.public_bytes):
        assert jose.check_public_jwk(jwk, alg) == jwk
    else:
        with pytest.raises(InvalidJwk):
            jose.check_public_jwk(jwk, alg)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["kty", "crv", "x", "y", "n", "e", "use", "alg", "key_ops", "kid"]),
                       st.sampled_from(["RSA", "EC", "OKP", "P-256", "Ed25519", "AQAB", "Aw", "", "sig"])
                       | st.text(max_size=12) | st.none() | st.integers() | st.lists(st.text(max_size=3), max_size=2)),
       st.sampled_from(ALL))  # fmt: skip
def test_nothing_but_invalid_jwk_ever_leaves(jwk: dict[str, object], alg: Algorithm) -> None:
    with pytest.raises(InvalidJwk):
        jose.check_public_jwk(jwk, alg)


@pytest.mark.parametrize(
    "key",
    [
        ed448.Ed448PrivateKey.generate().public_key(),
        ec.generate_private_key(ec.SECP224R1()).public_key(),
        ec.generate_private_key(ec.SECP256R1()),
        "a string",
        None,
    ],
    ids=lambda key: type(key).__name__,
)
def test_keys_without_a_jwk(key: object) -> None:
    with pytest.raises(InvalidJwk):
        jose.public_jwk(key)


# --- PEM --------------------------------------------------------------------------------------------------------------


def certificate() -> str:
    key = private_key("ES256")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    start = datetime(2026, 1, 1, tzinfo=UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, start, start + timedelta(days=1))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def private_pem(form: serialization.PrivateFormat) -> str:
    encryption = serialization.NoEncryption()
    return private_key("ES256").private_bytes(serialization.Encoding.PEM, form, encryption).decode()


def pems() -> dict[str, tuple[str, str]]:
    good = jose.to_pem(public("ES256"))
    p224 = ec.generate_private_key(ec.SECP224R1()).public_key()
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    return {
        "nothing": ("", "0 were found"),
        "text": ("hello", "0 were found"),
        "a JWK": (json.dumps(public("ES256")), "0 were found"),
        "PKCS#8": (private_pem(serialization.PrivateFormat.PKCS8), "private key"),
        "SEC1": (private_pem(serialization.PrivateFormat.TraditionalOpenSSL), "private key"),
        "encrypted": (
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAA==\n-----END ENCRYPTED PRIVATE KEY-----",
            "private key",
        ),
        "OpenSSH private": (private_pem(serialization.PrivateFormat.OpenSSH), "private key"),
        "public and private": (good + private_pem(serialization.PrivateFormat.PKCS8), "private key"),
        "a certificate": (certificate(), "certificate"),
        "two keys": (good + good, "2 were found"),
        "a request": ("-----BEGIN CERTIFICATE REQUEST-----\nAA==\n-----END CERTIFICATE REQUEST-----", "certificate"),
        "parameters": (
            "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----",
            "not a public key",
        ),
        "cut off": (good[: len(good) // 2], "a readable public key"),
        "no end": (good.partition("-----END")[0], "a readable public key"),
        "bad base64": (good.replace("M", "*"), "a readable public key"),
        "empty block": ("-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n", "a readable public key"),
        "not ASCII": (good.replace("M", "é"), "a readable public key"),
        "a lone surrogate": (good.replace("M", "\ud800"), "a readable public key"),
        "P-224": (p224.public_bytes(serialization.Encoding.PEM, spki).decode(), "secp224r1"),
    }


@pytest.mark.parametrize("case", list(pems()))
def test_what_is_no_public_key_pem(case: str) -> None:
    pem, detail = pems()[case]
    with pytest.raises(InvalidJwk, match=detail):
        jose.jwk_from_pem(pem)


def test_pkcs1_public_keys_and_surroundings_are_read() -> None:
    pem = rsa_key().public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.PKCS1).decode()
    assert jose.jwk_from_pem(pem) == public("RS256")
    assert jose.jwk_from_pem("\r\n" + pem.replace("\n", "\r\n")) == public("RS256")


# --- the JWKS ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("RS256", ["kty", "use", "alg", "kid", "n", "e"]),
        ("ES256", ["kty", "use", "alg", "kid", "crv", "x", "y"]),
        ("EdDSA", ["kty", "use", "alg", "kid", "crv", "x"]),
    ],
)
def test_a_published_jwk_holds_exactly_this(name: str, members: list[str]) -> None:
    jwk = jose.published_jwk(public(name) | {"d": "secret", "key_ops": "x"}, alg=name, kid="k")
    assert list(jwk) == members
    assert (jwk["use"], jwk["alg"], jwk["kid"]) == ("sig", name, "k")
    chained = jose.published_jwk(public(name), alg=name, kid="k", x5c=("MIIB", "MIIC"))
    assert list(chained) == [*members, "x5c"]
    assert chained["x5c"] == ["MIIB", "MIIC"]


def test_the_document_is_compact_and_keeps_the_order() -> None:
    assert jose.jwks_document([]) == b'{"keys":[]}'
    keys = [jose.published_jwk(public(name), alg=name, kid=name) for name in ("RS256", "ES256")]
    document = jose.jwks_document(keys)
    assert json.loads(document) == {"keys": keys}
    assert document == jose.jwks_document(keys)
    assert b" " not in document


# --- signatures -------------------------------------------------------------------------------------------------------

MESSAGE = b"eyJhbGciOiJub25lIn0.e30"


@pytest.mark.parametrize("alg", ALL, ids=lambda alg: alg.name)
def test_a_good_signature_verifies_and_nothing_near_it(alg: Algorithm) -> None:
    jwk, signature = public(alg.name), sign(alg, MESSAGE)
    assert len(signature) == alg.signature_length(2048 if alg.is_rsa else None)
    jose.verify_signature(alg, jwk, MESSAGE, signature)
    wrong = [
        (MESSAGE + b"\0", signature),
        (MESSAGE[:-1], signature),
        (MESSAGE, b""),
        (MESSAGE, signature[:-1]),
        (MESSAGE, signature + b"\0"),
        (MESSAGE, b"\0" + signature),
        (MESSAGE, bytes(len(signature))),
        (MESSAGE, b"\xff" * len(signature)),
        (MESSAGE, signature[:-1] + bytes([signature[-1] ^ 1])),
        (MESSAGE, bytes([signature[0] ^ 1]) + signature[1:]),
    ]
    for message, other in wrong:
        with pytest.raises(TokenSignatureInvalid):
            jose.verify_signature(alg, jwk, message, other)


@pytest.mark.parametrize("alg", [row for row in ALL if row.is_rsa], ids=lambda alg: alg.name)
@pytest.mark.parametrize("other", [row for row in ALL if row.is_rsa], ids=lambda alg: alg.name)
def test_rsa_algorithms_do_not_stand_in_for_each_other(alg: Algorithm, other: Algorithm) -> None:
    signature = sign(other, MESSAGE)
    if alg is other:
        jose.verify_signature(alg, public(alg.name), MESSAGE, signature)
    else:
        with pytest.raises(TokenSignatureInvalid):
            jose.verify_signature(alg, public(alg.name), MESSAGE, signature)


@pytest.mark.parametrize("name", ["PS256", "PS384", "PS512"])
@pytest.mark.parametrize("salt", ["none", "one less", "one more", "the most"])
def test_the_pss_salt_is_exactly_as_long_as_the_hash(name: str, salt: str) -> None:
    alg = ALGORITHMS[name]
    assert alg.hash is not None
    size = HASHES[alg.hash].digest_size
    length = {"none": 0, "one less": size - 1, "one more": size + 1, "the most": 256 - size - 2}[salt]
    with pytest.raises(TokenSignatureInvalid):
        jose.verify_signature(alg, public(name), MESSAGE, sign(alg, MESSAGE, salt=length))


@pytest.mark.parametrize("name", ["ES256", "ES384", "ES512", "ES256K"])
def test_der_is_no_jose_signature(name: str) -> None:
    alg, raw = ALGORITHMS[name], sign(ALGORITHMS[name], MESSAGE)
    der = jose.raw_to_der(alg, raw)
    assert jose.der_to_raw(alg, der) == raw
    with pytest.raises(TokenSignatureInvalid):
        jose.verify_signature(alg, public(name), MESSAGE, der)


def test_der_and_raw_refuse_what_does_not_fit() -> None:
    es256, es512 = ALGORITHMS["ES256"], ALGORITHMS["ES512"]
    with pytest.raises(ValueError, match="fit"):
        jose.der_to_raw(es256, jose.raw_to_der(es512, sign(es512, MESSAGE)))
    with pytest.raises(ValueError, match=r"ASN|DER|parse|error"):
        jose.der_to_raw(es256, b"\x30\x00")
    for alg, size in ((es256, 63), (es256, 65), (es256, 0), (es512, 64), (ALGORITHMS["EdDSA"], 64)):
        with pytest.raises(ValueError, match="r‖s"):
            jose.raw_to_der(alg, bytes(size))


def test_a_key_of_another_type_is_never_tried() -> None:
    for name, other in (("ES256", "RS256"), ("RS256", "ES256"), ("ES256", "ES256K"), ("EdDSA", "ES256")):
        with pytest.raises(InvalidJwk, match=f"not a key of {name}"):
            jose.verify_signature(ALGORITHMS[name], public(other), MESSAGE, sign(ALGORITHMS[other], MESSAGE))


def test_edd_sa_and_ed25519_are_the_same_signature() -> None:
    signature = sign(ALGORITHMS["EdDSA"], MESSAGE)
    jose.verify_signature(ALGORITHMS["Ed25519"], public("EdDSA"), MESSAGE, signature)


@pytest.mark.parametrize("alg", ALL, ids=lambda alg: alg.name)
def test_a_signature_verifies_over_the_digest_of_its_message_and_nothing_near_it(alg: Algorithm) -> None:
    verifier, signature = jose.Verifier(alg, public(alg.name)), sign(alg, MESSAGE)
    verifier.verify(MESSAGE, signature)
    digest = hashlib.new(alg.hash or "sha256", MESSAGE).digest()
    wrong = [
        (digest[:-1], signature),
        (digest + b"\0", signature),
        (b"", signature),
        (MESSAGE, signature),
        (bytes(len(digest)), signature),
        (digest, b""),
        (digest, signature[:-1]),
        (digest, signature + b"\0"),
        (digest, bytes(len(signature))),
        (digest, signature[:-1] + bytes([signature[-1] ^ 1])),
    ]
    if alg.hash is None:
        wrong.append((digest, signature))
    else:
        verifier.verify_digest(digest, signature)
    for other, made in wrong:
        with pytest.raises(TokenSignatureInvalid):
            verifier.verify_digest(other, made)


@pytest.mark.parametrize("alg", [row for row in ALL if row.is_rsa], ids=lambda alg: alg.name)
@pytest.mark.parametrize("other", [row for row in ALL if row.is_rsa], ids=lambda alg: alg.name)
def test_rsa_algorithms_do_not_stand_in_for_each_other_over_a_digest_either(alg: Algorithm, other: Algorithm) -> None:
    verifier, signature = jose.Verifier(alg, public(alg.name)), sign(other, MESSAGE)
    digest = hashlib.new(alg.hash or "", MESSAGE).digest()
    if alg is other:
        verifier.verify_digest(digest, signature)
    else:
        with pytest.raises(TokenSignatureInvalid):
            verifier.verify_digest(digest, signature)


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(ALL))
def test_no_random_bytes_are_a_signature(signature: bytes, alg: Algorithm) -> None:
    verifier = jose.Verifier(alg, public(alg.name))
    with pytest.raises(TokenSignatureInvalid):
        verifier.verify(MESSAGE, signature)
    with pytest.raises(TokenSignatureInvalid):
        verifier.verify_digest(hashlib.new(alg.hash or "sha256", MESSAGE).digest(), signature)


# --- keys as other issuers publish them


@pytest.mark.parametrize("use", ["sig", "jwt-svid"])
def test_the_uses_of_keys_that_verify_tokens(use: str) -> None:
    jwk = jose.public_jwk(ec.generate_private_key(ec.SECP256R1()).public_key())
    assert jose.check_public_jwk({**jwk, "use": use}, ALGORITHMS["ES256"]) == jwk
    with pytest.raises(InvalidJwk, match="use") as refusal:
        jose.check_public_jwk({**jwk, "use": "x509-svid"}, ALGORITHMS["ES256"])
    assert "Leave this key out" in refusal.value.next_step


def test_members_that_are_not_published_are_named() -> None:
    jwk = {**jose.public_jwk(ec.generate_private_key(ec.SECP256R1()).public_key()), "use": "sig", "kid": "a"}
    assert jose.ignored_members(jwk) == []
    assert jose.ignored_members({**jwk, "x5c": [], "x5t": "", "exp": 1}) == ["x5c", "x5t", "exp"]


def _with_zero_in_front() -> dict[str, str]:
    """An EC key whose x begins with a zero octet: d = 148 of P-256 is the first of them."""
    for secret in range(1, 2000):
        jwk = jose.public_jwk(ec.derive_private_key(secret, ec.SECP256R1()).public_key())
        if jose.b64u_decode(jwk["x"])[0] == 0:
            return jwk
    raise AssertionError


def test_an_encoding_that_is_not_canonical_is_refused_with_the_command_that_repairs_it() -> None:
    rsa_jwk = jose.public_jwk(rsa.generate_private_key(65537, 2048).public_key())
    ec_jwk = _with_zero_in_front()
    x = jose.b64u_decode(ec_jwk["x"])
    for alg, good, changes in (
        ("RS256", rsa_jwk, {"n": jose.b64u_encode(b"\0" + jose.b64u_decode(rsa_jwk["n"]))}),
        ("RS256", rsa_jwk, {"e": "AAEAAQ"}),
        ("RS256", rsa_jwk, {"n": base64.b64encode(jose.b64u_decode(rsa_jwk["n"])).decode()}),
        ("ES256", ec_jwk, {"x": jose.b64u_encode(x.lstrip(b"\0"))}),
        ("ES256", ec_jwk, {"x": jose.b64u_encode(b"\0" + x)}),
        ("ES256", ec_jwk, {"y": base64.urlsafe_b64encode(jose.b64u_decode(ec_jwk["y"])).decode()}),
    ):
        bad: dict[str, object] = {**good, **changes, "kid": "old"}
        with pytest.raises(InvalidJwk) as refusal:
            jose.check_public_jwk(bad, ALGORITHMS[alg])
        assert "kms-jwks external-key repair" in refusal.value.next_step, changes
        assert repair_jwk(bad) == {**good, "kid": "old"}


@pytest.mark.parametrize("changes", [{"x": "AA AA!"}, {"x": jose.b64u_encode(bytes(range(1, 40)))}, {"x": ""}])
def test_what_no_repair_mends_names_no_repair(changes: dict[str, str]) -> None:
    jwk = jose.public_jwk(ec.generate_private_key(ec.SECP256R1()).public_key())
    with pytest.raises(InvalidJwk) as refusal:
        jose.check_public_jwk({**jwk, **changes}, ALGORITHMS["ES256"])
    assert "repair" not in refusal.value.next_step
