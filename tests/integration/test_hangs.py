"""Backends that do not come back: who waits, who does not, and how a worker that lost threads to one is replaced.

Whole services over SoftHSM, seen through the module that hangs as it is told.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.faults.harness import Faults, Violations
from tests.integration.conftest import Server, free_port, prepare, running, stop, wait_until

pytestmark = [pytest.mark.softhsm, pytest.mark.slow]

JWKS = "/main/.well-known/jwks.json"
ROUNDS, SECONDS = 3, 2.5
NOISE = 0.1
"""Seconds that a p99 may have on a machine that does other things; a caller who waited for a hung call has 2."""


@contextlib.contextmanager
def served(folder: Path, backend: str, **settings: object) -> Iterator[tuple[Server, Faults]]:
    """A service whose key set `main` has the keys `k1` and `k2`; `backend` is added to its backend's settings."""
    port = free_port()
    prepare(folder, port, **settings)
    config = folder / "kms-jwks.toml"
    lines = config.read_text().splitlines()
    (place,) = (number for number, line in enumerate(lines) if line.startswith("module = "))
    faults = Faults.make(folder / "faults", Path(json.loads(lines[place].partition(" = ")[2])))
    lines[place] = f"module = {json.dumps(str(faults.module))}\n{backend}"
    config.write_text("\n".join(lines) + "\n")
    with running(folder, port) as server:
        server.key_set("main", "ES256", "ES256", standby=True)
        (folder / "signer.token").write_text(server.client("signer"))
        yield server, faults


def url(key: str) -> str:
    return f"/v1/key-sets/main/keys/{key}/jwt"


def id_of(server: Server, key: str) -> bytes:
    """CKA_ID of the key that signs now."""
    kid = server.must("GET", f"/v1/key-sets/main/keys/{key}")["active_kid"]
    with contextlib.closing(sqlite3.connect(server.folder / "registry.sqlite3")) as registry:
        (ref,) = registry.execute("SELECT ref FROM versions WHERE kid = ?", (kid,)).fetchone()
    return bytes.fromhex(json.loads(ref)["id"])


def workers(server: Server) -> dict[int, psutil.Process]:
    return {process.pid: process for process in server.children()["http"].children()}


@dataclass
class Load:
    """Callers who go on and on, each on a connection of its own; how long each answer took, and with which status."""

    took: dict[str, list[float]] = field(default_factory=dict)
    statuses: dict[str, set[int]] = field(default_factory=dict)

    def run(self, callers: dict[str, tuple[int, Callable[[], int]]], seconds: float) -> None:
        """`callers`: how many of each name, and what one does."""
        end = time.monotonic() + seconds
        lock = threading.Lock()

        def go(name: str, call: Callable[[], int]) -> None:
            while time.monotonic() < end:
                started = time.monotonic()
                status = call()
                with lock:
                    self.took.setdefault(name, []).append(time.monotonic() - started)
                    self.statuses.setdefault(name, set()).add(status)

        everybody = [(name, call) for name, (count, call) in callers.items() for _ in range(count)]
        with ThreadPoolExecutor(len(everybody)) as threads:
            for done in [threads.submit(go, *one) for one in everybody]:
                done.result()


def p99(values: list[float]) -> float:
    assert len(values) >= 100, "too few to speak of a p99"
    return statistics.quantiles(values, n=100)[-1]


# --- in the pool


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Faults]]:
    backend = "sign_in_place = false\nsessions = 16\nstuck_limit = 6"
    with served(tmp_path_factory.mktemp("pooled"), backend, threads=8) as made:
        yield made


def test_a_key_that_hangs_disturbs_neither_another_key_nor_the_jwks(pooled: tuple[Server, Faults]) -> None:
    server, faults = pooled
    hung = id_of(server, "k1")

    def sign(key: str) -> Callable[[], int]:
        return lambda: server.call("POST", url(key), {"claims": {}}, token=server.signer).status

    others: dict[str, tuple[int, Callable[[], int]]] = {
        "other": (2, sign("k2")),
        "jwks": (1, lambda: server.call("GET", JWKS, token=None).status),
    }
    calm, disturbed = [Load() for _ in range(ROUNDS)], [Load() for _ in range(ROUNDS)]
    Load().run(others, 1.0)
    for quiet, loud in zip(calm, disturbed, strict=True):
        quiet.run(others, SECONDS)
        faults.hang("C_Sign", key=hung)
        loud.run(others | {"hung": (4, sign("k1"))}, SECONDS)
        faults.clear()
        wait_until(lambda: faults.hanging("C_Sign") == 0)
    assert all(load.statuses["other"] == {200} and load.statuses["jwks"] == {200} for load in calm + disturbed)
    for load in disturbed:
        assert load.statuses["hung"] <= {503, 504}
        assert 504 in load.statuses["hung"]
        assert max(load.took["hung"]) < 2 + 2, "the deadline, and a machine that does other things"
    for name in others:
        before, during = (statistics.median(p99(load.took[name]) for load in loads) for loads in (calm, disturbed))
        print(f"{name}: p99 {before * 1000:.1f} ms undisturbed, {during * 1000:.1f} ms beside a key that hangs")
        assert during <= max(2 * before, NOISE), name
    assert wait_until(lambda: sign("k1")() == 200), "and it signs again"
    assert faults.violations == Violations.NONE


def test_a_worker_that_lost_enough_calls_is_replaced_and_nobody_notices(pooled: tuple[Server, Faults]) -> None:
    server, faults = pooled
    before = workers(server)
    ending = threading.Event()
    failed: list[object] = []

    def watch() -> None:
        """The JWKS and the other key, without a break."""
        while not ending.is_set():
            jwks = server.call("GET", JWKS, token=None).status
            signed = server.call("POST", url("k2"), {"claims": {}}, token=server.signer).status
            if (jwks, signed) != (200, 200):
                failed.append((jwks, signed))

    faults.hang("C_Sign", key=id_of(server, "k1"))
    with ThreadPoolExecutor(9) as threads:
        watching = threads.submit(watch)

        def press() -> bool:
            for one in [
                threads.submit(server.call, "POST", url("k1"), {"claims": {}}, token=server.signer) for _ in range(8)
            ]:
                assert one.result().status in (503, 504)
            return not before.keys() <= workers(server).keys()

        try:
            wait_until(press, 90)
            faults.clear()
            wait_until(lambda: len(workers(server)) == 2 and server.ready(), 60)
        finally:
            faults.clear()
            ending.set()
        watching.result()
    assert failed == []
    assert '"worker_recycled"' in server.log
    listed = server.must("GET", "/v1/backends")["items"][0]
    assert listed["recycled"] >= 1
    assert wait_until(lambda: server.call("POST", url("k1"), {"claims": {}}, token=server.signer).status == 200)


def test_a_service_ends_although_calls_hang(pooled: tuple[Server, Faults]) -> None:
    """The last of its service."""
    server, faults = pooled
    hanging = faults.hanging("C_Sign")
    faults.hang("C_Sign", key=id_of(server, "k1"))
    try:
        assert server.call("POST", url("k1"), {"claims": {}}, token=server.signer).status == 504
        assert faults.hanging("C_Sign") > hanging
        started = time.monotonic()
        assert stop(server) == 0
        assert time.monotonic() - started < 25, "less than the graceful timeout: nobody is waited for in vain"
    finally:
        faults.clear()
    assert "WORKER TIMEOUT" not in server.log


# --- in the custodian

SHORTER = """
from kms_jwks.backends.pkcs11 import backend
backend._MUTATING = 3.0
"""


def test_a_custodian_whose_module_hangs_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep the token's lock for ever: nothing would be made there, by anybody. Workers do not notice."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SHORTER)  # 60 s are long
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    with served(tmp_path, "") as (server, faults):
        before, custodian = set(workers(server)), server.children()["custodian"].pid
        faults.hang("C_GenerateKeyPair")
        server.must("POST", "/v1/key-sets", {"name": "late", "keys": [{"name": "k1", "alg": "ES256"}]})
        wait_until(lambda: server.children().get("custodian", psutil.Process()).pid not in (custodian, os.getpid()), 60)
        assert server.log.count('"module_step_abandoned"') >= 1
        assert server.call("POST", url("k1"), {"claims": {}}, token=server.signer).status == 200
        faults.clear()
        wait_until(lambda: server.must("GET", "/v1/key-sets/late/keys/k1")["active_kid"], 60)
        assert set(workers(server)) == before


# --- in place


def test_a_worker_whose_thread_hangs_in_place_is_replaced(tmp_path: Path) -> None:
    """First one thread hangs, and the others go on; then all, and what came too late finds the next worker."""
    backend = "sign_in_place = true\nsessions = 8"
    with (
        served(tmp_path, backend, threads=4, workers=1) as (server, faults),
        ThreadPoolExecutor(8) as threads,
    ):
        for count in (1, 4):
            before, hanging = set(workers(server)), faults.hanging("C_Sign")
            faults.hang("C_Sign", key=id_of(server, "k1"))
            started = time.monotonic()
            lost = [threads.submit(broken, server, url("k1")) for _ in range(count)]
            wait_until(lambda now=hanging + count: faults.hanging("C_Sign") == now)
            if count == 1:
                assert server.call("GET", JWKS, token=None).status == 200
                assert server.call("POST", url("k2"), {"claims": {}}, token=server.signer).status == 200
            wait_until(lambda before=before: not before & set(workers(server)), 60)
            print(f"{count} of 4 threads hang in place: replaced after {time.monotonic() - started:.1f} s")
            assert all(one.result(60) for one in lost), "their connections ended without an answer"
            faults.clear()
            wait_until(server.ready, 60)
            assert server.call("GET", JWKS, token=None).status == 200
            wait_until(lambda: server.call("POST", url("k1"), {"claims": {}}, token=server.signer).status == 200)
        assert server.log.count('"worker_recycled"') == 2
        assert server.must("GET", "/v1/backends")["items"][0]["recycled"] == 2


def broken(server: Server, path: str) -> bool:
    """Whether the connection ends without an answer."""
    body = b'{"claims":{}}'
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.signer}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with contextlib.suppress(ConnectionResetError):
        return server.raw(head.encode() + body) == b""
    return True
