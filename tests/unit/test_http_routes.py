"""The table of routes and what is made from it: OpenAPI, the docs page, `--routes`."""

import base64
import hashlib
import inspect
import re

import msgspec
import pytest
from openapi_spec_validator import validate

from kms_jwks import errors
from kms_jwks.http import docs, openapi
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

    def test_every_reference_resolves_and_every_instant_says_so(self) -> None:
        text = msgspec.json.encode(self.document).decode()
        names = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
        assert names <= set(self.document["components"]["schemas"])
        version = self.document["components"]["schemas"]["Version"]["properties"]
        assert version["created_at"]["format"] == "date-time"
        assert version["destroy_at"]["anyOf"][0]["format"] == "date-time"

    def test_problems_stand_under_their_status(self) -> None:
        operation = self.document["paths"]["/v1/key-sets/{key_set}/keys/{key}/jwt"]["post"]
        for status in ("400", "401", "403", "404", "409", "411", "413", "415", "500", "502", "503", "504"):
            assert "application/problem+json" in operation["responses"][status]["content"], status
        assert "`backend_unavailable`" in operation["responses"]["503"]["description"]
        assert operation["security"] == [{"bearer": []}]


class TestDocs:
    page, policy = docs.rendered(ROUTES, URL)
    text = page.decode()

    def test_lists_every_route_field_and_problem(self) -> None:
        for route in ROUTES:
            if route.method != "OPTIONS":
                assert f'id="{openapi.operation_id(route)}"' in self.text
        for name in ("signing_input", "publish_lead", "refresh_after", "unconfirmed"):
            assert f"<code>{name}</code>" in self.text
        for code, cls in errors.BY_CODE.items():
            if status_of(cls) != 500:
                assert f"<code>{code}</code>" in self.text

    def test_needs_nothing_from_elsewhere(self) -> None:
        assert "<script" not in self.text
        assert not re.search(r'(?:src|href)="(?!#|openapi\.json)', self.text)

    def test_the_policy_lets_its_one_style_sheet_in(self) -> None:
        (style,) = re.findall(r"<style>(.*?)</style>", self.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        assert f"style-src 'sha256-{digest}'" in self.policy
        assert self.policy.startswith("default-src 'none'")
        assert "style=" not in self.text
