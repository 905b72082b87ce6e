"""What verifiers and browsers get: the JWKS with its headers, discovery, restricted sets, the API's description."""

from __future__ import annotations

import pytest
from openapi_spec_validator import validate

from kms_jwks.authn import new_token
from tests.integration.conftest import Answer, Server, fresh, wait_until


@pytest.fixture(scope="module")
def shop(server: Server) -> str:
    return server.key_set(None, "ES256", "EdDSA", standby=True)


def fetch(server: Server, path: str, method: str = "GET", **headers: str) -> Answer:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.call(method, path, token=None, headers=sent)


class TestJwks:
    def test_what_is_in_it(self, server: Server, shop: str) -> None:
        answer = fetch(server, f"/{shop}/.well-known/jwks.json")
        keys = answer.json["keys"]
        assert set(answer.json) == {"keys"}
        for key in keys:
            parameters = {"EC": {"crv", "x", "y"}, "OKP": {"crv", "x"}}[key["kty"]]
            assert set(key) == {"kty", "use", "alg", "kid"} | parameters
            assert key["use"] == "sig"
        active = {server.must("GET", f"/v1/key-sets/{shop}/keys/{k}")["active_kid"] for k in ("k1", "k2")}
        assert {key["kid"] for key in keys[:2]} == active, "active first"

    def test_headers(self, server: Server, shop: str) -> None:
        answer = fetch(server, f"/{shop}/.well-known/jwks.json")
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["Vary"] == "Accept"
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert answer.headers["ETag"].startswith('"')
        assert answer.headers["Cache-Control"] == "public, max-age=300, stale-if-error=3600"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Content-Length"] == str(len(answer.body))
        assert "Set-Cookie" not in answer.headers

    def test_the_registered_type_where_accept_names_it(self, server: Server, shop: str) -> None:
        path = f"/{shop}/.well-known/jwks.json"
        named = fetch(server, path, Accept="application/jwk-set+json, */*")
        assert named.headers["Content-Type"] == "application/jwk-set+json"
        assert named.body == fetch(server, path).body

    def test_conditional_and_head(self, server: Server, shop: str) -> None:
        path = f"/{shop}/.well-known/jwks.json"
        whole = fetch(server, path)
        unchanged = fetch(server, path, If_None_Match=whole.headers["ETag"])
        assert (unchanged.status, unchanged.body) == (304, b"")
        for name in ("ETag", "Cache-Control", "Vary", "Access-Control-Allow-Origin"):
            assert unchanged.headers[name] == whole.headers[name]
        assert "Content-Type" not in unchanged.headers
        assert fetch(server, path, If_None_Match='"other"').status == 200
        head = fetch(server, path, "HEAD")
        assert (head.status, head.body) == (200, b"")
        assert head.headers["Content-Length"] == str(len(whole.body))
        assert head.headers["ETag"] == whole.headers["ETag"]

    def test_identical_on_every_worker(self, server: Server, shop: str) -> None:
        bodies = set()
        for _ in range(12):
            server.pool.clear()  # a new connection may reach another worker
            bodies.add(fetch(server, f"/{shop}/.well-known/jwks.json").body)
        assert len(bodies) == 1

    def test_cors_preflight(self, server: Server, shop: str) -> None:
        answer = fetch(server, f"/{shop}/.well-known/jwks.json", "OPTIONS", Origin="https://a.example")
        assert answer.status == 204
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert "GET" in answer.headers["Access-Control-Allow-Methods"]

    def test_the_default_set_has_the_bare_path_too(self, server: Server) -> None:
        assert fetch(server, "/.well-known/jwks.json").body == fetch(server, "/default/.well-known/jwks.json").body

    def test_before_the_first_publication_it_is_404_and_not_cached(self, server: Server) -> None:
        name = fresh("empty")
        server.must("POST", "/v1/key-sets", {"name": name})
        answer = fetch(server, f"/{name}/.well-known/jwks.json")
        assert (answer.status, answer.problem) == (404, "not_published")
        assert answer.headers["Cache-Control"] == "no-store"

    def test_the_host_header_is_ignored(self, server: Server, shop: str) -> None:
        answer = fetch(server, f"/{shop}/.well-known/openid-configuration", Host="evil.example")
        assert "evil" not in answer.body.decode()


@pytest.fixture(scope="module")
def hidden(server: Server) -> str:
    return server.key_set(None, "ES256", access="restricted")


@pytest.fixture(scope="module")
def callers(server: Server, shop: str) -> dict[str, str]:
    """The tokens of callers that may not read the restricted set."""
    return {
        "nobody": "",
        "a stranger": new_token().token,
        "a client without a grant": server.client(),
        "a signer elsewhere": server.client("signer", key_set=shop),
    }


class TestRestricted:
    def test_needs_the_permission(self, server: Server, hidden: str) -> None:
        path = f"/{hidden}/.well-known/jwks.json"
        assert fetch(server, path).problem == "credentials_missing"
        assert server.call("GET", path, token=server.client()).problem == "forbidden"
        for role in ("verifier", "signer", "auditor"):
            answer = server.call("GET", path, token=server.client(role, key_set=hidden))
            assert answer.status == 200
            assert len(answer.json["keys"]) >= 1

    def test_is_private_and_has_no_cors(self, server: Server, hidden: str) -> None:
        answer = server.call("GET", f"/{hidden}/.well-known/jwks.json")
        assert "private" in answer.headers["Cache-Control"]
        assert "public" not in answer.headers["Cache-Control"]
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert "Authorization" in answer.headers["Vary"]

    @pytest.mark.parametrize(
        "path",
        [
            "/{}/.well-known/jwks.json",
            "/{}/.well-known/jwks-pq.json",
            "/{}/.well-known/openid-configuration",
            "/{}/.well-known/oauth-authorization-server",
            "/.well-known/oauth-authorization-server/{}",
            "/v1/key-sets/{}",
            "/v1/key-sets/{}/keys",
            "/v1/key-sets/{}/keys/k1",
            "/v1/key-sets/{}/keys/k1/active",
            "/v1/key-sets/{}/external-keys",
        ],
    )
    @pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST"])
    @pytest.mark.parametrize("who", ["nobody", "a stranger", "a client without a grant", "a signer elsewhere"])
    def test_its_name_cannot_be_found_out(
        self, server: Server, hidden: str, callers: dict[str, str], method: str, path: str, who: str
    ) -> None:
        """A set that is there and one that is not are refused with the same octets, but for the name and the id."""
        missing = fresh("set")
        answers = []
        for name in (hidden, missing):
            headers = {"Authorization": f"Bearer {callers[who]}"} if callers[who] else {}
            answer = server.call(method, path.format(name), token=None, headers=headers)
            request_id = answer.headers["X-Request-Id"]
            answers.append(
                (
                    answer.status,
                    [(k, v) for k, v in answer.headers.items() if k not in ("Date", "X-Request-Id")],
                    answer.body.replace(name.encode(), b"NAME").replace(request_id.encode(), b"ID"),
                )
            )
        assert len(hidden) == len(missing)
        assert answers[0] == answers[1]
        if method == "GET":
            assert answers[0][0] == {"nobody": 401, "a stranger": 401}.get(who, 403)

    def test_a_caller_without_a_token_learns_little(self, server: Server, hidden: str) -> None:
        assert fetch(server, f"/{hidden}/.well-known/openid-configuration").status == 401


class TestDiscovery:
    def test_both_forms_say_the_same(self, server: Server, shop: str) -> None:
        one = fetch(server, f"/{shop}/.well-known/openid-configuration")
        two = fetch(server, f"/.well-known/oauth-authorization-server/{shop}")
        three = fetch(server, f"/{shop}/.well-known/oauth-authorization-server")
        assert one.body == two.body == three.body
        issuer = f"{server.url}/{shop}"
        assert one.json["issuer"] == issuer
        assert one.json["jwks_uri"] == f"{issuer}/.well-known/jwks.json"
        assert set(one.json["id_token_signing_alg_values_supported"]) == {"ES256", "EdDSA"}
        assert one.json["response_types_supported"]
        assert one.json["subject_types_supported"] == ["public"]
        assert one.headers["Access-Control-Allow-Origin"] == "*"
        assert (
            fetch(server, f"/{shop}/.well-known/openid-configuration", If_None_Match=one.headers["ETag"]).status == 304
        )

    def test_an_issuer_with_a_slash_at_its_end(self, server: Server) -> None:
        """OpenID Connect Discovery §4.1: a client drops the slash before it appends, and compares the whole issuer."""
        name = fresh("slash")
        issuer = f"{server.url}/{name}/"
        assert server.key_set(name, "ES256", issuer=issuer) == name
        found = fetch(server, issuer.removeprefix(server.url).rstrip("/") + "/.well-known/openid-configuration")
        assert (found.status, found.json["issuer"]) == (200, issuer)
        assert fetch(server, f"/.well-known/oauth-authorization-server/{name}").json == found.json
        assert server.must("GET", f"/v1/key-sets/{name}")["warnings"] == []

    @pytest.mark.parametrize(
        ("issuer", "warning"),
        [
            ("https://{}.example/tenant/", "https://{}.example/tenant/.well-known/openid-configuration"),
            ("accounts.{}.example", "not a URL"),
            ("spiffe://{}.example", "not a URL"),
            ("urn:example:{}", "not a URL"),
        ],
    )
    def test_an_issuer_whose_metadata_is_not_served_says_so(self, server: Server, issuer: str, warning: str) -> None:
        name = fresh("other")
        answer = server.call("POST", "/v1/key-sets", {"name": name, "issuer": issuer.format(name)})
        assert answer.status == 201
        (found,) = answer.json["warnings"]
        assert warning.format(name) in found
        assert "jwks_uri" in found

    def test_an_issuer_is_one_sets_alone_however_it_is_written(self, server: Server) -> None:
        name = fresh("taken")
        server.must("POST", "/v1/key-sets", {"name": name, "issuer": f"https://{name}.example"})
        for issuer in (f"https://{name}.example/", f"{name}.example"):
            answer = server.call("POST", "/v1/key-sets", {"name": fresh("taker"), "issuer": issuer})
            assert (answer.status, answer.problem) == (409, "issuer_taken")

    def test_a_refusal_names_the_normal_form(self, server: Server) -> None:
        answer = server.call(
            "POST", "/v1/key-sets", {"name": fresh("x"), "issuer": "https://Login.example.com:443/a//b"}
        )
        assert (answer.status, answer.json["normal_form"]) == (400, "https://login.example.com/a/b")
        assert "https://login.example.com/a/b" in answer.json["detail"]

    def test_an_administrator_of_one_set_cannot_take_the_issuer_of_another(self, server: Server) -> None:
        name = fresh("scoped")
        server.must("POST", "/v1/key-sets", {"name": name})
        admin = server.client("admin", key_set=name)
        path = f"/v1/key-sets/{name}"
        for issuer in (f"{server.url}/default", f"{server.url}/default/", f"{server.url}/{fresh('later')}"):
            tag = server.call("GET", path).headers["ETag"]
            answer = server.call("PATCH", path, {"issuer": issuer}, token=admin, headers={"If-Match": tag})
            assert (answer.status, answer.problem) == (400, "invalid_field")
            assert "public_url" in answer.json["detail"]

    def test_another_issuer_is_404(self, server: Server) -> None:
        name = server.key_set(None, "ES256", issuer="https://issuer.example")
        elsewhere = fetch(server, f"/{name}/.well-known/openid-configuration")
        assert elsewhere.problem == "route_not_found"
        assert "https://issuer.example" in elsewhere.json["detail"]
        assert fetch(server, f"/.well-known/oauth-authorization-server/{name}").problem == "route_not_found"
        assert fetch(server, f"/{name}/.well-known/jwks.json").status == 200

    def test_the_bare_paths_are_for_an_issuer_that_is_the_service_itself(self, server: Server) -> None:
        for path in ("/.well-known/openid-configuration", "/.well-known/oauth-authorization-server"):
            assert fetch(server, path).problem == "route_not_found"


class TestRevisions:
    def test_etag_if_match_and_304(self, server: Server, shop: str) -> None:
        path = f"/v1/key-sets/{shop}"
        before = server.call("GET", path)
        tag = before.headers["ETag"]
        assert tag == f'"{before.json["revision"]}"'
        assert server.call("GET", path, headers={"If-None-Match": tag}).status == 304
        changed = server.call("PATCH", path, {"cache_lifetime": 299}, headers={"If-Match": tag})
        assert changed.status == 200
        assert changed.headers["ETag"] != tag
        assert changed.json["cache_lifetime"] == 299
        assert server.call("GET", path, headers={"If-None-Match": tag}).json["cache_lifetime"] == 299
        stale = server.call("PATCH", path, {"cache_lifetime": 298}, headers={"If-Match": tag})
        assert (stale.status, stale.problem) == (412, "revision_mismatch")
        assert (
            fetch(server, f"/{shop}/.well-known/jwks.json").headers["Cache-Control"].startswith("public, max-age=299")
        )

    def test_of_a_key(self, server: Server, shop: str) -> None:
        path = f"/v1/key-sets/{shop}/keys/k1"
        tag = server.call("GET", path).headers["ETag"]
        answer = server.call("PATCH", path, {"profile": {"default_lifetime": 120}}, headers={"If-Match": tag})
        assert answer.json["profile"]["default_lifetime"] == 120
        assert answer.headers["ETag"] == f'"{answer.json["revision"]}"'


class TestCreated:
    def test_201_with_the_whole_object_and_where_it_is(self, server: Server) -> None:
        name = fresh("made")
        for path, payload in (
            ("/v1/key-sets", {"name": name, "keys": [{"name": "k1", "alg": "ES256"}]}),
            (f"/v1/key-sets/{name}/keys", {"name": "k2", "alg": "ES384"}),
            ("/v1/clients", {"name": name}),
            ("/v1/grants", {"client": name, "role": "verifier", "scope": {"key_set": name}}),
        ):
            answer = server.call("POST", path, payload)
            assert answer.status == 201, answer.body
            again = server.call("GET", answer.headers["Location"])
            assert again.status == 200
            assert set(again.json) == set(answer.json)
            assert answer.json["created_at"].endswith("Z")

    def test_deleted_things_are_gone(self, server: Server) -> None:
        name = fresh("brief")
        server.must("POST", "/v1/clients", {"name": name})
        grant = server.must("POST", "/v1/grants", {"client": name, "role": "verifier", "scope": {}})["id"]
        for path in (f"/v1/grants/{grant}", f"/v1/clients/{name}"):
            answer = server.call("DELETE", path)
            assert (answer.status, answer.body) == (204, b"")
            assert server.call("GET", path).status == 404
            assert server.call("DELETE", path).status == 404

    def test_external_keys(self, server: Server) -> None:
        name = fresh("foreign")
        server.must("POST", "/v1/key-sets", {"name": name})
        jwk = {
            "kty": "EC",
            "crv": "P-256",
            "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
            "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
        }
        kid = f"their/kid {name}"
        payload = {"kid": kid, "alg": "ES256", "remove_at": "2099-01-01T00:00:00Z", "jwk": jwk}
        answer = server.call("POST", f"/v1/key-sets/{name}/external-keys", payload)
        assert answer.status == 201
        where = answer.headers["Location"]
        assert server.must("GET", where)["remove_at"] == "2099-01-01T00:00:00Z"
        assert [k["kid"] for k in fetch(server, f"/{name}/.well-known/jwks.json").json["keys"]] == [kid]
        assert server.call("DELETE", where).status == 204
        wait_until(lambda: fetch(server, f"/{name}/.well-known/jwks.json").json == {"keys": []})

    def test_pages_go_through_everything_once(self, server: Server) -> None:
        names = {fresh("page") for _ in range(5)}
        for name in names:
            server.must("POST", "/v1/clients", {"name": name})
        found, path = [], "/v1/clients?limit=2"
        while path:
            page = server.must("GET", path)
            assert len(page["items"]) <= 2
            found += [item["name"] for item in page["items"]]
            path = f"/v1/clients?limit=2&cursor={page['next']}" if "next" in page else ""
        assert names <= set(found)
        assert len(found) == len(set(found))

    def test_public_key_in_three_forms(self, server: Server, shop: str) -> None:
        path = f"/v1/key-sets/{shop}/keys/k1/versions/1/public-key"
        jwk = server.call("GET", path)
        assert jwk.headers["Content-Type"] == "application/jwk+json"
        assert jwk.json in fetch(server, f"/{shop}/.well-known/jwks.json").json["keys"]
        pem = server.call("GET", path, headers={"Accept": "application/x-pem-file"})
        assert pem.body.startswith(b"-----BEGIN PUBLIC KEY-----\n")
        der = server.call("GET", path, headers={"Accept": "application/octet-stream"})
        assert der.body[:1] == b"\x30"
        from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_public_key

        assert load_pem_public_key(pem.body) == load_der_public_key(der.body)


class TestDescription:
    def test_openapi(self, server: Server) -> None:
        answer = fetch(server, "/openapi.json")
        validate(answer.json)
        assert answer.json["servers"] == [{"url": server.url}]

    def test_docs(self, server: Server) -> None:
        answer = fetch(server, "/docs")
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert server.url in answer.body.decode()

    def test_health_lists_dependencies(self, server: Server) -> None:
        ready = fetch(server, "/readyz/sign").json
        assert ready["status"] == "ok"
        assert {d["name"]: d["state"] for d in ready["dependencies"]} == {"registry": "ok", "backend:softhsm": "ok"}
        assert not any(d["detail"] for d in ready["dependencies"]), "callers without a permission see no serial"
        assert any("serial" in d["detail"] for d in server.must("GET", "/readyz/sign")["dependencies"])
        one = fetch(server, "/readyz/sign?key_set=default&key=default").json
        assert [d["name"] for d in one["dependencies"]] == ["registry", "key:default/default", "backend:softhsm"]

    def test_nodes_and_backends(self, server: Server) -> None:
        nodes = server.must("GET", "/v1/nodes")["items"]
        assert len([n for n in nodes if n["live"]]) == 2
        (backend,) = server.must("GET", "/v1/backends")["items"]
        assert backend["state"] == "ok"
        assert "ES256" in backend["algorithms"]
        assert server.must("GET", "/v1/backends/softhsm")["name"] == "softhsm"
