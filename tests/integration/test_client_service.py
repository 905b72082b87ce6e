"""The Python client against the real service: what an issuer does, in both kinds of key sets."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from kms_jwks import errors, jose, wire
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.client import Client
from tests.integration.conftest import Server, fresh, wait_until
from tests.proxy import DecodingProxy


@pytest.fixture
def admin(server: Server) -> Iterator[Client]:
    with Client(server.url, server.admin) as client:
        yield client


@pytest.fixture
def issuer(server: Server) -> Iterator[Client]:
    with Client(server.url, server.signer) as client:
        yield client


def part(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def test_an_issuer_signs_and_a_verifier_verifies(issuer: Client, admin: Client) -> None:
    signed = issuer.sign_jwt("default", "default", {"sub": "alice", "aud": "shop"}, expires_in=60)
    verified = admin.verify("default", signed.token, "shop", typ="JWT")
    assert verified.claims["sub"] == "alice"
    assert verified.claims["exp"] == int(signed.expires_at.timestamp())
    assert verified.kid == signed.kid == issuer.active("default", "default").kid
    assert signed.kid in {key["kid"] for key in issuer.jwks("default")["keys"]}
    assert issuer.jwks() == issuer.jwks("default")
    with pytest.raises(errors.TokenAudienceMismatch):
        admin.verify("default", signed.token, "bank")


def test_a_refusal_carries_what_a_program_needs(issuer: Client) -> None:
    with pytest.raises(errors.ClaimsRefused) as caught:
        issuer.sign_jwt("default", "default", {"iss": "https://somebody.example.com"})
    assert vars(caught.value)["status"] == 400
    assert vars(caught.value)["request_id"]
    with pytest.raises(errors.Forbidden) as forbidden:
        list(issuer.clients())
    assert forbidden.value.fields["permission"] == "client:read"


def test_a_batch_keeps_its_order_and_its_errors(issuer: Client, admin: Client) -> None:
    requests = [wire.JwtRequest(claims={"n": n} if n != 1 else {"iss": "x"}) for n in range(3)]
    first, second, third = issuer.sign_jwt_batch("default", "default", requests)
    assert isinstance(first, wire.SignedJwt)
    assert isinstance(second, errors.ClaimsRefused)
    assert isinstance(third, wire.SignedJwt)
    assert admin.verify("default", third.token, "any").claims["n"] == 2
    with pytest.raises(errors.InvalidBatch):
        issuer.sign_jwt_batch("default", "default", [])


def test_a_jwt_library_signs_with_a_pinned_kid(issuer: Client, admin: Client) -> None:
    active = issuer.active("default", "default")
    issuer_name = admin.verify("default", issuer.sign_jwt("default", "default", {}).token, "any").claims["iss"]
    now = int(datetime.now(UTC).timestamp())
    header = part(json.dumps({"alg": active.alg, "kid": active.kid, "typ": "JWT"}).encode())
    claims = part(json.dumps({"iss": issuer_name, "iat": now, "exp": now + 60, "jti": "j-1"}).encode())
    signature = issuer.sign_input("default", "default", f"{header}.{claims}", active.kid)
    assert admin.verify("default", f"{header}.{claims}.{signature.signature}", "any").claims["jti"] == "j-1"
    with pytest.raises(errors.Conflict):
        issuer.sign_input("default", "default", f"{header}.{claims}", "another")
    good, bad = issuer.sign_input_batch(
        "default",
        "default",
        [
            wire.SigningInputRequest(signing_input=f"{header}.{claims}", kid=active.kid),
            wire.SigningInputRequest(signing_input="a.b", kid=active.kid),
        ],
    )
    assert isinstance(good, wire.Signature)
    assert isinstance(bad, errors.SigningInputRefused)


def test_raw_key_sets(server: Server) -> None:
    name = server.key_set(None, "ES256", purpose="raw")
    with Client(server.url, server.client("raw-signer", key_set=name)) as client:
        jwk = client.active(name, "k1").public_jwk
        jws = client.sign_jws(name, "k1", b"any bytes \xff", cty="text/plain").jws
        header, payload, signature = jws.split(".")
        assert base64.urlsafe_b64decode(payload + "=") == b"any bytes \xff"
        jose.verify_signature(ALGORITHMS["ES256"], jwk, f"{header}.{payload}".encode(), _bytes(signature))
        assert ".." in client.sign_jws(name, "k1", b"data", detached=True).jws
        for answer in (
            client.sign_raw(name, "k1", b"data"),
            client.sign_raw(name, "k1", digest=hashlib.sha256(b"data").digest(), kid=client.active(name, "k1").kid),
        ):
            jose.verify_signature(ALGORITHMS["ES256"], jwk, b"data", _bytes(answer.signature))
        with pytest.raises(errors.InvalidDigest):
            client.sign_raw(name, "k1", digest=b"short")
        with pytest.raises(errors.InvalidField):
            client.sign_raw(name, "k1")
        with pytest.raises((errors.PurposeMismatch, errors.Forbidden)):
            client.sign_jwt(name, "k1", {})
        assert [type(a) for a in client.sign_jws_batch(name, "k1", [wire.JwsRequest(payload="YQ")])] == [wire.SignedJws]
        raw = client.sign_raw_batch(name, "k1", [wire.RawSignatureRequest(input="YQ")])
        assert [type(a) for a in raw] == [wire.Signature]


def _bytes(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def test_an_administrator_runs_the_life_of_keys(admin: Client) -> None:
    name = fresh("set")
    made = admin.create_key_set(wire.KeySetCreate(name=name, keys=[wire.KeyCreate(name="k", alg="ES384")]))
    assert made.jwks_uri.endswith(f"/{name}/.well-known/jwks.json")
    wait_until(lambda: len(list(admin.versions(name, "k"))) == 2 and admin.version(name, "k", 2).usable_at)
    with pytest.raises(errors.NotYetUsable) as caught:
        admin.rotate(name, "k", expected_kid=admin.key(name, "k").active_kid)
    assert caught.value.fields["usable_at"]
    with pytest.raises(errors.NotYetUsable):
        admin.activate(name, "k", 2)
    with pytest.raises(errors.ActiveKidMismatch):
        admin.rotate(name, "k", expected_kid="other")
    changed = admin.update_key_set(name, wire.KeySetPatch(cache_lifetime=120), revision=admin.key_set(name).revision)
    assert changed.cache_lifetime == 120
    with pytest.raises(errors.RevisionMismatch):
        admin.update_key_set(name, wire.KeySetPatch(cache_lifetime=60), revision=changed.revision - 1)
    key = admin.update_key(
        name, "k", wire.KeyPatch(policy=wire.PolicyFields(handover=30)), revision=admin.key(name, "k").revision
    )
    assert key.policy.handover == 30
    assert not admin.disable_key(name, "k").enabled
    assert admin.enable_key(name, "k").enabled
    assert admin.attributes(name, "k", 1).non_extractable
    assert admin.safety(name, "k", 1).checks
    jwk = admin.public_jwk(name, "k", 1)
    assert admin.public_pem(name, "k", 1).startswith("-----BEGIN PUBLIC KEY-----")
    assert jwk["kid"] == admin.version(name, "k", 1).kid
    assert jose.to_der(jwk) == admin.public_der(name, "k", 1)
    revoked = admin.revoke(name, "k", jwk["kid"], reason="test")
    assert (revoked.version.state, revoked.unconfirmed) == ("revoked", [])
    assert revoked.successor is not None
    later = datetime.now(UTC) + timedelta(days=10)
    assert admin.destroy(name, "k", 1, destroy_at=later).destroy_at is not None
    assert admin.cancel_destroy(name, "k", 1).destroy_at is None
    assert name in {s.name for s in admin.key_sets()}
    assert [k.name for k in admin.keys(name)] == ["k"]
    with pytest.raises(errors.NameTaken):
        admin.create_key(name, wire.KeyCreate(name="k", alg="ES384"))


def test_an_administrator_runs_the_callers(admin: Client, server: Server) -> None:
    name = fresh("client")
    assert admin.create_client(name) == admin.client(name)
    grant = admin.create_grant(wire.GrantCreate(client=name, role="verifier", scope=wire.GrantScope(key_set="default")))
    assert admin.grant(grant.id).scope == {"key_set": "default"}
    made = admin.create_token(name, expires_in=3600)
    assert [t.id for t in admin.tokens(name)] == [made.id]
    with Client(server.url, made.token) as verifier:
        verifier.jwks("default")
        admin.delete_grant(grant.id)
        with pytest.raises(errors.Forbidden):
            verifier.verify("default", "a.b.c", "any")
        admin.revoke_token(name, made.id)
        with pytest.raises(errors.CredentialsRevoked):
            verifier.verify("default", "a.b.c", "any")
    assert admin.create_token(name).expires_at > datetime.now(UTC) + timedelta(days=80)
    admin.delete_client(name)
    with pytest.raises(errors.ClientNotFound):
        admin.client(name)
    with pytest.raises(errors.NameTaken):
        admin.create_client(name)


def test_operation(admin: Client) -> None:
    assert {node.live for node in admin.nodes() if node.lag == 0} == {True}
    (backend,) = admin.backends()
    assert backend.state == "ok"
    assert admin.backend(backend.name).type == "pkcs11"
    with pytest.raises(errors.BackendUnknown):
        admin.backend("nothing-here")
    with pytest.raises(errors.WorkerNotFound):
        admin.forget_worker("01a20a77-11c8-7908-b561-189cc3e9eb03")


def test_external_keys(admin: Client, server: Server) -> None:
    donor, name, kid = server.key_set(None, "ES256"), server.key_set(None, "ES256"), fresh("old/kid ?#")
    request = wire.ExternalKeyCreate(
        kid=kid,
        alg="ES256",
        remove_at=datetime.now(UTC) + timedelta(days=1),
        pem=admin.public_pem(donor, "k1", 1),
    )
    assert admin.add_external_key(name, request).kid == kid
    assert [e.kid for e in admin.external_keys(name)] == [kid]
    assert kid in {key["kid"] for key in admin.jwks(name)["keys"]}
    assert admin.external_key(name, kid).alg == "ES256"
    admin.remove_external_key(name, kid)
    with pytest.raises(errors.ExternalKeyNotFound):
        admin.external_key(name, kid)


KIDS = ("a/b", "/a//b/", "a+b=", "50%", "%2F", "Schlüssel-ключ", "a b", "~x", "a?#;&", "'\"<>")


def test_every_kid_that_can_be_added_can_be_named_and_removed(admin: Client, server: Server) -> None:
    """By the client directly and through a proxy that decodes the path; over plain HTTP percent-encoded."""
    name = server.key_set(None)
    jwk = jose.public_jwk(ec.generate_private_key(ec.SECP256R1()).public_key())
    path = f"/v1/key-sets/{name}/external-keys"
    body = {"alg": "ES256", "jwk": jwk, "remove_at": "2031-02-03T00:00:00Z"}
    later = wire.ExternalKeyPatch(remove_at=datetime(2032, 1, 1, tzinfo=UTC))
    with DecodingProxy(server.port) as proxy, Client(proxy.url, server.admin) as through:
        for kid in KIDS:
            added = server.call("POST", path, {**body, "kid": kid})
            assert added.status == 201, (kid, added.body)
            named = {f"{path}/{quote(kid, safe='')}"} if not kid.startswith("~") else set()
            named.add(added.headers["Location"])
            for way in named:
                assert server.must("GET", way)["kid"] == kid
            for client in (admin, through):
                assert client.external_key(name, kid).kid == kid
            assert through.update_external_key(name, kid, later).remove_at == later.remove_at
            through.remove_external_key(name, kid)
            with pytest.raises(errors.ExternalKeyNotFound):
                admin.external_key(name, kid)
        # What the proxy makes of an encoded slash is the kid all the same.
        server.must("POST", path, {**body, "kid": "a/b"})
        reply = server.pool.request(
            "GET", f"{proxy.url}{path}/a%2Fb", headers={"Authorization": f"Bearer {server.admin}"}
        )
        assert (reply.status, reply.json()["kid"]) == (200, "a/b")
    assert server.call("GET", f"{path}/~!").problem == "not_found"


def test_what_a_set_never_published_is_not_reached_by_another_spelling(server: Server) -> None:
    name = server.key_set(None, "ES256")
    for way in ("external-keys/..%2F..%2Fclients", "keys/k1/versions/..", "keys/k1/versions/1%2Fsafety%2Fx"):
        assert server.call("GET", f"/v1/key-sets/{name}/{way}").status == 404
    assert server.call("GET", f"/v1/key-sets/{name}/keys/k1/versions/1/safety").status == 200
