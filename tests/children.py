"""Fresh Python processes for tests: no module of PKCS#11 is loaded in them, and a crash there is an error here.

They are forked by a server that has imported what most of them need and has opened nothing; a start takes a hundredth
of a second of processor time, where a new interpreter takes one second.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ParamSpec, TypeVar

from kms_jwks.cli import main

P = ParamSpec("P")
T = TypeVar("T")

FRESH = multiprocessing.get_context("forkserver")
"""For `Process` and `Barrier`; such a process has the environment that the server had, see `take_environment`."""
FRESH.set_forkserver_preload(
    ["kms_jwks.wiring", "tests.contract.suite", "tests.faults.harness", "tests.memory_backend"]
)


def take_environment(environment: Mapping[str, str]) -> None:
    """Replace the environment of this process: a forked one begins with that of the server it is forked from."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def fresh_processes(number: int) -> ProcessPoolExecutor:
    """A pool of fresh processes with the environment of this one."""
    return ProcessPoolExecutor(number, mp_context=FRESH, initializer=take_environment, initargs=(dict(os.environ),))


def in_child(function: Callable[P, T], *arguments: P.args, **more: P.kwargs) -> T:
    """What `function` returns or raises in a fresh process."""
    with fresh_processes(1) as children:
        return children.submit(function, *arguments, **more).result(timeout=120)


def kms_jwks(*words: str, folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """A command in a fresh process, in `folder`: what `python -m kms_jwks` does with these words, imports spared."""
    with TemporaryDirectory() as name:
        out, err = Path(name) / "out", Path(name) / "err"
        code = in_child(_command, words, folder, dict(environment), out, err)
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


def _command(words: tuple[str, ...], folder: Path, environment: dict[str, str], out: Path, err: Path) -> int:
    take_environment(environment)
    os.chdir(folder)
    for number, path in ((0, Path(os.devnull)), (1, out), (2, err)):
        handle = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(handle, number)
        os.close(handle)
    sys.argv = ["kms-jwks", *words]
    with open(1, "w", closefd=False) as sys.stdout, open(2, "w", closefd=False) as sys.stderr:
        try:
            main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001 - as the interpreter does
            traceback.print_exc()
            return 1
    return 0
