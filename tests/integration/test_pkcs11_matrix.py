"""Every return value of PKCS#11 × every function that the backend calls: the right error, nothing else, then recovery.

A row of `USES` says how a call of one function is brought about. For each return value the function answers it once,
and then always until the fault is taken back; after that the backend works, has lost no session, left no key behind
and tried no refused PIN again.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import GeneratedKey, Message
from kms_jwks.backends.pkcs11 import connection, objects, opening, recovery
from kms_jwks.backends.pkcs11.error_map import CODES, Meaning, meaning_of, name_of
from kms_jwks.errors import BackendError, BackendRefused, BackendUnavailable
from tests.children import fresh_processes
from tests.contract.suite import verify
from tests.faults.harness import FUNCTIONS, Faults, Violations
from tests.softhsm import SoftHsm, make_token

pytestmark = [pytest.mark.softhsm, pytest.mark.slow]

LONG = os.environ.get("KMS_JWKS_TEST_LONG") == "1"
ES256 = ALGORITHMS["ES256"]
VENDOR_DEFINED = 0x80000001
ALL_CODES = (*CODES, VENDOR_DEFINED)
CKR_USER_ALREADY_LOGGED_IN = 0x100
SECONDS = 8.0
"""No call may take longer here, on a busy machine."""


class Bench:
    """One backend over the faulty module, in the process that runs the matrix."""

    def __init__(self, hsm: SoftHsm) -> None:
        # These pauses are for other processes, and here there are none.
        opening._RETRY_PAUSES = (0.001,) * 5  # type: ignore[misc]
        opening._SHORT_RETRY_PAUSES = (0.001,)  # type: ignore[misc]
        connection._HEALTH_PAUSES = (0.0, 0.001)  # type: ignore[misc,assignment]
        objects._SEARCH_PAUSES = (0.0, 0.001)  # type: ignore[misc,assignment]
        recovery._RETRY_PAUSE = 0.001  # type: ignore[misc]
        self.faults, self.hsm = Faults.over(hsm)
        self.backend = self.hsm.backend(sessions=2)
        self.key = self.backend.generate("the-key", ES256)
        self.labels = (f"passing-{number}" for number in itertools.count())

    @property
    def connection(self) -> Any:
        return self.backend._connection()

    # --- uses: each ends with a check of its result --------------------------------------------------------------

    def sign(self) -> None:
        message = Message(os.urandom(20))
        signature = self.backend.sign(self.key.ref, ES256, message, time.monotonic() + SECONDS / 2)
        verify(ES256, dict(self.key.public_jwk), message, signature)

    def read(self) -> None:
        assert self.backend.public_key(self.key.ref) == self.key.public_jwk
        assert self.backend.attributes(self.key.ref).holds

    def generate(self) -> None:
        made: GeneratedKey | None = None
        label = next(self.labels)
        try:
            made = self.backend.generate(label, ES256)
        finally:
            self.faults.clear()
            self.forgive()
            if made is None and self.backend.list_keys(label):
                # It could not be destroyed while the module failed; making the next key destroys it.
                self.backend.destroy(self.backend.generate(next(self.labels), ES256).ref)
            left = [stored.ref for stored in self.backend.list_keys(label)]
            assert left == ([] if made is None else [made.ref]), f"left behind: {left}"
            for ref in left:
                self.backend.destroy(ref)

    def destroy(self) -> None:
        key = self.backend.generate(next(self.labels), ES256)
        self.arm()
        try:
            self.backend.destroy(key.ref)
        finally:
            self.faults.clear()
            self.forgive()
            self.backend.destroy(key.ref)
            assert self.backend.list_keys(key.ref["label"]) == []

    def replace_and_sign(self) -> None:
        for _ in range(2):  # both sessions
            self.sign()
            self.backend.distrust(self.key.ref)
        self.arm()
        self.sign()

    def open_and_sign(self) -> None:
        self.drop()
        self.arm()
        self.sign()

    def restart_and_sign(self) -> None:
        self.drop()
        self.connection._needs_restart = True
        self.arm()
        self.sign()

    def load_and_sign(self) -> None:
        self.connection.module._library = None
        self.restart_and_sign()

    # --- the faults -----------------------------------------------------------------------------------------------

    def arm(self) -> None:
        """Set the fault of this cell. A use that has to prepare something in the module calls it afterwards."""
        self._arm()

    def run(self, use: Callable[[Bench], None], arm: Callable[[], None]) -> BackendError | None:
        """The error that the use ends with under the fault that `arm` sets."""
        self._arm = arm
        self.forgive()
        if use in (Bench.sign, Bench.read, Bench.ping, Bench.generate):
            arm()
        began = time.monotonic()
        ended: BackendError | None = None
        try:
            use(self)
        except BackendError as error:
            ended = error
        finally:
            self.faults.clear()
            assert time.monotonic() - began < SECONDS, "it took too long"
        if isinstance(ended, BackendUnavailable | BackendRefused):
            assert ended.next_step, "no next step"
        return ended

    def ping(self) -> None:
        assert self.backend.ping().facts["token_label"] == self.hsm.label

    def drop(self) -> None:
        self.connection.close(time.monotonic() + 1)

    def forgive(self) -> None:
        """Skip the back-off after a failure, and make the connection count as an old one."""
        self.connection._retry_at = 0.0
        if self.connection.current is not None:
            self.connection.current.opened_at = 0.0

    def recovered(self) -> None:
        """The first call succeeds, no session was leaked, no rule of PKCS#11 was broken."""
        self.forgive()
        self.sign()
        self.read()
        self.ping()
        if self.connection.module._unclosed:  # closed before the next session is opened
            self.replace_and_sign()
            self.ping()
        known = int(self.backend.ping().facts["sessions_of_process"])
        assert self.faults.sessions == known <= 4, f"{self.faults.sessions} sessions open, {known} known"
        assert self.faults.violations == Violations.NONE, self.faults.violations


USES: dict[str, Callable[[Bench], None]] = {
    "C_Initialize": Bench.restart_and_sign,
    "C_Finalize": Bench.restart_and_sign,
    "C_GetInfo": Bench.load_and_sign,
    "C_GetSlotList": Bench.open_and_sign,
    "C_GetSlotInfo": Bench.open_and_sign,
    "C_GetTokenInfo": Bench.open_and_sign,
    "C_GetMechanismList": Bench.open_and_sign,
    "C_OpenSession": Bench.replace_and_sign,
    "C_CloseSession": Bench.replace_and_sign,
    "C_GetSessionInfo": Bench.ping,
    "C_Login": Bench.open_and_sign,
    "C_FindObjectsInit": Bench.read,
    "C_FindObjects": Bench.read,
    "C_FindObjectsFinal": Bench.read,
    "C_GetAttributeValue": Bench.read,
    "C_SignInit": Bench.sign,
    "C_Sign": Bench.sign,
    "C_GenerateKeyPair": Bench.generate,
    "C_DestroyObject": Bench.destroy,
}
MORE_USES: list[tuple[str, Callable[[Bench], None]]] = [
    ("C_OpenSession", Bench.open_and_sign),
    ("C_GetTokenInfo", Bench.ping),
    ("C_GetSessionInfo", Bench.open_and_sign),
    *((name, Bench.generate) for name in ("C_FindObjectsInit", "C_FindObjects", "C_GetAttributeValue", "C_SignInit")),
    *((name, Bench.generate) for name in ("C_Sign", "C_GetSessionInfo", "C_GetTokenInfo")),
    *((name, Bench.destroy) for name in ("C_FindObjectsInit", "C_FindObjects", "C_FindObjectsFinal")),
]
"""Further uses of functions that are called in several ways."""

HIDDEN = ("C_CloseSession", "C_Finalize")
"""Their answers do not change the result of a use."""
JUDGED_BY_HEALTH = ("C_GetSessionInfo", "C_GetTokenInfo")
"""Whatever they answer other than CKR_OK, the token counts as gone."""

LIES = {("C_CloseSession", code) for code in (0xB0, 0xB3, 0x190)}
"""Answers that cannot be recognised as wrong: that a session was closed already."""


def expected(function: str, code: int) -> set[type[BackendError] | None]:
    """The errors that a use may end with while the function goes on answering the code; None: it succeeds."""
    if function in HIDDEN:
        return {None}
    if function == "C_Login":
        if code == CKR_USER_ALREADY_LOGGED_IN:
            return {BackendUnavailable, None}  # nobody is, which is found out
        if code == VENDOR_DEFINED or meaning_of(code).is_final:
            return {BackendRefused}
        return {BackendUnavailable}
    if function == "C_Initialize":
        return {BackendUnavailable}
    kinds: set[type[BackendError] | None] = {meaning_of(code).ends_as}
    if function in JUDGED_BY_HEALTH:
        kinds.add(BackendUnavailable)
    if function == "C_GetInfo":
        kinds = {BackendUnavailable}
    if function == "C_GetAttributeValue" and meaning_of(code) is Meaning.ABSENT:
        kinds.add(BackendRefused)
    return kinds


def judges_the_pin(function: str, code: int) -> bool:
    return function == "C_Login" and (code == VENDOR_DEFINED or meaning_of(code) is Meaning.PIN)


def cell(bench: Bench, function: str, use: Callable[[Bench], None], code: int) -> Iterator[str]:
    """The failures of one cell of the matrix."""
    for shape in ({"last": 1}, {"first": 2, "last": 2}, {}):
        logins = bench.faults.calls("C_Login")

        def arm(shape: dict[str, int] = shape) -> None:
            bench.faults.answer(function, code, **shape)

        try:
            ended = bench.run(use, arm)
            kind = None if ended is None else type(ended)
            allowed = expected(function, code)
            if shape:
                # The fault occurs once: the call recovers where that is possible.
                allowed = allowed | {None} if meaning_of(code).is_final or judges_the_pin(function, code) else {None}
                if function == "C_Initialize":
                    allowed = {None, BackendUnavailable}
                if function == "C_GetInfo":
                    allowed = {None, BackendUnavailable}
            assert kind in allowed, f"ended as {kind and kind.__name__}: {ended}"
            if judges_the_pin(function, code) and kind is not None:
                assert bench.faults.calls("C_Login") == logins + 1
                for _ in range(3):
                    bench.forgive()
                    with pytest.raises(BackendRefused):
                        bench.sign()
                assert bench.faults.calls("C_Login") == logins + 1, "a refused PIN was tried again"
                bench.hsm.pin_file.write_text(bench.hsm.pin)
            bench.recovered()
        except Exception as error:  # noqa: BLE001 — every cell is told
            yield f"{function} {name_of(code)} {shape}: {type(error).__name__} {error}"


_bench: list[Bench] = []


def start(hsm: SoftHsm) -> None:
    _bench.append(Bench(hsm))


def column(function: str, use: Callable[[Bench], None], codes: list[int]) -> str:
    """The failures of one function; runs in the process that has loaded the module."""
    (bench,) = _bench
    return "\n".join(wrong for code in codes for wrong in cell(bench, function, use, code))


def used() -> set[str]:
    """The functions that all operations of the backend call."""
    (bench,) = _bench
    bench.run(Bench.load_and_sign, lambda: None)
    bench.run(Bench.destroy, lambda: None)
    bench.recovered()
    bench.backend.capabilities()
    bench.backend.adopt("the-key")
    return {name for name in FUNCTIONS if bench.faults.calls(name)}


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    hsm = make_token(tmp_path_factory.mktemp("matrix"))
    with fresh_processes(1) as pool:
        pool.submit(start, hsm).result(60)
        yield pool


def test_the_matrix_has_a_row_for_every_function_that_is_called(process: ProcessPoolExecutor) -> None:
    assert process.submit(used).result(60) == set(USES)


def codes_for(row: int, function: str, others: int) -> list[int]:
    """All with --long; else one code of each meaning, and a share of the others that differs from row to row."""
    codes = [code for code in ALL_CODES if (function, code) not in LIES]
    if LONG:
        return codes
    ones = {meaning_of(code): code for code in reversed(codes)}.values()
    return [code for number, code in enumerate(codes) if code in ones or (others and (number + row) % others == 0)]


@pytest.mark.parametrize(("row", "function"), list(enumerate(USES)), ids=list(USES))
def test_every_return_value_of(row: int, function: str, process: ProcessPoolExecutor) -> None:
    makes_keys = USES[function] in (Bench.generate, Bench.destroy)
    codes = codes_for(row, function, 0 if makes_keys else 4)
    assert not process.submit(column, function, USES[function], codes).result(600)


@pytest.mark.parametrize(
    ("row", "use"), list(enumerate(MORE_USES)), ids=[f"{name}-{use.__name__}" for name, use in MORE_USES]
)
def test_the_same_on_other_ways(
    row: int, use: tuple[str, Callable[[Bench], None]], process: ProcessPoolExecutor
) -> None:
    codes = codes_for(row, use[0], 0)
    if not LONG and use[1] is Bench.generate:
        codes = codes[row % 3 :: 3]
    assert not process.submit(column, *use, codes).result(600)
