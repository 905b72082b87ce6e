"""The timeline of one key: each version's states, recorded and planned, and the steps that are planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kms_jwks import timeline, wire
from kms_jwks.model import DAY, ExternalKey, Id, Instant, Key, KeySet, KeyVersion, VersionState
from kms_jwks.service import views
from kms_jwks.store import ReadTx
from kms_jwks.timeline import Event, Step, StepKind
from kms_jwks.times import optional, to_datetime

_S = VersionState
_STATES: Mapping[str, VersionState] = {
    "created": _S.CREATING,
    "published": _S.PUBLISHED,
    "activated": _S.ACTIVE,
    "deactivated": _S.RETIRING,
    "withdrawn": _S.RETIRED,
    "revoked": _S.REVOKED,
    "destroyed": _S.DESTROYED,
    StepKind.CREATE: _S.PUBLISHED,
    StepKind.PUBLISH: _S.PUBLISHED,
    StepKind.ACTIVATE: _S.ACTIVE,
    StepKind.RETIRE: _S.RETIRED,
    StepKind.DESTROY: _S.DESTROYED,
}
"""The state of a version after an event of each kind."""

StateChange = tuple[Instant, VersionState]
"""When a version comes into a state."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the registry holds of a key's set, from one transaction."""

    now: Instant
    key_set: KeySet
    key: Key
    keys: Sequence[Key]
    versions: Sequence[KeyVersion]
    externals: Sequence[ExternalKey]


def read_facts(tx: ReadTx, key_set: KeySet, key: Key) -> Facts:
    """Everything that a timeline is built from. Building it takes a while and is done after the transaction."""
    versions, externals = tx.versions(key_set_id=key_set.id), tx.external_keys(key_set.id)
    return Facts(tx.now(), key_set, key, tx.keys(key_set.id), versions, externals)


def build_timeline(facts: Facts) -> wire.Timeline:
    """The timeline of one key as far ahead as its policy reaches: one rotation, or the destruction of a version that
    retires."""
    now, key_set, key, keys = facts.now, facts.key_set, facts.key, facts.keys
    versions, externals = facts.versions, facts.externals
    until = timeline.later(now, max(key.policy.rotate_every, key.policy.destroy_after) + key.policy.publish_lead + DAY)
    events = timeline.forecast(key_set, keys, versions, now, key, until, externals)
    own = [v for v in versions if v.key_id == key.id]
    numbers = {v.number for v in own}
    planned = timeline.plan(key_set, keys, versions, now, externals)
    return wire.Timeline(
        key_set=key_set.name,
        key=key.name,
        enabled=key.disabled_at is None,
        now=to_datetime(now),
        until=to_datetime(until),
        versions=[
            *(_view_version(v, events, key, key_set, now) for v in own),
            *(_view_planned_version(n, events, now) for n in sorted({e.number for e in events} - numbers)),
        ],
        steps=[*_list_undated_steps(planned, key, own), *_list_dated_steps(planned, events, key)],
    )


def find_state_changes(number: int, events: Sequence[Event]) -> list[StateChange]:
    """When version `number` came, and will come, into each of its states, in order.

    A planned activation of another version retires the one that signs.
    """
    found: list[StateChange] = []
    signs = revoked = False
    for event in events:
        state = _STATES.get(event.kind)
        if event.number == number and state is not None:
            # A revocation deactivates the version that signs in the same instant; that version is never `retiring`.
            if state is _S.REVOKED and found and found[-1] == (event.at, _S.RETIRING):
                found.pop()
            revoked = revoked or state is _S.REVOKED
            if not (revoked and state is _S.RETIRING):
                found.append((event.at, state))
            signs = state is _S.ACTIVE
        elif state is _S.ACTIVE and not event.past and signs:
            found.append((event.at, _S.RETIRING))
            signs = False
    return found


def _list_undated_steps(planned: Sequence[Step], key: Key, own: Sequence[KeyVersion]) -> list[wire.TimelineStep]:
    """The steps of this key that wait for something without a date."""
    numbers: dict[Id, int | None] = {key.id: None, **{v.id: v.number for v in own}}
    return [
        wire.TimelineStep(
            kind=s.kind.value,
            due=None,
            number=numbers[s.subject],
            reason=s.reason,
            waits_for=s.waits_for,
            breach=s.breach,
        )
        for s in planned
        if s.due is None and s.subject in numbers
    ]


def _list_dated_steps(planned: Sequence[Step], events: Sequence[Event], key: Key) -> list[wire.TimelineStep]:
    """The forecast's events to come, each with what its step waits for where that is planned already."""
    planned_steps = {(s.kind.value, s.subject): s for s in planned}
    steps = []
    for event in events:
        if event.past:
            continue
        step = planned_steps.get((event.kind, event.subject))
        if event.kind == StepKind.CREATE:
            # The version does not exist yet: the step is the key's, and only the first one is planned.
            step = planned_steps.pop((event.kind, key.id), None)
        steps.append(
            wire.TimelineStep(
                kind=event.kind,
                due=to_datetime(event.at),
                number=event.number,
                reason=event.reason,
                waits_for=step.waits_for if step is not None else "",
                breach=step.breach if step is not None else None,
            )
        )
    return steps


def _list_spans(changes: Sequence[StateChange], now: Instant) -> list[wire.TimelineSpan]:
    ends = [*(at for _, (at, _) in pairwise(changes)), None]
    return [
        wire.TimelineSpan(state=state.value, start=to_datetime(at), end=optional(end), planned=at > now)
        for (at, state), end in zip(changes, ends, strict=True)
    ]


def _view_version(
    version: KeyVersion, events: Sequence[Event], key: Key, key_set: KeySet, now: Instant
) -> wire.TimelineVersion:
    report = timeline.safety(version, key, key_set, now)
    return wire.TimelineVersion(
        number=version.number,
        kid=version.kid,
        state=version.state.value,
        spans=_list_spans(find_state_changes(version.number, events), now),
        checks=views.checks(report),
        next=report.next,
        next_at=optional(report.next_at),
    )


def _view_planned_version(number: int, events: Sequence[Event], now: Instant) -> wire.TimelineVersion:
    """A version whose key pair is not made yet."""
    changes = find_state_changes(number, events)
    return wire.TimelineVersion(
        number=number,
        kid=None,
        state="planned",
        spans=_list_spans(changes, now),
        checks=[],
        next="it is made as the standby of the version before",
        next_at=optional(changes[0][0]) if changes else None,
    )
