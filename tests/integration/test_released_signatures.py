"""A module that flips a bit in one signature of some hundreds: not one of them is released, and all are counted.

2,000 RSA signatures of several processes; 1,000,000 with KMS_JWKS_TEST_LONG=1.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature

from kms_jwks import jose
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import Digest, Message
from kms_jwks.backends.calling import Backends, CallLimits
from kms_jwks.worker.snapshot import Signer
from tests.children import fresh_processes, in_child
from tests.contract.suite import verify
from tests.faults.harness import Faults, Violations
from tests.softhsm import SoftHsm, make_token

pytestmark = [pytest.mark.softhsm, pytest.mark.slow]

COUNT = 1_000_000 if os.environ.get("KMS_JWKS_TEST_LONG") == "1" else 2_000
ONE_IN = 1000 if COUNT > 100_000 else 200
PROCESSES = 4


@dataclass(frozen=True)
class Report:
    """What one process was given, how much of it was wrong, and what its service counted."""

    released: int
    wrong: int
    checked: int
    bad: int


def make_signer(hsm: SoftHsm, name: str) -> Signer:
    alg = ALGORITHMS[name]
    made = hsm.backend().generate(f"flips-{name}", alg, rsa_bits=2048 if alg.is_rsa else None)
    return Signer(jose.thumbprint(made.public_jwk), alg, "hsm", made.ref, dict(made.public_jwk), "")


def sign_many(hsm: SoftHsm, signer: Signer, count: int, in_place: bool) -> Report:
    """As a worker signs; what is released is verified by cryptography alone."""
    backend = hsm.backend(sign_in_place=in_place)
    limits = CallLimits(timeout=60, check_signatures=1.0)
    backends = Backends({"hsm": backend}, default="hsm", limits={"hsm": limits})
    wrong = 0
    for number in range(count):
        message = Message(b"%d of %d" % (number, os.getpid()))
        what = Digest(message.digest(signer.alg)) if number % 2 and signer.alg.hash else message
        try:
            verify(signer.alg, dict(signer.public_jwk), what, backends.sign(signer, what))
        except InvalidSignature:
            wrong += 1
    counters = backends.counters("hsm")
    backends.close()
    return Report(count, wrong, counters["checked"], counters["bad"])


def flipped(tmp_path: Path, name: str, count: int, *, in_place: bool) -> tuple[list[Report], Faults]:
    hsm = make_token(tmp_path / "softhsm")
    signer = in_child(make_signer, hsm, name)
    faults = Faults.make(tmp_path / "faults", hsm.module)
    faults.flip(bit=777 if signer.alg.is_rsa else 77, every=ONE_IN if count == COUNT else 50)
    through = replace(hsm, module=faults.module)
    work = [through, signer, count // PROCESSES, in_place]
    with fresh_processes(PROCESSES) as processes:
        started = time.monotonic()
        reports = list(processes.map(sign_many, *(itertools.repeat(one, PROCESSES) for one in work)))
    print(
        f"{name}: {sum(r.released for r in reports):,} released in {time.monotonic() - started:.0f} s, "
        f"{faults.acted('C_Sign'):,} flipped, {sum(r.bad for r in reports):,} found, "
        f"{sum(r.wrong for r in reports)} of the released ones wrong"
    )
    return reports, faults


def judge(reports: list[Report], faults: Faults, count: int) -> None:
    assert sum(report.wrong for report in reports) == 0
    assert sum(report.released for report in reports) == count
    assert sum(report.bad for report in reports) == faults.acted("C_Sign") > 0
    assert sum(report.checked for report in reports) == count + faults.acted("C_Sign"), "once more for each bad one"
    assert faults.violations == Violations.NONE


def test_not_one_wrong_signature_is_released(tmp_path: Path) -> None:
    reports, faults = flipped(tmp_path, "RS256", COUNT, in_place=True)
    judge(reports, faults, COUNT)
    assert faults.acted("C_Sign") >= COUNT // ONE_IN


@pytest.mark.parametrize("name", ["PS384", "ES256", "EdDSA"])
def test_nor_from_the_pool_nor_with_another_algorithm(tmp_path: Path, name: str) -> None:
    reports, faults = flipped(tmp_path, name, 400, in_place=False)
    judge(reports, faults, 400)
