"""The PKCS#11 backend when the token vanishes, returns, is another one, or never existed: each in a new process."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import structlog

from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import Digest, GeneratedKey, KeyRef, Message
from kms_jwks.backends.pkcs11 import PinSource, Pkcs11Backend
from kms_jwks.errors import BackendError, BackendKeyNotFound, BackendRefused, BackendTimeout, BackendUnavailable
from tests.children import in_child
from tests.contract.suite import verify
from tests.softhsm import SoftHsm, make_token, sessions_in_module

pytestmark = pytest.mark.softhsm

ES256 = ALGORITHMS["ES256"]


@pytest.fixture
def hsm(tmp_path: Path) -> SoftHsm:
    return make_token(tmp_path / "softhsm")


def sign(backend: Pkcs11Backend, key: GeneratedKey, seconds: float = 5.0) -> None:
    """Sign something and verify it."""
    message = Message(b"something")
    verify(ES256, dict(key.public_jwk), message, backend.sign(key.ref, ES256, message, time.monotonic() + seconds))


def eventually(do: Callable[[], None], seconds: float = 15.0) -> float:
    """Repeat until it is no longer unavailable. Returns the seconds that took."""
    began = time.monotonic()
    while True:
        try:
            do()
            return time.monotonic() - began
        except BackendUnavailable:
            if time.monotonic() - began > seconds:
                raise
            time.sleep(0.05)


# --- the token goes and comes back ------------------------------------------------------------------------------------


def token_vanishes_and_returns(hsm: SoftHsm) -> None:
    backend = hsm.backend(sessions=2)
    key = backend.generate("here", ES256)
    sign(backend, key)
    hidden = hsm.directory / "hidden"
    for _ in range(3):
        with structlog.testing.capture_logs() as logs:
            hsm.tokens.rename(hidden)
            for use in (
                lambda: sign(backend, key),
                lambda: backend.public_key(key.ref),
                lambda: backend.destroy(key.ref),
                lambda: backend.generate("other", ES256),
                lambda: backend.list_keys(""),
                lambda: backend.adopt("here"),
                backend.ping,
            ):
                with pytest.raises(BackendUnavailable) as caught:
                    use()
                assert caught.value.retry_after
            hidden.rename(hsm.tokens)
            assert eventually(lambda: sign(backend, key)) < 8
        changes = [line["event"] for line in logs]
        assert changes == ["token_connection_discarded", "module_restarted", "token_opened"], "each change, once"
    assert [stored.label for stored in backend.list_keys("")] == ["here"]
    # The signing session, the login's, and the one for making and destroying keys if it was used since.
    assert sessions_in_module(backend) == int(backend.ping().facts["sessions_of_process"]) <= 4
    backend.destroy(key.ref)
    with pytest.raises(BackendKeyNotFound):
        sign(backend, key)


def test_a_token_that_vanishes_is_unavailable_and_is_used_again_when_it_is_back(hsm: SoftHsm) -> None:
    in_child(token_vanishes_and_returns, hsm)


def threads_live_through_it(hsm: SoftHsm) -> None:
    backend = hsm.backend(sessions=4)
    key = backend.generate("here", ES256)
    over = threading.Event()
    outages: list[str] = []

    def work(_: int) -> int:
        signed = 0
        while not over.is_set():
            try:
                sign(backend, key)
                signed += 1
            except (BackendUnavailable, BackendTimeout) as error:
                outages.append(type(error).__name__)
                time.sleep(0.02)
        sign(backend, key)
        return signed

    hidden = hsm.directory / "hidden"
    with ThreadPoolExecutor(8) as threads:
        done = [threads.submit(work, number) for number in range(8)]
        for _ in range(3):
            time.sleep(0.5)
            hsm.tokens.rename(hidden)
            time.sleep(1.0)
            hidden.rename(hsm.tokens)
            eventually(lambda: sign(backend, key))
        over.set()
        assert all(thread.result() > 0 for thread in done)
    assert outages
    assert sessions_in_module(backend) == int(backend.ping().facts["sessions_of_process"]) <= 6


def test_eight_threads_live_through_three_losses_of_the_token(hsm: SoftHsm) -> None:
    in_child(threads_live_through_it, hsm)


def storm_of_callers(hsm: SoftHsm) -> None:
    backend = hsm.backend()
    hidden = hsm.directory / "hidden"
    hsm.tokens.rename(hidden)
    ref = KeyRef.of(label="x", id="00", serial="0")

    def call(_: int) -> float:
        began = time.monotonic()
        with pytest.raises((BackendUnavailable, BackendTimeout)):
            backend.sign(ref, ES256, Message(b"x"), began + 3)
        return time.monotonic() - began

    with ThreadPoolExecutor(16) as threads:
        first = list(threads.map(call, range(16)))
        assert max(first) < 2.9  # one opened, the others heard of it
    with pytest.raises(BackendUnavailable):
        backend.ping()
    began = time.monotonic()
    answers = []
    while time.monotonic() - began < 0.2:
        try:
            backend.ping()
        except BackendUnavailable as error:
            answers.append(error)
    assert len(answers) > 100  # answered from memory, not by the module


def test_a_storm_of_callers_does_not_hammer_a_module_that_is_away(hsm: SoftHsm) -> None:
    in_child(storm_of_callers, hsm)


def somebody_logs_out(hsm: SoftHsm) -> None:
    backend = hsm.backend()
    key = backend.generate("here", ES256)
    sign(backend, key)
    connection = backend._connection().current
    assert connection is not None
    logged_in = connection.token.open(user_pin=None)
    import ctypes

    library = ctypes.CDLL(str(hsm.module))
    assert library.C_Logout(ctypes.c_ulong(logged_in.handle)) == 0  # type: ignore[attr-defined]
    logged_in.close()
    sign(backend, key)
    assert library.C_CloseAllSessions(ctypes.c_ulong(connection.token.slot.slot_id)) == 0
    sign(backend, key)
    assert library.C_Finalize(None) == 0
    sign(backend, key)
    assert sessions_in_module(backend) == int(backend.ping().facts["sessions_of_process"])


def test_lost_logins_sessions_and_initialisation_are_made_good_within_the_call(hsm: SoftHsm) -> None:
    in_child(somebody_logs_out, hsm)


# --- another token ----------------------------------------------------------------------------------------------------


def another_token_under_the_label(hsm: SoftHsm, other: SoftHsm) -> None:
    backend = hsm.backend()
    key = backend.generate("here", ES256)
    shutil.move(hsm.tokens, hsm.directory / "hidden")
    shutil.copytree(other.tokens, hsm.tokens)
    for _ in range(2):
        with pytest.raises(BackendRefused, match=r"has serial .* are on the one with serial") as caught:
            sign(backend, key)
        assert caught.value.next_step
        time.sleep(1.1)
    shutil.rmtree(hsm.tokens)
    shutil.move(hsm.directory / "hidden", hsm.tokens)
    time.sleep(1.1)
    eventually(lambda: sign(backend, key))


def test_another_token_under_the_same_label_is_refused_not_taken_for_an_empty_one(hsm: SoftHsm, tmp_path: Path) -> None:
    in_child(another_token_under_the_label, hsm, make_token(tmp_path / "other"))


def reference_to_another_token(hsm: SoftHsm) -> None:
    backend = hsm.backend()
    key = backend.generate("here", ES256)
    foreign = KeyRef.of(**{**key.ref.as_dict(), "serial": "0123456789abcdef"})
    uses: list[Callable[[], object]] = [
        lambda: backend.sign(foreign, ES256, Message(b"x"), time.monotonic() + 2),
        lambda: backend.public_key(foreign),
        lambda: backend.attributes(foreign),
        lambda: backend.destroy(foreign),
    ]
    for use in uses:
        with pytest.raises(BackendRefused, match="serial 0123456789abcdef"):
            use()
    sign(backend, key)


def test_a_reference_to_another_token_is_refused(hsm: SoftHsm) -> None:
    in_child(reference_to_another_token, hsm)


def bound_by_the_registry(hsm: SoftHsm) -> None:
    """As after a restart: the registry knows the keys' token, and this process has not opened it yet."""
    here = hsm.backend().generate("here", ES256).ref
    elsewhere = KeyRef.of(**{**here.as_dict(), "serial": "0123456789abcdef"})
    for opened_before in (False, True):
        backend = hsm.backend()
        if opened_before:
            backend.ping()
        backend.bind(elsewhere)
        for use in (backend.ping, lambda b=backend: b.generate("new", ES256)):
            with pytest.raises(BackendRefused, match="the keys are on the one with serial 0123456789abcdef"):
                use()
    bound = hsm.backend()
    bound.bind(here)
    assert bound.ping().facts["token_serial"] == here["serial"]
    expressly = hsm.backend(expected_serial=here["serial"])
    expressly.bind(elsewhere)
    expressly.ping()


def test_a_token_is_refused_when_the_registry_knows_the_keys_to_be_on_another(hsm: SoftHsm) -> None:
    in_child(bound_by_the_registry, hsm)


def unexpected_serial(hsm: SoftHsm) -> None:
    with pytest.raises(BackendRefused, match="has serial"):
        hsm.backend(expected_serial="0123456789abcdef").ping()
    serial = hsm.backend().ping().facts["token_serial"]
    assert hsm.backend(expected_serial=serial).ping().facts["token_serial"] == serial
    assert hsm.backend(token_label=None, token_serial=serial).ping().facts["token_serial"] == serial
    slot = int(hsm.backend().ping().facts["slot"])
    assert hsm.backend(token_label=None, slot=slot).ping().facts["token_serial"] == serial
    with pytest.raises(BackendUnavailable, match="no token with label 'kms-jwks-test' and slot"):
        hsm.backend(slot=slot + 1).ping()


def test_the_token_is_chosen_by_label_serial_or_slot_and_bound_to_its_serial(hsm: SoftHsm) -> None:
    in_child(unexpected_serial, hsm)


def two_tokens(hsm: SoftHsm, other: SoftHsm) -> None:
    with pytest.raises(BackendRefused, match="2 tokens with label") as caught:
        hsm.backend().ping()
    assert "token_serial" in caught.value.next_step
    serials = caught.value.detail.split("serials ")[1].rstrip(".").split(", ")
    for serial in serials:
        assert hsm.backend(token_serial=serial, pin=_pin_of(hsm, other, serial)).ping().facts["token_serial"] == serial


def _pin_of(hsm: SoftHsm, other: SoftHsm, serial: str) -> PinSource:
    mine = next(hsm.directory.glob(f"own-{serial}"), None)
    return PinSource.from_file((hsm if mine else other).pin_file)


def test_two_tokens_with_one_label_are_refused_until_the_serial_chooses(hsm: SoftHsm, tmp_path: Path) -> None:
    (hsm.directory / f"own-{in_child(serial_of, hsm)}").touch()
    other = make_token(tmp_path / "other")
    for folder in other.tokens.iterdir():
        shutil.copytree(folder, hsm.tokens / folder.name)
    in_child(two_tokens, hsm, other)


def serial_of(hsm: SoftHsm) -> str:
    return hsm.backend().ping().facts["token_serial"]


# --- no such token ----------------------------------------------------------------------------------------------------


def no_module(hsm: SoftHsm) -> None:
    missing = hsm.backend(module=hsm.directory / "no-such.so")
    with pytest.raises(BackendUnavailable, match="cannot be loaded"):
        missing.ping()
    text = hsm.directory / "text.so"
    text.write_text("not a shared object")
    with pytest.raises(BackendUnavailable, match="cannot be loaded"):
        hsm.backend(module=text).ping()
    libc = Path("/proc/self/maps").read_text().split("libc.so.6")[0].rsplit(" ", 1)[1] + "libc.so.6"
    with pytest.raises(BackendUnavailable, match="is no PKCS#11 module"):
        hsm.backend(module=Path(libc)).ping()
    with pytest.raises(BackendUnavailable, match="no token with label 'nobody'"):
        hsm.backend(token_label="nobody").ping()
    # It recovers by itself once the module is there.
    (hsm.directory / "no-such.so").write_bytes(hsm.module.read_bytes())
    eventually(lambda: _answers(missing))


def _answers(backend: Pkcs11Backend) -> None:
    assert backend.ping().facts["token_label"]


def test_missing_and_wrong_modules_are_unavailable_and_mend_themselves(hsm: SoftHsm) -> None:
    in_child(no_module, hsm)


def one_call_at_a_time(hsm: SoftHsm) -> None:
    backend = hsm.backend(locking="process", sessions=4)
    key = backend.generate("here", ES256)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: sign(backend, key, 20), range(400)))
    assert backend.ping().facts["locking"] == "process"
    hsm.tokens.rename(hsm.directory / "hidden")
    with pytest.raises(BackendUnavailable):
        sign(backend, key)
    (hsm.directory / "hidden").rename(hsm.tokens)
    eventually(lambda: sign(backend, key))


def test_locking_by_process_signs_and_recovers_too(hsm: SoftHsm) -> None:
    in_child(one_call_at_a_time, hsm)


def busy_sessions(hsm: SoftHsm) -> None:
    backend = hsm.backend(sessions=1)
    key = backend.generate("here", ES256)
    sign(backend, key)
    connection = backend._connection().current
    assert connection is not None
    pooled = connection.working.acquire(time.monotonic())
    began = time.monotonic()
    with pytest.raises(BackendTimeout):
        sign(backend, key, 0.2)
    assert 0.2 <= time.monotonic() - began < 0.5
    connection.working.release(pooled)
    sign(backend, key)
    with pytest.raises(BackendError):
        backend.sign(key.ref, ES256, Digest(b"short"), time.monotonic() + 1)
    sign(backend, key)


def test_waiting_for_a_session_ends_at_the_deadline(hsm: SoftHsm) -> None:
    in_child(busy_sessions, hsm)


def constructed_only(hsm: SoftHsm) -> None:
    maps = Path("/proc/self/maps")
    backend = hsm.backend()
    assert "libsofthsm2" not in maps.read_text()
    assert not hsm.lock_dir.exists()
    backend.close()
    assert "libsofthsm2" not in maps.read_text()
    backend = hsm.backend()
    backend.ping()
    assert "libsofthsm2" in maps.read_text()


def test_construction_opens_nothing(hsm: SoftHsm) -> None:
    in_child(constructed_only, hsm)
