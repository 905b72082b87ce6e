"""The state of an installation as operators read it: workers with their lease and their modules, the custodian."""

from __future__ import annotations

import pytest

from kms_jwks import errors, wire
from kms_jwks.access import Role
from kms_jwks.model import SECOND
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
    assert world.service.operation.ready_sign().status == "failing"
    world.offset += SECOND
    world.until(lambda: mine(world).backends == {"memory": "backend_unavailable"})
    world.backend.fail = None


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
