"""After a revocation the compromised key is gone from the JWKS, and no verifier that comes fresh trusts it."""

from __future__ import annotations

import jwt
import pytest
from joserfc.errors import JoseError as JoserfcError

from kms_jwks.client import Client
from tests.bench.service import wait_for_standby
from tests.integration.conftest import Server
from tests.interop.conftest import MakeIssuer
from tests.interop.verifiers import Jose, JoseError, fetch, with_joserfc, with_pyjwt


def test_fresh_verifiers_reject_a_revoked_key_and_accept_its_successor(
    server: Server, make_issuer: MakeIssuer, admin: Client, jose: Jose
) -> None:
    issuer = make_issuer("ES256")
    wait_for_standby(server, issuer.name)
    expected = {"alg": "ES256", "issuer": issuer.url, "audience": "shop"}
    compromised, token = issuer.kid(), issuer.token()
    with_pyjwt(token, issuer.jwks_uri, **expected)
    with_joserfc(token, issuer.jwks_uri, **expected)
    jose.verify(token, issuer.jwks_uri, **expected)

    revoked = admin.revoke(issuer.name, "main", compromised, reason="found in a core dump")

    assert compromised not in {key["kid"] for key in fetch(issuer.jwks_uri)["keys"]}
    with pytest.raises(jwt.PyJWKClientError, match="Unable to find a signing key"):
        with_pyjwt(token, issuer.jwks_uri, **expected)
    with pytest.raises((JoserfcError, ValueError), match="kid"):
        with_joserfc(token, issuer.jwks_uri, **expected)
    with pytest.raises(JoseError) as refused:
        jose.verify(token, issuer.jwks_uri, **expected)
    assert refused.value.code == "ERR_JWKS_NO_MATCHING_KEY"

    assert revoked.successor is not None
    successor = issuer.token()
    assert jwt.get_unverified_header(successor)["kid"] == revoked.successor.kid != compromised
    with_pyjwt(successor, issuer.jwks_uri, **expected)
    with_joserfc(successor, issuer.jwks_uri, **expected)
    jose.verify(successor, issuer.jwks_uri, **expected)
