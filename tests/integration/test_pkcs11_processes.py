"""Several processes on one token: started at the same instant, and forked while the parent has the module open."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import GeneratedKey, Message
from tests.children import FRESH, in_child
from tests.contract.suite import verify
from tests.softhsm import SoftHsm, make_token, sessions_in_module

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

pytestmark = pytest.mark.softhsm

ES256 = ALGORITHMS["ES256"]
LONG = os.environ.get("KMS_JWKS_TEST_LONG") == "1"
ROUNDS = 50 if LONG else 5
WORKERS = 4


@pytest.fixture
def hsm(tmp_path: Path) -> SoftHsm:
    return make_token(tmp_path / "softhsm")


def make_key(hsm: SoftHsm) -> GeneratedKey:
    return hsm.backend().generate("storm", ES256)


def start_and_sign(hsm: SoftHsm, key: GeneratedKey, barrier: Barrier, rounds: int) -> None:
    """Each round forks, which is cheaper than a new interpreter; the parent has not loaded the module."""
    for _ in range(rounds):
        barrier.wait(60)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                message = Message(str(os.getpid()).encode())
                signature = hsm.backend().sign(key.ref, ES256, message, time.monotonic() + 20)
                verify(ES256, dict(key.public_jwk), message, signature)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0


def test_processes_that_start_at_the_same_instant_all_log_in_and_sign(hsm: SoftHsm) -> None:
    key = in_child(make_key, hsm)
    barrier = FRESH.Barrier(WORKERS)
    workers = [FRESH.Process(target=start_and_sign, args=(hsm, key, barrier, ROUNDS)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60 + 5 * ROUNDS)
    assert [worker.exitcode for worker in workers] == [0] * WORKERS


def forked_with_an_open_token(hsm: SoftHsm) -> None:
    backend = hsm.backend(sessions=2)
    key = backend.generate("parent", ES256)
    for generation in range(3):
        message = Message(f"child {generation}".encode())
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signature = backend.sign(key.ref, ES256, message, time.monotonic() + 10)
                verify(ES256, dict(key.public_jwk), message, signature)
                # The child uses its own sessions: the module was initialised again and does not have the parent's.
                assert sessions_in_module(backend) == int(backend.ping().facts["sessions_of_process"])
                assert len(backend._connections) == 2
                backend.close()
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        message = Message(b"parent")
        verify(ES256, dict(key.public_jwk), message, backend.sign(key.ref, ES256, message, time.monotonic() + 10))


def test_a_forked_child_starts_afresh_and_leaves_the_parent_its_sessions(hsm: SoftHsm) -> None:
    in_child(forked_with_an_open_token, hsm)
