"""Three nodes of two workers under load. No reader of any worker sees a part of a document or goes back while a key set
is edited on all nodes at once; no rotation loses a token while workers, custodians and whole nodes are killed.

18 edits and 4 rotations; 300 and 100 with KMS_JWKS_TEST_LONG=1.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import itertools
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from kms_jwks import jose
from tests.cluster import CLAIMS, Cluster, Line, Node, kill, running_threads
from tests.integration.conftest import START_SECONDS, fresh, settled, wait_until
from tests.postgres import Postgres

pytestmark = pytest.mark.slow

LONG = os.environ.get("KMS_JWKS_TEST_LONG") == "1"
EDITS = 300 if LONG else 18
READERS = 8
"""For each worker."""
SETS, ROTATIONS = (20, 5) if LONG else (2, 2)
"""A document holds ten kids, and each retiring one for over a minute: many rotations need many sets."""
LEAD = 1
"""Seconds a kid is published everywhere before it signs, and so for how long a verifier may keep a JWKS."""
ISSUERS = 3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), postgres, database_timeout_ms=15_000) as made:
        yield made


# --- edits
#
# What makes a part visible: each editor replaces an external key by its successor, adding before it removes, so of each
# editor's kids a whole document holds one or two neighbours, and their numbers only grow.


def external(kid: str) -> dict[str, Any]:
    jwk = jose.public_jwk(ec.generate_private_key(ec.SECP256R1()).public_key())
    return {"jwk": dict(jwk), "kid": kid, "alg": "ES256", "remove_at": "2100-01-01T00:00:00Z"}


class Editor:
    """Works on one node, on externals `<letter>-<number>`."""

    def __init__(self, node: Node, path: str, letter: str) -> None:
        self._node, self._path, self._letter = node, path, letter
        self.number = 0

    def add(self, number: int) -> None:
        self._node.server.must("POST", f"{self._path}/external-keys", external(f"{self._letter}-{number}"))

    def work(self, stop: threading.Event) -> None:
        while not stop.is_set():
            self.add(self.number + 1)
            self._node.server.must("DELETE", f"{self._path}/external-keys/{self._letter}-{self.number}")
            self.number += 1


class Reader:
    """One line to one worker, and what it saw last."""

    def __init__(self, line: Line, key_set: str, letters: str) -> None:
        self._line, self._path, self._letters = line, f"/{key_set}/.well-known/jwks.json", letters
        self._seen: dict[str, tuple[int, int]] = dict.fromkeys(letters, (0, 0))
        self.documents: dict[str, bytes] = {}
        self.count = 0

    def read(self, active: str) -> None:
        status, document, headers = self._line.ask("GET", self._path)
        assert status == 200
        kids = [jwk["kid"] for jwk in document["keys"]]
        assert kids[0] == active
        assert len(kids) == len(set(kids))
        for letter in self._letters:
            numbers = sorted(int(kid[2:]) for kid in kids if kid.startswith(f"{letter}-"))
            assert numbers, f"a part: {kids}"
            assert numbers[-1] - numbers[0] == len(numbers) - 1 <= 1, f"a part: {kids}"
            now = (numbers[0], numbers[-1])
            assert now >= self._seen[letter], f"it went back from {self._seen[letter]} to {now}"
            self._seen[letter] = now
        content = hashlib.sha256(json.dumps(document).encode()).digest()
        assert self.documents.setdefault(headers["ETag"], content) == content, "one ETag for two documents"
        self.count += 1

    def work(self, active: str, stop: threading.Event) -> None:
        while not stop.is_set():
            self.read(active)
            time.sleep(0.02)


def test_no_reader_of_any_worker_sees_a_part_or_goes_back(cluster: Cluster, figure: Callable[[str], None]) -> None:
    letters = "abc"
    name = fresh("set")
    cluster.admin.must("POST", "/v1/key-sets", {"name": name, "keys": [{"name": "k1", "alg": "ES256"}]})
    path = f"/v1/key-sets/{name}"
    key = wait_until(lambda: next((k for k in [cluster.admin.must("GET", f"{path}/keys/k1")] if settled(k)), None))
    editors = [Editor(node, path, letter) for node, letter in zip(cluster.nodes, letters, strict=True)]
    for editor in editors:
        editor.add(0)
    stop = threading.Event()
    with cluster.lines(each=READERS) as lines:
        readers = [Reader(line, name, letters) for each in lines.values() for line in each]
        assert len(readers) == 6 * READERS
        works: list[Callable[[], object]] = [partial(e.work, stop) for e in editors]
        works += [partial(r.work, key["active_kid"], stop) for r in readers]
        with running_threads(works, stop):
            wait_until(lambda: stop.is_set() or sum(e.number for e in editors) * 2 >= EDITS, EDITS * 10)
    assert all(reader.count > 10 for reader in readers)
    assert all(len(reader.documents) > 3 for reader in readers)
    # In the end all of them serve the same.
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(contextlib.closing(node.line())) for node in cluster.nodes]
        assert len({tuple(line.kids(name)) for line in ends}) == 1
    read, most = sum(reader.count for reader in readers), max(len(reader.documents) for reader in readers)
    figure(
        f"{sum(e.number for e in editors) * 2} edits from 3 nodes, {read} documents read by {len(readers)} readers on"
        f" 6 workers, up to {most} different ones by one of them"
    )


# --- rotations: every token verifies against a JWKS that was fetched before it was asked for, from any node


@dataclass
class Tally:
    """What callers met."""

    signed: Counter[str] = field(default_factory=Counter)
    """Tokens by kid."""
    refused: Counter[tuple[int, str]] = field(default_factory=Counter)
    unanswered: int = 0
    unknown: list[str] = field(default_factory=list)
    """Kids that a verifier could not have known."""
    killed: Counter[str] = field(default_factory=Counter)


class Caller:
    """An issuer and a verifier in one. It asks any node, and another one when it gets no answer."""

    def __init__(self, cluster: Cluster, tally: Tally, seed: int) -> None:
        self._tally = tally
        self._chance = random.Random(seed)
        self._lines = [node.line() for node in cluster.nodes]
        self._cache: dict[str, tuple[float, dict[str, jwt.PyJWK]]] = {}

    def close(self) -> None:
        for line in self._lines:
            line.close()

    def ask(self, *arguments: Any) -> tuple[int, Any]:
        for _ in range(200):
            line: Line = self._chance.choice(self._lines)
            try:
                status, body, _ = line.ask(*arguments)
            except (OSError, http.client.HTTPException):
                self._tally.unanswered += 1
                time.sleep(0.02)
                continue
            return status, body
        raise AssertionError("no node answers")

    def keys(self, key_set: str) -> dict[str, jwt.PyJWK]:
        """A JWKS by a verifier's cache: kept for as long as the lead allows, counted from before it was asked for."""
        kept = self._cache.get(key_set)
        if kept is None or time.monotonic() - kept[0] > LEAD:
            began = time.monotonic()
            status, document = self.ask("GET", f"/{key_set}/.well-known/jwks.json")
            assert status == 200, document
            kept = began, {k["kid"]: jwt.PyJWK(k) for k in document["keys"]}
            self._cache[key_set] = kept
        return kept[1]

    def sign_and_verify(self, key_set: str, token: str) -> None:
        known = self.keys(key_set)
        began, fetched = time.monotonic(), self._cache[key_set][0]
        status, body = self.ask("POST", f"/v1/key-sets/{key_set}/keys/k1/jwt", token, CLAIMS)
        if status != 200:
            self._tally.refused[status, body["type"].rpartition(":")[2]] += 1
            return
        header = jwt.get_unverified_header(body["token"])
        assert header["kid"] == body["kid"]
        self._tally.signed[body["kid"]] += 1
        if header["kid"] in known:
            jwt.decode(body["token"], known[header["kid"]], audience="demo")
        elif time.monotonic() - fetched <= LEAD:
            # Asked and answered while the JWKS was fresh.
            self._tally.unknown.append(f"{header['kid']} {began - fetched:.3f} s after the JWKS")


def chaos(cluster: Cluster, tally: Tally, stop: threading.Event) -> None:
    """kill -9: a worker, a custodian, a node as a whole, which is started again."""
    chance = random.Random(7)
    for victim in itertools.cycle(("worker", "custodian", "worker", "node")):
        node = chance.choice(cluster.nodes)
        tally.killed[victim] += 1
        if victim == "worker":
            kill(chance.choice(node.workers() or [None]))
        elif victim == "custodian":
            kill(node.custodian())
        else:
            node.kill()
            node.start()
            wait_until(node.ready, START_SECONDS)
        if stop.wait(0.5 + chance.random()):
            return


def rotate(cluster: Cluster, key_set: str, chance: random.Random) -> None:
    """One rotation, asked of any node until one has made it."""
    path = f"/v1/key-sets/{key_set}/keys/k1"
    end = time.monotonic() + 90
    before = None
    while True:
        assert time.monotonic() < end, "no rotation in time"
        with contextlib.suppress(OSError, http.client.HTTPException, AssertionError):
            line = chance.choice(cluster.nodes).line()
            try:
                admin = cluster.admin.admin
                status, key, _ = line.ask("GET", path, admin)
                if status != 200:
                    continue
                before = before or key["active_kid"]
                if key["active_kid"] != before:
                    return  # the answer was lost with the worker that gave it
                if settled(key):
                    body = b'{"expected_kid":"%s"}' % before.encode()
                    status, _, _ = line.ask("POST", f"{path}/rotate", admin, body)
                    if status == 200:
                        return
            finally:
                line.close()
        time.sleep(0.2)


def test_rotations_lose_nothing_whoever_is_killed(cluster: Cluster, figure: Callable[[str], None]) -> None:
    sets = [cluster.key_set(publish_lead=LEAD) for _ in range(SETS)]
    tally = Tally()
    stop = threading.Event()

    def call(seed: int) -> None:
        caller, chance = Caller(cluster, tally, seed), random.Random(seed)
        while not stop.is_set():
            caller.sign_and_verify(*chance.choice(sets))
            stop.wait(0.005)
        caller.close()

    began = time.monotonic()
    works = [partial(call, seed) for seed in range(ISSUERS)]
    with running_threads([*works, partial(chaos, cluster, tally, stop)], stop):
        chance = random.Random(1)
        for _ in range(ROTATIONS):
            for name, _ in sets:
                assert not stop.is_set()
                rotate(cluster, name, chance)
        time.sleep(1.0)
    cluster.until_ready()
    took = time.monotonic() - began
    tokens, kids = sum(tally.signed.values()), len(tally.signed)
    figure(
        f"{SETS * ROTATIONS} rotations in {took:.0f} s, {tokens} tokens by {kids} kids;"
        f" kids unknown to a verifier: {len(tally.unknown)}; refused: {dict(tally.refused)};"
        f" killed: {dict(tally.killed)}, and {tally.unanswered} requests with them"
    )
    assert tally.unknown == []
    assert kids >= SETS * ROTATIONS
    assert not tally.refused
    with contextlib.closing(cluster.nodes[0].line()) as line:
        for name, _ in sets:
            served = line.kids(name)
            assert len(set(served)) == len(served) > ROTATIONS
