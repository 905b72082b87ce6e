"""The log: one set-up for structlog and the standard library, nothing secret and nothing that steers a terminal in it,
and one line for every answer."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import structlog
from gunicorn.http import errors as parser  # type: ignore[import-untyped]
from werkzeug.test import Client

from kms_jwks import errors, wire
from kms_jwks.http import dispatch, logs, problems, server
from kms_jwks.http.protections import RefusalCounts
from kms_jwks.service.signing import Batch
from tests.unit.test_http_app import JWKS, SIGN, SIGNED, FakeService, Sender, app_of

TOKEN = "kj_" + "A1b2C3d4" * 7
JWT = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJlLXZhbHVl"
SIGNATURE = "x" * 86

SECRETS = {
    "an API token": TOKEN,
    "an API token in a sentence": f"client sent {TOKEN}, refused",
    "a JWT": JWT,
    "a signing input": JWT.rpartition(".")[0],
    "an Authorization header": "Authorization: Bearer abc.def",
    "a PIN in a PKCS#11 URI": "pkcs11:token=x?pin-value=123456",
    "a PIN in words": "login with pin=123456 failed",
    "a signature": f"made {SIGNATURE}",
    "a private key": "-----BEGIN EC PRIVATE KEY-----\nMHcC\n-----END EC PRIVATE KEY-----",
}
LEAKS = (TOKEN, JWT, JWT.rpartition(".")[0], "abc.def", "123456", SIGNATURE, "MHcC")


def log_stream(monkeypatch: pytest.MonkeyPatch, style: Literal["json", "console"]) -> Iterator[io.StringIO]:
    stream = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(logs, "_configured", {})
    logs.configure("debug", style)
    yield stream
    logging.captureWarnings(capture=False)
    root.handlers[:], root.level = before
    structlog.reset_defaults()


@pytest.fixture(params=["json", "console"])
def stream(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    yield from log_stream(monkeypatch, request.param)


def clean(text: str) -> bool:
    return not any(secret in text for secret in LEAKS)


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS.keys())
class TestNothingSecret:
    def test_in_an_event(self, stream: io.StringIO, secret: str) -> None:
        structlog.get_logger().info(secret)
        assert logs.MASK in stream.getvalue()
        assert clean(stream.getvalue())

    def test_in_a_field(self, stream: io.StringIO, secret: str) -> None:
        structlog.get_logger().info("event", some=secret, deep={"list": [secret, {"more": (secret,)}]})
        assert stream.getvalue().count(logs.MASK) == 3
        assert clean(stream.getvalue())

    def test_in_an_exception(self, stream: io.StringIO, secret: str) -> None:
        try:
            raise ValueError(secret)
        except ValueError:
            structlog.get_logger().exception("failed")
        assert "ValueError" in stream.getvalue()
        assert clean(stream.getvalue())

    def test_in_the_standard_library(self, stream: io.StringIO, secret: str) -> None:
        logging.getLogger("other.library").warning("they said %s", secret)
        try:
            raise ValueError(secret)
        except ValueError:
            logging.getLogger("other.library").exception("failed")
        assert "they said" in stream.getvalue()
        assert clean(stream.getvalue())


@pytest.mark.parametrize(
    "name", ["pin", "user_pin", "so-pin", "token", "authorization", "claims", "signature", "payload", "client_secret"]
)
def test_a_field_with_a_telling_name_is_masked_whatever_it_holds(stream: io.StringIO, name: str) -> None:
    structlog.get_logger().info("event", **{name: "12-34"}, nested={name: {"a": "12-34"}})
    assert "12-34" not in stream.getvalue().partition("event")[2]


@pytest.mark.parametrize(
    "value", ["default", "Zz9-thumbprint-of-43-characters-aaaaaaaaaaaa", "019a-uuid", 12, None, True, 1.5]
)
def test_what_is_no_secret_stays(value: Any) -> None:
    assert logs.mask(value) == value


def test_bytes_are_never_shown() -> None:
    assert logs.mask([b"\x00\x01"]) == [logs.MASK]


def test_json_lines_are_one_object_each_with_level_time_and_event(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in log_stream(monkeypatch, "json"):
        structlog.get_logger().warning("something", number=3)
        logging.getLogger("gunicorn.error").info("Booting %s", "x")
        first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["event"] == "something"
    assert first["level"] == "warning"
    assert first["timestamp"].endswith("Z")
    assert first["number"] == 3
    assert second["event"] == "Booting x"
    assert second["logger"] == "gunicorn.error"


# --- terminals --------------------------------------------------------------------------------------------------------

STEERING = [chr(n) for n in (*range(0x20), *range(0x7F, 0xA0))] + list(
    "\u061c\u200e\u200f\u2028\u2029\u202e\u2066\u2069"
)


def raw(text: str) -> set[str]:
    """What of `text` a terminal would obey; a line has its end, and tracebacks have line ends and tabs."""
    return {ch for ch in text if ch in STEERING} - {"\n", "\t"}


@pytest.mark.parametrize("sent", STEERING, ids=lambda ch: f"U+{ord(ch):04X}")
def test_nothing_that_steers_a_terminal_is_written_raw(stream: io.StringIO, sent: str) -> None:
    text = f"before{sent}[31mafter"
    structlog.get_logger().info("event", path=text, deep={"list": [text]})
    structlog.get_logger().info(text)
    logging.getLogger("gunicorn.error").warning("Invalid request: %s", text)
    assert not raw(stream.getvalue())
    assert stream.getvalue().count("\n") == 3, "a sender cannot forge a line"
    assert stream.getvalue().count("before") == 4, "the rest is there"
    try:
        raise ValueError(text)
    except ValueError:
        structlog.get_logger().exception("failed")
        logging.getLogger("gunicorn.error").exception("Error handling request %s", text)
    assert not raw(stream.getvalue())


def test_a_json_line_holds_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in log_stream(monkeypatch, "json"):
        text = "".join(STEERING) + "äöü€😀"
        structlog.get_logger().info("event", path=text)
        assert json.loads(stream.getvalue())["path"] == text


def test_text_that_utf_8_cannot_hold_does_not_break_the_log(stream: io.StringIO) -> None:
    structlog.get_logger().info("event", path="\ud800", other="\x9b")
    assert "\ud800" not in stream.getvalue()
    assert not raw(stream.getvalue())


# --- the line of a request --------------------------------------------------------------------------------------------

LEVELS = {500: "error", 501: "warning", 502: "warning", 503: "warning", 504: "warning"}
"""Of answers from 500 on; those below are `info`."""


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """The log in JSON. The loggers are new ones: a logger keeps the stream that it wrote to first."""
    for module in (dispatch, server):
        monkeypatch.setattr(module, "log", structlog.get_logger())
    yield from log_stream(monkeypatch, "json")


def only(lines: io.StringIO) -> dict[str, Any]:
    (line,) = lines.getvalue().splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def client(service: FakeService) -> Client:
    return Sender(app_of(service))


@pytest.mark.parametrize("code", sorted(errors.BY_CODE))
def test_every_problem_has_one_line_that_explains_it(lines: io.StringIO, service: FakeService, code: str) -> None:
    service.answer = errors.BY_CODE[code]("What happened this time.")
    service.backend = "hsm"
    shown = {"headers": {"X-Request-Id": "find-me"}, "environ_overrides": {"REMOTE_ADDR": "192.0.2.1"}}
    answer = client(service).post(SIGN, json={}, **shown)
    status = problems.status_of(errors.BY_CODE[code])
    assert answer.status_code == status
    line = only(lines)
    assert (line["event"], line["code"], line["status"]) == ("request", code, status)
    assert line["level"] == LEVELS.get(status, "info")
    assert line["request_id"] == answer.headers["X-Request-Id"] == "find-me"
    assert (line["method"], line["path"]) == ("POST", SIGN)
    assert line["route"] == "/v1/key-sets/{key_set}/keys/{key}/jwt"
    assert (line["client"], line["token_id"]) == ("issuer-1", "token-id")
    assert (line["key_set"], line["key"], line["backend"]) == ("s", "k", "hsm")
    assert line["detail"] == "What happened this time."
    assert line["ms"] >= 0
    assert line["peer"] == "192.0.2.1"
    assert ("exception" in line) == (status == 500)


def test_a_defect_has_one_line_with_its_traceback(lines: io.StringIO, service: FakeService) -> None:
    service.answer = ZeroDivisionError("a defect")
    client(service).post(SIGN, json={})
    line = only(lines)
    assert (line["event"], line["level"], line["code"], line["status"]) == ("request", "error", "internal_error", 500)
    assert "ZeroDivisionError: a defect" in line["exception"]
    assert "Traceback" in line["exception"]


@pytest.mark.parametrize(
    ("refuse", "code", "level"),
    [
        (errors.CredentialsUnknown(), "credentials_unknown", "info"),
        (errors.StoreUnavailable(), "store_unavailable", "warning"),
    ],
)
def test_refusals_before_the_body_is_read_have_their_line(
    lines: io.StringIO, service: FakeService, refuse: errors.Error, code: str, level: str
) -> None:
    service.refuse = refuse
    client(service).post(SIGN, json={})
    line = only(lines)
    assert (line["code"], line["level"], line["key_set"], line["key"]) == (code, level, "s", "k")
    assert "client" not in line
    assert "kj_" not in lines.getvalue()


def test_a_defect_of_authentication_has_its_line(lines: io.StringIO, service: FakeService) -> None:
    service.refuse = ZeroDivisionError("a defect")  # type: ignore[assignment]
    assert client(service).post(SIGN, json={}, headers={"X-Request-Id": "r"}).status_code == 500
    line = only(lines)
    assert (line["level"], line["code"], line["request_id"]) == ("error", "internal_error", "r")
    assert "ZeroDivisionError" in line["exception"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nowhere", 404, "route_not_found"), ("PUT", "/v1/clients", 405, "method_not_allowed")],
)
def test_requests_that_no_route_takes(
    lines: io.StringIO, service: FakeService, method: str, path: str, status: int, code: str
) -> None:
    client(service).open(path, method=method)
    line = only(lines)
    assert (line["status"], line["code"], line["level"], line["route"]) == (status, code, "info", None)
    assert (line["method"], line["path"]) == (method, path)


def test_a_success_names_its_caller(lines: io.StringIO, service: FakeService) -> None:
    client(service).post(SIGN, json={})
    line = only(lines)
    assert (line["status"], line["level"], line["client"], line["token_id"]) == (200, "info", "issuer-1", "token-id")
    assert "code" not in line


def test_items_of_a_batch_that_failed_are_counted_by_problem(lines: io.StringIO, service: FakeService) -> None:
    refused = errors.ClaimsRefused()
    service.answer = Batch([SIGNED, refused, refused, errors.BackendTimeout()])
    client(service).post(SIGN, json={"batch": [{}] * 4})
    line = only(lines)
    assert (line["status"], line["level"], line["key"]) == (200, "info", "k")
    assert line["failed"] == ["claims_refused: 2", "backend_timeout: 1"]


def test_readiness_says_what_is_missing(lines: io.StringIO, service: FakeService) -> None:
    states = {"registry": ("ok", ""), "backend:hsm": ("backend_unavailable", "no token of serial 4711")}
    service.answer = wire.Readiness(
        status="failing",
        dependencies=[wire.Dependency(name=name, state=state, detail=d) for name, (state, d) in states.items()],
    )
    client(service).get("/readyz")
    line = only(lines)
    assert (line["status"], line["level"]) == (503, "warning")
    assert line["failing"] == ["backend:hsm: backend_unavailable"]
    assert line["causes"] == ["backend:hsm: no token of serial 4711"]


@pytest.mark.parametrize(("answer", "level"), [(JWKS, "debug"), (errors.KeySetNotFound(), "info")])
def test_documents_that_machines_fetch_all_the_time_are_quiet_while_they_are_there(
    lines: io.StringIO, service: FakeService, answer: object, level: str
) -> None:
    service.answer = answer
    client(service).get("/s/.well-known/jwks.json")
    assert only(lines)["level"] == level


def test_a_detail_is_not_endless(lines: io.StringIO, service: FakeService) -> None:
    service.answer = errors.KeyNotFound("x y " * 1000)
    client(service).post(SIGN, json={})
    assert len(only(lines)["detail"]) == 300


@pytest.mark.parametrize("cls", list(server._REFUSED), ids=lambda cls: cls.__name__)
def test_what_the_server_refuses_before_any_route_has_its_line(lines: io.StringIO, cls: type[Exception]) -> None:
    secret = "kj_secret"
    made = cls(9000, 8000) if cls is parser.LimitRequestLine else cls(secret)
    answer = server.refusal(made, "192.0.2.1", RefusalCounts())
    assert answer is not None
    document = json.loads(answer.partition(b"\r\n\r\n")[2])
    line = only(lines)
    assert (line["event"], line["reason"], line["peer"]) == ("request_refused", cls.__name__, "192.0.2.1")
    assert line["request_id"] == document["request_id"]
    assert line["status"] == document["status"]
    assert document["type"].endswith(line["code"])
    assert line["level"] == LEVELS.get(document["status"], "info")
    assert secret not in lines.getvalue()
