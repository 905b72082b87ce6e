"""Who may call what: every private row of the table, without a token, without the permission, and with it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import pytest

from kms_jwks.access import ROLES, Permission, Role
from kms_jwks.http.exchange import Route
from kms_jwks.http.routes import ROUTES
from tests.integration.conftest import Server, fresh

P = Permission
OPEN = {"get_health", "get_readiness", "get_signing_readiness", "get_openapi", "get_docs"}

JWK = {"kty": "EC", "crv": "P-256", "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
       "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}  # fmt: skip

# What each row asks for, and a body that is refused after the caller was let in, so that nothing is changed by asking.
EXPECTED: dict[str, tuple[Permission, Any]] = {
    "sign_jwt": (P.JWT_SIGN, {"claims": {}}),
    "sign_jws": (P.JWS_SIGN, {"payload": "YQ"}),
    "sign_input": (P.JWT_SIGN, {"signing_input": "a.b", "kid": "x"}),
    "get_active_version": (P.KEY_READ, None),
    "verify_token": (P.TOKEN_VERIFY, {"token": "x", "audience": "any"}),
    "list_key_sets": (P.KEY_SET_READ, None),
    "create_key_set": (P.KEY_SET_CREATE, {"name": "v1"}),
    "get_key_set": (P.KEY_SET_READ, None),
    "patch_key_set": (P.KEY_SET_UPDATE, {"cache_lifetime": 301}),
    "retire_key_set": (P.KEY_SET_DELETE, None),
    "delete_key_set": (P.KEY_SET_DELETE, None),
    "list_keys": (P.KEY_READ, None),
    "create_key": (P.KEY_CREATE, {"name": "v1", "alg": "ES256"}),
    "get_key": (P.KEY_READ, None),
    "get_key_timeline": (P.KEY_READ, None),
    "patch_key": (P.KEY_UPDATE, {}),
    "rotate_key": (P.KEY_ROTATE, None),
    "disable_key": (P.KEY_DISABLE, None),
    "enable_key": (P.KEY_ENABLE, None),
    "retire_key": (P.KEY_DELETE, None),
    "delete_key": (P.KEY_DELETE, None),
    "list_versions": (P.KEY_READ, None),
    "create_version": (P.KEY_ROTATE, None),
    "get_version": (P.KEY_READ, None),
    "get_public_key": (P.KEY_READ, None),
    "get_version_safety": (P.KEY_READ, None),
    "get_version_attributes": (P.KEY_READ, None),
    "activate_version": (P.VERSION_ACTIVATE, None),
    "retire_version": (P.KEY_ROTATE, None),
    "revoke_version": (P.VERSION_REVOKE, None),
    "create_revocation": (P.VERSION_REVOKE, {"backend": "nothing", "reason": "x"}),
    "destroy_version": (P.VERSION_DESTROY, None),
    "cancel_destroy": (P.VERSION_DESTROY, None),
    "list_external_keys": (P.KEY_READ, None),
    "create_external_key": (
        P.EXTERNAL_KEY_MANAGE,
        {"kid": "x", "alg": "ES256", "remove_at": "2001-01-01T00:00:00Z", "jwk": JWK},
    ),
    "get_external_key": (P.KEY_READ, None),
    "patch_external_key": (P.EXTERNAL_KEY_MANAGE, {"remove_at": "2001-01-01T00:00:00Z"}),
    "delete_external_key": (P.EXTERNAL_KEY_REMOVE, None),
    "list_clients": (P.CLIENT_READ, None),
    "create_client": (P.CLIENT_MANAGE, {"name": "v1"}),
    "get_client": (P.CLIENT_READ, None),
    "delete_client": (P.CLIENT_MANAGE, None),
    "list_tokens": (P.CLIENT_READ, None),
    "create_token": (P.CLIENT_MANAGE, {}),
    "revoke_token": (P.CLIENT_MANAGE, None),
    "rotate_token": (P.CLIENT_MANAGE, {}),
    "list_grants": (P.CLIENT_READ, None),
    "create_grant": (P.GRANT_MANAGE, {"client": "nothing", "role": "admin", "scope": {}}),
    "get_grant": (P.CLIENT_READ, None),
    "delete_grant": (P.GRANT_MANAGE, None),
    "list_nodes": (P.NODE_READ, None),
    "get_custodian": (P.NODE_READ, None),
    "forget_worker": (P.NODE_MANAGE, None),
    "list_backends": (P.BACKEND_READ, None),
    "get_backend": (P.BACKEND_READ, None),
}

END_A_SET = {"retire_key_set", "delete_key_set"}
"""Rows that would end the key set that the others ask about."""
PRIVATE = [r for r in ROUTES if "/.well-known/" not in r.path and r.operation not in OPEN]


def test_every_private_row_has_an_expectation_and_no_other() -> None:
    assert {route.operation for route in PRIVATE} == set(EXPECTED)


@dataclass
class Callers:
    """A key set to ask about, and a token per role; `nobody` has no grant."""

    server: Server
    key_set: str
    tokens: dict[str, str]

    def ask(self, route: Route, token: str | None) -> tuple[int, bytes]:
        path = route.path
        if route.operation not in END_A_SET:
            path = path.replace("{key_set}", self.key_set)
        path = re.sub(r"\{\w+\}", "nothing", path)
        answer = self.server.call(route.method, path, EXPECTED[route.operation][1], token=token)
        if answer.status >= 400:
            assert answer.problem
        return answer.status, answer.body


@pytest.fixture(scope="module")
def callers(server: Server) -> Callers:
    key_set = fresh("auth")
    server.must("POST", "/v1/key-sets", {"name": key_set})
    tokens = {role.value: server.client(role.value) for role in Role} | {"nobody": server.client()}
    return Callers(server, key_set, tokens)


@pytest.mark.parametrize("route", PRIVATE, ids=attrgetter("operation"))
class TestEveryPrivateRoute:
    def test_without_a_token(self, callers: Callers, route: Route) -> None:
        assert callers.ask(route, None)[0] == 401

    def test_without_any_grant(self, callers: Callers, route: Route) -> None:
        assert callers.ask(route, callers.tokens["nobody"])[0] == 403

    def test_with_every_role(self, callers: Callers, route: Route) -> None:
        """403 for the roles that lack the permission; the others get past the guard, and nothing is there."""
        permission, _ = EXPECTED[route.operation]
        for role, permissions in ROLES.items():
            status, body = callers.ask(route, callers.tokens[role.value])
            assert (status == 403) == (permission not in permissions), (role, status, body)
            assert status < 500 or status == 502, body


def test_a_scope_holds_what_it_names_and_nothing_else(server: Server) -> None:
    here, there = server.key_set(None, "ES256", "ES256"), server.key_set(None, "ES256")
    whole, one = server.client("signer", key_set=here), server.client("signer", key_set=here, key="k1")

    def sign(key_set: str, key: str, token: str) -> int:
        return server.call("POST", f"/v1/key-sets/{key_set}/keys/{key}/jwt", {"claims": {}}, token=token).status

    assert [sign(here, k, whole) for k in ("k1", "k2")] == [200, 200]
    assert [sign(here, k, one) for k in ("k1", "k2")] == [200, 403]
    assert [sign(there, "k1", token) for token in (whole, one)] == [403, 403]


def test_the_administrator_of_a_key_set_adds_no_key_of_its_own(server: Server) -> None:
    here = server.key_set(None, "ES256")
    local = server.client("admin", key_set=here)
    body = {"kid": fresh("forged"), "alg": "ES256", "remove_at": "2099-01-01T00:00:00Z", "jwk": JWK}
    path = f"/v1/key-sets/{here}/external-keys"
    refused = server.call("POST", path, body, token=local)
    assert (refused.status, refused.json["type"]) == (403, "urn:kms-jwks:problem:forbidden")
    assert refused.json["permission"] == "external-key:manage"
    assert server.must("GET", path)["items"] == []
    added = server.must("POST", path, body)
    assert added["created_by"] == "admin-bootstrap"
    assert server.call("DELETE", f"{path}/{body['kid']}", token=local).status == 204
    assert [e["created_by"] for e in server.must("GET", path)["items"]] == ["admin-bootstrap"]


def test_an_administrator_gets_no_right_to_sign(server: Server) -> None:
    """Not by its own hand, and from another administrator only where that accepts it in so many words."""
    name, token = server.client_with("admin")
    mine = server.must("POST", "/v1/clients", {"name": fresh("mine")}, token=token)["name"]
    for client in ("admin-bootstrap", name):
        body = {"client": client, "role": "signer", "scope": {"key_set": "default"}}
        own = server.call("POST", "/v1/grants", body, token=token if client == name else "admin")
        assert (own.status, own.json["type"]) == (403, "urn:kms-jwks:problem:forbidden")
    refused = server.call("POST", "/v1/grants", {"client": name, "role": "signer", "scope": {"key_set": "default"}})
    assert (refused.status, refused.json["type"]) == (409, "urn:kms-jwks:problem:combined_duties")
    (held,) = [g for g in server.must("GET", "/v1/grants?limit=200")["items"] if g["client"] == name]
    assert refused.json["grants"] == [held["id"]]
    given = {"client": name, "role": "signer", "scope": {"key_set": "default"}, "accept_combined_duties": True}
    assert server.must("POST", "/v1/grants", given)["combined_with"] == [held["id"]]
    # The way that remains until two people have to approve (docs/security.md).
    server.must("POST", "/v1/grants", {"client": mine, "role": "signer", "scope": {}}, token=token)
    detour = server.must("POST", f"/v1/clients/{mine}/tokens", {}, token=token)["token"]
    server.must("POST", "/v1/key-sets/default/keys/default/jwt", {"claims": {}}, token=detour)


def test_lists_show_what_the_grants_cover(server: Server) -> None:
    here = server.key_set(None, "ES256")
    token = server.client("auditor", key_set=here)
    assert [s["name"] for s in server.must("GET", "/v1/key-sets", token=token)["items"]] == [here]


def test_open_routes_need_no_token(server: Server) -> None:
    for path in ("/healthz", "/readyz", "/readyz/sign", "/openapi.json", "/docs", "/default/.well-known/jwks.json"):
        assert server.call("GET", path, token=None).status == 200, path
        assert server.call("GET", path, token="not a token").status == 200, path
