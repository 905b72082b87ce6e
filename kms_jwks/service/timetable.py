"""The life of one key in time: each version's states, recorded and planned, and the steps that are foreseen."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from kms_jwks import timeline, wire
from kms_jwks.model import DAY, Id, Instant, Key, KeySet, KeyVersion, VersionState
from kms_jwks.service import present
from kms_jwks.service.instants import optional, to_datetime
from kms_jwks.store import ReadTx
from kms_jwks.timeline import Step, StepKind

_S = VersionState
_BECOMES = {StepKind.ACTIVATE: _S.ACTIVE, StepKind.WITHDRAW: _S.RETIRED, StepKind.DESTROY: _S.DESTROYED}
"""What a step makes of the version that is its subject."""

Entry = tuple[Instant, VersionState]
"""When a version comes into a state."""


def of_key(tx: ReadTx, key_set: KeySet, key: Key) -> wire.Timeline:
    """The timeline of one key, as far ahead as its policy reaches: one rotation, or the destruction of what retires."""
    now, versions = tx.now(), tx.versions(key_id=key.id)
    until = timeline.later(now, max(key.policy.rotate_every, key.policy.destroy_after) + key.policy.publish_lead + DAY)
    steps = foreseen(tx, key_set, key, now, until)
    numbers = {v.id: v.number for v in versions}
    return wire.Timeline(
        key_set=key_set.name,
        key=key.name,
        enabled=key.disabled_at is None,
        now=to_datetime(now),
        until=to_datetime(until),
        versions=[_version(v, versions, steps, key, key_set, now) for v in versions],
        steps=[
            wire.TimelineStep(
                kind=s.kind.value,
                due=to_datetime(s.due),
                number=numbers.get(s.subject),
                reason=s.reason,
                breach=s.breach,
            )
            for s in steps
        ],
    )


def foreseen(tx: ReadTx, key_set: KeySet, key: Key, now: Instant, until: Instant) -> list[Step]:
    """The steps of one key that are planned until then, soonest first; those of its set's other keys are theirs."""
    versions = tx.versions(key_set_id=key_set.id)
    steps = timeline.plan(tx.keys(key_set.id), versions, tx.external_keys(key_set.id), now)
    own: set[Id] = {key.id, *(v.id for v in versions if v.key_id == key.id)}
    return [s for s in steps if s.subject in own and s.due <= until]


def entries(version: KeyVersion, siblings: Sequence[KeyVersion], steps: Sequence[Step]) -> list[Entry]:
    """When the version came, and will come, into each of its states, in order; a planned activation retires the one
    that signs."""
    recorded: list[tuple[Instant | None, VersionState]] = [
        (version.created_at, _S.CREATING),
        (version.published_at, _S.PUBLISHED),
        (version.activated_at, _S.ACTIVE),
        (version.deactivated_at if version.deactivated_at != version.revoked_at else None, _S.RETIRING),
        (version.retired_at, _S.RETIRED),
        (version.revoked_at, _S.REVOKED),
        (version.destroyed_at, _S.DESTROYED),
    ]
    found: list[Entry] = [(at, state) for at, state in recorded if at is not None]
    ids = {v.id for v in siblings}
    signs = version.state is _S.ACTIVE
    for step in steps:
        if step.subject == version.id and step.kind in _BECOMES:
            found.append((step.due, _BECOMES[step.kind]))
            signs = step.kind is StepKind.ACTIVATE
        elif step.kind is StepKind.ACTIVATE and signs and step.subject in ids:
            found.append((step.due, _S.RETIRING))
            signs = False
    return sorted(found, key=lambda entry: entry[0])


def _version(
    version: KeyVersion,
    siblings: Sequence[KeyVersion],
    steps: Sequence[Step],
    key: Key,
    key_set: KeySet,
    now: Instant,
) -> wire.TimelineVersion:
    found = entries(version, siblings, steps)
    ends = [*(at for _, (at, _) in pairwise(found)), None]
    report = timeline.safety(version, key, key_set, now)
    return wire.TimelineVersion(
        number=version.number,
        kid=version.kid,
        state=version.state.value,
        spans=[
            wire.TimelineSpan(state=state.value, start=to_datetime(at), end=optional(end), planned=at > now)
            for (at, state), end in zip(found, ends, strict=True)
        ],
        checks=present.checks(report),
        next=report.next,
        next_at=optional(report.next_at),
    )
