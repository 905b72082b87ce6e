"""The wheel and the sdist as pip installs them: the client alone, and a node on SoftHSM from nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest

from tests.integration.conftest import Server

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")


def run(
    *words: str | Path, folder: Path, code: int = 0, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command with nothing of this project in its environment."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "SOFTHSM2_MODULE") if name in os.environ}
    kept |= env or {}
    done = subprocess.run(words, cwd=folder, env=kept, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel alone into a new virtual environment."""
    run(UV, "venv", "--offline", "--python", sys.executable, folder, folder=wheel.parent)
    run(UV, "pip", "install", "--offline", "--no-deps", "--python", folder, wheel, folder=wheel.parent)
    (packages,) = folder.glob("lib/python3*/site-packages")
    return packages


def needed(name: str) -> set[str]:
    """A distribution and what it requires without any extra, by name."""
    found = {name}
    for requirement in metadata.requires(name) or ():
        wanted, _, marker = requirement.partition(";")
        if not marker:
            found |= needed(re.split(r"[^\w.-]", wanted.strip(), maxsplit=1)[0])
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(Path(sys.executable).with_name("hatchling"), "build", "--directory", folder, folder=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def client_alone(wheel: Path) -> Path:
    """What `pip install kms-jwks` makes: the packages that the wheel requires without an extra, and no others."""
    folder = wheel.parent / "client"
    packages = install(wheel, folder)
    for name in needed("kms-jwks") - {"kms-jwks"}:
        for file in metadata.files(name) or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target = packages / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(str(file.locate()), target)
    return folder / "bin" / "kms-jwks"


def test_the_client_needs_nothing_of_the_server() -> None:
    alone = {name.lower() for name in needed("kms-jwks")}
    assert alone >= {"click", "msgspec", "rich", "urllib3"}
    assert not alone & {"flask", "sqlalchemy", "cryptography", "python-pkcs11", "boto3", "gunicorn", "pydantic"}


def test_the_client_alone_signs_and_administrates(client_alone: Path, server: Server, tmp_path: Path) -> None:
    reach = {"KMS_JWKS_ADDR": server.url, "KMS_JWKS_TOKEN_FILE": str(server.folder / "admin.token")}
    signer = str(server.folder / "signer.token")
    claims = '{"sub": "alice", "aud": "web"}'

    def kms_jwks(*words: str) -> str:
        return run(client_alone, *words, folder=tmp_path, env=reach).stdout

    token = kms_jwks("sign", "default", "default", "--claims", claims, "--token-file", signer).strip()
    verified = kms_jwks("verify", "default", token, "--audience", "web")
    assert json.loads(verified[verified.index("{") :])["sub"] == "alice"
    assert "default" in kms_jwks("key-set", "list")
    kms_jwks("key", "timeline", "default", "default")
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
    (tmp_path / "key.jwk").write_text(json.dumps(jwk), encoding="utf-8")
    add = ("external-key", "add", "default", "by-client", "--jwk", "@key.jwk", "--alg", "EdDSA")
    kms_jwks(*add, "--remove-at", "30d")
    kms_jwks("external-key", "remove", "default", "by-client", "--yes")


@pytest.mark.parametrize("words", [["serve"], ["init"], ["doctor"], ["db", "check"], ["custodian"]])
def test_a_command_of_the_node_names_the_extra_that_is_missing(
    client_alone: Path, tmp_path: Path, words: list[str]
) -> None:
    said = run(client_alone, *words, folder=tmp_path, code=2).stderr
    assert "pip install 'kms-jwks[server]'" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.softhsm
def test_a_node_on_softhsm_comes_from_one_command(wheel: Path, tmp_path: Path) -> None:
    packages = install(wheel, tmp_path / "venv")
    # The server's packages come from this environment; the project itself does not.
    (packages / "server.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    program = tmp_path / "venv" / "bin" / "kms-jwks"
    words = ("--key-set", "default", "--admin-token-file", "node/admin.token")
    run(program, "init", "--softhsm", "node", *words, folder=tmp_path)
    node = tmp_path / "node"
    modes = {file.name: file.stat().st_mode & 0o777 for file in node.iterdir() if file.is_file()}
    assert {"kms-jwks.toml", "pin", "so-pin", "softhsm2.conf", "registry.sqlite3", "admin.token"} <= modes.keys()
    assert set(modes.values()) == {0o600}
    where = run(program.with_name("python"), "-c", "import kms_jwks; print(kms_jwks.__file__)", folder=tmp_path).stdout
    assert where.startswith(str(packages))
    before = {name: (node / name).read_bytes() for name in ("pin", "kms-jwks.toml", "admin.token")}
    run(program, "init", "--softhsm", "node", *words, folder=tmp_path)
    assert before == {name: (node / name).read_bytes() for name in before}
    report = json.loads(run(program, "doctor", "--config", "node/kms-jwks.toml", "--json", folder=tmp_path).stdout)
    assert [check for check in report["checks"] if check["state"] == "failure"] == []
    refused = run(program, "init", "--softhsm", "other", "--config", "x.toml", folder=tmp_path, code=2)
    assert "without --config" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_the_wheel_carries_what_an_operator_copies(wheel: Path) -> None:
    shared = wheel.parent / "client" / "share" / "kms-jwks"
    if not shared.exists():
        install(wheel, wheel.parent / "client")
    example = (shared / "kms-jwks.toml").read_text(encoding="utf-8")
    assert example == (ROOT / "config" / "kms-jwks.toml").read_text(encoding="utf-8")
    assert "ExecStart=" in (shared / "systemd" / "kms-jwks.service").read_text(encoding="utf-8")
    assert os.access(shared / "softhsm" / "init-token", os.X_OK)


def test_the_sdist_carries_the_documents_and_the_tests(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    tracked = {"README.md", "CHANGELOG.md", "LICENSE", "dev", "softhsm/init-token", "config/systemd/kms-jwks.service"}
    assert names >= tracked | {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert "tests/integration/test_packages.py" in names
    assert not any(name.startswith(("var/", ".venv", ".git/")) or "node_modules" in name for name in names)
