"""The commands on the node: init, db, custodian, serve, and every finding of doctor produced for real."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import urllib3

from tests.integration.conftest import Server, free_port, prepare, wait_until


@dataclass(frozen=True)
class Node:
    """A folder with a configuration, a registry and a token, of which no service runs."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "kms-jwks.toml"

    @property
    def registry(self) -> Path:
        return self.folder / "registry.sqlite3"

    def command(self, *words: str, code: int | None = 0, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "kms_jwks", *words, "--config", str(self.config)],
            env=environment(**env),
            cwd=self.folder,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )
        assert code is None or done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def findings(self, *, code: int, **env: str) -> list[tuple[str, str, str, str]]:
        """What `doctor` finds wrong."""
        answer = json.loads(self.command("doctor", "--json", code=code, **env).stdout)
        assert answer["state"] == ("failure" if code else answer["state"])
        found = [(c["name"], c["state"], c["detail"], c["next_step"]) for c in answer["checks"] if c["state"] != "ok"]
        assert all(step for *_, step in found), "every finding says how to mend it"
        return [finding for finding in found if finding[0] not in ("custodian", "workers")]

    def sql(self, statement: str, *values: object) -> list[Any]:
        with sqlite3.connect(self.registry) as connection:
            rows = connection.execute(statement, values).fetchall()
        connection.close()
        return rows

    def edit(self, old: str, new: str) -> None:
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new))


def environment(**env: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KMS_JWKS_", "SOFTHSM2_CONF"))}
    return kept | env


@pytest.fixture(scope="module")
def original(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The running service's folder as it is now: one key with its standby."""
    key = "/v1/key-sets/default/keys/default"
    wait_until(lambda: all(v["visible_since"] for v in server.must("GET", key)["versions"][:2]))
    folder = tmp_path_factory.mktemp("original") / "node"
    shutil.copytree(server.folder, folder, ignore=shutil.ignore_patterns("state", "registry*", "service.log"))
    source, copy = sqlite3.connect(server.folder / "registry.sqlite3"), sqlite3.connect(folder / "registry.sqlite3")
    source.backup(copy)
    source.close()
    copy.close()
    (folder / "registry.sqlite3").chmod(0o600)
    (folder / "state").mkdir(mode=0o700)
    for name in ("kms-jwks.toml", "softhsm2.conf"):
        (folder / name).write_text((folder / name).read_text().replace(str(server.folder), str(folder)))
    return folder


@pytest.fixture
def node(original: Path, tmp_path: Path) -> Node:
    """A copy to break."""
    folder = tmp_path / "node"
    shutil.copytree(original, folder)
    for name in ("kms-jwks.toml", "softhsm2.conf"):
        (folder / name).write_text((folder / name).read_text().replace(str(original), str(folder)))
    return Node(folder)


# --- doctor -----------------------------------------------------------------------------------------------------------


def test_a_running_service_is_well(server: Server) -> None:
    done = Node(server.folder).command("doctor")
    assert "FAILED" not in done.stdout, done.stdout
    for name in ("state directory", "registry", "clocks", "custodian", "intents", "workers", "PIN file", "keys in"):
        assert f"ok       {name}" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_copy_is_well_too(node: Node) -> None:
    assert node.findings(code=0) == []
    assert node.command("doctor", "--strict", code=1).stdout.count("WARNING") >= 1, "no custodian acts here"


def test_loose_file_modes(node: Node) -> None:
    (node.folder / "pin").chmod(0o644)
    node.registry.chmod(0o640)
    (node.folder / "state").chmod(0o755)
    found = node.findings(code=1)
    assert [(name, state) for name, state, *_ in found] == [
        ("state directory", "failure"),
        ("registry file", "warning"),
        ("PIN file of softhsm", "failure"),
    ]
    assert [step for *_, step in found] == [
        f"chmod 700 {node.folder}/state",
        f"chmod 600 {node.registry}",
        f"chmod 600 {node.folder}/pin",
    ]


def test_a_wrong_pin_is_tried_once(node: Node) -> None:
    (node.folder / "pin").write_text("not-the-pin")
    for _ in range(2):
        ((name, state, detail, step),) = node.findings(code=1)
        assert (name, state) == ("backend softhsm", "failure")
        assert "refused the PIN" in detail
        assert "Put the right PIN into" in step
        assert "not-the-pin" not in detail + step
    assert len(list((node.folder / "state" / "pkcs11").glob("refused-pin-*"))) == 1


def test_a_missing_module(node: Node) -> None:
    module = next(line for line in node.config.read_text().splitlines() if line.startswith("module = "))
    node.edit(module, 'module = "/nowhere/libhsm.so"')
    found = node.findings(code=1)
    assert [(name, state) for name, state, *_ in found] == [
        ("module file of softhsm", "failure"),
        ("backend softhsm", "failure"),
    ]
    assert "/nowhere/libhsm.so" in found[0][2]


def test_something_that_is_no_module(node: Node) -> None:
    module = next(line for line in node.config.read_text().splitlines() if line.startswith("module = "))
    node.edit(module, f'module = "{node.config}"')
    ((name, state, *_),) = node.findings(code=1)
    assert (name, state) == ("backend softhsm", "failure")


def test_a_token_that_is_gone(node: Node) -> None:
    shutil.rmtree(node.folder / "tokens")
    (node.folder / "tokens").mkdir()
    ((name, state, *_),) = node.findings(code=1)
    assert (name, state) == ("backend softhsm", "failure")


def test_a_wrong_schema(node: Node) -> None:
    node.sql("update alembic_version set version_num = 'of-tomorrow'")
    ((name, state, detail, step),) = node.findings(code=1)
    assert (name, state) == ("registry", "failure")
    assert "of-tomorrow" in detail
    assert "newer program" in step
    refused = node.command("db", "check", code=1)
    assert "of-tomorrow" in refused.stderr
    assert "Next: " in refused.stderr
    assert "of-tomorrow" in node.command("serve", code=1).stderr
    assert "of-tomorrow" in node.command("custodian", code=1).stderr


def test_a_missing_registry(node: Node) -> None:
    node.registry.unlink()
    ((name, state, _, step),) = node.findings(code=1)
    assert (name, state) == ("registry", "failure")
    assert "kms-jwks init" in step
    node.command("db", "check", code=4)


def test_a_key_pair_that_is_gone(node: Node) -> None:
    objects = sorted((node.folder / "tokens").glob("*/*.object"), key=lambda path: path.stat().st_mtime)
    for path in objects:
        if path.name != "token.object":
            path.unlink()
    found = node.findings(code=1)
    assert {state for _, state, *_ in found} == {"failure"}
    assert "key default default 1" in {name for name, *_ in found}
    assert "does not hold it" in found[0][2]
    assert "backup" in found[0][3]


def test_a_registry_that_names_another_public_key(node: Node) -> None:
    node.sql(
        "update versions set public_jwk = (select public_jwk from versions where number = 2 limit 1) where number = 1"
    )
    names = {name for name, state, detail, _ in node.findings(code=1) if "another public key" in detail}
    assert "key default default 1" in names


def test_evidence_that_changed(node: Node) -> None:
    ((evidence,),) = node.sql("select evidence from versions where number = 1 order by id limit 1")
    changed = json.loads(evidence)
    changed["attributes"]["CKA_EXTRACTABLE"] = True
    node.sql("update versions set evidence = ? where evidence = ?", json.dumps(changed), evidence)
    ((name, _, detail, _),) = node.findings(code=1)
    assert name == "key default default 1"
    assert "CKA_EXTRACTABLE was True and is False" in detail


def test_a_backend_that_is_not_configured_here(node: Node) -> None:
    node.sql("update versions set backend = 'hsm-2'")
    found = node.findings(code=1)
    assert ("backend hsm-2", "failure") in {(name, state) for name, state, *_ in found}


def test_a_clock_that_went_back(node: Node) -> None:
    later = (time.time_ns() // 1000) + 3_600_000_000
    node.sql("update custodian set renewed_at = ?, expires_at = ?", later, later)
    ((name, state, detail, _),) = node.findings(code=1)
    assert (name, state) == ("clocks", "failure")
    assert "in the future" in detail


def test_a_halted_custodian(node: Node) -> None:
    node.sql("update custodian set halted = 'database time went back by 9.0 s'")
    answer = json.loads(node.command("doctor", "--json", code=1).stdout)
    (check,) = [c for c in answer["checks"] if c["name"] == "custodian"]
    assert "went back by 9.0 s" in check["detail"]


def test_a_stuck_intent(node: Node) -> None:
    columns = [row[1] for row in node.sql("pragma table_info(intents)")]
    node.sql(
        "update intents set state = 'started', finished_at = null, created_at = created_at - 600000000, "
        "not_before = not_before - 600000000 where id = (select max(id) from intents)"
    )
    assert "not_before" in columns
    found = [finding for finding in node.findings(code=1) if finding[0] == "intents"]
    assert "was begun and did not end" in found[0][2]


def test_workers_that_are_silent(node: Node) -> None:
    node.sql("update workers set heartbeat_at = heartbeat_at - 3600000000")
    answer = json.loads(node.command("doctor", "--json", code=None).stdout)
    silent = [c for c in answer["checks"] if c["name"] == "workers"]
    assert silent
    assert all("kms-jwks node forget " in c["next_step"] for c in silent)


MAKE_ORPHANS = """
import sys
from pathlib import Path
from kms_jwks import wiring
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.config import load_settings
settings = load_settings(Path(sys.argv[1]))
store, modules = wiring.make_store(settings), wiring.make_modules(settings)
with store.read() as tx:
    ours = tx.installation().id
for label in (f"kj-{ours}-left-behind", "kj-another1-pair", "foreign"):
    modules.get("softhsm").generate(label, ALGORITHMS["ES256"])
print(len(modules.get("softhsm").list_keys("")))
modules.close()
store.dispose()
"""


def test_orphans_are_found_and_removed_on_request_and_no_others(node: Node) -> None:
    def script(text: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", text, str(node.config)],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    before = int(script(MAKE_ORPHANS))
    ((name, state, detail, step),) = node.findings(code=0)
    assert (name, state) == ("orphans in softhsm", "warning")
    assert detail.startswith("1 key pair(s)")
    assert "-left-behind" in detail
    assert "--remove-orphans" in step

    refused = node.command("doctor", "--remove-orphans", code=2)
    assert "--yes" in refused.stderr
    assert len(node.findings(code=0)) == 1

    removed = node.command("doctor", "--remove-orphans", "--yes")
    assert "destroyed: kj-" in removed.stderr
    assert node.findings(code=0) == []
    left = script(MAKE_ORPHANS.split("for label", maxsplit=1)[0] + 'print(len(modules.get("softhsm").list_keys("")))')
    assert int(left) == before - 1
    assert "There are no orphans." in node.command("doctor", "--remove-orphans", "--yes").stderr


def test_a_node_that_only_publishes_needs_no_module(node: Node) -> None:
    (node.folder / "pin").unlink()
    assert node.findings(code=0, KMS_JWKS_ROUTES="public") == []


# --- init and db ------------------------------------------------------------------------------------------------------


def test_init_makes_what_is_missing_and_keeps_what_is_there(node: Node, tmp_path: Path) -> None:
    node.registry.unlink()
    token = tmp_path / "new.token"
    words = ("init", "--key-set", "orders", "--alg", "EdDSA", "--admin-token-file", str(token))
    first = node.command(*words)
    assert node.registry.stat().st_mode & 0o777 == 0o600
    assert token.stat().st_mode & 0o777 == 0o600
    made = token.read_text()
    assert made.strip() not in first.stdout
    second = node.command(*words)
    assert "reused" in second.stdout
    assert token.read_text() == made
    node.command("db", "upgrade")
    assert "is right" in node.command("db", "check").stdout


def test_init_says_what_it_cannot_write(node: Node) -> None:
    refused = node.command("init", "--admin-token-file", "/nowhere/admin.token", code=2)
    assert "/nowhere" in refused.stderr


@pytest.mark.parametrize("path", ["state", "registry.sqlite3"])
def test_init_makes_the_folders(tmp_path: Path, path: str, node: Node) -> None:
    shutil.rmtree(node.folder / "state")
    node.edit(f"sqlite:///{node.folder}/", f"sqlite:///{node.folder}/deep/er/")
    node.command("init")
    assert (node.folder / "state").stat().st_mode & 0o777 == 0o700
    assert (node.folder / "deep" / "er" / "registry.sqlite3").exists()


def test_settings_that_are_wrong_are_named(node: Node) -> None:
    refused = node.command("db", "check", code=2, KMS_JWKS_WORKERS="many")
    assert "KMS_JWKS_WORKERS" in refused.stderr
    assert "many" not in refused.stderr


# --- serve and custodian ----------------------------------------------------------------------------------------------


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def start(node: Node, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kms_jwks", *words, "--config", str(node.config)],
        env=environment(),
        cwd=node.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_custodian_runs_until_it_is_told_to_end(
    node: Node, number: signal.Signals, processes: list[subprocess.Popen[str]]
) -> None:
    ((before,),) = node.sql("select max(term) from custodian")
    processes.append(process := start(node, "custodian"))
    wait_until(lambda: node.sql("select max(term) from custodian")[0][0] > before)
    process.send_signal(number)
    assert process.wait(10) == 0
    ((expires,),) = node.sql("select expires_at from custodian")
    assert expires <= time.time_ns() // 1000, "it resigned, so that another one can act at once"


def test_serve_takes_what_the_command_line_says(node: Node, processes: list[subprocess.Popen[str]]) -> None:
    port = free_port()
    words = ("serve", "--routes", "public", "--bind", f"127.0.0.1:{port}", "--workers", "1")
    processes.append(process := start(node, *words))

    def status(path: str) -> int:
        try:
            return urllib3.request("GET", f"http://127.0.0.1:{port}{path}", retries=False, timeout=5).status
        except urllib3.exceptions.HTTPError:
            return 0

    wait_until(lambda: status("/default/.well-known/jwks.json") == 200)
    assert status("/v1/key-sets") == 404
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_serve_refuses_what_no_setting_can_be(node: Node) -> None:
    refused = node.command("serve", "--bind", "nowhere", code=2)
    assert "bind" in refused.stderr
    assert "Next: " in refused.stderr


def test_a_new_node_is_prepared_by_the_same_commands(tmp_path: Path) -> None:
    prepare(tmp_path, free_port())
    assert Node(tmp_path).findings(code=0) == []
