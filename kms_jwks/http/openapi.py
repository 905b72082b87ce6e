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
from kms_jwks.http.examples import EXAMPLES
from kms_jwks.http.exchange import CURSOR, JSON, MAX_IDEMPOTENCY_KEY, MAX_PAGE, PROBLEM_JSON, Route, encode
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

_NOT_FOUND: dict[str, type[errors.Error]] = {
    "key_set": errors.KeySetNotFound,
    "key": errors.KeyNotFound,
    "version": errors.VersionNotFound,
    "kid": errors.ExternalKeyNotFound,
    "client": errors.ClientNotFound,
    "token": errors.ApiTokenNotFound,
    "grant": errors.GrantNotFound,
    "worker": errors.WorkerNotFound,
    "backend": errors.BackendUnknown,
}
"""What a path parameter that names nothing is answered with."""


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
            "description": "Callers send an API token as `Authorization: Bearer kj_…`. Errors are problem documents "
            "(RFC 9457). Times are RFC 3339 in UTC with `Z`, durations whole seconds, binary values base64url without "
            "padding.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": public_url}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": _schemas(routes),
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "kj_…",
                    "description": "An API token of a client (`kms-jwks client token create`).",
                }
            },
        },
    }


def refusals(route: Route) -> list[type[errors.Error]]:
    """The error classes that a route can answer with: those of every route of its kind, and its own."""
    found: list[type[errors.Error]] = [errors.InternalError]
    if route.permission:
        found += [errors.Unauthenticated, errors.Forbidden]
    if route.params:
        found.append(errors.RouteNotFound)
    if route.method != "OPTIONS":
        found += [_NOT_FOUND[name] for name in route.params]
    found.append(errors.InvalidField)  # any route, for a query that it does not take
    if route.request is not None:
        # The data plane's rows name their own refusals of a body.
        found += [errors.MalformedBody, errors.LengthMismatch] if route.hot else [errors.InvalidRequest]
        found += [
            problems.LengthRequired,
            errors.BodyTooLarge,
            errors.UnsupportedMediaType,
        ]
    if route.creates:
        found.append(errors.IdempotencyKeyReused)
    found += [cls for cls in route.problems if cls not in found]
    return found


# --- operations -------------------------------------------------------------------------------------------------------


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.operation,
        "summary": route.summary,
        "tags": [tag(route)],
        "responses": dict(sorted(_responses(route))),
    }
    if route.permission:
        operation["description"] = "Permission: " + " or ".join(f"`{p.value}`" for p in route.permission) + "."
        # A public key set needs no credentials; a restricted one needs jwks:read.
        operation["security"] = [{"bearer": []}, {}] if route.media and route.hot else [{"bearer": []}]
    else:
        operation["security"] = []
    found = list(parameters(route))
    if found:
        operation["parameters"] = found
    if route.request is not None:
        operation["requestBody"] = _body(route)
    return operation


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


TAGS = {
    "signing and verifying": "JWTs, other JWS, signatures, and the verification of tokens.",
    "documents": "What verifiers fetch: the JWKS of each key set, and issuer metadata.",
    "keys": "Key sets, keys, key versions and external keys, and their lives.",
    "callers": "Clients, their API tokens, and their grants.",
    "operation": "Workers, the custodian, modules, health, and this description.",
}
"""The groups of the operations in their order, and what is in each."""
_TAGS = {"/v1/key-sets": "keys", "/v1/revocations": "keys", "/v1/clients": "callers", "/v1/grants": "callers"}


def parameters(route: Route) -> Iterator[dict[str, Any]]:
    """What the route takes in its path, its query and its headers."""
    for name in route.params:
        schema, description = _PARAMETERS[name]
        yield {"name": name, "in": "path", "required": True, "schema": schema, "description": description}
    if route.paged:
        limit = {"type": "integer", "minimum": 1, "maximum": MAX_PAGE}
        yield {"name": "limit", "in": "query", "schema": limit, "description": "Items of a page, 50 by default."}
        cursor = {"type": "string", "pattern": f"^{CURSOR}$"}
        yield {"name": "cursor", "in": "query", "schema": cursor, "description": "`next` of the page before."}
    for by in route.filters:
        allowed: dict[str, Any] = {"type": "string", "enum": list(by.choices)} if by.choices else _NAME
        shown: dict[str, Any] = {"name": by.name, "in": "query", "schema": allowed, "description": by.description}
        if by.several:
            shown |= {"schema": {"type": "array", "minItems": 1, "items": allowed}, "style": "form", "explode": False}
        yield shown
    if route.creates:
        yield {
            "name": "Idempotency-Key",
            "in": "header",
            "schema": {"type": "string", "pattern": f'^"[ !#-\\[\\]-~]{{1,{MAX_IDEMPOTENCY_KEY}}}"$'},
            "description": "A fresh value in double quotes, such as a UUID. For 24 hours the same call with the same "
            "value creates nothing further.",
        }
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
    schemas = [_ref(struct.__name__) for struct in bodies]
    if route.batch:
        schemas.append(_ref(_batch_name(route)))
    required = any(field.required for struct in bodies for field in msgspec.structs.fields(struct))
    content: dict[str, Any] = {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}
    found = {struct.__name__: EXAMPLES[struct] for struct in bodies if struct in EXAMPLES}
    if len(found) == 1:
        content["example"] = next(iter(found.values()))
    elif found:
        content["examples"] = {name: {"value": value} for name, value in found.items()}
    return {"required": required, "content": {JSON: content}}


def structs(found: type | UnionType | None) -> tuple[type, ...]:
    """The structs of a row: none, one, or the members of a union."""
    if found is None:
        return ()
    return get_args(found) if isinstance(found, UnionType) else (found,)


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
            "content": {
                PROBLEM_JSON: {"schema": _ref("Problem"), "example": _problem_example(min(classes, key=_code), status)}
            },
        }
        if status == 503:
            answer["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
        yield str(status), answer


def _code(cls: type[errors.Error]) -> str:
    return cls.code


def _problem_example(cls: type[errors.Error], status: int) -> dict[str, Any]:
    return problems.document(cls(), "8f14e45fceea167a5a36dedd", status)


def _family(cls: type[errors.Error]) -> list[type[errors.Error]]:
    return [cls, *(each for sub in cls.__subclasses__() for each in _family(sub))]


def _success(route: Route, status: int) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": HTTPStatus(status).phrase}
    if status in (204, 304):
        return answer
    if route.media:
        answer["content"] = {media: _media(route, media) for media in route.media}
    elif route.answer is not None:
        struct = structs(route.answer)[0]
        content: dict[str, Any] = {"schema": _ref(struct.__name__)}
        if route.items is not None:
            content = {"schema": _ref(page_name(route.items))}
            if route.items in EXAMPLES:
                content["example"] = {"items": [EXAMPLES[route.items]]}
        elif struct in EXAMPLES:
            content["example"] = EXAMPLES[struct]
        if route.batch:
            content["schema"] = {"anyOf": [content["schema"], _ref(f"{_batch_name(route)}Answer")]}
        answer["content"] = {JSON: content}
    headers = {}
    if 304 in route.statuses:
        headers["ETag"] = {"description": "A strong validator.", "schema": {"type": "string"}}
    if status in (201, 202):
        headers["Location"] = {"description": "The path of the created object.", "schema": {"type": "string"}}
    if headers:
        answer["headers"] = headers
    return answer


def _media(route: Route, media: str) -> dict[str, Any]:
    name = _DOCUMENTS.get(route.endpoint.__name__)
    if name is not None and media.endswith("json"):
        return {"schema": _ref(name), "example": EXAMPLES[name]}
    if media.endswith("json"):
        return {"schema": {"type": "object"}}
    return {"schema": {"type": "string"} if media.startswith("text/") or media.endswith("pem-file") else {}}


# --- schemas that no struct has ---------------------------------------------------------------------------------------
# Code generators name a nameless object after the place where it stands, and leave out what then has a name that is
# taken. So every object with fixed members has a name of its own here.

_JWK = {
    "type": "object",
    "required": ["kty", "use", "alg", "kid"],
    "properties": {name: {"type": "string"} for name in ("kty", "use", "alg", "kid")},
    "additionalProperties": True,
    "description": "A public key (RFC 7517 §4); further members are those of its kty.",
}
_URI = {"type": "string", "format": "uri"}
_STRINGS = {"type": "array", "items": {"type": "string"}}
_BY_HAND: dict[str, dict[str, Any]] = {
    "Jwk": _JWK,
    "Jwks": {
        "type": "object",
        "required": ["keys"],
        "properties": {"keys": {"type": "array", "items": {"$ref": REF.format(name="Jwk")}}},
        "description": "A JWK Set (RFC 7517 §5).",
    },
    "IssuerMetadata": {
        "type": "object",
        "required": ["issuer", "jwks_uri"],
        "properties": {
            "issuer": _URI,
            "jwks_uri": _URI,
            "response_types_supported": _STRINGS,
            "subject_types_supported": _STRINGS,
            "id_token_signing_alg_values_supported": _STRINGS,
        },
        "description": "What OpenID Connect Discovery and RFC 8414 ask of an issuer that only signs.",
    },
    "GrantedScope": {
        "type": "object",
        "properties": {"key_set": _NAME, "key": _NAME},
        "description": "A key set, or one of its keys; without members everything.",
    },
    "Refused": {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"$ref": REF.format(name="Problem")}},
        "description": "The place of a batch's item that was refused.",
    },
}
_DOCUMENTS = {
    "jwks": "Jwks",
    "jwks_pq": "Jwks",
    "discovery": "IssuerMetadata",
    "public_key": "Jwk",
    "_openapi_document": "OpenApi",
}
"""The schema of the JSON that an endpoint without a struct answers."""
_BY_HAND["OpenApi"] = {"type": "object", "required": ["openapi"], "properties": {"openapi": {"type": "string"}}}


def page_name(items: type) -> str:
    """The schema of a page of such items."""
    return f"{items.__name__}Page"


def _batch_name(route: Route) -> str:
    return "".join(word.capitalize() for word in route.operation.split("_")) + "Batch"


def _page(items: type) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["items"],
        "properties": {"items": {"type": "array", "items": _ref(items.__name__)}, "next": {"type": "string"}},
        "description": "`next` is the cursor of the following page, absent on the last.",
    }


def _batch(items: list[type | str], minimum: int) -> dict[str, Any]:
    found = [_ref(item if isinstance(item, str) else item.__name__) for item in items]
    listed = found[0] if len(found) == 1 else {"anyOf": found}
    return {
        "type": "object",
        "required": ["batch"],
        "additionalProperties": False,
        "properties": {"batch": {"type": "array", "minItems": minimum, "maxItems": wire.MAX_BATCH, "items": listed}},
    }


def _made(routes: tuple[Route, ...]) -> dict[str, dict[str, Any]]:
    """Pages and batches."""
    found: dict[str, dict[str, Any]] = {}
    for route in routes:
        if route.items is not None:
            found[page_name(route.items)] = _page(route.items)
        if route.batch:
            found[_batch_name(route)] = _batch([*structs(route.request)], 1)
            found[f"{_batch_name(route)}Answer"] = _batch([*structs(route.answer), "Refused"], 0)
    return found


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": REF.format(name=name)}


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
        _open_maps(schema)
    if "Grant" in components:
        components["Grant"]["properties"]["scope"] = _ref("GrantedScope")
    by_hand = {**_BY_HAND, **_made(routes)}
    assert by_hand.keys().isdisjoint(components)
    return dict(sorted({**components, **by_hand}.items()))


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


def _open_maps(schema: Any) -> None:
    """Say of an object without members of its own that it may have any: some generators take the silence for a no."""
    if isinstance(schema, dict):
        if schema.get("type") == "object" and not {"properties", "additionalProperties"} & schema.keys():
            schema["additionalProperties"] = True
        for inner in schema.values():
            _open_maps(inner)
    elif isinstance(schema, list):
        for inner in schema:
            _open_maps(inner)
