"""The API in OpenAPI 3.1, made from the table of routes and the wire structs."""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from http import HTTPStatus
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args

import msgspec

import kms_jwks
from kms_jwks import errors, wire
from kms_jwks.http import problems
from kms_jwks.http.exchange import CURSOR, JSON, MAX_PAGE, PROBLEM_JSON, Route, encode
from kms_jwks.model import MAX_KID, NAME_PATTERN

if TYPE_CHECKING:
    from collections.abc import Iterator

REF = "#/components/schemas/{name}"

_NAME = {"type": "string", "pattern": f"^{NAME_PATTERN}$"}
_ID = {"type": "string", "minLength": 1, "maxLength": 64}
_KID_SEGMENT = {
    "type": "string",
    "minLength": 1,
    "anyOf": [{"maxLength": MAX_KID}, {"pattern": "^~[A-Za-z0-9_-]+$", "maxLength": 1361}],
}
_KID_WORDS = "percent-encoded, or `~` and the base64url of its UTF-8, which no proxy changes."
_PARAMETERS: dict[str, tuple[dict[str, Any], str]] = {
    "key_set": (_NAME, "A key set's name."),
    "key": (_NAME, "A key's name within its key set."),
    "version": (_KID_SEGMENT, f"A version's number, or its kid; {_KID_WORDS}"),
    "kid": (_KID_SEGMENT, f"The external key's kid; {_KID_WORDS}"),
    "client": (_NAME, "A client's name."),
    "token": (_ID, "The API token's id, never the token itself."),
    "grant": (_ID, "The grant's id."),
    "worker": (_ID, "The worker's id, as /v1/nodes lists it."),
    "backend": (_NAME, "A backend's name in the configuration."),
}


@lru_cache(maxsize=1)
def encoded(routes: tuple[Route, ...], public_url: str) -> bytes:
    """The whole description as JSON. `public_url` is the URL under which clients reach the service."""
    return encode(document(routes, public_url))


def document(routes: tuple[Route, ...], public_url: str) -> dict[str, Any]:
    """The same as an object."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kms-jwks",
            "version": kms_jwks.__version__,
            "summary": "Signs with keys that never leave their module, and publishes the JWKS that verifies.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": public_url}],
        "paths": paths,
        "components": {
            "schemas": _schemas(routes),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "An API token (`kj_…`)."}
            },
        },
    }


def refusals(route: Route) -> list[type[errors.Error]]:
    """The error classes that a route can answer with: those of every route of its kind, and its own."""
    found: list[type[errors.Error]] = [errors.InternalError]
    if route.permission:
        found += [errors.Unauthenticated, errors.Forbidden]
    if route.params:
        found.append(errors.NotFound if route.method != "OPTIONS" else errors.RouteNotFound)
    if route.request is not None:
        found += [
            errors.InvalidRequest,
            problems.LengthRequired,
            errors.BodyTooLarge,
            errors.UnsupportedMediaType,
        ]
    if route.paged:
        found.append(errors.InvalidRequest)
    found += [cls for cls in route.problems if cls not in found]
    return found


# --- operations -------------------------------------------------------------------------------------------------------


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": operation_id(route),
        "summary": route.summary,
        "tags": [tag(route)],
        "responses": dict(sorted(_responses(route))),
    }
    if route.permission:
        operation["description"] = "Permission: " + " or ".join(f"`{p.value}`" for p in route.permission) + "."
        # A public key set needs no credentials; a restricted one needs jwks:read.
        operation["security"] = [{"bearer": []}, {}] if route.media and route.hot else [{"bearer": []}]
    parameters = list(_parameters(route))
    if parameters:
        operation["parameters"] = parameters
    if route.request is not None:
        operation["requestBody"] = _body(route)
    return operation


def operation_id(route: Route) -> str:
    """A distinct name for every row, which code generators need."""
    parts = [p.strip("{}").replace(".", "") for p in route.path.split("/") if p not in ("", "v1")]
    words = "_".join(("by_" + p) if "{" + p + "}" in route.path else p.replace("-", "_") for p in parts)
    return f"{route.method.lower()}_{words}"


def tag(route: Route) -> str:
    """The route's group in the docs."""
    if "/.well-known/" in route.path:
        return "documents"
    if route.hot:
        return "signing and verifying"
    for start, name in _TAGS.items():
        if route.path.startswith(start):
            return name
    return "operation"


_TAGS = {"/v1/key-sets": "keys", "/v1/revocations": "keys", "/v1/clients": "callers", "/v1/grants": "callers"}


def _parameters(route: Route) -> Iterator[dict[str, Any]]:
    for name in route.params:
        schema, description = _PARAMETERS[name]
        yield {"name": name, "in": "path", "required": True, "schema": schema, "description": description}
    if route.paged:
        limit = {"type": "integer", "minimum": 1, "maximum": MAX_PAGE}
        yield {"name": "limit", "in": "query", "schema": limit, "description": "Items of a page, 50 by default."}
        cursor = {"type": "string", "pattern": f"^{CURSOR}$"}
        yield {"name": "cursor", "in": "query", "schema": cursor, "description": "`next` of the page before."}
    if route.method == "PATCH":
        yield {
            "name": "If-Match",
            "in": "header",
            "required": True,
            "schema": {"type": "string", "pattern": '^"[0-9]{1,18}"$'},
            "description": "The ETag of the object as it was read.",
        }


def _body(route: Route) -> dict[str, Any]:
    bodies = structs(route.request)
    schemas = [{"$ref": REF.format(name=struct.__name__)} for struct in bodies]
    if route.batch:
        items = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        schemas = [*schemas, _batch(items, minimum=1)]
    required = any(field.required for struct in bodies for field in msgspec.structs.fields(struct))
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"required": required, "content": {JSON: {"schema": schema}}}


def structs(found: type | UnionType | None) -> tuple[type, ...]:
    """The structs of a row: none, one, or the members of a union."""
    if found is None:
        return ()
    return get_args(found) if isinstance(found, UnionType) else (found,)


def _batch(items: dict[str, Any], minimum: int = 0) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["batch"],
        "additionalProperties": False,
        "properties": {"batch": {"type": "array", "minItems": minimum, "maxItems": wire.MAX_BATCH, "items": items}},
    }


# --- answers ----------------------------------------------------------------------------------------------------------


def _responses(route: Route) -> Iterator[tuple[str, dict[str, Any]]]:
    for status in route.statuses:
        yield str(status), _success(route, status)
    by_status: dict[int, list[type[errors.Error]]] = {}
    for cls in refusals(route):
        for each in _family(cls):
            listed = by_status.setdefault(problems.status_of(each), [])
            if each.code and each not in listed:
                listed.append(each)
    for status, classes in by_status.items():
        if status in route.statuses:
            continue
        codes = sorted({cls.code for cls in classes})
        answer: dict[str, Any] = {
            "description": f"{HTTPStatus(status).phrase}: " + ", ".join(f"`{code}`" for code in codes),
            "content": {PROBLEM_JSON: {"schema": {"$ref": REF.format(name="Problem")}}},
        }
        if status == 503:
            answer["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
        yield str(status), answer


def _family(cls: type[errors.Error]) -> list[type[errors.Error]]:
    return [cls, *(each for sub in cls.__subclasses__() for each in _family(sub))]


def _success(route: Route, status: int) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": HTTPStatus(status).phrase}
    if status in (204, 304):
        return answer
    if route.media:
        answer["content"] = {media: {"schema": _media_schema(media)} for media in route.media}
    elif route.answer is not None:
        schema: dict[str, Any] = {"$ref": REF.format(name=structs(route.answer)[0].__name__)}
        if route.items is not None:
            item = {"$ref": REF.format(name=route.items.__name__)}
            schema = {
                "type": "object",
                "required": ["items"],
                "properties": {"items": {"type": "array", "items": item}, "next": {"type": "string"}},
            }
        elif route.batch:
            refused = {
                "type": "object",
                "required": ["error"],
                "properties": {"error": {"$ref": REF.format(name="Problem")}},
            }
            schema = {"anyOf": [schema, _batch({"anyOf": [schema, refused]})]}
        answer["content"] = {JSON: {"schema": schema}}
    headers = {}
    if 304 in route.statuses:
        headers["ETag"] = {"description": "A strong validator.", "schema": {"type": "string"}}
    if status in (201, 202):
        headers["Location"] = {"description": "The path of the created object.", "schema": {"type": "string"}}
    if headers:
        answer["headers"] = headers
    return answer


def _media_schema(media: str) -> dict[str, Any]:
    if media.endswith("json"):
        return {"type": "object"}
    return {"type": "string"} if media.startswith("text/") or media.endswith("pem-file") else {}


# --- schemas ----------------------------------------------------------------------------------------------------------


def _schemas(routes: tuple[Route, ...]) -> dict[str, Any]:
    found: list[type] = [wire.Problem]
    for route in routes:
        for struct in (*structs(route.request), *structs(route.answer), *structs(route.items)):
            if struct not in found and struct is not wire.Page:
                found.append(struct)
    _, components = msgspec.json.schema_components(found, ref_template=REF)
    for name, schema in components.items():
        _mark_instants(getattr(wire, name, None), schema)
    return dict(sorted(components.items()))


def _mark_instants(struct: type | None, schema: dict[str, Any]) -> None:
    """Add `format: date-time`: msgspec does so only where the annotation asks for a time zone."""
    if struct is None:
        return
    for field in msgspec.structs.fields(struct):
        if datetime in (field.type, *get_args(field.type)):
            inner = schema["properties"][field.encode_name]
            for each in (inner, *inner.get("anyOf", ())):
                if each.get("type") == "string":
                    each["format"] = "date-time"
