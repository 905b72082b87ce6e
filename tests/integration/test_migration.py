"""An issuer that signs with a PEM key moves here, with live tokens and verifiers that cache: nothing is rejected.

The steps and their waits are those of docs/migrate.md, with a publish lead of seconds that is allowed by name.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from kms_jwks import errors
from kms_jwks.client import Client
from tests.integration.conftest import Run, Server, fresh, wait_until

LIFE = 3
"""Seconds that a token of the issuer lives."""
LEAD = 5
CACHE = 2
"""Seconds for which the verifiers keep a JWKS."""


class Address:
    """The URL that verifiers have in their settings; what is behind it can be exchanged."""

    def __init__(self, document: Callable[[], bytes]) -> None:
        self.document = document
        address = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = address.document()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/jwks.json"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class PyJwt:
    """PyJWT with its client's own caches: fetches at an unknown kid, but not twice within half a minute."""

    def __init__(self, url: str) -> None:
        self._keys = jwt.PyJWKClient(url, lifespan=CACHE)

    def key(self, token: str) -> Any:
        return self._keys.get_signing_key_from_jwt(token).key


class Patient:
    """A verifier as proxies have them: it fetches when its copy has expired and at no other time."""

    def __init__(self, url: str) -> None:
        self._client = jwt.PyJWKClient(url, cache_jwk_set=False)
        self._keys: dict[str, Any] = {}
        self._until = 0.0

    def key(self, token: str) -> Any:
        if time.monotonic() >= self._until:
            self._keys = {key.key_id or "": key.key for key in self._client.get_signing_keys()}
            self._until = time.monotonic() + CACHE
        return self._keys[jwt.get_unverified_header(token)["kid"]]


@dataclass
class Traffic:
    """An issuer that signs all the time, and verifiers that check each of its tokens for as long as it lives."""

    issuer: str
    sign: Callable[[dict[str, Any]], str]
    live: list[tuple[str, float]] = field(default_factory=list)
    accepted: dict[tuple[str, str], int] = field(default_factory=dict)
    """How often, by verifier and kid."""
    rejected: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def issue(self) -> None:
        while not self.stop.wait(0.05):
            expires = time.time() + LIFE
            claims = {"sub": "alice", "aud": "shop", "exp": int(expires)}
            try:
                self.live = [*(held for held in self.live if held[1] > time.time()), (self.sign(claims), int(expires))]
            except errors.Error as error:
                self.failed.append(error.detail)

    def verify(self, name: str, verifier: PyJwt | Patient) -> None:
        while not self.stop.wait(0.05):
            for token, expires in self.live:
                if expires - time.time() < 0.5:
                    continue
                kid = jwt.get_unverified_header(token)["kid"]
                try:
                    jwt.decode(
                        token, verifier.key(token), algorithms=["ES256"], issuer=self.issuer, audience="shop", leeway=30
                    )
                except (jwt.PyJWTError, KeyError) as error:
                    self.rejected.append(f"{name}: {kid}: {error!r}")
                else:
                    self.accepted[name, kid] = self.accepted.get((name, kid), 0) + 1

    @contextmanager
    def flowing(self, url: str) -> Iterator[Traffic]:
        threads = [threading.Thread(target=self.issue)]
        for name, verifier in (("pyjwt", PyJwt(url)), ("patient", Patient(url))):
            threads.append(threading.Thread(target=self.verify, args=(name, verifier)))
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()


@dataclass
class Old:
    """The issuer of today: a PEM key in a file, its kid, and the JWKS it publishes by itself."""

    kid: str
    issuer: str
    private: ec.EllipticCurvePrivateKey

    def sign(self, claims: dict[str, Any]) -> str:
        stamped = {"iss": self.issuer, "iat": int(time.time()), **claims}
        return jwt.encode(stamped, self.private, algorithm="ES256", headers={"kid": self.kid})

    def jwks(self) -> bytes:
        jwk = jwt.algorithms.ECAlgorithm.to_jwk(self.private.public_key(), as_dict=True)
        return json.dumps({"keys": [{**jwk, "use": "sig", "alg": "ES256", "kid": self.kid}]}).encode()

    def pem(self, *, private: bool = False) -> bytes:
        if private:
            return self.private.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        return self.private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )


@pytest.fixture
def old() -> Old:
    return Old(fresh("2025"), f"https://{fresh('login')}.example.com", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def address(old: Old) -> Iterator[Address]:
    made = Address(old.jwks)
    yield made
    made.close()


def prepare_here(run: Run, old: Old, tmp_path: Path) -> str:
    """Steps 1 and 2: the key set, and the old public key beside its new one."""
    name, pem = fresh("moving"), tmp_path / "old.pem"
    pem.write_bytes(old.pem())
    run("key-set", "create", name, "--issuer", old.issuer, "--existing-issuer")
    lead = ("--publish-lead", f"{LEAD}s", "--allow-unsafe-publish-lead")
    assert "unsafe publish_lead" in run("key", "create", name, "main", "--alg", "ES256", *lead).stderr
    run("external-key", "add", name, old.kid, "--alg", "ES256", "--pem", f"@{pem}", "--remove-at", "30d")
    return name


def document(server: Server, name: str) -> bytes:
    return server.call("GET", f"/{name}/.well-known/jwks.json", token=None).body


def test_an_issuer_moves_here_and_no_token_is_rejected(
    run: Run,
    server: Server,
    old: Old,
    address: Address,
    tmp_path: Path,
) -> None:
    with Traffic(old.issuer, old.sign).flowing(address.url) as traffic:
        time.sleep(CACHE)
        name = prepare_here(run, old, tmp_path)
        signer = server.client("signer", key_set=name)

        assert len(json.loads(document(server, name))["keys"]) == 2
        address.document = lambda: document(server, name)
        switched = time.monotonic()
        # The wait counts from here: before, no verifier could see the new key.
        time.sleep(LEAD)
        wait_until(lambda: server.must("GET", f"/v1/key-sets/{name}/keys/main")["active_kid"])
        # The custodian activated it, so nobody's answer waited until every worker knew.
        active = f"/v1/key-sets/{name}/keys/main/active"
        wait_until(lambda: {server.call("GET", active).status for _ in range(24)} == {200})
        assert time.monotonic() - switched >= LEAD

        with Client(server.url, signer) as client:
            probe = client.sign_jwt(name, "main", {"sub": "probe", "aud": "shop"}, expires_in=60)
            run("verify", name, probe.token, "--audience", "shop")
            traffic.sign = lambda claims: client.sign_jwt(name, "main", claims).token
            time.sleep(LIFE + CACHE)

            assert not any(jwt.get_unverified_header(token)["kid"] == old.kid for token, _ in traffic.live)
            run("external-key", "remove", name, old.kid, "--yes")
            time.sleep(2 * CACHE)
            traffic.stop.set()

    assert traffic.rejected == []
    assert traffic.failed == []
    for verifier in ("pyjwt", "patient"):
        for kid in (old.kid, probe.kid):
            assert traffic.accepted[verifier, kid] > 10, (verifier, kid)
    assert old.kid not in {key["kid"] for key in json.loads(document(server, name))["keys"]}


def test_without_the_wait_a_patient_verifier_rejects(
    run: Run,
    server: Server,
    old: Old,
    address: Address,
    tmp_path: Path,
) -> None:
    """The same walk with the verifiers pointed here only at the switch: so the test above can fail."""
    name = prepare_here(run, old, tmp_path)
    signer = server.client("signer", key_set=name)
    wait_until(lambda: server.must("GET", f"/v1/key-sets/{name}/keys/main")["active_kid"])
    with Traffic(old.issuer, old.sign).flowing(address.url) as traffic, Client(server.url, signer) as client:
        wait_until(lambda: len(traffic.accepted) == 2)
        address.document = lambda: document(server, name)
        traffic.sign = lambda claims: client.sign_jwt(name, "main", claims).token
        wait_until(lambda: any(line.startswith("patient") for line in traffic.rejected))
        traffic.stop.set()


def test_an_existing_issuers_key_does_not_sign_before_its_time(
    run: Run, server: Server, old: Old, tmp_path: Path
) -> None:
    name, pem = fresh("moving"), tmp_path / "old.pem"
    pem.write_bytes(old.pem())
    run("key-set", "create", name, "--issuer", old.issuer, "--existing-issuer", "--key", "main:ES256")
    run("external-key", "add", name, old.kid, "--alg", "ES256", "--pem", f"@{pem}", "--remove-at", "30d")
    signer = server.client("signer", key_set=name)
    wait_until(lambda: server.must("GET", f"/v1/key-sets/{name}/keys/main")["versions"][0]["visible_since"])
    assert "usable_at" in run("sign", name, "main", "--claims", "{}", token=signer, code=1).stderr
    run("verify", name, old.sign({"aud": "shop", "exp": int(time.time()) + 60}), "--audience", "shop")


@pytest.mark.parametrize("form", ["pem", "jwk"])
def test_a_private_key_is_not_even_sent(run: Run, server: Server, old: Old, tmp_path: Path, form: str) -> None:
    name, file = server.key_set(None), tmp_path / "old"
    jwk = jwt.algorithms.ECAlgorithm.to_jwk(old.private)
    file.write_bytes(old.pem(private=True) if form == "pem" else jwk.encode())
    words = ("external-key", "add", name, old.kid, "--alg", "ES256", "--remove-at", "30d", f"--{form}", f"@{file}")
    refused = run(*words, code=2)
    assert "private key" in refused.stderr
    assert "nothing was sent" in refused.stderr
    assert server.must("GET", f"/v1/key-sets/{name}/external-keys")["items"] == []
