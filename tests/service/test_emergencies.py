"""Emergencies at their edges: several standbys, pairs under way, disabled keys, restored registries, renamed nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kms_jwks import errors, wire
from kms_jwks.access import Role
from kms_jwks.custodian import transitions
from kms_jwks.model import DAY, IntentState, Key, KeySet, KeyVersion, VersionState
from kms_jwks.store import WriteTx
from kms_jwks.timeline import choose_standby, later
from kms_jwks.times import to_datetime
from kms_jwks.worker.jwks_cache import JwksCache
from tests.service.world import World

S = VersionState


def revoke(world: World, version: str) -> wire.Revoked:
    request = wire.RevokeRequest(reason="it leaked")
    return world.service.revocation.revoke_version(world.admin, "main", "default", version, request)


def of(tx: WriteTx) -> tuple[KeySet, Key]:
    key_set = tx.key_set("main")
    assert key_set is not None
    return key_set, tx.keys(key_set.id)[0]


def another_standby(world: World) -> KeyVersion:
    """A second published standby, as an adoption brings one."""
    with world.store().write() as tx:
        _, key = of(tx)
        transitions.add_version(tx, key)
    world.until(lambda: sum(bool(v.visible_since) and v.state is S.PUBLISHED for v in world.versions()) == 2)
    return max(world.versions(), key=lambda v: v.number)


def test_the_second_rotation_goes_to_a_kid_from_after_the_revocation(world: World) -> None:
    world.create()
    world.standby()
    another_standby(world)
    world.advance(DAY + 1)
    revoke(world, "1")
    world.until(lambda: world.version(3).state is S.ACTIVE)
    assert world.version(3).emergency, "verifiers may hold this kid too: the emergency goes on"
    world.until(lambda: any(v.number == 4 and v.visible_since for v in world.versions()))
    world.until(lambda: not any(v.state is S.RETIRING and v.emergency for v in world.versions()))
    world.advance(DAY + 1)
    world.until(lambda: world.version(4).state is S.ACTIVE)
    assert not world.version(4).emergency


def test_of_several_standbys_the_one_that_may_sign_first_is_chosen() -> None:
    from tests.unit.builders import at, key, version

    policy = key().policy
    young = version(2, S.PUBLISHED, visible_since=at(50 * DAY))
    old = version(3, S.PUBLISHED, visible_since=at(1))
    unseen = version(1, S.PUBLISHED)
    assert choose_standby([unseen, young, old], policy) is old
    assert choose_standby([unseen, young], policy) is young
    assert choose_standby([unseen], policy) is unseen
    assert choose_standby([], policy) is None


def test_a_pair_that_is_being_made_in_a_revoked_module_is_surplus(world: World) -> None:
    world.create()
    world.standby()
    with world.store().write() as tx:
        _, key = of(tx)
        coming = transitions.add_version(tx, key)
        intent = tx.intents(version_id=coming.id)[0]
        tx.save(replace(intent, not_before=later(tx.now(), 3600)))
    world.service.revocation.revoke_scope(world.admin, wire.RevocationCreate(reason="stolen", backend="memory"))
    assert world.version(coming.number).state is S.DESTROYED
    with world.registry.read() as reading:
        assert {i.state for i in reading.intents(version_id=coming.id)} <= {IntentState.PENDING, IntentState.ABANDONED}


def test_a_disabled_key_does_not_delay_the_first_document(quiet: World) -> None:
    with quiet.store().write() as tx:
        from kms_jwks.service.definitions import add_key_set

        keys = [wire.KeyCreate(name=name, alg="ES256") for name in ("default", "second")]
        add_key_set(tx, quiet.service.key_sets._control, wire.KeySetCreate(name="main", keys=keys))
        key_set, first = of(tx)
        second = tx.key(key_set.id, "second")
        assert second is not None
        tx.save(replace(second, disabled_at=tx.now()))
    custodian = quiet.custodian()

    def published() -> bool:
        custodian.tick()
        return any(v.key_id == first.id and v.state is S.ACTIVE for v in quiet.versions())

    quiet.until(published)
    assert {v.state for v in quiet.versions() if v.key_id != first.id} == {S.CREATING}


def test_a_node_that_was_renamed_still_deregisters_its_dead_workers(quiet: World) -> None:
    late = quiet.worker()
    late.sync.poll()
    with quiet.store().write() as tx:
        [worker] = [w for w in tx.workers() if w.id == late.sync.worker_id]
        tx.save(replace(worker, node="of-another-name"))
    lock = late.sync._registration._lock
    assert lock is not None
    lock.release(keep_file=True)

    def deregistered() -> bool:
        with quiet.registry.read() as tx:
            return [w.stop_reason for w in tx.workers(include_stopped=True) if w.node == "of-another-name"] == ["died"]

    quiet.until(deregistered)
    late.store.dispose()


@pytest.mark.parametrize("kid", ["2", "123456789"])
def test_a_kid_that_passes_for_a_number_is_not_adopted(world: World, kid: str) -> None:
    from kms_jwks.algorithms import ALGORITHMS

    world.backend.generate("theirs", ALGORITHMS["ES256"])
    adopt: dict[str, Any] = {"locator": "theirs", "kid": kid}
    with pytest.raises(errors.InvalidField, match="number of a version"):
        world.create(keys=[{"name": "default", "alg": "ES256", "adopt": adopt}])


def test_a_revoked_key_is_not_published_again_under_another_kid(world: World) -> None:
    world.create()
    world.standby()
    row = world.version(1)
    assert row.public_jwk is not None
    with world.registry.read() as tx:
        remove_at = to_datetime(later(tx.now(), DAY))
    request = wire.ExternalKeyCreate(kid="disguised", alg="ES256", jwk=dict(row.public_jwk), remove_at=remove_at)
    revoke(world, "1")
    with pytest.raises(errors.KeyTaken, match="revoked"):
        world.service.external_keys.create(world.admin, "main", request)
    assert "disguised" not in world.kids()
    standby = world.version(2)
    assert standby.public_jwk is not None
    other = wire.ExternalKeyCreate(kid="of-a-sound-one", alg="ES256", jwk=dict(standby.public_jwk), remove_at=remove_at)
    world.service.external_keys.create(world.admin, "main", other)


def test_further_standbys_leave_the_others_room_to_rotate(world: World) -> None:
    from kms_jwks.algorithms import ALGORITHMS

    world.create(keys=[{"name": f"k{n}", "alg": "ES256"} for n in range(4)])
    world.until(lambda: sum(v.state is S.PUBLISHED for v in world.versions()) == 4)
    world.backend.generate("theirs", ALGORITHMS["ES256"])
    adopt = wire.convert({"adopt": {"locator": "theirs"}}, wire.VersionCreate)
    with pytest.raises(errors.LimitReached, match="further standbys"):
        world.service.versions.create(world.admin, "main", "k0", adopt)


def test_the_cached_documents_do_not_go_back(world: World) -> None:
    world.create()
    world.standby()
    old = world.service.sync.snapshot()
    world.create("other")
    world.until(lambda: "other" in world.service.sync.snapshot().key_sets)
    world.until(lambda: "other" in JwksCache(world.settings.state_dir).load())
    JwksCache(world.settings.state_dir).store(old)
    assert "other" in JwksCache(world.settings.state_dir).load()
    JwksCache(world.settings.state_dir).store(replace(old, epoch=replace(old.epoch, incarnation="restored")))
    assert "other" not in JwksCache(world.settings.state_dir).load(), "a new incarnation replaces the file"


def test_the_admin_of_one_set_cannot_adopt_from_the_shared_module(world: World) -> None:
    from kms_jwks.algorithms import ALGORITHMS

    world.create()
    world.backend.generate("theirs", ALGORITHMS["ES256"])
    with world.registry.read() as tx:
        key_set = tx.key_set("main")
    assert key_set is not None
    local = world.client("local", Role.ADMIN, key_set.id)
    request = wire.convert({"name": "k2", "alg": "ES256", "adopt": {"locator": "theirs"}}, wire.KeyCreate)
    with pytest.raises(errors.Forbidden):
        world.service.keys.create(local, "main", request)
    assert world.service.keys.create(world.admin, "main", request).answer.name == "k2"
