"""The timeline of a key: what the registry recorded, what is planned, and nothing of other keys."""

from __future__ import annotations

import pytest

from kms_jwks import errors, wire
from kms_jwks.access import Role
from kms_jwks.model import DAY, Id, Instant, VersionState
from kms_jwks.service import timetable
from kms_jwks.timeline import Step, StepKind
from tests.service.world import World
from tests.unit.builders import T0, at, version

S = VersionState


def states(found: wire.TimelineVersion) -> list[str]:
    return [span.state for span in found.spans]


def test_a_rotation_as_it_was_and_as_it_goes_on(world: World) -> None:
    world.create(keys=[{"name": "default", "alg": "ES256"}, {"name": "second", "alg": "ES256"}])
    world.until(lambda: sum(v.state is S.PUBLISHED and v.visible_since is not None for v in world.versions()) == 2)
    world.advance(DAY + 1)
    world.service.keys.rotate(world.admin, "main", "default", wire.RotateRequest())
    found = world.service.keys.timeline(world.admin, "main", "default")
    first, second = found.versions[:2]
    assert states(first) == ["creating", "published", "active", "retiring", "retired"]
    assert [span.planned for span in first.spans] == [False, False, False, False, True]
    assert (first.spans[-1].start - first.spans[-2].start).total_seconds() == 60 + 10 + 3600 + 300
    assert all(one.end == other.start for one, other in zip(first.spans, first.spans[1:], strict=False))
    assert states(second)[:3] == ["creating", "published", "active"]
    assert second.spans[2].start == first.spans[3].start
    withdraw = next(s for s in found.steps if s.kind == "withdraw")
    assert (withdraw.number, withdraw.due) == (1, first.spans[-1].start)
    assert withdraw.reason
    assert {s.number for s in found.steps} <= {v.number for v in found.versions} | {None}
    assert first.checks[0].invariant == "I1"
    other = world.service.keys.timeline(world.admin, "main", "second")
    assert "withdraw" not in {s.kind for s in other.steps}


def test_a_revoked_version_is_not_shown_as_retiring(world: World) -> None:
    world.create()
    world.standby()
    world.service.versions.revoke(world.admin, "main", "default", "1", wire.RevokeRequest())
    first = world.service.keys.timeline(world.admin, "main", "default").versions[0]
    assert states(first)[-2:] == ["revoked", "destroyed"]
    assert "retiring" not in states(first)


def test_a_planned_activation_retires_the_one_that_signs() -> None:
    active = version(1, S.ACTIVE, published_at=at(1), activated_at=at(2))
    standby = version(2, S.PUBLISHED, published_at=at(3))
    stranger = Step(StepKind.ACTIVATE, at(50), Id("another-key's"), "")
    steps = [stranger, Step(StepKind.ACTIVATE, at(100), standby.id, "it is time")]
    both = [active, standby]
    assert timetable.entries(active, both, steps)[-1] == (at(100), S.RETIRING)
    assert timetable.entries(standby, both, steps)[-1] == (at(100), S.ACTIVE)
    assert timetable.entries(active, both, [])[-1] == (at(2), S.ACTIVE)
    found: list[Instant] = [when for when, _ in timetable.entries(active, both, steps)]
    assert found == sorted(found)
    assert found[0] == T0


def test_only_who_may_read_the_key(world: World) -> None:
    world.create()
    with pytest.raises(errors.Forbidden):
        world.service.keys.timeline(world.client("none", Role.VERIFIER), "main", "default")
    with pytest.raises(errors.KeyUnknown):
        world.service.keys.timeline(world.admin, "main", "nothing")
