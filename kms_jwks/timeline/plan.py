"""`plan`: every step of one key set that can be foreseen; `forecast`: the life of one key on a time line.

The forecast shows what happened, and what will happen when every step is taken once it is due.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kms_jwks.model import ExternalKey, Id, Instant, Key, KeySet, KeyVersion, Origin, VersionState
from kms_jwks.timeline.invariants import lost_by_revocation
from kms_jwks.timeline.policies import MIN_DESTROY_AFTER, bounds
from kms_jwks.timeline.rotation import rotations
from kms_jwks.timeline.steps import Step, StepKind, activation, creation, destruction, publication, retirement
from kms_jwks.times import format_instant, later

_S = VersionState

_MAX_STEPS = 300
"""How many steps of the whole set a forecast takes at most; this limits a forecast over years."""
_PAST = (
    ("created", "created_at"),
    ("published", "published_at"),
    ("visible", "visible_since"),
    ("activated", "activated_at"),
    ("deactivated", "deactivated_at"),
    ("withdrawn", "retired_at"),
    ("revoked", "revoked_at"),
    ("destroyed", "destroyed_at"),
)


def plan(
    key_set: KeySet,
    keys: Sequence[Key],
    versions: Sequence[KeyVersion],
    now: Instant,
    externals: Sequence[ExternalKey] = (),
) -> list[Step]:
    """Every step of one key set that can be foreseen, soonest first, those without a date last.

    The custodian executes those that are due. A disabled key gets retirements and destructions only.
    `rotate_window` applies to planned activations (except the first ones of a document), retirements and destructions;
    `hold_until` applies to planned activations only. Neither delays a creation, a publication or an emergency.
    """
    by_key = {key.id: [v for v in versions if v.key_id == key.id] for key in keys}
    urgent = any(key.disabled_at is None and in_emergency(by_key[key.id]) for key in keys)
    steps = publication(key_set, versions, {key.id for key in keys if key.disabled_at is not None}, now)
    for key in keys:
        own = by_key[key.id]
        if key.disabled_at is None:
            steps += creation(key, own, now)
            steps += activation(key, own, now)
        for version in own:
            steps += retirement(key, version, now, urgent=urgent)
            steps += destruction(key, version, now)
    steps += rotations(key_set, keys, by_key, externals, now, urgent=urgent)
    steps += [
        Step(StepKind.REMOVE_EXTERNAL, e.remove_at, e.id, f"its removal is dated {format_instant(e.remove_at)}")
        for e in externals
        if e.removed_at is None
    ]
    return sorted(steps, key=lambda step: (step.due is None, step.due or 0))


def in_emergency(versions: Sequence[KeyVersion]) -> bool:
    """Whether a key lost its active version to a revocation, or still waits for the second rotation after one."""
    active = next((v for v in versions if v.state is VersionState.ACTIVE), None)
    return lost_by_revocation(versions) if active is None else active.emergency


# --- forecast ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a version, or will. `subject` is its id, or ``coming-<key>-<number>`` before the
    version exists."""

    at: Instant
    kind: str
    """Past: created, published, visible, activated, deactivated, withdrawn (the version is `retired`), revoked,
    destroyed. Future: a StepKind's value. Part of the API."""
    subject: Id
    number: int
    reason: str
    past: bool


def forecast(
    key_set: KeySet,
    keys: Sequence[Key],
    versions: Sequence[KeyVersion],
    now: Instant,
    key: Key,
    until: Instant,
    externals: Sequence[ExternalKey] = (),
) -> list[Event]:
    """What happened to the versions of `key`, and every step until `until`, in the order of time.

    It assumes that modules and workers answer at once: a standby is published and visible when it is due. The other
    keys of the set are simulated too, because keys of a set rotate one at a time.
    """
    events = [e for v in versions if v.key_id == key.id for e in _history(v)]
    enabled = {k.id for k in keys if k.disabled_at is None}
    current = [_assume_answered(v, now) if v.key_id in enabled else v for v in versions]
    remaining, clock = list(externals), now
    for _ in range(_MAX_STEPS):
        steps = [s for s in plan(key_set, keys, current, clock, remaining) if s.due is not None and s.due <= until]
        if not steps:
            break
        step = steps[0]
        clock = max(clock, step.due or clock)
        current, remaining, touched = _simulate(step, clock, key_set, keys, current, remaining)
        if touched is not None and touched.key_id == key.id:
            events.append(Event(clock, step.kind.value, touched.id, touched.number, step.reason, past=False))
    return sorted(events, key=lambda e: (e.at, not e.past))


def _history(version: KeyVersion) -> list[Event]:
    moments = [(name, getattr(version, field)) for name, field in _PAST]
    return [
        Event(at, name, version.id, version.number, (version.revoke_reason or "") if name == "revoked" else "", True)
        for name, at in moments
        if at is not None
    ]


def _assume_answered(version: KeyVersion, now: Instant) -> KeyVersion:
    """`version` as if the module or the workers that it waits for had just answered."""
    if version.state is _S.CREATING:
        return replace(version, state=_S.PUBLISHED, kid="", published_at=now, visible_since=now)
    if version.state is _S.PUBLISHED and version.visible_since is None:
        return replace(version, visible_since=now)
    return version


def _simulate(
    step: Step,
    at: Instant,
    key_set: KeySet,
    keys: Sequence[Key],
    versions: Sequence[KeyVersion],
    externals: list[ExternalKey],
) -> tuple[list[KeyVersion], list[ExternalKey], KeyVersion | None]:
    """The versions and external keys of the set after `step`, and the version that it changed."""
    if step.kind is StepKind.REMOVE_EXTERNAL:
        return list(versions), [e for e in externals if e.id != step.subject], None
    if step.kind is StepKind.CREATE:
        key = next(k for k in keys if k.id == step.subject)
        made = _new_standby(key, versions, at)
        return [*versions, made], externals, made
    version = next(v for v in versions if v.id == step.subject)
    key = next(k for k in keys if k.id == version.key_id)
    changed = _changed(step.kind, version, key, key_set, versions, at)
    by_id = {v.id: v for v in changed}
    return [by_id.get(v.id, v) for v in versions], externals, by_id[version.id]


def _new_standby(key: Key, versions: Sequence[KeyVersion], at: Instant) -> KeyVersion:
    number = max((v.number for v in versions if v.key_id == key.id), default=0) + 1
    return KeyVersion(
        id=Id(f"coming-{key.name}-{number}"),
        key_set_id=key.key_set_id,
        key_id=key.id,
        number=number,
        alg=key.alg,
        rsa_bits=key.rsa_bits,
        backend=key.backend,
        state=_S.PUBLISHED,
        created_at=at,
        kid="",
        ref={},
        published_at=at,
        visible_since=at,
    )


def _changed(
    kind: StepKind, version: KeyVersion, key: Key, key_set: KeySet, versions: Sequence[KeyVersion], at: Instant
) -> list[KeyVersion]:
    match kind:
        case StepKind.PUBLISH:
            return [replace(version, state=_S.PUBLISHED, published_at=at, visible_since=at)]
        case StepKind.ACTIVATE:
            return _activated(version, key, key_set, versions, at)
        case StepKind.RETIRE:
            # An adopted key pair is destroyed on request only.
            adopted = version.origin is Origin.ADOPTED
            destroy_at = None if adopted else later(at, max(key.policy.destroy_after, MIN_DESTROY_AFTER))
            return [replace(version, state=_S.RETIRED, retired_at=at, destroy_at=destroy_at)]
        case StepKind.TELL:
            return [replace(version, destroy_told=version.destroy_at)]
        case _:
            return [replace(version, state=_S.DESTROYED, destroyed_at=at)]


def _activated(
    version: KeyVersion, key: Key, key_set: KeySet, versions: Sequence[KeyVersion], at: Instant
) -> list[KeyVersion]:
    own = [v for v in versions if v.key_id == key.id]
    active = next((v for v in own if v.state is _S.ACTIVE), None)
    lease = max((v.bounds.lease for v in versions), default=0)
    in_force = bounds(key.policy, lease=lease, cache_lifetime=key_set.cache_lifetime)
    started = replace(version, state=_S.ACTIVE, activated_at=at, bounds=in_force)
    if active is None:
        return [replace(started, emergency=lost_by_revocation(own))]
    ended = replace(
        active, state=_S.RETIRING, deactivated_at=at, bounds=active.bounds.widened(in_force), emergency=False
    )
    return [started, ended]
