"""An issuer that keeps its JWT library: PyJWT builds and encodes the token, the module signs it."""

from __future__ import annotations

import time
from typing import Any

import jwt
import pytest

from kms_jwks import errors
from kms_jwks.client import Client
from tests.bench.service import wait_for_standby
from tests.integration.conftest import Server
from tests.interop.conftest import Issuer, MakeIssuer
from tests.interop.remote_keys import remote_key
from tests.interop.verifiers import with_joserfc, with_pyjwt


def claims(issuer: Issuer, **changes: object) -> dict[str, Any]:
    now = int(time.time())
    return {"iss": issuer.url, "sub": "alice", "aud": "shop", "iat": now, "exp": now + 300} | changes


@pytest.mark.parametrize(
    ("alg", "bits"),
    [
        ("RS256", 2048),
        ("RS512", 2048),
        ("PS256", 2048),
        ("PS512", 3072),
        ("ES256", None),
        ("ES384", None),
        ("ES512", None),
        ("ES256K", None),
        ("EdDSA", None),
    ],
)
def test_pyjwt_encodes_with_a_key_in_the_module(shared_issuer: MakeIssuer, alg: str, bits: int | None) -> None:
    issuer = shared_issuer(alg, bits)
    key = remote_key(issuer.client, issuer.name, "main")

    token = jwt.encode(claims(issuer), key, algorithm=alg, headers={"kid": key.kid})

    expected = {"alg": alg, "issuer": issuer.url, "audience": "shop"}
    assert with_pyjwt(token, issuer.jwks_uri, **expected)["sub"] == "alice"
    assert with_joserfc(token, issuer.jwks_uri, **expected)["sub"] == "alice"
    with pytest.raises(TypeError, match="in the module"):
        key.private_bytes()


@pytest.mark.parametrize(
    ("changes", "headers"),
    [
        ({"iss": "https://elsewhere.example.com"}, {}),
        ({"exp": 4_102_444_800}, {}),
        ({}, {"typ": "at+jwt"}),
        ({}, {"jku": "https://elsewhere.example.com/jwks.json"}),
        ({}, {"kid": "another"}),
    ],
)
def test_nothing_outside_the_profile_is_signed(
    es256: Issuer, changes: dict[str, object], headers: dict[str, object]
) -> None:
    key = remote_key(es256.client, es256.name, "main")
    with pytest.raises(errors.SigningInputRefused):
        jwt.encode(claims(es256, **changes), key, algorithm="ES256", headers={"kid": key.kid, **headers})


def test_a_pinned_kid_that_was_revoked_signs_no_more_and_the_refusal_names_its_successor(
    server: Server, make_issuer: MakeIssuer, admin: Client
) -> None:
    issuer = make_issuer("ES256")
    wait_for_standby(server, issuer.name)
    key = remote_key(issuer.client, issuer.name, "main")
    jwt.encode(claims(issuer), key, algorithm="ES256", headers={"kid": key.kid})

    revoked = admin.revoke(issuer.name, "main", key.kid)

    with pytest.raises(errors.KidNotActive) as refused:
        jwt.encode(claims(issuer), key, algorithm="ES256", headers={"kid": key.kid})
    assert revoked.successor is not None
    assert refused.value.fields["active_kid"] == revoked.successor.kid

    key = remote_key(issuer.client, issuer.name, "main")
    token = jwt.encode(claims(issuer), key, algorithm="ES256", headers={"kid": key.kid})
    with_pyjwt(token, issuer.jwks_uri, alg="ES256", issuer=issuer.url, audience="shop")
