"""gunicorn's settings, its refusals as problem documents, and what the supervisor hands to its children."""

import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.config import Config  # type: ignore[import-untyped]
from gunicorn.http import errors as parser  # type: ignore[import-untyped]

from kms_jwks.cli import supervisor
from kms_jwks.config import Settings, load_settings
from kms_jwks.http.protections import RefusalCounts
from kms_jwks.http.server import (
    _REFUSED,
    IncompleteHead,
    Worker,
    _stop_reading,
    gunicorn_settings,
    refusal,
    tls_context,
)
from tests.unit.test_client import certificate


def test_gunicorn_knows_every_setting() -> None:
    config = Config()
    for name, value in gunicorn_settings(Settings()).items():
        config.set(name, value)
    assert config.control_socket_disable is True
    assert config.preload_app is False
    assert config.header_map == "refuse"
    assert config.forwarded_allow_ips == []
    assert issubclass(config.worker_class, Worker)
    assert config.accesslog is None
    assert not config.is_ssl


def test_proxies_and_tls_are_passed_on() -> None:
    settings = Settings(
        forwarded_allow_ips=("10.0.0.0/8", "::1"),
        tls_cert=Path("cert.pem"),
        tls_key=Path("key.pem"),
        bind=("a:1", "b:2"),
    )
    found = gunicorn_settings(settings)
    assert found["forwarded_allow_ips"] == "10.0.0.0/8,::1"
    assert (found["certfile"], found["keyfile"]) == ("cert.pem", "key.pem")
    assert found["bind"] == ["a:1", "b:2"]


@pytest.mark.parametrize("cls", list(_REFUSED), ids=lambda cls: cls.__name__)
def test_what_gunicorn_refuses_is_a_problem_document(cls: type[Exception]) -> None:
    secret = "kj_secret"
    made = cls(9000, 8000) if cls is parser.LimitRequestLine else cls(secret)
    answer = refusal(made, "192.0.2.1", RefusalCounts())
    assert answer is not None
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    document = json.loads(body)
    assert int(status.split()[1]) == document["status"] == _REFUSED[cls][0]
    assert headers["Content-Type"] == "application/problem+json"
    assert headers["Content-Length"] == str(len(body))
    assert headers["Connection"] == "close"
    assert headers["X-Request-Id"] == document["request_id"]
    assert secret not in answer.decode()


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[tuple[socket.socket, ssl.SSLSocket]]:
    """A plain socket, and the server's end of it, which expects TLS."""
    crt, key = certificate(tmp_path)

    def make() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(crt, key)
        return context

    ours, theirs = socket.socketpair()
    context = tls_context(SimpleNamespace(certfile=crt, keyfile=key), make)
    with ours, context.wrap_socket(theirs, server_side=True, do_handshake_on_connect=False) as server:
        ours.settimeout(10)
        yield ours, server


def test_plain_http_where_https_is_expected_is_answered_in_plain_text(tls: tuple[socket.socket, ssl.SSLSocket]) -> None:
    ours, server = tls
    ours.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    with pytest.raises(ssl.SSLError) as refused:
        server.recv(100)
    worker: Any = SimpleNamespace(_refusals=RefusalCounts())
    Worker.handle_error(worker, None, server, ("192.0.2.1", 1), refused.value)
    server.close()
    head, _, body = ours.recv(65_536).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 403 Forbidden\r\n")
    assert "HTTPS" in json.loads(body)["detail"]


def test_a_request_that_is_late_is_answered_over_tls_too(tls: tuple[socket.socket, ssl.SSLSocket]) -> None:
    ours, server = tls
    handshake = threading.Thread(target=server.do_handshake)
    handshake.start()
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    with trusting.wrap_socket(ours) as client:
        handshake.join()
        client.sendall(b"GET /hea")
        assert server.recv(100) == b"GET /hea"
        _stop_reading(SimpleNamespace(sock=server))
        assert server.recv(100) == b""
        deadlines = SimpleNamespace(received=lambda _: False)
        worker: Any = SimpleNamespace(_refusals=RefusalCounts(), _deadlines=deadlines)
        Worker.handle_error(worker, None, server, ("192.0.2.1", 1), IncompleteHead())
        assert client.recv(65_536).startswith(b"HTTP/1.1 408 Request Timeout\r\n")


def test_what_is_not_the_callers_fault_is_left_to_gunicorn() -> None:
    assert refusal(ZeroDivisionError(), None, RefusalCounts()) is None
    assert refusal(parser.InvalidHeader("CONTENT-LENGTH"), None, RefusalCounts()).startswith(b"HTTP/1.1 400")  # type: ignore[union-attr]
    assert refusal(parser.InvalidResponseHeader("X-A"), None, RefusalCounts()) is None
    assert refusal(parser.InvalidResponseHeaderName("X A"), None, RefusalCounts()) is None


def test_a_defect_before_any_route_is_a_problem_document_too(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        worker: Any = SimpleNamespace(_refusals=RefusalCounts())
        Worker.handle_error(worker, None, theirs, ("192.0.2.1", 1), ZeroDivisionError("division by the secret"))
        head, _, body = ours.recv(65_536).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    assert json.loads(body)["type"].endswith(":internal_error")
    assert b"secret" not in body
    log = "".join(capsys.readouterr())
    assert json.loads(body)["request_id"] in log
    assert "ZeroDivisionError" in log


def test_refusals_are_counted_by_reason() -> None:
    counts = RefusalCounts()
    assert [counts.add(reason) for reason in ("LateHead", "InvalidHeader", "LateHead")] == [1, 1, 2]


def test_children_find_the_file_and_what_the_command_line_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.toml"
    config.write_text('workers = 3\nbind = ["127.0.0.1:9000"]\n')
    monkeypatch.setenv("KMS_JWKS_THREADS", "5")
    filed = load_settings(config)
    changed = Settings(**filed.model_dump() | {"routes": "public", "bind": ("127.0.0.1:1", "127.0.0.1:2")})
    environment = supervisor._environment(changed, config)
    assert environment["KMS_JWKS_CONFIG"] == str(config)
    assert environment["KMS_JWKS_ROUTES"] == "public"
    assert environment["KMS_JWKS_BIND"] == "127.0.0.1:1,127.0.0.1:2"
    assert "KMS_JWKS_WORKERS" not in environment, "what the file says can change with a HUP"
    for name in ("KMS_JWKS_CONFIG", "KMS_JWKS_ROUTES", "KMS_JWKS_BIND"):
        monkeypatch.setenv(name, environment[name])
    assert load_settings() == changed


def test_a_tls_context_is_made_anew_when_the_files_change(tmp_path: Path) -> None:
    files = SimpleNamespace(certfile=tmp_path / "c", keyfile=tmp_path / "k")
    for file in vars(files).values():
        file.touch()

    def make() -> ssl.SSLContext:
        return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    first = tls_context(files, make)
    assert first.minimum_version is ssl.TLSVersion.TLSv1_2
    assert tls_context(files, make) is first
    os.utime(files.certfile, (1, 1))
    assert tls_context(files, make) is not first
