"""A key set is edited on all nodes at once while 8 readers poll each worker: no reader sees a part or goes back.

What makes it visible: each editor replaces an external key by its successor, adding before it removes, so of each
editor's kids a whole document holds one or two neighbours, and their numbers only grow.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from kms_jwks import jose
from tests.cluster import Cluster, Line, Node, running_threads
from tests.integration.conftest import fresh, settled, wait_until
from tests.postgres import Postgres

pytestmark = pytest.mark.slow

EDITS = 300 if os.environ.get("KMS_JWKS_TEST_LONG") == "1" else 18
READERS = 8
"""For each worker."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), postgres, database_timeout_ms=15_000) as made:
        yield made


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
