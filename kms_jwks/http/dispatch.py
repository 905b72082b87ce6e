"""What happens to every request around its endpoint: request id, body, conversion, problems. Knows no web framework.

Whoever adapts a server (the Flask app today) reads the request and calls `answer`, which never raises.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Any

import msgspec

from kms_jwks import errors, strictjson, wire
from kms_jwks.http import problems
from kms_jwks.http.exchange import JSON, Request, Response

if TYPE_CHECKING:
    from kms_jwks.config import Settings
    from kms_jwks.http.routes import Route
    from kms_jwks.service import Service

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_JSON_UTF_8 = re.compile(r'application/json(?:\s*;\s*charset="?utf-8"?)?\s*', re.IGNORECASE)

Read = Callable[[int], bytes]
"""Reads at most so many bytes of a body; fewer only at its end. Raises LengthMismatch for a body that breaks off."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes a body may have: `single` for all, `batch` for the signing routes' batches."""

    single: int
    batch: int

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """The configured ones."""
        return cls(settings.max_body, settings.max_batch_body)


def request_id(header: str | None) -> str:
    """The caller's X-Request-Id where it is sane, else a fresh one."""
    if header is not None and _REQUEST_ID.fullmatch(header):
        return header
    return os.urandom(12).hex()


def bodiless(request: object) -> bool:
    """Whether a route's body may be left out: all its fields are optional."""
    return isinstance(request, type) and not any(f.required for f in msgspec.structs.fields(request))


# --- the body ---------------------------------------------------------------------------------------------------------


def read_body(route: Route, limits: Limits, *, length: str | None, chunked: bool, read: Read) -> bytes:
    """A route's body, whole. `length` is the Content-Length header.

    Raises LengthMismatch (no length where a body is needed, or fewer bytes than it says) and BodyTooLarge, the latter
    before anything is read where the length tells it.
    """
    if route.request is None:
        return b""
    limit = limits.batch if route.batch else limits.single
    if chunked:
        body = read(limit + 1)
        if len(body) > limit:
            raise _too_large(limit)
        return body
    if length is None:
        if bodiless(route.request):
            return b""
        raise problems.LengthRequired
    if not (length.isascii() and length.isdigit()):
        raise errors.LengthMismatch("Content-Length is not a number of bytes.")
    wanted = int(length[:20])
    if wanted > limit:
        raise _too_large(limit)
    body = read(wanted) if wanted else b""
    if len(body) != wanted:
        raise errors.LengthMismatch(f"Content-Length says {wanted} bytes, {len(body)} came.")
    return body


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
        raise errors.UnsupportedMediaType("A body in a content coding is not read.", next_step="Send it as it is.")
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
    """The route's answer, or the problem it ended in."""
    try:
        if route.request is None:
            return route.endpoint(service, request)
        if route.permission and request.context.authorization is None:
            # Who shows nothing learns nothing about what a body should look like.
            raise errors.CredentialsMissing
        return route.endpoint(service, request, _decode(route, request, limits))
    except errors.Error as error:
        return problems.response(error, request.context.request_id)
    except Exception:  # noqa: BLE001 - the outermost frame: whatever it is, the caller gets a problem
        return problems.unexpected(request.context.request_id)
