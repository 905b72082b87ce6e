"""Released signatures are checked: a wrong one never leaves, and what it was is told apart."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
import structlog.testing

from kms_jwks import errors, jose
from kms_jwks.algorithms import ALGORITHMS, Algorithm
from kms_jwks.backends.base import Digest, KeyRef, Message
from kms_jwks.backends.calling import Backends, CallLimits
from kms_jwks.backends.released import SignatureChecker, _place
from kms_jwks.worker.snapshot import Signer
from tests.memory_backend import MemoryBackend

ALL = sorted(ALGORITHMS)


class Flipping(MemoryBackend):
    """Flips one bit of the next `wrong` signatures; `made` holds what left the module, and by which thread."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong = 0
        self.made: list[tuple[bytes, int]] = []
        self.distrusted_in: list[int] = []

    def sign(self, ref: KeyRef, alg: Algorithm, what: Message | Digest, deadline: float) -> bytes:
        if time.monotonic() >= deadline:
            raise errors.BackendTimeout
        signature = super().sign(ref, alg, what, deadline)
        if self.wrong:
            self.wrong -= 1
            place = random.randrange(len(signature) * 8)
            flipped = bytearray(signature)
            flipped[place // 8] ^= 1 << place % 8
            signature = bytes(flipped)
        self.made.append((signature, threading.get_ident()))
        return signature

    def distrust(self, ref: KeyRef) -> None:
        super().distrust(ref)
        self.distrusted_in.append(threading.get_ident())


def soon(seconds: float = 30.0) -> float:
    return time.monotonic() + seconds


def signer_of(backend: MemoryBackend, name: str) -> Signer:
    alg = ALGORITHMS[name]
    backend.recovered_at = backend.recovered_at or time.monotonic() - 60  # it was opened long ago
    made = backend.generate(f"{name}-{len(backend.keys)}", alg)
    backend.recovered_at = 0.001  # long ago
    return Signer(jose.thumbprint(made.public_jwk), alg, "memory", made.ref, dict(made.public_jwk), "")


def whats(alg: Algorithm) -> list[Message | Digest]:
    message = Message(b"a.b")
    return [message] if alg.hash is None else [message, Digest(message.digest(alg))]


@pytest.mark.parametrize("name", ALL)
def test_a_good_signature_leaves_as_it_is(name: str) -> None:
    backend = Flipping()
    signer, checker = signer_of(backend, name), SignatureChecker(backend, 1.0)
    for number, what in enumerate(whats(signer.alg), 1):
        assert checker.signed(signer, what, soon()) == backend.made[-1][0]
        assert (checker.checked, checker.bad, len(backend.made)) == (number, 0, number)
    assert backend.distrusted == []


@pytest.mark.parametrize("name", ALL)
def test_a_wrong_one_never_leaves_and_the_second_is_checked_too(name: str) -> None:
    for what in whats(ALGORITHMS[name]):
        backend = Flipping()
        signer, checker = signer_of(backend, name), SignatureChecker(backend, 0.0)
        backend.wrong = 1
        assert checker.signed(signer, what, soon()) == backend.made[1][0] != backend.made[0][0]
        assert (checker.checked, checker.bad, backend.distrusted) == (2, 1, [signer.ref])
        backend.wrong = 2
        checker.be_wary()
        with pytest.raises(errors.BackendUnavailable) as unavailable:
            checker.signed(signer, what, soon())
        assert unavailable.value.retry_after
        assert (checker.checked, checker.bad, len(backend.distrusted)) == (4, 3, 3)
        assert set(backend.distrusted_in) == {threading.get_ident()}, "the thread that signed gives its session up"


@pytest.mark.parametrize("name", ["RS256", "ES256", "EdDSA", "ML-DSA-44"])
@pytest.mark.parametrize("spoil", [lambda s: b"", lambda s: s[:-1], lambda s: s + b"\0", lambda s: bytes(len(s))])
def test_what_is_no_signature_at_all_never_leaves(name: str, spoil: Any) -> None:
    backend = MemoryBackend()
    backend.spoil = spoil
    signer, checker = signer_of(backend, name), SignatureChecker(backend, 1.0)
    for what in whats(signer.alg):
        with pytest.raises(errors.BackendUnavailable):
            checker.signed(signer, what, soon())


def test_the_retry_keeps_the_deadline() -> None:
    class Slow(Flipping):
        def sign(self, ref: KeyRef, alg: Algorithm, what: Message | Digest, deadline: float) -> bytes:
            return super().sign(ref, alg, what, 0.0 if self.made else deadline)

    backend = Slow()
    signer, checker = signer_of(backend, "RS256"), SignatureChecker(backend, 1.0)
    backend.wrong = 1
    with pytest.raises(errors.BackendTimeout):
        checker.signed(signer, Message(b"x"), soon())
    assert (checker.bad, len(backend.made)) == (1, 1)


@pytest.mark.parametrize("name", ["RS256", "ES256"])
def test_another_key_in_the_module_is_found_out(name: str) -> None:
    """Also where the module has it under the same reference, and its signatures are good ones: by itself."""
    backend = Flipping()
    signer, other, checker = signer_of(backend, name), signer_of(backend, name), SignatureChecker(backend, 0.0)
    checker.signed(signer, Message(b"x"), soon())
    held = backend.keys[signer.ref["id"]]
    backend.keys[signer.ref["id"]] = backend.keys[other.ref["id"]]
    checker.be_wary()
    with structlog.testing.capture_logs() as logs, pytest.raises(errors.BackendRefused, match="is not the one"):
        checker.signed(signer, Message(b"x"), soon())
    loud = [line for line in logs if line["event"] == "module_key_differs"]
    assert [line["log_level"] for line in loud] == ["error"]
    assert loud[0]["kid"] == signer.kid
    asked = len(backend.made)
    with pytest.raises(errors.BackendRefused):
        checker.signed(signer, Message(b"x"), soon())
    assert len(backend.made) == asked, "refused for a while without asking again"
    assert checker.signed(other, Message(b"x"), soon()), "the other key's own signatures are good"
    backend.keys[signer.ref["id"]] = held
    checker._known[_place(signer)].refused_until = 0.0
    assert checker.signed(signer, Message(b"x"), soon())


def test_a_module_that_cannot_be_asked_for_the_key_is_unavailable() -> None:
    backend = Flipping()
    signer, checker = signer_of(backend, "RS256"), SignatureChecker(backend, 0.0)
    backend.spoil = lambda _: b"nonsense"

    def fail(call: str) -> None:
        if call == "public_key":
            raise errors.BackendKeyNotFound

    backend.before = fail
    with pytest.raises(errors.BackendUnavailable):
        checker.signed(signer, Message(b"x"), soon())


def test_the_question_for_the_key_keeps_the_deadline_of_the_signature() -> None:
    backend, released = Flipping(), threading.Event()
    signer = signer_of(backend, "RS256")
    backends = Backends({"memory": backend}, default=None, limits={"memory": CallLimits(timeout=2.0)})
    backend.spoil = lambda _: b"nonsense"

    def hang(call: str) -> None:
        if call == "public_key":
            released.wait(60)

    backend.before = hang
    began = time.monotonic()
    with pytest.raises(errors.BackendUnavailable):
        backends.sign(signer, Message(b"x"))
    assert time.monotonic() - began < 30
    assert backends.counters("memory")["stuck"] == 1
    released.set()


def test_a_recorded_key_that_is_none_is_refused() -> None:
    backend = Flipping()
    good = signer_of(backend, "ES256")
    bad = Signer(good.kid, good.alg, good.backend, good.ref, {"kty": "EC", "crv": "P-256", "x": "", "y": ""}, "")
    with pytest.raises(errors.BackendRefused):
        SignatureChecker(backend, 0.0).signed(bad, Message(b"x"), soon())
    assert backend.made == []


# --- which are checked


def checked_of(checker: SignatureChecker, signer: Signer, count: int) -> int:
    before = checker.checked
    for _ in range(count):
        checker.signed(signer, Message(b"x"), soon())
    return checker.checked - before


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (1.0, 4000, 4000), (0.05, 130, 280)])
def test_the_share_is_the_configured_one(share: float, least: int, most: int) -> None:
    """Six standard deviations either side."""
    backend = MemoryBackend()
    signer, checker = signer_of(backend, "EdDSA"), SignatureChecker(backend, share)
    assert checked_of(checker, signer, 1) == 1, "the first is always checked"
    assert least <= checked_of(checker, signer, 4000) <= most


def test_every_rsa_signature_is_checked_whatever_the_share() -> None:
    backend = MemoryBackend()
    for name in ("RS256", "PS512"):
        assert checked_of(SignatureChecker(backend, 0.0), signer_of(backend, name), 20) == 20


def test_each_keys_first_signature_is_checked() -> None:
    backend = MemoryBackend()
    checker = SignatureChecker(backend, 0.0)
    for _ in range(3):
        signer = signer_of(backend, "ES256")
        assert [checked_of(checker, signer, 1), checked_of(checker, signer, 9)] == [1, 0]


def test_all_are_checked_in_the_second_after_an_opening_and_each_keys_first_even_later() -> None:
    backend = MemoryBackend()
    checker, signer, idle = SignatureChecker(backend, 0.0), signer_of(backend, "ES256"), signer_of(backend, "ES256")
    checked_of(checker, signer, 1)
    checked_of(checker, idle, 1)
    backend.recovered_at = time.monotonic() + 0.2  # so that even a slow machine is within the second
    assert checked_of(checker, signer, 10) == 10
    backend.recovered_at = time.monotonic() - 1.1
    checker._known[_place(signer)].checked_at = time.monotonic()
    checker._known[_place(idle)].checked_at = backend.recovered_at - 5
    assert checked_of(checker, signer, 10) == 0
    assert [checked_of(checker, idle, 1), checked_of(checker, idle, 9)] == [1, 0]


@pytest.mark.parametrize("error", [errors.BackendUnavailable("away"), errors.BackendTimeout("late")])
def test_all_are_checked_after_the_module_was_away(error: errors.BackendError) -> None:
    backend = MemoryBackend()
    checker, signer = SignatureChecker(backend, 0.0), signer_of(backend, "ES256")
    checked_of(checker, signer, 1)
    backend.fail = error
    with pytest.raises(type(error)):
        checker.signed(signer, Message(b"x"), soon())
    backend.fail = None
    assert checked_of(checker, signer, 3) == 3
    checker._wary_until = time.monotonic()
    assert checked_of(checker, signer, 3) == 0


def test_all_are_checked_in_the_minute_after_a_wrong_one() -> None:
    backend = Flipping()
    checker, signer = SignatureChecker(backend, 0.0), signer_of(backend, "ES256")
    backend.wrong = 1
    checker.signed(signer, Message(b"x"), soon())
    assert checked_of(checker, signer, 20) == 20
    assert checker._wary_until - time.monotonic() > 20


def test_verifiers_are_kept_and_their_number_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kms_jwks.backends.released._KNOWN", 2)
    backend = MemoryBackend()
    checker = SignatureChecker(backend, 0.0)
    signers = [signer_of(backend, "ES256") for _ in range(5)]
    for signer in signers:
        checked_of(checker, signer, 2)
        assert len(checker._known) <= 2
