"""PostgreSQL and several nodes on this machine, for `./dev run --cluster N`; TERM and INT stop them all.

A node or server that exits by itself is reported and not restarted, so that one can watch the others go on. All data
are in the folder `--var`; a second run uses them again.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

USER = "kms-jwks"
DATABASE = "registry"
STARTS_WITHIN = 60.0
STOPS_WITHIN = 60.0
PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> None:
    """`--config FILE --var DIR --programs DIR --nodes N --kms-jwks FILE [INIT-OPTION…]`."""
    parser = argparse.ArgumentParser()
    for option in ("--config", "--var", "--programs", "--kms-jwks"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--nodes", type=int, required=True)
    options, init = parser.parse_known_args(arguments)
    stop = _StopSignal()
    server = Postgres(options.var, options.programs)
    nodes: list[Child] = []
    try:
        server.start(stop)
        configs = node_configs(options.config, options.var, options.nodes, server.url(DATABASE))
        command = str(options.kms_jwks)
        subprocess.run([command, "init", "--config", str(configs[0]), *init], check=True, stdout=sys.stderr)  # noqa: S603
        nodes = [Child(f"node-{n}", [command, "serve", "--config", str(file)]) for n, file in enumerate(configs, 1)]
        for node in nodes:
            node.start()
        watch([*nodes, server.child], nodes, stop)
    except Failure as failure:
        sys.exit(f"dev: error: {failure}")
    except subprocess.CalledProcessError:
        sys.exit("dev: error: the registry or the key could not be made: see above")
    except Stopped:
        pass
    finally:
        for child in nodes:
            child.signal(signal.SIGTERM)
        for child in nodes:
            child.wait()
        server.stop()


class Failure(Exception):
    """An error that the user can repair."""


class Stopped(Exception):
    """TERM or INT came."""


class _StopSignal:
    """Records TERM and INT."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        self.received = True

    def check(self) -> None:
        """Raise Stopped after a signal."""
        if self.received:
            raise Stopped


@dataclass
class Child:
    """A process in a group of its own: a Ctrl-C of the terminal reaches this process alone, which passes it on."""

    name: str
    command: list[str]
    process: subprocess.Popen[bytes] | None = None

    def start(self, **more: Any) -> None:
        """Start it. The kernel sends it TERM when this process exits for any reason."""
        self.process = subprocess.Popen(  # noqa: S603
            self.command,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=_ends_with(os.getpid()),  # noqa: PLW1509 - this process has one thread
            **more,
        )

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def wait(self) -> None:
        """Wait until it has exited; kill it after a minute."""
        if self.process is None:
            return
        try:
            self.process.wait(STOPS_WITHIN)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _ends_with(parent: int) -> Callable[[], None]:
    prctl = ctypes.CDLL(None).prctl

    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def watch(children: list[Child], nodes: list[Child], stop: _StopSignal) -> None:
    """Report processes that exit, until a signal comes. Raises Stopped, and Failure when no node is left."""
    running = list(children)
    while any(node in running for node in nodes):
        for child in list(running):
            assert child.process is not None
            code = child.process.poll()
            if code is not None:
                running.remove(child)
                say(f"{child.name} ended with exit code {code}; the others go on")
        stop.check()
        time.sleep(0.1)
    raise Failure("no node is left")


def node_configs(base: Path, var: Path, nodes: int, database_url: str) -> list[Path]:
    """The configuration files of the nodes: `base` with the common registry and each node's own settings.

    All nodes have the public URL of the first, as behind a load balancer.
    """
    text = base.read_text(encoding="utf-8")
    found = re.search(r'^bind = \["(.+):(\d+)"\]$', text, re.MULTILINE)
    assert found is not None, f"{base} has no line `bind`"
    host, port = found[1], int(found[2])
    made = []
    for number in range(1, nodes + 1):
        folder = var / f"node-{number}"
        folder.mkdir(mode=0o700, exist_ok=True)
        own = {
            "database_url": database_url,
            "state_dir": str(folder / "state"),
            "bind": [f"{host}:{port + number - 1}"],
            "node_name": f"node-{number}",
        }
        lines = [line for line in text.splitlines() if line.partition(" = ")[0] not in own]
        # The lines stand before the first table; after it they would belong to that table.
        place = next(i for i, line in enumerate(lines) if line.startswith("[") or not line)
        lines[place:place] = [f"{name} = {json.dumps(value)}" for name, value in own.items()]
        file = folder / "kms-jwks.toml"
        write_secret(file, "\n".join(lines) + "\n")
        made.append(file)
    return made


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


class Postgres:
    """A server with its data in `var/postgres`, on a free port of the loopback; as an unprivileged user for root."""

    def __init__(self, var: Path, programs: Path) -> None:
        self._programs = programs
        self._owner = _unprivileged() if os.getuid() == 0 else None
        self._folder = self._place(var)
        self._port = _free_port()
        command = [str(programs / "postgres"), "-D", str(self._folder / "data"), "-p", str(self._port)]
        for setting in ("listen_addresses=127.0.0.1", "unix_socket_directories=", "log_min_messages=warning"):
            command += ["-c", setting]
        self.child = Child("PostgreSQL", command)

    def url(self, database: str) -> str:
        """The URL of a database; it holds the password."""
        password = (self._folder / "password").read_text(encoding="ascii").strip()
        return f"postgresql://{USER}:{password}@127.0.0.1:{self._port}/{database}"

    def start(self, stop: _StopSignal) -> None:
        """Make the data folder and the database where they are missing, start the server, and wait until it answers."""
        if not (self._folder / "data" / "PG_VERSION").exists():
            self._make()
        say(f"PostgreSQL in {self._folder}, on port {self._port}")
        with (self._folder / "log").open("ab") as log:
            self.child.start(stdout=log, stderr=log, cwd=self._folder, **self._as_owner())
        assert self.child.process is not None
        end = time.monotonic() + STARTS_WITHIN
        while True:
            stop.check()
            if self.child.process.poll() is not None or time.monotonic() > end:
                raise Failure(f"PostgreSQL did not start; its log is {self._folder}/log")
            with contextlib.suppress(psycopg.OperationalError):
                self._make_database()
                return
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop the server; open sessions are ended."""
        self.child.signal(signal.SIGINT)
        self.child.wait()

    def _make_database(self) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            known = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone()
            if known is None:
                connection.execute(f"CREATE DATABASE {DATABASE}")

    def _make(self) -> None:
        shutil.rmtree(self._folder / "data", ignore_errors=True)
        password = self._folder / "password"
        write_secret(password, secrets.token_urlsafe(24) + "\n")
        self._chown(password)
        made = subprocess.run(  # noqa: S603
            [
                self._programs / "initdb",
                f"--pgdata={self._folder}/data",
                f"--username={USER}",
                f"--pwfile={password}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self._folder,
            check=False,
            **self._as_owner(),
        )
        if made.returncode != 0:
            raise Failure(f"initdb failed:\n{made.stdout}")

    def _place(self, var: Path) -> Path:
        """The server's folder: in `var`, or elsewhere where the unprivileged user cannot enter `var`.

        The file `postgres.folder` in `var` then holds the path.
        """
        folder, elsewhere = var / "postgres", var / "postgres.folder"
        if elsewhere.exists():
            folder = Path(elsewhere.read_text(encoding="utf-8").strip())
        if self._owner is not None and not elsewhere.exists() and not folder.exists():
            var.chmod(0o711)  # others may pass through, not list it; every file in it has its own mode
            if not self._can_enter(var):
                var.chmod(0o700)
                folder = Path(tempfile.mkdtemp(prefix="kms-jwks-postgres-", dir="/var/tmp"))
                write_secret(elsewhere, f"{folder}\n")
        folder.mkdir(mode=0o700, exist_ok=True)
        self._chown(folder)
        if self._owner is not None and not elsewhere.exists():
            var.chmod(0o711)
        return folder

    def _can_enter(self, folder: Path) -> bool:
        return subprocess.run(["/usr/bin/test", "-x", folder], check=False, **self._as_owner()).returncode == 0  # noqa: S603

    def _chown(self, path: Path) -> None:
        if self._owner is not None:
            os.chown(path, self._owner.pw_uid, self._owner.pw_gid)

    def _as_owner(self) -> dict[str, Any]:
        if self._owner is None:
            return {}
        return {"user": self._owner.pw_uid, "group": self._owner.pw_gid, "extra_groups": []}


def _unprivileged() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise Failure("PostgreSQL does not run as root, and there is no user postgres. Run this as another user.")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_secret(file: Path, text: str) -> None:
    """Write a file that only its owner can read."""
    part = file.with_name(f".{file.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)
    part.replace(file)


def say(text: str) -> None:
    """Print one line in the form of ./dev."""
    print(f"dev: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
