"""ML-DSA keys over real HTTP: a document and a limit of kids of their own, tokens that another library verifies."""

from __future__ import annotations

import contextlib
import json
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

import jwt
import pytest
from authlib.deprecate import AuthlibDeprecationWarning
from cryptography.hazmat.primitives.asymmetric import mldsa
from jwcrypto.jwk import JWKSet
from jwcrypto.jws import JWS, InvalidJWSSignature
from werkzeug.serving import make_server

from kms_jwks import errors, jose, wire
from kms_jwks.http.app import create_app
from kms_jwks.model import DAY, VersionState
from kms_jwks.service.guard import RequestContext
from kms_jwks.timeline import later
from kms_jwks.times import to_datetime
from kms_jwks.worker.jwks_cache import JwksCache
from tests.service.world import UNSAFE, World

with warnings.catch_warnings():
    warnings.simplefilter("ignore", AuthlibDeprecationWarning)
    from authlib.jose import JsonWebKey

ML_DSA = ("ML-DSA-44", "ML-DSA-65", "ML-DSA-87")
JWKS, PQ = "/main/.well-known/jwks.json", "/main/.well-known/jwks-pq.json"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Message[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def kids(self) -> list[str]:
        return [jwk["kid"] for jwk in self.json["keys"]]


class Site:
    """The whole application of one worker behind a real server."""

    def __init__(self, world: World) -> None:
        self._server = make_server("127.0.0.1", 0, create_app(world.service), threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def ask(
        self, method: str, path: str, context: RequestContext | None = None, body: Any = None, **headers: str
    ) -> Answer:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if context is not None and context.authorization:
            given["Authorization"] = context.authorization
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            given["Content-Type"] = "application/json"
        request = urllib.request.Request(f"{self.url}{path}", data=data, headers=given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return Answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.headers, error.read())

    def get(self, path: str, context: RequestContext | None = None, **headers: str) -> Answer:
        return self.ask("GET", path, context, **headers)


@pytest.fixture
def site(world: World) -> Iterator[Site]:
    site = Site(world)
    with contextlib.closing(site):
        yield site


def add_key(world: World, alg: str = "ML-DSA-65", name: str = "pq", **fields: Any) -> wire.Key:
    request = wire.convert({"name": name, "alg": alg, **fields}, wire.KeyCreate)
    return world.service.keys.create(world.admin, "main", request).answer


def signed(world: World, site: Site, key: str = "pq", **body: Any) -> dict[str, Any]:
    answer = site.ask("POST", f"/v1/key-sets/main/keys/{key}/jwt", world.signer, {"claims": {"sub": "alice"}, **body})
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json
    return found


def with_jwcrypto(token: str, document: bytes) -> dict[str, Any]:
    """The claims, by a library that knows ML-DSA. Raises InvalidJWSSignature."""
    keys = JWKSet.from_json(document.decode())
    found = JWS()
    found.allowed_algs = list(ML_DSA)
    found.deserialize(token)
    found.verify(keys.get_key(found.jose_header["kid"]))
    claims: dict[str, Any] = json.loads(found.payload)
    return claims


# --- the two documents ------------------------------------------------------------------------------------------------


def test_the_ordinary_document_stays_the_same_to_the_byte(world: World, site: Site) -> None:
    world.create()
    world.standby()
    world.until(lambda: len(site.get(JWKS).kids) == 2)
    before = site.get(JWKS)
    missing = site.get(PQ)
    assert (missing.status, missing.headers["Cache-Control"]) == (404, "no-store")
    assert missing.json["type"] == "urn:kms-jwks:problem:not_published"

    kid = add_key(world).active_kid
    after, post_quantum = site.get(JWKS), site.get(PQ)
    assert after.body == before.body
    assert {n: after.headers[n] for n in ("ETag", "Cache-Control")} == {
        n: before.headers[n] for n in ("ETag", "Cache-Control")
    }
    world.until(lambda: len(site.get(PQ).kids) == 2)
    first = site.get(PQ).json["keys"][0]
    assert first["kid"] == kid == jose.thumbprint(first)
    assert list(first) == ["kty", "use", "alg", "kid", "pub"]
    assert (first["kty"], first["use"], first["alg"]) == ("AKP", "sig", "ML-DSA-65")
    assert post_quantum.status == 200


def test_the_post_quantum_document_is_served_like_the_ordinary_one(world: World, site: Site) -> None:
    world.create(keys=[{"name": "pq", "alg": "ML-DSA-44"}, {"name": "default", "alg": "ES256"}])
    world.until(lambda: len(site.get(PQ).kids) == 2 and len(site.get(JWKS).kids) == 2)
    for path in (JWKS, PQ):
        found = site.get(path)
        assert found.headers["Content-Type"] == "application/json"
        assert found.headers["Vary"] == "Accept"
        assert found.headers["Access-Control-Allow-Origin"] == "*"
        assert found.headers["Cache-Control"] == "public, max-age=300, stale-if-error=3600"
        again = site.get(path, If_None_Match=found.headers["ETag"])
        assert (again.status, again.body) == (304, b"")
        head = site.ask("HEAD", path)
        assert (head.status, head.body, int(head.headers["Content-Length"])) == (200, b"", len(found.body))
        named = site.get(path, Accept="application/jwk-set+json")
        assert named.headers["Content-Type"] == "application/jwk-set+json"
        assert site.ask("OPTIONS", path).status == 204
    assert site.get(JWKS).headers["ETag"] != site.get(PQ).headers["ETag"]


def test_a_restricted_set_restricts_both(world: World, site: Site) -> None:
    world.create(access="restricted", keys=[{"name": "pq", "alg": "ML-DSA-44"}])
    assert site.get(PQ).status == 401
    found = site.get(PQ, world.admin)
    assert (found.status, found.headers["Access-Control-Allow-Origin"]) == (200, None)
    assert found.headers["Cache-Control"].startswith("private")
    assert site.get("/unknown/.well-known/jwks-pq.json").status == 401, "as a restricted set"


def test_the_default_set_has_both_at_the_root(world: World, site: Site) -> None:
    world.create("default", keys=[{"name": "pq", "alg": "ML-DSA-44"}])
    assert site.get("/.well-known/jwks-pq.json").body == site.get("/default/.well-known/jwks-pq.json").body
    assert site.get("/.well-known/jwks.json").status == 404


def test_a_set_of_ml_dsa_keys_alone_has_no_ordinary_document_until_it_has_an_ordinary_key(
    world: World, site: Site
) -> None:
    made = world.create(keys=[{"name": "pq", "alg": "ML-DSA-44"}])
    assert made.keys[0].active_kid is not None
    missing = site.get(JWKS)
    assert (missing.status, missing.headers["Cache-Control"]) == (404, "no-store")
    for path in (JWKS, "/main/.well-known/openid-configuration"):
        problem = json.loads(site.get(path).body)
        assert problem["type"].endswith(":not_published")
        assert "ML-DSA keys alone" in problem["detail"]
        assert "https://keys.example/main/.well-known/jwks-pq.json" in problem["next_step"]
    assert made.jwks_pq_uri == "https://keys.example/main/.well-known/jwks-pq.json"
    # No verifier can have cached a document that was never published, so its first key signs at once.
    kid = add_key(world, "ES256", "default").active_kid
    assert kid is not None
    assert site.get(JWKS).kids[0] == kid


def test_the_first_key_of_a_document_signs_at_once_and_the_next_one_waits(world: World, site: Site) -> None:
    world.create()
    assert add_key(world, name="first").active_kid is not None
    second = add_key(world, name="second")
    assert (second.active_kid, second.versions[0].state) == (None, "published")
    with pytest.raises(errors.NotYetUsable):
        world.service.versions.activate(world.admin, "main", "second", "1")


def test_an_existing_issuers_document_has_no_first_publication(world: World) -> None:
    world.create(existing_issuer=True)
    assert add_key(world).active_kid is None


def test_an_emptied_document_stays(world: World, site: Site) -> None:
    world.create()
    add_key(world, policy=UNSAFE)
    published = {VersionState.ACTIVE, VersionState.PUBLISHED}
    world.until(lambda: {v.state for v in world.versions() if v.alg == "ML-DSA-65"} == published)  # with its standby
    world.service.keys.disable(world.admin, "main", "pq")
    for number in ("1", "2"):
        world.service.revocation.revoke_version(world.admin, "main", "pq", number, wire.RevokeRequest())
    world.until(lambda: site.get(PQ).kids == [])
    assert site.get(PQ).body == b'{"keys":[]}'


def test_an_external_key_is_published_in_the_document_of_its_kind(world: World, site: Site) -> None:
    world.create()
    before = site.get(JWKS).kids
    jwk = jose.public_jwk(mldsa.MLDSA87PrivateKey.generate().public_key())
    request = wire.ExternalKeyCreate(
        kid="theirs", alg="ML-DSA-87", remove_at=to_datetime(later(world.now(), DAY)), jwk=dict(jwk)
    )
    world.service.external_keys.create(world.admin, "main", request)
    assert site.get(PQ).kids == ["theirs"]
    assert "theirs" not in site.get(JWKS).kids
    assert set(before) <= set(site.get(JWKS).kids)


def test_issuer_metadata_names_the_ordinary_document(world: World, site: Site) -> None:
    world.create()
    path = "/main/.well-known/openid-configuration"
    before = site.get(path)
    add_key(world)
    after = site.get(path)
    assert after.body == before.body
    assert after.json["id_token_signing_alg_values_supported"] == ["ES256"]
    world.create("second", keys=[{"name": "pq", "alg": "ML-DSA-44"}])
    assert site.get("/second/.well-known/openid-configuration").status == 404


def test_both_documents_are_kept_for_a_start_without_a_database(world: World, tmp_path: Path) -> None:
    world.create()
    add_key(world)
    snapshot = world.service.sync.snapshot()
    cache = JwksCache(tmp_path / "cache")
    cache.store(snapshot)
    kept = cache.load()["main"]
    now = snapshot.key_sets["main"]
    assert (kept.jwks, kept.jwks_pq, kept.algorithms) == (now.jwks, now.jwks_pq, now.algorithms)
    assert kept.jwks_pq is not None


# --- verifiers --------------------------------------------------------------------------------------------------------


def test_a_verifier_that_rejects_what_it_does_not_know_can_read_the_ordinary_document(world: World, site: Site) -> None:
    world.create()
    add_key(world)
    ordinary, post_quantum = site.get(JWKS).json, site.get(PQ).json
    token = signed(world, site, "default")
    # Authlib rejects a whole set over one AKP key: that is the reason for two documents.
    keys = JsonWebKey.import_key_set(ordinary)
    assert keys.find_by_kid(token["kid"]) is not None
    with pytest.raises(KeyError, match="AKP"):
        JsonWebKey.import_key_set({"keys": [*ordinary["keys"], *post_quantum["keys"]]})
    # PyJWT skips an AKP key, and rejects a set that holds no other key.
    assert [key.key_id for key in jwt.PyJWKSet.from_dict(ordinary).keys] == [k["kid"] for k in ordinary["keys"]]
    with pytest.raises(jwt.PyJWKSetError):
        jwt.PyJWKSet.from_dict(post_quantum)


@pytest.mark.parametrize("alg", ML_DSA)
def test_another_library_verifies_the_tokens(world: World, site: Site, alg: str) -> None:
    world.create()
    kid = add_key(world, alg).active_kid
    token = signed(world, site)
    assert (token["kid"], token["alg"]) == (kid, alg)
    document = site.get(PQ).body
    claims = with_jwcrypto(token["token"], document)
    assert (claims["sub"], claims["iss"]) == ("alice", "https://keys.example/main")
    head, payload, signature = token["token"].split(".")
    forged = "A" if signature[0] != "A" else "B"
    with pytest.raises(InvalidJWSSignature):
        with_jwcrypto(f"{head}.{payload}.{forged}{signature[1:]}", document)


def test_the_service_verifies_tokens_of_both_documents(world: World, site: Site) -> None:
    world.create()
    add_key(world)
    for key in ("default", "pq"):
        token = signed(world, site, key, claims={"sub": "alice", "aud": "shop"})["token"]
        body = {"token": token, "audience": "shop"}
        found = site.ask("POST", "/v1/key-sets/main/verify", world.admin, body)
        assert (found.status, found.json["claims"]["sub"]) == (200, "alice")
        body["token"] = token[:-8] + "AAAAAAAA"
        refused = site.ask("POST", "/v1/key-sets/main/verify", world.admin, body)
        assert (refused.status, refused.json["type"]) == (422, "urn:kms-jwks:problem:token_signature_invalid")


def test_a_signing_input_and_a_batch_are_signed(world: World, site: Site) -> None:
    world.create()
    kid = add_key(world, "ML-DSA-87").active_kid
    assert kid is not None
    pad = "x" * 20_000  # with the signature, far longer than a token of another algorithm
    now = world.now() // 1_000_000
    claims = {"iss": "https://keys.example/main", "iat": now, "exp": now + 60, "pad": pad}
    head = jose.header_segment(alg="ML-DSA-87", kid=kid, typ="JWT")
    text = jose.signing_input(head, json.dumps(claims).encode()).decode()
    path = "/v1/key-sets/main/keys/pq/signature"
    answer = site.ask("POST", path, world.signer, {"signing_input": text, "kid": kid})
    assert answer.status == 200, answer.body
    assert len(jose.b64u_decode(answer.json["signature"])) == 4627
    assert with_jwcrypto(f"{text}.{answer.json['signature']}", site.get(PQ).body)["pad"] == pad
    many = site.ask("POST", "/v1/key-sets/main/keys/pq/jwt", world.signer, {"batch": [{"claims": {}}] * 20})
    tokens = [item["token"] for item in many.json["batch"]]
    assert len({with_jwcrypto(token, site.get(PQ).body)["jti"] for token in tokens}) == 20


def test_bytes_are_signed_in_a_raw_set_and_a_digest_is_not(world: World, site: Site) -> None:
    world.create(purpose="raw", keys=[{"name": "pq", "alg": "ML-DSA-44"}])
    path = "/v1/key-sets/main/keys/pq/signature"
    answer = site.ask("POST", path, world.raw_signer, {"input": jose.b64u_encode(b"bytes")})
    key = site.get(PQ).json["keys"][0]
    public = mldsa.MLDSA44PublicKey.from_public_bytes(jose.b64u_decode(key["pub"]))
    public.verify(jose.b64u_decode(answer.json["signature"]), b"bytes")
    refused = site.ask("POST", path, world.raw_signer, {"digest": jose.b64u_encode(bytes(32))})
    assert (refused.status, refused.json["type"]) == (400, "urn:kms-jwks:problem:invalid_digest")


# --- room and rotation ------------------------------------------------------------------------------------------------


def test_each_document_counts_its_own_kids(world: World) -> None:
    names = ("one", "two", "three", "four")
    keys = [{"name": name, "alg": "ES256"} for name in names]
    world.create(keys=[*keys, *({"name": f"pq-{name}", "alg": "ML-DSA-44"} for name in names)])
    for alg in ("ES256", "ML-DSA-44"):
        with pytest.raises(errors.LimitReached, match="kids"):
            add_key(world, alg, "one-too-many")


def test_keys_of_the_two_documents_rotate_at_the_same_time(world: World) -> None:
    world.create(keys=[{"name": "default", "alg": "ES256"}, {"name": "pq", "alg": "ML-DSA-44"}])
    for key in ("default", "pq"):
        world.until(lambda key=key: len(world.service.keys.get(world.admin, "main", key).versions) == 2)  # type: ignore[misc]
    world.until(lambda: all(v.visible_since for v in world.versions()))
    world.advance(DAY + 1)
    for key in ("default", "pq"):
        world.service.keys.rotate(world.admin, "main", key, wire.RotateRequest())
    assert sorted(v.alg for v in world.versions() if v.state is VersionState.RETIRING) == ["ES256", "ML-DSA-44"]


def test_an_algorithm_that_needs_a_set_of_its_own_shares_it_with_ml_dsa(world: World) -> None:
    world.create(keys=[{"name": "default", "alg": "ES256K"}])
    add_key(world, "ML-DSA-44")
    with pytest.raises(errors.LimitReached, match="ES256"):
        add_key(world, "ES256", "more")
