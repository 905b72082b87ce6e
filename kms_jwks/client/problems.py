"""From problem documents (RFC 9457) to the domain's errors: the counterpart of http/problems.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from kms_jwks import errors

if TYPE_CHECKING:
    from collections.abc import Mapping

TYPE_PREFIX: Final = "urn:kms-jwks:problem:"
_BASE: Final = frozenset({"type", "title", "status", "detail", "request_id", "next_step"})
_LONGEST: Final = 2000
"""Characters that are kept of a text from an answer."""


def error_of(status: int, body: bytes, *, request_id: str | None, retry_after: int | None) -> errors.Error:
    """The error of an answer without success.

    It has the problem's detail, next step and further members (`fields`), the HTTP `status` and the `request_id`. An
    answer that is not one of the service's problems becomes UnexpectedAnswer.
    """
    problem = _problem(body)
    if problem is None:
        unexpected = errors.UnexpectedAnswer(
            f"Status {status} came without a problem document of this service.",
            next_step="Check that KMS_JWKS_ADDR names the service itself, and check any proxy before it.",
            retry_after=retry_after,
        )
        return marked(unexpected, status, request_id)
    return from_problem(problem, status, request_id=request_id, retry_after=retry_after)


def from_problem(
    problem: Mapping[str, Any], status: int | None = None, *, request_id: str | None, retry_after: int | None = None
) -> errors.Error:
    """The error that a decoded problem document describes; also for the items of a batch."""
    code = _text(problem, "type").removeprefix(TYPE_PREFIX)
    detail, title, next_step = (_text(problem, name) for name in ("detail", "title", "next_step"))
    fields = {name: value for name, value in problem.items() if name not in _BASE}
    cls = errors.BY_CODE.get(code)
    if cls is None or issubclass(cls, errors.ClientError):
        # A newer service sent a code that this client does not know: its text is passed on in UnexpectedAnswer.
        error: errors.Error = errors.UnexpectedAnswer(
            f"{code or 'a problem without a type'}: {detail or title}",
            next_step=next_step,
            retry_after=retry_after,
            fields={**fields, "code": code},
        )
    else:
        error = cls(detail, next_step=next_step or None, retry_after=retry_after, fields=fields)
    if status is None:
        status = problem["status"] if isinstance(problem.get("status"), int) else None
    return marked(error, status, request_id or _text(problem, "request_id") or None)


def marked(error: errors.Error, status: int | None, request_id: str | None) -> errors.Error:
    """`error` with the attributes `status` and `request_id` set."""
    error.status, error.request_id = status, request_id
    return error


def _problem(body: bytes) -> dict[str, Any] | None:
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(found, dict) or not _text(found, "type").startswith(TYPE_PREFIX):
        return None
    return found


def _text(problem: Mapping[str, Any], name: str) -> str:
    value = problem.get(name)
    return value[:_LONGEST] if isinstance(value, str) else ""
