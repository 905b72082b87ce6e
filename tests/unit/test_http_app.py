"""What happens around an endpoint: request ids, bodies, limits, pins, headers. The service is a stand-in."""

import io
import json
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

import pytest
from werkzeug.test import Client, EnvironBuilder, TestResponse, run_wsgi_app

from kms_jwks import errors, wire
from kms_jwks.access import Caller
from kms_jwks.config import Settings
from kms_jwks.http.app import App, create_app
from kms_jwks.model import Id
from kms_jwks.service.guard import RequestContext
from kms_jwks.service.signing import Batch
from kms_jwks.worker.snapshot import Document

if TYPE_CHECKING:
    from kms_jwks.service import Service

JWKS = Document(b'{"keys":[]}', '"abc"', "public, max-age=300", public=True)
RESTRICTED = Document(b'{"keys":[]}', '"abc"', "private, max-age=300", public=False)
SIGN = "/v1/key-sets/s/keys/k/jwt"
CALLER = Caller(Id("client-id"), "issuer-1", Id("token-id"), ())
SIGNED = wire.Signature(signature="c2ln", kid="kid", alg="ES256")


class FakeService:
    """Answers with what a test put in `answer`, and remembers what it was asked."""

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(max_body=1024, max_batch_body=4096, **settings)
        self.asked: list[tuple[Any, ...]] = []
        self.answer: Any = SIGNED
        self.backend: str | None = None
        """The backend that a use case asks."""
        self.refuse: errors.Error | None = None
        self.forbid: errors.Error | None = None
        """What a caller gets whom no grant lets sign."""
        self.authenticated: list[bool] = []
        self.pins = 0
        self.sync = SimpleNamespace(pin=self._pin)
        self.verifiers = SimpleNamespace(
            default_key_set="main", jwks=self._use, discovery=self._use, verify_token=self._use
        )
        self.signing = SimpleNamespace(handle=self._use, active=self._use, refuse_early=self._refuse_early)
        self.key_sets = SimpleNamespace(list=self._use, create=self._use, get=self._use, patch=self._use)
        self.keys = SimpleNamespace(rotate=self._use, disable=self._use)
        self.versions = SimpleNamespace(public_jwk=self._use)
        self.external_keys = SimpleNamespace(get=self._use)
        self.clients = SimpleNamespace(create=self._use, delete=self._use)
        self.operation = SimpleNamespace(ready=self._use, ready_sign=self._use, shown=lambda _, readiness: readiness)

    def _use(self, *arguments: Any, **named: Any) -> Any:
        for argument in arguments:
            if isinstance(argument, RequestContext):
                argument.backend = self.backend
        self.asked.append((*arguments, *named.values()))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def authenticate(self, context: RequestContext, *, data_plane: bool) -> None:
        """Knows no token; `refuse` is what it answers to those that are shown."""
        self.authenticated.append(data_plane)
        if context.authorization is None:
            raise errors.CredentialsMissing
        if self.refuse is not None:
            raise self.refuse
        context.caller = CALLER

    def _refuse_early(self, operation: object, context: RequestContext, **names: str) -> None:
        assert context.caller is not None
        if self.forbid is not None:
            raise self.forbid

    def _pin(self) -> Callable[[], None]:
        self.pins += 1
        released: list[bool] = []

        def release() -> None:
            assert not released
            released.append(True)
            self.pins -= 1

        return release


@pytest.fixture
def service() -> FakeService:
    return FakeService()


class Sender(Client):
    """Reads every answer to its end and closes it, as a server does. Shows a token unless a test shows another."""

    def open(self, *args: Any, **kwargs: Any) -> TestResponse:
        headers = {"Authorization": "Bearer kj_x"} | dict(kwargs.pop("headers", None) or {})
        return super().open(*args, **{"buffered": True} | kwargs, headers=headers)


class _Current:
    """The service of the test that runs: making an app for each test would cost more than all its requests."""

    service: FakeService

    def __getattr__(self, name: str) -> Any:
        return getattr(self.service, name)


_APPS: dict[str, tuple[_Current, App]] = {}
"""By the routes that they serve."""


def app_of(service: FakeService) -> App:
    """An app that asks `service`, until the next call for the same routes."""
    routes = service.settings.routes
    if routes not in _APPS:
        current = _Current()
        current.service = service
        _APPS[routes] = current, create_app(cast("Service", current))
    current, app = _APPS[routes]
    current.service = service
    return app


@pytest.fixture
def client(service: FakeService) -> Iterator[Client]:
    yield Sender(app_of(service))
    assert service.pins == 0, "an answer left and its pin stayed"


SHOWN = [("Authorization", "Bearer kj_x")]
"""For requests that a test makes without `Sender`."""


def problem(response: TestResponse) -> str:
    assert response.content_type == "application/problem+json"
    document = json.loads(response.data)
    assert document["status"] == response.status_code
    assert document["request_id"] == response.headers["X-Request-Id"]
    assert response.headers["Cache-Control"] == "no-store"
    return str(document["type"].removeprefix("urn:kms-jwks:problem:"))


def opened(service: FakeService, target: str) -> TestResponse:
    """A GET of a request target, as gunicorn presents it."""
    path = unquote(target.partition("?")[0], "latin-1")
    environ = EnvironBuilder("/", headers=SHOWN, query_string=target.partition("?")[2]).get_environ()
    environ |= {"RAW_URI": target, "PATH_INFO": path}
    return TestResponse(*run_wsgi_app(app_of(service), environ, buffered=True), EnvironBuilder("/").get_request())


class TestRequestId:
    @pytest.mark.parametrize("given", ["a", "A-1_b.c", "x" * 64])
    def test_a_sane_one_is_kept(self, client: Client, given: str) -> None:
        assert client.get("/healthz", headers={"X-Request-Id": given}).headers["X-Request-Id"] == given

    @pytest.mark.parametrize("given", ["", "x" * 65, "a b", "ä", 'a"b', "a/b"])
    def test_any_other_is_replaced(self, client: Client, given: str) -> None:
        found = client.get("/nowhere", headers={"X-Request-Id": given})
        assert re.fullmatch(r"[0-9a-f]{24}", found.headers["X-Request-Id"])
        assert problem(found) == "route_not_found"

    def test_none_makes_one(self, client: Client) -> None:
        one, two = (client.get("/healthz").headers["X-Request-Id"] for _ in range(2))
        assert one != two


class TestBody:
    @pytest.mark.parametrize(
        "content_type",
        [
            "application/json",
            "application/json; charset=utf-8",
            "Application/JSON;charset=UTF-8",
            'application/json; charset="utf-8"',
        ],
    )
    def test_json_is_read(self, client: Client, service: FakeService, content_type: str) -> None:
        response = client.post(SIGN, data=b'{"claims":{}}', content_type=content_type)
        assert response.status_code == 200
        assert service.asked[0][2:] == ("s", "k", {"claims": {}})

    @pytest.mark.parametrize(
        "content_type",
        [None, "", "text/plain", "application/json; charset=latin-1", "application/jsonx", "application/jwt"],
    )
    def test_other_media_types_are_415(self, client: Client, service: FakeService, content_type: str | None) -> None:
        response = client.post(SIGN, data=b"{}", content_type=content_type)
        assert (response.status_code, problem(response)) == (415, "unsupported_media_type")
        assert not service.asked

    @pytest.mark.parametrize(
        "body",
        [
            b"[]",
            b"1",
            b"{",
            b'{"a":1,"a":2}',
            b'{"a":NaN}',
            b"\xff",
            b'{"a":"\\ud800"}',
            b"{}{}",
            b"\xef\xbb\xbf{}",
        ],
    )
    def test_malformed_bodies(self, client: Client, service: FakeService, body: bytes) -> None:
        response = client.post(SIGN, data=body, content_type="application/json")
        assert (response.status_code, problem(response)) == (400, "malformed_body")
        assert not service.asked

    def test_an_empty_body_is_malformed_where_fields_are_needed(self, client: Client) -> None:
        response = client.post(SIGN, content_type="application/json", content_length=0)
        assert (response.status_code, problem(response)) == (400, "malformed_body")

    def test_fields_are_checked_and_named(self, client: Client, service: FakeService) -> None:
        response = client.post("/v1/clients", json={"name": "x", "more": 1})
        assert (response.status_code, problem(response)) == (400, "invalid_field")
        assert "more" in json.loads(response.data)["detail"]
        assert not service.asked

    def test_a_body_is_not_needed_where_every_field_is_optional(self, client: Client, service: FakeService) -> None:
        service.answer = errors.NoStandby()
        for body, content_type in ((None, None), (b"", None), (b"{}", "application/json")):
            client.post("/v1/key-sets/s/keys/k/rotate", data=body, content_type=content_type)
        assert [asked[3] for asked in service.asked] == [wire.RotateRequest()] * 3

    def test_routes_without_fields_take_none(self, client: Client, service: FakeService) -> None:
        response = client.post("/v1/key-sets/s/keys/k/disable", json={"why": "not"})
        assert problem(response) == "invalid_field"
        assert not service.asked

    def test_no_length_is_411_where_a_body_is_needed(self, service: FakeService) -> None:
        environ = EnvironBuilder(SIGN, method="POST", content_type="application/json", headers=SHOWN).get_environ()
        environ.pop("CONTENT_LENGTH", None)
        response = TestResponse(*run_wsgi_app(app_of(service), environ), EnvironBuilder(SIGN).get_request())
        assert (response.status_code, problem(response)) == (411, "length_mismatch")

    def test_a_length_that_says_more_than_comes(self, service: FakeService) -> None:
        builder = EnvironBuilder(
            SIGN, method="POST", data=b'{"claims":{}}', content_type="application/json", headers=SHOWN
        )
        environ = builder.get_environ()
        environ["CONTENT_LENGTH"] = "100"
        response = TestResponse(*run_wsgi_app(app_of(service), environ), builder.get_request())
        assert (response.status_code, problem(response)) == (400, "length_mismatch")
        assert not service.asked

    def test_a_body_that_breaks_off(self, service: FakeService) -> None:
        class Broken(io.RawIOBase):
            def read(self, size: int = -1) -> bytes:
                raise TimeoutError

        builder = EnvironBuilder(SIGN, method="POST", content_type="application/json", content_length=9, headers=SHOWN)
        environ = builder.get_environ() | {"wsgi.input": Broken()}
        response = TestResponse(*run_wsgi_app(app_of(service), environ), builder.get_request())
        assert problem(response) == "length_mismatch"
        assert service.pins == 0


def padded(size: int, **members: object) -> bytes:
    body = json.dumps({**members, "pad": ""}).encode()
    return body.replace(b'"pad": ""', b'"pad": "' + b"x" * (size - len(body)) + b'"')


class TestLimits:
    @pytest.mark.parametrize("chunked", [False, True])
    @pytest.mark.parametrize(
        ("path", "body", "status"),
        [
            (SIGN, padded(1024), 200),
            (SIGN, padded(1025), 413),
            (SIGN, padded(1025, batch=[]), 200),
            (SIGN, padded(4096, batch=[]), 200),
            (SIGN, padded(4097, batch=[]), 413),
            ("/v1/clients", padded(1025, batch=[]), 413),
            ("/v1/clients", padded(1024), 400),
        ],
    )
    def test_body_sizes(self, service: FakeService, path: str, body: bytes, status: int, *, chunked: bool) -> None:
        builder = EnvironBuilder(path, method="POST", data=body, content_type="application/json", headers=SHOWN)
        environ = builder.get_environ()
        if chunked:
            del environ["CONTENT_LENGTH"]
            environ |= {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}
        response = TestResponse(*run_wsgi_app(app_of(service), environ), builder.get_request())
        assert response.status_code == status
        if status == 413:
            assert problem(response) == "body_too_large"
            assert not service.asked


class TestRouting:
    @pytest.mark.parametrize(
        "path", ["/", "/v1", "/v1/", "/v1/key-sets/", "//v1/key-sets", "/v1//key-sets", "/static/x"]
    )
    def test_unknown_paths(self, client: Client, path: str) -> None:
        response = client.get(path)
        assert (response.status_code, problem(response)) == (404, "route_not_found")

    @pytest.mark.parametrize(
        "target",
        [
            "//v1/key-sets",
            "///v1/key-sets",
            "/%2Fv1/key-sets",
            "/v1%2fkey-sets",
            "/v1%2Fkey-sets",
            "/%761/key-sets",
            "/v1/key%2Dsets",
            "/v1/%6bey-sets/s",
            "/v1/key-sets/%73",
            "/v1/key-sets/s%2Fkeys",
            "/v1/key-sets/s/%2e%2e/s",
            "/s%2f.well-known%2fjwks.json",
            "/s/.well-known%2Fjwks.json",
            "/s/%2Ewell-known/jwks.json",
            "/v1/./key-sets",
            "/x/../v1/key-sets",
            "/v1/key-sets;a=b",
            "/v1/key-sets#a",
            "ftp://keys.example/v1/key-sets",
            "http://keys.example//v1/key-sets",
            "https://keys.example",
            "http:///v1/key-sets",
            "v1/key-sets",
            "v1/key-sets/s/external-keys/https://keys.example/1",
            "v1/key-sets?limit=://",
            "well-known/jwks.json?://",
            ".well-known/jwks.json?://",
            "s/.well-known/jwks.json?://",
            "*",
        ],
    )
    def test_a_route_has_one_spelling(self, service: FakeService, target: str) -> None:
        service.answer = wire.Page(items=[])
        assert opened(service, target).status_code == 404
        assert problem(opened(service, target)) == "route_not_found"
        assert not service.asked

    @pytest.mark.parametrize(
        "target", ["/v1/key-sets", "http://keys.example/v1/key-sets", "HTTPS://[::1]:1/v1/key-sets?limit=1"]
    )
    def test_a_target_in_either_form_is_matched(self, service: FakeService, target: str) -> None:
        service.answer = wire.Page(items=[])
        assert opened(service, target).status_code == 200

    def test_a_server_that_does_not_pass_the_target_on(self, service: FakeService) -> None:
        service.answer = wire.Page(items=[])
        for path, status in (("/v1/key-sets", 200), ("//v1/key-sets", 404), ("/v1/key-sets/a b", 404)):
            environ = EnvironBuilder("/", headers=SHOWN).get_environ() | {"PATH_INFO": path}
            for name in ("RAW_URI", "REQUEST_URI"):
                environ.pop(name, None)
            _, found, _ = run_wsgi_app(app_of(service), environ)
            if path.endswith("b"):
                assert service.asked[-1][1] == "a b"
            else:
                assert found.startswith(str(status))

    @pytest.mark.parametrize(
        ("sent", "kid"),
        [
            ("their%2Fkid", "their/kid"),
            ("their/kid", "their/kid"),
            ("50%25", "50%"),
            ("a%2Fb%3D%2B", "a/b=+"),
            ("a=+", "a=+"),
            ("%C3%A9", "é"),
        ],
    )
    def test_a_kid_may_hold_what_a_path_encodes(self, service: FakeService, sent: str, kid: str) -> None:
        service.answer = errors.ExternalKeyNotFound()
        assert problem(opened(service, f"/v1/key-sets/s/external-keys/{sent}")) == "external_key_not_found"
        assert service.asked[0][1:] == ("s", kid)

    def test_unknown_methods_are_told_the_known_ones(self, client: Client) -> None:
        response = client.put("/v1/key-sets")
        assert (response.status_code, problem(response)) == (405, "method_not_allowed")
        assert response.headers["Allow"] == "GET, HEAD, POST"

    def test_a_name_with_a_control_character_names_nothing(self, client: Client, service: FakeService) -> None:
        response = client.get("/v1/key-sets/a%00b")
        assert (response.status_code, problem(response)) == (404, "route_not_found")
        assert not service.asked

    def test_the_context_holds_the_credentials_of_the_request(self, client: Client, service: FakeService) -> None:
        client.post(SIGN, json={}, headers={"Authorization": "Bearer kj_x"})
        client.get("/v1/key-sets", headers={"Authorization": ""})
        shown = [next(part for part in asked if isinstance(part, RequestContext)) for asked in service.asked]
        assert all(isinstance(context, RequestContext) for context in shown)
        assert [context.authorization for context in shown] == ["Bearer kj_x", None]
        assert "kj_x" not in repr(shown)

    def test_a_body_without_credentials_is_not_decoded(self, client: Client, service: FakeService) -> None:
        response = client.post(SIGN, data=b"nonsense", headers={"Authorization": ""})
        assert (response.status_code, problem(response)) == (401, "credentials_missing")
        assert not service.asked

    def test_pages(self, client: Client, service: FakeService) -> None:
        service.answer = wire.Page(items=[])
        assert client.get("/v1/key-sets?limit=7&cursor=abc").json == {"items": []}
        client.get("/v1/key-sets")
        assert [asked[1:3] for asked in service.asked] == [(7, "abc"), (50, None)]

    @pytest.mark.parametrize(
        "query",
        [
            "limit=0",
            "limit=201",
            "limit=x",
            "limit=",
            "limit=1&limit=2",
            "cursor=",
            "cursor=%00",
            "limit=٣",
            "limit=-1",
            "nonsense=1",
            "limit=1&nonsense",
            "=1",
            "Limit=1",
        ],
    )
    def test_bad_pages(self, client: Client, service: FakeService, query: str) -> None:
        response = client.get(f"/v1/key-sets?{query}")
        assert (response.status_code, problem(response)) == (400, "invalid_field")
        assert not service.asked

    @pytest.mark.parametrize("path", ["/s/.well-known/jwks.json", "/v1/key-sets/s", "/healthz", SIGN])
    def test_a_query_that_a_route_does_not_take(self, client: Client, service: FakeService, path: str) -> None:
        method = "POST" if path == SIGN else "GET"
        payload: dict[str, Any] | None = {"claims": {}} if path == SIGN else None
        response = client.open(f"{path}?limit=1", method=method, json=payload)
        assert (response.status_code, problem(response)) == (400, "invalid_field")
        assert "'limit'" in json.loads(response.data)["detail"]
        assert not service.asked
        assert client.open(f"{path}?", method=method, json=payload).status_code != 400


class TestAnswers:
    def test_nothing_is_stored(self, client: Client) -> None:
        response = client.post(SIGN, json={})
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Content-Type-Options"] == "nosniff"

    def test_a_batch_has_problems_in_the_places_of_failed_items(self, client: Client, service: FakeService) -> None:
        service.answer = Batch([SIGNED, errors.ClaimsRefused("Too long.")])
        document = client.post(SIGN, json={"batch": [{}, {}]}, headers={"X-Request-Id": "r"}).json
        assert document is not None
        good, bad = document["batch"]
        assert good == {"signature": "c2ln", "kid": "kid", "alg": "ES256"}
        assert bad["error"]["type"] == "urn:kms-jwks:problem:claims_refused"
        assert bad["error"]["request_id"] == "r"
        assert bad["error"]["status"] == 400

    def test_an_unexpected_exception_is_told_to_the_log_alone(
        self, client: Client, service: FakeService, capsys: pytest.CaptureFixture[str]
    ) -> None:
        service.answer = ZeroDivisionError("division by the secret")
        response = client.post(SIGN, json={}, headers={"X-Request-Id": "find-me"})
        assert (response.status_code, problem(response)) == (500, "internal_error")
        assert b"secret" not in response.data
        log = "".join(capsys.readouterr())
        assert "find-me" in log
        assert "ZeroDivisionError" in log

    def test_readiness_is_503_with_the_dependencies(self, client: Client, service: FakeService) -> None:
        service.answer = wire.Readiness(
            status="failing", dependencies=[wire.Dependency(name="backend:hsm", state="backend_unavailable")]
        )
        response = client.get("/readyz/sign")
        assert response.status_code == 503
        assert response.json == {
            "status": "failing",
            "dependencies": [
                {"name": "backend:hsm", "state": "backend_unavailable", "cause": "", "detail": "", "next_step": ""}
            ],
        }

    @pytest.mark.parametrize("query", ["key=k", "key_set=UPPER", "key_set=s&key=a/b", "key_set=s&key="])
    def test_readiness_of_what_cannot_be_a_key(self, client: Client, service: FakeService, query: str) -> None:
        response = client.get(f"/readyz/sign?{query}")
        assert (response.status_code, problem(response)) == (400, "invalid_field")
        assert service.asked == []

    def test_deleted_is_204_without_a_body(self, client: Client, service: FakeService) -> None:
        response = client.delete("/v1/clients/x")
        assert (response.status_code, response.data) == (204, b"")
        assert "Content-Type" not in response.headers

    @pytest.mark.parametrize(("given", "expected"), [('"3"', 3), (' "3" ', 3), (None, None)])
    def test_if_match(self, client: Client, service: FakeService, given: str | None, expected: int | None) -> None:
        service.answer = errors.RevisionRequired()
        headers = {"If-Match": given} if given else {}
        response = client.patch("/v1/key-sets/s", json={"cache_lifetime": 60}, headers=headers)
        assert response.status_code == 428
        assert service.asked[0][3] == expected

    @pytest.mark.parametrize(
        ("given", "code"),
        [
            ("3", "revision_mismatch"),
            ('W/"3"', "revision_mismatch"),
            ('"x"', "revision_mismatch"),
            ('"1", "2"', "revision_mismatch"),
            ("*", "revision_required"),
        ],
    )
    def test_if_match_that_can_match_nothing(self, client: Client, service: FakeService, given: str, code: str) -> None:
        response = client.patch("/v1/key-sets/s", json={"cache_lifetime": 60}, headers={"If-Match": given})
        assert problem(response) == code
        assert not service.asked


JWK = {
    "kty": "EC",
    "crv": "P-256",
    "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
    "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
}


class TestPublicKey:
    @pytest.mark.parametrize(
        ("accept", "media", "start"),
        [
            (None, "application/jwk+json", b"{"),
            ("*/*", "application/jwk+json", b"{"),
            ("application/json", "application/jwk+json", b"{"),
            ("image/png", "application/jwk+json", b"{"),
            ("application/x-pem-file", "application/x-pem-file", b"-----BEGIN PUBLIC KEY-----"),
            ("text/plain, application/jwk+json;q=0.5", "application/x-pem-file", b"-----BEGIN PUBLIC KEY-----"),
            ("application/x-pem-file;q=0.2, application/octet-stream", "application/octet-stream", b"\x30"),
        ],
    )
    def test_by_accept(
        self, client: Client, service: FakeService, accept: str | None, media: str, start: bytes
    ) -> None:
        service.answer = JWK
        headers = {"Accept": accept} if accept else {}
        response = client.get("/v1/key-sets/s/keys/k/versions/1/public-key", headers=headers)
        assert response.content_type == media
        assert response.data.startswith(start)
        assert response.headers["Vary"] == "Accept"


@pytest.mark.parametrize("path", ["/main/.well-known/jwks.json", "/main/.well-known/jwks-pq.json"])
class TestDocuments:
    @pytest.mark.parametrize(
        ("accept", "media"),
        [
            (None, "application/json"),
            ("*/*", "application/json"),
            ("application/json", "application/json"),
            ("application/jwk-set+json", "application/jwk-set+json"),
            ("application/json, Application/JWK-Set+json;q=0.9", "application/jwk-set+json"),
        ],
    )
    def test_the_registered_type_where_accept_names_it(
        self, client: Client, service: FakeService, path: str, accept: str | None, media: str
    ) -> None:
        service.answer = JWKS
        response = client.get(path, headers={"Accept": accept} if accept else {})
        assert response.data == JWKS.body
        assert response.content_type == media
        assert response.headers["Vary"] == "Accept"
        assert response.headers["ETag"] == '"abc"'
        assert response.headers["Cache-Control"] == "public, max-age=300"
        assert response.headers["Access-Control-Allow-Origin"] == "*"

    @pytest.mark.parametrize(
        ("given", "status"),
        [('"abc"', 304), ('W/"abc"', 304), ('"x", "abc"', 304), ("*", 304), ('"abd"', 200), ("abc", 200)],
    )
    def test_if_none_match(self, client: Client, service: FakeService, path: str, given: str, status: int) -> None:
        service.answer = JWKS
        response = client.get(path, headers={"If-None-Match": given})
        assert response.status_code == status
        assert response.headers["ETag"] == '"abc"'
        assert response.headers["Vary"] == "Accept"
        if status == 304:
            assert response.data == b""
            assert "Content-Type" not in response.headers

    def test_head(self, client: Client, service: FakeService, path: str) -> None:
        service.answer = JWKS
        response = client.head(path)
        assert response.data == b""
        assert response.headers["Content-Length"] == str(len(JWKS.body))

    def test_preflight_needs_no_token(self, client: Client, service: FakeService, path: str) -> None:
        response = client.options(path, headers={"Origin": "https://a", "Access-Control-Request-Method": "GET"})
        assert response.status_code == 204
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert response.headers["Access-Control-Allow-Methods"] == "GET, HEAD"
        assert not service.asked

    def test_restricted_sets_have_no_cors_and_vary_by_caller(
        self, client: Client, service: FakeService, path: str
    ) -> None:
        service.answer = RESTRICTED
        response = client.get(path)
        assert "Access-Control-Allow-Origin" not in response.headers
        assert response.headers["Vary"] == "Accept, Authorization"
        assert response.headers["Cache-Control"] == "private, max-age=300"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/.well-known/oauth-authorization-server/keys/other", "other"),
        ("/.well-known/oauth-authorization-server/keys", None),
        ("/.well-known/oauth-authorization-server/other", "other"),
        ("/other/.well-known/oauth-authorization-server", "other"),
        ("/other/.well-known/openid-configuration", "other"),
        ("/.well-known/openid-configuration", None),
    ],
)
def test_metadata_below_a_public_url_with_a_path(path: str, name: str | None) -> None:
    """RFC 8414 §3.1: the well-known part comes before the whole path, where no proxy removes the prefix."""
    service = FakeService(public_url="https://host.example/keys")
    service.answer = JWKS
    client = Sender(create_app(cast("Service", service)))
    assert client.get(path).status_code == 200
    assert service.asked[0][1] == name
    assert client.get("/.well-known/oauth-authorization-server/elsewhere/other").status_code == 404


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/.well-known/jwks.json", "main"),
        ("/other/.well-known/jwks.json", "other"),
        ("/.well-known/jwks-pq.json", "main"),
        ("/other/.well-known/jwks-pq.json", "other"),
        ("/.well-known/openid-configuration", None),
        ("/other/.well-known/openid-configuration", "other"),
        ("/.well-known/oauth-authorization-server", None),
        ("/.well-known/oauth-authorization-server/other", "other"),
        ("/other/.well-known/oauth-authorization-server", "other"),
    ],
)
def test_which_set_a_path_names(client: Client, service: FakeService, path: str, name: str | None) -> None:
    service.answer = JWKS
    assert client.get(path).status_code == 200
    assert service.asked[0][1] == name
    if "jwks" in path:
        assert service.asked[0][2] is ("jwks-pq" in path)


def test_a_pin_is_held_until_the_answer_has_left(service: FakeService) -> None:
    builder = EnvironBuilder(SIGN, method="POST", json={}, headers=SHOWN)
    app_iter, _, _ = run_wsgi_app(app_of(service), builder.get_environ())
    assert service.pins == 1
    assert b"".join(app_iter)
    assert service.pins == 1
    cast("Any", app_iter).close()
    assert service.pins == 0


DOCUMENTS = ["/a/.well-known/jwks.json", "/a/.well-known/jwks-pq.json", "/.well-known/openid-configuration"]
PRIVATE = ["/v1/key-sets", "/docs", "/openapi.json", "/readyz/sign"]


@pytest.mark.parametrize(
    ("routes", "found", "missing"),
    [("public", [*DOCUMENTS, "/healthz", "/readyz"], PRIVATE), ("private", [*PRIVATE, "/healthz"], DOCUMENTS)],
)
def test_routes_that_are_not_served_are_404(routes: str, found: list[str], missing: list[str]) -> None:
    service = FakeService(routes=routes)
    client = Sender(app_of(service))
    for path in missing:
        response = client.get(path)
        assert (response.status_code, problem(response)) == (404, "route_not_found")
    assert not service.asked
    for path in found:
        service.answer = errors.Forbidden()
        assert client.get(path).status_code != 404
