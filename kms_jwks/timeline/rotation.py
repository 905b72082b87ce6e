"""Scheduled rotation, and the second one after an emergency: one key of a set at a time, in a fixed order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kms_jwks.model import ExternalKey, Id, Instant, Key, KeySet, KeyVersion, Policy, VersionState
from kms_jwks.timeline.activation import held, successor, visibility
from kms_jwks.timeline.calendar import jitter, later, shown
from kms_jwks.timeline.invariants import kids_after_rotation, of_document, rotation_blocker
from kms_jwks.timeline.policies import MAX_KIDS, bounds
from kms_jwks.timeline.retirement import withdrawal_at
from kms_jwks.timeline.steps import Obstacle, Step, StepKind, due_after, waiting_words

_S = VersionState


@dataclass(frozen=True, slots=True)
class _Turn:
    """One key's next rotation: `wanted` by the schedule, held up by `obstacles`, governed by the window or not."""

    key: Key
    active: KeyVersion
    standby: KeyVersion | None
    wanted: Instant
    reason: str
    obstacles: tuple[Obstacle, ...]

    @property
    def governed(self) -> Policy | None:
        """The policy whose window counts; none in an emergency."""
        return None if self.active.emergency else self.key.policy

    @property
    def due(self) -> Instant | None:
        return due_after(self.wanted, self.obstacles, self.governed)

    def order(self, now: Instant) -> tuple[bool, int, bool, int, str]:
        """Who goes first: what can go first, emergencies before others, then the longest overdue."""
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
    """The next rotation of each key that signs. `versions` by key; `urgent`: withdrawals wait for no window."""
    document = [v for own in versions.values() for v in own]
    turns = [
        _blocked(turn, keys, document, externals, urgent=urgent)
        for key in keys
        if key.disabled_at is None and (turn := _turn(key, versions[key.id])) is not None
    ]
    steps: list[Step] = []
    before: Obstacle | None = None
    for alone in sorted(turns, key=lambda t: t.order(now)):
        turn = alone if before is None else replace(alone, obstacles=(*alone.obstacles, before))
        due = turn.due
        waits = waiting_words(turn.wanted, turn.obstacles, turn.governed, now)
        subject = turn.standby.id if turn.standby is not None else turn.key.id
        steps.append(Step(StepKind.ACTIVATE, due, subject, turn.reason, waits, turn.wanted))
        if due is not None:
            before = _behind(key_set, turn, max(due, now), urgent=urgent)
    return steps


def rotation_wanted(active: KeyVersion, policy: Policy) -> Instant:
    """When the schedule wants `active` to be replaced: `rotate_every` after its activation, less its jitter."""
    return later(active.activated_at or active.created_at, policy.rotate_every - jitter(active, policy))


def _turn(key: Key, versions: Sequence[KeyVersion]) -> _Turn | None:
    active = next((v for v in versions if v.state is _S.ACTIVE), None)
    if active is None:
        return None
    standby = successor(versions, key.policy)
    obstacles = visibility(standby, key.policy) if standby else [Obstacle(None, "its standby is not published yet")]
    if active.emergency:
        wanted = active.activated_at or active.created_at
        reason = (
            f"version {active.number} took over from a revoked one at {shown(wanted)}: verifiers that cache for ever "
            "ask again only when they meet a kid that they do not hold"
        )
    else:
        policy = key.policy
        wanted = rotation_wanted(active, policy)
        reason = (
            f"version {active.number} signs since {shown(active.activated_at or active.created_at)}; rotate_every "
            f"{policy.rotate_every} s less its jitter of {jitter(active, policy)} s ends at {shown(wanted)}"
        )
        obstacles += held(policy)
    return _Turn(key, active, standby, wanted, reason, tuple(obstacles))


def _blocked(
    turn: _Turn, keys: Sequence[Key], document: Sequence[KeyVersion], externals: Sequence[ExternalKey], *, urgent: bool
) -> _Turn:
    """With what the set's document puts in its way (I5)."""
    found = list(turn.obstacles)
    document, externals = of_document(turn.key.alg, document), of_document(turn.key.alg, externals)
    blocker = rotation_blocker(turn.key.id, document)
    if blocker is not None:
        owner = next(k for k in keys if k.id == blocker.key_id)
        until = withdrawal_at(owner, blocker, urgent=urgent)
        words = f"version {blocker.number} of key {owner.name!r} is retiring, keys of a set rotate one at a time (I5)"
        found.append(Obstacle(until, words if until is None else f"{words}, until {shown(until)}"))
    kids = kids_after_rotation(turn.key.id, document, externals)
    if kids > MAX_KIDS:
        found.append(Obstacle(_room_at(keys, document, urgent=urgent), f"{kids} kids of {MAX_KIDS} (I5)"))
    return replace(turn, obstacles=tuple(found))


def _room_at(keys: Sequence[Key], document: Sequence[KeyVersion], *, urgent: bool) -> Instant | None:
    by_id = {key.id: key for key in keys}
    leaving = [withdrawal_at(by_id[v.key_id], v, urgent=urgent) for v in document if v.state is _S.RETIRING]
    return min((at for at in leaving if at is not None), default=None)


def _behind(key_set: KeySet, turn: _Turn, at: Instant, *, urgent: bool) -> Obstacle:
    """What the next key of the set waits for once `turn` has been taken at `at`."""
    lease = turn.active.bounds.lease
    last = bounds(turn.key.policy, lease=lease, cache_lifetime=key_set.cache_lifetime)
    retiring = replace(turn.active, state=_S.RETIRING, deactivated_at=at, bounds=turn.active.bounds.widened(last))
    until = withdrawal_at(turn.key, retiring, urgent=urgent)
    return Obstacle(until, f"key {turn.key.name!r} of the set rotates first, at {shown(at)} (I5)")
