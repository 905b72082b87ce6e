"""The examples of RFC 7515, 7520, 7638, 8037 and 9964: keys, thumbprints, signing inputs and signatures."""

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, mldsa

from kms_jwks import jose
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.errors import InvalidJwk, TokenExpired, TokenMalformed, TokenRejected, TokenSignatureInvalid
from kms_jwks.verification import VerifyKey, authenticate, verify
from tests.vectors.support import load, needs_vectors

# --- RFC 7515 appendix A ----------------------------------------------------------------------------------------------

A1_PAYLOAD = b'{"iss":"joe",\r\n "exp":1300819380,\r\n "http://example.com/is_root":true}'

RFC7515 = {
    "A.2": (
        "RS256",
        {
            "kty": "RSA",
            "n": "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4Ql"
            "L-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUs"
            "LA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoud"
            "F8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ",
            "e": "AQAB",
        },
        "eyJhbGciOiJSUzI1NiJ9",
        (
            "cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujG"
            "bds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K"
            "0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6"
            "LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw"
        ),
        A1_PAYLOAD,
    ),
    "A.3": (
        "ES256",
        {
            "kty": "EC",
            "crv": "P-256",
            "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
            "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
        },
        "eyJhbGciOiJFUzI1NiJ9",
        "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q",
        A1_PAYLOAD,
    ),
    "A.4": (
        "ES512",
        {
            "kty": "EC",
            "crv": "P-521",
            "x": "AekpBQ8ST8a8VcfVOTNl353vSrDCLLJXmPk06wTjxrrjcBpXp5EOnYG_NjFZ6OvLFV1jSfS9tsz4qUxcWceqwQGk",
            "y": "ADSmRA43Z1DSNx_RvcLI87cdL07l6jQyyBXMoxVg_l2Th-x3S1WDhjDly79ajL4Kkd0AZMaZmh9ubmf63e3kyMj2",
        },
        "eyJhbGciOiJFUzUxMiJ9",
        (
            "AdwMgeerwtHoh-l192l60hp9wAHZFVJbLfD_UxMi70cwnZOYaRI1bKPWROc-mZZqwqT2SI-KGDKB34XO0aw_7XdtAG8GaSwF"
            "KdCAPZgoXD2YBJZCPEX3xKpRwcdOO8KpEHwJjyqOgzDO7iKvU8vcnwNrmxYbSW9ERBXukOXolLzeO_Jn"
        ),
        b"Payload",
    ),
}


@pytest.mark.parametrize("example", RFC7515)
def test_rfc_7515_appendix_a(example: str) -> None:
    name, jwk, header, signature, payload = RFC7515[example]
    alg = ALGORITHMS[name]
    data = jose.signing_input(header, payload)
    raw = jose.b64u_decode(signature)
    assert jose.compact(data, raw) == f"{header}.{jose.b64u_encode(payload)}.{signature}"
    assert jose.check_public_jwk(jwk, alg) == jwk
    jose.verify_signature(alg, jwk, data, raw)
    for message, other in ((data + b"A", raw), (data, raw[:-1] + bytes([raw[-1] ^ 1]))):
        with pytest.raises(TokenSignatureInvalid):
            jose.verify_signature(alg, jwk, message, other)


def test_rfc_7515_examples_have_no_kid_and_are_no_tokens_for_us() -> None:
    _, jwk, header, signature, payload = RFC7515["A.3"]
    with pytest.raises(TokenMalformed, match="kid"):
        authenticate(f"{header}.{jose.b64u_encode(payload)}.{signature}", keys={"": VerifyKey("ES256", jwk)})


def test_rfc_7515_a1_and_a5_are_never_accepted() -> None:
    """A.1 is HS256 under the RFC's symmetric key, A.5 is alg none."""
    secret = "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow"
    with pytest.raises(InvalidJwk):
        jose.check_public_jwk({"kty": "oct", "k": secret}, ALGORITHMS["ES256"])
    body = jose.b64u_encode(A1_PAYLOAD)
    for token in (
        f"eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.{body}.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk",
        f"eyJhbGciOiJub25lIn0.{body}.",
    ):
        with pytest.raises(TokenRejected):
            authenticate(token, keys={"k": VerifyKey("ES256", RFC7515["A.3"][1])})


# --- RFC 7520 ---------------------------------------------------------------------------------------------------------

COOKBOOK = {
    "4.1": ("4_1.rsa_v15_signature", "RS256"),
    "4.2": ("4_2.rsa-pss_signature", "PS384"),
    "4.3": ("4_3.ecdsa_signature", "ES512"),
}


@needs_vectors
@pytest.mark.parametrize("section", COOKBOOK)
def test_rfc_7520_signatures(section: str) -> None:
    name, alg = COOKBOOK[section]
    example = load(f"jose-cookbook/jws/{name}.json")
    assert example["signing"]["protected"]["alg"] == alg
    kid = example["signing"]["protected"]["kid"]
    # The cookbook writes the key pair; the service takes the public part and refuses the pair.
    pair: dict[str, Any] = example["input"]["key"]
    with pytest.raises(InvalidJwk, match="private member"):
        jose.check_public_jwk(pair, ALGORITHMS[alg])
    jwk = jose.check_public_jwk({k: pair[k] for k in pair if k in {"kty", "crv", "x", "y", "n", "e"}}, ALGORITHMS[alg])
    # the header segment and signing input as the RFC prints them
    segment = jose.header_segment(alg=alg, kid=kid, typ=None)
    payload = example["input"]["payload"].encode()
    assert segment == example["signing"]["protected_b64u"]
    assert jose.signing_input(segment, payload).decode() == example["signing"]["sig-input"]
    compact = example["output"]["compact"]
    authentic = authenticate(compact, keys={kid: VerifyKey(alg, jwk)})
    assert (authentic.payload, authentic.kid) == (payload, kid)
    with pytest.raises(TokenSignatureInvalid):
        authenticate(compact, keys={kid: VerifyKey(alg, another_key(jwk))})
    with pytest.raises(TokenMalformed, match="payload"):
        _verify(compact, kid, VerifyKey(alg, jwk))  # prose is no claims set


def another_key(jwk: dict[str, str]) -> dict[str, str]:
    """Another key of the same type."""
    if jwk["kty"] == "EC":
        return RFC7515["A.4"][1]
    return RFC7515["A.2"][1]


def _verify(token: str, kid: str, key: VerifyKey) -> None:
    verify(token, keys={kid: key}, issuer="joe", audience="any", typ=None, now=1_300_819_000, clock_skew=0)


@needs_vectors
def test_rfc_7520_4_5_detached_content() -> None:
    """The example is HS256, which the service has not; its detached form is assembled, and verified for 4.1 to 4.3."""
    example = load("jose-cookbook/jws/4_5.signature_with_detached_content.json")
    data = example["signing"]["sig-input"].encode()
    signature = jose.b64u_decode(example["signing"]["sig"])
    assert jose.compact(data, signature, detached=True) == example["output"]["compact"]
    with pytest.raises(InvalidJwk, match="private member"):
        jose.check_public_jwk(example["input"]["key"], ALGORITHMS["ES256"])
    for name, alg in COOKBOOK.values():
        other = load(f"jose-cookbook/jws/{name}.json")
        data = other["signing"]["sig-input"].encode()
        detached = jose.compact(data, jose.b64u_decode(other["signing"]["sig"]), detached=True)
        head, body, tail = detached.split(".")
        assert (head, body) == (other["signing"]["protected_b64u"], "")
        jwk = jose.public_jwk(jose.public_key(other["input"]["key"]))
        # a verifier puts the payload back
        jose.verify_signature(ALGORITHMS[alg], jwk, data, jose.b64u_decode(tail))
        # taken as it is, it is a JWS over nothing
        with pytest.raises(TokenSignatureInvalid):
            authenticate(detached, keys={other["signing"]["protected"]["kid"]: VerifyKey(alg, jwk)})


@needs_vectors
def test_rfc_7520_4_8_is_no_compact_form() -> None:
    """Signatures of a general JSON serialisation: RS256 and ES512 verify one by one; the JSON is no token."""
    example = load("jose-cookbook/jws/4_8.multiple_signatures.json")
    verified = 0
    for number, part in enumerate(example["output"]["json"]["signatures"]):
        header = dict(part.get("header", {}))
        if "protected" in part:
            header |= json.loads(jose.b64u_decode(part["protected"]))
        if header["alg"] in ALGORITHMS:
            jwk = jose.public_jwk(jose.public_key(example["input"]["key"][number]))
            data = f"{part.get('protected', '')}.{example['output']['json']['payload']}".encode()
            jose.verify_signature(ALGORITHMS[header["alg"]], jwk, data, jose.b64u_decode(part["signature"]))
            verified += 1
    assert verified == 2
    with pytest.raises(TokenMalformed):
        authenticate(json.dumps(example["output"]["json"]), keys={})


@needs_vectors
@pytest.mark.parametrize(
    ("name", "alg", "other"), [("3_1.ec_public_key", "ES512", "ES256"), ("3_3.rsa_public_key", "RS256", "EdDSA")]
)
def test_rfc_7520_section_3_public_keys(name: str, alg: str, other: str) -> None:
    jwk = load(f"jose-cookbook/jwk/{name}.json")
    parameters = jose.check_public_jwk(jwk, ALGORITHMS[alg])
    assert parameters == {key: value for key, value in jwk.items() if key not in {"kid", "use"}}
    assert jose.public_jwk(jose.public_key(jwk)) == parameters == jose.jwk_from_pem(jose.to_pem(jwk))
    with pytest.raises(InvalidJwk):
        jose.check_public_jwk(jwk, ALGORITHMS[other])


# --- RFC 7638 ---------------------------------------------------------------------------------------------------------


def test_rfc_7638_3_1_thumbprint() -> None:
    jwk = {
        "kty": "RSA",
        "n": "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWK"
        "RXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMic"
        "AtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3"
        "XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw",
        "e": "AQAB",
        "alg": "RS256",
        "kid": "2011-04-29",
    }
    assert jose.thumbprint(jwk) == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"
    assert jose.thumbprint({**jwk, "e": "Aw"}) != "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"


# --- RFC 8037 ---------------------------------------------------------------------------------------------------------

A1_ED25519 = {
    "kty": "OKP",
    "crv": "Ed25519",
    "d": "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A",
    "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo",
}
A2_ED25519 = {key: value for key, value in A1_ED25519.items() if key != "d"}
A4_INPUT = b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc"
A4_SIGNATURE = "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"


def test_rfc_8037_a1_and_a2_keys() -> None:
    for name in ("EdDSA", "Ed25519"):
        with pytest.raises(InvalidJwk, match="private member"):
            jose.check_public_jwk(A1_ED25519, ALGORITHMS[name])
        assert jose.check_public_jwk(A2_ED25519, ALGORITHMS[name]) == A2_ED25519
    raw = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert jose.to_der(A2_ED25519).hex().endswith(raw)
    assert jose.jwk_from_pem(jose.to_pem(A2_ED25519)) == A2_ED25519


def test_rfc_8037_a3_thumbprint() -> None:
    assert jose.thumbprint(A2_ED25519) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


def test_rfc_8037_a4_signature() -> None:
    signature = jose.b64u_decode(A4_SIGNATURE)
    for name in ("EdDSA", "Ed25519"):
        jose.verify_signature(ALGORITHMS[name], A2_ED25519, A4_INPUT, signature)
        with pytest.raises(TokenSignatureInvalid):
            jose.verify_signature(ALGORITHMS[name], A2_ED25519, A4_INPUT + b"A", signature)


@needs_vectors
def test_rfc_8037_in_the_cookbook() -> None:
    example = load("jose-cookbook/curve25519/jws.json")
    assert example["output"]["compact"] == jose.compact(A4_INPUT, jose.b64u_decode(A4_SIGNATURE))
    assert jose.signing_input(example["signing"]["protected_b64u"], example["input"]["payload"].encode()) == A4_INPUT


# --- one of them as a whole token -------------------------------------------------------------------------------------


def test_the_rfc_s_claims_pass_verify_once_the_header_names_the_key() -> None:
    """RFC 7515 A.3's claims, signed anew with a kid, expire when the RFC says they do."""
    key = ec.generate_private_key(ec.SECP256R1())
    data = jose.signing_input(jose.header_segment(alg="ES256", kid="k", typ="JWT"), A1_PAYLOAD)
    token = jose.compact(data, jose.der_to_raw(ALGORITHMS["ES256"], key.sign(data, ec.ECDSA(hashes.SHA256()))))
    keys = {"k": VerifyKey("ES256", jose.public_jwk(key.public_key()))}
    arguments: dict[str, Any] = {"keys": keys, "issuer": "joe", "audience": "any", "typ": None, "clock_skew": 0}
    assert verify(token, now=1_300_819_379, **arguments).claims["http://example.com/is_root"] is True
    with pytest.raises(TokenExpired):
        verify(token, now=1_300_819_380, **arguments)


# --- RFC 9964 appendix A ----------------------------------------------------------------------------------------------


def test_rfc_9964_the_thumbprint_of_an_akp_key_counts_its_alg() -> None:
    """The key of its example: ML-DSA-44 from the seed of 32 zero octets."""
    jwk = jose.public_jwk(mldsa.MLDSA44PrivateKey.from_seed_bytes(bytes(32)).public_key())
    assert (jwk["kty"], jwk["alg"], sorted(jwk)) == ("AKP", "ML-DSA-44", ["alg", "kty", "pub"])
    assert jwk["pub"].startswith("unH59k4RuutY-pxvu24U5h8YZD2rSVtHU5qRZsoBmBMcRPgmu9VuNOVdteXi1zNIXjnqJg_GAAxepLqA00Vc")
    assert jwk["pub"].endswith("TP07e7gEWzw4MFRrndjbDQ")
    assert jose.thumbprint(jwk) == "T4xl70S7MT6Zeq6r9V9fPJGVn76wfnXJ21-gyo0Gu6o"
    assert jose.thumbprint({**jwk, "kid": "any", "use": "sig"}) == jose.thumbprint(jwk)
    with pytest.raises(InvalidJwk):
        jose.thumbprint({"kty": "AKP", "pub": jwk["pub"]})
