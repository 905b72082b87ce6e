"""Clients that other people's generators make from /openapi.json: nothing is lost, they compile, and they sign."""

from __future__ import annotations

import compileall
import importlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from kms_jwks.http.routes import ROUTES
from tests.integration.conftest import Server
from tests.interop.conftest import Issuer
from tests.interop.verifiers import NODE, with_pyjwt

MAIN = "main"
COMPILER = {
    "strict": True,
    "noUncheckedIndexedAccess": True,
    "exactOptionalPropertyTypes": True,
    "skipLibCheck": True,
    "module": "nodenext",
    "target": "es2022",
    "lib": ["es2022", "dom", "dom.iterable"],
    "types": [],
}
"""TypeScript's strictest settings, so that the types say what is missing and what may be absent."""


@pytest.fixture(scope="module")
def description(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The service's own, as a file."""
    file = tmp_path_factory.mktemp("openapi") / "openapi.json"
    with urllib.request.urlopen(f"{server.url}/openapi.json", timeout=10) as answer:
        file.write_bytes(answer.read())
    return file


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(token: str, issuer: Issuer) -> None:
    claims = with_pyjwt(token, issuer.jwks_uri, alg="ES256", issuer=issuer.url, audience="shop")
    assert claims["sub"] == "alice"


def test_a_python_client(
    server: Server, es256: Issuer, description: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made by openapi-python-client, which warns of what it leaves out."""
    (tmp_path / "config.json").write_text('{"post_hooks": []}')
    generator = Path(sys.executable).with_name("openapi-python-client")
    words = ("generate", "--path", description, "--output-path", tmp_path / "made", "--meta", "none")
    run(generator, *words, "--config", "config.json", "--fail-on-warning", folder=tmp_path)
    assert compileall.compile_dir(tmp_path / "made", quiet=1)
    made = {file.stem for file in (tmp_path / "made" / "api").glob("*/*.py")}
    assert {route.operation for route in ROUTES} <= made

    monkeypatch.syspath_prepend(str(tmp_path))
    client, models = (importlib.import_module(f"made.{name}") for name in ("client", "models"))

    def call(operation: str, *names: str, token: str, **more: Any) -> Any:
        (module,) = (tmp_path / "made" / "api").glob(f"*/{operation}.py")
        function = importlib.import_module(f"made.api.{module.parent.name}.{operation}").sync
        with client.AuthenticatedClient(base_url=server.url, token=token) as connection:
            return function(*names, client=connection, **more)

    signer = server.client("signer", key_set=es256.name)
    body = models.JwtRequest.from_dict({"claims": {"sub": "alice", "aud": "shop"}, "expires_in": 60})
    check(call("sign_jwt", es256.name, MAIN, token=signer, body=body).token, es256)
    refused = call("sign_jwt", es256.name, "nothing", token=signer, body=body)
    assert (type(refused), refused.status) == (models.Problem, 404)
    found = call("list_grants", token=server.admin, key_set=es256.name)
    assert {(grant.role, grant.scope.key_set) for grant in found.items} == {("signer", es256.name)}
    made_client = models.ClientCreate(name="generated-python")
    first, again = (
        call("create_client", token=server.admin, body=made_client, idempotency_key='"generated"') for _ in range(2)
    )
    assert first == again
    assert isinstance(first, models.Client)


def test_a_typescript_client(server: Server, es256: Issuer, description: Path, tmp_path: Path) -> None:
    """Made by openapi-typescript for openapi-fetch, compiled under `strict`, and run by Node."""
    if not (NODE / "node_modules" / "openapi-typescript").is_dir():
        pytest.fail("npm's openapi-typescript is not installed; `./dev test` installs it")
    shutil.copy(NODE / "sign.ts", tmp_path)
    (tmp_path / "node_modules").symlink_to(NODE / "node_modules")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    tools = NODE / "node_modules" / ".bin"
    run(tools / "openapi-typescript", description, "-o", "schema.d.ts", folder=tmp_path)
    (tmp_path / "tsconfig.json").write_text(json.dumps({"compilerOptions": COMPILER, "files": ["sign.ts"]}))
    run(tools / "tsc", folder=tmp_path)

    signer = server.client("signer", key_set=es256.name)
    said = json.loads(
        run("node", "sign.js", server.url, es256.name, MAIN, folder=tmp_path, SIGNER=signer, ADMIN=server.admin)
    )
    check(said["token"], es256)
    assert {"key_set": es256.name} in said["scopes"]
    assert said["problem"] == "urn:kms-jwks:problem:claims_refused"
    assert said["states"][0] == "active"
