"""The log: one set-up for structlog and the standard library, and nothing secret in a line, whoever wrote it."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import structlog

from kms_jwks.http import logs

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
        logging.getLogger("somebody.else").warning("they said %s", secret)
        try:
            raise ValueError(secret)
        except ValueError:
            logging.getLogger("somebody.else").exception("failed")
        assert "they said" in stream.getvalue()
        assert clean(stream.getvalue())


@pytest.mark.parametrize(
    "name", ["pin", "user_pin", "so-pin", "token", "authorization", "claims", "signature", "payload", "client_secret"]
)
def test_a_field_with_a_telling_name_is_masked_whatever_it_holds(stream: io.StringIO, name: str) -> None:
    structlog.get_logger().info("event", **{name: "1234"}, nested={name: {"a": "1234"}})
    assert "1234" not in stream.getvalue()


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
