"""Verifiers that we did not write, with the JWKS that the service serves: PyJWT, joserfc, jose (Node), golang-jwt.

Each call is a verifier that has never seen the service before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import joserfc.jws
import joserfc.jwt
import jwt
import pytest
from joserfc.errors import SecurityWarning
from joserfc.jwk import KeySet
from joserfc.jwt import JWTClaimsRegistry

NODE = Path(__file__).parent / "node"
GO = Path(__file__).parent / "go"


def fetch(url: str) -> Any:
    """A JSON document."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


def with_pyjwt(token: str, jwks_uri: str, *, alg: str, issuer: str, audience: str) -> dict[str, Any]:
    """The claims, after `PyJWKClient` found the key. Raises jwt.PyJWTError."""
    key = jwt.PyJWKClient(jwks_uri).get_signing_key_from_jwt(token)
    claims: dict[str, Any] = jwt.decode(
        token,
        key,
        algorithms=[alg],
        issuer=issuer,
        audience=audience,
        options={"require": ["exp", "iat", "iss"]},
    )
    return claims


def with_joserfc(token: str, jwks_uri: str, *, alg: str, issuer: str, audience: str) -> dict[str, Any]:
    """The claims, after `KeySet` found the key. Raises joserfc.errors.JoseError, or ValueError for an unknown kid."""
    keys = KeySet.import_key_set(fetch(jwks_uri))
    with pytest.warns(SecurityWarning, match="RFC 9864") if alg == "EdDSA" else contextlib.nullcontext():
        found = joserfc.jwt.decode(token, keys, algorithms=[alg])
    JWTClaimsRegistry(
        iss={"essential": True, "value": issuer},
        aud={"essential": True, "value": audience},
        exp={"essential": True},
    ).validate(found.claims)
    return dict(found.claims)


class JoseError(Exception):
    """What jose threw; `code` is its own stable name (ERR_…)."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['name']} {error['code']}: {error['message']}")
        self.code = error["code"]


class Jose:
    """One Node process that answers line by line, so that Node starts once."""

    def __init__(self) -> None:
        self.cool_down: dict[str, float] = {}
        """By cache: seconds for which its verifier does not fetch again; jose's 30 where there is none."""
        node = shutil.which("node")
        if node is None:
            pytest.fail("Node is not installed; `./dev test` installs it (Debian: apt-get install nodejs npm)")
        if not (NODE / "node_modules" / "jose").is_dir():
            pytest.fail("npm's jose is not installed; `./dev test` installs it (npm ci in tests/interop/node)")
        self._process = subprocess.Popen(
            [node, "verify.mjs"],
            cwd=NODE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answer to each job, in order (see verify.mjs)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "Node ended: see its messages above"
        answers: list[dict[str, Any]] = json.loads(line)
        return answers

    def verify(
        self,
        token: str,
        jwks_uri: str,
        *,
        alg: str,
        issuer: str,
        audience: str,
        cache: str | None = None,
    ) -> dict[str, Any]:
        """The claims, after `createRemoteJWKSet` found the key. Calls with one `cache` are one verifier's.

        Raises JoseError.
        """
        job: dict[str, Any] = {
            "token": token,
            "jwks_uri": jwks_uri,
            "issuer": issuer,
            "audience": audience,
            "algorithms": [alg],
        }
        if cache is not None:
            job["cache"] = cache
            if cache in self.cool_down:
                job["cool_down"] = self.cool_down[cache]
        return self._claims(job)

    def discover(self, token: str, *, alg: str, issuer: str, audience: str) -> dict[str, Any]:
        """The same, by a verifier that knows the issuer alone."""
        job = {"token": token, "discover": issuer, "issuer": issuer, "audience": audience, "algorithms": [alg]}
        return self._claims(job)

    def _claims(self, job: dict[str, Any]) -> dict[str, Any]:
        (answer,) = self.ask([job])
        if "error" in answer:
            raise JoseError(answer["error"])
        claims: dict[str, Any] = answer["payload"]
        return claims


class GolangJwtError(Exception):
    """What golang-jwt returned."""


class GolangJwt:
    """golang-jwt, in a program that is built here (tests/interop/go); skips the test where that is not possible."""

    def __init__(self, folder: Path) -> None:
        go = shutil.which("go")
        if go is None:
            pytest.skip("Go is not installed: what its decoders make of our tokens is not tested here")
        # No toolchain of another version is fetched; a program without C and optimisation takes less long to build.
        environment = {**os.environ, "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly", "CGO_ENABLED": "0"}

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [go, *arguments], cwd=GO, env=environment, capture_output=True, text=True, timeout=300, check=False
            )

        version = re.match(r"go1\.(\d+)", run("env", "GOVERSION").stdout)
        if version is None or int(version[1]) < 21:
            pytest.skip("Go is older than 1.21, which tests/interop/go needs")
        fetched = run("mod", "download")
        if fetched.returncode != 0:
            pytest.skip(f"the Go modules of tests/interop/go cannot be had here: {fetched.stderr.strip()[-300:]}")
        self._program = folder / "verify"
        built = run("build", "-gcflags=all=-N -l", "-o", str(self._program), ".")
        assert built.returncode == 0, built.stderr

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        done = subprocess.run(
            [self._program], input=json.dumps(job) + "\n", capture_output=True, text=True, timeout=60, check=True
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        if "error" in answer:
            raise GolangJwtError(answer["error"])
        return answer

    def claims(self, token: str, jwks: dict[str, Any]) -> dict[str, Any]:
        """The RegisteredClaims of an ES256 token, verified with a key of `jwks`. Raises GolangJwtError."""
        claims: dict[str, Any] = self._ask({"token": token, "jwks": jwks})["claims"]
        return claims

    def spellings(self, name: str) -> list[str]:
        """The names that its decoder, encoding/json, takes for `name`."""
        spellings: list[str] = self._ask({"spell": name})["spellings"]
        return spellings
