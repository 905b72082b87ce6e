"""One running service, made as `./dev run` makes one, with other people's libraries around it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from kms_jwks.client import Client
from tests.bench.service import KEY, make_key_set, throwaway
from tests.integration.conftest import Server
from tests.interop.verifiers import Jose


@dataclass(frozen=True)
class Issuer:
    """A key set with one key `main`, and a client that may sign with it."""

    name: str
    alg: str
    url: str
    """The `iss` of its tokens."""
    jwks_uri: str
    client: Client

    def token(self, subject: str = "alice", audience: str = "shop") -> str:
        return self.client.sign_jwt(self.name, KEY, {"sub": subject, "aud": audience}).token

    def kid(self) -> str:
        return self.client.active(self.name, KEY).kid


MakeIssuer = Callable[..., Issuer]


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One service for the interop tests of a pytest process."""
    with throwaway() as server:
        yield server


@pytest.fixture(scope="session")
def admin(server: Server) -> Iterator[Client]:
    with Client(server.url, server.admin) as client:
        yield client


@pytest.fixture(scope="session")
def make_issuer(server: Server) -> Iterator[MakeIssuer]:
    """`make_issuer(alg, rsa_bits=None, purpose="jwt")` → a new key set that signs when this returns."""
    numbers = itertools.count(1)
    tokens = {"jwt": server.client("signer"), "raw": server.client("raw-signer")}
    clients = {purpose: Client(server.url, token) for purpose, token in tokens.items()}

    def make(alg: str, rsa_bits: int | None = None, purpose: str = "jwt") -> Issuer:
        name = f"{alg.lower()}-{next(numbers)}"
        make_key_set(server, name, alg, tokens[purpose], rsa_bits=rsa_bits, purpose=purpose)
        url = f"{server.url}/{name}"
        return Issuer(name, alg, url, f"{url}/.well-known/jwks.json", clients[purpose])

    with clients["jwt"], clients["raw"]:
        yield make


@pytest.fixture(scope="session")
def shared_issuer(make_issuer: MakeIssuer) -> MakeIssuer:
    """The same, and for the same arguments the same one: for tests that change nothing in it."""
    return functools.cache(make_issuer)


@pytest.fixture(scope="session")
def es256(shared_issuer: MakeIssuer) -> Issuer:
    return shared_issuer("ES256", None)


@pytest.fixture(scope="session")
def jose() -> Iterator[Jose]:
    with Jose() as process:
        yield process
