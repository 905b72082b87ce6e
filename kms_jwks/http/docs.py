"""The docs page: every route, field and problem on one HTML page, rendered here, without anything from elsewhere.

Its one script searches the page and sends calls with the API token of a field. The token stays in that field: it goes
into no storage and no URL, and to this service alone. Without scripts the page is the same text to read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, select_autoescape

import kms_jwks
from kms_jwks import errors, wire
from kms_jwks.http import openapi, problems
from kms_jwks.http.examples import EXAMPLES
from kms_jwks.http.exchange import Route

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Field:
    """A member of a body."""

    name: str
    type: str
    required: bool
    note: str


@dataclass(frozen=True, slots=True)
class Parameter:
    """A part of the path, a query parameter or a header, with the values that it may have where these are listed."""

    name: str
    place: str
    required: bool
    choices: tuple[str, ...]
    note: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One route as the page shows it."""

    id: str
    route: Route
    parameters: tuple[Parameter, ...]
    example: str
    """The body of a call, as indented JSON; empty where the route has none."""
    answered: str
    """The same of its answer."""
    changes: bool
    """Whether the call changes the registry, so that the page asks before it sends it."""
    request: tuple[tuple[str, tuple[Field, ...]], ...]
    answer: tuple[tuple[str, tuple[Field, ...]], ...]
    successes: tuple[str, ...]
    refusals: tuple[tuple[int, str, tuple[str, ...]], ...]


@lru_cache(maxsize=1)
def rendered(routes: tuple[Route, ...], public_url: str) -> tuple[bytes, str]:
    """The page in UTF-8, and the Content-Security-Policy that allows its one style sheet and its one script alone."""
    environment = Environment(
        loader=PackageLoader("kms_jwks.http"), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
    )
    loader = environment.loader
    assert loader is not None
    style, script = (loader.get_source(environment, name)[0] for name in ("docs.css", "docs.js"))
    description = openapi.document(routes, public_url)
    page = environment.get_template("docs.html").render(
        style=style,
        script=script,
        public_url=public_url,
        version=kms_jwks.__version__,
        max_batch=wire.MAX_BATCH,
        sections=_sections(routes, description["components"]["schemas"]),
        problems=_problems(),
        prefix=problems.TYPE_PREFIX,
        phrase=lambda status: HTTPStatus(status).phrase,
    )
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), policy


def _digest(source: str) -> str:
    """How a policy names an inline text that it allows (CSP level 3 §8.4)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _sections(routes: tuple[Route, ...], schemas: dict[str, Any]) -> list[tuple[str, list[Entry]]]:
    sections: dict[str, list[Entry]] = {name: [] for name in openapi.TAGS}
    for route in routes:
        if route.method != "OPTIONS":
            sections[openapi.tag(route)].append(_entry(route, schemas))
    return list(sections.items())


def _entry(route: Route, schemas: dict[str, Any]) -> Entry:
    refused: dict[int, list[str]] = {}
    for cls in openapi.refusals(route):
        status = problems.status_of(cls)
        if status not in route.statuses:
            refused.setdefault(status, []).append(cls.code)
    answer = route.items or route.answer
    shown = openapi.structs(answer)[:1]
    answered = EXAMPLES[shown[0]] if shown and shown[0] in EXAMPLES else None
    if route.items is not None and answered is not None:
        answered = {"items": [answered]}
    return Entry(
        id=route.operation,
        route=route,
        parameters=tuple(_parameter(found) for found in openapi.parameters(route)),
        example=next((_indented(EXAMPLES[s]) for s in openapi.structs(route.request) if s in EXAMPLES), ""),
        answered="" if answered is None else _indented(answered),
        changes=route.method != "GET" and not route.hot,
        request=_bodies(schemas, openapi.structs(route.request)),
        answer=_bodies(schemas, openapi.structs(answer)),
        successes=tuple(f"{status} {HTTPStatus(status).phrase}" for status in route.statuses),
        refusals=tuple((s, HTTPStatus(s).phrase, tuple(dict.fromkeys(codes))) for s, codes in sorted(refused.items())),
    )


def _parameter(found: dict[str, Any]) -> Parameter:
    schema = found["schema"]
    choices = tuple(schema.get("enum", ()))
    several = tuple(schema["items"].get("enum", ())) if schema.get("type") == "array" else ()
    note = found["description"] + (f" Several of: {', '.join(several)}." if several else "")
    return Parameter(found["name"], found["in"], found.get("required", False), choices, note)


def _indented(example: dict[str, Any]) -> str:
    return json.dumps(example, indent=2, ensure_ascii=False)


def _bodies(schemas: dict[str, Any], structs: tuple[type, ...]) -> tuple[tuple[str, tuple[Field, ...]], ...]:
    """The structs of a body, followed by the structs that these contain."""
    names = [struct.__name__ for struct in structs]
    for name in names:
        names += [n for n in _REFERENCE.findall(json.dumps(schemas[name])) if n not in names]
    return tuple(_fields(schemas, name) for name in names)


_REFERENCE = re.compile(r'"#/components/schemas/(\w+)"')


def _fields(schemas: dict[str, Any], name: str) -> tuple[str, tuple[Field, ...]]:
    schema = schemas[name]
    required = schema.get("required", [])
    return name, tuple(
        Field(field, _type(schemas, inner), field in required, "; ".join(_notes(inner)))
        for field, inner in schema.get("properties", {}).items()
    )


def _type(schemas: dict[str, Any], schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(schemas, each) for each in schema["anyOf"]))
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "enum" in schema:
        return " | ".join(f'"{each}"' if isinstance(each, str) else str(each) for each in schema["enum"])
    if schema.get("type") == "array":
        return f"array of {_type(schemas, schema.get('items', {}))}"
    if schema.get("format") == "date-time":
        return "instant"
    return str(schema.get("type", "any"))


def _notes(schema: dict[str, Any]) -> Iterator[str]:
    for each in (schema, *schema.get("anyOf", ())):
        for key, text in _NOTES.items():
            if key in each:
                yield text.format(each[key])
    if schema.get("default") not in (None, [], ""):
        yield f"default {schema['default']}"


_NOTES = {
    "pattern": "pattern {}",
    "minimum": "at least {}",
    "maximum": "at most {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
}


def _problems() -> list[tuple[int, list[type[errors.Error]]]]:
    """The problem types by status, without those that only the command line raises."""
    local = (errors.ClientError, errors.ConfigurationError)
    by_status: dict[int, list[type[errors.Error]]] = {}
    for cls in errors.BY_CODE.values():
        if not issubclass(cls, local):
            by_status.setdefault(problems.status_of(cls), []).append(cls)
    return sorted(by_status.items())
