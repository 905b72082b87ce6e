"""A module that hangs, crashes, loses its sessions or corrupts signatures: other calls go on, and it recovers."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.exceptions import InvalidSignature

from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import GeneratedKey, KeyRef, Message
from kms_jwks.backends.calling import Backends
from kms_jwks.backends.pkcs11 import PinSource, Pkcs11Backend
from kms_jwks.backends.pkcs11.locks import file_lock
from kms_jwks.errors import BackendError, BackendKeyNotFound, BackendRefused, BackendTimeout, BackendUnavailable
from tests.children import in_child
from tests.contract.suite import verify
from tests.faults.harness import Faults, Violations
from tests.softhsm import SoftHsm, make_token

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.softhsm

ES256, RS256, EDDSA = (ALGORITHMS[name] for name in ("ES256", "RS256", "EdDSA"))
CKR_GENERAL_ERROR, CKR_DEVICE_REMOVED, CKR_PIN_LOCKED, CKR_PIN_INCORRECT = 0x5, 0x32, 0xA4, 0xA0
CKM_EDDSA = 0x1057
SOMETHING = Message(b"something")


@pytest.fixture
def hsm(tmp_path: Path) -> SoftHsm:
    return make_token(tmp_path / "softhsm")


def sign(backend: Pkcs11Backend, key: GeneratedKey, seconds: float = 5.0) -> None:
    """Sign and verify the signature."""
    message = Message(os.urandom(16))
    verify(ES256, dict(key.public_jwk), message, backend.sign(key.ref, ES256, message, time.monotonic() + seconds))


def eventually(work: Callable[[], Any], seconds: float = 10.0) -> float:
    """Repeat until it does not fail any more. Returns the seconds that took."""
    began = time.monotonic()
    while True:
        try:
            work()
            return time.monotonic() - began
        except BackendError:
            assert time.monotonic() < began + seconds, "it does not recover"
            time.sleep(0.01)


def opened(hsm: SoftHsm, **options: Any) -> tuple[Faults, Pkcs11Backend, GeneratedKey]:
    faults, through = Faults.over(hsm)
    backend = through.backend(**options)
    key = backend.generate("here", ES256)
    sign(backend, key)
    return faults, backend, key


def quiet(faults: Faults, backend: Pkcs11Backend) -> None:
    """No session was leaked, and no rule of PKCS#11 was broken."""
    assert faults.sessions == int(backend.ping().facts["sessions_of_process"])
    assert faults.violations == Violations.NONE


# --- hanging ----------------------------------------------------------------------------------------------------------


def started(faults: Faults, function: str, work: Callable[[], Any]) -> threading.Thread:
    """A thread whose call hangs in the function."""
    thread = threading.Thread(target=lambda: _swallow(work), daemon=True)
    thread.start()
    while not faults.hanging(function):
        time.sleep(0.005)
    return thread


def _swallow(work: Callable[[], Any]) -> None:
    with contextlib.suppress(BackendError):
        work()


def hung_signature(hsm: SoftHsm) -> None:
    faults, backend, key = opened(hsm, sessions=1)
    faults.hang("C_Sign", last=1)
    thread = started(faults, "C_Sign", lambda: sign(backend, key))
    # The only session is in use: other calls wait until their own deadline at most.
    began = time.monotonic()
    with pytest.raises(BackendTimeout):
        sign(backend, key, 0.3)
    assert time.monotonic() - began < 1.5
    # The stuck session is replaced, and other calls succeed.
    sign(backend, key)
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(sign, backend, key) for _ in range(100)]:
            done.result()
    assert backend.ping().facts["token_label"] == hsm.label
    faults.clear()
    thread.join(10)
    assert not thread.is_alive()
    sign(backend, key)
    quiet(faults, backend)


def test_a_hung_signature_holds_up_nobody_for_long(hsm: SoftHsm) -> None:
    in_child(hung_signature, hsm)


def hung_while_the_token_goes(hsm: SoftHsm) -> None:
    faults, backend, key = opened(hsm, sessions=4)
    faults.hang("C_Sign", last=1)
    thread = started(faults, "C_Sign", lambda: sign(backend, key))
    hsm.tokens.rename(hsm.directory / "hidden")
    # SoftHSM would have to be finalised, which is not allowed while a call is inside: callers get an error at once.
    for _ in range(30):
        began = time.monotonic()
        with pytest.raises(BackendUnavailable):
            sign(backend, key, 2)
        assert time.monotonic() - began < 2
        time.sleep(0.02)
    (hsm.directory / "hidden").rename(hsm.tokens)
    assert faults.violations == Violations.NONE
    faults.clear()
    thread.join(10)
    eventually(lambda: sign(backend, key))
    quiet(faults, backend)


def test_a_module_is_never_finalised_under_a_call_that_hangs(hsm: SoftHsm) -> None:
    in_child(hung_while_the_token_goes, hsm)


def hung_opening(hsm: SoftHsm, function: str) -> None:
    faults, backend, key = opened(hsm, sessions=2)
    backend._connection().close(time.monotonic() + 1)
    faults.hang(function, last=1)
    thread = started(faults, function, lambda: sign(backend, key))
    for _ in range(5):
        began = time.monotonic()
        with pytest.raises(BackendUnavailable) as caught:
            sign(backend, key, 2)
        assert caught.value.retry_after
        assert time.monotonic() - began < 1.5
    faults.clear()
    thread.join(10)
    eventually(lambda: sign(backend, key))
    quiet(faults, backend)


@pytest.mark.parametrize("function", ["C_GetSlotList", "C_OpenSession", "C_Login", "C_GetSessionInfo"])
def test_while_one_thread_hangs_in_opening_the_token_others_are_answered(hsm: SoftHsm, function: str) -> None:
    in_child(hung_opening, hsm, function)


def hung_first_opening(hsm: SoftHsm) -> None:
    faults, through = Faults.over(hsm)
    faults.hang("C_Login", last=1)
    backend = through.backend()
    thread = started(faults, "C_Login", backend.ping)
    with pytest.raises(BackendTimeout):
        backend.sign(_NOBODY, ES256, SOMETHING, time.monotonic() + 0.3)
    faults.clear()
    thread.join(10)
    eventually(backend.ping)


_NOBODY = KeyRef.of(label="nobody", serial="0")


def test_the_first_opening_is_waited_for_until_the_deadline(hsm: SoftHsm) -> None:
    in_child(hung_first_opening, hsm)


def asked(backends: Backends, question: str, key: GeneratedKey, seconds: float = 0.3) -> Any:
    return backends.ask("hsm", question, lambda backend: getattr(backend, question)(key.ref), seconds)


def hung_questions(hsm: SoftHsm) -> None:
    faults, backend, key = opened(hsm, sessions=4)
    backends = Backends({"hsm": backend}, default=None)
    faults.hang("C_GetAttributeValue")
    for question in ("public_key", "attributes", "public_key"):
        with pytest.raises(BackendTimeout):
            asked(backends, question, key)
    assert backends.stuck_in("hsm") == backends.stuck() == backends.counters("hsm")["stuck"] == 3
    began = time.monotonic()
    with pytest.raises(BackendUnavailable, match="2 calls on this key have not returned"):
        asked(backends, "public_key", key, 5.0)
    assert time.monotonic() - began < 0.3
    sign(backend, key)  # with a handle that was found before
    faults.clear()
    eventually(lambda: asked(backends, "public_key", key))
    # A key that is made after its caller was answered is destroyed.
    faults.hang("C_GenerateKeyPair", last=1)
    with pytest.raises(BackendTimeout):
        backends.ask(
            "hsm",
            "generate",
            lambda backend: backend.generate("late", ES256),
            0.3,
            undo=lambda backend, late: backend.destroy(late.ref),
        )
    faults.clear()
    eventually(lambda: _absent(backend, "late"))
    eventually(lambda: _returned(backends))
    quiet(faults, backend)


def _returned(backends: Backends) -> None:
    if backends.stuck_in("hsm"):
        raise BackendUnavailable


def _absent(backend: Pkcs11Backend, label: str) -> None:
    backend.destroy(backend.generate("another", ES256).ref)  # waits for the one that is late
    if backend.list_keys(label):
        raise BackendUnavailable


def test_calls_other_than_signatures_are_answered_by_their_deadline(hsm: SoftHsm) -> None:
    in_child(hung_questions, hsm)


def test_a_lock_that_the_file_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("kms_jwks.backends.pkcs11.locks.fcntl.flock", no_locks)
    with pytest.raises(BackendRefused, match="No locks available"), file_lock(tmp_path / "lock", time.monotonic() + 5):
        pytest.fail("it is not locked")


def test_a_system_without_a_thread_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    backends = Backends({"hsm": SoftHsm(tmp_path, tmp_path / "no-such.so", "token").backend()}, default=None)
    with pytest.raises(BackendUnavailable, match="no thread"):
        backends.ask("hsm", "ping", lambda backend: backend.ping(), 5.0)
    assert backends.stuck_in("hsm") == 0


# --- crashes, lost sessions -------------------------------------------------------------------------------------------


def make(hsm: SoftHsm) -> GeneratedKey:
    return hsm.backend().generate("here", ES256)


def sign_once(hsm: SoftHsm, key: GeneratedKey) -> None:
    sign(hsm.backend(), key)


@pytest.mark.parametrize("function", ["C_Initialize", "C_Login", "C_Sign", "C_GenerateKeyPair"])
def test_a_crash_in_the_module_takes_its_process_and_nothing_else(hsm: SoftHsm, function: str) -> None:
    faults, through = Faults.over(hsm)
    key = in_child(make, through)
    faults.crash(function)
    with pytest.raises(BrokenProcessPool):
        in_child(make_another if function == "C_GenerateKeyPair" else sign_once, through, key)
    faults.clear()
    in_child(sign_once, through, key)  # no lock was left behind
    assert in_child(labels, through) == ["here"]


def make_another(hsm: SoftHsm, _: GeneratedKey) -> None:
    hsm.backend().generate("another", ES256)


def labels(hsm: SoftHsm) -> list[str]:
    return [stored.label for stored in hsm.backend().list_keys("")]


def lost_sessions(hsm: SoftHsm) -> None:
    faults, backend, key = opened(hsm, sessions=3)
    for _ in range(10):
        faults.lose_sessions()
        sign(backend, key)
    faults.lose_sessions()
    backend.destroy(backend.generate("another", ES256).ref)
    # Under load too every caller gets its signature.
    stop = threading.Event()

    def lose() -> None:
        while not stop.wait(0.4):
            faults.lose_sessions()

    thief = threading.Thread(target=lose)
    thief.start()
    try:
        with ThreadPoolExecutor(6) as threads:
            for done in [threads.submit(sign, backend, key) for _ in range(3000)]:
                done.result()
    finally:
        stop.set()
        thief.join()
    sign(backend, key)
    quiet(faults, backend)


def test_lost_sessions_are_replaced_within_the_call(hsm: SoftHsm) -> None:
    in_child(lost_sessions, hsm)


def spoilt_signatures(hsm: SoftHsm) -> None:
    faults, backend, key = opened(hsm, sessions=1)
    faults.truncate(4, every=2)
    for _ in range(10):
        sign(backend, key)
    assert faults.acted("C_Sign") >= 5
    faults.truncate(1)
    with pytest.raises(BackendUnavailable, match="a signature of 63 bytes"):
        sign(backend, key)
    faults.clear()
    sign(backend, key)
    # A wrong signature of the right length is found by the caller, which distrusts it: that session is closed.
    faults.flip(77, last=1)
    opened_before = faults.succeeded("C_OpenSession")
    with pytest.raises(InvalidSignature):
        sign(backend, key)
    backend.distrust(key.ref)
    sign(backend, key)
    assert faults.succeeded("C_OpenSession") == opened_before + 1
    sign(backend, key)
    assert faults.succeeded("C_OpenSession") == opened_before + 1
    quiet(faults, backend)


def test_spoilt_signatures_are_not_given_out_or_cost_the_session(hsm: SoftHsm) -> None:
    in_child(spoilt_signatures, hsm)


def token_gone(hsm: SoftHsm) -> None:
    faults, backend, key = opened(hsm, sessions=4)
    recovered_at = backend.recovered_at
    assert 0 < recovered_at <= time.monotonic()
    everything = ("C_GetSlotList", "C_GetTokenInfo", "C_GetSessionInfo", "C_SignInit", "C_OpenSession")
    faults.answer(everything, CKR_DEVICE_REMOVED)
    end = time.monotonic() + 2

    def ask() -> list[float]:
        took = []
        while time.monotonic() < end:
            began = time.monotonic()
            with pytest.raises(BackendUnavailable) as caught:
                sign(backend, key, 2)
            assert caught.value.retry_after
            took.append(time.monotonic() - began)
            time.sleep(0.005)
        return took

    with ThreadPoolExecutor(8) as threads:
        answers = [one for done in [threads.submit(ask) for _ in range(8)] for one in done.result()]
    # Calls are answered at once: they do not wait for the thread that tries to reopen the token.
    assert max(answers) < 1.5
    assert len(answers) > 100
    # One thread at a time tries to reopen it, with pauses, and not every caller.
    assert faults.calls("C_Initialize") < 12
    faults.clear()
    assert eventually(lambda: sign(backend, key)) < 2
    assert backend.recovered_at > recovered_at
    quiet(faults, backend)


def test_a_token_that_is_gone_is_looked_for_by_one_while_all_are_answered(hsm: SoftHsm) -> None:
    in_child(token_gone, hsm)


def failing_under_load(hsm: SoftHsm) -> None:
    """A healthy token in which calls go on failing is not reopened for each call: each would make a login."""
    faults, backend, key = opened(hsm, sessions=2)
    logins = faults.calls("C_Login")
    faults.answer("C_Sign", CKR_DEVICE_REMOVED)
    end = time.monotonic() + 2
    count = 0
    while time.monotonic() < end:
        with pytest.raises(BackendUnavailable):
            sign(backend, key)
        count += 1
    assert faults.calls("C_Login") - logins <= 4
    assert count > 20
    faults.clear()
    sign(backend, key)
    quiet(faults, backend)


def test_a_failure_that_stays_causes_no_storm_of_logins(hsm: SoftHsm) -> None:
    in_child(failing_under_load, hsm)


# --- the PIN ----------------------------------------------------------------------------------------------------------


def refused_pin(hsm: SoftHsm, code: int, words: str) -> None:
    faults, through = Faults.over(hsm)
    source = hsm.directory / "configured-pin"
    source.write_text(hsm.pin)
    faults.answer("C_Login", code)
    for attempt in range(3):
        backend = through.backend(pin=PinSource.from_file(source))
        with pytest.raises(BackendRefused, match=words) as caught:
            backend.ping()
        assert "it is tried again when that changes" in caught.value.next_step
        assert faults.calls("C_Login") == 1, f"tried again in attempt {attempt}"
    faults.clear()
    with pytest.raises(BackendRefused):
        through.backend(pin=PinSource.from_file(source)).ping()
    assert faults.calls("C_Login") == 1
    time.sleep(0.01)
    source.write_text(hsm.pin)
    backend = through.backend(pin=PinSource.from_file(source))
    backend.ping()
    assert faults.calls("C_Login") == 2
    quiet(faults, backend)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (CKR_PIN_INCORRECT, "CKR_PIN_INCORRECT"),
        (CKR_PIN_LOCKED, "CKR_PIN_LOCKED"),
        (0xA3, "CKR_PIN_EXPIRED"),
        (0x80000005, "0x80000005"),
    ],
    ids=["incorrect", "locked", "expired", "a-vendor's-own"],
)
def test_what_may_judge_the_pin_is_asked_once(hsm: SoftHsm, code: int, words: str) -> None:
    in_child(refused_pin, hsm, code, words)


def doubtful_login(hsm: SoftHsm) -> None:
    faults, through = Faults.over(hsm)
    faults.answer("C_Login", CKR_GENERAL_ERROR)
    backend = through.backend()
    with pytest.raises(BackendUnavailable, match=r"CKR_GENERAL_ERROR|goes on failing"):
        backend.ping()
    assert faults.calls("C_Login") <= 3
    faults.clear()
    eventually(backend.ping)


def test_a_login_that_fails_for_no_reason_is_tried_a_few_times(hsm: SoftHsm) -> None:
    in_child(doubtful_login, hsm)


# --- other programs ---------------------------------------------------------------------------------------------------


def destroyed_behind_our_back(hsm: SoftHsm) -> None:
    faults, backend, key = opened(hsm)
    other = SoftHsm(hsm.directory, faults.module, hsm.label).backend()
    other.destroy(key.ref)
    for use in (lambda: sign(backend, key), lambda: backend.public_key(key.ref)):
        with pytest.raises(BackendKeyNotFound) as caught:
            use()
        assert caught.value.next_step
    assert faults.violations == Violations.NONE


def test_a_key_that_somebody_destroyed_is_not_found(hsm: SoftHsm) -> None:
    in_child(destroyed_behind_our_back, hsm)
