"""gunicorn as this service runs it: its settings, hooks, worker and log, and problem documents for what it refuses.

gunicorn ships no types: `Any` stays within this file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import ssl
import threading
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import structlog
from gunicorn import util  # type: ignore[import-untyped]
from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]
from gunicorn.glogging import Logger  # type: ignore[import-untyped]
from gunicorn.http import RequestParser  # type: ignore[import-untyped]
from gunicorn.http import errors as parser
from gunicorn.http.message import Request  # type: ignore[import-untyped]
from gunicorn.workers.gthread import ThreadWorker  # type: ignore[import-untyped]

from kms_jwks import errors
from kms_jwks.http import dispatch, logs, problems
from kms_jwks.http.app import App, create_app
from kms_jwks.http.protections import RefusalCounts, RequestDeadlines, Verdict, WornOutCheck

if TYPE_CHECKING:
    from collections.abc import Callable

    from kms_jwks.backends.calling import Backends
    from kms_jwks.config import Settings
    from kms_jwks.http.exchange import Response
    from kms_jwks.service import Service

log = structlog.get_logger(__name__)

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a memory file system: a worker's heartbeat never waits for a disk


def gunicorn_settings(settings: Settings) -> dict[str, Any]:
    """Every gunicorn setting that differs from its default. Seconds and bytes."""
    return {
        "bind": list(settings.bind),
        "workers": settings.workers,
        "worker_class": type("Worker", (Worker,), {"request_timeout": float(settings.request_timeout)}),
        "threads": settings.threads,
        # How long a worker may show no heartbeat; requests have a limit of their own on their connections.
        "timeout": max(settings.request_timeout, 30),
        "graceful_timeout": settings.graceful_timeout,
        "keepalive": settings.keepalive,
        "preload_app": False,  # no module may be opened before the fork
        "control_socket_disable": True,
        "limit_request_line": 8190,  # a kid of 255 characters has up to 3060 when percent-encoded
        "limit_request_fields": 64,
        "limit_request_field_size": 8190,
        "header_map": "refuse",
        "forwarded_allow_ips": ",".join(settings.forwarded_allow_ips),
        "forwarder_headers": "",
        "secure_scheme_headers": {"X-FORWARDED-PROTO": "https"},
        "certfile": str(settings.tls_cert) if settings.tls_cert else None,
        "keyfile": str(settings.tls_key) if settings.tls_key else None,
        "ssl_context": tls_context,
        "accesslog": None,
        "logger_class": Log,
        "loglevel": settings.log_level,
        "worker_tmp_dir": str(SHARED_MEMORY) if os.access(SHARED_MEMORY, os.W_OK) else None,
        "proc_name": "kms-jwks",
        "pre_request": connect_app,
        "worker_exit": stop_service,
    }


_tls_contexts: dict[tuple[int, ...], ssl.SSLContext] = {}


def tls_context(config: Any, make: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """gunicorn's `ssl_context` hook, called for every connection: one context until the files change."""
    key = tuple(Path(file).stat().st_mtime_ns for file in (config.certfile, config.keyfile))
    found = _tls_contexts.get(key)
    if found is None:
        found = make()
        found.minimum_version = ssl.TLSVersion.TLSv1_2
        # Once `_stop_reading` has ended a late request, OpenSSL would refuse to send the answer.
        found.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
        _tls_contexts.clear()
        _tls_contexts[key] = found
    return found


def stop_service(server: Any, worker: Any) -> None:
    """gunicorn's `worker_exit` hook: the worker deregisters, so that no change waits for its confirmation.

    The interpreter would wait for ever for a thread that a module holds: in that case the process ends here. gunicorn's
    arbiter calls this hook too, for workers that have ended; these have no service there.
    """
    service = _service_of(worker)
    if service is None:
        return
    service.stop()
    if service.backends.stuck():
        logging.shutdown()
        os._exit(0)


def _service_of(worker: Any) -> Service | None:
    return getattr(getattr(worker, "wsgi", None), "service", None)


def connect_app(worker: Any, req: Any) -> None:
    """gunicorn's `pre_request` hook. It adds two functions to `wsgi.input` that WSGI itself does not offer:

    `close_connection` makes the answer end the connection, `received` says that the request has been read.
    """
    req.body.close_connection = req.force_close
    req.body.received = lambda: worker.received() or req.force_close()


class Log(Logger):  # type: ignore[misc]
    """gunicorn's messages, through the log that `logs.configure` set up."""

    def setup(self, cfg: Any) -> None:
        """Keep gunicorn from adding handlers of its own."""
        self.cfg = cfg
        self._access_log_enabled = False
        self.loglevel = self.LOG_LEVELS.get(cfg.loglevel, logging.INFO)
        for log in (self.error_log, self.access_log):
            log.handlers[:] = []
            log.propagate = True
            log.setLevel(max(self.loglevel, logging.INFO))


# --- what is refused before any route ---------------------------------------------------------------------------------


class IncompleteHead(parser.ParseException):  # type: ignore[misc]
    """The connection ended within a request's head."""


class LateHead(IncompleteHead):
    """The deadline passed before the end of a request's head."""


_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]*)?")
"""A Host header (RFC 9110 §7.2): reg-name, IPv4 address or IP-literal, and a port."""


class CheckedRequest(Request):  # type: ignore[misc]
    """gunicorn's request, held against rules of RFC 9112 that gunicorn leaves to the application.

    A request of HTTP/1.1 has a Host (§3.2). The target has no fragment (§3.2.1). The only transfer coding is chunked,
    alone: gunicorn takes `gzip, chunked` and passes the compressed body on (§6.1). TE does not name chunked (RFC 9110
    §10.1.4). Raises gunicorn's own exceptions, and IncompleteHead.
    """

    def __init__(self, *arguments: Any) -> None:
        try:
            super().__init__(*arguments)
        except parser.NoMoreData as error:
            raise IncompleteHead from error
        if "#" in self.uri:
            raise parser.InvalidRequestLine(self.uri)
        host = None
        for name, value in self.headers:
            if name == "HOST":
                host = value
            elif name == "TRANSFER-ENCODING" and value.lower() != "chunked":
                raise parser.UnsupportedTransferCoding(value)
            elif name == "TE" and "chunked" in re.split(r"[\s,;]+", value.lower()):
                raise parser.InvalidHeader("TE")
        if not _HOST.fullmatch(host or "") or (host is None and self.version >= (1, 1)):
            raise parser.InvalidHeader("HOST")


# The status, and a text that repeats nothing of what was sent.
_REFUSED: dict[type[Exception], tuple[int, errors.InvalidRequest]] = {
    parser.LimitRequestLine: (414, errors.InvalidRequest("The request line is too long.")),
    parser.LimitRequestHeaders: (431, errors.InvalidRequest("The header fields are too large or too many.")),
    parser.ExpectationFailed: (417, errors.InvalidRequest("The only expectation known is 100-continue.")),
    parser.UnsupportedTransferCoding: (501, errors.InvalidRequest("The only transfer coding known is chunked.")),
    parser.InvalidRequestMethod: (400, errors.InvalidRequest("The method is not one of HTTP.")),
    parser.InvalidRequestLine: (400, errors.InvalidRequest("The request line is malformed.")),
    parser.InvalidHTTPVersion: (400, errors.InvalidRequest("The HTTP version is not supported.")),
    parser.InvalidHeader: (400, errors.InvalidRequest("A header field is malformed, or contradicts another.")),
    parser.InvalidHeaderName: (400, errors.InvalidRequest("A header field's name is not allowed.")),
    parser.ObsoleteFolding: (400, errors.InvalidRequest("A header field is folded over several lines.")),
    parser.InvalidSchemeHeaders: (400, errors.InvalidRequest("The proxy's scheme headers contradict each other.")),
    parser.InvalidChunkSize: (400, errors.LengthMismatch("A chunk's size is malformed.")),
    parser.InvalidChunkExtension: (400, errors.LengthMismatch("A chunk's extension is malformed.")),
    parser.ChunkMissingTerminator: (400, errors.LengthMismatch("A chunk does not end where it should.")),
    IncompleteHead: (400, errors.InvalidRequest("The connection ended within the request's head.")),
    LateHead: (408, errors.InvalidRequest("The request's head did not arrive in time.")),
    ssl.SSLError: (403, errors.InvalidRequest("The TLS connection failed; this address answers HTTPS alone.")),
}
_HEADERS = {
    "CONTENT-LENGTH": errors.LengthMismatch(),
    "TRANSFER-ENCODING": errors.LengthMismatch(),
    "HOST": errors.InvalidRequest("The Host header is missing, malformed, or stands twice."),
    "TE": errors.InvalidRequest("The TE header lists chunked, which every recipient takes and no sender may list."),
}
"""What InvalidHeader says of these headers."""


def refusal(error: Exception, peer: str | None, counts: RefusalCounts) -> bytes | None:
    """The whole HTTP answer to a request that was refused before any route, None for a defect.

    Counts the refusal, and writes its log line; `count` in it is how many of its reason this worker has refused.
    """
    found = next((_REFUSED[cls] for cls in type(error).__mro__ if cls in _REFUSED), None)
    if found is None or isinstance(error, parser.InvalidResponseHeader | parser.InvalidResponseHeaderName):
        return None
    status, problem = found
    if isinstance(error, parser.InvalidHeader):
        problem = _HEADERS.get(error.hdr, problem)
    reason = (isinstance(error, ssl.SSLError) and getattr(error, "reason", None)) or type(error).__name__
    request_id = _request_id()
    line = {
        "request_id": request_id,
        "status": status,
        "peer": peer,
        "code": problem.code,
        "detail": problem.detail,
        "reason": reason,
        "count": counts.add(reason),
    }
    if status >= 500:
        log.warning("request_refused", **line)
    else:
        log.info("request_refused", **line)
    return _whole(problems.response(problem, request_id, status=status), request_id)


def _request_id() -> str:
    return dispatch.context_of(lambda _: None, None, None).request_id


def _whole(response: Response, request_id: str) -> bytes:
    """An answer as it is sent, with the end of the connection."""
    response.headers += [
        ("X-Request-Id", request_id),
        ("Content-Length", str(len(response.body))),
        ("Connection", "close"),
    ]
    head = "".join(f"{name}: {value}\r\n" for name, value in response.headers)
    status = HTTPStatus(response.status)
    return f"HTTP/1.1 {status.value} {status.phrase}\r\n{head}\r\n".encode("latin-1") + response.body


class Worker(ThreadWorker):  # type: ignore[misc]
    """gunicorn's threaded worker with this service's protections connected, and with refusals as problem documents."""

    alive: bool
    request_timeout = 30.0
    """Seconds from a request's first byte to its last."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadlines = RequestDeadlines(self.request_timeout, _stop_reading)
        self._worn_out = WornOutCheck(int(self.cfg.threads))
        self._refusals = RefusalCounts()
        self._exiting = False

    def init_process(self) -> None:
        """After the fork: gunicorn's parser makes its requests by `CheckedRequest`."""
        RequestParser.mesg_class = CheckedRequest
        super().init_process()

    def handle(self, conn: Any) -> Any:
        """One request on a connection, in a thread."""
        thread = threading.get_ident()
        self._deadlines.begin(thread, conn)
        self._worn_out.enter(thread)
        try:
            return super().handle(conn)
        finally:
            self._worn_out.leave(thread)
            self._deadlines.forget(thread)

    def received(self) -> bool:
        """Called by the thread that has read its request; False when the connection cannot be used again."""
        return self._deadlines.received(threading.get_ident())

    def notify(self) -> None:
        """Called by the main thread at least once a second."""
        super().notify()
        self._deadlines.enforce()
        service = _service_of(self)
        if service is None or self._exiting:
            return
        open_connections = bool(self.keepalived_conns)
        verdict = self._worn_out.check(service, stopping=not self.alive, open_connections=open_connections)
        if self.alive and self._worn_out.has_lost_threads:
            self.set_accept_enabled(True)
        if verdict is Verdict.STOP:
            self.alive = False  # as max_requests does it
        elif verdict is Verdict.EXIT:
            self._exiting = True
            raise SystemExit(0)

    def set_accept_enabled(self, enabled: bool) -> None:
        """Leave new connections to other workers while no thread is left to answer them."""
        super().set_accept_enabled(enabled and self._worn_out.has_threads)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: Exception) -> None:
        """Answer a request that was refused before any route, or that met a defect, with a problem; log it."""
        if isinstance(exc, IncompleteHead) and not self._deadlines.received(threading.get_ident()):
            exc = LateHead()
        peer = addr[0] if addr else None
        answer = refusal(exc, peer, self._refusals)
        if answer is None:
            request_id = _request_id()
            log.error("request_failed", request_id=request_id, peer=peer, exc_info=exc)
            answer = _whole(problems.response(errors.InternalError(), request_id), request_id)
        try:
            if getattr(exc, "reason", None) == "HTTP_REQUEST":
                _answer_in_plain_text(client, answer)
            else:
                util.write_nonblock(client, answer)
        except OSError:
            self.log.debug("the refusal could not be sent")


def _answer_in_plain_text(client: ssl.SSLSocket, answer: bytes) -> None:
    """Answer a peer that spoke HTTP where HTTPS is expected. What it sent is read first: else the kernel resets."""
    client.settimeout(0)
    with contextlib.suppress(OSError):
        socket.socket.recv(client, 65_536)
    socket.socket.send(client, answer)


def _stop_reading(conn: Any) -> None:
    """The reading thread sees the end of the stream; an answer that is on its way still leaves.

    Not by the method of an SSL socket, which would go on in plain text.
    """
    with contextlib.suppress(OSError):
        socket.socket.shutdown(conn.sock, socket.SHUT_RD)


class ServiceMaker(Protocol):
    """Makes the service of one worker process, after the fork."""

    def __call__(self, settings: Settings, *, backends: Backends) -> Service:
        """The service, not started; opens nothing."""


class _Application(BaseApplication):  # type: ignore[misc]
    """gunicorn's view of the service. A HUP reads the settings again and keeps the old ones where they are unusable.

    The backends are made here, before the fork, because a PIN from standard input can be read only once. Making them
    opens nothing.
    """

    def __init__(
        self,
        settings: Settings,
        reload: Callable[[], Settings],
        make_backends: Callable[[Settings], Backends],
        make_service: ServiceMaker,
    ) -> None:
        self._settings = settings
        self._reload = reload
        self._make_backends = make_backends
        self._make_service = make_service
        self._backends = make_backends(settings)
        super().__init__()

    def load_config(self) -> None:
        for name, value in gunicorn_settings(self._settings).items():
            self.cfg.set(name, value)

    def load(self) -> App:
        """The application of one worker. Its settings were checked before the fork: an exception here would end the
        whole server."""
        service = self._make_service(self._settings, backends=self._backends)
        service.start()
        return create_app(service)

    def reload(self) -> None:
        from kms_jwks.config import prepare_state_dir

        try:
            settings = self._reload()
            if not any(backend.reads_stdin for backend in settings.backends.values()):
                self._backends = self._make_backends(settings)
            prepare_state_dir(settings)
        except errors.Error as error:
            log.error("reload_refused", detail=error.detail, effect="The settings stay as they were.")
            return
        self._settings = settings
        logs.configure(settings.log_level, settings.log_format)
        super().reload()


def run_gunicorn(
    settings: Settings, *, make_backends: Callable[[Settings], Backends], make_service: ServiceMaker
) -> None:
    """Serve until told to stop. Ends by SystemExit with gunicorn's exit code.

    `make_backends` is called before the fork and again at a reload, unless a PIN comes from standard input;
    `make_service` in each worker.
    """
    from kms_jwks.config import load_settings

    logs.configure(settings.log_level, settings.log_format)
    _Application(settings, load_settings, make_backends, make_service).run()
