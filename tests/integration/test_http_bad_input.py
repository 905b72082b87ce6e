"""What bad input gets: a problem with a stable type, nothing changed, nothing signed. One row per case."""
# ruff: noqa: E501 - a case is one line, however long

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.integration.conftest import Answer, Server, fresh


def b64u(data: bytes | str) -> str:
    raw = data.encode() if isinstance(data, str) else data
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@dataclass
class World:
    """The things that the rows speak of."""

    server: Server
    jwt: str
    """A key set with purpose jwt and one key, k1 (ES256)."""
    raw: str
    """The same with purpose raw."""
    eddsa: str
    signer: str
    raw_signer: str
    disabled: str
    """A key set whose one key is disabled."""
    kid: str
    revoked_kid: str

    def signing_input(self, header: dict[str, Any] | None = None, **claims: Any) -> str:
        head = {"alg": "ES256", "kid": self.kid, "typ": "JWT"} | (header or {})
        now = int(time.time())
        body = {"iss": f"{self.server.url}/{self.jwt}", "exp": now + 60} | claims
        return f"{b64u(json.dumps(head))}.{b64u(json.dumps(body))}"


@pytest.fixture(scope="module")
def world(server: Server) -> World:
    jwt = server.key_set(None, "ES256", standby=True)
    raw = server.key_set(None, "ES256", purpose="raw")
    eddsa = server.key_set(None, "EdDSA", purpose="raw")
    disabled = server.key_set(None, "ES256")
    server.must("POST", f"/v1/key-sets/{disabled}/keys/k1/disable")
    revoked = server.must("GET", f"/v1/key-sets/{jwt}/keys/k1")["active_kid"]
    server.must("POST", f"/v1/key-sets/{jwt}/keys/k1/versions/{revoked}/revoke", {"reason": "a drill"})
    kid = server.must("GET", f"/v1/key-sets/{jwt}/keys/k1")["active_kid"]
    return World(server, jwt, raw, eddsa, server.client("signer"), server.client("raw-signer"), disabled, kid, revoked)


Sent = dict[str, Any] | bytes
Row = tuple[str, str, Sent | Callable[[World], Sent], int, str]
NOW = int(time.time())


def deep(depth: int) -> bytes:
    return b'{"claims":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}"


def claims(**members: Any) -> dict[str, Any]:
    return {"claims": members}


# name, route, body, status, problem
JWT_ROWS: tuple[Row, ...] = (
    ("malformed JSON", "jwt", b'{"claims":{}', 400, "malformed_body"),
    ("truncated JSON", "jwt", b'{"claims":{"sub":"al', 400, "malformed_body"),
    ("two values", "jwt", b'{"claims":{}}{"claims":{}}', 400, "malformed_body"),
    ("an array", "jwt", b"[]", 400, "malformed_body"),
    ("a string", "jwt", b'"claims"', 400, "malformed_body"),
    ("deeply nested", "jwt", deep(40), 400, "malformed_body"),
    ("very deeply nested", "jwt", deep(5_000), 400, "malformed_body"),
    ("no UTF-8", "jwt", b'{"claims":{"sub":"\xff"}}', 400, "malformed_body"),
    ("UTF-16", "jwt", '{"claims":{}}'.encode("utf-16"), 400, "malformed_body"),
    ("a duplicate key", "jwt", b'{"claims":{"sub":"a","sub":"b"}}', 400, "malformed_body"),
    ("a duplicate key outside", "jwt", b'{"claims":{},"claims":{}}', 400, "malformed_body"),
    ("NaN", "jwt", b'{"claims":{"a":NaN}}', 400, "malformed_body"),
    ("Infinity", "jwt", b'{"claims":{"a":Infinity}}', 400, "malformed_body"),
    ("-Infinity", "jwt", b'{"claims":{"a":-Infinity}}', 400, "malformed_body"),
    ("an infinity by overflow", "jwt", b'{"claims":{"a":1e999}}', 400, "malformed_body"),
    ("a lone surrogate", "jwt", b'{"claims":{"a":"\\ud800"}}', 400, "malformed_body"),
    ("a lone surrogate as a name", "jwt", b'{"claims":{"\\udfff":1}}', 400, "malformed_body"),
    ("over-long", "jwt", claims(a="x" * 65_536), 413, "body_too_large"),
    ("an empty body", "jwt", b"", 400, "malformed_body"),
    ("an unknown field", "jwt", claims() | {"audience": "x"}, 400, "invalid_field"),
    ("no claims", "jwt", {}, 400, "invalid_field"),
    ("claims that are no object", "jwt", {"claims": []}, 400, "invalid_field"),
    ("claims that are null", "jwt", {"claims": None}, 400, "invalid_field"),
    ("claims that are a string", "jwt", {"claims": "{}"}, 400, "invalid_field"),
    ("expires_in of a wrong type", "jwt", claims() | {"expires_in": "60"}, 400, "invalid_field"),
    ("expires_in that is true", "jwt", claims() | {"expires_in": True}, 400, "invalid_field"),
    ("expires_in of 0", "jwt", claims() | {"expires_in": 0}, 400, "invalid_field"),
    ("expires_in beyond the limit", "jwt", claims() | {"expires_in": 3601}, 400, "claims_refused"),
    ("an unknown profile", "jwt", claims() | {"profile": "other"}, 400, "invalid_field"),
    ("alg given by the caller", "jwt", claims() | {"alg": "none"}, 400, "invalid_field"),
    ("kid given by the caller", "jwt", claims() | {"kid": "mine"}, 400, "invalid_field"),
    ("a header given by the caller", "jwt", claims() | {"header": {"jku": "https://e"}}, 400, "invalid_field"),
    ("exp in the past", "jwt", claims(exp=NOW - 10), 400, "claims_refused"),
    ("exp beyond the limit", "jwt", claims(exp=NOW + 90_000), 400, "claims_refused"),
    ("exp that is no integer", "jwt", claims(exp=NOW + 60.5), 400, "claims_refused"),
    ("exp that is a string", "jwt", claims(exp=str(NOW + 60)), 400, "claims_refused"),
    ("exp that is true", "jwt", claims(exp=True), 400, "claims_refused"),
    ("exp that is null", "jwt", claims(exp=None), 400, "claims_refused"),
    ("exp beside expires_in", "jwt", claims(exp=NOW + 60) | {"expires_in": 60}, 400, "claims_refused"),
    ("another iss", "jwt", claims(iss="https://evil.example"), 400, "claims_refused"),
    ("iss that is no string", "jwt", claims(iss=["x"]), 400, "claims_refused"),
    ("iat far away", "jwt", claims(iat=NOW - 3600), 400, "claims_refused"),
    ("nbf after exp", "jwt", claims(nbf=NOW + 3000), 400, "claims_refused"),
    ("jti too long", "jwt", claims(jti="x" * 256), 400, "claims_refused"),
    ("jti that is a number", "jwt", claims(jti=7), 400, "claims_refused"),
    ("aud that is a number", "jwt", claims(aud=7), 400, "claims_refused"),
    ("aud that is empty", "jwt", claims(aud=[]), 400, "claims_refused"),
    ("aud with a number", "jwt", claims(aud=["x", 7]), 400, "claims_refused"),
    ("an integer beyond 2^53", "jwt", claims(n=2**53 + 1), 400, "claims_refused"),
    ("a deep integer beyond -2^53", "jwt", claims(a=[{"n": -(2**53) - 1}]), 400, "claims_refused"),
    ("exp in capitals", "jwt", claims(EXP=32_503_680_000) | {"expires_in": 5}, 400, "claims_refused"),
    ("iss with a long s", "jwt", {"claims": {"I\u017fS": "https://evil.example"}}, 400, "claims_refused"),
    ("exp and a NUL", "jwt", {"claims": {"exp\0": 32_503_680_000}}, 400, "claims_refused"),
    ("exp in capitals in the input", "signature", lambda w: pinned(w, w.signing_input(EXP=1)), 400, "signing_input_refused"),
    ("alg in capitals in the header", "signature", lambda w: pinned(w, w.signing_input({"ALG": "none"})), 400, "signing_input_refused"),
    ("more structure than is read", "jwt", b'{"claims":{"a":[' + b",".join([b"1"] * 20_000) + b"]}}", 400, "malformed_body"),
    ("no signing input", "signature", {"kid": "x"}, 400, "invalid_field"),
    ("no kid", "signature", lambda w: {"signing_input": w.signing_input()}, 400, "invalid_field"),
    ("one segment", "signature", lambda w: {"signing_input": "abc", "kid": w.kid}, 400, "signing_input_refused"),
    ("three segments", "signature", lambda w: pinned(w, w.signing_input() + ".x"), 400, "signing_input_refused"),
    ("padding", "signature", lambda w: pinned(w, w.signing_input() + "="), 400, "signing_input_refused"),
    ("the wrong alphabet", "signature", lambda w: pinned(w, "+/+/." + b64u("{}")), 400, "signing_input_refused"),
    ("a header with alg none", "signature", lambda w: pinned(w, w.signing_input({"alg": "none"})), 400, "signing_input_refused"),
    ("a header with another kid", "signature", lambda w: pinned(w, w.signing_input({"kid": "x"})), 400, "signing_input_refused"),
    ("a header with another typ", "signature", lambda w: pinned(w, w.signing_input({"typ": "at+jwt"})), 400, "signing_input_refused"),
    ("a header with jku", "signature", lambda w: pinned(w, w.signing_input({"jku": "x"})), 400, "signing_input_refused"),
    ("a header with crit", "signature", lambda w: pinned(w, w.signing_input({"crit": ["x"]})), 400, "signing_input_refused"),
    ("another iss in the input", "signature", lambda w: pinned(w, w.signing_input(iss="x")), 400, "signing_input_refused"),
    ("an old exp in the input", "signature", lambda w: pinned(w, w.signing_input(exp=1)), 400, "signing_input_refused"),
    ("a far exp in the input", "signature", lambda w: pinned(w, w.signing_input(exp=NOW + 90_000)), 400, "signing_input_refused"),
    ("claims that are an array", "signature", lambda w: pinned(w, w.signing_input().partition(".")[0] + "." + b64u("[]")), 400, "signing_input_refused"),
    ("a duplicate claim", "signature", lambda w: pinned(w, w.signing_input().partition(".")[0] + "." + b64u('{"exp":1,"exp":2}')), 400, "signing_input_refused"),
    ("an unknown kid", "signature", lambda w: {"signing_input": w.signing_input(), "kid": "nobody"}, 409, "kid_not_active"),
    ("a revoked kid", "signature", lambda w: {"signing_input": w.signing_input(), "kid": w.revoked_kid}, 409, "kid_not_active"),
    ("raw input in a jwt set", "signature", {"input": "YQ"}, 400, "invalid_field"),
    ("jws in a jwt set", "jws", {"payload": "YQ"}, 403, "forbidden"),
)  # fmt: skip
RAW_ROWS: tuple[Row, ...] = (
    ("a padded payload", "jws", {"payload": "YQ=="}, 400, "invalid_payload"),
    ("a payload in the wrong alphabet", "jws", {"payload": "+/+/"}, 400, "invalid_payload"),
    ("a payload with a space", "jws", {"payload": "YW Fh"}, 400, "invalid_payload"),
    ("a payload of impossible length", "jws", {"payload": "YWFhY"}, 400, "invalid_payload"),
    ("a payload with trailing bits", "jws", {"payload": "YR"}, 400, "invalid_payload"),
    ("a payload that is no string", "jws", {"payload": 1}, 400, "invalid_field"),
    ("detached that is no boolean", "jws", {"payload": "YQ", "detached": "yes"}, 400, "invalid_field"),
    ("alg for a jws", "jws", {"payload": "YQ", "alg": "none"}, 400, "invalid_field"),
    ("a header for a jws", "jws", {"payload": "YQ", "header": {}}, 400, "invalid_field"),
    ("an empty typ", "jws", {"payload": "YQ", "typ": ""}, 400, "invalid_field"),
    ("a digest of the wrong length", "signature", {"digest": b64u(b"x" * 31)}, 400, "invalid_digest"),
    ("a digest for another hash", "signature", {"digest": b64u(hashlib.sha512(b"").digest())}, 400, "invalid_digest"),
    ("a padded digest", "signature", {"digest": b64u(b"x" * 32) + "="}, 400, "invalid_payload"),
    ("a padded input", "signature", {"input": "YQ=="}, 400, "invalid_payload"),
    ("input and digest", "signature", {"input": "YQ", "digest": b64u(b"x" * 32)}, 400, "invalid_field"),
    ("neither input nor digest", "signature", {}, 400, "invalid_field"),
    ("a signing input in a raw set", "signature", {"signing_input": "a.b", "kid": "x"}, 400, "invalid_field"),
    ("an unknown kid", "signature", {"input": "YQ", "kid": "nobody"}, 409, "kid_not_active"),
)


def pinned(world: World, signing_input: str) -> dict[str, Any]:
    return {"signing_input": signing_input, "kid": world.kid}


def send(world: World, key_set: str, row: Row, token: str) -> Answer:
    _, route, sent, _, _ = row
    body = sent(world) if callable(sent) else sent
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return world.server.call("POST", f"/v1/key-sets/{key_set}/keys/k1/{route}", body=raw, token=token)


class Signed:
    """How many signatures the workers have answered, by their log."""

    def __init__(self, server: Server, key_set: str) -> None:
        self._server, self._path = server, f"/v1/key-sets/{key_set}/"

    def count(self) -> int:
        lines = [json.loads(line) for line in self._server.log.splitlines() if '"request"' in line]
        return sum(
            line["path"].startswith(self._path)
            and line["status"] == 200
            and line["path"].endswith(("jwt", "jws", "ure"))
            for line in lines
            if line.get("path")
        )


@pytest.mark.parametrize("row", JWT_ROWS, ids=lambda row: row[0])
def test_signing_in_a_jwt_set(world: World, row: Row) -> None:
    answer = send(world, world.jwt, row, world.signer)
    assert (answer.status, answer.problem) == row[3:], answer.body


@pytest.mark.parametrize("row", RAW_ROWS, ids=lambda row: row[0])
def test_signing_in_a_raw_set(world: World, row: Row) -> None:
    answer = send(world, world.raw, row, world.raw_signer)
    assert (answer.status, answer.problem) == row[3:], answer.body


def test_nothing_was_signed_by_any_of_these(world: World) -> None:
    assert Signed(world.server, world.jwt).count() == 0
    assert Signed(world.server, world.raw).count() == 0


def test_the_same_routes_sign_what_is_right(world: World) -> None:
    """The positive beside the negatives: the refusals above were not for some other reason."""
    post, s = world.server.must, f"/v1/key-sets/{world.jwt}/keys/k1"
    assert post("POST", f"{s}/jwt", {"claims": {"sub": "a"}}, token=world.signer)["kid"] == world.kid
    assert post("POST", f"{s}/signature", pinned(world, world.signing_input()), token=world.signer)["alg"] == "ES256"
    r = f"/v1/key-sets/{world.raw}/keys/k1"
    assert post("POST", f"{r}/jws", {"payload": "YQ"}, token=world.raw_signer)["jws"].count(".") == 2
    assert post("POST", f"{r}/signature", {"digest": b64u(b"x" * 32)}, token=world.raw_signer)["signature"]


def test_a_digest_for_a_key_that_signs_messages(world: World) -> None:
    path = f"/v1/key-sets/{world.eddsa}/keys/k1/signature"
    answer = world.server.call("POST", path, {"digest": b64u(b"x" * 32)}, token=world.raw_signer)
    assert (answer.status, answer.problem) == (400, "invalid_digest")


# --- states and purposes ----------------------------------------------------------------------------------------------


def test_a_disabled_key(world: World) -> None:
    answer = world.server.call("POST", f"/v1/key-sets/{world.disabled}/keys/k1/jwt", {"claims": {}}, token=world.signer)
    assert (answer.status, answer.problem) == (409, "key_disabled")


def test_a_purpose_that_does_not_allow_the_route(world: World) -> None:
    everything = world.server.client("signer", key_set=world.raw)
    answer = world.server.call("POST", f"/v1/key-sets/{world.raw}/keys/k1/jwt", {"claims": {}}, token=everything)
    assert (answer.status, answer.problem) == (409, "purpose_mismatch")
    raw = world.server.client("raw-signer", key_set=world.jwt)
    answer = world.server.call("POST", f"/v1/key-sets/{world.jwt}/keys/k1/jws", {"payload": "YQ"}, token=raw)
    assert (answer.status, answer.problem) == (409, "purpose_mismatch")


def test_a_version_that_is_not_yet_active_is_not_activated_early(server: Server, world: World) -> None:
    path = f"/v1/key-sets/{server.key_set(None, 'ES256', standby=True)}/keys/k1"
    before = server.must("GET", path)
    answer = server.call("POST", f"{path}/rotate")
    assert (answer.status, answer.problem) == (409, "not_yet_usable")
    (standby,) = (v for v in before["versions"] if v["state"] == "published")
    assert answer.json["usable_at"] == standby["usable_at"]
    answer = server.call("POST", f"{path}/versions/{standby['kid']}/activate")
    assert (answer.status, answer.problem) == (409, "not_yet_usable")
    assert server.must("GET", path) == before


def test_a_revoked_version_is_never_activated(world: World) -> None:
    path = f"/v1/key-sets/{world.jwt}/keys/k1/versions/{world.revoked_kid}/activate"
    answer = world.server.call("POST", path)
    assert (answer.status, answer.problem) == (409, "transition_refused")


# --- unknown things, names, callers -----------------------------------------------------------------------------------

UNKNOWN: tuple[tuple[str, str, Any, str], ...] = (
    ("POST", "/v1/key-sets/nobody/keys/k1/jwt", {"claims": {}}, "key_set_not_found"),
    ("POST", "/v1/key-sets/{jwt}/keys/nobody/jwt", {"claims": {}}, "key_not_found"),
    ("GET", "/v1/key-sets/nobody", None, "key_set_not_found"),
    ("GET", "/v1/key-sets/{jwt}/keys/nobody", None, "key_not_found"),
    ("GET", "/v1/key-sets/{jwt}/keys/k1/versions/99", None, "version_not_found"),
    ("GET", "/v1/key-sets/{jwt}/keys/k1/versions/nobody", None, "version_not_found"),
    ("POST", "/v1/key-sets/{jwt}/keys/k1/versions/99/revoke", None, "version_not_found"),
    ("GET", "/v1/key-sets/{jwt}/external-keys/nobody", None, "external_key_not_found"),
    ("DELETE", "/v1/clients/nobody", None, "client_not_found"),
    ("DELETE", "/v1/grants/nobody", None, "grant_not_found"),
    ("DELETE", "/v1/nodes/nobody", None, "worker_not_found"),
    ("GET", "/v1/backends/nobody", None, "backend_not_found"),
    ("GET", "/nobody/.well-known/jwks.json", None, "key_set_not_found"),
    ("GET", "/v1/nothing", None, "route_not_found"),
    ("GET", "/v1/key-sets/{jwt}/keys/A%20b", None, "key_not_found"),
    ("GET", "/v1/key-sets/..%2f..%2fetc", None, "route_not_found"),
    ("GET", "/v1/key-sets/%00", None, "route_not_found"),
    ("GET", "/v1/key-sets/%ff", None, "key_set_not_found"),
)


@pytest.mark.parametrize(("method", "path", "payload", "code"), UNKNOWN)
def test_unknown_things(world: World, method: str, path: str, payload: Any, code: str) -> None:
    token = world.signer if path.endswith("/jwt") else "admin"
    answer = world.server.call(method, path.format(jwt=world.jwt), payload, token=token)
    assert (answer.status, answer.problem) == (404, code)


@pytest.mark.parametrize(
    "name", ["", "A", "-a", "a_b", "a" * 64, "a/b", "ä", "a b", "a.b", "a\n", "v1", "keys", "jwt", "../a", 7, None]
)
@pytest.mark.parametrize("what", ["key set", "key", "client"])
def test_names_outside_the_grammar(world: World, what: str, name: object) -> None:
    path, payload = {
        "key set": ("/v1/key-sets", {"name": name}),
        "key": (f"/v1/key-sets/{world.disabled}/keys", {"name": name, "alg": "ES256"}),
        "client": ("/v1/clients", {"name": name}),
    }[what]
    answer = world.server.call("POST", path, payload)
    assert (answer.status, answer.problem) == (400, "invalid_field")
    assert answer.json["field"] == "name"


def test_names_are_taken_for_ever(server: Server) -> None:
    name = fresh("gone")
    server.must("POST", "/v1/clients", {"name": name})
    server.must("DELETE", f"/v1/clients/{name}")
    answer = server.call("POST", "/v1/clients", {"name": name})
    assert (answer.status, answer.problem) == (409, "name_taken")


@pytest.mark.parametrize(
    ("authorization", "code"),
    [
        (None, "credentials_missing"),
        ("", "credentials_missing"),
        ("Basic YTpi", "credentials_malformed"),
        ("Bearer", "credentials_malformed"),
        ("Bearer x", "credentials_malformed"),
        ("Bearer kj_short", "credentials_malformed"),
        ("Bearer kj_" + "a" * 49, "credentials_malformed"),
        ("Bearer eyJhbGciOiJub25lIn0.e30.", "credentials_malformed"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/key-sets/default/keys/default/jwt", "/v1/clients"])
def test_bad_credentials(server: Server, path: str, authorization: str | None, code: str) -> None:
    headers = {"Authorization": authorization} if authorization is not None else {}
    answer = server.call("POST", path, right_payload(path), token=None, headers=headers)
    assert (answer.status, answer.problem) == (401, code)
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    if authorization and authorization.startswith("Bearer kj_"):
        assert authorization.removeprefix("Bearer ") not in answer.body.decode()


def right_payload(path: str) -> dict[str, Any]:
    return {"claims": {}} if path.endswith("jwt") else {"name": fresh("never")}


def unknown_token() -> str:
    from kms_jwks.authn import new_token

    return new_token().token


def test_a_token_that_was_never_issued(server: Server) -> None:
    for path in ("/v1/key-sets/default/keys/default/jwt", "/v1/clients"):
        answer = server.call("POST", path, right_payload(path), token=unknown_token())
        assert (answer.status, answer.problem) == (401, "credentials_unknown")


def test_a_token_that_was_revoked(server: Server) -> None:
    name = fresh("client")
    server.must("POST", "/v1/clients", {"name": name})
    server.must("POST", "/v1/grants", {"client": name, "role": "signer", "scope": {}})
    made = server.must("POST", f"/v1/clients/{name}/tokens", {})
    path = "/v1/key-sets/default/keys/default/jwt"
    assert server.call("POST", path, {"claims": {}}, token=made["token"]).status == 200
    server.must("DELETE", f"/v1/clients/{name}/tokens/{made['id']}")
    for _ in range(8):
        answer = server.call("POST", path, {"claims": {}}, token=made["token"])
        assert (answer.status, answer.problem) == (401, "credentials_revoked")


# --- HTTP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jwt"])
def test_a_wrong_media_type(world: World, content_type: str | None) -> None:
    path = f"/v1/key-sets/{world.jwt}/keys/k1/jwt"
    headers = {"Content-Type": content_type} if content_type else {}
    answer = world.server.call(
        "POST", path, body=b'{"claims":{}}', token=world.signer, headers=headers, content_type=None
    )
    assert (answer.status, answer.problem) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/v1/key-sets", "GET, HEAD, POST"),
        ("GET", "/v1/key-sets/default/keys/default/jwt", "POST"),
        ("POST", "/default/.well-known/jwks.json", "GET, HEAD, OPTIONS"),
        ("DELETE", "/healthz", "GET, HEAD"),
        ("TRACE", "/healthz", "GET, HEAD"),
    ],
)
def test_a_wrong_method(server: Server, method: str, path: str, allow: str) -> None:
    answer = server.call(method, path)
    assert (answer.status, answer.problem) == (405, "method_not_allowed")
    assert answer.headers["Allow"] == allow


def http(world: World, head: str, body: bytes = b"", path: str | None = None) -> bytes:
    path = path or f"/v1/key-sets/{world.jwt}/keys/k1/jwt"
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {world.signer}\r\n"
        f"Content-Type: application/json\r\nConnection: close\r\n{head}\r\n"
    ).encode() + body


def parsed(raw: bytes) -> Answer:
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return Answer(int(status.split()[1]), headers, body)


GOOD = b'{"claims":{"sub":"a"}}'


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


RAW_HTTP = (
    ("no length", "", b"", 411, "length_mismatch"),
    ("a length that says more", "Content-Length: 100\r\n", GOOD, 400, "length_mismatch"),
    ("a length that is no number", "Content-Length: ten\r\n", GOOD, 400, "length_mismatch"),
    ("a negative length", "Content-Length: -1\r\n", GOOD, 400, "length_mismatch"),
    ("two lengths", "Content-Length: 22\r\nContent-Length: 21\r\n", GOOD, 400, "length_mismatch"),
    ("a length and chunks", "Content-Length: 22\r\nTransfer-Encoding: chunked\r\n", chunked(GOOD), 400, "length_mismatch"),
    ("a length that says too much", "Content-Length: 9999999999\r\n", b"", 413, "body_too_large"),
    ("chunks that break off", "Transfer-Encoding: chunked\r\n", b"100\r\nabc", 400, "length_mismatch"),
    ("chunks without an end", "Transfer-Encoding: chunked\r\n", b"%x\r\n%s\r\n" % (len(GOOD), GOOD), 400, "length_mismatch"),
    ("a chunk size that is no number", "Transfer-Encoding: chunked\r\n", b"zz\r\n" + GOOD, 400, "length_mismatch"),
    ("too many chunks", "Transfer-Encoding: chunked\r\n", chunked(*[b" " * 65_536] * 20), 413, "body_too_large"),
    ("too large in chunks", "Transfer-Encoding: chunked\r\n", chunked(b'{"claims":{"a":"', b"x" * 65_536, b'"}}'), 413, "body_too_large"),
    ("an unknown coding", "Transfer-Encoding: rot13\r\n", GOOD, 501, "invalid_request"),
    ("gzip", "Transfer-Encoding: gzip\r\n", GOOD, 400, "length_mismatch"),
    ("a header with an underscore", "X_Forwarded_For: 1\r\nContent-Length: 0\r\n", b"", 400, "invalid_request"),
    ("a folded header", "X-A: 1\r\n 2\r\nContent-Length: 0\r\n", b"", 400, "invalid_request"),
    ("a header that is too large", f"X-A: {'x' * 9000}\r\nContent-Length: 0\r\n", b"", 431, "invalid_request"),
    ("too many headers", "X-A: 1\r\n" * 70, b"", 431, "invalid_request"),
    ("gzip before chunked", "Transfer-Encoding: gzip, chunked\r\n", chunked(GOOD), 501, "invalid_request"),
    ("identity before chunked", "Transfer-Encoding: identity, chunked\r\n", chunked(GOOD), 501, "invalid_request"),
    ("gzip in a header of its own", "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n", chunked(GOOD), 501, "invalid_request"),
    ("chunked twice", "Transfer-Encoding: chunked, chunked\r\n", chunked(GOOD), 400, "length_mismatch"),
    ("TE that lists chunked", f"TE: gzip, chunked\r\nContent-Length: {len(GOOD)}\r\n", GOOD, 400, "invalid_request"),
    ("two hosts", "Host: y\r\nContent-Length: 0\r\n", b"", 400, "invalid_request"),
    ("another expectation", "Expect: 42\r\nContent-Length: 0\r\n", b"", 417, "invalid_request"),
)  # fmt: skip


@pytest.mark.parametrize(("head", "body", "status", "code"), [r[1:] for r in RAW_HTTP], ids=[r[0] for r in RAW_HTTP])
def test_broken_http(world: World, head: str, body: bytes, status: int, code: str) -> None:
    answer = parsed(world.server.raw(http(world, head, body), half_close=True))
    assert (answer.status, answer.problem) == (status, code)


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET / HTTP/9.9", 400),
        ("get / HTTP/1.1", 400),
        ("GET", 400),
        (f"GET /{'x' * 9000} HTTP/1.1", 414),
        ("GET /healthz#a HTTP/1.1", 400),
        ("GET /healthz?a#b HTTP/1.1", 400),
    ],
)
def test_a_broken_request_line(server: Server, request_line: str, status: int) -> None:
    answer = parsed(server.raw(f"{request_line}\r\nHost: x\r\n\r\n".encode()))
    assert (answer.status, answer.problem) == (status, "invalid_request")


@pytest.mark.parametrize(
    ("version", "host", "status"),
    [
        ("1.1", "Host: x\r\n", 200),
        ("1.1", "Host: [::1]:8080\r\n", 200),
        ("1.1", "Host:\r\n", 200),
        ("1.1", "", 400),
        ("1.1", "Host: a b\r\n", 400),
        ("1.1", "Host: a/b\r\n", 400),
        ("1.1", "Host: user@a\r\n", 400),
        ("1.1", "Host: a:80:80\r\n", 400),
        ("1.1", "Host: a\r\nHost: a\r\n", 400),
        ("1.0", "", 200),
        ("1.0", "Host: a b\r\n", 400),
    ],
)
def test_the_host_header(server: Server, version: str, host: str, status: int) -> None:
    """RFC 9112 §3.2: HTTP/1.1 has one, and only one that is well-formed."""
    answer = parsed(server.raw(f"GET /healthz HTTP/{version}\r\n{host}Connection: close\r\n\r\n".encode()))
    assert answer.status == status
    assert status == 200 or answer.problem == "invalid_request"


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/v1/clients", 200),
        ("http://elsewhere.example/v1/clients", 200),
        ("//v1/clients", 404),
        ("/v1%2fclients", 404),
        ("/%761/clients", 404),
        ("/v1/clients/", 404),
        ("http:///v1/clients", 404),
        ("v1/clients?limit=://", 404),
        ("v1/key-sets/default/external-keys/https://a", 404),
        ("/x/../v1/clients", 404),
        ("/default%2f.well-known%2fjwks.json", 404),
        ("/v1/key-sets/defaul%74", 404),
        ("/v1/clients?nonsense=1", 400),
    ],
)
def test_a_route_has_one_spelling(server: Server, target: str, status: int) -> None:
    head = f"GET {target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.admin}\r\nConnection: close\r\n\r\n"
    answer = parsed(server.raw(head.encode()))
    assert answer.status == status
    assert status == 200 or answer.problem == {404: "route_not_found", 400: "invalid_field"}[status]


def test_a_head_that_breaks_off(server: Server) -> None:
    answer = parsed(server.raw(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A", half_close=True))
    assert (answer.status, answer.problem) == (400, "invalid_request")
    assert "head" in answer.json["detail"]


def test_what_is_refused_before_any_route_is_counted_and_logged_with_peer_and_reason(server: Server) -> None:
    ids = [parsed(server.raw(b"GET /healthz HTTP/1.1\r\n\r\n")).json["request_id"] for _ in range(2)]
    lines = [json.loads(line) for line in server.log.splitlines() if '"request_refused"' in line]
    for line in (line for line in lines if line["request_id"] in ids):
        assert (line["peer"], line["reason"], line["code"]) == ("127.0.0.1", "InvalidHeader", "invalid_request")
        assert line["count"] >= 1
    assert {line["request_id"] for line in lines} >= set(ids)


def test_a_connection_with_an_unread_body_is_said_to_end(world: World) -> None:
    answer = parsed(
        world.server.raw(http(world, "Content-Length: 99999999\r\n").replace(b"Connection: close\r\n", b""))
    )
    assert (answer.status, answer.headers["Connection"]) == (413, "close")


def test_nothing_that_was_sent_is_in_the_log(world: World) -> None:
    world.server.raw(http(world, f"Bad Header {world.signer}: x\r\n"))
    assert world.signer not in world.server.log
    assert world.server.admin not in world.server.log


def test_chunks_within_the_limits_are_read(world: World) -> None:
    answer = parsed(world.server.raw(http(world, "Transfer-Encoding: chunked\r\n", chunked(GOOD[:5], GOOD[5:]))))
    assert answer.status == 200


def test_a_body_that_never_comes_gets_its_answer(world: World) -> None:
    """A caller that stops sending holds a thread for request_timeout and no longer."""
    started = time.monotonic()
    answer = parsed(world.server.raw(http(world, "Content-Length: 22\r\n", GOOD[:5])))
    assert (answer.status, answer.problem) == (400, "length_mismatch")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("head", [b"POST /healthz HTTP/1.1\r\nX-A: ", None], ids=["in the head", "in the body"])
def test_a_request_that_comes_drop_by_drop(world: World, head: bytes | None) -> None:
    started = time.monotonic()
    received = b""
    with socket.create_connection(("127.0.0.1", world.server.port), timeout=15) as connection:
        connection.sendall(head or http(world, "Content-Length: 1000\r\n"))
        with contextlib.suppress(ConnectionError):
            while not select.select([connection], [], [], 0.2)[0]:
                connection.sendall(b"x")
                assert time.monotonic() - started < 10, "it may hold its thread for ever"
            while part := connection.recv(65_536):
                received += part
    answer = parsed(received)
    assert (answer.status, answer.problem) == ((400, "length_mismatch") if head is None else (408, "invalid_request"))


def test_an_answer_that_takes_longer_does_not_spoil_the_connection(server: Server) -> None:
    """request_timeout (3 s here) is for the request, not for the answer: the custodian, stopped, holds this one up."""
    custodian = server.children()["custodian"]
    custodian.suspend()
    threading.Timer(4, custodian.resume).start()
    started = time.monotonic()
    assert (
        server.call("POST", "/v1/key-sets", {"name": fresh("slow"), "keys": [{"name": "k", "alg": "ES256"}]}).status
        == 201
    )
    assert time.monotonic() - started > 3
    for _ in range(3):
        assert server.call("POST", "/v1/clients", {"name": fresh("next")}).status == 201


@pytest.mark.parametrize("size", [70_000, 300_000, 1_500_000])
def test_a_refusal_reaches_the_sender_of_a_large_body(world: World, size: int) -> None:
    """A connection that is reset before its answer was read would lose it."""
    answer = parsed(world.server.raw(http(world, f"Content-Length: {size}\r\n", b"x" * size)))
    assert (answer.status, answer.problem) == ((413, "body_too_large") if size > 1_048_576 else (400, "malformed_body"))


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "status", "code"),
    [
        ({"batch": []}, 400, "invalid_batch"),
        ({"batch": [{"claims": {}}] * 257}, 400, "invalid_batch"),
        ({"batch": {}}, 400, "invalid_batch"),
        ({"batch": [{"claims": {}}], "claims": {}}, 400, "invalid_field"),
        ({"batch": [{"claims": {"a": "x" * 1_048_576}}]}, 413, "body_too_large"),
    ],
    ids=["empty", "over-long", "no list", "not alone", "too large"],
)
def test_bad_batches(world: World, payload: Any, status: int, code: str) -> None:
    answer = world.server.call("POST", f"/v1/key-sets/{world.jwt}/keys/k1/jwt", payload, token=world.signer)
    assert (answer.status, answer.problem) == (status, code)


def test_a_batch_that_is_half_bad_is_half_answered(world: World) -> None:
    items: list[Any] = [
        {"claims": {"sub": "a"}},
        {"claims": {"exp": 1}},
        {"claims": {}, "alg": "none"},
        7,
        {"claims": {"big": "x" * 70_000}},
    ]
    answer = world.server.call("POST", f"/v1/key-sets/{world.jwt}/keys/k1/jwt", {"batch": items}, token=world.signer)
    assert answer.status == 200
    found = answer.json["batch"]
    assert [("token" in item) for item in found] == [True, False, False, False, True]
    problems = [item["error"]["type"].rpartition(":")[2] for item in found if "error" in item]
    assert problems == ["claims_refused", "invalid_field", "invalid_field"]
    assert {item["error"]["request_id"] for item in found if "error" in item} == {answer.headers["X-Request-Id"]}


def test_a_whole_batch_is_answered(world: World) -> None:
    items = [{"claims": {"n": n, "pad": "x" * 1000}} for n in range(256)]
    answer = world.server.must("POST", f"/v1/key-sets/{world.jwt}/keys/k1/jwt", {"batch": items}, token=world.signer)
    assert len({item["token"] for item in answer["batch"]}) == 256


# --- the control plane ------------------------------------------------------------------------------------------------


@pytest.fixture
def unchanged(server: Server) -> Iterator[None]:
    before = server.revision_of_everything()
    yield
    assert server.revision_of_everything() == before


JWK = {"kty": "EC", "crv": "P-256", "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
       "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}  # fmt: skip
LATER = "2099-01-01T00:00:00Z"

CONTROL: tuple[tuple[str, str, str, Any, int, str], ...] = (
    ("a field too much", "POST", "/v1/clients", {"name": "x", "admin": True}, 400, "invalid_field"),
    ("a wrong type", "POST", "/v1/key-sets", {"name": "x", "cache_lifetime": "300"}, 400, "invalid_field"),
    ("null", "POST", "/v1/key-sets", {"name": "x", "issuer": None}, 400, "invalid_field"),
    ("a cache lifetime out of range", "POST", "/v1/key-sets", {"name": "x", "cache_lifetime": 1}, 400, "invalid_field"),
    ("an issuer that is no URL", "POST", "/v1/key-sets", {"name": "x", "issuer": "me"}, 400, "invalid_field"),
    ("an issuer in another spelling", "POST", "/v1/key-sets", {"name": "x", "issuer": "HTTPS://login.example.com:443//a"}, 400, "invalid_field"),
    ("an issuer with letters that look alike", "POST", "/v1/key-sets", {"name": "x", "issuer": "https://xn--pple-43d.com"}, 400, "invalid_field"),
    ("another set's issuer and a slash", "POST", "/v1/key-sets", {"name": "x", "issuer": "{url}/{jwt}/"}, 400, "invalid_field"),
    ("the default issuer of a set that is not there", "POST", "/v1/key-sets", {"name": "x", "issuer": "{url}/not-there"}, 400, "invalid_field"),
    ("an unknown access", "POST", "/v1/key-sets", {"name": "x", "access": "secret"}, 400, "invalid_field"),
    ("a name twice", "POST", "/v1/key-sets", {"name": "default"}, 409, "name_taken"),
    ("an unknown alg", "POST", "/v1/key-sets/{jwt}/keys", {"name": "n", "alg": "HS256"}, 400, "unsupported_algorithm_requested"),
    ("alg none", "POST", "/v1/key-sets/{jwt}/keys", {"name": "n", "alg": "none"}, 400, "unsupported_algorithm_requested"),
    ("rsa_bits of an EC key", "POST", "/v1/key-sets/{jwt}/keys", {"name": "n", "alg": "ES256", "rsa_bits": 2048}, 400, "invalid_field"),
    ("a short RSA key", "POST", "/v1/key-sets/{jwt}/keys", {"name": "n", "alg": "RS256", "rsa_bits": 1024}, 400, "invalid_field"),
    ("an unknown backend", "POST", "/v1/key-sets/{jwt}/keys", {"name": "n", "alg": "ES256", "backend": "x"}, 404, "backend_not_found"),
    ("a policy that breaks the rules", "POST", "/v1/key-sets/{jwt}/keys", {"name": "n", "alg": "ES256", "policy": {"publish_lead": 1}}, 400, "policy_refused"),
    ("ES256K in a shared set", "POST", "/v1/key-sets/{jwt}/keys", {"name": "n", "alg": "ES256K"}, 409, "limit_reached"),
    ("ES256K beside others from the start", "POST", "/v1/key-sets", {"name": "x", "keys": [{"name": "a", "alg": "ES256"}, {"name": "b", "alg": "ES256K"}]}, 409, "limit_reached"),
    ("a fifth key", "POST", "/v1/key-sets", {"name": "x", "keys": [{"name": f"k{n}", "alg": "ES256"} for n in range(5)]}, 409, "limit_reached"),
    ("a patch without If-Match", "PATCH", "/v1/key-sets/{jwt}", {"cache_lifetime": 60}, 428, "revision_required"),
    ("a changed issuer", "PATCH", "/v1/key-sets/{jwt}", {"issuer": "https://other.example"}, 409, "immutable"),
    ("a stale If-Match", "PATCH", "/v1/key-sets/{jwt}", {"cache_lifetime": 60}, 412, "revision_mismatch"),
    ("a stale If-Match of a key", "PATCH", "/v1/key-sets/{jwt}/keys/k1", {"profile": {"typ": "at+jwt"}}, 412, "revision_mismatch"),
    ("a purpose that changes", "PATCH", "/v1/key-sets/{jwt}", {"purpose": "raw"}, 400, "invalid_field"),
    ("rotate from another kid", "POST", "/v1/key-sets/{jwt}/keys/k1/rotate", {"expected_kid": "x"}, 409, "active_kid_mismatch"),
    ("destroy what still signs", "POST", "/v1/key-sets/{jwt}/keys/k1/versions/{kid}/destroy", {}, 409, "transition_refused"),
    ("a private JWK", "POST", "/v1/key-sets/{jwt}/external-keys", {"kid": "e", "alg": "ES256", "remove_at": LATER, "jwk": JWK | {"d": "AAAA"}}, 400, "invalid_jwk"),
    ("a JWK off the curve", "POST", "/v1/key-sets/{jwt}/external-keys", {"kid": "e", "alg": "ES256", "remove_at": LATER, "jwk": JWK | {"y": JWK["x"]}}, 400, "invalid_jwk"),
    ("a JWK for another alg", "POST", "/v1/key-sets/{jwt}/external-keys", {"kid": "e", "alg": "ES384", "remove_at": LATER, "jwk": JWK}, 400, "invalid_jwk"),
    ("neither jwk nor pem", "POST", "/v1/key-sets/{jwt}/external-keys", {"kid": "e", "alg": "ES256", "remove_at": LATER}, 400, "invalid_field"),
    ("a PEM that is none", "POST", "/v1/key-sets/{jwt}/external-keys", {"kid": "e", "alg": "ES256", "remove_at": LATER, "pem": "x"}, 400, "invalid_jwk"),
    ("a kid that is taken", "POST", "/v1/key-sets/{jwt}/external-keys", {"kid": "{kid}", "alg": "ES256", "remove_at": LATER, "jwk": JWK}, 409, "kid_taken"),
    ("a date in the past", "POST", "/v1/key-sets/{jwt}/external-keys", {"kid": "e", "alg": "ES256", "remove_at": "2001-01-01T00:00:00Z", "jwk": JWK}, 400, "invalid_field"),
    ("a date without a zone", "POST", "/v1/key-sets/{jwt}/external-keys", {"kid": "e", "alg": "ES256", "remove_at": "2099-01-01T00:00:00", "jwk": JWK}, 400, "invalid_field"),
    ("a date that is none", "POST", "/v1/key-sets/{jwt}/external-keys", {"kid": "e", "alg": "ES256", "remove_at": "soon", "jwk": JWK}, 400, "invalid_field"),
    ("an unknown role", "POST", "/v1/grants", {"client": "x", "role": "root", "scope": {}}, 400, "invalid_field"),
    ("a grant for nobody", "POST", "/v1/grants", {"client": "nobody", "role": "admin", "scope": {}}, 404, "client_not_found"),
    ("a scope with a key alone", "POST", "/v1/grants", {"client": "admin-bootstrap", "role": "admin", "scope": {"key": "k1"}}, 400, "invalid_field"),
    ("a token that lives too long", "POST", "/v1/clients/admin-bootstrap/tokens", {"expires_in": 10**9}, 400, "invalid_field"),
    ("a token that is dead at once", "POST", "/v1/clients/admin-bootstrap/tokens", {"expires_in": 0}, 400, "invalid_field"),
    ("a fields for a route without", "POST", "/v1/key-sets/{jwt}/keys/k1/disable", {"why": "x"}, 400, "invalid_field"),
    ("NUL in a reason", "POST", "/v1/key-sets/{jwt}/keys/k1/versions/{kid}/revoke", {"reason": "a\0b"}, 400, "invalid_field"),
    ("NUL in a reason of a rotation", "POST", "/v1/key-sets/{jwt}/keys/k1/rotate", {"reason": "\0", "break_glass": True}, 400, "invalid_field"),
    ("NUL in a kid", "POST", "/v1/key-sets/{jwt}/external-keys", {"kid": "e\0", "alg": "ES256", "remove_at": LATER, "jwk": JWK}, 400, "invalid_field"),
    ("NUL in a window", "PATCH", "/v1/key-sets/{jwt}/keys/k1", {"policy": {"rotate_window": "\0"}}, 400, "invalid_field"),
    ("malformed JSON", "POST", "/v1/clients", b"{", 400, "malformed_body"),
    ("a body that is too large", "POST", "/v1/clients", {"name": "x" * 70_000}, 413, "body_too_large"),
)  # fmt: skip


def filled(world: World, text: str) -> str:
    for name, value in (("{kid}", world.kid), ("{url}", world.server.url), ("{jwt}", world.jwt)):
        text = text.replace(name, value)
    return text


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("method", "path", "payload", "status", "code"), [row[1:] for row in CONTROL], ids=[row[0] for row in CONTROL]
)
def test_the_control_plane(world: World, method: str, path: str, payload: Any, status: int, code: str) -> None:
    body = payload if isinstance(payload, bytes) else filled(world, json.dumps(payload)).encode()
    path = path.format(jwt=world.jwt, kid=world.kid)
    headers = {}
    if method == "PATCH" and code != "revision_required":
        headers["If-Match"] = '"999"' if code == "revision_mismatch" else world.server.call("GET", path).headers["ETag"]
    answer = world.server.call(method, path, body=body, headers=headers)
    assert (answer.status, answer.problem) == (status, code), answer.body


# --- verify -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "status", "code"),
    [
        (lambda _: {"token": "x", "audience": "any"}, 422, "token_malformed"),
        (lambda t: {"token": t[:-4] + "AAAA", "audience": "any"}, 422, "token_signature_invalid"),
        (lambda t: {"token": t, "audience": "other"}, 422, "token_audience_mismatch"),
        (lambda t: {"token": t, "audience": "any", "typ": "at+jwt"}, 422, "token_type_mismatch"),
        (lambda t: {"token": t}, 400, "invalid_field"),
        (lambda t: {"token": t, "audience": "any", "key": "mine"}, 400, "invalid_field"),
    ],
    ids=["malformed", "another signature", "another audience", "another typ", "no audience", "a key"],
)
def test_verify(world: World, make: Callable[[str], Any], status: int, code: str) -> None:
    path = f"/v1/key-sets/{world.jwt}"
    token = world.server.must("POST", f"{path}/keys/k1/jwt", {"claims": {"aud": "a"}}, token=world.signer)["token"]
    answer = world.server.call("POST", f"{path}/verify", make(token), token=world.signer)
    assert (answer.status, answer.problem) == (status, code)
    good = world.server.must("POST", f"{path}/verify", {"token": token, "audience": "a"}, token=world.signer)
    assert good["claims"]["aud"] == "a"
