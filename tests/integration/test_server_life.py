"""The processes: what is started, what survives whose death, and what a module or a database that is away breaks."""

from __future__ import annotations

import json
import signal
import sqlite3
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.integration.conftest import Server, fresh, prepared, running, stop, wait_until

if TYPE_CHECKING:
    from pathlib import Path

SIGN = "/v1/key-sets/default/keys/default/jwt"
JWKS = "/default/.well-known/jwks.json"


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


@dataclass(frozen=True)
class Own:
    """A service that tests start, maltreat and leave as they found it."""

    folder: Path
    port: int

    def edit(self, old: str, new: str) -> None:
        config = self.folder / "kms-jwks.toml"
        text = config.read_text()
        assert old in text
        config.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Own:
    folder = tmp_path_factory.mktemp("own")
    return Own(folder, prepared(folder))


def test_one_service_through_many_deaths(own: Own) -> None:
    """One start for several small stories, each leaving the service as it found it."""
    with running(own.folder, own.port) as server:
        a_killed_custodian_is_started_again(server)
        a_killed_worker_is_replaced_and_leaves_the_register(server)
        hup_brings_new_workers_and_loses_no_answer(server)
        a_broken_configuration_is_not_taken_over(server)
        family = server.family()
        server.children()["http"].kill()
        assert server.process.wait(20) == 128 + signal.SIGKILL, "the end of gunicorn is the end of all"
        wait_until(lambda: gone(family))


def live_workers(folder: Path) -> int:
    with sqlite3.connect(folder / "registry.sqlite3") as registry:
        return int(registry.execute("SELECT count(*) FROM workers WHERE stopped_at IS NULL").fetchone()[0])


def a_killed_custodian_is_started_again(server: Server) -> None:
    first = server.children()["custodian"]
    first.kill()
    second = wait_until(lambda: (c := server.children().get("custodian")) and c.pid != first.pid and c)
    assert server.must("POST", "/v1/key-sets", {"name": fresh("after"), "keys": [{"name": "k", "alg": "ES256"}]})
    assert second.is_running()
    assert '"process_died"' in server.log


def a_killed_worker_is_replaced_and_leaves_the_register(server: Server) -> None:
    workers = server.children()["http"].children()
    workers[0].kill()
    wait_until(lambda: len([w for w in server.children()["http"].children() if w not in workers]) == 1)
    wait_until(server.ready)
    server.must("POST", "/v1/clients", {"name": "made-after-a-worker-died"})
    nodes = server.must("GET", "/v1/nodes")["items"]
    wait_until(lambda: len(server.must("GET", "/v1/nodes")["items"]) == 2)
    assert nodes


def hup_brings_new_workers_and_loses_no_answer(server: Server) -> None:
    before = {p.pid for p in server.children()["http"].children()}
    custodian = server.children()["custodian"].pid
    failed: list[object] = []
    ending = threading.Event()

    def load() -> None:
        while not ending.is_set():
            try:
                if server.call("POST", SIGN, {"claims": {}}, token=server.signer).status != 200:
                    failed.append("refused")
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a lost answer
                failed.append(error)
            time.sleep(0.01)

    thread = threading.Thread(target=load)
    thread.start()
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: not before & {p.pid for p in server.children()["http"].children()})
    wait_until(lambda: (c := server.children().get("custodian")) and c.pid != custodian)
    ending.set()
    thread.join()
    assert not failed


def a_broken_configuration_is_not_taken_over(server: Server) -> None:
    config = server.folder / "kms-jwks.toml"
    good = config.read_text()
    config.write_text("nonsense")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: '"reload_refused"' in server.log)
    config.write_text(good)
    assert server.call("POST", SIGN, {"claims": {}}, token=server.signer).status == 200
    wait_until(lambda: "custodian" in server.children())


def test_nothing_is_left_when_the_parent_is_killed(own: Own) -> None:
    with running(own.folder, own.port) as server:
        wait_until(lambda: len(server.family()) == 5)  # supervisor, gunicorn, two workers, custodian
        family = server.family()
        server.process.kill()
        wait_until(lambda: gone(family))


def test_a_module_that_is_away_at_the_start(own: Own) -> None:
    """The service starts, publishes, says what is missing, and signs by itself once the module is back."""
    tokens, away = own.folder / "tokens", own.folder / "away"
    tokens.rename(away)
    try:
        with running(own.folder, own.port, Server.alive) as server:
            ready = server.call("GET", "/readyz/sign", token=None)
            assert ready.status == 503
            found = {d["name"]: d["state"] for d in ready.json["dependencies"]}
            assert found == {"registry": "ok", "backend:softhsm": "backend_unavailable"}
            assert server.call("GET", "/readyz", token=None).status == 200
            assert len(server.must("GET", JWKS, token=None)["keys"]) == 2
            refused = server.call("POST", SIGN, {"claims": {}}, token=server.signer)
            assert (refused.status, refused.problem) == (503, "backend_unavailable")
            assert int(refused.headers["Retry-After"]) >= 1
            away.rename(tokens)
            wait_until(lambda: server.call("POST", SIGN, {"claims": {}}, token=server.signer).status == 200, 30)
            wait_until(server.ready, 30)
    finally:
        if away.exists():
            away.rename(tokens)


def test_a_database_that_is_away_at_the_start(own: Own) -> None:
    """The last JWKS comes from disk, nothing is signed, and both mend themselves once the database is back."""
    files = [own.folder / f"registry.sqlite3{suffix}" for suffix in ("", "-wal", "-shm")]
    files = [file for file in files if file.exists()]
    for file in files:
        file.rename(file.with_name(f"away-{file.name}"))
    files[0].mkdir()  # so that no process makes an empty one
    try:
        with running(own.folder, own.port, Server.alive) as server:
            assert len(server.must("GET", JWKS, token=None)["keys"]) == 2
            assert server.call("GET", "/readyz", token=None).status == 200
            assert server.call("GET", "/readyz/sign", token=None).status == 503
            refused = server.call("POST", SIGN, {"claims": {}}, token=server.signer)
            assert refused.status == 503, refused.body
            assert refused.problem in ("registry_stale", "store_unavailable")
            control = server.call("GET", "/v1/key-sets")
            assert (control.status, control.problem) == (503, "store_unavailable")
            mend(files)
            wait_until(server.ready, 30)
            assert server.call("POST", SIGN, {"claims": {}}, token=server.signer).status == 200
    finally:
        mend(files)


def mend(files: list[Path]) -> None:
    if files[0].is_dir():
        files[0].rmdir()
        for file in files:
            file.with_name(f"away-{file.name}").rename(file)


def test_a_public_server_needs_neither_pin_nor_module(own: Own) -> None:
    own.edit("workers = 2", 'workers = 1\nroutes = "public"')
    hidden = [own.folder / "pin", own.folder / "tokens"]
    for path in hidden:
        path.rename(path.with_suffix(".hidden"))
    try:
        with running(own.folder, own.port, Server.alive) as server:
            assert set(server.children()) == {"http"}, "no custodian"
            assert len(server.must("GET", JWKS, token=None)["keys"]) == 2
            assert server.call("GET", "/readyz", token=None).status == 200
            for private in ("/v1/key-sets", "/docs", "/openapi.json", "/readyz/sign"):
                assert server.call("GET", private).problem == "route_not_found"
            assert server.call("POST", SIGN, {"claims": {}}, token=server.signer).problem == "route_not_found"
    finally:
        for path in hidden:
            path.with_suffix(".hidden").rename(path)
        own.edit('workers = 1\nroutes = "public"', "workers = 2")


def test_a_private_server_publishes_nothing(own: Own) -> None:
    """Its PIN comes from standard input, which every process of it, later ones included, is to find."""
    pin = (own.folder / "pin").read_bytes()
    from_file, from_stdin = f'pin_file = "{own.folder}/pin"', "pin_stdin = true"
    own.edit("workers = 2", 'workers = 1\nroutes = "private"')
    own.edit(from_file, from_stdin)
    try:
        with running(own.folder, own.port, stdin=pin) as server:
            for path in (JWKS, "/.well-known/jwks.json", "/default/.well-known/openid-configuration"):
                assert server.call("GET", path, token=None).problem == "route_not_found"
            assert server.call("POST", SIGN, {"claims": {}}, token=server.signer).status == 200
            a_killed_custodian_is_started_again(server)
            request_lines(server)
            a_graceful_end(server)
    finally:
        own.edit('workers = 1\nroutes = "private"', "workers = 2")
        own.edit(from_stdin, from_file)


def a_graceful_end(server: Server) -> None:
    family = server.family()
    started = time.monotonic()
    assert stop(server) == 0
    assert time.monotonic() - started < 15
    assert gone(family)
    assert live_workers(server.folder) == 0, "they left the register"


def request_lines(server: Server) -> None:
    """One line per request, with what helps to find it and nothing of what was said."""
    for path, request_id, who in ((SIGN, "find-me", server.admin), (f"{SIGN}?token=kj_x", "a-query", server.signer)):
        server.call("POST", path, {"claims": {"sub": "somebody"}}, token=who, headers={"X-Request-Id": request_id})
    found = [json.loads(line) for line in server.log.splitlines() if "find-me" in line]
    assert [line["event"] for line in found] == ["request"]
    (line,) = found
    assert line["method"] == "POST"
    assert line["path"] == SIGN
    assert line["route"] == "/v1/key-sets/{key_set}/keys/{key}/jwt"
    assert line["status"] == 403
    assert (line["code"], line["level"], line["client"]) == ("forbidden", "info", "admin-bootstrap")
    assert (line["key_set"], line["key"]) == ("default", "default")
    assert line["token_id"]
    assert line["ms"] > 0
    (line,) = (json.loads(line) for line in server.log.splitlines() if "a-query" in line)
    assert (line["path"], line["status"], line["code"]) == (SIGN, 400, "invalid_field")
    assert line["client"] == "signer-default"
    for secret in ("somebody", "kj_", "eyJ"):
        assert secret not in server.log
