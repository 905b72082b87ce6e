"""Every algorithm: a token signed in the module, verified from the served JWKS by libraries that we did not write."""

from __future__ import annotations

import base64
import json

import jwt
import pytest
from joserfc.errors import JoseError as JoserfcError

from tests.interop.conftest import Issuer, MakeIssuer
from tests.interop.verifiers import Jose, JoseError, fetch, with_joserfc, with_pyjwt

ALGORITHMS = [
    # Every algorithm, and every size with either padding; which hash goes with which size is all one.
    *(("RS256", bits) for bits in (2048, 3072, 4096)),
    *(("PS256", bits) for bits in (2048, 3072)),
    ("RS384", 3072),
    ("RS512", 2048),
    ("PS384", 2048),
    ("PS512", 3072),
    *((alg, None) for alg in ("ES256", "ES384", "ES512", "ES256K", "EdDSA", "Ed25519")),
]


def tampered(token: str) -> str:
    """The token with another subject under the old signature."""
    head, body, signature = token.split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    claims["sub"] = "mallory"
    forged = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"{head}.{forged}.{signature}"


@pytest.mark.parametrize(("alg", "bits"), ALGORITHMS, ids=lambda value: str(value or "").lower())
def test_every_library_verifies_what_it_knows_and_no_forgery(
    shared_issuer: MakeIssuer, jose: Jose, alg: str, bits: int | None
) -> None:
    issuer = shared_issuer(alg, bits)
    token = issuer.token("alice", "shop")
    header = jwt.get_unverified_header(token)
    assert header == {"alg": alg, "kid": issuer.kid(), "typ": "JWT"}

    check_joserfc(issuer, token)
    check_pyjwt(issuer, token)
    check_jose(issuer, token, jose)


def check_joserfc(issuer: Issuer, token: str) -> None:
    """joserfc knows every algorithm of ours; `EdDSA` with a warning, since RFC 9864 prefers the name `Ed25519`."""
    expected = {"alg": issuer.alg, "issuer": issuer.url, "audience": "shop"}
    assert with_joserfc(token, issuer.jwks_uri, **expected)["sub"] == "alice"
    with pytest.raises(JoserfcError, match="bad_signature"):
        with_joserfc(tampered(token), issuer.jwks_uri, **expected)


def check_pyjwt(issuer: Issuer, token: str) -> None:
    """PyJWT 2.15 knows no `Ed25519` (RFC 9864): it skips such keys, and a set of nothing else has no usable key."""
    expected = {"alg": issuer.alg, "issuer": issuer.url, "audience": "shop"}
    if issuer.alg == "Ed25519":
        with pytest.raises(jwt.PyJWKSetError, match="usable keys"):
            with_pyjwt(token, issuer.jwks_uri, **expected)
        return
    assert with_pyjwt(token, issuer.jwks_uri, **expected)["sub"] == "alice"
    with pytest.raises(jwt.InvalidSignatureError):
        with_pyjwt(tampered(token), issuer.jwks_uri, **expected)


def check_jose(issuer: Issuer, token: str, jose: Jose) -> None:
    """jose 6 builds on WebCrypto, which has no secp256k1, so it knows no ES256K and says so."""
    expected = {"alg": issuer.alg, "issuer": issuer.url, "audience": "shop"}
    if issuer.alg == "ES256K":
        with pytest.raises(JoseError) as refused:
            jose.verify(token, issuer.jwks_uri, **expected)
        assert refused.value.code == "ERR_JOSE_NOT_SUPPORTED"
        return
    assert jose.verify(token, issuer.jwks_uri, **expected)["sub"] == "alice"
    with pytest.raises(JoseError) as refused:
        jose.verify(tampered(token), issuer.jwks_uri, **expected)
    assert refused.value.code == "ERR_JWS_SIGNATURE_VERIFICATION_FAILED"


def test_a_token_of_another_key_set_is_rejected(es256: Issuer, make_issuer: MakeIssuer, jose: Jose) -> None:
    other = make_issuer("ES256")
    token = other.token()
    expected = {"alg": "ES256", "issuer": other.url, "audience": "shop"}
    with_pyjwt(token, other.jwks_uri, **expected)
    with_joserfc(token, other.jwks_uri, **expected)
    jose.verify(token, other.jwks_uri, **expected)

    with pytest.raises(jwt.PyJWKClientError, match="Unable to find a signing key"):
        with_pyjwt(token, es256.jwks_uri, **expected)
    with pytest.raises((JoserfcError, ValueError), match="kid"):
        with_joserfc(token, es256.jwks_uri, **expected)
    with pytest.raises(JoseError) as refused:
        jose.verify(token, es256.jwks_uri, **expected)
    assert refused.value.code == "ERR_JWKS_NO_MATCHING_KEY"


def test_many_verifiers_in_one_go_agree(es256: Issuer, jose: Jose) -> None:
    """A verifier that takes a batch from us: good tokens and a forged one among them."""
    tokens = [es256.token(f"user-{number}") for number in range(8)]
    tokens[3] = tampered(tokens[3])
    job = {"jwks_uri": es256.jwks_uri, "issuer": es256.url, "audience": "shop", "algorithms": ["ES256"]}
    answers = jose.ask([{"token": token, **job} for token in tokens])
    assert ["error" in answer for answer in answers] == [number == 3 for number in range(8)]


def test_a_published_key_holds_what_verifiers_need_and_nothing_more(es256: Issuer) -> None:
    for key in fetch(es256.jwks_uri)["keys"]:
        assert set(key) == {"kty", "crv", "x", "y", "use", "alg", "kid"}
        assert (key["kty"], key["crv"], key["use"], key["alg"]) == ("EC", "P-256", "sig", "ES256")
