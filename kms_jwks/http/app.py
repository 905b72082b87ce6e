"""The Flask app: it registers the rows of the route table and drives `dispatch` over WSGI."""

from __future__ import annotations

import contextlib
import re
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from flask import Flask, request
from flask import Response as FlaskResponse
from werkzeug.exceptions import HTTPException
from werkzeug.routing import BaseConverter
from werkzeug.wsgi import ClosingIterator

from kms_jwks import errors
from kms_jwks.http import dispatch, problems
from kms_jwks.http.exchange import Request, Response, Route, Side
from kms_jwks.http.routes import ROUTES, served
from kms_jwks.issuers import AUTHORIZATION_SERVER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import StartResponse

    from kms_jwks.service import Service
    from kms_jwks.service.guard import RequestContext

    Environ = dict[str, Any]

_STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}
_CHUNK = 65_536
"""Bytes that one read of a body asks for at most."""
_DRAINED = 2_097_152
"""Bytes of a refused body that are read and dropped at most."""
_BODILESS = frozenset({204, 304})
_NOTHING: Callable[[], None] = lambda: None  # noqa: E731
_NO_QUERY: dict[str, str] = {}
_AUTHORITY = re.compile(r"https?://[^/?]+", re.IGNORECASE)
"""The beginning of a request target in absolute form (RFC 9112 §3.2.2)."""


class _Answer(FlaskResponse):
    """Flask's response type, sent without Werkzeug's handling of headers, which costs more than all the rest."""

    default_mimetype = None
    made: Response
    release: Callable[[], None]
    """Called by the server once it has sent the answer."""

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        made = self.made
        headers = made.headers
        if made.status not in _BODILESS:
            headers = [*headers, ("Content-Length", str(len(made.body)))]
        start_response(_STATUS_LINES[made.status], headers)
        body = () if environ["REQUEST_METHOD"] == "HEAD" else (made.body,)
        # The server calls `close` when it has sent the body (PEP 3333): that releases the snapshot.
        return ClosingIterator(body, self.release) if self.release is not _NOTHING else body


class App(Flask):
    """Flask as an API needs it. `service` is passed to the endpoints. Without a secret key it sets no cookies."""

    service: Service

    def wsgi_app(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Match the path as it was sent, not decoded, so that each route has one spelling.

        `/v1%2fclients` is not `/v1/clients`. WSGI itself offers the decoded path only; gunicorn and other servers add
        the request target (`RAW_URI`, `REQUEST_URI`).
        """
        target = environ.get("RAW_URI") or environ.get("REQUEST_URI")
        if target is None:
            path = quote(environ["PATH_INFO"].encode("latin-1"))
        else:
            path = _AUTHORITY.sub("", target, count=1) if target[:1] != "/" else target
            path = path.partition("?")[0]
        # Werkzeug drops leading slashes and adds one that is missing; no route begins with "/.//".
        environ["PATH_INFO"] = path if path[:1] == "/" and path[1:2] != "/" else f"/.//{path}"
        return super().wsgi_app(environ, start_response)


def create_app(service: Service) -> App:
    """The WSGI application for one worker, with the rows that `settings.routes` keeps."""
    app = App(__name__, static_folder=None, template_folder=None)
    app.service = service
    app.url_map.merge_slashes = False
    app.url_map.converters["kid"] = _KidConverter
    app.url_map.redirect_defaults = False
    adapter = _Adapter(service)
    prefix = urlsplit(service.settings.public_url).path
    for route in served(service.settings.routes):
        view = adapter.view(route)
        for path in _paths(route.path, prefix):
            app.add_url_rule(
                _rule(path),
                endpoint=f"{route.method} {route.path}",
                view_func=view,
                methods=[route.method],
                provide_automatic_options=False,
            )
    app.register_error_handler(HTTPException, adapter.refuse)
    app.register_error_handler(Exception, adapter.defect)
    return app


def _paths(path: str, prefix: str) -> tuple[str, ...]:
    """Where a route is. `prefix` is the path of `public_url`, which a proxy removes.

    RFC 8414 §3.1 puts the well-known part before the whole path of an issuer, so that a proxy finds no prefix there.
    """
    if prefix and path.startswith(AUTHORIZATION_SERVER):
        return path, AUTHORIZATION_SERVER + prefix + path.removeprefix(AUTHORIZATION_SERVER)
    return (path,)


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
            context = dispatch.context_of(request.headers.get, environ.get("REMOTE_ADDR"), route)
            release = _NOTHING
            try:
                if "%" in environ["PATH_INFO"]:
                    params = dispatch.decode_params(params)
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
        context = dispatch.context_of(request.headers.get, request.environ.get("REMOTE_ADDR"), None)
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
        context = dispatch.context_of(request.headers.get, request.environ.get("REMOTE_ADDR"), None)
        response = problems.for_exception(error, context.request_id)
        return _finish(response, request.environ, context, {}, started, _NOTHING)

    def _read(self, route: Route, environ: Environ, params: dict[str, str], context: RequestContext) -> Request:
        """The request with its whole body."""
        connection = environ.get("gunicorn.socket")
        if connection is not None:
            # A peer that stops sending its body, or reading its answer, must not hold a thread and a snapshot for ever.
            connection.settimeout(self._timeout)

        exchange = Request(
            method=environ["REQUEST_METHOD"],
            params=params,
            query=_NO_QUERY.get,
            header=request.headers.get,
            body=b"",
            context=context,
        )
        chunked = "HTTP_TRANSFER_ENCODING" in environ
        length = environ.get("CONTENT_LENGTH")
        wanted = dispatch.receive(self._service, route, exchange, self._limits, length=length, chunked=chunked)
        if query := environ.get("QUERY_STRING"):
            exchange.query = dispatch.parse_query(route, query).get
        if wanted is not None:
            stream, left, parts = environ["wsgi.input"], wanted, []
            try:
                while left and (part := stream.read(min(left, _CHUNK))):
                    left -= len(part)
                    parts.append(part)
            except Exception as error:
                # Timeouts, broken chunks, lost connections: each server has exception classes of its own for them.
                late = isinstance(error, TimeoutError)
                cause = "did not arrive in time" if late else "broke off, or its chunks are malformed"
                raise errors.LengthMismatch(f"The body {cause}.") from error
            exchange.body = b"".join(parts)
            dispatch.check_body(exchange.body, wanted, chunked=chunked)
        getattr(environ["wsgi.input"], "received", _NOTHING)()
        return exchange


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
    answer = _Answer()
    answer.made, answer.release = response, release
    answer.status_code = response.status
    return answer
