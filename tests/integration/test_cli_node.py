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
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import structlog.testing
import urllib3
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from kms_jwks.cli import supervisor
from kms_jwks.cli.app import cli
from kms_jwks.config import load_settings
from tests.children import kms_jwks
from tests.faults.harness import Faults
from tests.integration.conftest import Server, free_port, prepare, running, settled, wait_until
from tests.service.world import back_up, put_back
from tests.softhsm import make_token

Finding = tuple[str, str, str, str]
"""Name, state, detail and next step."""


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

    def process(self, *words: str, code: int | None = 0, **env: str) -> subprocess.CompletedProcess[str]:
        """A command as a process of its own: what loads the module has to be one."""
        done = kms_jwks(*words, "--config", str(self.config), folder=self.folder, environment=environment(**env))
        assert code is None or done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def command(self, *words: str, code: int | None = 0, **env: str) -> Result:
        """A command within this process, for the sake of speed."""
        clean = {name: None for name in os.environ if name.startswith("KMS_JWKS_")}
        answer = CliRunner().invoke(cli, [*words, "--config", str(self.config)], env={**clean, **env})
        if answer.exception is not None and not isinstance(answer.exception, SystemExit):
            raise answer.exception
        assert code is None or answer.exit_code == code, answer.output
        return answer

    def findings(self, *, code: int, module: bool = False, ignore: str = "custodian") -> list[Finding]:
        """What `doctor` finds wrong, with the module or as on a node that only publishes."""
        if module:
            output = self.process("doctor", "--json", code=code).stdout
        else:
            output = self.command("doctor", "--json", code=code, KMS_JWKS_ROUTES="public").stdout
        answer = json.loads(output)
        found = [(c["name"], c["state"], c["detail"], c["next_step"]) for c in answer["checks"] if c["state"] != "ok"]
        assert all(step for *_, step in found), "every finding says how to mend it"
        assert (answer["state"] == "failure") == (code == 1)
        return [finding for finding in found if finding[0] != ignore]

    def checks(self, name: str, **env: str) -> list[dict[str, str]]:
        """What `doctor` says under a name, on a node that only publishes."""
        answer = self.command("doctor", "--json", code=None, KMS_JWKS_ROUTES="public", **env)
        return [check for check in json.loads(answer.stdout)["checks"] if check["name"] == name]

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
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a service that has a key with its standby and was stopped; what doctor said while it ran."""
    folder = tmp_path_factory.mktemp("node")
    port = free_port()
    prepare(folder, port, workers=1)
    with running(folder, port) as server:
        wait_until(lambda: settled(server.must("GET", "/v1/key-sets/default/keys/default")))
        said = Node(folder).process("doctor").stdout
    (folder / "service.log").unlink()
    return folder, said


@pytest.fixture
def node(original: tuple[Path, str], tmp_path: Path) -> Node:
    """A copy to break."""
    folder = tmp_path / "node"
    shutil.copytree(original[0], folder)
    for name in ("kms-jwks.toml", "softhsm2.conf"):
        (folder / name).write_text((folder / name).read_text().replace(str(original[0]), str(folder)))
    return Node(folder)


# --- doctor -----------------------------------------------------------------------------------------------------------


def test_a_running_service_is_well(original: tuple[Path, str]) -> None:
    said = original[1]
    assert "0 failed, 0 with a warning." in said
    for name in ("state directory", "registry", "clocks", "custodian", "intents", "workers", "PIN file", "keys in"):
        assert f"ok       {name}" in said
    assert "\x1b" not in said


def test_a_stopped_node_is_well_but_for_its_custodian(node: Node) -> None:
    ((name, state, detail, step),) = node.findings(code=0, ignore="")
    assert (name, state) == ("custodian", "warning")
    assert "none acts" in detail
    assert "kms-jwks serve" in step
    node.command("doctor", "--strict", code=1, KMS_JWKS_ROUTES="public")
    people = node.command("doctor", KMS_JWKS_ROUTES="public").stdout
    assert "WARNING  custodian: none acts" in people
    assert "this node only publishes" in people


def test_loose_file_modes(node: Node) -> None:
    node.registry.chmod(0o640)
    (node.folder / "state").chmod(0o755)
    assert [(name, state, step) for name, state, _, step in node.findings(code=1)] == [
        ("state directory", "failure", f"chmod 700 {node.folder}/state"),
        ("registry file", "warning", f"chmod 600 {node.registry}"),
    ]


def test_a_missing_state_directory(node: Node) -> None:
    shutil.rmtree(node.folder / "state")
    ((name, state, _, step),) = node.findings(code=1)
    assert (name, state) == ("state directory", "failure")
    assert "kms-jwks init" in step


def test_a_wrong_pin_is_tried_once(node: Node) -> None:
    (node.folder / "pin").write_text("not-the-pin")
    (node.folder / "pin").chmod(0o644)
    for _ in range(2):
        loose, (name, state, detail, step) = node.findings(code=1, module=True)
        assert loose[:2] == ("PIN file of softhsm", "failure")
        assert loose[3] == f"chmod 600 {node.folder}/pin"
        assert (name, state) == ("backend softhsm", "failure")
        assert "refused the PIN" in detail
        assert "Put the right PIN into" in step
        assert "not-the-pin" not in detail + step
    assert len(list((node.folder / "state" / "pkcs11").glob("refused-pin-*"))) == 1


def test_a_missing_module(node: Node) -> None:
    line = next(line for line in node.config.read_text().splitlines() if line.startswith("module = "))
    node.edit(line, 'module = "/nowhere/libhsm.so"')
    found = node.findings(code=1, module=True)
    assert [(name, state) for name, state, *_ in found] == [
        ("module file of softhsm", "failure"),
        ("backend softhsm", "failure"),
    ]
    assert "/nowhere/libhsm.so" in found[0][2]
    assert "backends.softhsm" in found[0][3]


def test_something_that_is_no_module(node: Node) -> None:
    line = next(line for line in node.config.read_text().splitlines() if line.startswith("module = "))
    node.edit(line, f'module = "{node.config}"')
    ((name, state, detail, step),) = node.findings(code=1, module=True)
    assert (name, state) == ("backend softhsm", "failure")
    assert "cannot be loaded" in detail
    assert "path of the vendor's PKCS#11 library" in step


def test_a_token_that_is_gone(node: Node) -> None:
    shutil.rmtree(node.folder / "tokens")
    (node.folder / "tokens").mkdir()
    ((name, state, detail, step),) = node.findings(code=1, module=True)
    assert (name, state) == ("backend softhsm", "failure")
    assert "shows no token with label 'kms-jwks'" in detail
    assert "initialise it with the vendor's tool" in step


def test_two_tokens_with_one_label(node: Node) -> None:
    other = make_token(node.folder / "other", "kms-jwks")
    for folder in other.tokens.iterdir():
        shutil.copytree(folder, node.folder / "tokens" / folder.name)
    ((name, state, detail, step),) = node.findings(code=1, module=True)
    assert (name, state) == ("backend softhsm", "failure")
    assert "2 tokens with label 'kms-jwks'" in detail
    assert "token_serial" in step


def test_a_locked_pin(node: Node) -> None:
    line = next(line for line in node.config.read_text().splitlines() if line.startswith("module = "))
    faults = Faults.make(node.folder / "faults", Path(json.loads(line.removeprefix("module = "))))
    faults.answer("C_Login", 0xA4)
    node.edit(line, f'module = "{faults.module}"')
    for _ in range(2):
        ((name, state, detail, step),) = node.findings(code=1, module=True)
        assert (name, state) == ("backend softhsm", "failure")
        assert "CKR_PIN_LOCKED" in detail
        assert "security officer unlock the PIN" in step
    assert faults.calls("C_Login") == 1


def test_a_wrong_schema(node: Node) -> None:
    node.sql("update alembic_version set version_num = 'of-tomorrow'")
    ((name, state, detail, step),) = node.findings(code=1)
    assert (name, state) == ("registry", "failure")
    assert "of-tomorrow" in detail
    assert "newer program" in step
    for words in (("db", "check"), ("db", "upgrade"), ("serve",), ("custodian",), ("init",)):
        refused = node.command(*words, code=1)
        assert "of-tomorrow" in refused.stderr
        assert "Next: " in refused.stderr


def test_a_missing_registry(node: Node) -> None:
    for file in node.folder.glob("registry.sqlite3*"):
        file.unlink()
    ((name, state, _, step),) = node.findings(code=1)
    assert (name, state) == ("registry", "failure")
    assert "kms-jwks init" in step
    assert "kms-jwks init" in node.command("db", "check", code=4).stderr


def test_a_key_pair_that_is_gone(node: Node) -> None:
    for path in (node.folder / "tokens").glob("*/*.object"):
        if path.name != "token.object":
            path.unlink()
    found = node.findings(code=1, module=True)
    assert [name for name, *_ in found] == ["key default default 1", "key default default 2"]
    assert all(state == "failure" and "does not hold it" in detail for _, state, detail, _ in found)
    assert "backup" in found[0][3]


def test_keys_that_are_not_as_the_registry_says(node: Node) -> None:
    node.sql("update versions set public_jwk = (select public_jwk from versions where number = 2) where number = 1")
    ((evidence,),) = node.sql("select evidence from versions where number = 2")
    changed = json.loads(evidence)
    changed["attributes"]["CKA_EXTRACTABLE"] = True
    node.sql("update versions set evidence = ? where number = 2", json.dumps(changed))
    (first, _, swapped, _), (second, _, altered, _) = node.findings(code=1, module=True)
    assert (first, second) == ("key default default 1", "key default default 2")
    assert "another public key" in swapped
    assert "CKA_EXTRACTABLE was True and is False" in altered


@pytest.mark.parametrize(
    ("days", "state", "words", "step"),
    [
        ((-10, 60), "ok", "is valid until 20", ""),
        ((-70, 20), "warning", ", for 19 more days", "Renew it."),
        ((-90, -1), "failure", "expired at 20", "Renew it."),
        ((1, 90), "failure", "is valid only from 20", "Correct the clock."),
    ],
)
def test_certificates(node: Node, days: tuple[int, int], state: str, words: str, step: str) -> None:
    """A chain ends with its first certificate, a bundle of trusted ones with its last."""
    file = node.folder / "tls.pem"
    file.write_bytes(certificate(*days) + certificate(-300, 200))
    (chain,) = node.checks("TLS certificate", KMS_JWKS_TLS_CERT=str(file), KMS_JWKS_TLS_KEY=str(file))
    assert (chain["state"], chain["next_step"]) == (state, step)
    assert words in chain["detail"]
    (bundle,) = node.checks("command line's CA certificate", KMS_JWKS_CACERT=str(file))
    assert bundle["state"] == "ok"


def test_serve_logs_once_a_day_that_a_certificate_ends_soon(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    file = node.folder / "tls.pem"
    file.write_bytes(certificate(-70, 20))
    for name, value in (("CONFIG", node.config), ("TLS_CERT", file), ("TLS_KEY", file)):
        monkeypatch.setenv(f"KMS_JWKS_{name}", str(value))
    parent = supervisor._Supervisor(load_settings(None), {})
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            parent._report_certificates()
    ((level, what, detail),) = [(line["log_level"], line["what"], line["detail"]) for line in logs]
    assert (level, what) == ("warning", "TLS certificate")
    assert detail.endswith(", for 19 more days")
    parent._next_certificates -= supervisor.CERTIFICATE_INTERVAL
    with structlog.testing.capture_logs() as logs:
        parent._report_certificates()
    assert len(logs) == 1


def test_a_certificate_that_is_none(node: Node) -> None:
    for text, words in (("", "holds no certificate in PEM"), (None, "No such file")):
        file = node.folder / "tls.pem"
        file.unlink(missing_ok=True) if text is None else file.write_text(text)
        (found,) = node.checks("TLS certificate", KMS_JWKS_TLS_CERT=str(file), KMS_JWKS_TLS_KEY=str(node.config))
        assert found["state"] == "failure"
        assert words in found["detail"]


def certificate(begin: int, end: int) -> bytes:
    """A self-signed certificate that is valid from and until so many days from now on."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now + timedelta(days=begin)).not_valid_after(now + timedelta(days=end))
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_a_backend_that_is_not_configured_here(node: Node) -> None:
    node.sql("update versions set backend = 'hsm-2' where number = 1")
    found = {finding[0]: finding for finding in node.findings(code=1, module=True)}
    assert found["backend hsm-2"][1] == "failure"
    assert "default default 1" in found["backend hsm-2"][2]
    assert "[backends.hsm-2]" in found["backend hsm-2"][3]


def test_a_clock_that_went_back(node: Node) -> None:
    later = time.time_ns() // 1000 + 3_600_000_000
    node.sql("update custodian set renewed_at = ?, expires_at = ?", later, later)
    ((name, state, detail, _),) = node.findings(code=1)
    assert (name, state) == ("clocks", "failure")
    assert "in the future" in detail


def test_a_halted_custodian(node: Node) -> None:
    node.sql("update custodian set halted = 'database time went back by 9.0 s'")
    ((name, state, detail, _),) = node.findings(code=1, ignore="")
    assert (name, state) == ("custodian", "failure")
    assert "went back by 9.0 s" in detail


def test_a_stuck_intent(node: Node) -> None:
    node.sql("update intents set created_at = created_at - 600000000, not_before = not_before - 600000000")
    node.sql("update intents set state = 'started', finished_at = null where id = (select max(id) from intents)")
    ((name, state, detail, _),) = node.findings(code=1)
    assert (name, state) == ("intents", "failure")
    assert "generate for default default 2 was begun and did not end" in detail


def test_workers_that_are_silent_and_ones_without_a_custodian(node: Node) -> None:
    now = time.time_ns() // 1000
    node.sql("update workers set stopped_at = null, stop_reason = null, heartbeat_at = ?", now - 3_600_000_000)
    node.sql("update custodian set expires_at = ?", now - 3_600_000_000)
    ((name, state, _, step),) = node.findings(code=0)
    assert (name, state) == ("workers", "warning")
    assert "kms-jwks node forget " in step
    node.sql("update workers set heartbeat_at = ?", time.time_ns() // 1000)
    ((name, state, detail, _),) = node.findings(code=1, ignore="")
    assert (name, state) == ("custodian", "failure")
    assert "workers run" in detail


def test_an_unsafe_policy_shows(node: Node) -> None:
    node.sql("update keys set policy_publish_lead = 60")
    ((name, state, detail, step),) = node.findings(code=0)
    assert (name, state) == ("policy", "warning")
    assert detail.startswith("default default: ")
    assert "kms-jwks key update default default" in step


MAKE_ORPHANS = """
import sys
from pathlib import Path
from kms_jwks import wiring
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.config import load_settings
from kms_jwks.http import logs
logs.configure("info", "console")
settings = load_settings(Path(sys.argv[1]))
store, modules = wiring.make_store(settings), wiring.make_backends(settings)
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
    ((name, state, detail, step),) = node.findings(code=0, module=True)
    assert (name, state) == ("orphans in softhsm", "warning")
    assert detail.startswith("1 key pair(s)")
    assert "-left-behind" in detail
    assert "--remove-orphans" in step

    refused = node.process("doctor", "--remove-orphans", code=2)
    assert "--yes" in refused.stderr

    removed = node.process("doctor", "--remove-orphans", "--yes")
    assert "destroyed: kj-" in removed.stderr
    assert "ok       orphans in softhsm" in removed.stdout
    left = script(MAKE_ORPHANS.split("for label", maxsplit=1)[0] + 'print(len(modules.get("softhsm").list_keys("")))')
    assert int(left) == before - 1


# --- init and db ------------------------------------------------------------------------------------------------------


def test_init_makes_what_is_missing_and_keeps_what_is_there(node: Node, tmp_path: Path) -> None:
    for file in node.folder.glob("registry.sqlite3*"):
        file.unlink()
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
    assert "--yes" in node.command("db", "restored", code=2).stderr
    before = node.command("db", "check").stdout
    assert "disabled" in node.command("db", "restored", "--yes").stdout
    assert node.command("db", "check").stdout != before, "a new incarnation"


def test_init_without_its_file_says_that_the_old_token_still_works(node: Node, tmp_path: Path) -> None:
    token = tmp_path / "admin.token"
    words = ("init", "--admin-token-file", str(token))
    node.sql("delete from tokens")
    node.command(*words)
    ((old,),) = node.sql("select id from tokens")
    token.unlink()
    said = node.command(*words).stdout
    assert f"client 'admin-bootstrap' (admin): new token in {token}, valid until 20" in said
    assert "Another token of 'admin-bootstrap' still works, until 20" in said
    assert f"To revoke it: kms-jwks client token revoke admin-bootstrap {old}\n" in said
    node.sql("update tokens set revoked_at = 1 where id = ?", old)
    node.sql("update tokens set expires_at = ? where id <> ?", time.time_ns() // 1000 + 20 * 86_400_000_000, old)
    said = node.command(*words).stdout
    assert f"token in {token} reused, valid until 20" in said
    assert "It ends soon. A new one: kms-jwks client token rotate admin-bootstrap " in said
    assert "still works" not in said


def test_init_makes_a_signer_for_each_key_set_however_long_its_name(node: Node, tmp_path: Path) -> None:
    for last in "ab":
        file = tmp_path / f"{last}.token"
        node.command("init", "--key-set", "s" * 62 + last, "--signer-token-file", str(file))
    counted = "select count(*) from grants where role = 'signer' group by client_id"
    assert node.sql(counted) == [(1,), (1,), (1,)]


def test_init_makes_no_signer_for_a_key_that_is_not_there(node: Node, tmp_path: Path) -> None:
    words = ("init", "--key-set", "bare", "--signer-token-file", str(tmp_path / "signer.token"))
    node.command("init", "--key-set", "bare")
    with sqlite3.connect(node.registry) as database:
        database.execute(
            "UPDATE keys SET name = 'other' WHERE key_set_id = (SELECT id FROM key_sets WHERE name = 'bare')"
        )
    assert "no token for a signer: key set 'bare' has no key 'default'" in node.command(*words).stdout
    assert not (tmp_path / "signer.token").exists()


def test_init_is_a_way_back_in_after_its_client_was_deleted(node: Node, tmp_path: Path) -> None:
    """A deleted client's name stays taken, and a client of the next name that is none of `init`'s gets no role."""
    node.sql("update clients set deleted_at = 1 where name = 'admin-bootstrap'")
    node.sql("update clients set name = 'admin-bootstrap-2' where name = 'signer-default'")
    words = ("init", "--admin-token-file", str(tmp_path / "admin.token"))
    assert "client 'admin-bootstrap-3' (admin): new token" in node.command(*words).stdout
    assert "client 'admin-bootstrap-3' (admin): token in " in node.command(*words).stdout
    roles = "select name, role from grants join clients on clients.id = client_id where clients.deleted_at is null"
    assert sorted(node.sql(roles)) == [("admin-bootstrap-2", "signer"), ("admin-bootstrap-3", "admin")]


def test_init_makes_no_client_that_administrates_what_it_signs(node: Node, tmp_path: Path) -> None:
    node.sql("update grants set role = 'admin' where role = 'signer'")
    words = ("init", "--key-set", "default", "--signer-token-file", str(tmp_path / "signer.token"))
    assert "'signer-default' has the role admin within the same scope" in node.command(*words, code=1).stderr
    assert list(tmp_path.glob("signer.token*")) == []


def test_init_says_what_it_cannot_write(node: Node) -> None:
    refused = node.command("init", "--admin-token-file", "/nowhere/admin.token", code=2)
    assert "/nowhere" in refused.stderr


def test_init_makes_the_folders(node: Node) -> None:
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
    for routes in ("public", "all"):
        second = node.command("serve", "--routes", routes, "--bind", f"127.0.0.1:{free_port()}", code=2)
        assert f"Another process ({process.pid}) serves the public routes" in second.stderr
        assert "state_dir" in second.stderr
    process.kill()
    process.wait()
    processes.append(process := start(node, *words))
    wait_until(psutil.Process(process.pid).children)  # it has its lock, and waits for no lease of the killed one
    wait_until(lambda: status("/default/.well-known/jwks.json") == 200)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.mark.parametrize("command", ["serve", "custodian"])
def test_what_every_user_gets_at_is_refused(node: Node, command: str) -> None:
    for name, mode, said in (
        ("pin", 0o644, "PIN file of softhsm"),
        ("registry.sqlite3", 0o604, "registry file"),
        ("registry.sqlite3", 0o602, "registry file"),
        (".", 0o777, "folder of the registry file"),
        ("state", 0o703, "state_dir"),
    ):
        path = node.folder / name
        before = path.stat().st_mode
        path.chmod(mode)
        refused = node.command(command, code=2)
        assert said in refused.stderr
        assert "Next: " in refused.stderr
        assert "chmod" in refused.stderr
        found = node.findings(code=1, module=name == "pin")
        assert any(state == "failure" and "chmod" in step for _, state, _, step in found)
        path.chmod(before)


def test_a_folder_in_which_only_owners_replace_files_is_no_finding(node: Node) -> None:
    node.folder.chmod(0o1777)
    assert node.findings(code=0) == []


@pytest.mark.parametrize("words", [("serve",), ("custodian",), ("init",), ("doctor",), ("db", "check")])
def test_no_registry_is_guessed(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("KMS_JWKS_")]:
        monkeypatch.delenv(name)
    refused = CliRunner().invoke(cli, [*words])
    assert refused.exit_code == 2
    assert "database_url is not set" in refused.stderr
    assert "KMS_JWKS_DATABASE_URL" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_public_url_that_verifiers_do_not_reach_over_tls(node: Node) -> None:
    for bind, url, more, expected in (
        ("0.0.0.0:80", "http://keys.example", {}, "is not encrypted, and this node listens on 0.0.0.0:80"),
        ("127.0.0.1:80", "http://keys.example", {}, "is not encrypted"),
        ("127.0.0.1:80", "https://keys.example", {}, "neither a certificate nor a proxy"),
        ("127.0.0.1:80", "https://keys.example", {"KMS_JWKS_FORWARDED_ALLOW_IPS": "127.0.0.1"}, None),
        ("unix:/run/kms-jwks", "https://keys.example", {}, None),
        ("[::1]:80", "http://[::1]", {}, None),
        ("localhost:80", "http://localhost", {}, None),
    ):
        settings: Any = {"KMS_JWKS_BIND": bind, "KMS_JWKS_PUBLIC_URL": url, **more, "KMS_JWKS_ROUTES": "public"}
        checks = json.loads(node.command("doctor", "--json", **settings).stdout)["checks"]
        found = [(c["state"], c["detail"]) for c in checks if c["name"] == "public URL"]
        assert bool(found) is (expected is not None), (bind, url, found)
        assert expected is None or (found[0][0] == "warning" and expected in found[0][1])


def test_serve_refuses_what_no_setting_can_be(node: Node) -> None:
    refused = node.command("serve", "--bind", "nowhere", code=2)
    assert "bind" in refused.stderr
    assert "Next: " in refused.stderr


# --- a registry that was put back to an older state


def test_an_old_registry_is_refused_until_the_restore_is_announced(node: Node) -> None:
    """Put back while the service runs; then the service is started anew on it."""
    port = int(node.config.read_text().partition("127.0.0.1:")[2].partition('"')[0])
    key, copy = "/v1/key-sets/default/keys/default", node.folder / "copy.sqlite3"
    jwks = "/default/.well-known/jwks.json"
    with running(node.folder, port) as server:
        stolen = server.client("admin")
        back_up(node.registry, copy)
        for client in ("signer-default", server.must("GET", "/v1/clients?limit=200")["items"][-1]["name"]):
            (token,) = server.must("GET", f"/v1/clients/{client}/tokens")["items"]
            server.must("DELETE", f"/v1/clients/{client}/tokens/{token['id']}")
        first = server.must("POST", f"{key}/versions/1/revoke", {"reason": "stolen"})["version"]["kid"]
        assert first not in server.call("GET", jwks, token=None).body.decode()

        put_back(copy, node.registry)
        wait_until(lambda: state_of_registry(server, "/readyz") == "registry_rolled_back")
        check_refusals(server, stolen, first, revoked=(401, "credentials_revoked"))
        assert server.call("GET", key).status == 200, "an admin whose token the worker knows to be good may look"
        finding = next(found for found in node.findings(code=1) if found[0] == "registry history")
        assert "went back from epoch" in finding[2]
        assert "kms-jwks db restored" in finding[3]
        wait_until(lambda: server.log.count('"event":"registry_rolled_back"') == 2)  # the worker and the custodian

    with running(node.folder, port, Server.alive) as server:
        wait_until(lambda: state_of_registry(server, "/readyz") == "registry_rolled_back")
        check_refusals(server, stolen, first, revoked=(503, "registry_rolled_back"))
        assert "refuses the registry" in node.command("db", "check").stderr
        # A key pair that was made since the copy looks like an orphan to it.
        assert "went back from epoch" in node.process("doctor", "--remove-orphans", "--yes", code=4).stderr
        assert "1 key(s) are disabled" in node.command("db", "restored", "--yes").stdout
        wait_until(lambda: state_of_registry(server, "/readyz/sign") == "ok")
        refused = server.call("POST", f"{key}/jwt", {"claims": {}}, token=server.signer)
        assert (refused.status, refused.problem) == (409, "key_disabled")
        server.must("POST", f"{key}/enable", {})
        assert server.must("POST", f"{key}/jwt", {"claims": {}}, token=server.signer)["token"]
        assert "refuses" not in node.command("db", "check").stderr


def test_a_node_accepts_another_registry_where_its_operator_says_so(node: Node) -> None:
    for file in node.folder.glob("registry.sqlite3*"):
        file.unlink()
    assert "refuses the registry" in node.command("init").stderr
    assert "--yes" in node.command("db", "restored", "--accept", code=2).stderr
    assert "accepts the registry at epoch 1" in node.command("db", "restored", "--accept", "--yes").stdout
    assert "refuses" not in node.command("init").stderr
    assert "continues what this node has confirmed" in node.process("doctor").stdout
    (node.folder / "state" / "epoch.json").unlink()
    assert "has confirmed no epoch" in node.process("doctor").stdout
    (node.folder / "state" / "epoch.json").write_text("{")
    finding = next(found for found in node.findings(code=1) if found[0] == "registry history")
    assert "is damaged" in finding[2]
    assert "--accept" in finding[3]


def check_refusals(server: Server, stolen: str, first: str, *, revoked: tuple[int, str]) -> None:
    """Nothing that was revoked works, nothing changes, and the JWKS is the one that verifiers have."""
    key = "/v1/key-sets/default/keys/default"
    refused = (503, "registry_rolled_back")
    for method, path, body, token, wanted in (
        ("POST", f"{key}/jwt", {"claims": {}}, server.signer, revoked),
        ("GET", "/v1/clients", None, stolen, revoked),
        ("POST", "/v1/clients", {"name": "intruder"}, stolen, revoked),
        ("POST", "/v1/clients", {"name": "intruder"}, server.admin, refused),
        ("POST", f"{key}/rotate", {}, server.admin, refused),
    ):
        answer = server.call(method, path, body, token=token)
        assert (answer.status, answer.problem) == wanted, (method, path)
    document = server.call("GET", "/default/.well-known/jwks.json", token=None)
    assert document.status == 200
    assert document.json["keys"]
    assert first not in document.body.decode()
    assert server.call("GET", "/readyz", token=None).status == 200
    assert state_of_registry(server, "/readyz/sign") == "registry_rolled_back"


def state_of_registry(server: Server, path: str) -> str:
    found = server.call("GET", path, token=None).json["dependencies"]
    return next(str(d["state"]) for d in found if d["name"] == "registry")
