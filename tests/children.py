"""Fresh Python processes for tests: no module of PKCS#11 is loaded in them, and a crash there is an error here.

They are forked by a server that has imported what most of them need and has opened nothing; a start takes a hundredth
of a second of processor time, where a new interpreter takes one second.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

FRESH = multiprocessing.get_context("forkserver")
"""For `Process` and `Barrier`; such a process has the environment that the server had, see `take_environment`."""
FRESH.set_forkserver_preload(
    ["kms_jwks.wiring", "tests.contract.suite", "tests.faults.harness", "tests.memory_backend"]
)


def take_environment(environment: dict[str, str]) -> None:
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
