"""The Flask app: it registers the table's rows, turns WSGI into Request and Response, and does nothing else."""

from __future__ import annotations

import contextlib
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import structlog
from flask import Flask, request
from flask import Response as FlaskResponse
from flask.sessions import SecureCookieSessionInterface
from werkzeug.exceptions import HTTPException

from kms_jwks import errors
from kms_jwks.http import dispatch, problems
from kms_jwks.http.exchange import Request, Response
from kms_jwks.http.routes import Route, Side, served
from kms_jwks.service.context import RequestContext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse

    from kms_jwks.service import Service

    Environ = dict[str, Any]

log = structlog.get_logger(__name__)

_STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}
_DRAINED = 2_097_152
"""Bytes of a refused body that are read for nothing."""
_BODILESS = frozenset({204, 304})
_QUIET = frozenset(route.path for route in served("all") if route.side & Side.PUBLIC)
"""Routes that machines ask all the time, documents and health: their successes are logged at level debug.

Writing a line costs more than serving a JWKS.
"""
_NEVER: Callable[[], None] = lambda: None  # noqa: E731


class _NoSessions(SecureCookieSessionInterface):
    """There are no cookies here."""

    def open_session(self, app: Flask, request: Any) -> Any:
        return self.make_null_session(app)

    def is_null_session(self, obj: object) -> bool:
        return True


class _Answer(FlaskResponse):
    """Werkzeug's, written as it stands: what is in it is complete, and building its headers anew costs most of it."""

    default_mimetype = None
    _made: Response
    _release: Callable[[], None]

    @classmethod
    def of(cls, made: Response, release: Callable[[], None]) -> _Answer:
        """The answer, and what is to be called once it has left."""
        answer = cls()
        answer._made, answer._release = made, release
        answer.status_code = made.status
        return answer

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        made = self._made
        headers = made.headers
        if made.status not in _BODILESS:
            headers = [*headers, ("Content-Length", str(len(made.body)))]
        start_response(_STATUS_LINES[made.status], headers)
        body = () if environ["REQUEST_METHOD"] == "HEAD" else (made.body,)
        return _Leaving(body, self._release) if self._release is not _NEVER else body


class _Leaving:
    """A body whose server says when it has written it (PEP 3333 `close`)."""

    __slots__ = ("_body", "close")

    def __init__(self, body: tuple[bytes, ...], close: Callable[[], None]) -> None:
        self._body = body
        self.close = close

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)


class App(Flask):
    """Flask without what an API does not use. `service` is what its endpoints work on."""

    session_interface = _NoSessions()
    service: Service


def create_app(service: Service) -> App:
    """The WSGI application for one worker, with the rows that `settings.routes` leaves."""
    app = App(__name__, static_folder=None, template_folder=None)
    app.service = service
    app.url_map.merge_slashes = False
    app.url_map.redirect_defaults = False
    adapter = _Adapter(service)
    for route in served(service.settings.routes):
        app.add_url_rule(
            _rule(route.path),
            endpoint=f"{route.method} {route.path}",
            view_func=adapter.view(route),
            methods=[route.method],
            provide_automatic_options=False,
        )
    app.register_error_handler(HTTPException, adapter.refuse)
    app.register_error_handler(Exception, adapter.defect)
    return app


def _rule(path: str) -> str:
    """The template as Werkzeug writes it. A kid given by somebody else may hold slashes, so it takes the rest."""
    return path.replace("{kid}", "<path:kid>").replace("{", "<").replace("}", ">")


class _Adapter:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._limits = dispatch.Limits.of(service.settings)
        self._timeout = float(service.settings.request_timeout)

    def view(self, route: Route) -> Callable[..., FlaskResponse]:
        """The view function of a row."""

        def respond(**params: str) -> FlaskResponse:
            started = time.perf_counter()
            environ: Environ = request.environ
            request_id = dispatch.request_id(environ.get("HTTP_X_REQUEST_ID"))
            release = _NEVER
            try:
                exchange = _request(route, environ, params, request_id, self._limits, self._timeout)
                if route.hot:
                    # After the body, which a caller may send as slowly as it likes; before the snapshot is read.
                    release = self._service.pin()
                response = dispatch.answer(self._service, route, exchange, self._limits)
            except errors.Error as error:
                response = problems.response(error, request_id)
                _last_on_its_connection(environ)
            except BaseException:
                release()
                raise
            return _finish(response, environ, request_id, started, route, release)

        return respond

    def refuse(self, error: HTTPException) -> FlaskResponse:
        """What Werkzeug refuses before any route runs."""
        started = time.perf_counter()
        request_id = dispatch.request_id(request.environ.get("HTTP_X_REQUEST_ID"))
        _last_on_its_connection(request.environ)
        if error.code == 405:
            allow = tuple(sorted(getattr(error, "valid_methods", None) or ()))
            response = problems.response(errors.MethodNotAllowed(), request_id, allow=allow)
        elif error.code is not None and 400 <= error.code < 500 and error.code != 404:
            response = problems.response(errors.InvalidRequest(), request_id)
        else:
            response = problems.response(errors.RouteNotFound(), request_id)
        return _finish(response, request.environ, request_id, started, None, _NEVER)

    def defect(self, error: Exception) -> FlaskResponse:
        """What went wrong outside of every endpoint."""
        started = time.perf_counter()
        request_id = dispatch.request_id(request.environ.get("HTTP_X_REQUEST_ID"))
        return _finish(problems.unexpected(request_id), request.environ, request_id, started, None, _NEVER)


def _request(
    route: Route, environ: Environ, params: dict[str, str], request_id: str, limits: dispatch.Limits, timeout: float
) -> Request:
    connection = environ.get("gunicorn.socket")
    if connection is not None:
        # A peer that stops sending its body, or reading its answer, must not hold a thread and a snapshot for ever.
        connection.settimeout(timeout)
    if not all(value.isprintable() for value in params.values()):
        raise errors.RouteNotFound
    body = b""
    if route.request is not None:
        body = dispatch.read_body(
            route,
            limits,
            length=environ.get("CONTENT_LENGTH"),
            chunked="HTTP_TRANSFER_ENCODING" in environ,
            read=_reader(environ),
        )
    getattr(environ["wsgi.input"], "received", _NEVER)()

    def header(name: str) -> str | None:
        key = name.upper().replace("-", "_")
        value: str | None = environ.get("CONTENT_TYPE" if key == "CONTENT_TYPE" else f"HTTP_{key}")
        return value or None

    return Request(
        method=environ["REQUEST_METHOD"],
        params=params,
        query=lambda name: _query(environ, name),
        header=header,
        body=body,
        context=RequestContext(
            authorization=header("authorization"),
            request_id=request_id,
            peer=environ.get("REMOTE_ADDR"),
            route=route.path,
        ),
    )


def _query(environ: Environ, name: str) -> str | None:
    try:
        values = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True, max_num_fields=32).get(name)
    except ValueError:
        raise errors.InvalidField("The query has too many parameters.") from None
    if values is not None and len(values) > 1:
        raise errors.InvalidField(f"{name}: stands twice in the query", fields={"field": name})
    return str(values[0]) if values is not None else None


def _reader(environ: Environ) -> dispatch.Read:
    def read(limit: int) -> bytes:
        stream = environ["wsgi.input"]
        parts: list[bytes] = []
        while limit > 0:
            try:
                part = stream.read(min(limit, 65_536))
            except Exception as error:
                # Timeouts, broken chunks, lost connections: each server has classes of its own for them.
                raise errors.LengthMismatch("The body broke off, or its chunks are malformed.") from error
            if not part:
                break
            parts.append(part)
            limit -= len(part)
        return b"".join(parts)

    return read


def _last_on_its_connection(environ: Environ) -> None:
    """Before a refusal that leaves a body unread: say that the connection ends here, and take in what is still coming.

    A socket that is closed with bytes unread resets the connection, and the answer with it. A body that announces to
    be far too long is not waited for.
    """
    length = environ.get("CONTENT_LENGTH", "0")
    if length == "0" and "HTTP_TRANSFER_ENCODING" not in environ:
        return
    stream = environ["wsgi.input"]
    getattr(stream, "close_connection", _NEVER)()
    if length.isdigit() and int(length[:20]) <= _DRAINED:
        with contextlib.suppress(Exception):
            left = _DRAINED
            while left > 0 and (part := stream.read(min(left, 65_536))):
                left -= len(part)


def _finish(
    response: Response,
    environ: Environ,
    request_id: str,
    started: float,
    route: Route | None,
    release: Callable[[], None],
) -> FlaskResponse:
    response.headers.append(("X-Request-Id", request_id))
    response.headers.append(("X-Content-Type-Options", "nosniff"))
    quiet = route is not None and route.path in _QUIET and response.status < 400
    write = log.debug if quiet else log.info
    write(
        "request",
        request_id=request_id,
        method=environ["REQUEST_METHOD"],
        route=route.path if route is not None else None,
        path=environ["PATH_INFO"][:256],
        status=response.status,
        ms=round((time.perf_counter() - started) * 1000, 3),
        peer=environ.get("REMOTE_ADDR"),
    )
    return _Answer.of(response, release)
