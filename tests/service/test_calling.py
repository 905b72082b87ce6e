"""How a process's backends are used: in place or in the pool, with a deadline, and what is lost when calls hang."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog

from kms_jwks import errors, jose
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.backends.base import MAX_ABANDONED_CALLS, Backend, CallTimeouts, GeneratedKey, Message
from kms_jwks.backends.calling import PATIENCE_IN_PLACE, Backends, CallLimits
from kms_jwks.doctor.checks import State
from kms_jwks.doctor.modules import module
from kms_jwks.doctor.registry import Registry
from kms_jwks.service import Service
from kms_jwks.worker.snapshot import Signer
from tests.memory_backend import MemoryBackend
from tests.service.world import World

MESSAGE = Message(b"a.b")


class HangingCalls:
    """Hangs every call of a kind, or signatures of some references alone, until it is released."""

    def __init__(self, backend: MemoryBackend, call: str = "sign") -> None:
        self.released = threading.Event()
        self.hung = 0
        self._call = call
        backend.before = self

    def __call__(self, call: str) -> None:
        if call == self._call and not self.released.is_set():
            self.hung += 1
            assert self.released.wait(60)


def until(condition: Callable[[], object]) -> None:
    end = time.perf_counter() + 20
    while not condition():
        assert time.perf_counter() < end
        time.sleep(0.005)


def make(*, in_place: bool, **limits: Any) -> tuple[Backends, MemoryBackend, Signer]:
    backend = MemoryBackend(sign_in_place=in_place)
    alg = ALGORITHMS["ES256"]
    made = backend.generate("key", alg)
    signer = Signer(jose.thumbprint(made.public_jwk), alg, "memory", made.ref, dict(made.public_jwk), "")
    return (
        Backends({"memory": backend}, default="memory", limits={"memory": CallLimits(**{"timeout": 0.1} | limits)}),
        backend,
        signer,
    )


def lose(backends: Backends, signer: Signer, count: int = 1) -> None:
    """Have so many calls hang; on a busy machine some may not even get so far."""
    while backends.stuck() < count:
        with pytest.raises(errors.BackendTimeout):
            backends.sign(signer, MESSAGE)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Let time pass for those who look at the monotonic clock now and then; waiting for locks takes what it takes."""
    offset, real = [0.0], time.monotonic
    monkeypatch.setattr("kms_jwks.backends.calling.time.monotonic", lambda: real() + offset[0])

    def pass_(seconds: float) -> None:
        offset[0] += seconds

    return pass_  # type: ignore[return-value]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_signature_is_made_by_the_thread_that_the_backend_wants(in_place: bool) -> None:
    backends, backend, signer = make(in_place=in_place, timeout=20)
    threads: list[int] = []
    backend.before = lambda _: threads.append(threading.get_ident())
    jose.verify_signature(signer.alg, signer.public_jwk, MESSAGE.data, backends.sign(signer, MESSAGE))
    assert (threads == [threading.get_ident()]) is in_place
    assert backends.counters("memory") == {"checked": 1, "bad": 0, "timeouts": 0, "refused": 0, "stuck": 0}


def test_names_that_are_not_configured() -> None:
    backends, _, signer = make(in_place=True)
    for use in (lambda: backends.get("x"), lambda: backends.counters("x"), lambda: backends.ask("x", "ping", bool)):
        with pytest.raises(errors.BackendUnknown):
            use()
    with pytest.raises(errors.BackendUnknown):
        backends.sign(Signer("k", signer.alg, "x", signer.ref, signer.public_jwk, ""), MESSAGE)


def test_a_timeout_in_the_pool_makes_the_next_signatures_checked() -> None:
    backends, backend, signer = make(in_place=False, check_signatures=0)
    held = HangingCalls(backend)
    assert backends._entries["memory"].checker._wary_until == 0.0
    lose(backends, signer)
    assert backends._entries["memory"].checker._wary_until > 0.0
    assert backends.counters("memory")["timeouts"] >= 1
    held.released.set()


def test_a_process_is_worn_out_once_enough_calls_never_came_back(later: Callable[[float], None]) -> None:
    backends, backend, signer = make(in_place=False, stuck_limit=2)
    held = HangingCalls(backend)
    for lost in (1, 2):
        lose(backends, signer, lost)
        later(5.0)
        first, second = backends.worn_out(), backends.worn_out()
        assert first is None, "what was not late at the look before is looked at again"
        assert (second is not None) is (lost == 2)
    assert second is not None
    assert "memory" in second
    held.released.set()
    until(lambda: backends.stuck() == 0)
    assert backends.worn_out() is None


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        ({}, 8),
        ({"stuck_limit": 20}, 16),
        ({"parallel": 8}, 4),
        ({"parallel": 1}, 1),
        ({"waiting": 4, "parallel": 64}, 2),
        ({"stuck_limit": 1}, 1),
    ],
)
def test_a_process_is_replaced_before_half_of_the_modules_room_is_lost(limits: dict[str, Any], most: int) -> None:
    assert CallLimits(**limits).most_stuck == most


def test_one_thread_lost_in_place_is_enough(later: Callable[[float], None]) -> None:
    backends, backend, signer = make(in_place=True)
    held = HangingCalls(backend)

    def sign() -> None:
        with contextlib.suppress(errors.BackendTimeout):  # it came back too late
            backends.sign(signer, MESSAGE)

    thread = threading.Thread(target=sign)
    thread.start()
    until(lambda: held.hung)
    assert [backends.worn_out(), backends.worn_out(), backends.stuck()] == [None, None, 0], "there is patience"
    later(PATIENCE_IN_PLACE + 1)
    assert backends.lost_threads() == {thread.ident}
    assert backends.worn_out() is None
    assert backends.worn_out() is not None
    assert backends.counters("memory")["stuck"] == 1
    held.released.set()
    thread.join(20)
    assert [backends.lost_threads(), backends.worn_out(), backends.stuck()] == [frozenset(), None, 0]


def test_a_question_is_asked_in_a_thread_that_can_be_lost(later: Callable[[float], None]) -> None:
    backends, backend, signer = make(in_place=True)
    held = HangingCalls(backend, "ping")
    while backends.stuck() < 2:
        with pytest.raises(errors.BackendTimeout):
            backends.ask("memory", "ping", lambda b: b.ping(), 0.05)
    with pytest.raises(errors.BackendUnavailable):
        backends.ask("memory", "ping", lambda b: b.ping(), 30)
    assert backends.ask("memory", "capabilities", lambda b: b.capabilities()) == backend.offered
    assert backends.sign(signer, MESSAGE)
    later(5)
    assert backends.worn_out() is None
    assert "questions" in (backends.worn_out() or "")
    held.released.set()
    until(lambda: backends.stuck() == 0)
    assert backends.ask("memory", "ping", lambda b: b.ping()).description


def test_unanswered_questions_count_among_the_calls_that_did_not_return(later: Callable[[float], None]) -> None:
    """Each keeps a session of the module: with few sessions one is enough."""
    backends, backend, _ = make(in_place=True, parallel=1)
    held = HangingCalls(backend, "ping")
    with pytest.raises(errors.BackendTimeout):
        backends.ask("memory", "ping", lambda b: b.ping(), 0.05)
    assert backends.stuck_in("memory") == 1
    later(30)
    assert backends.worn_out() is None
    assert "1 calls have not come back" in (backends.worn_out() or "")
    held.released.set()
    until(lambda: backends.stuck() == 0)
    assert backends.worn_out() is None


@pytest.mark.parametrize("late", [True, False])
def test_a_call_that_succeeds_after_its_caller_was_answered_is_undone(late: bool) -> None:
    backends, backend, signer = make(in_place=True)
    held = HangingCalls(backend, "generate")
    if not late:
        held.released.set()

    def generate() -> GeneratedKey:
        return backends.ask(
            "memory",
            "generate",
            lambda b: b.generate("another", signer.alg),
            0.2 if late else 20,
            undo=lambda b, made: b.destroy(made.ref),
        )

    if late:
        with pytest.raises(errors.BackendTimeout):
            generate()
        assert backends.stuck_in("memory") == held.hung == 1
        with structlog.testing.capture_logs() as logs:
            held.released.set()
            until(lambda: backends.stuck_in("memory") == 0)
        assert [line["event"] for line in logs] == ["late_call_undone"]
        assert [stored.label for stored in backend.list_keys("")] == ["key"]
    else:
        assert backend.public_key(generate().ref)


@pytest.mark.parametrize("hangs", ["ping", "public_key", "attributes"])
def test_doctor_reports_a_module_that_hangs(world: World, hangs: str) -> None:
    """Within the timeouts that the backend gives."""
    world.create()
    world.start()
    world.until(lambda: any(version.ref for version in world.versions()))
    world.backend.timeouts = CallTimeouts(read=0.1, change=0.1)  # type: ignore[attr-defined]
    backends = world.backends()
    assert backends.timeouts("memory").read == 0.1
    held = HangingCalls(world.backend, hangs)
    checks = list(module("memory", backends, world.registry, Registry.of(world.registry)))
    assert State.FAILURE in {check.state for check in checks}
    assert "still working on the call" in checks[-1].detail
    assert held.hung >= 1
    held.released.set()


def test_a_call_that_fails_late_is_not_undone() -> None:
    backends, backend, _ = make(in_place=True)
    held = HangingCalls(backend, "ping")

    def fail(b: Backend) -> None:
        b.ping()
        raise errors.BackendRefused("no")

    undone: list[None] = []
    with pytest.raises(errors.BackendTimeout):
        backends.ask("memory", "fail", fail, 0.1, undo=lambda _, answer: undone.append(answer))
    held.released.set()
    until(lambda: backends.stuck() == 0)
    with pytest.raises(errors.BackendRefused):
        backends.ask("memory", "fail", fail, 20, undo=lambda _, answer: undone.append(answer))
    assert undone == []


@pytest.mark.parametrize("in_place", [True, False])
def test_what_the_backend_left_behind_itself_counts_too(in_place: bool) -> None:
    """A backend of another package may abandon calls by itself and say so in `stuck`."""
    backends, backend, _ = make(in_place=in_place, stuck_limit=2)
    seen = []
    for stuck in (1, 1, 2, 2, 0, 2, 0):
        backend.stuck = stuck  # type: ignore[attr-defined]
        seen.append(backends.worn_out() is not None)
        assert backends.stuck() == backends.counters("memory")["stuck"] == stuck
    assert seen == [False, False, False, True, False, False, False], "at two looks in a row"


def test_a_backend_that_lets_nobody_in_any_more_wears_a_process_out_whatever_the_limit() -> None:
    backends, backend, _ = make(in_place=False, stuck_limit=40, waiting=200)
    backend.stuck = MAX_ABANDONED_CALLS - 1  # type: ignore[attr-defined]
    assert [backends.worn_out(), backends.worn_out()] == [None, None]
    backend.stuck = MAX_ABANDONED_CALLS  # type: ignore[attr-defined]
    assert backends.worn_out() is None
    assert "have not come back" in (backends.worn_out() or "")


def test_what_is_stuck_is_left_open_at_the_end() -> None:
    closed: list[str] = []

    class Closing(MemoryBackend):
        def close(self) -> None:
            closed.append(self.name)

    stuck, well = Closing("stuck", sign_in_place=False), Closing("well", sign_in_place=False)
    made = stuck.generate("key", ALGORITHMS["ES256"])
    signer = Signer("kid", ALGORITHMS["ES256"], "stuck", made.ref, dict(made.public_jwk), "")
    backends = Backends({"stuck": stuck, "well": well}, default=None, limits={"stuck": CallLimits(0.05)})
    held = HangingCalls(stuck)
    lose(backends, signer)
    backends.close()
    assert closed == ["well"]
    held.released.set()


# --- through the service


def test_wrong_signatures_are_seen_where_backends_are_listed(world: World) -> None:
    world.create(keys=[{"name": "default", "alg": "RS256", "rsa_bits": 2048}])
    left = [2]

    def spoil(signature: bytes) -> bytes:
        left[0] -= 1
        return signature if left[0] < 0 else signature[:-1] + bytes([signature[-1] ^ 1])

    world.backend.spoil = spoil
    with pytest.raises(errors.BackendUnavailable):
        world.sign()
    assert world.sign().token
    (listed,) = world.service.operation.backends(world.admin).items
    assert listed.counters == {"checked": 3, "bad": 2, "timeouts": 0, "refused": 0, "stuck": 0}
    assert listed.recycled == 0
    assert len(world.backend.distrusted) == 2


def test_a_service_asks_to_be_replaced_once_and_not_again_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    service: Service = world.service
    assert service.worn_out() is None
    monkeypatch.setattr(service.backends, "worn_out", lambda: "a reason")
    assert service.worn_out() == "a reason"
    for _ in range(world.settings.workers - 1):
        world.until(lambda: service.worn_out() == "a reason")
    assert service.worn_out() is None
    assert service.restart_limit.count() == world.settings.workers
    (listed,) = service.operation.backends(world.admin).items
    assert listed.recycled == world.settings.workers


# --- loss and recovery


def test_loss_and_recovery_are_logged_once_each_with_the_length_of_the_outage(later: Callable[[float], None]) -> None:
    backends, backend, signer = make(in_place=True)
    with structlog.testing.capture_logs() as logs:
        assert backends.sign(signer, MESSAGE)
        assert backends.states == {"memory": "ok"}
        backend.fail = errors.BackendUnavailable("The token is away.")
        for _ in range(5):
            with pytest.raises(errors.BackendUnavailable):
                backends.sign(signer, MESSAGE)
        assert backends.states == {"memory": "backend_unavailable"}
        later(30)
        with pytest.raises(errors.BackendUnavailable):
            backends.probe("memory", lambda b: b.ping(), 5)
        backend.fail = None
        assert backends.sign(signer, MESSAGE)
        assert [line["event"] for line in logs] == ["backend_lost"], "not while failures and successes take turns"
        later(2)
        for _ in range(3):
            assert backends.sign(signer, MESSAGE)
    lost, recovered = logs
    assert recovered["seconds"] < 35, "up to the first success, not to the line about it"
    assert (lost["log_level"], lost["backend"], lost["code"]) == ("warning", "memory", "backend_unavailable")
    assert lost["detail"] == "The token is away."
    assert (recovered["event"], recovered["log_level"]) == ("backend_recovered", "info")
    assert recovered["seconds"] >= 30


@pytest.mark.parametrize(
    "error",
    [
        errors.BackendKeyNotFound("The module does not hold this key."),
        errors.UnsupportedAlgorithm("not here"),
        errors.BackendThrottled("later", retry_after=1),
        errors.BackendRefused("The key is disabled."),
    ],
)
def test_what_concerns_one_key_or_one_call_is_no_loss_of_the_module(error: errors.BackendError) -> None:
    backends, backend, signer = make(in_place=False)
    backend.fail = error
    with structlog.testing.capture_logs() as logs:
        with pytest.raises(type(error)):
            backends.sign(signer, MESSAGE)
        backend.fail = None
        assert backends.sign(signer, MESSAGE)
    assert logs == []


def test_a_timeout_in_the_pool_counts_as_a_loss() -> None:
    backends, backend, signer = make(in_place=False)
    held = HangingCalls(backend)
    with structlog.testing.capture_logs() as logs:
        lose(backends, signer)
    held.released.set()
    assert [(line["event"], line["code"]) for line in logs] == [("backend_lost", "backend_timeout")]


def test_a_refused_sign_of_life_is_a_loss() -> None:
    backends, backend, _ = make(in_place=True)
    backend.fail = errors.BackendRefused("The PIN was refused.")
    with structlog.testing.capture_logs() as logs, pytest.raises(errors.BackendRefused):
        backends.probe("memory", lambda b: b.ping(), 5)
    assert [(line["event"], line["code"]) for line in logs] == [("backend_lost", "backend_refused")]


def test_a_slow_question_that_comes_back_costs_no_worker(later: Callable[[float], None]) -> None:
    backends, backend, _ = make(in_place=True, parallel=1)
    held = HangingCalls(backend, "ping")
    while backends.stuck() < 1:
        with pytest.raises(errors.BackendTimeout):
            backends.ask("memory", "ping", lambda b: b.ping(), 0.05)
    later(9)
    assert [backends.worn_out(), backends.worn_out()] == [None, None], "a backend may take that long by itself"
    later(9)
    assert [backends.worn_out(), backends.worn_out()] != [None, None]
    held.released.set()
    until(lambda: backends.stuck() == 0)
    assert backends.worn_out() is None
