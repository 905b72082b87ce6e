"""A real PostgreSQL server for tests, on a free loopback port, with its data in a temporary folder.

It writes without fsync: a killed server keeps what it committed, only a machine that crashes would lose it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, LiteralString

import psycopg

_USER = "kms-jwks"
_SECONDS = 60.0
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "max_wal_size": "256MB",
    "autovacuum_naptime": "5s",
    "log_min_messages": "warning",
}


def program(name: str) -> str:
    """The path of a program of PostgreSQL. Debian does not put them in PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: -float(folder.parent.name))
    found = shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))
    assert found is not None, "apt-get install postgresql"
    return found


def owner() -> pwd.struct_passwd | None:
    """The user that runs the server, which refuses to run as root; None for the user that runs the tests."""
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise AssertionError("no unprivileged user is there to run PostgreSQL")


class Postgres:
    """One server. `start` after `stop` or `kill` brings back the same databases on the same port."""

    def __init__(self) -> None:
        self._owner = owner()
        self.folder = Path(tempfile.mkdtemp(prefix="kms-jwks-postgres-"))
        self.password = secrets.token_urlsafe(12)
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        secret = self.folder / "password"
        secret.write_text(self.password)
        if self._owner is not None:
            for path in (self.folder, secret):
                os.chown(path, self._owner.pw_uid, self._owner.pw_gid)
        made = self._run(
            program("initdb"),
            f"--pgdata={self.folder}/data",
            f"--username={_USER}",
            f"--pwfile={secret}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--no-sync",
        )
        assert made.returncode == 0, made.stdout

    # --- databases

    def url(self, database: str = "postgres", *, port: int | None = None) -> str:
        """The URL of a database, on the server's port or on that of a proxy before it."""
        return f"postgresql://{_USER}:{self.password}@127.0.0.1:{port or self.port}/{database}"

    def create(self) -> str:
        """Create an empty database and return its name."""
        name = f"registry_{uuid.uuid4().hex[:12]}"
        with self.connect() as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return name

    def copy(self, template: str) -> str:
        """Create a copy of a database, to which no session may be connected, and return its name."""
        name = f"registry_{uuid.uuid4().hex[:12]}"
        with self.connect() as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return name

    @contextlib.contextmanager
    def connect(self, database: str = "postgres") -> Iterator[psycopg.Connection]:
        """A connection in autocommit mode, to inspect and change the database."""
        with psycopg.connect(self.url(database), autocommit=True, connect_timeout=10) as connection:
            yield connection

    # --- the server

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start, and wait until it answers."""
        assert self._process is None
        options = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [program("postgres"), "-D", f"{self.folder}/data", "-p", str(self.port), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                process_group=0,
                preexec_fn=_end_with(os.getpid()),  # noqa: PLW1509 - it calls prepared functions alone
                **self._as_owner(),
            )
        end = time.monotonic() + _SECONDS
        while True:
            assert self._process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            with contextlib.suppress(psycopg.OperationalError), self.connect():
                return
            time.sleep(0.05)

    def stop(self) -> None:
        """End every session and stop, as an operator's restart does."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """kill -9, of the server and of every process that serves a connection."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop and remove everything."""
        if self._process is not None:
            self._end(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- helpers

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        assert process is not None
        if number is signal.SIGKILL:
            # Frozen first: a server that still runs would close its killed children's sessions properly.
            process.send_signal(signal.SIGSTOP)
            for child in _children(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        process.send_signal(number)
        process.wait(_SECONDS)
        if number is signal.SIGKILL:
            (self.folder / "data" / "postmaster.pid").unlink(missing_ok=True)

    def _as_owner(self) -> dict[str, Any]:
        return _as(self._owner)

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            timeout=_SECONDS,
            check=False,
            **self._as_owner(),
        )
        return done


@contextlib.contextmanager
def pooler(server: Postgres, mode: str, **settings: object) -> Iterator[int]:
    """PgBouncer before the server for the block, with Debian's defaults beside `settings`; the port that it listens on.

    `mode` is its pool_mode: session, transaction or statement.
    """
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")
    assert found is not None, "apt-get install pgbouncer"
    user, folder, port = owner(), Path(tempfile.mkdtemp(prefix="kms-jwks-pooler-")), free_port()
    own = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "scram-sha-256",
        "auth_file": folder / "users",
        "pool_mode": mode,
    }
    (folder / "users").write_text(f'"{_USER}" "{server.password}"\n')
    (folder / "ini").write_text(
        f"[databases]\n* = host=127.0.0.1 port={server.port}\n[pgbouncer]\n"
        + "".join(f"{name} = {value}\n" for name, value in (own | settings).items())
    )
    for path in (folder, *folder.iterdir()) if user is not None else ():
        os.chown(path, user.pw_uid, user.pw_gid)  # type: ignore[union-attr]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [found, str(folder / "ini")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            process_group=0,
            preexec_fn=_end_with(os.getpid()),  # noqa: PLW1509 - it calls prepared functions alone
            **_as(user),
        )
    try:
        end = time.monotonic() + _SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.02)
        yield port
    finally:
        process.kill()
        process.wait(_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


def _as(user: pwd.struct_passwd | None) -> dict[str, Any]:
    return {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


class Standby(Postgres):
    """A copy of another server that follows it, until it is cut off or takes over."""

    def __init__(self, primary: Postgres) -> None:
        self._primary = primary
        self._owner, self.password = primary._owner, primary.password
        self.folder = Path(tempfile.mkdtemp(prefix="kms-jwks-standby-"))
        self.port = free_port()
        self._process = None
        if self._owner is not None:
            os.chown(self.folder, self._owner.pw_uid, self._owner.pw_gid)
        made = self._run(
            program("pg_basebackup"),
            f"--dbname={primary.url()}",
            f"--pgdata={self.folder}/data",
            "--write-recovery-conf",
            "--checkpoint=fast",
            "--no-sync",
        )
        assert made.returncode == 0, made.stdout

    def stop_following(self) -> None:
        """Hold everything that is committed on the primary now, and nothing that is committed later."""
        with self._primary.connect() as connection:
            row = connection.execute("SELECT pg_current_wal_flush_lsn()").fetchone()
        assert row is not None
        with self.connect() as connection:
            self._wait(connection, "SELECT pg_last_wal_replay_lsn() >= %s", row[0])
            connection.execute("ALTER SYSTEM SET primary_conninfo TO ''")
            connection.execute("SELECT pg_reload_conf()")
            self._wait(connection, "SELECT count(*) = 0 FROM pg_stat_wal_receiver")

    def promote(self) -> None:
        """Take over."""
        with self.connect() as connection:
            connection.execute("SELECT pg_promote()")

    def _wait(self, connection: psycopg.Connection, condition: LiteralString, *values: str) -> None:
        end = time.monotonic() + _SECONDS
        while connection.execute(condition, values).fetchone() != (True,):
            assert time.monotonic() < end, self.log
            time.sleep(0.02)


@contextlib.contextmanager
def standby(primary: Postgres) -> Iterator[Standby]:
    """Run a standby of `primary` for the block."""
    server = Standby(primary)
    try:
        server.start()
        yield server
    finally:
        server.close()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _end_with(parent: int) -> Callable[[], None]:
    """A function for the child to call before exec, so that the server ends with a test run that is killed."""
    prctl = ctypes.CDLL(None).prctl

    def prepare() -> None:
        prctl(1, int(signal.SIGQUIT), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running() -> Iterator[Postgres]:
    """Run a server for the block."""
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.close()
