"""The client against a real socket: what it sends, what it repeats, and what it makes of bad answers."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import pytest

from kms_jwks import errors, wire
from kms_jwks.client import Client, Reply, token_file
from kms_jwks.client import transport as transport_module

if TYPE_CHECKING:
    from pathlib import Path

TOKEN = "kj_" + "s3cr3t" * 8 + "z"  # the right length, and nothing else
SIGNED = {"token": "h.p.s", "kid": "k1", "alg": "ES256", "jti": "j", "expires_at": "2026-11-23T12:00:00Z"}


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Behaviour = bytes | Callable[[socket.socket], None]
"""What a request is answered with: these bytes, or whatever a function does with the connection."""


@dataclass
class ScriptedServer:
    """Answers each request with the next behaviour; the last one stays. Connections are kept open."""

    script: list[Behaviour]
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0
    closing: bool = False

    def __post_init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()
        self.open: list[socket.socket] = []

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            if self.closing:
                connection.close()
                return
            self.connections += 1
            self.open.append(connection)
            thread = threading.Thread(target=self.serve, args=(connection,))
            self.threads.append(thread)
            thread.start()

    def serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            try:
                while (request := read_request(stream)) is not None:
                    self.seen.append(request)
                    behaviour = self.script.pop(0) if len(self.script) > 1 else self.script[0]
                    if callable(behaviour):
                        behaviour(connection)
                        return
                    connection.sendall(behaviour)
            except (OSError, ValueError):
                return

    def close(self) -> None:
        self.closing = True
        socket.create_connection(self.listener.getsockname()).close()
        self.listener.close()
        for connection in self.open:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in self.threads:
            thread.join(5)


def read_request(stream: Any) -> Seen | None:
    line = stream.readline().decode("latin-1").split()
    if not line:
        return None
    headers: dict[str, str] = {}
    while (raw := stream.readline().decode().strip()) != "":
        name, _, value = raw.partition(":")
        headers[name.lower()] = value.strip()
    body = stream.read(int(headers.get("content-length", "0")))
    return Seen(line[0], line[1], headers, body)


def answer(status: int, body: object = None, *headers: str, kind: str = "application/json") -> bytes:
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    head = [f"HTTP/1.1 {status} X", f"Content-Length: {len(content)}", f"Content-Type: {kind}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + content


def problem(status: int, code: str, *headers: str, **fields: object) -> bytes:
    document = {
        "type": f"urn:kms-jwks:problem:{code}",
        "title": "A title",
        "status": status,
        "detail": "What happened.",
        "request_id": "req-1",
        "next_step": "Do this.",
        **fields,
    }
    return answer(status, document, "X-Request-Id: req-1", *headers, kind="application/problem+json")


@contextmanager
def serving(*script: Behaviour) -> Iterator[ScriptedServer]:
    server = ScriptedServer(list(script))
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between attempts are noted and not waited for."""
    noted: list[float] = []
    monkeypatch.setattr(transport_module.Transport.__init__, "__kwdefaults__", {"sleep": noted.append})
    return noted


def client_of(server: ScriptedServer, **options: Any) -> Client:
    return Client(server.url, options.pop("token", TOKEN), **{"timeout": 3.0, **options})


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_a_call_sends_the_token_and_what_the_route_expects() -> None:
    with serving(answer(200, SIGNED)) as server, client_of(server) as client:
        signed = client.sign_jwt("orders", "default", {"sub": "a"}, expires_in=60)
    assert (signed.token, signed.kid, signed.expires_at.year) == ("h.p.s", "k1", 2026)
    (request,) = server.seen
    assert (request.method, request.target) == ("POST", "/v1/key-sets/orders/keys/default/jwt")
    assert request.json == {"claims": {"sub": "a"}, "expires_in": 60}
    assert request.headers["authorization"] == f"Bearer {TOKEN}"
    assert request.headers["content-type"] == "application/json"


def test_connections_are_kept_and_reused() -> None:
    with serving(answer(200, SIGNED)) as server, client_of(server) as client:
        for _ in range(5):
            client.sign_jwt("s", "k", {})
    assert (len(server.seen), server.connections) == (5, 1)


def test_a_base_url_with_a_path_keeps_it() -> None:
    with serving(answer(200, {"keys": []})) as server, Client(server.url + "/kms/", TOKEN) as client:
        client.jwks("orders")
    assert server.seen[0].target == "/kms/orders/.well-known/jwks.json"


def test_names_cannot_leave_their_segment() -> None:
    with serving(problem(404, "key_set_not_found")) as server, client_of(server) as client:
        for name in ("..", ".", ""):
            with pytest.raises(errors.InvalidField):
                client.key_set(name)
        with pytest.raises(errors.KeySetNotFound):
            client.key_set("a/../../clients?x#y")
    assert [r.target for r in server.seen] == ["/v1/key-sets/a%2F..%2F..%2Fclients%3Fx%23y"]


def test_without_a_token_no_header_is_sent() -> None:
    with serving(answer(200, {"keys": []})) as server, client_of(server, token=None) as client:
        assert client.jwks() == {"keys": []}
    assert "authorization" not in server.seen[0].headers


def test_the_token_is_asked_for_at_each_call(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("kj_one\n")
    with serving(answer(200, SIGNED)) as server, client_of(server, token=token_file(file)) as client:
        client.sign_jwt("s", "k", {})
        file.write_text("kj_two\n")
        client.sign_jwt("s", "k", {})
        file.unlink()
        with pytest.raises(errors.ConfigurationError, match=r"cannot be read: No such file"):
            client.sign_jwt("s", "k", {})
    assert [r.headers["authorization"] for r in server.seen] == ["Bearer kj_one", "Bearer kj_two"]


@pytest.mark.parametrize("token", ["", "kj_a b", "kj_a\r\nX-Evil: 1", "kj_ä"])
def test_a_token_that_no_header_can_carry_is_never_repeated(token: str) -> None:
    with serving(answer(200, SIGNED)) as server, client_of(server, token=token) as client:
        with pytest.raises(errors.CredentialsMalformed) as caught:
            client.sign_jwt("s", "k", {})
        assert not token or token not in str(caught.value)
    assert server.seen == []


@pytest.mark.parametrize("claims", [{"x": float("nan")}, {"x": float("inf")}, {"x": object()}, {"x": {1, object()}}])
def test_claims_that_json_cannot_hold_are_refused_before_anything_is_sent(claims: dict[str, Any]) -> None:
    with serving(answer(200, SIGNED)) as server, client_of(server) as client, pytest.raises(errors.MalformedBody):
        client.sign_jwt("s", "k", claims)
    assert server.seen == []


def test_a_change_carries_the_revision_it_is_made_for() -> None:
    with (
        serving(problem(412, "revision_mismatch", revision=8)) as server,
        client_of(server) as client,
        pytest.raises(errors.RevisionMismatch) as caught,
    ):
        client.update_key_set("s", wire.KeySetPatch(cache_lifetime=60), revision=7)
    assert server.seen[0].headers["if-match"] == '"7"'
    assert server.seen[0].json == {"cache_lifetime": 60}
    assert caught.value.fields == {"revision": 8}


def test_lists_fetch_page_after_page() -> None:
    row = {"id": "1", "created_at": "2026-11-23T12:00:00Z"}
    pages = [
        answer(200, {"items": [{"name": "a", **row}], "next": "c 1"}),
        answer(200, {"items": [{"name": "b", **row, "unknown_to_this_client": 1}]}),
    ]
    with serving(*pages) as server, client_of(server) as client:
        assert [c.name for c in client.clients()] == ["a", "b"]
    assert [r.target for r in server.seen] == ["/v1/clients?limit=200", "/v1/clients?limit=200&cursor=c+1"]


def test_pages_that_never_end_are_noticed() -> None:
    with (
        serving(answer(200, {"items": [], "next": "same"})) as server,
        client_of(server) as client,
        pytest.raises(errors.UnexpectedAnswer, match="loop"),
    ):
        list(client.clients())
    assert len(server.seen) == 2


def test_successes_can_be_watched_and_their_repr_tells_no_secret() -> None:
    replies: list[Reply] = []
    with serving(answer(200, SIGNED, "X-Request-Id: r7")) as server, client_of(server, on_answer=replies.append) as c:
        c.sign_jwt("s", "k", {})
    assert json.loads(replies[0].body) == SIGNED
    assert replies[0].request_id == "r7"
    assert "h.p.s" not in repr(replies[0])


# --- problems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code", sorted(c for c, cls in errors.BY_CODE.items() if not issubclass(cls, errors.ClientError))
)
def test_every_problem_type_raises_its_own_class(code: str) -> None:
    with (
        serving(problem(400, code, usable_at="2026-11-23T12:00:00Z")) as server,
        client_of(server) as client,
        pytest.raises(errors.Error) as caught,
    ):
        client.rotate("s", "k")
    assert type(caught.value) is errors.BY_CODE[code]
    assert (caught.value.detail, caught.value.next_step) == ("What happened.", "Do this.")
    assert caught.value.fields == {"usable_at": "2026-11-23T12:00:00Z"}
    assert (vars(caught.value)["status"], vars(caught.value)["request_id"]) == (400, "req-1")


@pytest.mark.parametrize("code", ["of_tomorrow", "service_unreachable", "client_error"])
def test_a_problem_this_client_does_not_know_is_passed_on(code: str) -> None:
    with (
        serving(problem(409, code, more=1)) as server,
        client_of(server) as client,
        pytest.raises(errors.UnexpectedAnswer, match=f"{code}: What happened") as caught,
    ):
        client.rotate("s", "k")
    assert caught.value.next_step == "Do this."
    assert caught.value.fields == {"more": 1, "code": code}


def test_a_batch_gives_each_item_its_answer_or_its_error() -> None:
    refused = json.loads(problem(400, "claims_refused").partition(b"\r\n\r\n")[2])
    mixed = answer(200, {"batch": [SIGNED, {"error": refused}]}, "X-Request-Id: r9")
    with serving(mixed) as server, client_of(server) as client:
        good, bad = client.sign_jwt_batch("s", "k", [wire.JwtRequest(claims={}), wire.JwtRequest(claims={"a": 1})])
    assert server.seen[0].json == {"batch": [{"claims": {}}, {"claims": {"a": 1}}]}
    assert isinstance(good, wire.SignedJwt)
    assert isinstance(bad, errors.ClaimsRefused)
    assert (vars(bad)["status"], vars(bad)["request_id"]) == (400, "r9")


@pytest.mark.parametrize("items", [[], [SIGNED, SIGNED], [{"token": 1}]])
def test_a_batch_that_does_not_fit_what_was_asked_is_refused(items: list[Any]) -> None:
    with (
        serving(answer(200, {"batch": items})) as server,
        client_of(server) as client,
        pytest.raises(errors.UnexpectedAnswer),
    ):
        client.sign_jwt_batch("s", "k", [wire.JwtRequest(claims={})])


# --- answers that are none --------------------------------------------------------------------------------------------

LIES = {
    "html": answer(200, b"<html>welcome</html>", kind="text/html"),
    "not json": answer(200, b'{"token": '),
    "another shape": answer(200, {"token": 7}),
    "a list": answer(200, [SIGNED]),
    "empty": answer(200, b""),
    "no content": answer(204),
    "not utf-8": answer(200, b'{"token": "\xff\xfe"}'),
    "nested without end": answer(200, b"[" * 100_000),
    "an error page": answer(404, b"<html>nginx</html>", kind="text/html"),
    "a foreign problem": answer(403, {"type": "about:blank", "title": "Forbidden"}, kind="application/problem+json"),
    "a problem that is a list": answer(400, [1], kind="application/problem+json"),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_an_answer_that_is_not_the_services_is_said_to_be_unexpected(lie: bytes) -> None:
    with serving(lie) as server, client_of(server) as client, pytest.raises(errors.UnexpectedAnswer) as caught:
        client.sign_jwt("s", "k", {"sub": "x"})
    assert vars(caught.value)["status"] == int(lie.split()[1])
    assert len(server.seen) == 1, "what was answered is not asked again"
    assert TOKEN not in str(caught.value) + repr(caught.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_never_followed(status: int) -> None:
    with serving(answer(200, SIGNED)) as other:
        moved = answer(status, None, f"Location: {other.url}/v1/steal?t=1")
        with serving(moved) as server, client_of(server) as client:
            for call in (lambda: client.sign_jwt("s", "k", {}), lambda: client.jwks("s")):
                with pytest.raises(errors.UnexpectedAnswer, match="redirects are not followed") as caught:
                    call()
                assert "steal" not in str(caught.value)
    assert other.seen == []


def test_an_answer_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "MAX_ANSWER", 100_000)
    with (
        serving(answer(200, b" " * 300_000)) as server,
        client_of(server) as client,
        pytest.raises(errors.UnexpectedAnswer, match="longer than"),
    ):
        client.active("s", "k")


def test_an_answer_that_trickles_is_given_up(pauses: list[float]) -> None:
    def trickle(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        for _ in range(40):
            connection.sendall(b"x")
            time.sleep(0.05)

    with serving(trickle) as server, client_of(server, timeout=0.4, retries=0) as client:
        begin = time.monotonic()
        with pytest.raises(errors.ServiceUnreachable, match="in time"):
            client.jwks()
    assert time.monotonic() - begin < 2


# --- what is repeated -------------------------------------------------------------------------------------------------


def hang_up(connection: socket.socket) -> None:
    """The request was read and the connection ends without a word."""
    connection.shutdown(socket.SHUT_RDWR)


def half_an_answer(connection: socket.socket) -> None:
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{"token": "h.p')


def silence(connection: socket.socket) -> None:
    time.sleep(0.8)


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


BUSY = problem(503, "registry_stale", "Retry-After: 2")
PROXY_BUSY = answer(503, b"<html>busy</html>", "Retry-After: 2", kind="text/html")
FAILURES: dict[str, tuple[Behaviour, bool, bool, bool]] = {
    "hung up": (hang_up, True, False, False),
    "half an answer": (half_an_answer, True, False, False),
    "silence": (silence, True, False, False),
    "reset": (reset, True, False, False),
    "503": (BUSY, True, True, False),
    "429": (problem(429, "backend_throttled", "Retry-After: 1"), True, True, False),
    "503 of a proxy": (PROXY_BUSY, True, False, False),
    "504": (problem(504, "backend_timeout"), True, False, False),
    "502": (answer(502, b"bad gateway", kind="text/plain"), True, False, False),
    "500": (problem(500, "internal_error"), False, False, False),
    "409": (problem(409, "conflict"), False, False, False),
}
CALLS: dict[str, tuple[Callable[[Client], object], bytes]] = {
    "read": (lambda c: c.jwks("s"), answer(200, {"keys": []})),
    "verify": (lambda c: c.verify("s", "a.b.c", "any"), answer(200, {"header": {}, "claims": {}, "kid": "k"})),
    "sign": (lambda c: c.sign_jwt("s", "k", {}), answer(200, SIGNED)),
    "create": (
        lambda c: c.create_client("a"),
        answer(201, {"name": "a", "id": "1", "created_at": SIGNED["expires_at"]}),
    ),
    "change": (lambda c: c.revoke_token("a", "1"), answer(200, {})),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("failure", FAILURES)
def test_what_is_sent_again(failure: str, call: str, pauses: list[float]) -> None:
    behaviour, read, sign, change = FAILURES[failure]
    again = {"read": read, "verify": read, "create": read, "sign": sign, "change": change}[call]
    make, success = CALLS[call]
    with serving(behaviour, success) as server, client_of(server, timeout=0.3) as client:
        if again:
            make(client)
        else:
            with pytest.raises(errors.Error):
                make(client)
    assert len(server.seen) == (2 if again else 1)


def test_a_creation_keeps_its_idempotency_key_when_it_is_sent_again(pauses: list[float]) -> None:
    with serving(hang_up, *[CALLS["create"][1]] * 2) as server, client_of(server) as client:
        client.create_client("a")
        client.create_client("a")
    first, again, other = (request.headers["idempotency-key"] for request in server.seen)
    assert first == again != other
    assert re.fullmatch(r'"[0-9a-f-]{36}"', first)


def test_a_lost_signature_says_that_nobody_knows(pauses: list[float]) -> None:
    with (
        serving(hang_up) as server,
        client_of(server) as client,
        pytest.raises(errors.ServiceUnreachable, match="whether the call took effect is not known"),
    ):
        client.sign_jwt("s", "k", {})


def test_attempts_and_pauses_are_bounded(pauses: list[float]) -> None:
    with (
        serving(hang_up) as server,
        client_of(server, retries=3) as client,
        pytest.raises(errors.ServiceUnreachable),
    ):
        client.jwks("s")
    assert len(server.seen) == 4
    assert [round(p, 3) for p in pauses] == sorted(round(p, 3) for p in pauses) or len(pauses) == 3
    assert all(0.05 <= p <= 0.8 for p in pauses)


def test_retry_after_is_honoured(pauses: list[float]) -> None:
    soon = problem(503, "registry_stale", f"Retry-After: {formatdate(time.time() + 4, usegmt=True)}")
    with serving(BUSY, soon, answer(200, SIGNED)) as server, client_of(server) as client:
        client.sign_jwt("s", "k", {})
    assert pauses[0] == 2
    assert 2 <= pauses[1] <= 5


@pytest.mark.parametrize("header", ["Retry-After: soon", "Retry-After: -1", "X-None: 1"])
def test_a_retry_after_that_says_nothing_is_passed_over(header: str, pauses: list[float]) -> None:
    with serving(problem(503, "unavailable", header), answer(200, SIGNED)) as server, client_of(server) as client:
        client.sign_jwt("s", "k", {})
    assert len(pauses) == 1
    assert pauses[0] <= 0.1


def test_a_long_retry_after_is_left_to_the_caller(pauses: list[float]) -> None:
    with (
        serving(problem(503, "backend_unavailable", "Retry-After: 600")) as server,
        client_of(server) as client,
        pytest.raises(errors.BackendUnavailable) as caught,
    ):
        client.sign_jwt("s", "k", {})
    assert caught.value.retry_after == 600
    assert (len(server.seen), pauses) == (1, [])


def test_a_pooled_connection_that_the_server_closed_meanwhile_is_not_used(pauses: list[float]) -> None:
    """Half-closed: the server's FIN lies in the idle connection when the next call, a signature, takes it."""
    with serving(answer(200, SIGNED)) as server, client_of(server) as client:
        client.sign_jwt("s", "k", {})
        server.open[0].shutdown(socket.SHUT_WR)
        time.sleep(0.05)
        client.sign_jwt("s", "k", {})
    assert (len(server.seen), server.connections, pauses) == (2, 2, [])


@pytest.mark.parametrize("call", CALLS)
def test_a_refused_connection_is_tried_again_whatever_the_call(call: str, pauses: list[float]) -> None:
    with serving(b"") as server:
        url = server.url
    with (
        Client(url, TOKEN) as client,
        pytest.raises(errors.ServiceUnreachable, match="connection refused") as caught,
    ):
        CALLS[call][0](client)
    assert len(pauses) == 2
    assert "KMS_JWKS_ADDR" in caught.value.next_step


def test_an_unknown_host_is_unreachable(pauses: list[float]) -> None:
    with (
        Client("https://does-not-exist.invalid", TOKEN, retries=0) as client,
        pytest.raises(errors.ServiceUnreachable, match="does-not-exist"),
    ):
        client.jwks()


def test_tls_to_something_else_is_said_to_be_tls(pauses: list[float]) -> None:
    def answer_in_clear() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(b"HTTP/1.0 400 no\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer_in_clear)
        thread.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        with Client(url, TOKEN, timeout=5) as client, pytest.raises(errors.ServiceUnreachable, match="TLS failed"):
            client.jwks()
        thread.join(5)


def test_a_forked_child_does_not_read_its_parents_answers() -> None:
    with serving(answer(200, SIGNED)) as server, client_of(server) as client:
        client.sign_jwt("s", "k", {})
        inherited = client._transport._connections.pool()
        pid = os.getpid()
        client._transport._connections._open = (pid + 1, inherited)
        client.sign_jwt("s", "k", {})
        assert client._transport._connections.pool() is not inherited
        inherited.close()
    assert server.connections == 2


def test_many_threads_share_one_client() -> None:
    with serving(answer(200, SIGNED)) as server, client_of(server, pool_size=4) as client:
        done: list[str] = []

        def work() -> None:
            done.extend(client.sign_jwt("s", "k", {}).token for _ in range(10))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(done) == 40
    assert server.connections <= 4
