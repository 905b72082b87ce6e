"""The custodian follows the plan: rotations, emergencies and destructions happen by themselves, once each."""

from __future__ import annotations

import pytest

from kms_jwks import errors, wire
from kms_jwks.custodian import transitions
from kms_jwks.model import DAY, IntentKind, IntentState, VersionState
from kms_jwks.times import to_datetime
from tests.service.world import UNSAFE, World

S = VersionState
RETIRE = 60 + 10 + 3600 + 300
"""Seconds from a deactivation to the retirement, at the defaults."""


def states(world: World) -> dict[int, str]:
    return {v.number: v.state.value for v in world.versions()}


def revoke(world: World, number: int) -> wire.Revoked:
    return world.service.revocation.revoke_version(world.admin, "main", "default", str(number), wire.RevokeRequest())


def intents(world: World, kind: IntentKind) -> list[IntentState]:
    with world.registry.read() as tx:
        return [i.state for i in tx.intents() if i.kind is kind]


def test_a_key_rotates_retires_and_destroys_by_itself(world: World) -> None:
    first = world.create().keys[0].active_kid
    standby = world.standby()
    world.advance(90 * DAY - 3601)
    assert world.sign().kid == first
    world.advance(3602)
    world.until(lambda: world.version(2).state is S.ACTIVE)
    world.until(lambda: world.sign().kid == standby.kid)
    world.until(lambda: world.version(3).state is S.PUBLISHED)
    world.advance(RETIRE + 1)
    world.until(lambda: world.version(1).state is S.RETIRED)
    world.until(lambda: world.version(1).destroy_told)
    world.advance(30 * DAY)
    world.until(lambda: world.version(1).state is S.DESTROYED)
    gone = world.version(1)
    assert gone.absence == {
        "public_key": "backend_key_not_found",
        "attributes": "backend_key_not_found",
        "module": "keys in memory",
        "recorded_at": gone.destroyed_at,
    }
    assert states(world) == {1: "destroyed", 2: "active", 3: "published"}
    assert intents(world, IntentKind.DESTROY) == intents(world, IntentKind.TELL) == [IntentState.DONE]


def test_hold_until_and_the_window_are_kept(world: World) -> None:
    world.create()
    world.standby()
    held = to_datetime(world.now() + (100 * DAY) * 1_000_000)  # type: ignore[arg-type]
    patch = wire.KeyPatch(policy=wire.PolicyFields(hold_until=held, rotate_jitter=0))
    world.service.keys.patch(world.admin, "main", "default", patch, 1)
    world.advance(91 * DAY)
    world.until(lambda: world.version(2).visible_since)
    assert world.version(1).state is S.ACTIVE
    cleared = wire.KeyPatch(policy=wire.PolicyFields(hold_until=None))
    world.service.keys.patch(world.admin, "main", "default", cleared, 2)
    world.until(lambda: world.version(2).state is S.ACTIVE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hold_until", "9999-12-31T23:59:59Z"),
        ("hold_until", "2031-01-01T00:00:00"),
        ("hold_until", 5),
        ("rotate_window", None),
        ("rotate_window", "mon 0900-1600"),
        ("rotate_jitter", -1),
    ],
)
def test_a_calendar_that_nobody_could_keep_is_refused(world: World, field: str, value: object) -> None:
    def create() -> None:
        request = wire.convert({"name": "k", "alg": "ES256", "policy": {field: value}}, wire.KeyCreate)
        world.service.keys.create(world.admin, "main", request)

    world.create(keys=[])
    with pytest.raises((errors.InvalidRequest, errors.PolicyRefused)) as refused:
        create()
    assert field in refused.value.detail + str(refused.value.fields)


def test_a_key_that_is_held_is_created_and_waits(world: World) -> None:
    later = to_datetime(world.now() + 5 * DAY * 1_000_000)  # type: ignore[arg-type]
    key = wire.KeyCreate(name="default", alg="ES256", policy=wire.PolicyFields(hold_until=later))
    made = world.service.key_sets.create(world.admin, wire.KeySetCreate(name="main", keys=[key]))
    assert (made.complete, made.answer.keys[0].active_kid) == (True, None)
    assert len(world.kids()) == 1
    world.advance(5 * DAY + 1)
    world.until(lambda: world.version(1).state is S.ACTIVE)


def test_a_restored_registry_signs_nothing_and_knows_no_standby_until_it_was_seen_again(world: World) -> None:
    world.create()
    world.standby()
    world.advance(2 * DAY)
    with world.store().write() as tx:
        (disabled,) = transitions.start_new_incarnation(tx)
    assert disabled.name == "default"
    with pytest.raises(errors.KeyDisabled):
        world.until(lambda: world.sign() is None)
    world.until(lambda: world.version(2).visible_since)
    assert world.version(1).visible_since is not None
    world.service.keys.enable(world.admin, "main", "default")
    world.until(world.sign)
    with pytest.raises(errors.NotYetUsable):
        world.service.keys.rotate(world.admin, "main", "default", wire.RotateRequest())
    world.advance(DAY + 1)
    world.service.keys.rotate(world.admin, "main", "default", wire.RotateRequest())


def test_two_keys_that_are_overdue_rotate_one_after_the_other(world: World) -> None:
    world.create(keys=[{"name": name, "alg": "ES256"} for name in ("default", "second")])
    world.until(lambda: len([v for v in world.versions() if v.state is S.PUBLISHED and v.visible_since]) == 2)
    world.advance(200 * DAY)
    world.until(lambda: [v.state for v in world.versions()].count(S.RETIRING) == 1)
    world.until(lambda: len([v for v in world.versions() if v.visible_since and v.number == 3]) == 1)
    assert len([v for v in world.versions() if v.number == 3]) == 1
    world.advance(RETIRE + 1)
    world.until(lambda: len([v for v in world.versions() if v.number == 3]) == 2)
    assert [v.state for v in world.versions()].count(S.RETIRING) == 1


def test_after_a_revocation_the_second_rotation_comes_by_itself(world: World) -> None:
    world.create()
    world.standby()
    answer = revoke(world, 1)
    assert world.version(2).emergency
    assert answer.successor is not None
    world.until(lambda: world.version(3).visible_since)
    world.advance(DAY - 60)
    assert world.version(2).state is S.ACTIVE
    world.advance(61)
    world.until(lambda: world.version(3).state is S.ACTIVE)
    assert [v.emergency for v in world.versions()] == [False] * 4
    assert [b.invariant for b in world.version(2).breaches] == ["I1"], "what was overridden stays visible"
    assert world.version(3).breaches == ()


def test_a_standby_that_was_made_after_the_revocation_counts_as_an_emergency_too(world: World) -> None:
    world.create()
    world.standby()
    revoke(world, 2)
    world.backend.fail = errors.BackendUnavailable("away")
    revoke(world, 1)
    world.backend.fail = None
    successor = world.until(lambda: next((v for v in world.versions() if v.state is S.ACTIVE), None), seconds=20)
    assert successor is not None
    assert successor.emergency


# --- destruction


def retired(world: World) -> None:
    world.create(keys=[{"name": "default", "alg": "ES256", "policy": UNSAFE}])
    world.standby()
    world.service.keys.rotate(world.admin, "main", "default", wire.RotateRequest())
    world.advance(RETIRE + 1)
    world.until(lambda: world.version(1).state is S.RETIRED and world.version(1).destroy_told)


def test_a_module_with_a_calendar_is_told_taken_back_and_told_again(world: World) -> None:
    world.backend.puts_off = 7 * DAY
    retired(world)
    ref = world.version(1).ref
    assert ref is not None
    assert world.backend.told == {ref["id"]: 30}
    world.service.versions.cancel_destroy(world.admin, "main", "default", "1")
    world.until(lambda: world.version(1).destroy_told is None)
    assert world.backend.told == {}
    world.service.versions.destroy(world.admin, "main", "default", "1", wire.DestroyRequest())
    world.until(lambda: world.version(1).destroy_told == world.version(1).destroy_at)
    assert world.backend.told == {ref["id"]: 30}


def test_a_module_that_puts_a_destruction_off_is_asked_again_when_it_said(world: World) -> None:
    world.backend.puts_off = 7 * DAY
    retired(world)
    world.advance(31 * DAY)
    world.until(lambda: IntentState.FAILED in intents(world, IntentKind.DESTROY))
    with world.registry.read() as tx:
        failed, waiting = (i for i in tx.intents() if i.kind is IntentKind.DESTROY)
    assert failed.finished_at is not None
    assert waiting.not_before - failed.finished_at == 7 * DAY * 1_000_000
    # The module may have destroyed the key already, so the destruction cannot be cancelled any more.
    with pytest.raises(errors.TransitionRefused, match="has begun"):
        world.service.versions.cancel_destroy(world.admin, "main", "default", "1")
    world.backend.puts_off = 0
    world.advance(8 * DAY)
    world.until(lambda: world.version(1).state is S.DESTROYED)
    assert intents(world, IntentKind.DESTROY) == [IntentState.FAILED, IntentState.DONE]


@pytest.mark.parametrize("seconds", [10**9, 90])
def test_what_a_module_asks_for_is_bounded(world: World, seconds: int) -> None:
    retired(world)
    world.backend.puts_off = seconds
    world.advance(31 * DAY)
    world.until(lambda: IntentState.FAILED in intents(world, IntentKind.DESTROY))
    with world.registry.read() as tx:
        failed, waiting = (i for i in tx.intents() if i.kind is IntentKind.DESTROY)
    assert failed.finished_at is not None
    assert waiting.not_before - failed.finished_at == min(seconds, 31 * DAY) * 1_000_000


def test_a_module_that_still_holds_the_key_is_no_evidence_of_absence(world: World) -> None:
    retired(world)
    ref = world.version(1).ref
    assert ref is not None
    kept = dict(world.backend.keys)

    def restore(call: str) -> None:
        if call == "destroyed":
            world.backend.keys.update(kept)

    world.backend.before = restore
    world.advance(31 * DAY)
    world.until(lambda: IntentState.FAILED in intents(world, IntentKind.DESTROY))
    assert (world.version(1).state, world.version(1).absence) == (S.RETIRED, None)
    world.backend.before = lambda _: None
    world.advance(61)
    world.until(lambda: world.version(1).state is S.DESTROYED)


def test_a_destruction_is_refused_while_a_token_can_be_alive(world: World) -> None:
    year = 365 * DAY
    policy = UNSAFE | {"max_token_ttl": 40 * DAY, "rotate_every": year}
    world.create(keys=[{"name": "default", "alg": "ES256", "policy": policy}])
    world.standby()
    answer = revoke(world, 1)
    revoked_at = world.version(1).revoked_at
    assert revoked_at is not None
    alive_until = to_datetime(revoked_at + (60 + 10 + 40 * DAY + 300) * 1_000_000)  # type: ignore[arg-type]
    assert answer.version.destroy_at == alive_until, "the default of 30 days would be too early"
    soon = wire.DestroyRequest(destroy_at=to_datetime(world.now() + 20 * DAY * 1_000_000))  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidField, match="can be alive") as refused:
        world.service.versions.destroy(world.admin, "main", "default", "1", soon)
    assert refused.value.fields["earliest"] == alive_until
    exactly = wire.DestroyRequest(destroy_at=alive_until)
    assert world.service.versions.destroy(world.admin, "main", "default", "1", exactly).destroy_at == alive_until


def test_a_destruction_that_has_begun_cannot_be_taken_back(world: World) -> None:
    retired(world)
    refusals: list[str] = []

    def cancel(call: str) -> None:
        if call == "destroy":
            with pytest.raises(errors.TransitionRefused) as refused:
                world.service.versions.cancel_destroy(world.admin, "main", "default", "1")
            refusals.append(refused.value.detail)

    world.backend.before = cancel
    world.advance(31 * DAY)
    world.until(lambda: world.version(1).state is S.DESTROYED)
    assert refusals == ["The destruction of version 1 has begun."]
