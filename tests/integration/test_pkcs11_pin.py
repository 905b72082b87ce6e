"""A wrong PIN is tried once, by one process, until its source changes; and no message or file holds a PIN."""

from __future__ import annotations

import io
import time
import traceback
from pathlib import Path

import pytest

from kms_jwks.backends.pkcs11 import PinSource
from kms_jwks.errors import BackendRefused
from tests.children import in_child
from tests.softhsm import SoftHsm, make_token

pytestmark = pytest.mark.softhsm

WRONG = "wrong-1234"


@pytest.fixture
def hsm(tmp_path: Path) -> SoftHsm:
    return make_token(tmp_path / "softhsm")


def change_pin(hsm: SoftHsm, old: str, new: str) -> None:
    """Change the token's PIN, in a process of its own."""
    backend = hsm.backend(lock_dir=hsm.directory / "other-locks", pin=PinSource.from_stdin(io.BytesIO(old.encode())))
    backend.ping()
    connection = backend._connection().current
    assert connection is not None
    session = connection.token.open(rw=True)
    session.set_pin(old, new)
    session.close()


def refused(hsm: SoftHsm, pin: PinSource) -> str:
    """The detail of the refusal, which does not hold the PIN."""
    with pytest.raises(BackendRefused) as caught:
        hsm.backend(pin=pin).ping()
    assert caught.value.next_step
    told = "".join(traceback.format_exception(caught.value)) + repr(pin) + caught.value.next_step
    assert WRONG not in told
    return caught.value.detail


def works(hsm: SoftHsm, pin: PinSource) -> None:
    hsm.backend(pin=pin).ping()


def test_a_wrong_pin_is_not_tried_again_until_its_file_changes(hsm: SoftHsm) -> None:
    right = hsm.pin
    file = hsm.directory / "configured-pin"
    file.write_text(WRONG)
    source = PinSource.from_file(file)
    assert "refused the PIN" in in_child(refused, hsm, source)

    # The PIN in the file is right now. A process that tried it would succeed; no process tries it.
    in_child(change_pin, hsm, right, WRONG)
    for _ in range(3):
        assert "refused the PIN" in in_child(refused, hsm, source)

    # The file is written again, so its PIN is tried again.
    time.sleep(0.01)
    file.write_text(WRONG)
    in_child(works, hsm, source)
    assert not list(hsm.lock_dir.glob("refused-pin-*"))
    in_child(works, hsm, source)


def recovers_by_itself(hsm: SoftHsm, file: Path, right: str) -> None:
    backend = hsm.backend(pin=PinSource.from_file(file))
    for _ in range(20):
        with pytest.raises(BackendRefused):
            backend.ping()
    file.write_text(right)
    time.sleep(1.1)
    assert backend.ping().facts["token_label"] == hsm.label


def test_a_running_process_takes_the_mended_pin(hsm: SoftHsm) -> None:
    file = hsm.directory / "configured-pin"
    file.write_text(WRONG)
    in_child(recovers_by_itself, hsm, file, hsm.pin)


def attempts(hsm: SoftHsm, source: PinSource, rounds: int) -> int:
    """How many times this process called C_Login."""
    from kms_jwks.backends.pkcs11.module import Cryptoki

    count = 0
    login = Cryptoki.login

    def counting(self: Cryptoki, session: int, pin: bytes) -> int:
        nonlocal count
        count += 1
        return login(self, session, pin)

    Cryptoki.login = counting  # type: ignore[method-assign]
    for _ in range(rounds):
        with pytest.raises(BackendRefused):
            hsm.backend(pin=source).ping()
    return count


def test_of_many_backends_in_many_processes_one_tries_a_wrong_pin_once(hsm: SoftHsm) -> None:
    file = hsm.directory / "configured-pin"
    file.write_text(WRONG)
    assert [in_child(attempts, hsm, PinSource.from_file(file), 5) for _ in range(3)] == [1, 0, 0]


def test_environment_and_standard_input_are_recorded_without_revealing_the_pin(
    hsm: SoftHsm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_TOKEN_PIN", WRONG)
    source = PinSource.from_env("TEST_TOKEN_PIN")
    assert [in_child(attempts, hsm, source, 2) for _ in range(2)] == [1, 0]
    stdin = PinSource.from_stdin(io.BytesIO(f"{WRONG}\n".encode()))
    assert [in_child(attempts, hsm, stdin, 2) for _ in range(2)] == [1, 0]
    assert WRONG not in repr(stdin)
    for file in hsm.lock_dir.iterdir():
        assert WRONG.encode() not in file.read_bytes()
        assert file.stat().st_mode & 0o077 == 0
    monkeypatch.setenv("TEST_TOKEN_PIN", hsm.pin)
    in_child(works, hsm, source)
    in_child(works, hsm, PinSource.from_stdin(io.BytesIO(f"{hsm.pin}\n".encode())))


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_or_missing_pin_is_refused_without_asking_the_token(hsm: SoftHsm, content: str) -> None:
    file = hsm.directory / "configured-pin"
    assert "cannot be read" in in_child(refused, hsm, PinSource.from_file(file))
    file.write_text(content)
    assert "no PIN" in in_child(refused, hsm, PinSource.from_file(file))
    assert "no PIN" in in_child(refused, hsm, PinSource.from_env("NO_SUCH_VARIABLE_HERE"))
    assert not list(hsm.lock_dir.glob("refused-pin-*"))


def test_where_a_refusal_could_not_be_recorded_no_pin_is_tried(hsm: SoftHsm) -> None:
    (hsm.lock_dir / "fingerprint.key").mkdir(parents=True)
    assert in_child(attempts, hsm, PinSource.from_file(hsm.pin_file), 2) == 0


def unusable_lock_dir(hsm: SoftHsm) -> None:
    with pytest.raises(BackendRefused, match="cannot be opened"):
        hsm.backend(lock_dir=hsm.pin_file / "below-a-file").ping()


def test_a_lock_folder_that_cannot_be_is_refused(hsm: SoftHsm) -> None:
    in_child(unusable_lock_dir, hsm)
