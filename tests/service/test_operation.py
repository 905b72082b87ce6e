"""The state of an installation as operators read it: workers with their lease and their modules, the custodian."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import structlog

from kms_jwks import errors, wire, wiring
from kms_jwks.access import Role
from kms_jwks.backends.calling import Backends
from kms_jwks.model import SECOND
from kms_jwks.service import RequestContext, Service
from kms_jwks.store.error_map import unavailable
from tests.memory_backend import MemoryBackend
from tests.service.world import World


def nodes(world: World) -> list[wire.Node]:
    found = world.service.operation.nodes(world.admin, 50, None).items
    assert all(isinstance(node, wire.Node) for node in found)
    return found


def mine(world: World) -> wire.Node:
    return next(n for n in nodes(world) if n.worker == world.service.sync.worker_id)


def test_each_worker_is_listed_with_its_epoch_and_lease(two_workers: World) -> None:
    world = two_workers
    world.create()
    world.standby()
    found = world.until(lambda: nodes(world) if all(n.lag == 0 for n in nodes(world)) else None)
    assert found is not None
    assert len(found) == 2
    assert {n.node for n in found} == {"node-1"}
    assert all(n.live and 0 < n.lease_left <= n.lease == 10 for n in found)


def test_a_silent_worker_has_no_lease_left_and_may_be_forgotten(world: World) -> None:
    world.create()
    silent = world.worker()
    silent.sync.poll()
    worker = silent.sync.worker_id or ""
    with pytest.raises(errors.Conflict):
        world.service.operation.forget(world.admin, worker)
    world.advance(12)
    row = next(n for n in nodes(world) if n.worker == worker)
    assert (row.live, row.lease_left) == (False, 0)
    world.service.operation.forget(world.admin, worker)
    assert worker not in {n.worker for n in nodes(world)}
    silent.stop()


def test_each_worker_is_listed_with_its_backends_states(world: World) -> None:
    world.create()
    world.standby()
    assert mine(world).backends in ({}, {"memory": "ok"})
    world.sign()
    world.offset += SECOND
    world.until(lambda: mine(world).backends == {"memory": "ok"})
    with world.registry.read() as tx:
        before = tx.epoch()
    world.backend.fail = errors.BackendUnavailable("away")
    with pytest.raises(errors.BackendUnavailable):
        world.sign()
    world.offset += SECOND
    world.until(lambda: mine(world).backends == {"memory": "backend_unavailable"})
    world.backend.fail = None
    world.sign()
    world.offset += SECOND
    world.until(lambda: mine(world).backends == {"memory": "ok"})
    with world.registry.read() as tx:
        assert tx.epoch() == before, "a change of a backend's state changes no snapshot"


def test_a_poll_asks_no_module(world: World) -> None:
    world.create()
    world.standby()
    asked: list[str] = []
    world.backend.before = asked.append
    for _ in range(3):
        world.offset += 6 * SECOND
        world.service.sync.poll()
    assert asked == []


def test_a_health_probe_updates_the_backends_state(world: World) -> None:
    world.create()
    world.backend.fail = errors.BackendUnavailable("away")
    assert readiness(world) == ("failing", {"registry": "ok", "backend:memory": "backend_unavailable"})
    world.offset += SECOND
    world.until(lambda: mine(world).backends == {"memory": "backend_unavailable"})
    world.backend.fail = None


# --- readiness


ANYONE = RequestContext()


def readiness(world: World, *asked: str, who: RequestContext = ANYONE, worker: Service | None = None) -> Any:
    """The status, and the state of each dependency, as a caller sees them."""
    operation = (worker or world.service).operation
    shown = operation.shown(who, operation.ready_sign(who, *asked))
    return shown.status, {d.name: d.state for d in shown.dependencies}


@contextmanager
def node(world: World, **backends: MemoryBackend) -> Iterator[Service]:
    """A worker of a node that has these backends."""
    made = Backends(backends, default=None)
    worker = wiring.assemble(world.settings, store=world.store(), backends=made, boot=world.boot)
    worker.sync.poll()
    try:
        yield worker
    finally:
        worker.stop()
        made.close()


def away() -> MemoryBackend:
    backend = MemoryBackend()
    backend.fail = errors.BackendUnavailable("away")
    return backend


def test_a_node_that_lacks_the_backend_of_an_enabled_key_is_not_ready(world: World) -> None:
    world.create()
    lacking = {"registry": "ok", "backend:memory": "backend_not_found", "backend:other": "ok"}
    with node(world, other=MemoryBackend()) as worker:
        assert readiness(world, worker=worker) == ("failing", lacking)
        with pytest.raises(errors.BackendUnknown):
            world.sign(worker=worker)
        assert "main/default" in repr(worker.operation.ready_sign(ANYONE)), "it names the keys"
        assert "main/default" not in repr(worker.operation.shown(ANYONE, worker.operation.ready_sign(ANYONE)))
        world.service.keys.disable(world.admin, "main", "default")
        worker.sync.poll()
        assert readiness(world, worker=worker) == ("ok", {"registry": "ok", "backend:other": "ok"})


def test_a_node_without_any_backend_is_not_ready(world: World) -> None:
    with node(world) as worker:
        assert readiness(world, worker=worker) == ("failing", {"registry": "ok", "backends": "backend_not_found"})


def test_a_backend_that_no_enabled_key_needs_does_not_count(world: World) -> None:
    states = {"registry": "ok", "backend:idle": "backend_unavailable", "backend:memory": "ok"}
    with node(world, memory=world.backend, idle=away()) as worker:
        assert readiness(world, worker=worker) == ("failing", states), "no key says yet which backend is needed"
    world.create()
    with node(world, memory=world.backend, idle=away()) as worker:
        assert readiness(world, worker=worker) == ("ok", states)
        assert world.sign(worker=worker).token


def test_one_key_may_be_asked_for(world: World) -> None:
    world.create(keys=[{"name": "default", "alg": "ES256"}, {"name": "second", "alg": "ES256"}])
    world.service.keys.disable(world.admin, "main", "second")
    good = {"registry": "ok", "backend:memory": "ok"}
    assert readiness(world, "main") == ("ok", good)
    assert readiness(world, "main", "default") == ("ok", {**good, "key:main/default": "ok"})
    assert readiness(world, "main", "second") == ("failing", {**good, "key:main/second": "key_disabled"})
    assert readiness(world, "main", "third") == ("failing", {"registry": "ok", "key:main/third": "key_not_found"})
    assert readiness(world, "other") == ("failing", {"registry": "ok", "key_set:other": "key_set_not_found"})
    with node(world, memory=away()) as worker:
        assert readiness(world, "main", "default", worker=worker)[0] == "failing"


def test_a_restricted_key_set_is_there_for_those_alone_who_may_read_its_jwks(world: World) -> None:
    world.create(access="restricted")
    for stranger in (ANYONE, RequestContext("Bearer kj_not-a-token"), world.client("breaker", Role.BREAK_GLASS)):
        unknown = {"registry": "ok", "key:main/default": "key_not_found"}
        assert readiness(world, "main", "default", who=stranger) == ("failing", unknown)
        assert readiness(world, "main", who=stranger)[1]["key_set:main"] == "key_set_not_found"
    assert readiness(world, "main", "default", who=world.signer)[0] == "ok"


def test_details_are_for_those_who_may_see_nodes_and_backends(world: World) -> None:
    world.create()
    world.backend.fail = errors.BackendUnavailable("no token of serial 4711 in /usr/lib/module.so: CKR_DEVICE_ERROR")
    full = world.service.operation.ready_sign(ANYONE)
    assert "4711" in full.dependencies[1].detail, "the log has all"
    for who, sees in ((ANYONE, False), (world.signer, False), (RequestContext("Bearer x"), False), (world.admin, True)):
        shown = world.service.operation.shown(who, full)
        assert (shown.dependencies[1].state, shown.status) == ("backend_unavailable", "failing")
        assert ("4711" in repr(shown)) is sees
        assert bool(shown.dependencies[1].next_step) is sees
    world.backend.fail = None


def test_a_full_disk_is_named_in_the_log_and_in_readiness(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads still succeed, and no heartbeat does."""
    world.create()

    def full(*_: Any) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        raise unavailable(error)

    with node(world, memory=world.backend) as worker, structlog.testing.capture_logs() as lines:
        monkeypatch.setattr(worker.sync._registration, "send_heartbeat", full)
        world.offset += 6 * SECOND
        worker.sync.poll()
        shown = worker.operation.shown(ANYONE, worker.operation.ready())
        assert [(d.name, d.state, d.cause) for d in shown.dependencies if d.state != "ok"] == [
            ("registry", "store_unavailable", "disk_full")
        ]
        (lost,) = [line for line in lines if line["event"] == "database_lost"]
        assert (lost["cause"], lost["detail"]) == (
            "disk_full",
            "The registry's database has no space left on its disk.",
        )
        assert "Free space" in lost["next_step"]
        monkeypatch.undo()
        worker.sync.poll()
        assert readiness(world, worker=worker)[0] == "ok"


def test_the_acting_custodian_is_shown(world: World) -> None:
    world.create()
    first = world.service.operation.custodian(world.admin)
    assert (first.acting, first.node, first.term, first.halted) == (True, "node-1", 1, None)
    assert first.since is not None
    world.advance(60)
    world.until(lambda: world.service.operation.custodian(world.admin).acting)
    assert world.service.operation.custodian(world.admin).since == first.since, "a renewal begins no term"
    world._stop.set()
    world.until(lambda: not world.service.operation.custodian(world.admin).acting)
    other = world.custodian(node="node-2")
    other.tick()
    second = world.service.operation.custodian(world.admin)
    assert (second.acting, second.node, second.term) == (True, "node-2", 2)
    assert second.since is not None
    assert second.since > first.since


def test_nodes_and_the_custodian_need_a_permission(world: World) -> None:
    signer = world.client("other", Role.SIGNER)
    for ask in (world.service.operation.custodian, lambda context: world.service.operation.nodes(context, 1, None)):
        with pytest.raises(errors.Forbidden):
            ask(signer)
