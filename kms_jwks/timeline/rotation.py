"""Rotations, scheduled ones and the second one after an emergency: one key of a set at a time, in a fixed order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kms_jwks.model import ExternalKey, Id, Instant, Key, KeySet, KeyVersion, Policy, VersionState
from kms_jwks.timeline.invariants import kids_after_rotation, of_document, rotation_blocker, rotation_wanted
from kms_jwks.timeline.policies import MAX_KIDS, bounds, jitter
from kms_jwks.timeline.steps import (
    Obstacle,
    Step,
    StepKind,
    choose_standby,
    describe_delay,
    due_after,
    hold_obstacles,
    publish_lead_obstacles,
    retirement_at,
)
from kms_jwks.times import format_instant

_S = VersionState


@dataclass(frozen=True, slots=True)
class _Rotation:
    """One key's next rotation: `wanted` by the schedule, delayed by `obstacles` and, unless urgent, by the window."""

    key: Key
    active: KeyVersion
    standby: KeyVersion | None
    wanted: Instant
    reason: str
    obstacles: tuple[Obstacle, ...]

    @property
    def governed(self) -> Policy | None:
        """The policy whose window applies; None in an emergency."""
        return None if self.active.emergency else self.key.policy

    @property
    def due(self) -> Instant | None:
        return due_after(self.wanted, self.obstacles, self.governed)

    def order(self, now: Instant) -> tuple[bool, int, bool, int, str]:
        """Sort key: the earliest possible rotation first, emergencies before others, then the longest overdue."""
        due = self.due
        return (due is None, max(due or now, now), not self.active.emergency, self.wanted, self.key.id)


def rotations(
    key_set: KeySet,
    keys: Sequence[Key],
    versions: Mapping[Id, Sequence[KeyVersion]],
    externals: Sequence[ExternalKey],
    now: Instant,
    *,
    urgent: bool,
) -> list[Step]:
    """The next rotation of each key that signs. `versions` by key; `urgent`: retirements ignore the window."""
    document = [v for own in versions.values() for v in own]
    candidates = [
        _with_document_obstacles(rotation, keys, document, externals, urgent=urgent)
        for key in keys
        if key.disabled_at is None and (rotation := _next_rotation(key, versions[key.id])) is not None
    ]
    steps: list[Step] = []
    previous: Obstacle | None = None
    for candidate in sorted(candidates, key=lambda r: r.order(now)):
        rotation = candidate if previous is None else replace(candidate, obstacles=(*candidate.obstacles, previous))
        due = rotation.due
        waits = describe_delay(rotation.wanted, rotation.obstacles, rotation.governed, now)
        subject = rotation.standby.id if rotation.standby is not None else rotation.key.id
        steps.append(Step(StepKind.ACTIVATE, due, subject, rotation.reason, waits, rotation.wanted))
        if due is not None:
            previous = _blocks_next(key_set, rotation, max(due, now), urgent=urgent)
    return steps


def _next_rotation(key: Key, versions: Sequence[KeyVersion]) -> _Rotation | None:
    active = next((v for v in versions if v.state is _S.ACTIVE), None)
    if active is None:
        return None
    standby = choose_standby(versions, key.policy)
    if standby is None:
        obstacles = [Obstacle(None, "its standby is not published yet")]
    else:
        obstacles = publish_lead_obstacles(standby, key.policy)
    if active.emergency:
        wanted = active.activated_at or active.created_at
        reason = (
            f"version {active.number} took over from a revoked one at {format_instant(wanted)}: verifiers that cache "
            "without limit fetch again only when they see a kid that they do not hold"
        )
    else:
        policy = key.policy
        wanted = rotation_wanted(active, policy)
        since = format_instant(active.activated_at or active.created_at)
        reason = (
            f"version {active.number} signs since {since}; rotate_every {policy.rotate_every} s less its jitter of "
            f"{jitter(active, policy)} s ends at {format_instant(wanted)}"
        )
        obstacles += hold_obstacles(policy)
    return _Rotation(key, active, standby, wanted, reason, tuple(obstacles))


def _with_document_obstacles(
    rotation: _Rotation,
    keys: Sequence[Key],
    document: Sequence[KeyVersion],
    externals: Sequence[ExternalKey],
    *,
    urgent: bool,
) -> _Rotation:
    """`rotation` with the obstacles that I5 adds: another key's retiring version, and room in the document."""
    found = list(rotation.obstacles)
    document, externals = of_document(rotation.key.alg, document), of_document(rotation.key.alg, externals)
    blocker = rotation_blocker(rotation.key.id, document)
    if blocker is not None:
        owner = next(k for k in keys if k.id == blocker.key_id)
        until = retirement_at(owner, blocker, urgent=urgent)
        words = f"version {blocker.number} of key {owner.name!r} is retiring, keys of a set rotate one at a time (I5)"
        found.append(Obstacle(until, words if until is None else f"{words}, until {format_instant(until)}"))
    kids = kids_after_rotation(rotation.key.id, document, externals)
    if kids > MAX_KIDS:
        found.append(Obstacle(_room_at(keys, document, urgent=urgent), f"{kids} kids of {MAX_KIDS} (I5)"))
    return replace(rotation, obstacles=tuple(found))


def _room_at(keys: Sequence[Key], document: Sequence[KeyVersion], *, urgent: bool) -> Instant | None:
    by_id = {key.id: key for key in keys}
    leaving = [retirement_at(by_id[v.key_id], v, urgent=urgent) for v in document if v.state is _S.RETIRING]
    return min((at for at in leaving if at is not None), default=None)


def _blocks_next(key_set: KeySet, rotation: _Rotation, at: Instant, *, urgent: bool) -> Obstacle:
    """What the next key of the set waits for after `rotation` at `at`: the retirement of its old version."""
    active = rotation.active
    last = bounds(rotation.key.policy, lease=active.bounds.lease, cache_lifetime=key_set.cache_lifetime)
    retiring = replace(active, state=_S.RETIRING, deactivated_at=at, bounds=active.bounds.widened(last))
    until = retirement_at(rotation.key, retiring, urgent=urgent)
    return Obstacle(until, f"key {rotation.key.name!r} of the set rotates first, at {format_instant(at)} (I5)")
