"""Whole services: the custodian's own credentials, a third party's backend, and a backend that nobody brings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.third_party import make_third_party
from kms_jwks.config import ThirdPartyBackend
from tests.contract.keyholder import holder, install
from tests.integration.conftest import Server, free_port, fresh, prepared, running, settled, wait_until

SIGN = "/v1/key-sets/default/keys/default/jwt"


def kms_jwks(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kms_jwks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def versions(server: Server, name: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = server.must("GET", f"/v1/key-sets/{name}/keys/k")["versions"]
    return found


@pytest.mark.softhsm
def test_workers_sign_without_the_custodians_pin_and_the_custodian_uses_no_other(tmp_path: Path) -> None:
    port = prepared(tmp_path)
    config, pin = tmp_path / "kms-jwks.toml", tmp_path / "management-pin"
    with config.open("a") as file:
        file.write(f'[backends.softhsm.management]\npin_file = "{pin}"\n')
    with running(tmp_path, port) as server:
        assert server.call("POST", SIGN, {"claims": {}}, token=server.signer).status == 200
        name = fresh("waits")
        created = server.call("POST", "/v1/key-sets", {"name": name, "keys": [{"name": "k", "alg": "ES256"}]})
        assert created.status in (201, 202), created.body
        wait_until(lambda: "module_step_failed" in server.log)
        failed = [json.loads(line) for line in server.log.splitlines() if "module_step_failed" in line]
        assert failed[0]["code"] == "backend_refused"
        assert str(pin) in failed[0]["error"]
        assert {version["state"] for version in versions(server, name)} == {"creating"}
        assert server.ready(), "the workers miss nothing"
        pin.write_text((tmp_path / "pin").read_text())
        wait_until(lambda: settled(server.must("GET", f"/v1/key-sets/{name}/keys/k")), 60)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The settings file of a service on the documented third party's backend, whose module runs."""
    site = install(tmp_path / "package")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "keyholder", raising=False)
    with TemporaryDirectory(prefix="kj-") as short, holder(site, Path(short) / "s"):
        config = tmp_path / "kms-jwks.toml"
        config.write_text(
            f'state_dir = "{tmp_path}/state"\ndatabase_url = "sqlite:///{tmp_path}/registry.sqlite3"\n'
            f'bind = ["127.0.0.1:{free_port()}"]\npoll_interval_ms = 100\n'
            f'[backends.toy]\ntype = "keyholder"\nsocket = "{short}/s/sign"\n'
            f'[backends.toy.management]\nsocket = "{short}/s/manage"\n'
        )
        yield config


def test_a_service_on_a_third_partys_backend(toy: Path) -> None:
    tokens = [f"--{who}-token-file={toy.parent / who}.token" for who in ("admin", "signer")]
    done = kms_jwks("init", "--config", toy, "--key-set", "default", *tokens)
    assert done.returncode == 0, done.stderr
    (port,) = (int(line.rpartition(":")[2].strip('"]')) for line in toy.read_text().splitlines() if "bind" in line)
    with running(toy.parent, port) as server:
        wait_until(lambda: settled(server.must("GET", "/v1/key-sets/default/keys/default")))
        assert server.call("POST", SIGN, {"claims": {}}, token=server.signer).status == 200
        (listed,) = server.must("GET", "/v1/backends")["items"]
        assert (listed["type"], listed["sign_in_place"], listed["state"]) == ("keyholder", False, "ok")
        assert listed["algorithms"] == ["ES256"]
        label = next(made["ref"]["label"] for made in _held(server))
    orphan(toy, label)
    assert kms_jwks("doctor", "--config", toy).returncode == 0, "looking needs no right to destroy"
    removed = kms_jwks("doctor", "--config", toy, "--remove-orphans", "--yes")
    assert "destroyed: " in removed.stderr + removed.stdout, removed


def _held(server: Server) -> list[dict[str, dict[str, str]]]:
    import sqlite3

    with sqlite3.connect(server.folder / "registry.sqlite3") as registry:
        return [{"ref": json.loads(ref)} for (ref,) in registry.execute("SELECT ref FROM versions")]


def orphan(config: Path, label: str) -> None:
    """A pair of this installation that no version refers to."""
    import tomllib

    section = tomllib.loads(config.read_text())["backends"]["toy"]
    backend = make_third_party("toy", ThirdPartyBackend.model_validate(section), config.parent, True)
    backend.generate(label[:-4] + "zzzz", ALGORITHMS["ES256"])


@pytest.mark.parametrize("command", [["serve"], ["custodian"], ["doctor"], ["init"]], ids=lambda command: command[0])
def test_a_backend_that_nobody_brings_is_an_error_at_the_start(tmp_path: Path, command: list[str]) -> None:
    config = tmp_path / "kms-jwks.toml"
    config.write_text(
        f'state_dir = "{tmp_path}/state"\ndatabase_url = "sqlite:///{tmp_path}/registry.sqlite3"\n'
        f'bind = ["127.0.0.1:{free_port()}"]\n[backends.mine]\ntype = "no-such-backend"\n'
    )
    assert kms_jwks("db", "upgrade", "--config", config).returncode == 0
    done = kms_jwks(*command, "--config", config)
    assert done.returncode == 2
    assert "backends.mine.type" in done.stderr
    assert "no-such-backend" in done.stderr
    assert "Traceback" not in done.stderr
