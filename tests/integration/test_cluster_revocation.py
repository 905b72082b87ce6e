"""Three nodes of two workers under load: a revoked version signs nowhere once the call returns, also behind a cut."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.cluster import Cluster, Issuers, Line, running_threads
from tests.integration.conftest import wait_until
from tests.postgres import Postgres

pytestmark = pytest.mark.slow

LEASE = 5
ROUNDS = 20 if os.environ.get("KMS_JWKS_TEST_LONG") == "1" else 2


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), postgres, signing_lease=LEASE) as made:
        yield made


def watch(line: Line, key_set: str, old: str, gone: list[float], stop: threading.Event) -> None:
    """Note when the JWKS that this line's worker serves no longer holds `old`: the moment of the request."""
    while not stop.is_set():
        asked = time.monotonic()
        if old not in line.kids(key_set):
            gone.append(asked)
            return
        time.sleep(0.005)


def test_a_revoked_version_signs_nowhere_and_is_gone_from_every_jwks(
    cluster: Cluster, figure: Callable[[str], None]
) -> None:
    signatures, documents, calls = [], [], []
    for _ in range(ROUNDS):
        name, token = cluster.key_set(publish_lead=60)  # the second rotation comes after the test
        path = f"/v1/key-sets/{name}/keys/k1"
        old = cluster.admin.must("GET", path)["active_kid"]
        gone: list[float] = []
        stop = threading.Event()
        with cluster.lines() as lines, Issuers(cluster, f"{path}/jwt", token).running() as load:
            watchers = [partial(watch, line, name, old, gone, stop) for (line,) in lines.values()]
            began = time.monotonic()
            with running_threads(watchers, stop):
                answer = cluster.admin.must("POST", f"{path}/versions/{old}/revoke", {"reason": "test"})
                returned = time.monotonic()
                wait_until(lambda gone=gone: len(gone) == 6, every=0.01)
                time.sleep(0.3)
        assert answer["unconfirmed"] == []
        later = load.since(returned)
        assert {(s.status, s.kid) for s in later} == {(200, answer["successor"]["kid"])}
        assert {s.node for s in later} == {1, 2, 3}
        with_old = [s for s in load.seen if s.kid == old]
        assert {s.node for s in with_old} == {1, 2, 3}, "the load was everywhere before the revocation"
        assert max(s.began for s in with_old) <= returned
        signatures.append(max(s.ended for s in with_old) - began)
        documents.append(max(gone) - began)
        calls.append(returned - began)
    figure(
        f"from the call to the last signature {max(signatures):.3f} s, to the JWKS without it on all 6 workers"
        f" {max(documents):.3f} s, to the answer {max(calls):.3f} s (the longest of {ROUNDS})"
    )


@pytest.mark.parametrize("fault", ["freeze", "cut"])
def test_a_node_that_the_database_cannot_reach_signs_nothing_once_the_call_returns(
    cluster: Cluster, figure: Callable[[str], None], fault: str
) -> None:
    """Nobody can tell the cut-off node; its lease does. Its JWKS goes on, the old one."""
    name, token = cluster.key_set(publish_lead=60)
    path = f"/v1/key-sets/{name}/keys/k1"
    old = cluster.admin.must("GET", path)["active_kid"]
    lost = cluster.nodes[2]
    documents: list[list[str]] = []

    def read() -> None:
        line = lost.line()
        while not stop.is_set():
            documents.append(line.kids(name))
            time.sleep(0.01)
        line.close()

    stop = threading.Event()
    with Issuers(cluster, f"{path}/jwt", token).running() as load, running_threads([read], stop):
        getattr(lost.proxy, fault)()
        began = time.monotonic()
        answer = cluster.admin.must("POST", f"{path}/versions/{old}/revoke", {"reason": "test"})
        returned = time.monotonic()
        time.sleep(1.0)
        elsewhere = [s for s in load.since(returned) if s.node != 3]
        cut_off = [s for s in load.since(returned) if s.node == 3]
        assert len(documents) > 10
        assert all(old in kids for kids in documents)
        lost.proxy.mend()
        lost.proxy.thaw()
        wait_until(lambda: any(s.status == 200 for s in load.since(time.monotonic() - 0.5) if s.node == 3), 20)
        wait_until(lambda: old not in documents[-1])
    assert [worker["node"] for worker in answer["unconfirmed"]] == ["node-3", "node-3"]
    assert LEASE <= returned - began < LEASE + 20
    assert {(s.status, s.kid) for s in elsewhere} == {(200, answer["successor"]["kid"])}
    assert {(s.status, s.code) for s in cut_off} == {(503, "registry_stale")}
    assert not [s for s in load.since(returned) if s.kid == old]
    assert {s.kid for s in load.since(returned) if s.node == 3 and s.status == 200} == {answer["successor"]["kid"]}
    last = max(s.ended for s in load.seen if s.kid == old and s.node == 3) - began
    figure(f"lease {LEASE} s: the answer after {returned - began:.2f} s, its last signature after {last:.2f} s")
