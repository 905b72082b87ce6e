"""The way of every request around its endpoint: authentication, body, decoding, the answer, and the line in the log.

This module knows no web framework and reads nothing itself. An adapter (the Flask app today) calls `receive` with the
head, reads as much of the body as that says, passes it to `check_body`, calls `answer`, and passes the answer to
`complete` before it sends it.
"""

from __future__ import annotations

import logging
import os
import re
import time
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

import msgspec
import structlog

from kms_jwks import errors, strictjson, wire
from kms_jwks.http import problems
from kms_jwks.http.exchange import JSON, Request, Response, Route
from kms_jwks.service.guard import RequestContext
from kms_jwks.service.signing_job import SigningOperation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kms_jwks.config import Settings
    from kms_jwks.service import Service

log = structlog.get_logger(__name__)
_root = logging.getLogger()
"""Has the level that `logs.configure` was given; asking it costs less than a log call that writes nothing."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_JSON_UTF_8 = re.compile(r'application/json(?:\s*;\s*charset="?utf-8"?)?\s*', re.IGNORECASE)
_NEEDLESSLY_ENCODED = re.compile("%(?:2[DE]|3[0-9]|[46][1-9A-F]|[57][0-9A]|5F|7E)", re.IGNORECASE)
"""Unreserved characters, percent-encoded."""
_MAX_PARAMETERS = 32
_SHOWN_NAME = 64
"""Characters of an unknown query parameter's name that a refusal repeats at most."""
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


def context_of(header: Callable[[str], str | None], peer: str | None, route: Route | None) -> RequestContext:
    """The context of a request.

    `header` looks a header up by its lower-case name. The request id is the caller's X-Request-Id where it has 1 to 64
    characters of `A-Za-z0-9._-`, else a fresh one.
    """
    request_id = header("x-request-id")
    if request_id is None or not _REQUEST_ID.fullmatch(request_id):
        request_id = os.urandom(12).hex()
    return RequestContext(
        authorization=header("authorization") or None,
        request_id=request_id,
        peer=peer,
        route=None if route is None else route.path,
    )


def bodiless(request: object) -> bool:
    """Whether a route's body may be left out: all its fields are optional."""
    return isinstance(request, type) and not any(f.required for f in msgspec.structs.fields(request))


# --- the path and the query -------------------------------------------------------------------------------------------


def decode_params(params: Mapping[str, str]) -> dict[str, str]:
    """The parameters of a path that holds percent-encoded octets. Raises RouteNotFound.

    Only a kid may hold a slash. A character that needs no encoding (RFC 3986 §2.3) is not encoded: each object has one
    path.
    """
    if any(_NEEDLESSLY_ENCODED.search(value) for value in params.values()):
        raise errors.RouteNotFound
    decoded = {name: unquote(value) for name, value in params.items()}
    if any("/" in value for name, value in decoded.items() if name not in ("kid", "version")):
        raise errors.RouteNotFound
    return decoded


def parse_query(route: Route, query: str) -> dict[str, str]:
    """The parameters of a query that is not empty. Raises InvalidField for one that the route does not take."""
    try:
        found = parse_qs(query, keep_blank_values=True, max_num_fields=_MAX_PARAMETERS)
    except ValueError:
        raise errors.InvalidField("The query has too many parameters.") from None
    taken = (*(("limit", "cursor") if route.paged else ()), *(by.name for by in route.filters))
    for name, values in found.items():
        if name not in taken:
            known = ", ".join(taken) or "none"
            raise errors.InvalidField(
                f"{name[:_SHOWN_NAME]!r}: not a query parameter of this route; it takes {known}",
                fields={"field": name[:_SHOWN_NAME]},
            )
        if len(values) > 1:
            raise errors.InvalidField(f"{name}: stands twice in the query", fields={"field": name})
    return {name: values[0] for name, values in found.items()}


# --- the body ---------------------------------------------------------------------------------------------------------


def receive(
    service: Service, route: Route, request: Request, limits: Limits, *, length: str | None, chunked: bool
) -> int | None:
    """How many bytes of a body are read at most, decided from the request's head; None where the route has no body.

    Where the route has a permission and a body, the caller is authenticated here: a body whose sender is unknown is
    neither read nor decoded. On the signing routes, neither is the body of a caller whom no grant lets sign with this
    key. `length` is the Content-Length header. Of a chunked body, the first byte beyond the limit is read too. Raises
    Unauthenticated, Forbidden, KeySetNotFound, KeyNotFound, StoreUnavailable, RouteNotFound (a control character in the
    path), LengthMismatch (no usable length where a body is needed) and BodyTooLarge.
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
        return limit + 1
    if length is None:
        if bodiless(route.request):
            return 0
        raise problems.LengthRequired
    if not (length.isascii() and length.isdigit()):
        raise errors.LengthMismatch("Content-Length is not a number of bytes.")
    size = int(length.lstrip("0")[:20] or "0")
    if size > limit:
        raise _too_large(limit)
    return size


def check_body(body: bytes, wanted: int, *, chunked: bool) -> None:
    """Hold what was read, until its end or `wanted` bytes, against what `receive` decided.

    Raises BodyTooLarge for a chunked body beyond the limit, LengthMismatch for one that is not as long as its
    Content-Length.
    """
    if chunked and len(body) >= wanted:
        raise _too_large(wanted - 1)
    if not chunked and len(body) != wanted:
        raise errors.LengthMismatch(f"Content-Length says {wanted} bytes, {len(body)} came.")


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
        if route.creates:
            request.context.idempotency_key = request.idempotency_key()
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
