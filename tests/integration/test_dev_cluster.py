"""`./dev run --cluster 3`: one command, three nodes that answer alike, and none of them is missed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import ROOT, free_port, wait_until

pytestmark = pytest.mark.slow

SIGN = re.compile(r"^  Sign    (.+)$", re.MULTILINE)


@dataclass
class Run:
    """One run of the command."""

    process: subprocess.Popen[bytes]
    out: Path

    @property
    def said(self) -> str:
        return self.out.read_text()

    def nodes(self) -> dict[int, psutil.Process]:
        """The supervisor of each node, by the node's number."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                line = " ".join(child.cmdline())
                match = re.search(r"serve --config \S+/node-(\d)/", line)
                if match is not None:
                    found[int(match[1])] = child
        return found


@contextlib.contextmanager
def run(port: int, var: Path, out: Path) -> Iterator[Run]:
    command = [
        str(ROOT / "dev"),
        "run",
        "--cluster",
        "3",
        "--workers",
        "1",
        "--bind",
        f"127.0.0.1:{port}",
        "--var",
        str(var),
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KMS_JWKS_", "SOFTHSM2_CONF"))}
    with out.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=kept, start_new_session=True
        )
    made = Run(process, out)
    family: list[psutil.Process] = []
    try:
        wait_until(lambda: "Ctrl-C" in made.said or process.poll() is not None, 90)
        assert process.poll() is None, made.said
        family = psutil.Process(process.pid).children(recursive=True)
        yield made
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, made.said
        assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    finally:
        process.kill()
        for each in family:
            with contextlib.suppress(psutil.Error):
                each.kill()


def three_free_ports() -> int:
    """The first of three."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for number in range(port, port + 3):
                probe = stack.enter_context(socket.socket())
                probe.bind(("127.0.0.1", number))
            return port


def sign(line: str, port: int, node: int) -> str:
    """The printed line, pasted, for one of the nodes; the kid that signed."""
    line = line.replace(f":{port}/", f":{port + node - 1}/")
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=30, check=False)
    found = re.search(r'"kid":"([^"]+)"', done.stdout)
    assert found is not None, (line, done)
    return found[1]


@pytest.fixture
def var(tmp_path: Path) -> Iterator[Path]:
    """The folder of the run; what it had to put elsewhere is removed too."""
    yield tmp_path / "var"
    elsewhere = tmp_path / "var" / "postgres.folder"
    if elsewhere.exists():
        shutil.rmtree(elsewhere.read_text().strip())


def test_one_command_starts_three_nodes_and_none_is_missed(tmp_path: Path, var: Path) -> None:
    port = three_free_ports()
    kids = []
    for number in (1, 2):
        with run(port, var, tmp_path / f"out-{number}") as made:
            found = SIGN.search(made.said)
            assert found is not None
            line = found[1]
            urls = [f"http://127.0.0.1:{port + node}" for node in range(3)]
            assert f"  Nodes   {' '.join(urls)}\n" in made.said
            kids.append({sign(line, port, node) for node in (1, 2, 3)})
            if number == 2:
                continue
            for victim in (2, 1):
                supervisor = made.nodes()[victim]
                for process in [supervisor, *supervisor.children(recursive=True)]:
                    process.kill()
                left = [node for node in made.nodes() if node != victim]
                end = time.monotonic() + 2
                while time.monotonic() < end:
                    assert {sign(line, port, node) for node in left} == kids[0]
                wait_until(lambda victim=victim: f"node-{victim} ended" in made.said)
    assert kids[0] == kids[1], "the second run finds what the first one made"
    assert len(kids[0]) == 1
    modes = {path.name: path.stat().st_mode & 0o077 for path in var.iterdir()}
    assert set(modes.values()) == {0}
