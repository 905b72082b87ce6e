"""Emergencies: what a revocation does and reports, its rehearsal, and everything of a module or key set at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kms_jwks import errors, wire
from kms_jwks.access import Role
from kms_jwks.model import DAY, VersionState
from kms_jwks.timeline import later
from kms_jwks.times import to_datetime
from tests.service.world import World

S = VersionState
TWO = [{"name": "default", "alg": "ES256"}, {"name": "second", "alg": "ES256"}]


def revoke(world: World, version: str = "1", **fields: Any) -> wire.Revoked:
    request = wire.RevokeRequest(**({"reason": "it leaked"} | fields))
    return world.service.revocation.revoke_version(world.admin, "main", "default", version, request)


def everything(world: World, **fields: Any) -> wire.Revocation:
    return world.service.revocation.revoke_scope(world.admin, wire.RevocationCreate(**({"reason": "stolen"} | fields)))


def settled(world: World, keys: int = 1) -> World:
    """Every key has its standby, visible, and the custodian changes nothing more."""
    world.until(lambda: sum(v.state is S.PUBLISHED and v.visible_since is not None for v in world.versions()) == keys)
    return world


def signs(world: World) -> str:
    """The kid of the next token, once there is one."""

    def attempt() -> str | None:
        try:
            return world.sign().kid
        except errors.NoActiveVersion:
            return None

    return world.until(attempt) or ""


def everything_kept(world: World) -> tuple[Any, ...]:
    with world.registry.read() as tx:
        return tx.epoch(), tx.versions(), tx.keys(), tx.intents(), tx.key_sets()


# --- one version


def test_a_rehearsal_says_what_would_happen_and_changes_nothing(world: World) -> None:
    world.create()
    settled(world)
    standby = world.standby()
    before = everything_kept(world)
    said = revoke(world, dry_run=True)
    assert everything_kept(world) == before
    assert said.dry_run
    assert (said.version.state, said.version.revoke_reason) == ("revoked", "it leaked")
    assert said.successor is not None
    assert (said.successor.kid, said.successor.state) == (standby.kid, "active")
    assert [b.invariant for b in said.successor.breaches] == ["I1"]
    assert said.successor_visible_for is not None
    assert said.successor_visible_for < 60
    assert world.sign().kid == world.version(1).kid

    done = revoke(world)
    assert (done.dry_run, done.changed) == (False, True)
    assert done.successor is not None
    assert done.successor.kid == said.successor.kid
    assert world.sign().kid == standby.kid


def test_a_rehearsal_needs_the_same_permission(world: World) -> None:
    world.create()
    auditor = world.client("auditor", Role.AUDITOR)
    with pytest.raises(errors.Forbidden):
        world.service.revocation.revoke_version(auditor, "main", "default", "1", wire.RevokeRequest(dry_run=True))
    with pytest.raises(errors.Forbidden):
        world.service.revocation.revoke_scope(auditor, wire.RevocationCreate(reason="x", key_set="main", dry_run=True))


def test_an_old_standby_breaks_nothing(world: World) -> None:
    world.create()
    settled(world)
    world.advance(DAY + 1)
    said = revoke(world, dry_run=True)
    assert said.successor is not None
    assert said.successor.breaches == []
    assert (said.successor_visible_for or 0) > DAY


def test_the_exposure_counts_from_the_moment_when_every_worker_has_stopped_publishing(world: World) -> None:
    world.create(cache_lifetime=120)
    settled(world)
    world.advance(DAY + 1)
    done = revoke(world)
    assert done.exposure is not None
    assert done.version.revoked_at is not None
    withdrawn = to_datetime(later(world.version(1).revoked_at, 11))  # type: ignore[arg-type]
    assert done.exposure.withdrawn_at == withdrawn
    by_source = {v.source: v for v in done.exposure.verifiers}
    assert (by_source["kube-apiserver"].keeps, by_source["PyJWT 2.15"].learns) == (120, "knows")
    assert done.exposure.trusted_until == to_datetime(later(world.version(1).revoked_at, 11 + 43_200 + 120))  # type: ignore[arg-type]
    assert "go-oidc" in done.exposure.unbounded
    assert by_source["go-oidc 3"].ends == "second-rotation"
    # The next standby is not there yet: a day after the revocation at the earliest.
    assert done.exposure.second_rotation_not_before == to_datetime(later(world.version(1).revoked_at, DAY))  # type: ignore[arg-type]


def test_a_repeated_revocation_knows_when_the_second_rotation_can_be(world: World) -> None:
    world.create()
    settled(world)
    revoke(world)
    third = world.until(lambda: next((v for v in world.versions() if v.number == 3 and v.visible_since), None))
    assert third is not None
    again = revoke(world)
    assert not again.changed
    assert again.exposure is not None
    assert again.exposure.second_rotation_not_before == to_datetime(later(third.visible_since, DAY))  # type: ignore[arg-type]


def test_a_compromised_standby_or_retired_version_leaves_the_active_one_alone(world: World) -> None:
    first = world.create().keys[0].active_kid
    settled(world)
    done = revoke(world, "2")
    assert (done.version.state, done.successor, done.without_successor) == ("revoked", None, False)
    assert world.sign().kid == first
    world.until(lambda: any(v.number == 3 and v.visible_since for v in world.versions()))
    world.advance(DAY + 1)
    world.service.keys.rotate(world.admin, "main", "default", wire.RotateRequest())
    world.advance(4000)
    world.until(lambda: world.version(1).state is S.RETIRED)
    retired_at = world.version(1).retired_at
    done = revoke(world, "1")
    assert (done.version.state, world.sign().kid) == ("revoked", world.version(3).kid)
    assert done.exposure is not None
    assert done.exposure.withdrawn_at == to_datetime(later(retired_at, 11)), "it left the JWKS long before"  # type: ignore[arg-type]


def test_without_a_standby_and_with_the_module_away_signing_stops_and_the_jwks_is_clean(two_workers: World) -> None:
    world = two_workers
    first = world.create().keys[0].active_kid
    settled(world)
    world.backend.fail = errors.BackendUnavailable("away")
    revoke(world, "2")
    done = revoke(world, "1")
    assert (done.successor, done.without_successor, done.unconfirmed) == (None, True, [])
    assert done.exposure is not None
    assert {v.learns for v in done.exposure.verifiers} == {"nothing"}
    for worker in world.workers:
        assert first not in world.kids(worker)
        with pytest.raises(errors.NoActiveVersion):
            world.sign(worker=worker)
    assert done.version.destroy_at is not None
    ref = world.version(1).ref
    assert ref is not None
    world.advance(31 * DAY)
    assert ref["id"] in world.backend.keys, "the module is away"
    world.backend.fail = None
    world.advance(120)
    world.until(lambda: world.version(1).state is S.DESTROYED)
    assert ref["id"] not in world.backend.keys


def test_a_worker_that_has_not_confirmed_is_named(tmp_path: Path) -> None:
    world = World(tmp_path, lease=1).start()
    try:
        world.create()
        settled(world)
        silent = world.worker()
        silent.sync.poll()
        done = revoke(world)
        assert [w.worker for w in done.unconfirmed] == [silent.sync.worker_id]
        with pytest.raises(errors.RegistryStale):
            silent.sync.leased()
        silent.stop()
    finally:
        world.close()


# --- a pair that waits for its publication


def test_a_pair_that_waits_for_its_publication_can_be_revoked(world: World) -> None:
    world.create(existing_issuer=True)
    world.until(lambda: world.version(1).visible_since)
    with world.store().write() as tx:
        row = tx.versions()[0]
        tx.save(replace(row, state=S.CREATING, published_at=None, published_epoch=None, visible_since=None))
    done = revoke(world)
    assert (done.version.state, done.exposure) == ("revoked", None), "no verifier can have seen it"
    world.until(lambda: any(v.number == 2 and v.visible_since for v in world.versions()))
    assert world.kids() == [world.version(2).kid]


def test_without_a_pair_there_is_nothing_to_revoke(world: World) -> None:
    world.create()
    settled(world)
    world.backend.fail = errors.BackendUnavailable("away")
    revoke(world, "2")
    assert world.version(3).state is S.CREATING
    with pytest.raises(errors.TransitionRefused):
        revoke(world, "3")
    done = everything(world, key_set="main")
    assert {v.version.number for v in done.versions} == {1, 2}, "what is made later is not compromised"
    world.backend.fail = None


# --- everything of a key set or a module


def test_a_whole_key_set(two_workers: World) -> None:
    world = two_workers
    made = world.create(keys=TWO)
    world.create("other")
    settled(world, 3)
    old = world.kids()
    assert len(old) == 4
    said = everything(world, key_set="main", dry_run=True)
    assert [v.changed for v in said.versions] == [True] * 4
    assert world.kids() == old
    done = everything(world, key_set="main")
    assert {v.version.kid for v in done.versions} == set(old)
    assert {v.version.state for v in done.versions} == {"revoked"}
    assert {(v.version.revoke_reason, v.key_set) for v in done.versions} == {("stolen", "main")}
    assert [p.key for p in done.without_successor] == ["default", "second"]
    assert (done.disabled, done.unconfirmed) == ([], [])
    for worker in world.workers:
        assert not set(world.kids(worker)) & set(old)
        assert world.kids(worker, "other"), "another set stays as it is"
    assert [e.key_set for e in done.exposures] == ["main"]
    # The custodian makes new pairs, which sign at once: nothing is gained by waiting.
    assert signs(world) not in old
    again = everything(world, key_set="main")
    assert sum(v.changed for v in again.versions) >= 1, "what was made since is revoked by a second call"
    assert made.keys


def test_a_whole_module_disables_the_keys_that_it_alone_could_replace(world: World) -> None:
    world.create(keys=TWO)
    world.create("other")
    settled(world, 3)
    done = everything(world, backend="memory")
    assert len(done.versions) == 6
    assert {(p.key_set, p.key) for p in done.disabled} == {
        ("main", "default"),
        ("main", "second"),
        ("other", "default"),
    }
    assert done.without_successor == []
    assert {e.key_set for e in done.exposures} == {"main", "other"}
    assert world.kids() == world.kids(key_set="other") == []
    with pytest.raises(errors.KeyDisabled):
        world.sign()
    pairs = len(world.backend.keys)
    again = everything(world, backend="memory")
    assert {v.changed for v in again.versions} == {False}
    assert len(world.backend.keys) == pairs, "no key is made in a module that is not trusted"
    world.service.keys.enable(world.admin, "main", "default")
    assert signs(world) not in {v.version.kid for v in done.versions}


def test_a_whole_module_whose_keys_stay_enabled(world: World) -> None:
    world.create()
    settled(world)
    done = everything(world, backend="memory", disable_keys=False)
    assert ([p.key for p in done.without_successor], done.disabled) == (["default"], [])
    world.until(lambda: world.service.keys.get(world.admin, "main", "default").active_kid)


def test_all_or_nothing_when_one_key_is_out_of_reach(world: World) -> None:
    world.create()
    world.create("other")
    settled(world, 2)
    with world.registry.read() as tx:
        found = tx.key_set("main")
    assert found is not None
    narrow = world.client("narrow", Role.OPERATOR, found.id)
    before = everything_kept(world)
    with pytest.raises(errors.Forbidden):
        world.service.revocation.revoke_scope(narrow, wire.RevocationCreate(reason="x", backend="memory"))
    with pytest.raises(errors.Forbidden):
        world.service.revocation.revoke_scope(narrow, wire.RevocationCreate(reason="x", key_set="other"))
    assert everything_kept(world) == before
    done = world.service.revocation.revoke_scope(narrow, wire.RevocationCreate(reason="x", key_set="main"))
    assert {v.key_set for v in done.versions} == {"main"}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({}, errors.InvalidField),
        ({"backend": "memory", "key_set": "main"}, errors.InvalidField),
        ({"backend": "nothing"}, errors.BackendUnknown),
        ({"key_set": "nothing"}, errors.KeySetNotFound),
    ],
)
def test_what_names_nothing_revokes_nothing(world: World, fields: dict[str, Any], error: type[errors.Error]) -> None:
    world.create()
    settled(world)
    before = everything_kept(world)
    with pytest.raises(error):
        everything(world, **fields)
    assert everything_kept(world) == before
