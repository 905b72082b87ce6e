"""Errors as RFC 9457 problem documents, and the one table from error class to HTTP status."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from kms_jwks import errors
from kms_jwks.http.exchange import NO_STORE, PROBLEM_JSON, Response, encode

if TYPE_CHECKING:
    from collections.abc import Mapping

TYPE_PREFIX: Final = "urn:kms-jwks:problem:"

DEFAULT_RETRY_AFTER = 2
"""Seconds, for a 503 whose error names no time."""


class LengthRequired(errors.LengthMismatch):
    """The route needs a body, and the request has neither Content-Length nor chunked coding (RFC 9110 §15.5.12)."""


STATUS: Mapping[type[errors.Error], int] = MappingProxyType(
    {
        errors.InvalidRequest: 400,
        LengthRequired: 411,
        errors.BodyTooLarge: 413,
        errors.UnsupportedMediaType: 415,
        errors.IdempotencyKeyReused: 422,
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
"""A class without a row has the status of its nearest ancestor with one."""


def status_of(error: type[errors.Error]) -> int:
    """The HTTP status of an error class."""
    return next((STATUS[cls] for cls in error.__mro__ if cls in STATUS), 500)


def document(error: errors.Error, request_id: str, status: int | None = None) -> dict[str, object]:
    """The members of the problem: the base members, then the error's own fields, which never replace a base member."""
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

    `status` replaces the status of the class where HTTP has a more specific one; `allow` are the methods the route
    knows, for a 405. The caller sees every 500 as `internal_error`; its true code and detail are for the log alone.
    """
    if status is None:
        status = status_of(type(error))
    notes: dict[str, object] = {"code": error.code, "detail": error.detail}
    cause = None
    if status == 500:
        cause = error
        if not isinstance(error, errors.InternalError):
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
    return Response(status, headers, encode(document(error, request_id, status)), notes, cause)


def for_exception(error: Exception, request_id: str) -> Response:
    """The answer to any exception. One that is not an errors.Error is a defect: the caller sees `internal_error`."""
    if isinstance(error, errors.Error):
        return response(error, request_id)
    answer = response(errors.InternalError(), request_id)
    answer.cause = error
    return answer
