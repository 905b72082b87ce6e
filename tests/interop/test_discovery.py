"""Verifiers that are told an issuer and nothing else find the JWKS by the issuer's metadata."""

from __future__ import annotations

import urllib.error
from urllib.parse import urlsplit

import pytest

from kms_jwks import wire
from kms_jwks.client import Client
from tests.integration.conftest import Server
from tests.interop.conftest import Issuer
from tests.interop.verifiers import Jose, fetch, with_pyjwt


def openid_url(issuer: str) -> str:
    """OpenID Connect Discovery 1.0 §4."""
    return f"{issuer}/.well-known/openid-configuration"


def oauth_url(issuer: str) -> str:
    """RFC 8414 §3: the well-known part stands before the issuer's path."""
    parts = urlsplit(issuer)
    return f"{parts.scheme}://{parts.netloc}/.well-known/oauth-authorization-server{parts.path}"


@pytest.mark.parametrize("url_of", [openid_url, oauth_url])
def test_metadata_leads_to_the_keys(es256: Issuer, url_of: object) -> None:
    assert callable(url_of)
    metadata = fetch(url_of(es256.url))
    assert metadata["issuer"] == es256.url
    assert "ES256" in metadata["id_token_signing_alg_values_supported"]
    claims = with_pyjwt(es256.token(), metadata["jwks_uri"], alg="ES256", issuer=metadata["issuer"], audience="shop")
    assert claims["iss"] == es256.url


def test_node_finds_its_way_too(es256: Issuer, jose: Jose) -> None:
    assert jose.discover(es256.token(), alg="ES256", issuer=es256.url, audience="shop")["sub"] == "alice"


def test_there_is_no_metadata_for_an_issuer_that_lives_elsewhere(server: Server, admin: Client) -> None:
    admin.create_key_set(
        wire.KeySetCreate(
            name="elsewhere", issuer="https://elsewhere.example.com", keys=[wire.KeyCreate(name="main", alg="ES256")]
        )
    )
    assert fetch(f"{server.url}/elsewhere/.well-known/jwks.json")["keys"]
    for url_of in (openid_url, oauth_url):
        with pytest.raises(urllib.error.HTTPError) as refused:
            fetch(url_of(f"{server.url}/elsewhere"))
        assert refused.value.code == 404
        refused.value.close()
