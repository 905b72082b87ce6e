"""`verify`: which tokens are good, and with which word each other one is refused."""

import hashlib
import hmac
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given, settings
from hypothesis import strategies as st

from kms_jwks import jose, strictjson
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.errors import (
    TokenAudienceMismatch,
    TokenExpired,
    TokenIssuerMismatch,
    TokenKeyRevoked,
    TokenKeyUnknown,
    TokenMalformed,
    TokenNotYetValid,
    TokenRejected,
    TokenSignatureInvalid,
    TokenTypeMismatch,
)
from kms_jwks.verification import MAX_TOKEN_LENGTH, Verified, VerifyKey, authenticate, verify

NOW = 1_800_000_000
SKEW = 60
ISSUER = "https://issuer.example/default"
KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())
EDWARDS = ed25519.Ed25519PrivateKey.generate()
JWK = jose.public_jwk(KEY.public_key())
KEYS = {
    "k1": VerifyKey("ES256", JWK),
    "other": VerifyKey("ES256", jose.public_jwk(OTHER.public_key())),
    "ed": VerifyKey("EdDSA", jose.public_jwk(EDWARDS.public_key())),
    "revoked": VerifyKey("ES256", None, revoked=True),
    "revoked-with-jwk": VerifyKey("ES256", JWK, revoked=True),
    "no-jwk": VerifyKey("ES256", None),
    "bad-jwk": VerifyKey("ES256", {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}),
    "bad-alg": VerifyKey("ES999", JWK),
    "wrong-jwk": VerifyKey("RS256", JWK),
}
HEADER: dict[str, Any] = {"alg": "ES256", "kid": "k1", "typ": "JWT"}
CLAIMS: dict[str, Any] = {"iss": ISSUER, "aud": "api", "exp": NOW + 300, "iat": NOW, "sub": "u"}


def signed(header: object = HEADER, claims: object = CLAIMS, key: ec.EllipticCurvePrivateKey = KEY) -> str:
    raw = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, claims)]
    data = jose.signing_input(jose.b64u_encode(raw[0]), raw[1])
    signature = jose.der_to_raw(ALGORITHMS["ES256"], key.sign(data, ec.ECDSA(hashes.SHA256())))
    return jose.compact(data, signature)


def check(token: str, *, audience: str = "api", typ: str | None = None, now: int = NOW, skew: int = SKEW) -> Verified:
    return verify(token, keys=KEYS, issuer=ISSUER, audience=audience, typ=typ, now=now, clock_skew=skew)


def without(mapping: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != name}


def test_a_good_token() -> None:
    assert check(signed()) == Verified(header=HEADER, claims=CLAIMS, kid="k1")


def test_a_token_of_another_algorithm_in_the_same_set() -> None:
    data = jose.signing_input(jose.header_segment(alg="EdDSA", kid="ed", typ="JWT"), json.dumps(CLAIMS).encode())
    assert check(jose.compact(data, EDWARDS.sign(data))).kid == "ed"


# --- the key ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kid", "error"),
    [
        ("nobody", TokenKeyUnknown),
        ("K1", TokenKeyUnknown),
        ("k1 ", TokenKeyUnknown),
        ("../k1", TokenKeyUnknown),
        ("k" * 3000, TokenKeyUnknown),
        ("revoked", TokenKeyRevoked),
        ("revoked-with-jwk", TokenKeyRevoked),
        ("no-jwk", TokenKeyUnknown),
        ("bad-jwk", TokenKeyUnknown),
        ("other", TokenSignatureInvalid),
        ("ed", TokenSignatureInvalid),
        ("bad-alg", TokenSignatureInvalid),
        ("wrong-jwk", TokenSignatureInvalid),
    ],
)
def test_the_kid_decides(kid: str, error: type[TokenRejected]) -> None:
    with pytest.raises(error) as caught:
        check(signed(HEADER | {"kid": kid}))
    assert len(caught.value.detail) < 150


def test_a_revoked_kid_is_named_before_anything_is_computed() -> None:
    for token in (signed(HEADER | {"kid": "revoked"}), signed(HEADER | {"kid": "revoked", "alg": "none"})):
        with pytest.raises(TokenKeyRevoked):
            check(token.rpartition(".")[0] + ".")


@pytest.mark.parametrize("kid", ["bad-alg", "wrong-jwk"])
def test_a_key_that_cannot_verify_is_unknown(kid: str) -> None:
    with pytest.raises(TokenKeyUnknown):
        check(signed(HEADER | {"kid": kid, "alg": KEYS[kid].alg}))


@pytest.mark.parametrize("alg", ["none", "None", "HS256", "ES384", "ES256K", "RS256", "es256", "EdDSA", "ES256 "])
def test_the_algorithm_is_the_keys(alg: str) -> None:
    for token in (signed(HEADER | {"alg": alg}), signed(HEADER | {"alg": alg}).rpartition(".")[0] + "."):
        with pytest.raises(TokenSignatureInvalid):
            check(token)


def test_the_public_key_is_no_hmac_secret() -> None:
    data = jose.signing_input(jose.header_segment(alg="HS256", kid="k1", typ="JWT"), json.dumps(CLAIMS).encode())
    for secret in (jose.to_pem(JWK).encode(), jose.to_der(JWK), json.dumps(JWK).encode()):
        with pytest.raises(TokenSignatureInvalid):
            check(jose.compact(data, hmac.new(secret, data, hashlib.sha256).digest()))


def test_a_changed_payload_or_header_breaks_the_signature() -> None:
    head, body, signature = signed().split(".")
    for token in (
        ".".join((head, jose.b64u_encode(json.dumps(CLAIMS | {"sub": "admin"}).encode()), signature)),
        ".".join((jose.b64u_encode(json.dumps(HEADER | {"x": 1}).encode()), body, signature)),
        ".".join((head, body, jose.b64u_encode(bytes(64)))),
        ".".join((head, body, "")),
        ".".join((head, "", signature)),
        ".".join((head, body, signature[: 4 * 16])),
    ):
        with pytest.raises(TokenSignatureInvalid):
            check(token)


# --- the header -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        without(HEADER, "alg"),
        without(HEADER, "kid"),
        HEADER | {"alg": None},
        HEADER | {"alg": 7},
        HEADER | {"alg": ["ES256"]},
        HEADER | {"alg": ""},
        HEADER | {"kid": ""},
        HEADER | {"kid": 7},
        HEADER | {"kid": ["k1"]},
        HEADER | {"typ": 7},
        HEADER | {"typ": None},
        HEADER | {"crit": ["exp"]},
        HEADER | {"crit": []},
        HEADER | {"b64": True},
        HEADER | {"b64": False, "crit": ["b64"]},
        HEADER | {"jwk": JWK},
        HEADER | {"jku": "https://evil.example/jwks.json"},
        HEADER | {"x5u": "https://evil.example/x.pem"},
        HEADER | {"zip": "DEF"},
        HEADER | {"enc": "A256GCM"},
        b"",
        b"[]",
        b"null",
        b'"x"',
        b"{",
        b"\xff",
        b"\xef\xbb\xbf{}",
        b'{"alg":"ES256","kid":"k1","kid":"k1"}',
        b"[" * 4000,
    ],
    ids=range(29),
)
def test_headers_that_are_malformed_or_not_processed(header: object) -> None:
    with pytest.raises(TokenMalformed) as caught:
        check(signed(header))
    assert len(caught.value.detail) < 200


@pytest.mark.parametrize("extra", [{"cty": "x"}, {"x5t": "AA"}, {"x5c": ["AA"]}, {"nonce": 1}, {"unknown": None}])
def test_other_members_are_ignored(extra: dict[str, Any]) -> None:
    """RFC 7515 §4: what is not understood is ignored; nothing of it is used."""
    assert check(signed(HEADER | extra)).header == HEADER | extra


# token's typ (None: absent), expected typ, whether it passes
TYPES = [
    ("JWT", None, True),
    ("jwt", None, True),
    ("at+jwt", None, True),
    ("AT+JWT", None, True),
    ("application/at+jwt", None, True),
    ("APPLICATION/JWT", None, True),
    (None, None, True),
    ("", None, False),
    ("JOSE", None, False),
    ("dpop+jwt", None, False),
    ("logout+jwt", None, False),
    ("text/JWT", None, False),
    ("JWT", "JWT", True),
    ("JWT", "jwt", True),
    ("application/jwt", "JWT", True),
    ("at+jwt", "application/at+jwt", True),
    ("logout+jwt", "logout+jwt", True),
    ("JWT", "at+jwt", False),
    ("at+jwt", "JWT", False),
    (None, "JWT", False),
    ("JWT ", "JWT", False),
]


@pytest.mark.parametrize(("typ", "expected", "passes"), TYPES)
def test_typ(typ: str | None, expected: str | None, passes: bool) -> None:
    token = signed(without(HEADER, "typ") if typ is None else HEADER | {"typ": typ})
    if passes:
        assert check(token, typ=expected).kid == "k1"
    else:
        with pytest.raises(TokenTypeMismatch):
            check(token, typ=expected)


# --- the claims -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iss", ["https://other.example", ISSUER + "/", "", None, 7, [ISSUER], {"a": 1}])
def test_another_issuer(iss: object) -> None:
    with pytest.raises(TokenIssuerMismatch):
        check(signed(claims=CLAIMS | {"iss": iss}))


def test_no_issuer() -> None:
    with pytest.raises(TokenIssuerMismatch, match="no iss"):
        check(signed(claims=without(CLAIMS, "iss")))


@pytest.mark.parametrize(
    ("aud", "audience", "error"),
    [
        ("api", "api", None),
        (["other", "api"], "api", None),
        ("api", "any", None),
        ([], "any", None),
        ("other", "any", None),
        ("other", "api", TokenAudienceMismatch),
        (["other"], "api", TokenAudienceMismatch),
        ([], "api", TokenAudienceMismatch),
        ("apis", "api", TokenAudienceMismatch),
        ("API", "api", TokenAudienceMismatch),
        ("", "api", TokenAudienceMismatch),
        ("any", "api", TokenAudienceMismatch),
        (None, "api", TokenMalformed),
        (7, "api", TokenMalformed),
        (["api", 7], "api", TokenMalformed),
        ([["api"]], "api", TokenMalformed),
        ({"api": 1}, "api", TokenMalformed),
        (7, "any", TokenMalformed),
    ],
)
def test_audience(aud: object, audience: str, error: type[TokenRejected] | None) -> None:
    token = signed(claims=CLAIMS | {"aud": aud})
    if error is None:
        assert check(token, audience=audience).claims["aud"] == aud
    else:
        with pytest.raises(error):
            check(token, audience=audience)


def test_no_audience() -> None:
    token = signed(claims=without(CLAIMS, "aud"))
    assert check(token, audience="any").kid == "k1"
    with pytest.raises(TokenAudienceMismatch, match="no aud"):
        check(token)


@pytest.mark.parametrize(
    ("times", "error"),
    [
        ({"exp": NOW + 1}, None),
        ({"exp": NOW}, None),
        ({"exp": NOW - SKEW + 1}, None),
        ({"exp": NOW - SKEW}, TokenExpired),
        ({"exp": NOW - SKEW + 0.5}, None),
        ({"exp": NOW - SKEW - 0.5}, TokenExpired),
        ({"exp": 0}, TokenExpired),
        ({"exp": -1}, TokenExpired),
        ({"exp": 1e10}, None),
        ({"nbf": NOW}, None),
        ({"nbf": NOW + SKEW}, None),
        ({"nbf": NOW + SKEW + 1}, TokenNotYetValid),
        ({"nbf": NOW + SKEW + 0.5}, TokenNotYetValid),
        ({"nbf": 0}, None),
        ({"iat": NOW + SKEW}, None),
        ({"iat": NOW + SKEW + 1}, TokenNotYetValid),
        ({"iat": 0}, None),
        ({"iat": 1.5}, None),
        ({"exp": str(NOW + 60)}, TokenMalformed),
        ({"exp": None}, TokenMalformed),
        ({"exp": True}, TokenMalformed),
        ({"exp": [NOW + 60]}, TokenMalformed),
        ({"exp": 10**300}, TokenMalformed),
        ({"exp": 2**53 + 1}, TokenMalformed),
        ({"exp": 1e300}, TokenMalformed),
        ({"nbf": False}, TokenMalformed),
        ({"nbf": "0"}, TokenMalformed),
        ({"nbf": None}, TokenMalformed),
        ({"iat": "now"}, TokenMalformed),
        ({"iat": -(10**300)}, TokenMalformed),
    ],
    ids=str,
)
def test_times(times: dict[str, Any], error: type[TokenRejected] | None) -> None:
    token = signed(claims=CLAIMS | times)
    if error is None:
        assert check(token).kid == "k1"
    else:
        with pytest.raises(error):
            check(token)


def test_a_token_without_exp_is_refused() -> None:
    with pytest.raises(TokenMalformed, match="no exp"):
        check(signed(claims=without(CLAIMS, "exp")))


def test_an_expired_token_says_when() -> None:
    with pytest.raises(TokenExpired) as caught:
        check(signed(claims=CLAIMS | {"exp": 1000.5}))
    assert caught.value.fields == {"exp": 1000, "now": NOW}


@pytest.mark.parametrize("claims", [b"", b"foo", b"[]", b"{", b"\xff", b'{"a":NaN}', b'{"a":1,"a":1}', b"[" * 4000])
def test_a_payload_that_is_no_json_object(claims: bytes) -> None:
    with pytest.raises(TokenMalformed, match=r"^The payload"):
        check(signed(claims=claims))
    assert authenticate(signed(claims=claims), keys=KEYS).payload == claims


# --- the form ---------------------------------------------------------------------------------------------------------

TOKEN = signed()
HEAD, BODY, SIGNATURE = TOKEN.split(".")


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "...",
        "x",
        HEAD,
        f"{HEAD}.{BODY}",
        f"{TOKEN}.",
        f"{TOKEN}.{SIGNATURE}",
        f".{TOKEN}",
        f"{TOKEN}.x.y",  # the five segments of a JWE
        f" {TOKEN}",
        f"{TOKEN}\n",
        f"{TOKEN}=",
        f"{HEAD}=.{BODY}.{SIGNATURE}",
        f"{HEAD}.{BODY}=.{SIGNATURE}",
        f"{HEAD}.{BODY}.{SIGNATURE[:-1]}+",
        f"{HEAD}.{BODY}.{SIGNATURE}A===",
        f"{HEAD}.{BODY}.{SIGNATURE[:-1]}é",
        f"{HEAD}.{BODY}.\ud800",
        f"é.{BODY}.{SIGNATURE}",
        json.dumps({"payload": BODY, "protected": HEAD, "signature": SIGNATURE}),
        "a" * (MAX_TOKEN_LENGTH + 1),
        "." * 1_000_000,
        f"{HEAD}.{BODY}.{'A' * MAX_TOKEN_LENGTH}",
    ],
    ids=lambda token: token[:20].encode("ascii", "replace").decode(),
)
def test_what_is_no_jws_in_compact_form(token: str) -> None:
    with pytest.raises(TokenMalformed) as caught:
        check(token)
    assert len(caught.value.detail) < 200


def test_a_token_as_long_as_is_read() -> None:
    room = MAX_TOKEN_LENGTH - len(signed(claims=CLAIMS | {"x": ""}))
    assert check(signed(claims=CLAIMS | {"x": "y" * (room * 3 // 4 - 2)})).kid == "k1"
    with pytest.raises(TokenMalformed, match="16384 are read"):
        check(signed(claims=CLAIMS | {"x": "y" * (room * 3 // 4 + 8)}))


def test_a_signature_has_one_spelling() -> None:
    """The last character of 86 carries four bits that must be zero."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    last = alphabet.index(TOKEN[-1])
    for bits in range(1, 16):
        with pytest.raises(TokenMalformed, match="trailing bits"):
            check(TOKEN[:-1] + alphabet[last + bits])


# --- properties -------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=5,
)
header_names = st.sampled_from(["alg", "kid", "typ", "crit", "jwk", "cty", "b64"])
header_values = st.sampled_from(["ES256", "none", "k1", "revoked", "other", "JWT", "at+jwt"]) | json_values
claim_names = st.sampled_from(["iss", "aud", "exp", "nbf", "iat", "sub"])
claim_values = st.just(ISSUER) | st.just("api") | st.integers(NOW - 400, NOW + 400) | json_values


@settings(deadline=None)
@given(
    st.dictionaries(header_names, header_values, max_size=4),
    st.dictionaries(claim_names, claim_values, max_size=5),
    st.booleans(),
)
def test_nothing_but_token_rejected_ever_leaves(header: dict[str, Any], claims: dict[str, Any], whole: bool) -> None:
    token = signed(HEADER | header if whole else header, CLAIMS | claims)
    try:
        verified = check(token)
    except TokenRejected:
        return
    assert verified.claims["iss"] == ISSUER
    assert verified.header["alg"] == "ES256"


@settings(deadline=None)
@given(
    st.text(max_size=80) | st.lists(st.binary(max_size=30).map(jose.b64u_encode), min_size=1, max_size=6).map(".".join)
)
def test_no_random_text_is_a_token(token: str) -> None:
    with pytest.raises(TokenRejected):
        check(token)


@settings(deadline=None)
@given(st.integers(0, len(TOKEN) - 1), st.characters())
def test_a_token_with_one_character_changed_is_refused(index: int, character: str) -> None:
    changed = TOKEN[:index] + character + TOKEN[index + 1 :]
    if changed != TOKEN:
        with pytest.raises(TokenRejected):
            check(changed)


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_authenticate_returns_the_payload_as_it_was_signed(payload: bytes) -> None:
    authentic = authenticate(signed(claims=payload), keys=KEYS)
    assert (authentic.payload, authentic.kid) == (payload, "k1")
    assert authentic.header == strictjson.loads(json.dumps(HEADER).encode())
