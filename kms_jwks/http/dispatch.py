"""The way of every request around its endpoint: authentication, body, decoding, the answer, and the line in the log.

This module knows no web framework and reads nothing itself. An adapter (the Flask app today) calls `receive` with the
head, feeds the body to the `Body` it gets, calls `answer`, and passes the answer to `complete` before it sends it.
"""

from __future__ import annotations

import logging
import os
import re
import time
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from kms_jwks import errors, strictjson, wire
from kms_jwks.http import problems
from kms_jwks.http.exchange import JSON, Request, Response, Route
from kms_jwks.service.signing_job import SigningOperation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kms_jwks.config import Settings
    from kms_jwks.service import Service
    from kms_jwks.service.context import RequestContext

log = structlog.get_logger(__name__)
_root = logging.getLogger()
"""Has the level that `logs.configure` was given; asking it costs less than a log call that writes nothing."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_JSON_UTF_8 = re.compile(r'application/json(?:\s*;\s*charset="?utf-8"?)?\s*', re.IGNORECASE)
_LOGGED_PATH = 256
_LOGGED_DETAIL = 300
"""Characters of a path and of a problem's detail that a log line holds at most."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes a body may have: `single` on all routes, `batch` for the batches of the signing routes."""

    single: int
    batch: int

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """The configured limits."""
        return cls(settings.max_body, settings.max_batch_body)


def request_id(header: str | None) -> str:
    """The caller's X-Request-Id where it has 1 to 64 characters of `A-Za-z0-9._-`, else a fresh id."""
    if header is not None and _REQUEST_ID.fullmatch(header):
        return header
    return os.urandom(12).hex()


def bodiless(request: object) -> bool:
    """Whether a route's body may be left out: all its fields are optional."""
    return isinstance(request, type) and not any(f.required for f in msgspec.structs.fields(request))


# --- the body ---------------------------------------------------------------------------------------------------------


class Body:
    """A body that arrives in chunks, from a thread that reads a socket or from an event loop."""

    __slots__ = ("_length", "_limit", "_parts", "wanted")

    def __init__(self, limit: int, length: int | None) -> None:
        """`limit` is the largest body in bytes, `length` the Content-Length; None where the body is chunked."""
        self._limit = limit
        self._length = length
        self._parts: list[bytes] = []
        self.wanted = limit + 1 if length is None else length
        """Bytes still to read at most; 0 once nothing more is needed."""

    def feed(self, chunk: bytes) -> None:
        """Add the next bytes. Raises BodyTooLarge, and LengthMismatch for more bytes than Content-Length says."""
        self.wanted -= len(chunk)
        if self._length is None:
            if self.wanted <= 0:
                raise _too_large(self._limit)
        elif self.wanted < 0:
            raise errors.LengthMismatch(f"Content-Length says {self._length} bytes, more came.")
        self._parts.append(chunk)

    def complete(self) -> bytes:
        """The whole body, once the sender has ended it. Raises LengthMismatch where bytes are missing."""
        if self._length is not None and self.wanted:
            came = self._length - self.wanted
            raise errors.LengthMismatch(f"Content-Length says {self._length} bytes, {came} came.")
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)


def receive(
    service: Service, route: Route, request: Request, limits: Limits, *, length: str | None, chunked: bool
) -> Body | None:
    """Decide from a request's head whether its body is read; None where the route has no body.

    Where the route has a permission and a body, the caller is authenticated here: a body whose sender is unknown is
    neither read nor decoded. On the signing routes, neither is the body of a caller whom no grant lets sign with this
    key. `length` is the Content-Length header. Raises Unauthenticated, Forbidden, KeySetNotFound, KeyNotFound,
    StoreUnavailable, RouteNotFound (a control character in the path), LengthMismatch (no usable length where a body is
    needed) and BodyTooLarge.
    """
    if not all(value.isprintable() for value in request.params.values()):
        raise errors.RouteNotFound
    if route.request is None:
        return None
    if route.permission:
        service.authenticate(request.context, data_plane=route.hot)
        if route.batch:
            operation = SigningOperation(route.path.rpartition("/")[2])
            service.signing.refuse_early(operation, request.context, **request.params)
    limit = limits.batch if route.batch else limits.single
    if chunked:
        return Body(limit, None)
    if length is None:
        if bodiless(route.request):
            return Body(limit, 0)
        raise problems.LengthRequired
    if not (length.isascii() and length.isdigit()):
        raise errors.LengthMismatch("Content-Length is not a number of bytes.")
    size = int(length[:20])
    if size > limit:
        raise _too_large(limit)
    return Body(limit, size)


def _too_large(limit: int) -> errors.BodyTooLarge:
    return errors.BodyTooLarge(f"A body has at most {limit} bytes here.", fields={"limit": limit})


def _decode(route: Route, request: Request, limits: Limits) -> Any:
    """The body as the route's struct, or as a plain object for the signing routes."""
    struct = route.request
    if not request.body and isinstance(struct, type) and bodiless(struct):
        return struct()
    content_type = request.header("content-type")
    if content_type != JSON and (content_type is None or not _JSON_UTF_8.fullmatch(content_type)):
        raise errors.UnsupportedMediaType
    if (request.header("content-encoding") or "identity").lower() != "identity":
        raise errors.UnsupportedMediaType(
            "The service does not decode content codings.", next_step="Send the body without Content-Encoding."
        )
    if not request.body:
        raise errors.MalformedBody("The request has no body.")
    found = strictjson.loads_object(request.body)
    if route.batch:
        if len(request.body) > limits.single and "batch" not in found:
            raise _too_large(limits.single)
        return found
    assert not isinstance(struct, UnionType)
    assert struct is not None
    return wire.convert(found, struct)


# --- the answer -------------------------------------------------------------------------------------------------------


def answer(service: Service, route: Route, request: Request, limits: Limits) -> Response:
    """The route's answer to a request that is complete, or the problem it ended in. Never raises an Exception."""
    try:
        if route.request is None:
            return route.endpoint(service, request)
        return route.endpoint(service, request, _decode(route, request, limits))
    except Exception as error:  # noqa: BLE001 - the outermost frame: the caller gets a problem whatever it is
        return problems.for_exception(error, request.context.request_id)


def complete(
    response: Response,
    context: RequestContext,
    params: Mapping[str, str],
    *,
    method: str,
    path: str,
    started: float,
    quiet: bool = False,
) -> None:
    """Add the headers that every answer has, and write the request's one line to the log.

    `started` is when the request came in, by `time.perf_counter()`. `quiet` is for routes that machines ask all the
    time: their successes are logged at level debug, because writing a line costs more than serving a JWKS.
    """
    status = response.status
    response.headers.append(("X-Request-Id", context.request_id))
    response.headers.append(("X-Content-Type-Options", "nosniff"))
    plain = status < 400 and response.notes is None
    if quiet and plain and not _root.isEnabledFor(logging.DEBUG):
        return
    line: dict[str, object] = {
        "request_id": context.request_id,
        "method": method,
        "route": context.route,
        "path": path[:_LOGGED_PATH],
        "status": status,
        "ms": round((time.perf_counter() - started) * 1000, 3),
        "peer": context.peer,
    }
    caller = context.caller
    if caller is not None:
        line["client"] = caller.client
        line["token_id"] = caller.token_id
    if plain:
        (log.debug if quiet else log.info)("request", **line)
        return
    for name in ("key_set", "key"):
        if name in params:
            line[name] = params[name][:_LOGGED_PATH]
    if context.backend is not None:
        line["backend"] = context.backend
    line |= response.notes or {}
    if isinstance(detail := line.get("detail"), str):
        line["detail"] = detail[:_LOGGED_DETAIL]
    if response.cause is not None:
        line["exc_info"] = response.cause
    getattr(log, level_of(status))("request", **line)


def level_of(status: int) -> str:
    """The log level of an answer: what the caller can mend is `info`, what may pass by itself `warning`."""
    if status < 500:
        return "info"
    return "warning" if status in (501, 502, 503, 504) else "error"
