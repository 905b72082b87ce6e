"""The custodian: one acts, a crash at any point loses nothing, clocks that step stop it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import structlog.testing

from kms_jwks import errors, wire
from kms_jwks.custodian import leader_lease, loop
from kms_jwks.custodian.leader_lease import Fenced
from kms_jwks.custodian.loop import Custodian
from kms_jwks.doctor import find_orphans
from kms_jwks.model import DAY, SECOND, IntentState, VersionState
from tests.service.world import World

S = VersionState


class Crash(BaseException):
    """Ends a custodian as kill -9 would."""


def ask(world: World) -> None:
    """Request a key set with one key, without waiting for it."""
    from kms_jwks.service.definitions import add_key_set

    with world.store().write() as tx:
        request = wire.KeySetCreate(name="main", keys=[wire.KeyCreate(name="default", alg="ES256")])
        add_key_set(tx, world.service.key_sets._control, request)


def settle(world: World, custodian: Custodian) -> None:
    """Tick until the first version signs and its standby is published."""

    def done() -> bool:
        custodian.tick()
        states = [v.state for v in world.versions()]
        return S.ACTIVE in states and S.PUBLISHED in states

    world.until(done)


def surplus(world: World) -> set[str]:
    """Pairs in the module that no version refers to."""
    held = {v.ref["label"] for v in world.versions() if v.ref}
    return {stored.label for stored in world.backend.list_keys("kj-")} - held


def test_the_whole_way(quiet: World) -> None:
    ask(quiet)
    settle(quiet, quiet.custodian())
    assert surplus(quiet) == set()
    with quiet.registry.read() as tx:
        assert all(i.state is IntentState.DONE for i in tx.intents())


@pytest.mark.parametrize("point", ["generate", "generated", "attributes"])
def test_an_attempt_that_a_crash_interrupted_is_abandoned_and_repeated(quiet: World, point: str) -> None:
    ask(quiet)
    first = quiet.custodian()

    def crash(name: str) -> None:
        if name == point:
            raise Crash

    quiet.backend.before = crash
    with pytest.raises(Crash):
        first.tick()
    quiet.backend.before = lambda _: None
    second = quiet.custodian()
    second.tick()
    with quiet.registry.read() as tx:
        lease = tx.custodian_lease()
        assert lease is not None
        assert lease.term == 1, "the first one's lease still runs"
    quiet.advance(11)
    settle(quiet, second)
    with quiet.registry.read() as tx:
        states = [i.state for i in tx.intents()]
    assert states.count(IntentState.ABANDONED) == 1
    # A key pair that was made and not recorded is surplus: doctor lists it, no version adopts it.
    assert len(surplus(quiet)) == (0 if point == "generate" else 1)
    with pytest.raises(Fenced):
        first._intents._record(*_made(quiet))


def _made(world: World):  # type: ignore[no-untyped-def]
    from kms_jwks.algorithms import ALGORITHMS

    with world.registry.read() as tx:
        intent = tx.intents()[0]
    made = world.backend.generate("late", ALGORITHMS["ES256"])
    return intent, made, world.backend.attributes(made.ref)


def test_a_crash_before_a_destruction_is_recorded_is_repeated(quiet: World) -> None:
    ask(quiet)
    custodian = quiet.custodian()
    settle(quiet, custodian)
    revoke = threading.Thread(
        target=lambda: quiet.service.revocation.revoke_version(
            quiet.admin, "main", "default", "1", wire.RevokeRequest()
        )
    )
    revoke.start()
    revoke.join()
    settle(quiet, custodian)
    quiet.advance(31 * DAY)

    def crash(name: str) -> None:
        if name == "destroyed":
            raise Crash

    quiet.backend.before = crash
    with pytest.raises(Crash):
        quiet.until(custodian.tick)
    assert quiet.version(1).state is S.REVOKED
    quiet.backend.before = lambda _: None
    quiet.advance(11)
    second = quiet.custodian()

    def destroyed() -> bool:
        second.tick()
        return quiet.version(1).state is S.DESTROYED

    quiet.until(destroyed)


def test_one_acts_and_the_other_takes_over_when_it_releases_the_lease(quiet: World) -> None:
    first, second = quiet.custodian(), quiet.custodian()
    first.tick()
    second.tick()
    assert (first._leader_lease.term, second._leader_lease.term) == (1, 0)
    first._leader_lease.release()
    second.tick()
    assert second._leader_lease.term == 2
    first.tick()
    assert first._leader_lease.term == 0


def test_a_custodian_that_was_away_past_its_lease_changes_nothing(quiet: World) -> None:
    first, second = quiet.custodian(), quiet.custodian()
    first.tick()
    quiet.advance(11)
    second.tick()
    ask(quiet)
    with quiet.registry.read() as tx:
        (intent,) = tx.intents()
    with pytest.raises(Fenced):
        first._intents.start(intent)
    assert quiet.backend.keys == {}


def test_a_module_that_is_away_is_tried_again_later_under_a_new_label(quiet: World) -> None:
    ask(quiet)
    custodian = quiet.custodian()
    quiet.backend.fail = errors.BackendUnavailable("away")
    custodian.tick()
    custodian.tick()
    with quiet.registry.read() as tx:
        failed, waiting = tx.intents()
    assert (failed.state, waiting.state, waiting.attempt) == (IntentState.FAILED, IntentState.PENDING, 2)
    assert failed.label != waiting.label
    assert waiting.not_before - waiting.created_at >= SECOND
    quiet.backend.fail = None
    quiet.advance(3)
    settle(quiet, custodian)


def test_an_algorithm_that_the_module_lacks_is_an_answer_not_a_loop(world: World) -> None:
    world.backend.fail = errors.UnsupportedAlgorithm("no such mechanism")
    with pytest.raises(errors.UnsupportedAlgorithmRequested):
        world.create()
    world.backend.fail = None
    with world.registry.read() as tx:
        assert [v.state for v in tx.versions()] == [S.DESTROYED]


@pytest.mark.parametrize("step", [-5 * SECOND, 120 * SECOND])
def test_a_database_clock_that_steps_halts_it_until_it_agrees_again(quiet: World, step: int) -> None:
    ask(quiet)
    shift = 0
    custodian = quiet.custodian(boot=lambda: quiet.boot() - shift)
    custodian.tick()
    quiet.offset += step
    shift = step
    before = quiet.versions()
    custodian.tick()
    assert quiet.versions() == before
    with quiet.registry.read() as tx:
        lease = tx.custodian_lease()
    assert lease is not None
    assert lease.halted is not None
    quiet.offset -= step
    shift = 0
    settle(quiet, custodian)


@pytest.mark.parametrize("failure", [errors.BackendUnavailable("away"), RuntimeError("a backend's own defect")])
def test_a_failure_after_the_generation_leaves_no_pair_and_no_open_intent(quiet: World, failure: Exception) -> None:
    ask(quiet)
    custodian = quiet.custodian()

    def fail(name: str) -> None:
        if name == "attributes":
            raise failure

    quiet.backend.before = fail
    for _ in range(4):
        custodian.tick()
        quiet.advance(70)
    assert quiet.backend.keys == {}
    with quiet.registry.read() as tx:
        assert not tx.intents(states={IntentState.STARTED})
        assert len(tx.intents(states={IntentState.PENDING})) == 1
    quiet.backend.before = lambda _: None
    settle(quiet, custodian)


def test_an_attempt_whose_end_could_not_be_recorded_is_repeated_by_the_same_custodian(
    quiet: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(quiet)
    custodian = quiet.custodian()

    def away(*_: object) -> None:
        raise errors.StoreUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(custodian._intents, "_record", away)
        patch.setattr(custodian._intents, "_record_failure", away)
        with pytest.raises(errors.StoreUnavailable):
            custodian.tick()
    settle(quiet, custodian)
    # The custodian could not know whether the first pair was recorded, so it kept it: it is surplus, and listed.
    left = surplus(quiet)
    assert len(left) == 1
    assert left == {orphan.label for orphan in find_orphans(quiet.registry, quiet.backends())}


def test_a_module_slower_than_the_lease_does_not_lose_it(quiet: World) -> None:
    ask(quiet)
    first, second = quiet.custodian(lease=1), quiet.custodian(lease=1)

    def slow(name: str) -> None:
        if name == "generate":
            time.sleep(2.5)

    quiet.backend.before = slow
    assert first._leader_lease.acquire_or_renew(first._intents.abandon_started)
    ticking = threading.Thread(target=first.tick)
    ticking.start()
    while ticking.is_alive():
        second.tick()
        time.sleep(0.05)
    assert second._leader_lease.term == 0
    quiet.backend.before = lambda _: None
    settle(quiet, first)
    assert surplus(quiet) == set()


def test_a_step_that_hangs_is_logged_loses_the_lease_and_is_abandoned(
    quiet: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader_lease, "LONG_STEP", 1.0)
    monkeypatch.setattr(leader_lease, "LONGEST_STEP", 3.0)
    ask(quiet)
    released, abandoned = threading.Event(), threading.Event()
    first, second = quiet.custodian(lease=1, on_stuck_step=abandoned.set), quiet.custodian(lease=1)
    assert first._leader_lease.acquire_or_renew(first._intents.abandon_started)
    term = first._leader_lease.term

    def hang(name: str) -> None:
        if name == "generate":
            released.wait(60)

    quiet.backend.before = hang
    with structlog.testing.capture_logs() as logs:
        ticking = threading.Thread(target=pytest.raises, args=(Fenced, first.tick))
        ticking.start()
        assert abandoned.wait(30)
        quiet.until(lambda: second._leader_lease.acquire_or_renew(second._intents.abandon_started))
    events = [(line["event"], line["log_level"], line["term"]) for line in logs if line["event"].startswith("module_")]
    assert events[0] == ("module_step_takes_long", "warning", term)
    assert events[-1] == ("module_step_abandoned", "error", term)
    released.set()
    ticking.join(20)
    assert not ticking.is_alive()
    settle(quiet, second)


@pytest.mark.parametrize("stuck", [0, 1])
def test_a_step_that_timed_out_in_its_module_is_abandoned(quiet: World, stuck: int) -> None:
    """But not one whose call has left the module by then."""
    ask(quiet)
    abandoned: list[bool] = []
    second = quiet.custodian()
    first = quiet.custodian(
        on_stuck_step=lambda: abandoned.append(second._leader_lease.acquire_or_renew(second._intents.abandon_started))
    )
    quiet.backend.stuck = stuck  # type: ignore[attr-defined]
    quiet.backend.fail = errors.BackendTimeout("late")
    with structlog.testing.capture_logs() as logs, contextlib.suppress(Fenced):
        first.tick()
    assert abandoned == [True] * stuck, "and another custodian may act at once"
    assert len([line for line in logs if line["event"] == "module_step_abandoned"]) == stuck
    quiet.backend.fail = None
    settle(quiet, second if stuck else first)
    assert surplus(quiet) == set()


def test_a_disabled_key_gets_no_pair(quiet: World) -> None:
    ask(quiet)
    quiet.service.keys.disable(quiet.admin, "main", "default")
    custodian = quiet.custodian()
    custodian.tick()
    assert quiet.backend.keys == {}
    quiet.service.keys.enable(quiet.admin, "main", "default")
    settle(quiet, custodian)


def test_labels_fit_and_name_the_installation(quiet: World) -> None:
    ask(quiet)
    settle(quiet, quiet.custodian())
    with quiet.registry.read() as tx:
        prefix = f"kj-{tx.installation().id}-"
    for stored in quiet.backend.list_keys("kj-"):
        assert stored.label.startswith(prefix)
        assert len(stored.label.encode("ascii")) <= 40


# --- what the log says


def test_the_custodian_logs_loss_and_recovery_of_the_database_once_with_the_duration(
    quiet: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    custodian, stop = quiet.custodian(), threading.Event()
    monkeypatch.setattr(loop, "PACE", 0.01)
    refused = 0

    def refuse() -> Any:
        nonlocal refused
        refused += 1
        raise errors.StoreUnavailable("away", retry_after=1)

    def recovered() -> list[Any]:
        return [line for line in logs if line["event"] == "database_recovered" and line["process"] == "custodian"]

    with structlog.testing.capture_logs() as logs:
        running = threading.Thread(target=custodian.run, args=(stop,))
        running.start()
        quiet.until(lambda: custodian._leader_lease.term)
        with monkeypatch.context() as patched:
            for way in ("write", "read"):
                patched.setattr(custodian._store, way, refuse)
            quiet.until(lambda: refused > 3)
            quiet.offset += 7 * SECOND
        quiet.until(recovered)
        stop.set()
        running.join(10)
    ours = [line for line in logs if line.get("process") == "custodian"]
    assert [(line["event"], line["log_level"]) for line in ours] == [
        ("database_lost", "warning"),
        ("database_recovered", "info"),
    ]
    assert (ours[0]["code"], ours[0]["detail"]) == ("store_unavailable", "away")
    assert 7 <= ours[1]["seconds"] < 17


def test_a_tick_that_is_refused_for_another_reason_is_logged_once(
    quiet: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    custodian, stop = quiet.custodian(), threading.Event()
    monkeypatch.setattr(loop, "PACE", 0.01)
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks > 3:
            stop.set()
        raise errors.SchemaMismatch("of tomorrow")

    monkeypatch.setattr(custodian, "tick", tick)
    with structlog.testing.capture_logs() as logs:
        custodian.run(stop)
    assert [(line["event"], line["code"], line["detail"]) for line in logs] == [
        ("custodian_tick_refused", errors.SchemaMismatch.code, "of tomorrow")
    ]


def test_the_leader_lease_is_logged_when_it_is_acquired_lost_and_released(quiet: World) -> None:
    first, second = quiet.custodian(), quiet.custodian(node="node-2")

    def happened(step: Callable[[], object]) -> list[tuple[str, str, int]]:
        with structlog.testing.capture_logs() as logs:
            step()
            step()
        found.extend(logs)
        return [(line["event"], line["log_level"], line["term"]) for line in logs if "leader_lease" in line["event"]]

    found: list[Any] = []
    assert happened(first.tick) == [("leader_lease_acquired", "info", 1)]
    assert happened(second.tick) == []
    quiet.advance(11)
    assert happened(second.tick) == [("leader_lease_acquired", "info", 2)]
    assert happened(first.tick) == [("leader_lease_lost", "warning", 1)]
    assert [line["holder_node"] for line in found if line["event"] == "leader_lease_lost"] == ["node-2"]
    assert happened(second._leader_lease.release) == [("leader_lease_released", "info", 2)]


def test_a_custodian_that_halts_for_its_clocks_logs_that_and_its_return(quiet: World) -> None:
    shift = 0
    custodian = quiet.custodian(boot=lambda: quiet.boot() - shift)
    custodian.tick()
    with structlog.testing.capture_logs() as logs:
        quiet.offset, shift = quiet.offset + 120 * SECOND, 120 * SECOND
        custodian.tick()
        custodian.tick()
        quiet.offset, shift = quiet.offset - 120 * SECOND, 0
        custodian.tick()
    events = [line["event"] for line in logs if line["event"] in ("custodian_halted", "custodian_resumed")]
    assert events == ["custodian_halted", "custodian_resumed"]
