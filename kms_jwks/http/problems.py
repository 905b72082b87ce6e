"""Errors as RFC 9457 problem documents: one table from error class to HTTP status, and nothing else decides it."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import structlog

from kms_jwks import errors
from kms_jwks.http.exchange import NO_STORE, PROBLEM_JSON, Response, encode

if TYPE_CHECKING:
    from collections.abc import Mapping

log = structlog.get_logger(__name__)

TYPE_PREFIX: Final = "urn:kms-jwks:problem:"

DEFAULT_RETRY_AFTER = 2
"""Seconds, for a 503 whose cause named no time."""


class LengthRequired(errors.LengthMismatch):
    """A body was needed, and the request tells neither its length nor that it is chunked (RFC 9110 §15.5.12)."""


STATUS: Mapping[type[errors.Error], int] = MappingProxyType(
    {
        errors.InvalidRequest: 400,
        LengthRequired: 411,
        errors.BodyTooLarge: 413,
        errors.UnsupportedMediaType: 415,
        errors.TokenRejected: 422,
        errors.Unauthenticated: 401,
        errors.Forbidden: 403,
        errors.NotFound: 404,
        errors.MethodNotAllowed: 405,
        errors.Conflict: 409,
        errors.RevisionMismatch: 412,
        errors.RevisionRequired: 428,
        errors.Unavailable: 503,
        errors.BackendError: 502,
        errors.BackendUnavailable: 503,
        errors.BackendThrottled: 503,
        errors.BackendTimeout: 504,
        errors.SchemaMismatch: 503,
        errors.ConfigurationError: 500,
        errors.ClientError: 500,
        errors.InternalError: 500,
    }
)
"""A class without a row of its own has its nearest ancestor's."""


def status_of(error: type[errors.Error]) -> int:
    """The HTTP status of an error class."""
    return next((STATUS[cls] for cls in error.__mro__ if cls in STATUS), 500)


def document(error: errors.Error, request_id: str, status: int | None = None) -> dict[str, object]:
    """The members of the problem: the base ones first, then the error's own fields, which never replace a base one."""
    base = {
        "type": TYPE_PREFIX + error.code,
        "title": error.title,
        "status": status_of(type(error)) if status is None else status,
        "detail": error.detail,
        "request_id": request_id,
        "next_step": error.next_step,
    }
    return base | {name: value for name, value in error.fields.items() if name not in base}


def response(
    error: errors.Error, request_id: str, *, status: int | None = None, allow: tuple[str, ...] = ()
) -> Response:
    """An error as an answer, with the headers its status asks for.

    `status` replaces the class's own, for what HTTP has a number of its own for; `allow` are the methods the route
    knows, for a 405. A 500 of any kind is told to the log alone.
    """
    if status is None:
        status = status_of(type(error))
    if status == 500 and not isinstance(error, errors.InternalError):
        log.error("internal_error", request_id=request_id, code=error.code, detail=error.detail)
        error = errors.InternalError()
    headers = [("Content-Type", PROBLEM_JSON), NO_STORE]
    retry_after = error.retry_after
    if retry_after is None and status == 503:
        retry_after = DEFAULT_RETRY_AFTER
    if retry_after is not None:
        headers.append(("Retry-After", str(retry_after)))
    if status == 401:
        headers.append(("WWW-Authenticate", "Bearer"))
    if status == 405:
        headers.append(("Allow", ", ".join(allow)))
    return Response(status, headers, encode(document(error, request_id, status)))


def unexpected(request_id: str) -> Response:
    """For use while handling an exception that is none of ours: traceback to the log, nothing to the caller."""
    log.exception("internal_error", request_id=request_id)  # noqa: LOG004 - called from handlers alone
    return response(errors.InternalError(), request_id)
