"""The database commits and its answer is lost: the commit counts, no key pair or registration is made twice, and no
change waits for a worker that does not exist."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kms_jwks import errors, wire
from kms_jwks.backends.base import KeyRef
from kms_jwks.model import Epoch, IntentState, VersionState
from kms_jwks.service.definitions import add_key_set
from kms_jwks.store import Store
from kms_jwks.worker import registration
from tests.service.world import World


def lose_answers(monkeypatch: pytest.MonkeyPatch, store: Store, when: Callable[[Any], bool] = lambda _: True) -> None:
    """Every write that `when` (the transaction at its end) picks is committed, and its answer lost."""
    real = store.write

    @contextlib.contextmanager
    def write() -> Iterator[Any]:
        with real() as tx:
            yield tx
            lost = when(tx)
        if lost:
            raise errors.StoreUnavailable("the answer was lost", retry_after=1)

    monkeypatch.setattr(store, "write", write)


def away(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    """The database does not answer any more."""

    def refuse() -> Any:
        raise errors.StoreUnavailable("away", retry_after=1)

    for way in ("write", "read", "poll"):
        monkeypatch.setattr(store, way, refuse)


def test_a_worker_whose_registration_was_not_answered_is_registered_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = world.worker()
    with monkeypatch.context() as patched:
        lose_answers(patched, late.store)
        for _ in range(3):
            late.sync.poll()
    assert late.sync.trouble is not None
    late.sync.poll()
    assert late.sync.has_lease()
    with world.registry.read() as tx:
        assert [w.id for w in tx.workers(include_stopped=True)] == [
            world.service.sync.worker_id,
            late.sync.worker_id,
        ]
    late.stop()


@pytest.mark.parametrize("registered", [True, False])
def test_a_worker_that_cannot_deregister_is_deregistered_by_another(
    world: World, monkeypatch: pytest.MonkeyPatch, registered: bool
) -> None:
    """Other nodes cannot detect that it ended, and every revocation would wait for it."""
    late = world.worker()
    with monkeypatch.context() as patched:
        if not registered:
            lose_answers(patched, late.store)
        late.sync.poll()
        away(patched, late.store)
        late.stop()
    with world.registry.read() as tx:
        assert len(tx.workers()) == 2

    def alone() -> bool:
        with world.registry.read() as tx:
            return [w.id for w in tx.workers()] == [world.service.sync.worker_id]

    world.until(alone)


def test_dead_workers_are_deregistered_without_a_custodian(quiet: World) -> None:
    """A node that only publishes has no custodian, and the custodian of another may stand by."""
    late = quiet.worker()
    late.sync.poll()
    lock = late.sync._registration._lock
    assert lock is not None
    lock.release(keep_file=True)

    def deregistered() -> bool:
        with quiet.registry.read() as tx:
            return [w.stop_reason for w in tx.workers(include_stopped=True)] == [None, "died"]

    quiet.until(deregistered)
    quiet.until(lambda: registration.dead_workers(quiet.settings.state_dir / "workers") == [])
    late.store.dispose()


def test_a_change_that_was_committed_is_answered_though_the_workers_cannot_be_asked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.create()
    control = world.worker()
    real, done = control.store.write, []

    @contextlib.contextmanager
    def write() -> Iterator[Any]:
        with real() as tx:
            yield tx
        done.append(tx.committed_epoch)
        away(monkeypatch, control.store)

    monkeypatch.setattr(control.store, "write", write)
    assert control.clients.create(world.admin, wire.ClientCreate(name="fresh")).name == "fresh"
    assert done != [None]
    monkeypatch.undo()
    with pytest.raises(errors.NameTaken):
        control.clients.create(world.admin, wire.ClientCreate(name="fresh"))


def test_a_revocation_returns_after_the_lease_though_the_database_went_away(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    confirmation = world.service.confirmation
    stale = Epoch(world.service.sync.snapshot().epoch.incarnation, 10**9)
    asked: list[int] = []
    real = confirmation._store.read

    @contextlib.contextmanager
    def read() -> Iterator[Any]:
        if asked:
            raise errors.StoreUnavailable("away", retry_after=1)
        asked.append(1)
        with real() as tx:
            yield tx

    with monkeypatch.context() as patched:
        patched.setattr(confirmation._store, "read", read)
        began = time.monotonic()
        assert [w.id for w in confirmation.wait_until_confirmed(stale, 0)] == [world.service.sync.worker_id]
        assert time.monotonic() - began >= 1
        with pytest.raises(errors.StoreUnavailable):
            confirmation.wait_until_confirmed(stale, 0)


def test_a_pair_whose_record_was_not_answered_is_not_destroyed(quiet: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the key that signs from now on."""
    control = quiet.service.key_sets._control
    with quiet.store().write() as tx:
        add_key_set(tx, control, wire.KeySetCreate(name="main", keys=[wire.KeyCreate(name="default", alg="ES256")]))
    custodian = quiet.custodian()

    def tick() -> bool:
        custodian.tick()
        return False

    def records_a_pair(tx: Any) -> bool:
        return any(i.state is IntentState.DONE for i in tx.intents())

    with monkeypatch.context() as patched:
        lose_answers(patched, custodian._store, records_a_pair)
        with pytest.raises(errors.StoreUnavailable):
            quiet.until(tick)

    def signs() -> bool:
        custodian.tick()
        return any(v.state is VersionState.ACTIVE for v in quiet.versions())

    quiet.until(signs)
    for version in quiet.versions():
        if version.ref is not None:
            quiet.backend.public_key(KeyRef.of(**version.ref))

    def issued() -> bool:
        with contextlib.suppress(errors.NoActiveVersion):
            return bool(quiet.sign().token)
        return False

    quiet.until(issued)
