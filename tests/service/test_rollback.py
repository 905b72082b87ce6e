"""A registry that was put back to an older state is not believed: nothing that was revoked since works again.

The old state is put back while the service runs: a copy of SQLite's file, and a PostgreSQL standby that lacks the last
changes.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog.testing

from kms_jwks import errors, wire, wiring
from kms_jwks.access import Role
from kms_jwks.custodian import transitions
from kms_jwks.custodian.leader_lease import LeaderLease
from kms_jwks.model import Epoch
from kms_jwks.service import RequestContext, Service
from kms_jwks.service.clients import add_client
from kms_jwks.service.signing_job import SigningOperation
from kms_jwks.store import Store
from kms_jwks.worker.epoch_record import EpochRecord
from kms_jwks.worker.jwks_cache import JwksCache
from tests.postgres import Postgres, standby
from tests.proxy import Proxy
from tests.service.world import World, back_up, put_back


class Incident:
    """What was revoked after the old state was saved, and what of it must not work again."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.create()
        world.standby()
        world.until(lambda: len(world.kids()) == 2)
        self.old_signer, self.old_admin = world.signer, world.client("old-admin", Role.ADMIN)
        self.sound_signer = world.client("sound-signer", Role.SIGNER)
        self.revoked_kid = str(world.version(1).kid)

    def revoke(self) -> None:
        service, admin = self.world.service, self.world.admin
        for client in ("signer", "old-admin"):
            (token,) = service.clients.tokens(admin, client, 10, None).items
            service.clients.revoke_token(admin, client, token.id)
        service.revocation.revoke_version(admin, "main", "default", "1", wire.RevokeRequest())
        assert self.sign(service, self.sound_signer).kid != self.revoked_kid

    def sign(self, worker: Service, who: RequestContext) -> wire.SignedJwt:
        answer = worker.signing.handle(SigningOperation.JWT, fresh(who), "main", "default", {"claims": {}})
        assert isinstance(answer, wire.SignedJwt)
        return answer

    def change(self, worker: Service, who: RequestContext) -> None:
        worker.clients.create(fresh(who), wire.ClientCreate(name="intruder"))

    def nothing_old_works(self, worker: Service, *, restarted: bool = False) -> None:
        """Neither signs nor changes anybody anything; the JWKS is the one from before."""
        refused = errors.RegistryRolledBack
        revoked = refused if restarted else errors.CredentialsRevoked
        for who, error in ((self.sound_signer, refused), (self.old_signer, revoked)):
            with pytest.raises(error):
                self.sign(worker, who)
        for who in (self.old_admin, self.world.admin):
            with pytest.raises(refused):
                self.change(worker, who)
        with pytest.raises(revoked):
            worker.operation.nodes(fresh(self.old_admin), 10, None)
        if restarted:
            with pytest.raises(refused):
                worker.operation.nodes(fresh(self.world.admin), 10, None)
        else:
            worker.operation.nodes(fresh(self.world.admin), 10, None)
        kids = self.world.kids(worker)
        assert kids
        assert self.revoked_kid not in kids
        ready, ready_sign = worker.operation.ready(), worker.operation.ready_sign(RequestContext())
        assert (ready.status, ready_sign.status) == ("ok", "failing")
        for readiness in (ready, ready_sign):
            assert {d.name: d.state for d in readiness.dependencies}["registry"] == "registry_rolled_back"


def fresh(who: RequestContext) -> RequestContext:
    return RequestContext(who.authorization)


def poll_until_refused(worker: Service) -> None:
    worker.sync.poll()
    assert worker.sync.rolled_back


_numbers = itertools.count(1)


def change_elsewhere(store: Store, count: int = 1) -> None:
    """Ordinary changes by a process that knows nothing of the lost ones."""
    for _ in range(count):
        with store.write() as tx:
            add_client(tx, f"client-{next(_numbers)}")


def announce(store: Store, known: Epoch | None) -> None:
    """What `kms-jwks db restored` does on a node that has confirmed `known`."""
    with store.write() as tx:
        transitions.start_new_incarnation(tx, known)


def take_the_steps(world: World, save: Callable[[], None], go_back: Callable[[], None]) -> None:
    incident = Incident(world)
    save()
    incident.revoke()
    go_back()
    world.until(lambda: world.service.sync.rolled_back)
    known = EpochRecord(world.settings.state_dir).load()
    assert known is not None
    incident.nothing_old_works(world.service)

    # A worker that is started now knows the documents on the disk alone.
    late = world.worker()
    poll_until_refused(late)
    incident.nothing_old_works(late, restarted=True)

    # Changes bring the counter to the known one and beyond it, and it is another history all the same.
    before, _ = world.registry.poll()
    assert before.counter < known.counter
    for count in (known.counter - before.counter, 3):
        change_elsewhere(world.store(), count)
        for worker, restarted in ((world.service, False), (late, True)):
            poll_until_refused(worker)
            incident.nothing_old_works(worker, restarted=restarted)
    after, _ = world.registry.poll()
    assert (after.counter, after.incarnation) == (known.counter + 3, known.incarnation)
    assert "changed again" in str(world.service.sync.trouble)
    late.store.dispose()

    announce(world.store(), known)
    world.until(world.service.sync.has_lease)
    assert world.service.operation.ready().dependencies[-1].state == "ok"
    with pytest.raises(errors.KeyDisabled):
        incident.sign(world.service, incident.sound_signer)
    world.service.keys.enable(fresh(world.admin), "main", "default")
    assert incident.sign(world.service, incident.sound_signer).token


def test_on_sqlite_nothing_old_works_until_the_restore_is_announced(world: World, tmp_path: Path) -> None:
    registry, copy = tmp_path / "registry.sqlite3", tmp_path / "copy"
    take_the_steps(world, lambda: back_up(registry, copy), lambda: put_back(copy, registry))


@pytest.fixture
def failover(tmp_path: Path, postgres: Postgres) -> Iterator[tuple[World, Callable[[], None], Callable[[], None]]]:
    """A world on a primary with a standby, how the standby stops following, and how it takes over."""
    database = postgres.create()
    with Proxy(postgres.port) as proxy, standby(postgres) as replica:
        world = World(tmp_path, url=postgres.url(database, port=proxy.port)).start()

        def take_over() -> None:
            replica.promote()
            proxy.redirect(replica.port)

        try:
            yield world, replica.stop_following, take_over
        finally:
            world.close()


def test_on_postgresql_a_standby_that_lacks_the_last_changes_is_refused(failover: Any) -> None:
    world, stop_following, take_over = failover
    take_the_steps(world, stop_following, take_over)


# --- several processes and nodes


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[World]:
    """A world of two workers without threads, with a copy of the registry from before the last change."""
    made = World(tmp_path, workers=2)
    for worker in made.workers:
        worker.sync.poll()
    yield made
    made.close()


def lose_a_change(world: World) -> None:
    """Worker 1 confirms a change, and the registry loses it."""
    registry, copy = world.folder / "registry.sqlite3", world.folder / "copy"
    back_up(registry, copy)
    change_elsewhere(world.store())
    world.workers[0].sync.poll()
    put_back(copy, registry)


def test_a_worker_refuses_what_another_worker_of_its_node_knows_to_be_old(silent: World) -> None:
    first, second = silent.workers
    epoch = second.sync.snapshot().epoch
    lose_a_change(silent)
    for worker in (second, first):
        poll_until_refused(worker)
        assert not worker.sync.has_lease()
    assert second.sync.snapshot().epoch == epoch, "it had never seen the change itself"


def test_a_registry_that_has_caught_up_is_accepted_without_an_operator_and_both_are_logged_once(silent: World) -> None:
    registry, older, newer = (silent.folder / name for name in ("registry.sqlite3", "older", "newer"))
    sync = silent.service.sync
    back_up(registry, older)
    change_elsewhere(silent.store(), 2)
    sync.poll()
    back_up(registry, newer)
    with structlog.testing.capture_logs() as logs:
        for file in (older, newer):
            put_back(file, registry)
            sync.poll()
            sync.poll()
    assert sync.has_lease()
    events = ["registry_rolled_back", "lease_lost", "registry_accepted", "lease_regained"]
    assert [line["event"] for line in logs] == events
    assert logs[0]["log_level"] == "error"
    assert "went back from epoch" in logs[0]["detail"]
    assert "db restored" in logs[0]["next_step"]


def test_the_custodian_does_nothing_and_says_so_once(silent: World) -> None:
    custodian = silent.custodian(on_stuck_step=lambda: None)
    custodian.tick()
    lose_a_change(silent)
    before = silent.registry.poll()[0]
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            try:
                custodian.tick()
            except errors.Error as error:
                custodian._log_failure(error, silent.boot())
        with silent.registry.read() as tx:
            lease = tx.custodian_lease()
            created = tx.versions()
    assert [(line["event"], line["process"]) for line in logs] == [("registry_rolled_back", "custodian")]
    assert silent.registry.poll()[0].is_same(before)
    assert (lease is None or lease.term <= 1, created) == (True, [])


def test_a_custodian_remembers_on_a_node_that_has_no_workers(tmp_path: Path) -> None:
    world = World(tmp_path, workers=1)
    lonely = world.settings.model_copy(update={"state_dir": tmp_path / "lonely"})
    store = world.store()
    made = wiring.assemble_custodian(
        lonely, store=store, backends=world.backends(), leader_lease=LeaderLease(store, node="node-2", boot=world.boot)
    )
    made.tick()
    found = EpochRecord(lonely.state_dir).load()
    assert found is not None
    assert found.is_same(world.registry.poll()[0])
    world.close()


def node(world: World, name: str) -> Service:
    """A worker on another node, which has a record of its own."""
    settings = world.settings.model_copy(update={"state_dir": world.folder / name, "node_name": name})
    return wiring.assemble(settings, store=world.store(), backends=world.backends(), boot=world.boot)


def test_other_nodes_accept_what_was_announced_where_at_least_as_much_was_known(silent: World) -> None:
    """The node that knows more than the one on which `db restored` was run needs an operator of its own."""
    registry, copy = silent.folder / "registry.sqlite3", silent.folder / "copy"
    behind, equal, ahead = (node(silent, name) for name in ("behind", "equal", "ahead"))
    back_up(registry, copy)
    for others in ([behind, equal, ahead], [equal, ahead], [ahead]):
        change_elsewhere(silent.store())
        for each in others:
            each.sync.poll()
    known = EpochRecord(silent.folder / "equal").load()
    put_back(copy, registry)
    for each in (behind, equal, ahead):
        poll_until_refused(each)
    announce(silent.store(), known)
    for each in (behind, equal):
        each.sync.poll()
        each.sync.poll()  # the copy did not know this worker: it registers again
        assert each.sync.has_lease()
    poll_until_refused(ahead)
    assert "--accept" in ahead.operation.ready().dependencies[-1].detail + refusal(ahead).next_step
    EpochRecord(silent.folder / "ahead").replace(silent.registry.poll()[0])
    ahead.sync.poll()
    ahead.sync.poll()
    assert ahead.sync.has_lease()

    # An old copy with that announcement announces nothing for what came later.
    back_up(registry, copy)
    change_elsewhere(silent.store())
    behind.sync.poll()
    put_back(copy, registry)
    poll_until_refused(behind)


def change_with_the_older_program(world: World, count: int = 1) -> None:
    """What a process does that was started before the upgrade to this program: it counts, and knows no links."""
    with sqlite3.connect(world.folder / "registry.sqlite3") as connection:
        for _ in range(count):
            connection.execute("UPDATE epoch SET counter = counter + 1")
    connection.close()


def test_changes_of_an_older_program_that_still_runs_are_no_rollback(silent: World) -> None:
    """While the nodes of an installation are upgraded one after the other, both programs write."""
    first, second = silent.workers
    change_with_the_older_program(silent)
    first.sync.poll()
    change_with_the_older_program(silent, 2)
    for worker in (first, second):
        worker.sync.poll()
    change_elsewhere(silent.store())
    for worker in (first, second):
        worker.sync.poll()
        assert worker.sync.trouble is None
        assert worker.sync.has_lease()


def test_a_copy_from_before_a_change_of_an_older_program_is_refused(silent: World) -> None:
    registry, copy = silent.folder / "registry.sqlite3", silent.folder / "copy"
    silent.service.sync.poll()
    back_up(registry, copy)
    change_with_the_older_program(silent, 2)
    silent.service.sync.poll()
    put_back(copy, registry)
    for _ in range(5):
        poll_until_refused(silent.service)
        change_elsewhere(silent.store())


@pytest.mark.parametrize("times", [1, 2])
def test_a_restore_that_was_announced_for_others_alone_is_accepted_and_not_announced_again(
    silent: World, times: int
) -> None:
    """It was announced where no epoch was known, or after a second restore; announcing again disables every key."""
    registry, copy = silent.folder / "registry.sqlite3", silent.folder / "copy"
    back_up(registry, copy)
    change_elsewhere(silent.store())
    silent.service.sync.poll()
    known = None
    for _ in range(times):
        put_back(copy, registry)
        announce(silent.store(), known)
        known = silent.registry.poll()[0]
    poll_until_refused(silent.service)
    assert "db restored --accept" in refusal(silent.service).next_step


def refusal(worker: Service) -> errors.Error:
    with pytest.raises(errors.RegistryRolledBack) as refused:
        worker.sync.leased()
    return refused.value


def test_another_registry_is_refused_until_it_is_accepted(silent: World) -> None:
    """A service that is started with the wrong `database_url`, or whose registry was made anew."""
    registry = silent.folder / "registry.sqlite3"
    for file in silent.folder.glob("registry.sqlite3*"):
        file.unlink()
    silent.store().upgrade()
    poll_until_refused(silent.service)
    assert "another one" in str(silent.service.sync.trouble)
    assert registry.exists()


# --- the record is lost, or cannot be written


def test_a_record_that_is_removed_is_written_again_at_once(silent: World) -> None:
    """Without a change: a worker that is started after it would believe whatever registry it finds."""
    record = EpochRecord(silent.settings.state_dir)
    record.file.unlink()
    silent.service.sync.poll()
    found = record.load()
    assert found is not None
    assert found.is_same(silent.registry.poll()[0])
    assert silent.service.sync.has_lease()


def test_an_epoch_that_cannot_be_recorded_is_not_confirmed_and_not_signed_under(silent: World) -> None:
    """What a node signs under, and tells others that it knows, it must know after a restart too."""
    sync, state = silent.service.sync, silent.settings.state_dir
    change_elsewhere(silent.store())
    sync.poll()
    lock = state / "epoch.lock"
    lock.unlink()
    lock.mkdir()
    change_elsewhere(silent.store())
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            sync.poll()
    assert [line["event"] for line in logs if line["event"] != "database_lost"] == ["epoch_not_recorded"]
    now = silent.registry.poll()[0]
    assert sync.snapshot().epoch.is_same(now), "a revocation is effective all the same"
    with silent.registry.read() as tx:
        row = tx.worker(sync.worker_id or "")  # type: ignore[arg-type]
    assert row is not None
    assert row.confirmed is not None
    assert not row.confirmed.reaches(now)
    assert silent.service.operation.ready().dependencies[-1].state == "store_unavailable"
    silent.offset += 11_000_000
    sync.poll()
    with pytest.raises(errors.RegistryStale):
        sync.leased()
    lock.rmdir()
    sync.poll()
    assert sync.has_lease()
    recorded = EpochRecord(state).load()
    assert recorded is not None
    assert recorded.is_same(now)


def test_the_documents_on_the_disk_stay_those_of_the_accepted_registry(silent: World) -> None:
    kept = JwksCache(silent.settings.state_dir)._read()
    lose_a_change(silent)
    newer = JwksCache(silent.settings.state_dir)._read()
    for worker in silent.workers:
        poll_until_refused(worker)
    assert JwksCache(silent.settings.state_dir)._read() == newer != kept
