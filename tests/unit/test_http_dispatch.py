"""How much of a body is read, and what is decided before the first one: whether the sender is known."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from werkzeug.test import EnvironBuilder, run_wsgi_app

from kms_jwks import errors, strictjson
from kms_jwks.http import dispatch
from kms_jwks.http.dispatch import Limits
from kms_jwks.http.exchange import Request, Route
from kms_jwks.http.problems import LengthRequired
from kms_jwks.http.routes import ROUTES
from kms_jwks.service.guard import RequestContext
from tests.unit.test_http_app import SHOWN, SIGN, FakeService, Sender, app_of, problem

if TYPE_CHECKING:
    from kms_jwks.service import Service

LIMITS = Limits(single=10, batch=20)


class TestBody:
    @pytest.mark.parametrize(("body", "length"), [(b"abcde", 5), (b"", 0), (b"x" * 10, 10)])
    def test_as_long_as_its_length_says(self, body: bytes, length: int) -> None:
        dispatch.check_body(body, length, chunked=False)

    @pytest.mark.parametrize("body", [b"", b"abcde", b"x" * 10])
    def test_a_chunked_body_within_the_limit(self, body: bytes) -> None:
        dispatch.check_body(body, 11, chunked=True)

    @pytest.mark.parametrize("body", [b"x" * 11, b"x" * 500])
    def test_a_chunked_body_beyond_the_limit(self, body: bytes) -> None:
        with pytest.raises(errors.BodyTooLarge) as caught:
            dispatch.check_body(body, 11, chunked=True)
        assert caught.value.fields == {"limit": 10}

    @pytest.mark.parametrize(("body", "came"), [(b"abcd", 4), (b"ab", 2), (b"", 0)])
    def test_longer_or_shorter_than_its_length_says(self, body: bytes, came: int) -> None:
        with pytest.raises(errors.LengthMismatch, match=f"says 3 bytes, {came} came"):
            dispatch.check_body(body, 3, chunked=False)


@pytest.mark.parametrize("messages", [[b"abcde"], [b"a", b"bcd", b"e"], [b"abc", b"", b"de"]])
def test_an_event_loop_can_read_it(messages: list[bytes]) -> None:
    """As an ASGI server gives a body: in messages of any size, each of which is awaited."""
    left = messages[:]

    async def next_message() -> bytes:
        await asyncio.sleep(0)
        return left.pop(0)

    async def read(wanted: int) -> bytes:
        body = b""
        while left and len(body) < wanted:
            body += await next_message()
        dispatch.check_body(body, wanted, chunked=False)
        return body

    assert asyncio.run(read(5)) == b"abcde"


def route(path: str, method: str = "POST") -> Route:
    return next(r for r in ROUTES if (r.path, r.method) == (path, method))


JWT = route("/v1/key-sets/{key_set}/keys/{key}/jwt")
CLIENTS = route("/v1/clients")
ROTATE = route("/v1/key-sets/{key_set}/keys/{key}/rotate")
LIST = route("/v1/clients", "GET")


def request(shown: str | None = "Bearer kj_x", **params: str) -> Request:
    def nothing(_: str) -> None:
        return None

    return Request("POST", params, nothing, nothing, b"", RequestContext(authorization=shown))


def receive(
    service: FakeService, row: Route, req: Request, *, length: str | None = None, chunked: bool = False
) -> int | None:
    return dispatch.receive(cast("Service", service), row, req, LIMITS, length=length, chunked=chunked)


class TestReceive:
    @pytest.mark.parametrize(
        ("row", "length", "chunked", "wanted"),
        [
            (JWT, "5", False, 5),
            (JWT, "20", False, 20),
            (JWT, None, True, 21),
            (CLIENTS, "10", False, 10),
            (CLIENTS, None, True, 11),
            (CLIENTS, "0", False, 0),
            (CLIENTS, "0" * 30 + "7", False, 7),
            (ROTATE, None, False, 0),
        ],
    )
    def test_what_it_wants(self, row: Route, length: str | None, wanted: int, *, chunked: bool) -> None:
        assert receive(FakeService(), row, request(), length=length, chunked=chunked) == wanted

    def test_a_route_without_a_body_reads_none_and_leaves_the_caller_to_the_use_case(self) -> None:
        service = FakeService()
        assert receive(service, LIST, request(None), length="5") is None
        assert service.authenticated == []

    @pytest.mark.parametrize(
        ("row", "length", "error"),
        [
            (JWT, None, LengthRequired),
            (JWT, "-1", errors.LengthMismatch),
            (JWT, "٣", errors.LengthMismatch),
            (JWT, "21", errors.BodyTooLarge),
            (JWT, "9" * 5000, errors.BodyTooLarge),
            (CLIENTS, "11", errors.BodyTooLarge),
        ],
    )
    def test_lengths_that_are_refused_before_anything_is_read(
        self, row: Route, length: str | None, error: type[errors.Error]
    ) -> None:
        with pytest.raises(error):
            receive(FakeService(), row, request(), length=length)

    @pytest.mark.parametrize(("row", "data_plane"), [(JWT, True), (CLIENTS, False), (ROTATE, False)])
    def test_the_caller_is_asked_of_the_plane_that_the_route_belongs_to(self, row: Route, *, data_plane: bool) -> None:
        service = FakeService()
        receive(service, row, request(), length="5")
        assert service.authenticated == [data_plane]

    @pytest.mark.parametrize("row", [r for r in ROUTES if r.request is not None], ids=lambda r: f"{r.method} {r.path}")
    def test_no_route_reads_the_body_of_an_unknown_sender(self, row: Route) -> None:
        service = FakeService()
        service.refuse = errors.CredentialsUnknown()
        for length in ("5", "9999999", "nonsense", None):
            with pytest.raises(errors.CredentialsUnknown):
                receive(service, row, request(), length=length)
        with pytest.raises(errors.CredentialsMissing):
            receive(service, row, request(None), length="5")

    @pytest.mark.parametrize("row", [r for r in ROUTES if r.request is not None], ids=lambda r: f"{r.method} {r.path}")
    def test_no_signing_route_reads_the_body_of_a_caller_whom_no_grant_lets_sign(self, row: Route) -> None:
        service = FakeService()
        service.forbid = errors.Forbidden("No grant.")
        for length in ("5", "3000"):
            if row.batch:
                with pytest.raises(errors.Forbidden):
                    receive(service, row, request(), length=length)
            elif length == "5":
                assert receive(service, row, request(), length=length) is not None

    def test_a_name_with_a_control_character_names_nothing(self) -> None:
        with pytest.raises(errors.RouteNotFound):
            receive(FakeService(), JWT, request(key_set="a\x00b"), length="5")


HOSTILE = b'{"claims":' + b"[" * 400 + b"]" * 400 + b"}"
REFUSALS = [
    errors.CredentialsMissing(),
    errors.CredentialsMalformed(),
    errors.CredentialsUnknown(),
    errors.CredentialsExpired(),
    errors.CredentialsRevoked(),
    errors.StoreUnavailable(),
]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bodies that reached the decoder."""
    found: list[bytes] = []
    real: Callable[[bytes], Any] = strictjson.loads_object

    def loads_object(data: bytes) -> Any:
        found.append(data)
        return real(data)

    monkeypatch.setattr(dispatch, "strictjson", SimpleNamespace(loads_object=loads_object))
    return found


@pytest.mark.parametrize("path", [SIGN, "/v1/key-sets/s/verify", "/v1/clients", "/v1/key-sets/s/keys/k/rotate"])
class TestAuthenticationComesFirst:
    @pytest.mark.parametrize("refuse", REFUSALS, ids=lambda error: error.code)
    def test_a_body_whose_sender_is_refused_never_reaches_the_decoder(
        self, decoded: list[bytes], path: str, refuse: errors.Error
    ) -> None:
        service = FakeService()
        service.refuse = refuse
        for body, content_type in ((HOSTILE, "application/json"), (b"\xff", "text/plain"), (b"x" * 5000, None)):
            response = Sender(app_of(service)).post(path, data=body, content_type=content_type)
            assert problem(response) == refuse.code
        assert not decoded
        assert not service.asked

    def test_a_body_of_a_caller_that_may_not_sign_never_reaches_the_decoder(
        self, decoded: list[bytes], path: str
    ) -> None:
        service = FakeService()
        service.forbid = errors.Forbidden("No grant.")
        response = Sender(app_of(service)).post(path, data=HOSTILE, content_type="application/json")
        if path == SIGN:
            assert (response.status_code, problem(response), decoded) == (403, "forbidden", [])
        else:
            assert problem(response) == "malformed_body"
        assert not service.asked

    def test_a_bad_body_of_a_known_sender_gets_its_answer(self, decoded: list[bytes], path: str) -> None:
        service = FakeService()
        response = Sender(app_of(service)).post(path, data=HOSTILE, content_type="application/json")
        assert (response.status_code, problem(response)) == (400, "malformed_body")
        assert decoded == [HOSTILE]
        assert not service.asked


class Input:
    """What a server calls `wsgi.input`; `ended` says that the connection is to end with this answer."""

    def __init__(self, data: bytes) -> None:
        self._left = data
        self.ended = False
        self.received_whole = False

    def read(self, size: int) -> bytes:
        part, self._left = self._left[:size], self._left[size:]
        return part

    def close_connection(self) -> None:
        self.ended = True

    def received(self) -> bool:
        self.received_whole = True
        return True


@pytest.mark.parametrize(
    ("sent", "length", "chunked", "ended"),
    [
        (b"x" * 500, "500", False, False),
        (b"x" * 400, "500", False, True),
        (b"x" * 500, None, True, True),
        (b"x" * 500, "9999999", False, True),
    ],
    ids=["whole", "broken off", "chunked", "announced as far too large"],
)
def test_a_refused_sender_keeps_its_connection_when_its_body_has_been_read_to_the_end(
    sent: bytes, length: str | None, *, chunked: bool, ended: bool
) -> None:
    service = FakeService()
    service.refuse = errors.CredentialsExpired()
    environ = EnvironBuilder(SIGN, method="POST", headers=SHOWN).get_environ()
    stream = environ["wsgi.input"] = Input(sent)
    environ.pop("CONTENT_LENGTH", None)
    if length is not None:
        environ["CONTENT_LENGTH"] = length
    if chunked:
        environ["HTTP_TRANSFER_ENCODING"] = "chunked"
    _, status, _ = run_wsgi_app(app_of(service), environ)
    assert status.startswith("401")
    assert stream.received_whole
    assert stream.ended == ended
