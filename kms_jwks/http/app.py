"""The Flask app: it registers the rows of the route table and drives `dispatch` over WSGI."""

from __future__ import annotations

import contextlib
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from flask import Flask, request
from flask import Response as FlaskResponse
from flask.sessions import SecureCookieSessionInterface
from werkzeug.exceptions import HTTPException
from werkzeug.routing import BaseConverter
from werkzeug.wsgi import ClosingIterator

from kms_jwks import errors
from kms_jwks.http import dispatch, problems
from kms_jwks.http.exchange import Request, Response, Route, Side
from kms_jwks.http.routes import ROUTES, served
from kms_jwks.service.context import RequestContext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import StartResponse

    from kms_jwks.service import Service

    Environ = dict[str, Any]

_STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}
_CHUNK = 65_536
"""Bytes that one read of a body asks for at most."""
_DRAINED = 2_097_152
"""Bytes of a refused body that are read and dropped at most."""
_BODILESS = frozenset({204, 304})
_NOTHING: Callable[[], None] = lambda: None  # noqa: E731


class _NoSessions(SecureCookieSessionInterface):
    """The API sets no cookies."""

    def open_session(self, app: Flask, request: Any) -> Any:
        return self.make_null_session(app)

    def is_null_session(self, obj: object) -> bool:
        return True


class _Answer(FlaskResponse):
    """Flask's response type, sent without Werkzeug's handling of headers, which costs more than all the rest."""

    default_mimetype = None
    _made: Response
    _release: Callable[[], None]

    @classmethod
    def of(cls, made: Response, release: Callable[[], None]) -> _Answer:
        """The answer, and the function that the server calls once it has sent it."""
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
        # The server calls `close` when it has sent the body (PEP 3333): that releases the snapshot.
        return ClosingIterator(body, self._release) if self._release is not _NOTHING else body


class App(Flask):
    """Flask without the parts that an API does not use. `service` is passed to the endpoints."""

    session_interface = _NoSessions()
    service: Service


def create_app(service: Service) -> App:
    """The WSGI application for one worker, with the rows that `settings.routes` keeps."""
    app = App(__name__, static_folder=None, template_folder=None)
    app.service = service
    app.url_map.merge_slashes = False
    app.url_map.converters["kid"] = _KidConverter
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
    """The template in Werkzeug's syntax. A kid may hold slashes, also at its beginning."""
    kids = path.replace("{kid}", "<kid:kid>").replace("{version}", "<kid:version>")
    return kids.replace("{", "<").replace("}", ">")


_AFTER_A_KID = sorted({tail for route in ROUTES if (tail := route.path.partition("{version}")[2])})


class _KidConverter(BaseConverter):
    """A kid in a path: any text, slashes included. What a route ends with (`/safety`) is not part of it.

    So a wrong method on such a route is 405. A kid that ends in the same way is named in its other form (`wire`).
    """

    part_isolating = False
    regex = f"(?:(?!(?:{'|'.join(_AFTER_A_KID)})$).)+?"
    weight = 200


class _Adapter:
    """Drives `dispatch` with requests as Flask and a WSGI server present them."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._limits = dispatch.Limits.of(service.settings)
        self._timeout = float(service.settings.request_timeout)

    def view(self, route: Route) -> Callable[..., FlaskResponse]:
        """The view function of a row."""
        quiet = bool(route.side & Side.PUBLIC)

        def respond(**params: str) -> FlaskResponse:
            started = time.perf_counter()
            environ: Environ = request.environ
            context = _context(environ, route)
            release = _NOTHING
            try:
                exchange = self._read(route, environ, params, context)
                if route.hot:
                    # After the body, whose sender may be slow, and before the snapshot is read for the answer.
                    release = self._service.sync.pin()
                response = dispatch.answer(self._service, route, exchange, self._limits)
            except Exception as error:  # noqa: BLE001 - the outermost frame: the caller gets a problem whatever it is
                response = problems.for_exception(error, context.request_id)
                _read_rest(environ)
            except BaseException:
                release()
                raise
            try:
                return _finish(response, environ, context, params, started, release, quiet=quiet)
            except BaseException:
                release()
                raise

        return respond

    def refuse(self, error: HTTPException) -> FlaskResponse:
        """Answer what Werkzeug refuses before any route runs."""
        started = time.perf_counter()
        context = _context(request.environ, None)
        _read_rest(request.environ)
        if error.code == 405:
            allow = tuple(sorted(getattr(error, "valid_methods", None) or ()))
            response = problems.response(errors.MethodNotAllowed(), context.request_id, allow=allow)
        elif error.code is not None and 400 <= error.code < 500 and error.code != 404:
            response = problems.response(errors.InvalidRequest(), context.request_id)
        else:
            response = problems.response(errors.RouteNotFound(), context.request_id)
        return _finish(response, request.environ, context, {}, started, _NOTHING)

    def defect(self, error: Exception) -> FlaskResponse:
        """Answer an exception from outside of every view."""
        started = time.perf_counter()
        context = _context(request.environ, None)
        response = problems.for_exception(error, context.request_id)
        return _finish(response, request.environ, context, {}, started, _NOTHING)

    def _read(self, route: Route, environ: Environ, params: dict[str, str], context: RequestContext) -> Request:
        """The request with its whole body."""
        connection = environ.get("gunicorn.socket")
        if connection is not None:
            # A peer that stops sending its body, or reading its answer, must not hold a thread and a snapshot for ever.
            connection.settimeout(self._timeout)

        def header(name: str) -> str | None:
            key = name.upper().replace("-", "_")
            value: str | None = environ.get("CONTENT_TYPE" if key == "CONTENT_TYPE" else f"HTTP_{key}")
            return value or None

        exchange = Request(
            method=environ["REQUEST_METHOD"],
            params=params,
            query=lambda name: _query(environ, name),
            header=header,
            body=b"",
            context=context,
        )
        body = dispatch.receive(
            self._service,
            route,
            exchange,
            self._limits,
            length=environ.get("CONTENT_LENGTH"),
            chunked="HTTP_TRANSFER_ENCODING" in environ,
        )
        if body is not None:
            _feed(body, environ["wsgi.input"])
            exchange.body = body.complete()
        getattr(environ["wsgi.input"], "received", _NOTHING)()
        return exchange


def _context(environ: Environ, route: Route | None) -> RequestContext:
    return RequestContext(
        authorization=environ.get("HTTP_AUTHORIZATION") or None,
        request_id=dispatch.request_id(environ.get("HTTP_X_REQUEST_ID")),
        peer=environ.get("REMOTE_ADDR"),
        route=None if route is None else route.path,
    )


def _query(environ: Environ, name: str) -> str | None:
    try:
        values = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True, max_num_fields=32).get(name)
    except ValueError:
        raise errors.InvalidField("The query has too many parameters.") from None
    if values is not None and len(values) > 1:
        raise errors.InvalidField(f"{name}: stands twice in the query", fields={"field": name})
    return str(values[0]) if values is not None else None


def _feed(body: dispatch.Body, stream: Any) -> None:
    """Read a body from a WSGI input, which blocks, until it is whole or ends."""
    while body.wanted:
        try:
            chunk = stream.read(min(body.wanted, _CHUNK))
        except Exception as error:
            # Timeouts, broken chunks, lost connections: each server has exception classes of its own for them.
            raise errors.LengthMismatch("The body broke off, or its chunks are malformed.") from error
        if not chunk:
            return
        body.feed(chunk)


def _read_rest(environ: Environ) -> None:
    """Read and drop a body before a refusal is answered; end the connection unless exactly this body was dropped.

    Closing a socket with unread bytes resets the connection, and the answer is lost with it. The service does not wait
    for a body whose Content-Length is far too large.
    """
    stream = environ["wsgi.input"]
    length = environ.get("CONTENT_LENGTH") or "0"
    chunked = "HTTP_TRANSFER_ENCODING" in environ
    if chunked or length != "0":
        size = int(length[:20]) if length.isascii() and length.isdigit() and not chunked else None
        dropped = 0
        if size is None or size <= _DRAINED:
            with contextlib.suppress(Exception):
                while dropped < _DRAINED and (part := stream.read(min(_DRAINED - dropped, _CHUNK))):
                    dropped += len(part)
        if dropped != size:
            getattr(stream, "close_connection", _NOTHING)()
    getattr(stream, "received", _NOTHING)()


def _finish(
    response: Response,
    environ: Environ,
    context: RequestContext,
    params: dict[str, str],
    started: float,
    release: Callable[[], None],
    *,
    quiet: bool = False,
) -> FlaskResponse:
    dispatch.complete(
        response,
        context,
        params,
        method=environ["REQUEST_METHOD"],
        path=environ["PATH_INFO"],
        started=started,
        quiet=quiet,
    )
    return _Answer.of(response, release)
