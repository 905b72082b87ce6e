"""gunicorn as this service runs it: its settings, its hooks, its log lines, and problem documents for what it refuses.

gunicorn ships no types; what is `Any` here stays in this file.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gunicorn import util  # type: ignore[import-untyped]
from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]
from gunicorn.glogging import Logger  # type: ignore[import-untyped]
from gunicorn.http import errors as parser  # type: ignore[import-untyped]
from gunicorn.workers.gthread import ThreadWorker  # type: ignore[import-untyped]

from kms_jwks import errors
from kms_jwks.http import dispatch, logs, problems
from kms_jwks.http.app import App, create_app
from kms_jwks.service import Service

if TYPE_CHECKING:
    from collections.abc import Callable

    from kms_jwks.config import Settings

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a memory file system, where a heartbeat never waits for a disk


def gunicorn_settings(settings: Settings) -> dict[str, Any]:
    """Every gunicorn setting that is not its default. Seconds and bytes."""
    return {
        "bind": list(settings.bind),
        "workers": settings.workers,
        "worker_class": type("Worker", (Worker,), {"request_timeout": float(settings.request_timeout)}),
        "threads": settings.threads,
        # How long a worker may be without a sign of life; requests have their limit on their connections.
        "timeout": max(settings.request_timeout, 30),
        "graceful_timeout": settings.graceful_timeout,
        "keepalive": settings.keepalive,
        "preload_app": False,  # nothing of a module may be opened before the fork
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
    """gunicorn's `ssl_context` hook, called for every connection: one context until the files change on the disk."""
    key = tuple(Path(file).stat().st_mtime_ns for file in (config.certfile, config.keyfile))
    found = _tls_contexts.get(key)
    if found is None:
        found = make()
        found.minimum_version = ssl.TLSVersion.TLSv1_2
        _tls_contexts.clear()
        _tls_contexts[key] = found
    return found


def stop_service(server: Any, worker: Any) -> None:
    """gunicorn's `worker_exit` hook: the worker leaves the register, so nobody waits for it.

    A thread that a module holds would be waited for at the interpreter's end, and that for ever: then the process ends
    here. gunicorn's arbiter calls this too, for workers that are gone; there they have no service.
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
    """gunicorn's `pre_request` hook. It gives the app two calls that WSGI has no way for, on `wsgi.input`:

    `close_connection`, for an answer with `Connection: close`, and `received`, once the request has been read.
    """
    req.body.close_connection = req.force_close
    req.body.received = lambda: worker.received() or req.force_close()


class Log(Logger):  # type: ignore[misc]
    """gunicorn's messages through our one log."""

    def setup(self, cfg: Any) -> None:
        """Keep gunicorn from adding handlers of its own."""
        self.cfg = cfg
        self._access_log_enabled = False
        self.loglevel = self.LOG_LEVELS.get(cfg.loglevel, logging.INFO)
        for log in (self.error_log, self.access_log):
            log.handlers[:] = []
            log.propagate = True
            log.setLevel(max(self.loglevel, logging.INFO))


# gunicorn's parser refuses these before any of our code sees the request. Status and what to say; never what was sent.
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
}
_FRAMING = frozenset({"CONTENT-LENGTH", "TRANSFER-ENCODING"})


def refusal(error: Exception) -> bytes | None:
    """The whole HTTP answer to a request that gunicorn could not read; None for errors that are not the caller's."""
    found = next((_REFUSED[cls] for cls in type(error).__mro__ if cls in _REFUSED), None)
    if found is None:
        return None
    status, problem = found
    if isinstance(error, parser.InvalidHeader) and error.hdr in _FRAMING:
        problem = errors.LengthMismatch()
    request_id = dispatch.request_id(None)
    response = problems.response(problem, request_id, status=status)
    response.headers += [
        ("X-Request-Id", request_id),
        ("Content-Length", str(len(response.body))),
        ("Connection", "close"),
    ]
    head = "".join(f"{name}: {value}\r\n" for name, value in response.headers)
    return f"HTTP/1.1 {status} Refused\r\n{head}\r\n".encode("latin-1") + response.body


class Worker(ThreadWorker):  # type: ignore[misc]
    """gunicorn's threaded worker, with four changes: its refusals are problem documents, its log repeats nothing that
    was sent, a caller who sends a request drop by drop has `request_timeout` for it and not for ever, and it ends by
    itself, gracefully, when it has lost too many threads to a module; gunicorn then starts another one."""

    alive: bool
    request_timeout = 30.0
    """Seconds from a request's first byte to its last."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reading: dict[int, tuple[float, Any]] = {}
        """By thread: until when the request must have been read, and from which connection."""
        self._handling: set[int] = set()
        """Threads that are at a request, or wait for a new connection's first one."""
        self._lost: frozenset[int] = frozenset()
        """Threads that a module holds."""
        self._ended = False

    def handle(self, conn: Any) -> Any:
        """One request on a connection, in a thread."""
        thread = threading.get_ident()
        self._reading[thread] = (time.monotonic() + self.request_timeout, conn)
        self._handling.add(thread)
        try:
            return super().handle(conn)
        finally:
            self._handling.discard(thread)
            self._reading.pop(thread, None)

    def received(self) -> bool:
        """Called by the thread that has read its request; False when it was too late and the connection is spoilt."""
        return self._reading.pop(threading.get_ident(), None) is not None

    def notify(self) -> None:
        """Called by the main thread every second at least."""
        super().notify()
        self._end_slow_requests()
        service = _service_of(self)
        if service is None or self._ended:
            return
        self._lost = service.backends.lost_threads()
        if self._lost and self.alive:
            self.set_accept_enabled(True)
        if self.alive:
            if service.worn_out() is not None:
                self.alive = False  # as max_requests does it: no new connections, what is under way is finished
        elif self._lost and self._handling <= self._lost and not (self.keepalived_conns and self._has_threads()):
            # Nobody is left who could still be answered.
            self._ended = True
            raise SystemExit(0)

    def set_accept_enabled(self, enabled: bool) -> None:
        """Leave new connections to other workers while no thread is left to answer them."""
        super().set_accept_enabled(enabled and self._has_threads())

    def _has_threads(self) -> bool:
        return len(self._lost) < int(self.cfg.threads)

    def _end_slow_requests(self) -> None:
        now = time.monotonic()
        for thread, (end, conn) in list(self._reading.items()):
            if end <= now and self._reading.pop(thread, None) is not None:
                # The reading thread sees the end of the stream; an answer that is on its way still leaves. Not the
                # method of an SSL socket, which would go on in plain text.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(conn.sock, socket.SHUT_RD)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: Exception) -> None:
        """Answer what could not be read."""
        answer = refusal(exc)
        if answer is None:
            super().handle_error(req, client, addr, exc)
            return
        self.log.warning("request refused: %s from %s", type(exc).__name__, addr[0] if addr else "-")
        try:
            util.write_nonblock(client, answer)
        except OSError:
            self.log.debug("the refusal could not be sent")


class _Application(BaseApplication):  # type: ignore[misc]
    """gunicorn's view of the service. A HUP reads the settings again and keeps the old ones where they are unusable.

    The backends are made here, before the fork, and open nothing here: a PIN from standard input can be read but once.
    """

    def __init__(self, settings: Settings, reload: Callable[[], Settings]) -> None:
        self._settings = settings
        self._reload = reload
        # By name, as gunicorn loads applications: the composition root stands above this layer.
        self._wiring = importlib.import_module("kms_jwks.wiring")
        self._backends = self._wiring.make_backends(settings)
        super().__init__()

    def load_config(self) -> None:
        for name, value in gunicorn_settings(self._settings).items():
            self.cfg.set(name, value)

    def load(self) -> App:
        """The application of one worker. What it is made of was checked before the fork: an exception here would end
        the whole server."""
        service = Service(self._settings, self._wiring.make_store(self._settings), self._backends)
        service.start()
        return create_app(service)

    def reload(self) -> None:
        try:
            settings = self._reload()
            if not any(backend.reads_stdin for backend in settings.backends.values()):
                self._backends = self._wiring.make_backends(settings)
        except errors.Error as error:
            logging.getLogger("gunicorn.error").error("settings kept as they were: %s", error.detail)
            return
        self._settings = settings
        logs.configure(settings.log_level, settings.log_format)
        super().reload()


def run_gunicorn(settings: Settings) -> None:
    """Serve until told to stop. Ends by SystemExit, whose code is gunicorn's."""
    from kms_jwks.config import load_settings

    logs.configure(settings.log_level, settings.log_format)
    _Application(settings, load_settings).run()
