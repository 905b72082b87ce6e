"""A service under load whose module goes away, fails in every way there is, and comes back: no restart mends it.

Eight connections sign all the time. What they are answered meanwhile is 200 or 503 with Retry-After (502 where the
module refuses for good); the first good signature comes within 2 s of the module's return; no process is replaced, no
key changes its state. 3 s away; 30 s with KMS_JWKS_TEST_LONG=1.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jwt
import pytest
import urllib3

from kms_jwks.backends.pkcs11.error_map import CODES, Meaning, Rebuilt
from kms_jwks.errors import UnsupportedAlgorithm
from tests.faults.harness import Faults, Violations
from tests.integration.conftest import (
    Server,
    close_connections,
    free_port,
    fresh,
    prepare,
    running,
    settled,
    wait_until,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.softhsm, pytest.mark.slow]

LONG = os.environ.get("KMS_JWKS_TEST_LONG") == "1"
CONNECTIONS = 8
AWAY = 30.0 if LONG else 3.0
FAULT = 3.0 if LONG else 1.0
BACK_WITHIN = 2.0
"""Seconds between the module's return and the first good signature."""
SLACK = 4.0 if not LONG else 0.0
"""More of them where the machine does other things besides."""
KEY = "/v1/key-sets/default/keys/default"


@dataclass(frozen=True)
class Seen:
    """One answer; instants of `time.monotonic()`."""

    began: float
    ended: float
    status: int
    retry_after: str | None
    body: bytes


@dataclass
class Issuers:
    """Connections that sign all the time, each with the next request as soon as it has an answer."""

    server: Server
    seen: list[Seen] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def running(self) -> Iterator[Issuers]:
        stop = threading.Event()
        token = self.server.signer

        def issue() -> None:
            pool = urllib3.PoolManager(retries=False, maxsize=1)
            while not stop.is_set():
                began = time.monotonic()
                try:
                    found = pool.request(
                        "POST",
                        f"{self.server.url}{KEY}/jwt",
                        body=b'{"claims":{"sub":"alice","aud":"demo"}}',
                        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
                        timeout=15,
                    )
                except urllib3.exceptions.HTTPError as error:
                    self.broken.append(type(error).__name__)
                    continue
                retry_after = found.headers.get("Retry-After")
                self.seen.append(Seen(began, time.monotonic(), found.status, retry_after, found.data))
                if found.status != 200:
                    time.sleep(0.02)
            close_connections(pool)

        threads = [threading.Thread(target=issue) for _ in range(CONNECTIONS)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: len(self.seen) > 50)
            yield self
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def good_after(self, moment: float) -> float:
        """Seconds from `moment` to the first answer with a signature that was asked for later; waits for it."""
        return min(one.ended for one in self.wait_for_good(moment)) - moment

    def wait_for_good(self, moment: float) -> list[Seen]:
        def found() -> list[Seen]:
            return [one for one in list(self.seen) if one.began >= moment and one.status == 200]

        result: list[Seen] = wait_until(found, 15)
        return result

    def between(self, begin: float, end: float) -> Counter[int]:
        return Counter(one.status for one in self.seen if one.began >= begin and one.ended <= end)


def processes(server: Server) -> set[tuple[int, float]]:
    """All of the service's, so that a replaced one is seen."""
    return {(process.pid, process.create_time()) for process in server.family()}


def states(server: Server) -> Any:
    """What the registry says of every version."""
    key = server.must("GET", KEY)
    return json.dumps([(v["kid"], v["state"], v["activated_at"]) for v in key["versions"]])


def verified(server: Server, seen: list[Seen]) -> None:
    """Every token that was given out verifies against the JWKS."""
    document = server.call("GET", "/default/.well-known/jwks.json", token=None).json
    keys = {key["kid"]: jwt.PyJWK(key) for key in document["keys"]}
    for one in seen:
        if one.status == 200:
            body = json.loads(one.body)
            jwt.decode(body["token"], keys[body["kid"]], audience="demo", options={"verify_iss": False})


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Faults]]:
    """A service over the fault-injecting module."""
    folder, port = tmp_path_factory.mktemp("away"), free_port()
    prepare(folder, port, workers=2, threads=8)
    config = folder / "kms-jwks.toml"
    text = config.read_text()
    real = next(line for line in text.splitlines() if line.startswith("module = "))
    faults = Faults.make(folder / "faults", json.loads(real.removeprefix("module = ")))
    config.write_text(text.replace(real, f"module = {json.dumps(str(faults.module))}\nsessions = 4"))
    with running(folder, port) as server:
        wait_until(lambda: settled(server.must("GET", KEY)))
        yield server, faults


def test_with_the_token_away_callers_are_told_to_wait_and_nothing_is_restarted(
    faulty: tuple[Server, Faults], record_property: Any
) -> None:
    server, faults = faulty
    before, family = states(server), processes(server)
    tokens: Path = server.folder / "tokens"
    with Issuers(server).running() as load:
        tokens.rename(server.folder / "hidden")
        gone = time.monotonic()
        time.sleep(AWAY)
        jwks = server.call("GET", "/default/.well-known/jwks.json", token=None)
        (server.folder / "hidden").rename(tokens)
        back = time.monotonic()
        took = load.good_after(back)
        time.sleep(1)
    during = load.between(gone + 1, back)
    slowest = max(one.ended - one.began for one in load.seen if one.status != 200)
    figures = f"{AWAY:.0f} s away: {dict(load.between(0, back + 99))} in all, {dict(during)} during, "
    figures += f"first good signature after {took:.2f} s, slowest refusal {slowest:.2f} s, {len(load.seen)} calls"
    print(figures)
    record_property("token-away", figures)
    assert {one.status for one in load.seen} == {200, 503}
    assert not load.broken
    assert set(during) == {503}
    assert all(one.retry_after and int(one.retry_after) >= 1 for one in load.seen if one.status == 503)
    assert jwks.status == 200
    assert took < BACK_WITHIN + SLACK
    assert states(server) == before
    assert processes(server) == family
    verified(server, load.seen)
    assert faults.violations == Violations.NONE


CLASSES: list[tuple[Meaning, int]] = [
    (meaning, next(code for code, row in CODES.items() if row.meaning is meaning)) for meaning in Meaning
]
BROKEN = {
    Rebuilt.MODULE: ("C_SignInit", "C_GetSlotList"),
    Rebuilt.CONNECTION: ("C_SignInit", "C_GetSlotList", "C_GetTokenInfo", "C_GetSessionInfo"),
}
"""What fails while a class of return values is shown; else C_Sign alone."""


@pytest.mark.parametrize(
    ("meaning", "code"), CLASSES, ids=[meaning.name.lower().replace("_", "-") for meaning, _ in CLASSES]
)
def test_each_class_of_failures_passes_without_a_trace(
    faulty: tuple[Server, Faults], meaning: Meaning, code: int, record_property: Any
) -> None:
    server, faults = faulty
    before, family = states(server), processes(server)
    allowed = {503}
    if meaning.is_final:
        allowed = {502, 503}
    with Issuers(server).running() as load:
        faults.answer(BROKEN.get(meaning.rebuilt, ("C_Sign",)), code)
        gone = time.monotonic()
        time.sleep(FAULT)
        faults.clear()
        back = time.monotonic()
        took = load.good_after(back)
        time.sleep(0.3)
    figures = f"{CODES[code].name}: {dict(load.between(gone, back))} during, good again after {took:.2f} s"
    print(figures)
    record_property("class", figures)
    assert {one.status for one in load.seen} <= {200, *allowed}
    assert {one.status for one in load.seen if gone < one.ended and one.began < back} & allowed
    assert not load.broken
    assert all(one.retry_after for one in load.seen if one.status == 503)
    for one in load.seen:
        if one.status == 502:
            kind = "unsupported_algorithm" if meaning.ends_as is UnsupportedAlgorithm else "refused"
            assert json.loads(one.body)["type"].endswith(f"backend_{kind}")
    assert took < BACK_WITHIN + SLACK
    assert states(server) == before
    assert processes(server) == family
    verified(server, load.seen)
    assert faults.violations == Violations.NONE


def test_sessions_that_are_lost_under_load_cost_nobody_an_answer(faulty: tuple[Server, Faults]) -> None:
    server, faults = faulty
    family = processes(server)
    with Issuers(server).running() as load:
        for _ in range(5):
            faults.lose_sessions()
            time.sleep(0.5)
    statuses = Counter(one.status for one in load.seen)
    assert set(statuses) <= {200, 503}
    assert statuses[503] < statuses[200] / 10
    assert processes(server) == family
    verified(server, load.seen)
    # At most those that sign and the login's, in each worker.
    wait_until(lambda: faults.open_sessions() <= 3 * 6)


@pytest.mark.parametrize(
    ("code", "status", "problem"),
    [(0x1B, 502, "backend_refused"), (0x13, 400, "unsupported_algorithm_requested")],
    ids=["CKR_ACTION_PROHIBITED", "CKR_ATTRIBUTE_VALUE_INVALID"],
)
def test_a_pair_that_the_module_declines_is_an_answer_and_leaves_nothing(
    faulty: tuple[Server, Faults], code: int, status: int, problem: str
) -> None:
    server, faults = faulty

    def names() -> list[tuple[str, list[str]]]:
        return [(s["name"], [k["name"] for k in s["keys"]]) for s in server.must("GET", "/v1/key-sets")["items"]]

    before = names()
    faults.answer("C_GenerateKeyPair", code)
    try:
        name = fresh("set")
        body = {"name": name, "keys": [{"name": "main", "alg": "ES256"}]}
        second = {"name": "second", "alg": "ES256"}
        for path, asked, key in (("/v1/key-sets/default/keys", second, "second"), ("/v1/key-sets", body, "main")):
            refused = server.call("POST", path, asked)
            assert (refused.status, refused.problem) == (status, problem), refused.body
            assert (refused.json["key"], refused.json["number"]) == (key, 1)
    finally:
        faults.clear("C_GenerateKeyPair")
    assert names() == before
    assert "version_given_up" in server.log
    made = server.must("POST", "/v1/key-sets", body)
    assert made["keys"][0]["active_kid"]
    assert server.call("DELETE", f"/v1/key-sets/{name}").problem == "already_published"
