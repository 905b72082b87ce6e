"""A worker's sync with the registry: lease, confirmation, what is served without the database, and what is logged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog.testing

from kms_jwks import errors, wire
from kms_jwks.model import SECOND
from kms_jwks.service.guard import RequestContext
from kms_jwks.worker import registration
from tests.service.world import World


def worker_row(world: World):  # type: ignore[no-untyped-def]
    with world.registry.read() as tx:
        return tx.worker(world.service.sync.worker_id or "")  # type: ignore[arg-type]


def test_a_change_is_confirmed_by_every_worker_before_its_answer(two_workers: World) -> None:
    world = two_workers
    world.create()
    world.standby()  # the custodian changes nothing more
    created = world.service.clients.create(world.admin, wire.ClientCreate(name="fresh"))
    assert created.name == "fresh"
    with world.registry.read() as tx:
        epoch = tx.epoch()
        assert all(w.confirmed == epoch for w in tx.workers())


def test_an_epoch_is_confirmed_only_once_older_answers_have_left(world: World) -> None:
    world.create()
    world.standby()
    release = world.service.sync.pin()
    kept = world.service.sync.snapshot().epoch
    world.service.clients.create(world.admin, wire.ClientCreate(name="fresh"))
    world.until(lambda: world.service.sync.snapshot().epoch != kept)
    row = worker_row(world)
    assert row.confirmed is not None
    assert row.confirmed.counter <= kept.counter
    release()
    release()
    with world.registry.read() as tx:
        epoch = tx.epoch()
    world.until(lambda: worker_row(world).confirmed == epoch)


def test_a_revocation_waits_for_an_answer_under_way_but_not_beyond_the_lease(tmp_path: Path) -> None:
    world = World(tmp_path, lease=1).start()
    try:
        world.create()
        world.standby()
        world.service.sync.pin()
        answer = world.service.revocation.revoke_version(world.admin, "main", "default", "1", wire.RevokeRequest())
        assert [w.worker for w in answer.unconfirmed] == [world.service.sync.worker_id]
    finally:
        world.close()


def test_without_the_database_documents_are_served_and_signing_ends(world: World, tmp_path: Path) -> None:
    world.create()
    world.service.sync.poll()
    registry = tmp_path / "registry.sqlite3"
    registry.rename(tmp_path / "away")
    world.service.store.dispose()
    assert world.sign().token
    world.offset += 11 * SECOND
    with pytest.raises(errors.RegistryStale):
        world.sign()
    assert world.kids()
    readiness = world.service.operation.ready_sign(RequestContext())
    assert readiness.status == "failing"
    assert readiness.dependencies[0].state == "registry_stale"
    assert world.service.operation.ready().status == "ok"
    (tmp_path / "away").rename(registry)
    world.until(world.service.sync.has_lease)
    assert world.sign().token


def test_a_worker_that_starts_without_a_database_serves_the_last_documents(world: World, tmp_path: Path) -> None:
    world.create()
    world.until(lambda: len(world.kids()) == 2)
    kids = world.kids()
    kept = world.settings.state_dir / "jwks.json"
    world.until(lambda: all(kid in kept.read_text() for kid in kids))
    (tmp_path / "registry.sqlite3").rename(tmp_path / "away")
    late = world.worker()
    late.start()
    try:
        assert world.kids(late) == kids
        assert late.operation.ready().status == "ok"
        with pytest.raises(errors.Unavailable):
            late.sync.leased()
    finally:
        (tmp_path / "away").rename(tmp_path / "registry.sqlite3")
        world.until(late.sync.has_lease)
        late.stop()


def test_restricted_documents_are_not_kept_on_disk(world: World, tmp_path: Path) -> None:
    world.create("hidden", access="restricted")
    world.create("shown", keys=[{"name": "default", "alg": "ES256"}])
    world.service.sync.poll()
    kept = (tmp_path / "state" / "jwks.json").read_text()
    assert "shown" in kept
    assert "hidden" not in kept


def test_a_restricted_set_needs_a_grant(world: World) -> None:
    world.create("hidden", access="restricted")
    with pytest.raises(errors.CredentialsMissing):
        world.service.verifiers.jwks(RequestContext(), "hidden")
    document = world.service.verifiers.jwks(world.signer, "hidden")
    assert document.cache_control.startswith("private")
    assert not document.public


def test_a_dead_worker_is_deregistered_because_its_lock_is_free(two_workers: World) -> None:
    world = two_workers
    world.create()
    dead = world.workers[1].sync
    dead._stop.set()
    dead._kick.set()
    assert dead._thread is not None
    dead._thread.join()
    lock = dead._registration._lock
    assert lock is not None
    folder = world.settings.state_dir / "workers"
    assert not registration.is_dead(folder, dead.worker_id or "")  # type: ignore[arg-type]
    import os

    os.close(lock._fd)  # what the kernel does when a process ends
    lock._fd = -1
    world.standby()
    answer = world.service.revocation.revoke_version(world.admin, "main", "default", "1", wire.RevokeRequest())
    assert answer.unconfirmed == []
    with world.registry.read() as tx:
        assert [w.id for w in tx.workers()] == [world.service.sync.worker_id]


def test_a_missing_lock_file_proves_nothing(tmp_path: Path) -> None:
    assert not registration.is_dead(tmp_path, "unknown")  # type: ignore[arg-type]


def test_a_worker_that_was_forgotten_comes_back_as_another(world: World) -> None:
    world.create()
    old = world.service.sync.worker_id
    with pytest.raises(errors.Conflict):
        world.service.operation.forget(world.admin, old or "")
    with world.store().write() as tx:
        row = tx.worker(old)  # type: ignore[arg-type]
        assert row is not None
        tx.save(replace(row, stopped_at=tx.now(), stop_reason="forgotten"))
    world.offset += 6 * SECOND
    world.until(lambda: world.service.sync.worker_id not in (None, old))
    world.until(world.service.sync.has_lease)
    assert world.sign().token


def test_last_use_is_flushed_by_the_minute_and_does_not_move_the_epoch(world: World) -> None:
    world.create()
    world.sign()
    world.standby()
    world.until(lambda: len(world.kids()) == 2)
    with world.registry.read() as tx:
        before = tx.epoch()
    world.offset += 61 * SECOND

    def used() -> bool:
        with world.registry.read() as tx:
            return any(t.last_used_at is not None for t in tx.tokens())

    world.until(used)
    with world.registry.read() as tx:
        assert tx.epoch() == before


def test_discovery_only_where_the_issuer_is_the_url(world: World) -> None:
    world.create()
    world.create("elsewhere", issuer="https://other.example", keys=[{"name": "default", "alg": "ES256"}])
    import msgspec

    document = world.service.verifiers.discovery(RequestContext(), "main")
    found = msgspec.json.decode(document.body)
    assert found["issuer"] == "https://keys.example/main"
    assert found["jwks_uri"] == "https://keys.example/main/.well-known/jwks.json"
    assert found["id_token_signing_alg_values_supported"] == ["ES256"]
    with pytest.raises(errors.RouteNotFound, match=r"is https://other\.example"):
        world.service.verifiers.discovery(RequestContext(), "elsewhere")
    with pytest.raises(errors.CredentialsMissing):  # as for a restricted set: there is no default key set
        world.service.verifiers.discovery(RequestContext(), None)


# --- what the log says


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[World]:
    """A world without threads: the test makes the only worker poll."""
    made = World(tmp_path)
    made.service.sync.poll()
    yield made
    made.close()


def take_away(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    """The database of the only worker does not answer."""

    def refuse() -> Any:
        raise errors.StoreUnavailable("away", retry_after=1)

    for way in ("write", "read", "poll"):
        monkeypatch.setattr(world.service.store, way, refuse)


def lines(logs: list[Any], *fields: str) -> list[tuple[Any, ...]]:
    names = ("database_lost", "database_recovered", "lease_lost", "lease_regained")
    return [tuple(line.get(f) for f in ("event", "log_level", *fields)) for line in logs if line["event"] in names]


def test_loss_and_recovery_of_database_and_lease_are_logged_once_with_their_duration(
    silent: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = silent.service.sync
    with structlog.testing.capture_logs() as logs:
        with monkeypatch.context() as patched:
            take_away(patched, silent)
            for seconds in (0, 1, 8, 4, 1):
                silent.offset += seconds * SECOND
                sync.poll()
        silent.offset += 2 * SECOND
        sync.poll()
        sync.poll()
    assert lines(logs, "detail", "code", "process", "lease") == [
        ("database_lost", "warning", "away", "store_unavailable", "worker", None),
        ("lease_lost", "warning", "away", None, None, 10),
        ("lease_regained", "info", None, None, None, None),
        ("database_recovered", "info", None, None, "worker", None),
    ]
    regained, recovered = (line["seconds"] for line in logs if "seconds" in line)
    assert 6 <= regained < 7, "since the lease ended, not since a poll noticed it"
    assert 16 <= recovered < 17


def test_a_lease_that_ended_between_two_polls_is_logged_too(silent: World) -> None:
    """As after a suspended machine: the database answers at once."""
    with structlog.testing.capture_logs() as logs:
        silent.offset += 15 * SECOND
        silent.service.sync.poll()
    assert [line[0] for line in lines(logs)] == ["lease_lost", "lease_regained"]
    assert 5 <= logs[-1]["seconds"] < 6


def test_a_worker_that_was_deregistered_logs_the_loss_of_its_lease(silent: World) -> None:
    sync = silent.service.sync
    with silent.registry.write() as tx:
        row = tx.worker(sync.worker_id or "")  # type: ignore[arg-type]
        assert row is not None
        tx.save(replace(row, stopped_at=tx.now(), stop_reason="forgotten"))
    with structlog.testing.capture_logs() as logs:
        silent.offset += 6 * SECOND
        sync.poll()
        assert not sync.has_lease()
        sync.poll()
    assert sync.has_lease()
    assert [line["event"] for line in logs] == ["worker_deregistered_by_other", "lease_lost", "lease_regained"]
    assert "deregistered" in logs[1]["detail"]


def test_a_first_poll_and_an_orderly_stop_log_no_loss(tmp_path: Path) -> None:
    world = World(tmp_path)
    with structlog.testing.capture_logs() as logs:
        world.service.sync.poll()
        world.service.sync.poll()
        world.close()
    assert lines(logs) == []


# --- another node of the same name


def test_a_node_that_runs_under_this_node_s_name_is_found(tmp_path: Path) -> None:
    world = World(tmp_path)
    other, here = world.service.sync, tmp_path / "elsewhere"
    try:
        assert registration.living_namesake(world.registry, "node-1", here) is None
        other.poll()

        def live(seconds: float) -> None:
            world.offset += int(seconds * SECOND)
            other.poll()

        def be_dead(seconds: float) -> None:
            world.offset += int(seconds * SECOND)

        found = registration.living_namesake(world.registry, "node-1", here, live)
        assert found is not None
        assert found.id == other.worker_id
        assert registration.living_namesake(world.registry, "node-2", here, live) is None, "another name"
        assert registration.living_namesake(world.registry, "node-1", tmp_path / "state", live) is None, (
            "it is this very node"
        )
        assert registration.living_namesake(world.registry, "node-1", here, be_dead) is None, "it was killed"
    finally:
        world.close()
