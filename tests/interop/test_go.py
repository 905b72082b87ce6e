"""Claims as Go reads them: encoding/json matches names without regard to case, and the last match wins.

golang-jwt's RegisteredClaims are decoded with it. A caller that could have EXP signed beside the service's exp would
choose when its token expires for every such verifier.
"""

from __future__ import annotations

import json
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from kms_jwks import errors, jose, wire
from kms_jwks.profiles import REGISTERED, IssueRules, issue
from tests.interop.conftest import Issuer
from tests.interop.remote_keys import remote_key
from tests.interop.verifiers import GolangJwt, GolangJwtError, fetch

FAR = 32_503_680_000
EVIL = "https://issuer.evil.example"
CLAIMS = [
    # what a caller adds, and what Go then reads
    ({"EXP": FAR}, {"exp": FAR}),
    ({"Exp": FAR}, {"exp": FAR}),
    ({"I\u017fS": EVIL}, {"iss": EVIL}),
    ({"EXP": FAR, "is\u017f": EVIL}, {"exp": FAR, "iss": EVIL}),
    ({"NBF": FAR}, {"nbf": FAR}),
]


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> GolangJwt:
    return GolangJwt(tmp_path_factory.mktemp("go"))


def test_go_reads_the_expiry_and_issuer_that_the_service_set(go: GolangJwt, es256: Issuer) -> None:
    made = es256.client.sign_jwt(es256.name, "main", {"sub": "alice", "aud": "shop"}, expires_in=5)
    read = go.claims(made.token, fetch(es256.jwks_uri))
    assert (read["iss"], read["sub"], read["aud"], read["jti"]) == (es256.url, "alice", ["shop"], made.jti)
    assert read["exp"] == made.expires_at.timestamp() == read["iat"] + 5


def test_go_reads_a_token_whose_header_has_no_typ(go: GolangJwt, es256: Issuer) -> None:
    key, now = remote_key(es256.client, es256.name, "main"), int(time.time())
    claims = {"iss": es256.url, "sub": "alice", "iat": now + 3, "exp": now + 3603}  # an issuer whose clock is ahead
    token = jwt.encode(claims, key, algorithm="ES256", headers={"kid": key.kid, "typ": None})
    assert "typ" not in jwt.get_unverified_header(token)
    assert go.claims(token, fetch(es256.jwks_uri))["exp"] == now + 3603


@pytest.mark.parametrize(("added", "read"), CLAIMS, ids=range(len(CLAIMS)))
def test_what_go_would_take_for_another_claim_is_signed_by_no_route(
    go: GolangJwt, es256: Issuer, added: dict[str, Any], read: dict[str, Any]
) -> None:
    now = int(time.time())
    claims = {"iss": es256.url, "sub": "alice", "exp": now + 60}
    own = ec.generate_private_key(ec.SECP256R1())
    public = {**jose.public_jwk(own.public_key()), "kid": "own"}
    elsewhere = jwt.encode(claims | added, own, algorithm="ES256", headers={"kid": "own"})
    if "nbf" in read:
        with pytest.raises(GolangJwtError, match="not valid yet"):
            go.claims(elsewhere, {"keys": [public]})
    else:
        found = go.claims(elsewhere, {"keys": [public]})
        assert {name: found[name] for name in read} == read, "a signer that allows this lets its callers choose"

    with pytest.raises(errors.ClaimsRefused):
        es256.client.sign_jwt(es256.name, "main", {"sub": "alice"} | added, expires_in=5)
    key = remote_key(es256.client, es256.name, "main")
    with pytest.raises(errors.SigningInputRefused):
        jwt.encode(claims | added, key, algorithm="ES256", headers={"kid": key.kid})
    batch = [wire.JwtRequest(claims={"sub": "alice"} | added), wire.JwtRequest(claims={"sub": "bob"})]
    refused, signed = es256.client.sign_jwt_batch(es256.name, "main", batch)
    assert isinstance(refused, errors.ClaimsRefused)
    assert isinstance(signed, wire.SignedJwt)


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_every_name_that_go_takes_for_a_registered_claim_is_refused(go: GolangJwt, name: str) -> None:
    rules = IssueRules("https://i.example", "JWT", default_lifetime=300, max_token_ttl=3600, clock_skew=300)
    spellings = go.spellings(name)
    assert {name, name.upper()} <= set(spellings)
    for spelling in spellings:
        if spelling != name:
            with pytest.raises(errors.ClaimsRefused, match=f"as {name} "):
                issue(rules, {spelling: 1}, now=1_800_000_000, expires_in=None)
    assert json.loads(issue(rules, {}, now=1_800_000_000, expires_in=None).payload)["exp"] == 1_800_000_300
