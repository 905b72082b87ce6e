"""The plain types of the HTTP layer: a row of the route table, the request an endpoint takes, the response it returns.

They know no web framework.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Flag, auto
from types import UnionType
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import quote

import msgspec

from kms_jwks import errors, wire
from kms_jwks.access import Permission
from kms_jwks.model import NAME_RULE, is_name
from kms_jwks.service.guard import RequestContext

if TYPE_CHECKING:
    from kms_jwks.service.views import Created

JSON: Final = "application/json"
PROBLEM_JSON: Final = "application/problem+json"

DEFAULT_PAGE = 50
MAX_PAGE = 200
CURSOR = "[A-Za-z0-9_-]{1,128}"
"""The form of a cursor; only the use case reads its content."""
MAX_IDEMPOTENCY_KEY = 255
"""Characters of an Idempotency-Key at most."""

NO_STORE: Final = ("Cache-Control", "no-store")
"""Sent with every answer except the documents that verifiers fetch."""

encode = msgspec.json.Encoder().encode
"""Structs, dicts and lists as JSON; aware instants as RFC 3339 in UTC with `Z`."""

_CURSOR = re.compile(CURSOR)
_IDEMPOTENCY_KEY = re.compile(r'"([ !#-\[\]-~]+)"|([A-Za-z0-9._~:/+=-]+)')
_ETAG_REVISION = re.compile(r'"([0-9]{1,18})"')
_ETAG = re.compile(r'(?:W/)?("[^"]*")')


class Empty(wire.Request):
    """A body without fields: no body, or `{}`."""


@dataclass(frozen=True, slots=True)
class Filter:
    """A query parameter that narrows the answer down. Its values are `choices`, or names where there are none."""

    name: str
    description: str
    choices: tuple[str, ...] = ()
    several: bool = False
    """Takes several values with commas between them: items that have one of them stay."""


@dataclass(slots=True)
class Request:
    """One HTTP request. `body` is empty until the whole body has been read.

    `params` are the decoded segments of the path template. `query` and `header` return None for a missing name (header
    names in any case).
    """

    method: str
    params: Mapping[str, str]
    query: Callable[[str], str | None]
    header: Callable[[str], str | None]
    body: bytes
    context: RequestContext

    def page(self) -> tuple[int, str | None]:
        """`?limit&cursor` of a list. Raises InvalidField."""
        limit = self.query("limit")
        if limit is not None and not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_PAGE):
            raise errors.InvalidField(f"limit: an integer from 1 to {MAX_PAGE}", fields={"field": "limit"})
        cursor = self.query("cursor")
        if cursor is not None and not _CURSOR.fullmatch(cursor):
            raise errors.InvalidField("cursor: take it from the page before", fields={"field": "cursor"})
        return DEFAULT_PAGE if limit is None else int(limit), cursor

    def chosen(self, by: Filter) -> tuple[str, ...] | None:
        """The values of a filter, None where the query does not name it. Raises InvalidField for any other value."""
        given = self.query(by.name)
        if given is None:
            return None
        values = tuple(given.split(",")) if by.several else (given,)
        if not all(value in by.choices if by.choices else is_name(value) for value in values):
            rule = f"one of {', '.join(by.choices)}" if by.choices else f"a name: {NAME_RULE}"
            more = "; several with commas between them" if by.several else ""
            raise errors.InvalidField(f"{by.name}: {rule}{more}", fields={"field": by.name})
        return values

    def one(self, by: Filter) -> str | None:
        """The same for a filter that takes one value."""
        values = self.chosen(by)
        return None if values is None else values[0]

    def idempotency_key(self) -> str | None:
        """The Idempotency-Key (draft-ietf-httpapi-idempotency-key-header), None without the header.

        It is a string in double quotes (RFC 9651 §3.3.3); a bare word is taken too. Raises InvalidField.
        """
        header = self.header("idempotency-key")
        if header is None:
            return None
        match = _IDEMPOTENCY_KEY.fullmatch(header.strip())
        found = (match[1] or match[2]) if match is not None else ""
        if not 1 <= len(found) <= MAX_IDEMPOTENCY_KEY:
            raise errors.InvalidField(
                f"Idempotency-Key: 1 to {MAX_IDEMPOTENCY_KEY} ASCII characters in double quotes, such as a fresh UUID, "
                "without quotes or backslashes inside",
                fields={"field": "Idempotency-Key"},
            )
        return found

    def revision(self) -> int | None:
        """The revision that If-Match names, None without the header (RFC 9110 §13.1.1; comparison is strong).

        Raises RevisionMismatch for a validator that this service never issued, RevisionRequired for `*`.
        """
        header = self.header("if-match")
        if not header:
            return None
        if header.strip() == "*":
            raise errors.RevisionRequired("If-Match: * names no revision.")
        match = _ETAG_REVISION.fullmatch(header.strip())
        if match is None:
            raise errors.RevisionMismatch("If-Match does not hold one ETag of this object.")
        return int(match[1])

    def has(self, etag: str) -> bool:
        """Whether If-None-Match names `etag` (weak comparison, RFC 9110 §13.1.2)."""
        header = self.header("if-none-match")
        if header is None:
            return False
        return header.strip() == "*" or etag in _ETAG.findall(header)


@dataclass(slots=True)
class Response:
    """One HTTP answer. The adapter that writes it adds Content-Length."""

    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    notes: dict[str, object] | None = None
    """What the request's log line says beyond the answer, such as the problem code. Never sent."""
    cause: BaseException | None = None
    """The exception behind a 500; its traceback goes into the log line. Never sent."""


# --- routes -----------------------------------------------------------------------------------------------------------

Endpoint = Callable[..., Response]
"""`(service, request)`, and the converted body as a third argument where the route has one."""


class Side(Flag):
    """Which kind of server answers a route (`serve --routes`)."""

    PUBLIC = auto()
    """For verifiers; needs neither PIN nor module."""
    PRIVATE = auto()
    """For issuers and admins."""
    BOTH = PUBLIC | PRIVATE


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One route. A route with a permission authenticates its caller before the body is read; the use case authorises.

    `problems` is for the documentation.
    """

    method: Literal["GET", "POST", "PATCH", "DELETE", "OPTIONS"]
    """HEAD comes with every GET."""
    path: str
    """With `{name}` for each parameter."""
    endpoint: Endpoint
    summary: str
    name: str = ""
    """The operation's id where the endpoint's own name does not serve: several rows share it, or it has no verb."""
    side: Side = Side.PRIVATE
    hot: bool = False
    """Data plane: answered from the snapshot, which stays pinned until the answer has left."""
    request: type[wire.Request] | UnionType | None = None
    """The body's struct. A union of structs is passed on as a plain object, which the use case converts."""
    batch: bool = False
    """`{"batch": […]}` of `request` is accepted too, and with it a larger body."""
    answer: type[wire.Answer] | UnionType | None = None
    """The struct of a success; None where the body is a document or a key, or where there is no body."""
    items: type[wire.Answer] | None = None
    """The struct of a Page's items."""
    paged: bool = False
    """Takes `?limit&cursor`."""
    filters: tuple[Filter, ...] = ()
    """Further query parameters, such as those that leave items of a list out. All others are refused."""
    creates: bool = False
    """Takes an Idempotency-Key: the same call sent again creates nothing further."""
    media: tuple[str, ...] = ()
    """Media types of a success that has no struct."""
    statuses: tuple[int, ...] = (200,)
    """Statuses of successes, and of refusals that are not problem documents."""
    permission: tuple[Permission, ...] = ()
    """The caller needs one of these; empty: the route needs no credentials."""
    problems: tuple[type[errors.Error], ...] = ()
    """Errors beyond those that every route of its kind can answer with."""

    @property
    def operation(self) -> str:
        """The operation's id in OpenAPI, such as `create_key`: what generated clients call their functions."""
        return self.name or self.endpoint.__name__

    @property
    def params(self) -> tuple[str, ...]:
        """The names in the path template."""
        return tuple(part[1:-1] for part in self.path.split("/") if part.startswith("{"))


# --- answers ----------------------------------------------------------------------------------------------------------


def ok(answer: wire.Answer | Mapping[str, Any], status: int = 200) -> Response:
    """An object as JSON, never stored."""
    return Response(status, [("Content-Type", JSON), NO_STORE], encode(answer))


def revised(request: Request, answer: wire.KeySet | wire.Key) -> Response:
    """An object that has a revision, with its ETag; 304 for a GET that names it in If-None-Match."""
    etag = f'"{answer.revision}"'
    if request.method != "PATCH" and request.has(etag):
        return Response(304, [("ETag", etag), NO_STORE])
    response = ok(answer)
    response.headers.append(("ETag", etag))
    return response


def created(made: Created[Any]) -> Response:
    """201 with the whole object, or 202 while the custodian still works on it; Location is its path."""
    response = ok(made.answer, 201 if made.complete else 202)
    response.headers.append(("Location", made.location))
    if isinstance(made.answer, wire.KeySet | wire.Key):
        response.headers.append(("ETag", f'"{made.answer.revision}"'))
    return response


def added(answer: wire.Answer, *location: str) -> Response:
    """201 with the whole object; `location` are the segments of its path."""
    response = ok(answer, 201)
    response.headers.append(("Location", "/" + "/".join(quote(part, safe="") for part in location)))
    return response


def gone() -> Response:
    """204: the object is deleted."""
    return Response(204, [NO_STORE])
