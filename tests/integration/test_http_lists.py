"""Lists that leave items out, and creations that are sent again, over real HTTP."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kms_jwks import errors, wire
from kms_jwks.client import Client
from kms_jwks.client.transport import Transport
from kms_jwks.http.examples import EXAMPLES
from kms_jwks.http.exchange import Filter, Route
from kms_jwks.http.routes import ROUTES
from tests.integration.conftest import Run, Server, fresh

FILTERS = [(route, by) for route in ROUTES if route.paged for by in route.filters]


@pytest.fixture(scope="module")
def names(server: Server) -> dict[str, str]:
    """A key set with the keys `k1`, which signs, and `k2`, which is disabled; a client with one token of each kind."""
    key_set = server.key_set(None, "ES256", "EdDSA", standby=True)
    server.must("POST", f"/v1/key-sets/{key_set}/keys/k2/disable")
    client, _ = server.client_with("signer", key_set=key_set, key="k1")
    server.must("POST", "/v1/grants", {"client": client, "role": "auditor", "scope": {}})
    revoked = server.must("POST", f"/v1/clients/{client}/tokens", {})
    server.must("DELETE", f"/v1/clients/{client}/tokens/{revoked['id']}")
    return {"key_set": key_set, "key": "k1", "client": client, "revoked": revoked["id"]}


def path_of(route: Route, names: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: names[found[1]], route.path)


@pytest.mark.parametrize(
    ("route", "by"), FILTERS, ids=lambda part: getattr(part, "operation", getattr(part, "name", ""))
)
def test_every_filter_takes_its_values_and_refuses_others(
    server: Server, names: dict[str, str], route: Route, by: Filter
) -> None:
    path = path_of(route, names)
    allowed = by.choices or (names.get(by.name, "softhsm"),)
    for value in (*allowed, *([",".join(allowed)] if by.several else [])):
        assert server.call("GET", f"{path}?{by.name}={value}").status == 200, value
    for value in ("", "No%20Name", f"{allowed[0]},", *([] if by.several else [f"{allowed[0]},{allowed[-1]}"])):
        answer = server.call("GET", f"{path}?{by.name}={value}")
        assert (answer.status, answer.problem, answer.json["field"]) == (400, "invalid_field", by.name), value
        assert by.name in answer.json["detail"]


def test_what_lists_leave_out(server: Server, names: dict[str, str]) -> None:
    def found(path: str, member: str) -> list[Any]:
        return [item[member] for item in server.must("GET", path)["items"]]

    key_set, client = names["key_set"], names["client"]
    raw = server.key_set(None, "ES256", purpose="raw")
    versions = f"/v1/key-sets/{key_set}/keys/k1/versions"
    assert found(f"/v1/key-sets/{key_set}/keys?state=enabled", "name") == ["k1"]
    assert found(f"/v1/key-sets/{key_set}/keys?state=disabled", "name") == ["k2"]
    assert found(f"/v1/key-sets/{key_set}/keys?backend=softhsm&state=enabled", "name") == ["k1"]
    assert found(f"/v1/key-sets/{key_set}/keys?backend=other", "name") == []
    assert found(f"{versions}?state=active", "number") == [1]
    assert found(f"{versions}?state=published,active", "number") == [1, 2]
    assert found(f"{versions}?state=destroyed", "number") == []
    assert found(f"/v1/clients/{client}/tokens?state=revoked", "id") == [names["revoked"]]
    assert len(found(f"/v1/clients/{client}/tokens?state=valid", "id")) == 1
    assert found(f"/v1/clients/{client}/tokens?state=expired", "id") == []
    assert found(f"/v1/grants?client={client}", "role") == ["signer", "auditor"]
    assert found(f"/v1/grants?client={client}&role=auditor", "role") == ["auditor"]
    assert found(f"/v1/grants?key_set={key_set}", "client") == [client]
    assert raw in found("/v1/key-sets?purpose=raw&limit=200", "name")
    assert key_set not in found("/v1/key-sets?purpose=raw&limit=200", "name")
    (node,) = set(found("/v1/nodes", "node"))
    assert len(found(f"/v1/nodes?node={node}&state=live", "pid")) == 2
    assert found("/v1/nodes?state=silent", "pid") == []
    assert server.call("GET", "/v1/grants?client=nothing-here").problem == "client_not_found"
    assert server.call("GET", "/v1/grants?key_set=nothing-here").problem == "key_set_not_found"


def test_filtered_lists_have_pages(server: Server, names: dict[str, str]) -> None:
    for role in ("verifier", "operator", "raw-signer"):
        server.must("POST", "/v1/grants", {"client": names["client"], "role": role, "scope": {}})
    path, seen = f"/v1/grants?client={names['client']}&limit=2", []
    cursor = ""
    for _ in range(9):
        page = server.must("GET", path + cursor)
        seen += [grant["role"] for grant in page["items"]]
        if "next" not in page:
            break
        cursor = f"&cursor={page['next']}"
    assert seen == ["signer", "auditor", "verifier", "operator", "raw-signer"]


def test_a_list_of_key_sets_is_short(server: Server, names: dict[str, str]) -> None:
    items = server.must("GET", "/v1/key-sets?limit=200")["items"]
    (item,) = [item for item in items if item["name"] == names["key_set"]]
    whole = server.must("GET", f"/v1/key-sets/{names['key_set']}")
    del whole["external_keys_removed"]
    assert {**whole, "keys": item["keys"]} == item
    for short, key in zip(item["keys"], whole["keys"], strict=True):
        assert short == {member: key[member] for member in ("name", "alg", "enabled", "active_kid")}


def test_the_client_and_the_command_line_leave_out_the_same(server: Server, run: Run, names: dict[str, str]) -> None:
    key_set, client = names["key_set"], names["client"]
    with Client(server.url, server.admin) as api:
        assert [k.name for k in api.keys(key_set, state="disabled")] == ["k2"]
        assert [v.number for v in api.versions(key_set, "k1", states=["active"])] == [1]
        assert [t.id for t in api.tokens(client, state="revoked")] == [names["revoked"]]
        assert {g.client for g in api.grants(key_set=key_set)} == {client}
        assert list(api.nodes(state="silent")) == []
        assert key_set not in {s.name for s in api.key_sets(purpose="raw")}
        with pytest.raises(errors.InvalidField):
            list(api.keys(key_set, state="asleep"))
    assert run("version", "list", key_set, "k1", "--state", "retiring", "--state", "revoked").stdout == "(none)\n"
    assert names["revoked"] in run("client", "token", "list", client, "--state", "revoked").stdout
    assert client not in run("grant", "list", "--client", client, "--role", "break-glass").stdout
    assert client in run("grant", "list", "--key-set", key_set, "--json").stdout
    assert "k2" in run("key", "list", key_set, "--state", "disabled").stdout
    assert run("node", "list", "--state", "silent").stdout.startswith("(none)\n")
    run("key", "list", key_set, "--state", "asleep", code=2)


# --- creations that are sent again ------------------------------------------------------------------------------------


def test_a_creation_that_is_sent_again_is_answered_again(server: Server) -> None:
    name, key = fresh("set"), fresh("key")
    call: dict[str, Any] = {"payload": {"name": name, "keys": [{"name": "k", "alg": "ES256"}]}}
    first, bare, other, fresh_one = (
        server.call("POST", "/v1/key-sets", **call | more, headers={"Idempotency-Key": header})
        for header, more in (
            (f'"{key}"', {}),
            (key, {}),
            (f'"{key}"', {"payload": {"name": fresh("set")}}),
            (f'"{key}-2"', {}),
        )
    )
    assert (first.status, bare.status) == (201, 201)
    assert bare.headers["Location"] == first.headers["Location"] == f"/v1/key-sets/{name}"
    assert bare.json["created_at"] == first.json["created_at"]
    assert (other.status, other.problem) == (422, "idempotency_key_reused")
    assert (fresh_one.status, fresh_one.problem) == (409, "name_taken")


def test_a_token_is_not_shown_again(server: Server) -> None:
    client, _ = server.client_with()
    answers = [
        server.call("POST", f"/v1/clients/{client}/tokens", {}, headers={"Idempotency-Key": '"once"'}) for _ in range(2)
    ]
    assert (answers[0].status, answers[1].status, answers[1].problem) == (201, 409, "token_not_shown_again")
    assert answers[1].json["token_id"] == answers[0].json["id"]
    assert answers[0].json["token"] not in answers[1].body.decode()
    assert answers[0].json["token"] not in server.log


@pytest.mark.parametrize("header", ['""', '"a', "a b", '"a"b"', '"ä"', "a" * 256, f'"{"a" * 256}"', '"a", "b"'])
def test_an_idempotency_key_that_is_none_is_refused(server: Server, header: str) -> None:
    name = fresh("client")
    answer = server.call(
        "POST", "/v1/clients", {"name": name}, headers={"Idempotency-Key": header.encode().decode("latin-1")}
    )
    assert (answer.status, answer.problem, answer.json["field"]) == (400, "invalid_field", "Idempotency-Key")
    assert server.call("GET", f"/v1/clients/{name}").status == 404


def test_other_calls_take_no_notice_of_it(server: Server) -> None:
    path = "/v1/key-sets/default/keys/default/jwt"
    headers = {"Idempotency-Key": '"same"'}
    tokens = [server.must("POST", path, {"claims": {}}, token=server.signer, headers=headers) for _ in range(2)]
    assert tokens[0]["jti"] != tokens[1]["jti"]


def test_the_client_sends_a_creation_again_when_its_answer_was_lost(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, lost = Transport._read, [True]

    def lose(self: Transport, response: Any, timeout: float) -> bytes:
        body = read(self, response, timeout)
        if lost.pop():
            raise OSError("the connection ended")
        return body

    monkeypatch.setattr(Transport, "_read", lose)
    name = fresh("client")
    with Client(server.url, server.admin) as api:
        lost[:] = [False, True]
        assert api.create_client(name).name == name
        lost[:] = [False, True]
        with pytest.raises(errors.TokenNotShownAgain) as refusal:
            api.create_token(name)
        lost[:] = [False]
        assert [token.id for token in api.tokens(name)] == [refusal.value.fields["token_id"]]


# --- the examples of the description ----------------------------------------------------------------------------------


def test_the_service_takes_the_examples_of_its_description(server: Server) -> None:
    """Those that need nothing which an example cannot know, such as a kid; names are changed to fresh ones."""
    name, client = fresh("shop"), fresh("shop-issuer")

    def send(method: str, path: str, struct: type[wire.Request], **changes: Any) -> Any:
        headers = {}
        if method == "PATCH":
            headers["If-Match"] = server.call("GET", path).headers["ETag"]
        return server.must(method, path, EXAMPLES[struct] | changes, headers=headers)

    send("POST", "/v1/key-sets", wire.KeySetCreate, name=name)
    send("PATCH", f"/v1/key-sets/{name}", wire.KeySetPatch)
    send("POST", f"/v1/key-sets/{name}/keys", wire.KeyCreate, rsa_bits=2048)  # larger ones take seconds to make
    send("PATCH", f"/v1/key-sets/{name}/keys/main", wire.KeyPatch)
    send("POST", f"/v1/key-sets/{name}/external-keys", wire.ExternalKeyCreate)
    version = f"/v1/key-sets/{name}/keys/reports/versions/1"
    assert send("POST", f"{version}/revoke", wire.RevokeRequest)["dry_run"] is True
    send("POST", "/v1/clients", wire.ClientCreate, name=client)
    token = send("POST", f"/v1/clients/{client}/tokens", wire.TokenCreate)["token"]
    send("POST", "/v1/grants", wire.GrantCreate, client=client, scope={"key_set": name, "key": "main"})
    server.must("POST", f"/v1/key-sets/{name}/keys/main/jwt", EXAMPLES[wire.JwtRequest], token=token)
    raw, signer = server.key_set(None, "ES256", purpose="raw"), server.client("raw-signer")
    for route, struct in (("jws", wire.JwsRequest), ("signature", wire.RawSignatureRequest)):
        server.must("POST", f"/v1/key-sets/{raw}/keys/k1/{route}", EXAMPLES[struct], token=signer)
