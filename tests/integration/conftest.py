"""A whole service under test: `kms-jwks serve` with real workers, a custodian, SoftHSM, SQLite and real HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import urllib3
from click.testing import CliRunner, Result

from kms_jwks.cli.app import cli
from tests.children import kms_jwks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Run = Callable[..., Result]
ROOT = Path(__file__).parents[2]
START_SECONDS = 40.0
STOP_SECONDS = 20.0
PREFIX = "urn:kms-jwks:problem:"


@dataclass(frozen=True)
class Answer:
    """One HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def problem(self) -> str:
        """The code of the problem, after a look at everything a problem document must have."""
        assert self.headers["Content-Type"] == "application/problem+json", self.body
        assert self.headers["Cache-Control"] == "no-store"
        document = self.json
        assert document["status"] == self.status
        assert document["type"].startswith(PREFIX)
        assert document["request_id"] == self.headers["X-Request-Id"]
        for member in ("title", "detail", "next_step"):
            assert isinstance(document[member], str), member
        assert b"Traceback" not in self.body
        return str(document["type"]).removeprefix(PREFIX)


@dataclass
class Server:
    """A running service. `folder` holds its configuration, registry, token, API tokens and log."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    pool: urllib3.PoolManager = field(default_factory=lambda: urllib3.PoolManager(retries=False, maxsize=8))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "service.log").read_text(encoding="utf-8", errors="replace")

    @property
    def admin(self) -> str:
        return self._token("admin")

    @property
    def signer(self) -> str:
        """May sign with key `default` of key set `default`."""
        return self._token("signer")

    def _token(self, who: str) -> str:
        return (self.folder / f"{who}.token").read_text(encoding="ascii").strip()

    def call(
        self,
        method: str,
        path: str,
        payload: Any = None,
        *,
        token: str | None = "admin",
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        content_type: str | None = "application/json",
    ) -> Answer:
        """One request, as the admin unless `token` says otherwise; None sends no credentials."""
        sent = dict(headers or {})
        if token is not None:
            sent["Authorization"] = f"Bearer {self.admin if token == 'admin' else token}"
        if payload is not None:
            body = json.dumps(payload).encode()
        if body is not None and content_type is not None:
            sent["Content-Type"] = content_type
        found = self.pool.request(method, self.url + path, body=body, headers=sent, timeout=30, redirect=False)
        return Answer(found.status, found.headers, found.data)

    def must(self, method: str, path: str, payload: Any = None, **more: Any) -> Any:
        """The same, and it succeeds; the decoded answer."""
        answer = self.call(method, path, payload, **more)
        assert 200 <= answer.status < 300, (method, path, answer.status, answer.body)
        return answer.json if answer.body else None

    def raw(self, data: bytes, *, half_close: bool = False) -> bytes:
        """Bytes as they are over a socket of their own; all that comes back until the server closes it."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=15) as connection:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(65_536):
                    received += part
        return received

    # --- things to test with

    def key_set(self, name: str | None = None, /, *algs: str, standby: bool = False, **fields: Any) -> str:
        """A key set with a key per algorithm (`k1`, `k2`, …), which sign, and have their standby if it is needed.

        Returns its name.
        """
        name = name or fresh("set")
        keys = [{"name": f"k{i}", "alg": alg} for i, alg in enumerate(algs, 1)]
        self.must("POST", "/v1/key-sets", {"name": name, "keys": keys, **fields})
        done = settled if standby else lambda key: key["active_kid"]
        wait_until(lambda: all(done(key) for key in self.must("GET", f"/v1/key-sets/{name}")["keys"]))
        return name

    def client(self, role: str | None = None, **scope: str) -> str:
        """A client with one grant, or with none; its API token."""
        return self.client_with(role, **scope)[1]

    def client_with(self, role: str | None = None, **scope: str) -> tuple[str, str]:
        """The same; its name and its API token."""
        name = fresh("client")
        self.must("POST", "/v1/clients", {"name": name})
        if role is not None:
            self.must("POST", "/v1/grants", {"client": name, "role": role, "scope": scope})
        return name, str(self.must("POST", f"/v1/clients/{name}/tokens", {})["token"])

    def revision_of_everything(self) -> bytes:
        """Every listing there is, for "nothing changed"."""
        names = [found["name"] for found in self.must("GET", "/v1/key-sets?limit=200")["items"]]
        sets = [self.must("GET", f"/v1/key-sets/{name}") for name in names]
        rest = [self.must("GET", path) for path in ("/v1/clients?limit=200", "/v1/grants?limit=200")]
        return json.dumps([sets, rest], sort_keys=True).encode()

    # --- its processes

    def children(self) -> dict[str, psutil.Process]:
        """`http` and `custodian`."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                words = child.cmdline()
                if "kms_jwks" in words:
                    found["custodian" if "custodian" in words else "http"] = child
        return found

    def family(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def alive(self) -> bool:
        """Whether it answers at all."""
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            return self.call("GET", "/healthz", token=None).status == 200
        return False

    def ready(self) -> bool:
        """Whether it signs."""
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            return self.call("GET", "/readyz/sign", token=None).status == 200
        return False


def settled(key: dict[str, Any]) -> bool:
    """Whether a key signs and every worker publishes its standby (I4)."""
    return bool(key["active_kid"]) and any(v["state"] == "published" and v["visible_since"] for v in key["versions"])


def fresh(stem: str) -> str:
    """A name that nobody has used."""
    return f"{stem}-{uuid.uuid4().hex[:12]}"


def wait_until(condition: Any, seconds: float = 20.0, every: float = 0.05) -> Any:
    """What `condition` answers once it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(every)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, env=_environment(), cwd=folder, capture_output=True, text=True, timeout=START_SECONDS, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
    return done.stdout


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KMS_JWKS_", "SOFTHSM2_CONF"))}
    return kept | {"PYTHON": sys.executable}


def prepare(folder: Path, port: int, **settings: Any) -> None:
    """Make the token, the configuration and the registry of a service that is not started yet."""
    module = _run([str(ROOT / "softhsm" / "init-token"), str(folder)], folder).strip()
    options = {
        "public_url": f"http://127.0.0.1:{port}",
        "database_url": f"sqlite:///{folder}/registry.sqlite3",
        "state_dir": f"{folder}/state",
        "bind": [f"127.0.0.1:{port}"],
        "workers": 2,
        "threads": 4,
        "request_timeout": 3,
        "poll_interval_ms": 100,
        "log_level": "debug",
    } | settings
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
    lines += [
        "[backends.softhsm]",
        'type = "pkcs11"',
        f"module = {json.dumps(module)}",
        'token_label = "kms-jwks"',
        f'pin_file = "{folder}/pin"',
        "[backends.softhsm.environment]",
        f'SOFTHSM2_CONF = "{folder}/softhsm2.conf"',
    ]
    (folder / "kms-jwks.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokens = ["--admin-token-file", str(folder / "admin.token"), "--signer-token-file", str(folder / "signer.token")]
    initialise(folder, "--key-set", "default", "--alg", "ES256", *tokens)


def initialise(folder: Path, *words: str) -> None:
    """`kms-jwks init` with the settings file in `folder`."""
    config = str(folder / "kms-jwks.toml")
    done = kms_jwks("init", "--config", config, *words, folder=folder, environment=_environment())
    assert done.returncode == 0, f"{words}: {done.stderr}{done.stdout}"


def start(folder: Path, port: int, stdin: bytes | None = None) -> Server:
    """Start `kms-jwks serve`; it may not be ready yet. `stdin` is what its standard input holds."""
    with (folder / "service.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "kms_jwks", "serve", "--config", str(folder / "kms-jwks.toml")],
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(),
            cwd=folder,
            start_new_session=True,
        )
    if process.stdin is not None:
        process.stdin.write(stdin or b"")
        process.stdin.close()
    return Server(folder, port, process)


def close_connections(pool: urllib3.PoolManager) -> None:
    """Close the idle connections of a pool now; `PoolManager.clear` leaves that to the garbage collector."""
    for key in pool.pools.keys():  # noqa: SIM118 - urllib3's container cannot be iterated over
        with contextlib.suppress(KeyError):
            pool.pools[key].close()
    pool.clear()


def stop(server: Server) -> int:
    """End it gracefully; by force, with all that it started, where it does not end."""
    family = server.family() if server.process.poll() is None else []
    close_connections(server.pool)  # a worker that ends waits 2 s for idle connections
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
    try:
        return server.process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        server.process.wait()
        raise


@contextlib.contextmanager
def running(
    folder: Path, port: int, until: Callable[[Server], Any] | None = None, *, stdin: bytes | None = None
) -> Iterator[Server]:
    """The service prepared in `folder`, until the end of the block; it begins when the service is ready, or `until`."""
    server = start(folder, port, stdin)
    try:
        end = time.monotonic() + START_SECONDS
        while not (until or Server.ready)(server):
            assert server.process.poll() is None, f"ended with {server.process.returncode}:\n{server.log}"
            assert time.monotonic() < end, f"not ready:\n{server.log}"
            time.sleep(0.05)
        yield server
    finally:
        stop(server)


def prepared(folder: Path, **settings: Any) -> int:
    """Prepare a service whose key set `default` signs and has its standby. Returns its port."""
    port = free_port()
    prepare(folder, port, **settings)
    with running(folder, port) as server:
        wait_until(lambda: settled(server.must("GET", "/v1/key-sets/default/keys/default")))
    return port


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One service for all tests of a pytest process. What a test makes in it has names of its own."""
    folder, port = tmp_path_factory.mktemp("service"), free_port()
    prepare(folder, port)
    with running(folder, port) as server:
        wait_until(lambda: settled(server.must("GET", "/v1/key-sets/default/keys/default")))
        yield server


@pytest.fixture
def run(server: Server, monkeypatch: pytest.MonkeyPatch) -> Run:
    """One command as the administrator; its exit code is checked."""
    for name in [name for name in os.environ if name.startswith("KMS_JWKS_") or name == "COLUMNS"]:
        monkeypatch.delenv(name)

    def invoke(*words: str, code: int = 0, token: str | None = None, input: str | None = None, **env: str) -> Result:  # noqa: A002
        variables = {"KMS_JWKS_ADDR": server.url, "KMS_JWKS_TOKEN": token or server.admin, **env}
        answer = CliRunner().invoke(cli, list(words), input=input, env=variables)
        if answer.exception is not None and not isinstance(answer.exception, SystemExit):
            raise answer.exception
        assert answer.exit_code == code, (words, answer.output)
        assert server.admin not in answer.output
        return answer

    return invoke
