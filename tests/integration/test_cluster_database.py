"""The database goes away under load and comes back: the JWKS goes on, signing for as long as the lease, and nothing has
to be started again."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import urllib3

from tests import postgres as servers
from tests.cluster import CLAIMS, Cluster, Issuers, Line, kill, running_threads
from tests.integration.conftest import START_SECONDS, wait_until
from tests.postgres import Postgres

pytestmark = pytest.mark.slow

LEASE = 5
KEY = "/v1/key-sets/default/keys/default"


@pytest.fixture(scope="module")
def own() -> Iterator[Postgres]:
    """These tests stop their server."""
    with servers.running() as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, own: Postgres) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), own, nodes=2, signing_lease=LEASE) as made:
        yield made


def pids(cluster: Cluster) -> list[tuple[list[int], int | None]]:
    return [(node.workers(), node.custodian()) for node in cluster.nodes]


def signing(cluster: Cluster) -> Issuers:
    return Issuers(cluster, f"{KEY}/jwt", cluster.admin.signer)


class Readers:
    """One reader for every worker; what it was answered when."""

    def __init__(self, lines: list[Line]) -> None:
        self.answers: list[tuple[float, float, int]] = []
        self._lines = lines
        self._stop = threading.Event()

    def running(self) -> contextlib.AbstractContextManager[None]:
        return running_threads([partial(self._read, line) for line in self._lines], self._stop)

    def _read(self, line: Line) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            status, document, _ = line.ask("GET", "/default/.well-known/jwks.json")
            assert document["keys"]
            self.answers.append((began, time.monotonic(), status))
            time.sleep(0.01)


def control(cluster: Cluster) -> tuple[int, str]:
    """What a change answers: status and problem."""
    answer = cluster.nodes[1].server.call("POST", "/v1/clients", {"name": "while-away"})
    return answer.status, answer.problem if answer.status >= 400 else ""


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_while_the_database_is_away_signing_lasts_as_long_as_the_lease(
    cluster: Cluster, own: Postgres, figure: Callable[[str], None], end: str
) -> None:
    before = pids(cluster)
    with cluster.lines() as lines, signing(cluster).running() as load:
        readers = Readers([line for (line,) in lines.values()])
        with readers.running():
            getattr(own, end)()
            away = time.monotonic()
            # Workers may hold their lease and still say so; changes are refused at once.
            assert control(cluster) == (503, "store_unavailable")
            wait_until(lambda: {s.status for s in load.since(time.monotonic() - 0.4)} == {503}, LEASE + 30)
            stale = time.monotonic()
            time.sleep(0.5)
            spare = cluster.nodes[0].line()
            status, _, headers = spare.ask("POST", f"{KEY}/jwt", cluster.admin.signer, CLAIMS)
            spare.close()
            assert status == 503
            assert int(headers["Retry-After"]) >= 1
            assert control(cluster) == (503, "store_unavailable")
            assert cluster.nodes[1].server.call("GET", "/readyz", token=None).status == 200
            assert cluster.nodes[1].server.call("GET", "/readyz/sign", token=None).status == 503
            own.start()
            again = time.monotonic()
            wait_until(lambda: {s.status for s in load.since(time.monotonic() - 0.4)} == {200}, 30)
            back = time.monotonic()
    signed = [s for s in load.seen if s.began > away and s.ended < stale and s.status == 200]
    assert signed, "the lease outlives the database"
    refusals = {(s.status, s.code) for s in load.since(away) if s.status != 200}
    assert refusals == {(503, "registry_stale")}
    assert {status for _, _, status in readers.answers} == {200}
    wait_until(lambda: cluster.nodes[1].server.call("GET", KEY).status == 200)
    assert pids(cluster) == before, "nothing was started again"
    last = max(s.ended for s in signed) - away
    figure(
        f"lease {LEASE} s: signed on for {last:.2f} s; signed again {back - again:.2f} s after the database was back"
    )


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_database_that_is_restarted_at_once_is_not_noticed_by_who_signs(
    cluster: Cluster, own: Postgres, end: str
) -> None:
    quick = 0
    for _ in range(10):
        with signing(cluster).running() as load:
            began = time.monotonic()
            getattr(own, end)()
            own.start()
            away = time.monotonic() - began
            time.sleep(1.0)
        wait_until(lambda: all(node.ready() for node in cluster.nodes))
        if away < LEASE / 4:  # a busy machine may take longer, and then the lease may end
            quick += 1
            assert {s.status for s in load.seen} == {200}
            assert load.lost == 0
        if quick == 2:
            return
    raise AssertionError("PostgreSQL was never restarted within the lease")


def test_a_node_whose_packets_vanish_serves_on_and_hangs_nobody(
    cluster: Cluster, figure: Callable[[str], None]
) -> None:
    """Callers that want the registry are told, and do not keep the workers from those who want the JWKS."""
    node = cluster.nodes[1]
    with cluster.lines() as lines, signing(cluster).running() as load:
        readers = Readers([line for pid in node.workers() for line in lines[pid]])
        with readers.running():
            time.sleep(1.0)
            node.proxy.freeze()
            frozen = time.monotonic()
            stop = threading.Event()
            answers: list[tuple[float, int]] = []

            def ask() -> None:
                line = node.line()
                while not stop.is_set():
                    began = time.monotonic()
                    status, _, _ = line.ask("GET", "/v1/key-sets", cluster.admin.admin)
                    answers.append((time.monotonic() - began, status))
                line.close()

            with running_threads([ask] * 8, stop):
                time.sleep(6)
            elsewhere = [s for s in load.since(frozen) if s.node == 1]
            node.proxy.thaw()
            wait_until(lambda: any(s.status == 200 for s in load.since(time.monotonic() - 0.3) if s.node == 2), 20)
    assert {status for _, status in answers} == {503}
    assert max(took for took, _ in answers) < 30
    assert {s.status for s in elsewhere} == {200}
    assert {status for _, _, status in readers.answers} == {200}
    calm = sorted(end - began for began, end, _ in readers.answers if end < frozen)
    cut = sorted(end - began for began, end, _ in readers.answers if frozen + 4 < began < frozen + 6)
    figure(
        f"JWKS beside 8 callers of a registry that does not answer: median {cut[len(cut) // 2] * 1000:.1f} ms, largest"
        f" {cut[-1] * 1000:.0f} ms (undisturbed {calm[len(calm) // 2] * 1000:.1f} and {calm[-1] * 1000:.0f})"
    )


def test_a_worker_or_a_node_that_starts_without_a_database_serves_the_last_jwks(
    cluster: Cluster, own: Postgres
) -> None:
    first, second = cluster.nodes
    with cluster.lines() as lines:
        kids = lines[first.workers()[0]][0].kids("default")
    own.stop()
    second.kill()
    second.start()
    old = first.workers()
    for pid in old:
        kill(pid)
    wait_until(lambda: len(first.workers()) == 2 and not set(first.workers()) & set(old), START_SECONDS)
    for node in cluster.nodes:
        wait_until(lambda node=node: len(node.workers()) == 2 and node.server.alive(), START_SECONDS)
    with cluster.lines() as lines:
        assert len(lines) == 4
        for (line,) in lines.values():
            assert line.kids("default") == kids
            status, body, _ = line.ask("POST", f"{KEY}/jwt", cluster.admin.signer, CLAIMS)
            assert status == 503, body
    for node in cluster.nodes:
        assert node.server.call("GET", "/readyz", token=None).status == 200
    own.start()
    cluster.until_ready()
    with signing(cluster).running() as load:
        # One worker of a node may be back before the other.
        wait_until(lambda: {s.status for s in load.since(time.monotonic() - 0.4)} == {200}, START_SECONDS)


def test_the_dead_of_every_node_are_struck_off(cluster: Cluster) -> None:
    """Also where the custodian only stands by; who is left counts, and a change waits for no ghost."""
    for node in cluster.nodes:
        kill(node.workers()[0])
    wait_until(lambda: all(len(node.workers()) == 2 for node in cluster.nodes), START_SECONDS)

    def registered() -> bool:
        with contextlib.suppress(urllib3.exceptions.HTTPError):  # the worker that was killed had been asked
            listed = {worker["pid"] for worker in cluster.admin.must("GET", "/v1/nodes")["items"]}
            return listed == {pid for node in cluster.nodes for pid in node.workers()}
        return False

    wait_until(registered, START_SECONDS)
