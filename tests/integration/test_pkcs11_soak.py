"""Mixed load: processes of threads sign, each signature verified, while one process makes and destroys keys
and another starts anew all the time.

5 s; 60 s with KMS_JWKS_TEST_LONG=1.
"""

from __future__ import annotations

import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import GeneratedKey, Message
from kms_jwks.backends.pkcs11 import Pkcs11Backend
from kms_jwks.errors import BackendKeyNotFound
from tests.children import fresh_processes, in_child
from tests.contract.suite import verify
from tests.softhsm import SoftHsm, make_token, sessions_in_module

pytestmark = [pytest.mark.softhsm, pytest.mark.slow]

SECONDS = 60.0 if os.environ.get("KMS_JWKS_TEST_LONG") == "1" else 5.0
PROCESSES = 4
THREADS = 8
SESSIONS = 3
KINDS = {"ES256": None, "EdDSA": None, "RS256": 2048, "PS384": 2048, "ES512": None}
PASSING = ("ES256", "EdDSA", "ES384", "ES256", "RS256", "ES512")


@dataclass(frozen=True)
class Report:
    """The counts of one process."""

    signatures: int
    sessions_open: int
    sessions_known: int


def report_on(backend: Pkcs11Backend, signatures: int) -> Report:
    known = int(backend.ping().facts["sessions_of_process"])
    return Report(signatures, sessions_in_module(backend), known)


def make_keys(hsm: SoftHsm) -> dict[str, GeneratedKey]:
    backend = hsm.backend()
    return {name: backend.generate(f"soak-{name}", ALGORITHMS[name], rsa_bits=bits) for name, bits in KINDS.items()}


def sign_all_the_time(hsm: SoftHsm, keys: dict[str, GeneratedKey], until: float) -> Report:
    """Any error and any signature that does not verify ends the test."""
    backend = hsm.backend(sessions=SESSIONS)

    def work(thread: int) -> int:
        for turn in itertools.count():
            name = list(KINDS)[(thread + turn) % len(KINDS)]
            message = Message(f"{os.getpid()} {thread} {turn}".encode())
            signature = backend.sign(keys[name].ref, ALGORITHMS[name], message, time.monotonic() + 20)
            verify(ALGORITHMS[name], dict(keys[name].public_jwk), message, signature)
            if time.time() > until:
                return turn + 1
        raise AssertionError

    with ThreadPoolExecutor(THREADS) as threads:
        signatures = sum(threads.map(work, range(THREADS)))
    return report_on(backend, signatures)


def make_and_destroy(hsm: SoftHsm, until: float) -> tuple[int, Report]:
    """Two threads make, use and destroy keys of all kinds; at the end no object is left."""
    backend = hsm.backend(sessions=2)

    def work(thread: int) -> int:
        for turn in itertools.count():
            name = PASSING[(thread + turn) % len(PASSING)]
            alg, label = ALGORITHMS[name], f"passing-{thread}-{turn}"
            key = backend.generate(label, alg, rsa_bits=KINDS.get(name))
            message = Message(label.encode())
            verify(alg, dict(key.public_jwk), message, backend.sign(key.ref, alg, message, time.monotonic() + 20))
            assert backend.attributes(key.ref).holds
            backend.destroy(key.ref)
            with pytest.raises(BackendKeyNotFound):
                backend.sign(key.ref, alg, message, time.monotonic() + 20)
            if time.time() > until:
                return turn + 1
        raise AssertionError

    with ThreadPoolExecutor(2) as threads:
        keys = sum(threads.map(work, range(2)))
    assert backend.list_keys("passing-") == []
    return keys, report_on(backend, 0)


def start_again_and_again(hsm: SoftHsm, key: GeneratedKey, until: float) -> int:
    """Restarted workers: each logs in, signs, and ends without closing anything."""
    for starts in itertools.count(1):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                message = Message(str(os.getpid()).encode())
                signature = hsm.backend().sign(key.ref, ALGORITHMS["ES256"], message, time.monotonic() + 20)
                verify(ALGORITHMS["ES256"], dict(key.public_jwk), message, signature)
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        if time.time() > until:
            return starts
        time.sleep(0.1)
    raise AssertionError


def test_signing_while_keys_come_and_go(tmp_path: Path) -> None:
    hsm = make_token(tmp_path / "softhsm")
    keys = in_child(make_keys, hsm)
    with fresh_processes(PROCESSES + 2) as processes:
        until = time.time() + SECONDS + 1.5  # interpreters start meanwhile
        signers = [processes.submit(sign_all_the_time, hsm, keys, until) for _ in range(PROCESSES)]
        starter = processes.submit(start_again_and_again, hsm, keys["ES256"], until)
        mutator = processes.submit(make_and_destroy, hsm, until)
        reports = [signer.result(timeout=SECONDS + 120) for signer in signers]
        starts = starter.result(timeout=SECONDS + 120)
        made, report = mutator.result(timeout=SECONDS + 120)
    signatures = sum(one.signatures for one in reports)
    print(f"{signatures} signatures, {made} keys made and destroyed, {starts} starts in {SECONDS:.0f} s")
    assert all(one.signatures > 0 for one in reports)
    assert made > 0
    for one in (*reports, report):
        # The signing sessions, the login's, and the one for making and destroying keys.
        assert one.sessions_open == one.sessions_known <= SESSIONS + 2
