"""The whole service on AWS KMS (the fake): keys made, rotated and revoked over HTTP, and each refusal of KMS.

Whatever KMS answers: callers get a clear problem, no version changes its state, the JWKS is served, doctor reports it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import pytest

from tests.children import kms_jwks
from tests.fake_kms.operations import Key
from tests.fake_kms.server import ACCOUNT, OTHER_ACCOUNT, REGION, FakeKms, Fault
from tests.integration.conftest import (
    Answer,
    Server,
    _environment,
    free_port,
    fresh,
    initialise,
    running,
    settled,
    wait_until,
)

QUICK = {"allow_unsafe_publish_lead": True, "publish_lead": 0}


@dataclass(frozen=True)
class Node:
    """The folder of a service whose keys are in the fake KMS."""

    folder: Path
    port: int
    fake: FakeKms

    def configure(self, **backend: Any) -> None:
        options = {
            "public_url": f"http://127.0.0.1:{self.port}",
            "database_url": f"sqlite:///{self.folder}/registry.sqlite3",
            "state_dir": f"{self.folder}/state",
            "bind": [f"127.0.0.1:{self.port}"],
            "workers": 1,
            "threads": 4,
            "poll_interval_ms": 100,
            "log_level": "debug",
        }
        section = {"type": "aws-kms", "region": REGION, "endpoint_url": self.fake.url} | backend
        lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
        lines += ["[backends.aws]", *(f"{name} = {json.dumps(value)}" for name, value in section.items())]
        (self.folder / "kms-jwks.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def initialise(self) -> None:
        tokens = ("--admin-token-file", "admin.token", "--signer-token-file", "signer.token")
        initialise(self.folder, "--key-set", "default", "--alg", "ES256", *tokens)

    def findings(self) -> list[dict[str, str]]:
        """The problems that doctor finds, without those of the custodian and of the tests' quick policies."""
        aside = ("custodian", "policy")
        words = ("doctor", "--json", "--config", "kms-jwks.toml")
        done = kms_jwks(*words, folder=self.folder, environment=_environment())
        assert "Traceback" not in done.stderr
        return [c for c in json.loads(done.stdout)["checks"] if c["state"] != "ok" and c["name"] not in aside]


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeKms]:
    with pytest.MonkeyPatch.context() as patch, FakeKms() as made:
        for name, value in FakeKms.environment().items():
            patch.setenv(name, value)
        yield made


@pytest.fixture(scope="module")
def node(fake: FakeKms, tmp_path_factory: pytest.TempPathFactory) -> Node:
    made = Node(tmp_path_factory.mktemp("kms-node"), free_port(), fake)
    made.configure()
    made.initialise()
    return made


@pytest.fixture(scope="module")
def server(node: Node) -> Iterator[Server]:
    with running(node.folder, node.port) as server:
        wait_until(lambda: settled(server.must("GET", "/v1/key-sets/default/keys/default")))
        yield server


def sign(server: Server) -> Answer:
    return server.call("POST", "/v1/key-sets/default/keys/default/jwt", {"claims": {"aud": "x"}}, token=server.signer)


def states(server: Server) -> list[tuple[str, str]]:
    return [(v["kid"], v["state"]) for v in server.must("GET", "/v1/key-sets/default/keys/default")["versions"]]


def held(fake: FakeKms, key_set: str, state: str = "Enabled") -> list[Key]:
    """The keys in KMS whose tags name a key set."""
    return [k for k in fake.held.keys.values() if k.tags.get("kms-jwks:key-set") == key_set and k.state == state]


def active(server: Server, fake: FakeKms) -> Key:
    """The key in KMS that signs for key set `default`."""
    found = next(
        v for v in server.must("GET", "/v1/key-sets/default/keys/default")["versions"] if v["state"] == "active"
    )
    evidence = server.must("GET", f"/v1/key-sets/default/keys/default/versions/{found['number']}/attributes")
    return fake.held.keys[evidence["attributes"]["Arn"]]


# --- the main job -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", ["ES256", "PS256", "EdDSA"])
def test_a_key_lives_in_kms(server: Server, fake: FakeKms, alg: str) -> None:
    name = fresh("kms")
    request: dict[str, Any] = {"name": "main", "alg": alg, "policy": QUICK}
    server.must("POST", "/v1/key-sets", {"name": name, "keys": [request]})
    path = f"/v1/key-sets/{name}/keys/main"
    key = wait_until(lambda: settled(found := server.must("GET", path)) and found)
    assert {k.tags["kms-jwks:version"] for k in held(fake, name)} == {"1", "2"}
    signer = server.client("signer", key_set=name)

    def token() -> str:
        return str(server.must("POST", f"{path}/jwt", {"claims": {"aud": "x"}}, token=signer)["token"])

    def verify(text: str) -> str:
        found = jwt.PyJWKClient(f"{server.url}/{name}/.well-known/jwks.json").get_signing_key_from_jwt(text)
        jwt.decode(text, found, algorithms=[alg], audience="x", issuer=f"{server.url}/{name}")
        return str(found.key_id)

    first = verify(token())
    assert first == key["active_kid"]
    evidence = server.must("GET", f"{path}/versions/1/attributes")
    assert evidence["attributes"]["Origin"] == "AWS_KMS"
    server.must("POST", f"{path}/rotate", {"expected_kid": first})
    second = wait_until(lambda: (kid := verify(token())) != first and kid)
    wait_until(lambda: settled(server.must("GET", path)))
    server.must("POST", f"{path}/versions/{second}/revoke", {"reason": "a drill"})
    third = verify(token())
    assert third not in (first, second)
    document = server.must("GET", f"/{name}/.well-known/jwks.json", token=None)
    assert second not in [jwk["kid"] for jwk in document["keys"]]


def test_ml_dsa_keys_sign(server: Server, fake: FakeKms) -> None:
    """In a key set of their own; other tests cover their publication."""
    name = fresh("pq")
    server.must("POST", "/v1/key-sets", {"name": name, "keys": [{"name": "main", "alg": "ML-DSA-44"}]})
    wait_until(lambda: settled(server.must("GET", f"/v1/key-sets/{name}/keys/main")))
    assert [key.spec for key in held(fake, name)] == ["ML_DSA_44"] * 2


def test_a_healthy_backend(node: Node, server: Server) -> None:
    assert node.findings() == []
    assert ACCOUNT in json.dumps(server.must("GET", "/readyz/sign"))
    assert ACCOUNT not in json.dumps(server.must("GET", "/readyz/sign", token=None))


# --- what KMS may say -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trouble:
    """A fault of KMS, the answer to a caller, and what doctor reports (empty if the fault has ended by then)."""

    begin: Callable[[FakeKms, Key], object]
    status: int
    problem: str
    says: str = ""
    doctor: str = ""
    retry: bool = False


def _state(state: str) -> Callable[[FakeKms, Key], None]:
    return lambda fake, key: setattr(key, "state", state)


TROUBLES = {
    "throttled": Trouble(
        lambda fake, key: fake.fail("Sign", "ThrottlingException", times=20), 503, "backend_throttled", retry=True
    ),
    "internal": Trouble(
        lambda fake, key: fake.fail("Sign", "KMSInternalException", times=20, status=500),
        503,
        "backend_unavailable",
        retry=True,
    ),
    "silent": Trouble(lambda fake, key: fake.fault("Sign", Fault(hang=True), times=20), 504, "backend_timeout"),
    "disabled": Trouble(_state("Disabled"), 502, "backend_refused", "Disabled", doctor="Disabled"),
    "pending": Trouble(_state("PendingDeletion"), 502, "backend_refused", "PendingDeletion", doctor="PendingDeletion"),
    "deleted": Trouble(
        lambda fake, key: fake.held.keys.pop(key.arn),
        502,
        "backend_key_not_found",
        "holds no key",
        doctor="does not hold it",
    ),
    "denied": Trouble(
        lambda fake, key: fake.denied.add((ACCOUNT, "Sign")), 502, "backend_refused", "AccessDeniedException"
    ),
    "misused": Trouble(
        lambda fake, key: setattr(key, "usage", "ENCRYPT_DECRYPT"), 502, "backend_refused", doctor="KeyUsage was"
    ),
}


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES.keys())
def test_trouble_is_reported_and_ends(node: Node, server: Server, fake: FakeKms, trouble: Trouble) -> None:
    before, key = states(server), active(server, fake)
    held_before = (key.state, key.usage)
    assert sign(server).status == 200
    trouble.begin(fake, key)
    try:
        answer = sign(server)
        assert (answer.status, answer.problem) == (trouble.status, trouble.problem), answer.body
        assert trouble.says in answer.json["detail"]
        assert answer.json["next_step"]
        assert ("Retry-After" in answer.headers) == trouble.retry
        assert server.call("GET", "/default/.well-known/jwks.json", token=None).status == 200
        found = node.findings() if trouble.doctor else []
        assert any(trouble.doctor in check["detail"] and check["next_step"] for check in found) or not trouble.doctor
        assert states(server) == before
    finally:
        fake.heal()
        key.state, key.usage = held_before
        fake.held.keys[key.arn] = key
    wait_until(lambda: sign(server).status == 200)
    assert states(server) == before


def test_an_eddsa_token_that_is_too_long(server: Server, fake: FakeKms) -> None:
    name = server.key_set(None, "EdDSA")
    signer = server.client("signer", key_set=name)
    path = f"/v1/key-sets/{name}/keys/k1/jwt"
    with fake.counted() as calls:
        answer = server.call("POST", path, {"claims": {"aud": "x", "text": "y" * 5000}}, token=signer)
    assert (answer.status, answer.problem) == (502, "backend_refused")
    assert "4096" in answer.json["detail"]
    assert "claims" in answer.json["next_step"]
    assert calls["Sign"] == 0
    server.must("POST", path, {"claims": {"aud": "x", "text": "y" * 1000}}, token=signer)


def test_a_key_that_cannot_be_made_says_why(server: Server, fake: FakeKms) -> None:
    name = fresh("limit")
    fake.fail("CreateKey", "LimitExceededException", times=100)
    body = {"name": name, "keys": [{"name": "main", "alg": "ES256"}]}
    refused = server.call("POST", "/v1/key-sets", body)
    assert (refused.status, refused.problem) == (502, "backend_refused")
    assert "LimitExceeded" in refused.json["detail"]
    assert server.call("GET", f"/v1/key-sets/{name}").status == 404
    fake.heal()
    server.must("POST", "/v1/key-sets", body)
    wait_until(lambda: server.must("GET", f"/v1/key-sets/{name}/keys/main")["active_kid"], seconds=60)


def test_nothing_secret_is_in_the_log(server: Server) -> None:
    token = sign(server).json["token"]
    for secret in (f"secret-of-AKIA{ACCOUNT}", f"AKIA{ACCOUNT}", token.rpartition(".")[2], "AWS4-HMAC"):
        assert secret not in server.log


# --- started wrongly --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(fake: FakeKms, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stopped service that has made its keys."""
    node = Node(tmp_path_factory.mktemp("original"), free_port(), fake)
    node.configure()
    node.initialise()
    with running(node.folder, node.port) as server:
        wait_until(lambda: settled(server.must("GET", "/v1/key-sets/default/keys/default")))
        assert sign(server).status == 200
    (node.folder / "service.log").unlink()
    return node.folder


@pytest.fixture
def stopped(original: Path, fake: FakeKms, tmp_path: Path) -> Node:
    """A copy, to be started with wrong settings."""
    shutil.copytree(original, tmp_path / "node")
    node = Node(tmp_path / "node", free_port(), fake)
    node.configure()
    return node


@pytest.mark.parametrize("wrong", ["account", "region", "endpoint"])
def test_a_service_on_the_wrong_kms(stopped: Node, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """It starts, publishes, refuses to sign with the cause, and signs once the cause is removed."""
    if wrong == "account":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", f"AKIA{OTHER_ACCOUNT}")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"secret-of-AKIA{OTHER_ACCOUNT}")
        says, step, kind = OTHER_ACCOUNT, ACCOUNT, "backend_refused"
    elif wrong == "region":
        stopped.configure(region="us-east-1")
        says, step, kind = "us-east-1", "region", "backend_refused"
    else:
        stopped.configure(endpoint_url="http://127.0.0.1:9")
        says, step, kind = "cannot be reached", "endpoint", "backend_unavailable"
    with running(stopped.folder, stopped.port, Server.alive) as server:
        document = wait_until(
            lambda: (a := server.call("GET", "/.well-known/jwks.json", token=None)).status == 200 and a
        )
        assert len(document.json["keys"]) == 2
        answer = wait_until(lambda: (a := sign(server)).status != 409 and a.problem != "registry_stale" and a)
        assert answer.problem == kind
        assert says in answer.json["detail"]
        assert step in answer.json["next_step"]
        assert [state for _, state in states(server)] == ["active", "published"]
        found = stopped.findings()
        assert found
        assert all(check["next_step"] for check in found)
        assert says in json.dumps(found)
    if wrong != "account":
        return
    monkeypatch.undo()
    with running(stopped.folder, stopped.port) as server:
        assert sign(server).status == 200
        assert [state for _, state in states(server)] == ["active", "published"]
