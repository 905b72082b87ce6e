"""Several real nodes on one PostgreSQL: each `kms-jwks serve` with its workers and its custodian, all on one token.

Between each node and the database stands a proxy of the test's own, which can cut the connections or let every byte
vanish. Callers here behave as callers of several nodes do: who is not answered asks another node.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests.integration.conftest import (
    START_SECONDS,
    Server,
    close_connections,
    free_port,
    fresh,
    prepare,
    settled,
    start,
    stop,
    wait_until,
)
from tests.postgres import Postgres
from tests.proxy import Proxy

UNSAFE = {"publish_lead": 0, "allow_unsafe_publish_lead": True}
CLAIMS = b'{"claims":{"sub":"alice","aud":"demo"}}'


class Node:
    """One node. `server` is its latest run."""

    def __init__(self, number: int, folder: Path, port: int, proxy: Proxy) -> None:
        self.number = number
        self.folder = folder
        self.port = port
        self.proxy = proxy
        self.server: Server

    def start(self) -> None:
        """Start it; it may not be ready yet."""
        self.server = start(self.folder, self.port)

    def ready(self) -> bool:
        assert self.server.process.poll() is None, self.server.log
        return self.server.ready()

    def stop(self) -> None:
        stop(self.server)

    def kill(self) -> None:
        """kill -9 of all its processes, as a machine that loses its power."""
        family = self.server.family()
        for process in family:  # the parent first: it must not start a child again, nor tell them to end
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.server.process.wait()
        psutil.wait_procs(family, timeout=10)
        close_connections(self.server.pool)

    def workers(self) -> list[int]:
        """The pids of its gunicorn workers."""
        http_server = self.server.children().get("http")
        return [child.pid for child in http_server.children()] if http_server is not None else []

    def custodian(self) -> int | None:
        found = self.server.children().get("custodian")
        return found.pid if found is not None else None

    def line(self) -> Line:
        """A connection of its own."""
        return Line(self)


class Line:
    """One keep-alive connection to a node: everything on it is answered by the same worker."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=15)

    def ask(
        self, method: str, path: str, token: str | None = None, body: bytes | None = None
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        """Status, decoded body, headers. Raises OSError or HTTPException when there is no answer."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        try:
            self._connection.request(method, path, body=body, headers=headers)
            answer = self._connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise
        return answer.status, json.loads(data) if data else None, answer.headers

    def kids(self, key_set: str) -> list[str]:
        """The kids of a set's JWKS, in their order."""
        status, document, _ = self.ask("GET", f"/{key_set}/.well-known/jwks.json")
        assert status == 200, document
        return [jwk["kid"] for jwk in document["keys"]]

    def worker(self) -> int | None:
        """Which worker's process is at the other end."""
        self.ask("GET", "/healthz")
        own = self._connection.sock.getsockname()
        for pid in self.node.workers():
            with contextlib.suppress(psutil.Error):
                if any(c.raddr == own for c in psutil.Process(pid).net_connections("tcp")):
                    return pid
        return None

    def close(self) -> None:
        self._connection.close()


class Cluster:
    """Nodes that were prepared together. A context manager that starts and stops them."""

    def __init__(self, folder: Path, postgres: Postgres, *, nodes: int = 3, **settings: Any) -> None:
        self.folder = folder
        self.postgres = postgres
        self.database = postgres.create()
        self.nodes: list[Node] = []
        with contextlib.ExitStack() as stack:
            public = f"http://127.0.0.1:{free_port()}"
            for number in range(1, nodes + 1):
                proxy = stack.enter_context(Proxy(postgres.port))
                home = folder / f"node-{number}"
                home.mkdir()
                port = free_port()
                options = {
                    "public_url": public,
                    "database_url": postgres.url(self.database, port=proxy.port),
                    "database_timeout_ms": 3000,
                    "state_dir": f"{home}/state",
                    "node_name": f"node-{number}",
                    "workers": 2,
                } | settings
                if number == 1:
                    prepare(home, port, **options)
                else:
                    self._copy(self.nodes[0], home, port, options)
                self.nodes.append(Node(number, home, port, proxy))
            self._proxies = stack.pop_all()

    def _copy(self, first: Node, home: Path, port: int, options: dict[str, Any]) -> None:
        """The first node's configuration with what is this one's own."""
        own = options | {"bind": [f"127.0.0.1:{port}"]}
        text = (first.folder / "kms-jwks.toml").read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.partition(" = ")[0] not in own]
        lines = [f"{name} = {json.dumps(value)}" for name, value in own.items()] + lines
        (home / "kms-jwks.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for name in ("admin.token", "signer.token"):
            (home / name).symlink_to(first.folder / name)

    def __enter__(self) -> Cluster:
        try:
            for node in self.nodes:
                node.start()
            self.until_ready()
            wait_until(lambda: settled(self.admin.must("GET", "/v1/key-sets/default/keys/default")))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.proxy.thaw()
            node.proxy.mend()
        for node in self.nodes:
            with contextlib.suppress(AttributeError):
                node.stop()
        self._proxies.close()

    def until_ready(self, *nodes: Node) -> None:
        """Wait until nodes (all, unless some are named) sign."""
        wait_until(lambda: all(node.ready() for node in nodes or self.nodes), START_SECONDS)

    @property
    def admin(self) -> Server:
        """The first node, as an administrator's command line knows it."""
        return self.nodes[0].server

    def key_set(self, **policy: Any) -> tuple[str, str]:
        """A key set whose key `k1` signs everywhere and has its standby; its name, and a token that signs with it."""
        name = fresh("set")
        key = {"name": "k1", "alg": "ES256", "policy": UNSAFE | policy}
        self.admin.must("POST", "/v1/key-sets", {"name": name, "keys": [key]})
        wait_until(lambda: settled(self.admin.must("GET", f"/v1/key-sets/{name}/keys/k1")), 30)
        return name, self.admin.client("signer", key_set=name)

    @contextlib.contextmanager
    def lines(self, each: int = 1) -> Iterator[dict[int, list[Line]]]:
        """For every worker of every node that runs, by its pid, `each` connections."""
        found: dict[int, list[Line]] = {}
        spare: list[Line] = []
        for node in self.nodes:
            wanted = node.workers()
            end = time.monotonic() + 30
            while any(len(found.get(pid, [])) < each for pid in wanted):
                assert time.monotonic() < end, "not every worker could be reached"
                line = node.line()
                pid = line.worker()
                # A spare one stays open: closed, its worker would look idle and get the next one too.
                (found.setdefault(pid, []) if pid in wanted and len(found.get(pid, [])) < each else spare).append(line)
        for line in spare:
            line.close()
        try:
            yield found
        finally:
            for lines in found.values():
                for line in lines:
                    line.close()


@dataclass(frozen=True)
class Signed:
    """One answer to a signing request; instants of `time.monotonic()`."""

    began: float
    ended: float
    node: int
    status: int
    body: dict[str, Any]

    @property
    def kid(self) -> str | None:
        return self.body.get("kid")

    @property
    def code(self) -> str:
        return str(self.body.get("type", "")).rpartition(":")[2]


@dataclass
class Issuers:
    """Callers that sign all the time, each with connections of its own to all nodes, or to one.

    `lost` counts requests without an answer: a worker or a node was killed under them.
    """

    cluster: Cluster
    path: str
    token: str
    threads: int = 4
    pause: float = 0.01
    nodes: tuple[int, ...] = ()
    seen: list[Signed] = field(default_factory=list)
    lost: int = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[Issuers]:
        stop_ = threading.Event()
        wanted = [n for n in self.cluster.nodes if not self.nodes or n.number in self.nodes]

        def issue(number: int) -> None:
            chance = random.Random(number)
            lines = {node.number: node.line() for node in wanted}
            while not stop_.is_set():
                line = lines[chance.choice(wanted).number]
                began = time.monotonic()
                try:
                    status, body, _ = line.ask("POST", self.path, self.token, CLAIMS)
                except (OSError, http.client.HTTPException):
                    self.lost += 1
                else:
                    self.seen.append(Signed(began, time.monotonic(), line.node.number, status, body))
                stop_.wait(self.pause)
            for line in lines.values():
                line.close()

        with running_threads([partial(issue, n) for n in range(self.threads)], stop_):
            wait_until(lambda: len(self.seen) > 20)
            yield self

    def since(self, moment: float) -> list[Signed]:
        """What was asked after `moment`."""
        return [s for s in list(self.seen) if s.began > moment]


@contextlib.contextmanager
def running_threads(works: Sequence[Callable[[], object]], stop_: threading.Event) -> Iterator[None]:
    """Run each until `stop_`, set at the end of the block; what one of them raises is raised here."""
    failures: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as failure:  # noqa: BLE001 - raised below, in the test's own thread
            failures.append(failure)
            stop_.set()

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    except BaseException as error:
        # The test most likely failed for what a thread failed for.
        if failures:
            raise failures[0] from error
        raise
    finally:
        stop_.set()
        for thread in threads:
            thread.join(60)
    if failures:
        raise failures[0]


def kill(pid: int | None, number: signal.Signals = signal.SIGKILL) -> bool:
    """Whether there was something to kill."""
    if pid is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False
