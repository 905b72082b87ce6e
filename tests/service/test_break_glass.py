"""`break_glass` overrides I1 and I2 alone, with a reason and a permission of its own, recorded on the version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kms_jwks import errors, wire
from kms_jwks.access import Role
from kms_jwks.model import DAY, VersionState
from kms_jwks.service.clients import add_grant
from kms_jwks.service.guard import RequestContext
from kms_jwks.timeline import later
from kms_jwks.times import to_datetime
from tests.service.world import World

S = VersionState
REASON = "the standby must sign before the audit"


def operator(world: World, *more: Role) -> RequestContext:
    """A client with the role operator and further roles."""
    context = world.client("operator", Role.OPERATOR)
    with world.store().write() as tx:
        owner = tx.client("operator")
        assert owner is not None
        for role in more:
            add_grant(tx, owner, role, None, None)
    return context


def rotate(world: World, context: RequestContext, **fields: Any) -> wire.Key:
    return world.service.keys.rotate(context, "main", "default", wire.RotateRequest(**fields))


def activate(world: World, context: RequestContext, **fields: Any) -> wire.Version:
    return world.service.versions.activate(context, "main", "default", "2", wire.ActivateRequest(**fields))


def retire(world: World, context: RequestContext, number: str = "1", **fields: Any) -> wire.Version:
    return world.service.versions.retire(context, "main", "default", number, wire.RetireRequest(**fields))


@pytest.mark.parametrize("step", [rotate, activate])
def test_i1_is_overridden_with_a_reason_that_is_recorded(world: World, step: Callable[..., Any]) -> None:
    first = world.create().keys[0].active_kid
    standby = world.standby()
    context = operator(world, Role.BREAK_GLASS)
    with pytest.raises(errors.NotYetUsable):
        step(world, context)
    step(world, context, break_glass=True, reason=REASON)
    assert world.sign().kid == standby.kid != first
    (breach,) = world.service.versions.get(world.admin, "main", "default", "2").breaches
    assert (breach.invariant, breach.reason, breach.who) == ("I1", REASON, "operator")
    world.service.revocation.revoke_version(world.admin, "main", "default", "2", wire.RevokeRequest())
    world.advance(40 * DAY)
    gone = world.until(lambda: world.version(2) if world.version(2).state is S.DESTROYED else None)
    assert gone is not None
    assert [b.who for b in gone.breaches] == ["operator"], "a breach stays on the version for ever"


def test_i2_is_overridden_with_a_reason_and_the_pair_is_kept_until_its_tokens_have_ended(two_workers: World) -> None:
    world = two_workers
    long = {"max_token_ttl": 20 * DAY, "rotate_every": 60 * DAY, "destroy_after": 7 * DAY}
    first = world.create(keys=[{"name": "default", "alg": "ES256", "policy": long}]).keys[0].active_kid
    world.standby()
    context = operator(world, Role.BREAK_GLASS)
    world.advance(DAY + 1)
    rotate(world, context)
    with pytest.raises(errors.TransitionRefused) as refusal:
        retire(world, context)
    assert refusal.value.fields["retirable_at"] is not None
    retired = retire(world, context, break_glass=True, reason=REASON)
    assert retired.state == "retired"
    assert [(b.invariant, b.reason, b.who) for b in retired.breaches] == [("I2", REASON, "operator")]
    for worker in world.workers:
        assert first not in world.kids(worker)
    row = world.version(1)
    assert row.deactivated_at is not None
    alive_until = later(row.deactivated_at, 60 + 10 + 20 * DAY + 300)
    assert row.destroy_at == alive_until, "a token it signed may be alive until then"
    early = wire.DestroyRequest(destroy_at=to_datetime(later(world.now(), 8 * DAY)))
    with pytest.raises(errors.InvalidField, match="I2") as too_early:
        world.service.versions.destroy(world.admin, "main", "default", "1", early)
    assert too_early.value.fields["earliest"] == to_datetime(alive_until)


def test_a_version_is_retired_on_request_once_i2_holds(world: World) -> None:
    world.create()
    world.standby()
    context = operator(world)
    for number in ("1", "2"):
        with pytest.raises(errors.TransitionRefused):
            retire(world, context, number)
    world.advance(DAY + 1)
    rotate(world, context)
    world._stop.set()  # the custodian would retire the version first
    assert world._custodian is not None
    world._custodian.join()
    world.advance(4000)
    assert (retire(world, context).state, world.version(1).breaches) == ("retired", ())


def test_a_reason_is_not_recorded_where_i1_holds(world: World) -> None:
    world.create()
    world.standby()
    world.advance(DAY + 1)
    rotate(world, operator(world, Role.BREAK_GLASS), break_glass=True, reason=REASON)
    assert world.version(2).state is S.ACTIVE
    assert world.version(2).breaches == ()


@pytest.mark.parametrize("step", [rotate, activate, retire])
def test_break_glass_needs_its_permission(world: World, step: Callable[..., Any]) -> None:
    world.create()
    world.standby()
    for context in (world.admin, operator(world), world.client("only", Role.BREAK_GLASS)):
        with pytest.raises(errors.Forbidden):
            step(world, context, break_glass=True, reason=REASON)
    assert (world.version(1).state, world.version(2).state) == (S.ACTIVE, S.PUBLISHED)


@pytest.mark.parametrize("reason", ["", "  "])
def test_break_glass_needs_a_reason(world: World, reason: str) -> None:
    world.create()
    world.standby()
    with pytest.raises(errors.InvalidField, match="reason"):
        rotate(world, operator(world, Role.BREAK_GLASS), break_glass=True, reason=reason)


def test_room_states_and_a_disabled_key_are_never_overridden(world: World) -> None:
    world.create(keys=[{"name": "default", "alg": "ES256"}, {"name": "second", "alg": "ES256"}])
    world.until(lambda: sum(v.state is S.PUBLISHED and v.visible_since is not None for v in world.versions()) == 2)
    context = operator(world, Role.BREAK_GLASS)
    glass = {"break_glass": True, "reason": REASON}
    rotate(world, context, **glass)
    with pytest.raises(errors.RotationInProgress):
        world.service.keys.rotate(context, "main", "second", wire.RotateRequest(**glass))  # type: ignore[arg-type]
    with pytest.raises(errors.TransitionRefused):
        retire(world, context, "2", **glass)
    world.service.keys.disable(world.admin, "main", "default")
    with pytest.raises(errors.KeyDisabled):
        rotate(world, context, **glass)
