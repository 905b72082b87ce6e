"""The timeline of a key: what the registry recorded, what is planned, and nothing of other keys."""

from __future__ import annotations

import pytest

from kms_jwks import errors, wire
from kms_jwks.access import Role
from kms_jwks.model import DAY, Id, Instant, VersionState
from kms_jwks.service import key_timeline
from kms_jwks.timeline import Event
from tests.service.world import World
from tests.unit.builders import T0, at

S = VersionState


def states(found: wire.TimelineVersion) -> list[str]:
    return [span.state for span in found.spans]


def test_a_rotation_with_its_recorded_and_its_planned_part(world: World) -> None:
    world.create(keys=[{"name": "default", "alg": "ES256"}, {"name": "second", "alg": "ES256"}])
    world.until(lambda: sum(v.state is S.PUBLISHED and v.visible_since is not None for v in world.versions()) == 2)
    world.advance(DAY + 1)
    world.service.keys.rotate(world.admin, "main", "default", wire.RotateRequest())
    found = world.service.keys.timeline(world.admin, "main", "default")
    first, second = found.versions[:2]
    assert states(first) == ["creating", "published", "active", "retiring", "retired", "destroyed"]
    assert [span.planned for span in first.spans] == [False, False, False, False, True, True]
    assert (first.spans[4].start - first.spans[3].start).total_seconds() == 60 + 10 + 3600 + 300
    assert all(one.end == other.start for one, other in zip(first.spans, first.spans[1:], strict=False))
    assert states(second)[:4] == ["creating", "published", "active", "retiring"]
    assert (second.spans[3].start - second.spans[2].start).days in (89, 90)
    third, fourth = found.versions[2:4]
    assert third.spans[-1].start == second.spans[3].start
    assert (fourth.state, states(fourth)) == ("planned", ["published"])
    assert second.spans[2].start == first.spans[3].start
    withdraw = next(s for s in found.steps if s.kind == "withdraw")
    assert (withdraw.number, withdraw.due) == (1, first.spans[4].start)
    assert withdraw.reason
    assert {s.number for s in found.steps} <= {v.number for v in found.versions} | {None}
    assert first.checks[0].invariant == "I1"
    other = world.service.keys.timeline(world.admin, "main", "second")
    assert {s.due for s in found.steps if s.kind == "activate"}.isdisjoint(s.due for s in other.steps)
    assert {v.kid for v in found.versions if v.kid}.isdisjoint(v.kid for v in other.versions)


def test_a_revoked_version_is_not_shown_as_retiring(world: World) -> None:
    world.create()
    world.standby()
    world.service.revocation.revoke_version(world.admin, "main", "default", "1", wire.RevokeRequest())
    first = world.service.keys.timeline(world.admin, "main", "default").versions[0]
    assert states(first)[-2:] == ["revoked", "destroyed"]
    assert "retiring" not in states(first)


def event(at_: Instant, kind: str, number: int, *, past: bool = False) -> Event:
    return Event(at_, kind, Id(f"version-{number}"), number, "", past)


def test_a_planned_activation_retires_the_one_that_signs() -> None:
    was = [event(T0, "created", 1, past=True), event(at(1), "published", 1, past=True)]
    was += [event(at(2), "activated", 1, past=True), event(at(3), "published", 2, past=True)]
    comes = [event(at(100), "activate", 2), event(at(200), "withdraw", 1), event(at(300), "activate", 3)]
    assert key_timeline.find_state_changes(1, was) == [(T0, S.CREATING), (at(1), S.PUBLISHED), (at(2), S.ACTIVE)]
    assert key_timeline.find_state_changes(1, [*was, *comes])[3:] == [(at(100), S.RETIRING), (at(200), S.RETIRED)]
    assert key_timeline.find_state_changes(2, [*was, *comes]) == [
        (at(3), S.PUBLISHED),
        (at(100), S.ACTIVE),
        (at(300), S.RETIRING),
    ]


def test_a_timeline_needs_the_right_to_read_the_key(world: World) -> None:
    world.create()
    with pytest.raises(errors.Forbidden):
        world.service.keys.timeline(world.client("none", Role.VERIFIER), "main", "default")
    with pytest.raises(errors.KeyNotFound):
        world.service.keys.timeline(world.admin, "main", "nothing")
