"""The fault-injecting module itself: it forwards calls, fails exactly those it is told to, and counts correctly."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from pkcs11 import Mechanism

from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import Digest, GeneratedKey, Message
from kms_jwks.backends.pkcs11 import Pkcs11Backend
from kms_jwks.backends.pkcs11.module import Cryptoki
from tests.children import FRESH, in_child
from tests.contract.suite import verify
from tests.faults.harness import FUNCTIONS, Faults, Violations
from tests.softhsm import SoftHsm, make_token

pytestmark = pytest.mark.softhsm

ES256 = ALGORITHMS["ES256"]
CKR_DEVICE_ERROR = 0x30
CKR_SESSION_HANDLE_INVALID = 0xB3
CKM_ECDSA, CKM_EDDSA = 0x1041, 0x1057


@pytest.fixture
def hsm(tmp_path: Path) -> SoftHsm:
    return make_token(tmp_path / "softhsm")


class Raw:
    """The C functions over one session, with one key's handle: without the backend's retries."""

    def __init__(self, hsm: SoftHsm, backend: Pkcs11Backend) -> None:
        self.connection: Any = backend._connection().current
        library = ctypes.CDLL(str(hsm.module))
        pointer = ctypes.POINTER(ctypes.c_void_p)()
        assert library.C_GetFunctionList(ctypes.byref(pointer)) == 0
        address = ctypes.addressof(pointer.contents)
        self._table = (ctypes.c_void_p * len(FUNCTIONS)).from_address(address + 8)  # after the version

    def call(self, name: str, *arguments: Any) -> int:
        prototype = ctypes.CFUNCTYPE(ctypes.c_ulong)
        return int(prototype(self._table[FUNCTIONS.index(name)] or 0)(*arguments))

    def session(self) -> ctypes.c_ulong:
        found = ctypes.c_ulong()
        slot = ctypes.c_ulong(self.connection.token.slot.slot_id)
        assert self.call("C_OpenSession", slot, ctypes.c_ulong(4), None, None, ctypes.byref(found)) == 0
        return found

    def info(self, session: ctypes.c_ulong) -> int:
        return self.call("C_GetSessionInfo", session, ctypes.create_string_buffer(64))


def opened(hsm: SoftHsm) -> tuple[Faults, SoftHsm, Pkcs11Backend, GeneratedKey]:
    faults, through = Faults.over(hsm)
    backend = through.backend(sessions=2)
    return faults, through, backend, backend.generate("here", ES256)


def sign(backend: Pkcs11Backend, key: GeneratedKey) -> bytes:
    return backend.sign(key.ref, ES256, Message(b"something"), time.monotonic() + 5)


def forwarding(hsm: SoftHsm) -> None:
    faults, through, backend, key = opened(hsm)
    for _ in range(10):
        verify(ES256, dict(key.public_jwk), Message(b"something"), sign(backend, key))
    assert faults.calls("C_Sign") == faults.succeeded("C_Sign") >= 10
    assert faults.calls("C_Login") == 1
    assert faults.sessions == int(backend.ping().facts["sessions_of_process"])
    raw = Raw(through, backend)
    sessions = [raw.session() for _ in range(5)]
    before = faults.sessions
    assert [raw.info(session) for session in sessions] == [0] * 5
    assert raw.call("C_CloseSession", sessions[0]) == 0
    assert raw.call("C_CloseSession", sessions[0]) == CKR_SESSION_HANDLE_INVALID
    assert raw.info(sessions[0]) == CKR_SESSION_HANDLE_INVALID
    assert raw.info(ctypes.c_ulong(0xDEADBEEF)) == CKR_SESSION_HANDLE_INVALID
    assert faults.sessions == before - 1
    assert faults.violations == Violations.NONE
    assert Cryptoki(through.module).finalize() == 0
    assert faults.sessions == 0


def test_without_faults_all_is_as_ever_and_is_counted(hsm: SoftHsm) -> None:
    in_child(forwarding, hsm)


def answers(hsm: SoftHsm) -> None:
    faults, through, backend, _ = opened(hsm)
    raw = Raw(through, backend)
    session = raw.session()

    def codes(count: int) -> list[int]:
        return [raw.info(session) for _ in range(count)]

    faults.answer("C_GetSessionInfo", CKR_DEVICE_ERROR, first=3, last=4)
    assert codes(6) == [0, 0, CKR_DEVICE_ERROR, CKR_DEVICE_ERROR, 0, 0]
    assert faults.acted("C_GetSessionInfo") == 2
    faults.answer("C_GetSessionInfo", 0x80000001, first=2, every=2)
    assert codes(6) == [0, 0x80000001] * 3
    faults.answer("C_GetSessionInfo", CKR_DEVICE_ERROR, pid=os.getpid() + 1)
    assert codes(2) == [0, 0]
    faults.answer("C_GetSessionInfo", CKR_DEVICE_ERROR, last=1)
    assert codes(2) == [CKR_DEVICE_ERROR, 0]
    faults.answer(FUNCTIONS, CKR_DEVICE_ERROR)
    assert codes(1) == [CKR_DEVICE_ERROR]
    faults.clear("C_GetSessionInfo")
    assert codes(1) == [0]
    assert raw.call("C_CloseSession", session) == CKR_DEVICE_ERROR
    faults.clear()
    # Late: the real module has done the work.
    faults.answer("C_CloseSession", CKR_DEVICE_ERROR, late=True)
    before = faults.sessions
    assert raw.call("C_CloseSession", session) == CKR_DEVICE_ERROR
    assert faults.sessions == before - 1


def test_the_calls_that_are_meant_are_answered_as_told(hsm: SoftHsm) -> None:
    in_child(answers, hsm)


def spoilt(hsm: SoftHsm) -> None:
    faults, through = Faults.over(hsm)
    backend = through.backend(sessions=1)
    key = backend.generate("here", ES256)
    sign(backend, key)
    connection: Any = backend._connection().current
    (handle,) = connection.working.acquire(time.monotonic()).handles.values()

    def made() -> bytes:
        return bytes(handle.key.sign(bytes(32), mechanism=Mechanism.ECDSA))

    def good(signature: bytes) -> bool:
        try:
            verify(ES256, dict(key.public_jwk), Digest(bytes(32)), signature)
        except InvalidSignature:
            return False
        return True

    faults.flip(100, first=2, every=3)
    assert [good(made()) for _ in range(6)] == [True, False, True, True, False, True]
    faults.truncate(4, last=1)
    assert [len(made()) for _ in range(2)] == [60, 64]
    faults.flip(mechanism=CKM_EDDSA)
    assert good(made())
    faults.flip(mechanism=CKM_ECDSA)
    assert not good(made())
    faults.flip(key=b"another")
    assert good(made())
    faults.flip(key=bytes.fromhex(key.ref["id"]))
    assert not good(made())


def test_signatures_are_spoilt_as_told(hsm: SoftHsm) -> None:
    in_child(spoilt, hsm)


def lost(hsm: SoftHsm) -> None:
    faults, through, backend, _ = opened(hsm)
    raw = Raw(through, backend)
    old = raw.session()
    faults.lose_sessions()
    assert raw.info(old) == CKR_SESSION_HANDLE_INVALID
    assert faults.sessions == 0
    new = raw.session()
    assert (raw.info(new), raw.info(old)) == (0, CKR_SESSION_HANDLE_INVALID)
    assert faults.sessions == 1


def test_sessions_are_lost_for_good_and_new_ones_work(hsm: SoftHsm) -> None:
    in_child(lost, hsm)


def hanging(hsm: SoftHsm) -> None:
    faults, through, backend, _ = opened(hsm)
    raw = Raw(through, backend)
    session = raw.session()
    faults.hang("C_GetSessionInfo", 0.2, last=1)
    began = time.monotonic()
    assert raw.info(session) == 0
    assert time.monotonic() - began >= 0.2
    faults.hang("C_GetSessionInfo", last=1)
    thread = threading.Thread(target=raw.info, args=(session,))
    thread.start()
    while not faults.hanging("C_GetSessionInfo"):
        time.sleep(0.005)
    # Other calls go on meanwhile; a broken rule is counted.
    assert raw.info(raw.session()) == 0
    assert faults.violations == Violations.NONE
    assert raw.info(session) == 0  # which only reads
    assert faults.violations == Violations.NONE
    raw.call("C_FindObjectsFinal", session)
    assert faults.violations.sessions_shared == 1
    Cryptoki(through.module).finalize()
    assert faults.violations.finalised_under_calls == 1
    faults.clear()
    thread.join(10)
    assert not thread.is_alive()
    assert faults.hanging("C_GetSessionInfo") == 0


def test_a_call_hangs_for_its_time_or_until_it_is_let_go(hsm: SoftHsm) -> None:
    in_child(hanging, hsm)


def sign_once(hsm: SoftHsm, key: GeneratedKey) -> int:
    sign(hsm.backend(), key)
    return os.getpid()


def test_one_process_crashes_and_others_do_not(hsm: SoftHsm) -> None:
    faults, through = Faults.over(hsm)
    key = in_child(_made, through)
    faults.crash("C_Sign", last=1)
    with pytest.raises(BrokenProcessPool):
        in_child(sign_once, through, key)
    assert in_child(sign_once, through, key)
    assert faults.open_sessions() == 0


def _made(hsm: SoftHsm) -> GeneratedKey:
    return hsm.backend().generate("here", ES256)


def test_a_crash_is_a_segmentation_fault(hsm: SoftHsm) -> None:
    faults, through = Faults.over(hsm)
    key = in_child(_made, through)
    faults.crash("C_SignInit")
    child = FRESH.Process(target=sign_once, args=(through, key))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGSEGV
