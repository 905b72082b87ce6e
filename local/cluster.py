"""PostgreSQL and several nodes on this machine, for `./dev run --cluster N`. Ends them all when it is told to end.

A node or a server that ends by itself is said so and left alone: the others go on, which is what there is to see.
What it keeps stands in the folder it is given; a second run finds everything there.
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
    asked = _Asked()
    server = Postgres(options.var, options.programs)
    nodes: list[Child] = []
    try:
        server.start(asked)
        configs = node_configs(options.config, options.var, options.nodes, server.url(DATABASE))
        command = str(options.kms_jwks)
        subprocess.run([command, "init", "--config", str(configs[0]), *init], check=True, stdout=sys.stderr)  # noqa: S603
        nodes = [Child(f"node-{n}", [command, "serve", "--config", str(file)]) for n, file in enumerate(configs, 1)]
        for node in nodes:
            node.start()
        watch([*nodes, server.child], nodes, asked)
    except Failure as failure:
        sys.exit(f"dev: error: {failure}")
    except subprocess.CalledProcessError:
        sys.exit("dev: error: the registry or the key could not be made: see above")
    except Ended:
        pass
    finally:
        for child in nodes:
            child.signal(signal.SIGTERM)
        for child in nodes:
            child.wait()
        server.stop()


class Failure(Exception):
    """What the person who runs this can mend."""


class Ended(Exception):
    """The end was asked for."""


class _Asked:
    """Whether the end was asked for, by TERM or INT."""

    def __init__(self) -> None:
        self.yes = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        self.yes = True

    def look(self) -> None:
        """Raise Ended if it was."""
        if self.yes:
            raise Ended


@dataclass
class Child:
    """A process in a group of its own, so that a Ctrl-C of the terminal reaches it through us alone."""

    name: str
    command: list[str]
    process: subprocess.Popen[bytes] | None = None

    def start(self, **more: Any) -> None:
        """Start it; it ends when we end, however that happens."""
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
        """Until it has ended; by force after a minute."""
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


def watch(children: list[Child], nodes: list[Child], asked: _Asked) -> None:
    """Until the end is asked for, or no node is left."""
    running = list(children)
    while any(node in running for node in nodes):
        for child in list(running):
            assert child.process is not None
            code = child.process.poll()
            if code is not None:
                running.remove(child)
                say(f"{child.name} ended (exit code {code}); what is left goes on")
        asked.look()
        time.sleep(0.1)
    raise Failure("no node is left")


def node_configs(base: Path, var: Path, nodes: int, database_url: str) -> list[Path]:
    """The configuration of each node: that of a single one, with a registry for all and what is a node's own.

    All have one public URL: that of the first, as if a load balancer stood there.
    """
    text = base.read_text(encoding="utf-8")
    found = re.search(r'^bind = \["(.+):(\d+)"\]$', text, re.MULTILINE)
    assert found is not None, f"{base} says nowhere where to listen"
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
        # Before the first table, or TOML would take them for that table's.
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
        """How to connect; holds the password."""
        password = (self._folder / "password").read_text(encoding="ascii").strip()
        return f"postgresql://{USER}:{password}@127.0.0.1:{self._port}/{database}"

    def start(self, asked: _Asked) -> None:
        """Make the server's data and the database where they are missing, start, and wait until it answers."""
        if not (self._folder / "data" / "PG_VERSION").exists():
            self._make()
        say(f"PostgreSQL in {self._folder}, on port {self._port}")
        with (self._folder / "log").open("ab") as log:
            self.child.start(stdout=log, stderr=log, cwd=self._folder, **self._as_owner())
        assert self.child.process is not None
        end = time.monotonic() + STARTS_WITHIN
        while True:
            asked.look()
            if self.child.process.poll() is not None or time.monotonic() > end:
                raise Failure(f"PostgreSQL did not start; its log is {self._folder}/log")
            with contextlib.suppress(psycopg.OperationalError):
                self._make_database()
                return
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop without waiting for sessions to end by themselves."""
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
        self._give_away(password)
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
        """Its folder. Where the unprivileged user cannot get into `var`, one elsewhere, and `var` says which."""
        folder, elsewhere = var / "postgres", var / "postgres.folder"
        if elsewhere.exists():
            folder = Path(elsewhere.read_text(encoding="utf-8").strip())
        if self._owner is not None and not elsewhere.exists() and not folder.exists():
            var.chmod(0o711)  # the way through, not the sight of it; everything in there has modes of its own
            if not self._gets_into(var):
                var.chmod(0o700)
                folder = Path(tempfile.mkdtemp(prefix="kms-jwks-postgres-", dir="/var/tmp"))
                write_secret(elsewhere, f"{folder}\n")
        folder.mkdir(mode=0o700, exist_ok=True)
        self._give_away(folder)
        if self._owner is not None and not elsewhere.exists():
            var.chmod(0o711)
        return folder

    def _gets_into(self, folder: Path) -> bool:
        return subprocess.run(["/usr/bin/test", "-x", folder], check=False, **self._as_owner()).returncode == 0  # noqa: S603

    def _give_away(self, path: Path) -> None:
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
    """Write a file that its owner alone reads."""
    part = file.with_name(f".{file.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)
    part.replace(file)


def say(text: str) -> None:
    """One line, as ./dev says it."""
    print(f"dev: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
