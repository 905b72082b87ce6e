"""The table of routes and what is made from it: OpenAPI, the docs page, `--routes`."""

import base64
import hashlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from kms_jwks import errors, wire
from kms_jwks.http import docs, openapi
from kms_jwks.http.examples import EXAMPLES
from kms_jwks.http.exchange import Route, Side
from kms_jwks.http.problems import status_of
from kms_jwks.http.routes import ROUTES, served
from kms_jwks.model import RESERVED_NAMES

URL = "https://keys.example"
STABLE = """
GET /{key_set}/.well-known/jwks.json
GET /.well-known/jwks.json
GET /{key_set}/.well-known/openid-configuration
GET /.well-known/openid-configuration
GET /.well-known/oauth-authorization-server/{key_set}
POST /v1/key-sets/{key_set}/keys/{key}/jwt
POST /v1/key-sets/{key_set}/keys/{key}/signature
POST /v1/key-sets/{key_set}/keys/{key}/jws
GET /v1/key-sets/{key_set}/keys/{key}/active
POST /v1/key-sets/{key_set}/verify
GET /v1/key-sets
POST /v1/key-sets
GET /v1/key-sets/{key_set}
PATCH /v1/key-sets/{key_set}
GET /v1/key-sets/{key_set}/keys
POST /v1/key-sets/{key_set}/keys
GET /v1/key-sets/{key_set}/keys/{key}
PATCH /v1/key-sets/{key_set}/keys/{key}
GET /v1/key-sets/{key_set}/keys/{key}/versions
GET /v1/key-sets/{key_set}/keys/{key}/versions/{version}
GET /v1/key-sets/{key_set}/keys/{key}/versions/{version}/public-key
GET /v1/key-sets/{key_set}/keys/{key}/versions/{version}/safety
GET /v1/key-sets/{key_set}/keys/{key}/versions/{version}/attributes
GET /v1/key-sets/{key_set}/external-keys
POST /v1/key-sets/{key_set}/external-keys
PATCH /v1/key-sets/{key_set}/external-keys/{kid}
DELETE /v1/key-sets/{key_set}/external-keys/{kid}
POST /v1/key-sets/{key_set}/keys/{key}/rotate
POST /v1/key-sets/{key_set}/keys/{key}/disable
POST /v1/key-sets/{key_set}/keys/{key}/enable
POST /v1/key-sets/{key_set}/keys/{key}/versions/{version}/activate
POST /v1/key-sets/{key_set}/keys/{key}/versions/{version}/revoke
POST /v1/key-sets/{key_set}/keys/{key}/versions/{version}/destroy
POST /v1/key-sets/{key_set}/keys/{key}/versions/{version}/cancel-destroy
GET /v1/clients
POST /v1/clients
GET /v1/clients/{client}/tokens
POST /v1/clients/{client}/tokens
GET /v1/grants
POST /v1/grants
GET /v1/backends
GET /v1/nodes
GET /healthz
GET /readyz
GET /readyz/sign
GET /openapi.json
GET /docs
"""


VERBS = {
    *("activate", "cancel", "create", "delete", "destroy", "disable", "enable", "forget", "get", "list"),
    *("patch", "preflight", "retire", "revoke", "rotate", "sign", "verify"),
}


def nameless(schema: Any, path: str = "") -> Iterator[str]:
    """Where an object with members of its own, or a map, stands without a name of its own."""
    if isinstance(schema, dict):
        if path and schema.get("type") == "object":
            yield path
        for name, inner in schema.get("properties", {}).items():
            yield from nameless(inner, path + name)
        for each in ("anyOf", "oneOf", "allOf"):
            for inner in schema.get(each, ()):
                yield from nameless(inner, path)
        yield from nameless(schema.get("items"), path + "item")


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    """JSON Schema's own judge, with the document's components at hand and formats checked."""
    whole = {**schema, "components": document["components"]}
    return Draft202012Validator(whole, format_checker=Draft202012Validator.FORMAT_CHECKER)


def ids(route: Route) -> str:
    return f"{route.method} {route.path}"


def test_the_routes_of_the_design_are_there() -> None:
    assert set(STABLE.strip().splitlines()) <= {ids(route) for route in ROUTES}


def test_no_row_stands_twice() -> None:
    assert len({ids(route) for route in ROUTES}) == len(ROUTES)


@pytest.mark.parametrize("route", ROUTES, ids=ids)
class TestEveryRow:
    def test_endpoint_takes_the_body_that_the_row_names(self, route: Route) -> None:
        parameters = list(inspect.signature(route.endpoint).parameters)
        assert parameters == ["service", "request", "body"][: 2 if route.request is None else 3]
        if isinstance(route.request, type) and not route.batch:
            annotation = inspect.signature(route.endpoint).parameters["body"].annotation
            assert annotation.rpartition(".")[2] == route.request.__name__

    def test_names_its_permission(self, route: Route) -> None:
        if route.path.startswith("/v1/"):
            assert route.permission
            assert route.side is Side.PRIVATE

    def test_parameters_are_documented(self, route: Route) -> None:
        assert set(route.params) <= set(openapi._PARAMETERS)

    def test_its_words_are_no_names(self, route: Route) -> None:
        """A fixed word where a name could stand would hide the thing of that name."""
        siblings = {r.path for r in ROUTES}
        for index, part in enumerate(segments := route.path.split("/")):
            if any(
                other.startswith("/".join(segments[:index]) + "/{") and not part.startswith("{") for other in siblings
            ):
                assert part.split(".")[0] in RESERVED_NAMES | {"", part if "." in part else ""}


class TestServed:
    def test_public_has_documents_and_health_and_nothing_else(self) -> None:
        paths = {route.path for route in served("public")}
        assert {p for p in paths if "/.well-known/" not in p} == {"/healthz", "/readyz"}

    def test_private_has_everything_but_the_documents(self) -> None:
        public = {p.path for p in served("public")} - {"/healthz", "/readyz"}
        assert {r.path for r in served("private")} == {r.path for r in ROUTES} - public

    def test_all_has_all(self) -> None:
        assert served("all") == ROUTES


class TestOpenApi:
    document = openapi.document(ROUTES, URL)

    def test_is_valid_openapi_3_1(self) -> None:
        validate(self.document)
        assert self.document["openapi"].startswith("3.1")
        assert self.document["servers"] == [{"url": URL}]

    def test_has_every_row_and_operation_ids_are_distinct(self) -> None:
        found = {f"{m.upper()} {p}": op for p, ops in self.document["paths"].items() for m, op in ops.items()}
        assert set(found) == {ids(route) for route in ROUTES}
        assert len({op["operationId"] for op in found.values()}) == len(found)

    def test_operation_ids_speak(self) -> None:
        """A verb and what it acts on: generated clients call their functions by these names."""
        for route in ROUTES:
            verb, _, thing = route.operation.partition("_")
            assert verb in VERBS, route.operation
            assert re.fullmatch(r"[a-z]+(_[a-z]+)*", thing), route.operation
        assert {"create_key", "rotate_key", "sign_jwt", "list_grants"} <= {route.operation for route in ROUTES}

    def test_no_generator_gives_two_schemas_one_name(self) -> None:
        """Generators name an object without a name after the schema or operation that holds it, and drop a second one
        of the same name; some write names in camel case, or differ in letter case alone."""
        schemas = self.document["components"]["schemas"]
        names = [name.lower() for name in schemas]
        for holder, schema in schemas.items():
            names += [f"{holder}{path}".replace("_", "").lower() for path in nameless(schema)]
        for route in ROUTES:
            operation = self.document["paths"][route.path][route.method.lower()]
            bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
            for media in (media for body in bodies for media in body.get("content", {}).values()):
                assert not list(nameless(media["schema"])), f"{route.operation}: an object with members needs a name"
        assert sorted(names) == sorted(set(names))

    def test_every_filter_and_idempotency_key_is_described(self) -> None:
        for route in ROUTES:
            operation = self.document["paths"][route.path][route.method.lower()]
            shown = {p["name"] for p in operation.get("parameters", ()) if p["in"] != "path"}
            paging = {"limit", "cursor"} if route.paged else set()
            headers = {"Idempotency-Key"} if route.creates else {"If-Match"} if route.method == "PATCH" else set()
            assert shown == {by.name for by in route.filters} | paging | headers
            assert ("422" in operation["responses"]) == (route.creates or route.operation == "verify_token")

    def test_every_operation_says_what_it_needs_to_be_called(self) -> None:
        scheme = self.document["components"]["securitySchemes"]["bearer"]
        assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
        for route in ROUTES:
            security = self.document["paths"][route.path][route.method.lower()]["security"]
            assert ({"bearer": []} in security) == bool(route.permission)
            assert ({} in security or not security) == (not route.permission or bool(route.hot and route.media))

    def test_every_reference_resolves_and_every_instant_says_so(self) -> None:
        text = msgspec.json.encode(self.document).decode()
        names = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
        assert names <= set(self.document["components"]["schemas"])
        version = self.document["components"]["schemas"]["Version"]["properties"]
        assert version["created_at"]["format"] == "date-time"
        assert version["destroy_at"]["anyOf"][0]["format"] == "date-time"

    @pytest.mark.parametrize(
        ("operation", "status", "codes"),
        [
            ("post /v1/key-sets/{key_set}/keys/{key}/jwt", 404, "route_not_found key_set_not_found key_not_found"),
            (
                "post /v1/key-sets/{key_set}/keys/{key}/jwt",
                409,
                "purpose_mismatch key_disabled key_retired no_active_version kid_not_active",
            ),
            (
                "post /v1/key-sets/{key_set}/keys/{key}/jwt",
                400,
                "invalid_field malformed_body length_mismatch claims_refused invalid_batch",
            ),
            ("get /v1/key-sets/{key_set}/keys/{key}/active", 409, "key_disabled key_retired no_active_version"),
            ("post /v1/key-sets/{key_set}/verify", 400, "invalid_field malformed_body length_mismatch"),
            ("get /v1/clients", 400, "invalid_field"),
            ("delete /v1/nodes/{worker}", 404, "route_not_found worker_not_found"),
            ("get /{key_set}/.well-known/jwks.json", 404, "route_not_found key_set_not_found not_published"),
            ("options /{key_set}/.well-known/jwks.json", 404, "route_not_found"),
            ("post /v1/grants", 404, "client_not_found key_set_not_found key_not_found"),
            (
                "post /v1/key-sets/{key_set}/keys",
                404,
                "route_not_found key_set_not_found backend_not_found",
            ),
            (
                "delete /v1/clients/{client}/tokens/{token}",
                404,
                "route_not_found client_not_found api_token_not_found",
            ),
        ],
    )
    def test_a_route_lists_what_it_can_answer_and_nothing_else(self, operation: str, status: int, codes: str) -> None:
        method, _, path = operation.partition(" ")
        description = self.document["paths"][path][method]["responses"][str(status)]["description"]
        assert set(re.findall("`([a-z_]+)`", description)) == set(codes.split())

    def test_problems_stand_under_their_status(self) -> None:
        operation = self.document["paths"]["/v1/key-sets/{key_set}/keys/{key}/jwt"]["post"]
        for status in ("400", "401", "403", "404", "409", "411", "413", "415", "500", "502", "503", "504"):
            assert "application/problem+json" in operation["responses"][status]["content"], status
        assert "`backend_unavailable`" in operation["responses"]["503"]["description"]
        assert operation["security"] == [{"bearer": []}]


class TestExamples:
    """Every body has an example, which is valid by its schema and for the code that reads it."""

    document = openapi.document(ROUTES, URL)

    @pytest.mark.parametrize("route", ROUTES, ids=ids)
    def test_of_a_route(self, route: Route) -> None:
        operation = self.document["paths"][route.path][route.method.lower()]
        bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
        for media_type, media in ((m, c) for body in bodies for m, c in body.get("content", {}).items()):
            if not media_type.endswith("json"):
                continue
            values = [media["example"]] if "example" in media else [e["value"] for e in media["examples"].values()]
            assert values
            for value in values:
                assert not list(validator(self.document, media["schema"]).iter_errors(value)), media_type

    @pytest.mark.parametrize("struct", [s for s in EXAMPLES if not isinstance(s, str)], ids=lambda s: s.__name__)
    def test_of_a_struct(self, struct: type) -> None:
        found: object = msgspec.convert(EXAMPLES[struct], struct)
        if issubclass(struct, wire.Answer):
            assert msgspec.to_builtins(found) == EXAMPLES[struct], "an answer's example has every member and no other"

    def test_schemas_refuse_what_the_examples_do_not_show(self) -> None:
        schema = {"$ref": "#/components/schemas/KeyCreate"}
        wrong = EXAMPLES[wire.KeyCreate] | {"name": "Not A Name"}
        assert list(validator(self.document, schema).iter_errors(wrong))


class TestDocs:
    page, policy = docs.rendered(ROUTES, URL)
    text = page.decode()

    def test_lists_every_route_field_and_problem(self) -> None:
        for route in ROUTES:
            if route.method != "OPTIONS":
                assert f'id="{route.operation}"' in self.text
        for name in ("signing_input", "publish_lead", "refresh_after", "unconfirmed"):
            assert f"<code>{name}</code>" in self.text
        for code, cls in errors.BY_CODE.items():
            if status_of(cls) != 500:
                assert f"<code>{code}</code>" in self.text

    def test_needs_nothing_from_elsewhere(self) -> None:
        assert not re.search(r'(?:src|href|action)="(?!#|openapi\.json)', self.text)
        assert not re.search(r"<(?:form|base|iframe|object|embed|img|link)\b", self.text)
        assert not re.search(r" on[a-z]+=| style=", self.text)

    def test_the_policy_lets_its_one_style_sheet_and_its_one_script_in(self) -> None:
        for tag, directive in (("style", "style-src"), ("script", "script-src")):
            (source,) = re.findall(rf"<{tag}>(.*?)</{tag}>", self.text, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
            assert f"{directive} 'sha256-{digest}';" in self.policy
        assert self.policy.startswith("default-src 'none'")
        assert "connect-src 'self'" in self.policy
        assert "unsafe" not in self.policy

    def test_the_token_leaves_its_field_for_the_call_alone(self) -> None:
        (script,) = re.findall(r"<script>(.*?)</script>", self.text, re.DOTALL)
        outside = r"Storage|indexedDB|cookie|caches|history|location|innerHTML|outerHTML|insertAdjacent|document\.write"
        assert not re.search(rf"{outside}|eval|Function\(|postMessage|window\.open|sendBeacon|WebSocket", script)
        uses = re.findall(r".*tokenField.*", script)
        assert len(uses) == 3
        assert "headers.Authorization = `Bearer ${tokenField.value.trim()}`" in uses[1]
        assert "tokenField.value = ''" in uses[2]
        for option in (
            "cache: 'no-store'",
            "credentials: 'omit'",
            "redirect: 'error'",
            "referrerPolicy: 'no-referrer'",
        ):
            assert option in script
        (field,) = re.findall(r'<input id="token"[^>]*>', self.text)
        assert 'type="password"' in field
        assert 'autocomplete="off"' in field

    def test_every_field_has_a_label_and_no_name(self) -> None:
        fields = re.findall(r"<(?:input|select|textarea)\b[^>]*>", self.text)
        labels = re.findall(r'<label for="([^"]+)">([^<]+)</label>', self.text)
        assert {name for name, _ in labels} == {re.findall(r'id="([^"]+)"', field)[0] for field in fields}
        assert len(labels) == len(fields) == len({name for name, _ in labels})
        assert not any(" name=" in field for field in fields), "what has a name is put into a form's URL"

    def test_every_route_can_be_tried_and_changes_are_asked_for(self) -> None:
        shown = [route for route in ROUTES if route.method != "OPTIONS"]
        forms = re.findall(r'data-method="(\w+)" data-route="([^"]+)"( data-changes)?', self.text)
        assert {(m, p): bool(c) for m, p, c in forms} == {
            (r.method, r.path): r.method != "GET" and not r.hot for r in shown
        }
        for route in shown:
            for found in openapi.parameters(route):
                field = f"{route.operation}-{found['in']}-{found['name']}".lower()
                assert f'id="{field}"' in self.text

    def test_narrow_windows_have_the_navigation_and_room(self) -> None:
        (style,) = re.findall(r"<style>(.*?)</style>", self.text, re.DOTALL)
        narrow = style[style.index("@media (max-width: 52rem)") :]
        assert "nav { display: none" not in narrow
        assert "table.wide td { display: block" in narrow
        assert 'content="width=device-width, initial-scale=1"' in self.text


# --- texts that the registry keeps


REQUESTS = sorted(
    {route.request for route in ROUTES if isinstance(route.request, type) and route.request.stored},
    key=lambda struct: struct.__name__,
)


@pytest.mark.parametrize("struct", REQUESTS, ids=lambda struct: struct.__name__)
def test_no_text_that_the_registry_may_keep_holds_nul(struct: type[wire.Request]) -> None:
    """PostgreSQL cannot store U+0000. What is signed or verified has rules of its own, and problem codes of its own."""
    for field in struct.__struct_fields__:
        for value in ("\0", "a\0b", ["\0"], {"x": [{"y": "\0"}]}, {"\0": 1}):
            with pytest.raises(errors.InvalidField) as refusal:
                wire.convert({field: value}, struct)
            assert "U+0000" in refusal.value.detail
            assert str(refusal.value.fields["field"]).startswith(field)


def test_what_is_signed_is_not_kept() -> None:
    kept = {struct for struct in wire.Request.__subclasses__() if not struct.stored}
    assert kept == {
        wire.JwtRequest,
        wire.SigningInputRequest,
        wire.JwsRequest,
        wire.RawSignatureRequest,
        wire.VerifyRequest,
    }
    assert wire.convert({"claims": {"a": "\0"}}, wire.JwtRequest).claims == {"a": "\0"}
