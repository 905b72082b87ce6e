"""`plan`: every step of one key set that can be foreseen."""

from __future__ import annotations

from collections.abc import Sequence

from kms_jwks.model import ExternalKey, Instant, Key, KeySet, KeyVersion, VersionState
from kms_jwks.timeline.activation import activation, creation, publication
from kms_jwks.timeline.calendar import shown
from kms_jwks.timeline.invariants import lost_by_revocation
from kms_jwks.timeline.retirement import destruction, withdrawal
from kms_jwks.timeline.rotation import rotations
from kms_jwks.timeline.steps import Step, StepKind


def plan(
    key_set: KeySet,
    keys: Sequence[Key],
    versions: Sequence[KeyVersion],
    now: Instant,
    externals: Sequence[ExternalKey] = (),
) -> list[Step]:
    """Every step of one key set that can be foreseen, soonest first, those without a date last.

    The custodian executes those that are due. A key that is disabled is only withdrawn from and destroyed in.
    `rotate_window` governs planned activations but the very first of a set, withdrawals and destructions, `hold_until`
    planned activations alone; neither delays a creation, a publication or an emergency.
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
            steps += withdrawal(key, version, now, urgent=urgent)
            steps += destruction(key, version, now)
    steps += rotations(key_set, keys, by_key, externals, now, urgent=urgent)
    steps += [
        Step(StepKind.REMOVE_EXTERNAL, e.remove_at, e.id, f"its removal is dated {shown(e.remove_at)}")
        for e in externals
        if e.removed_at is None
    ]
    return sorted(steps, key=lambda step: (step.due is None, step.due or 0))


def in_emergency(versions: Sequence[KeyVersion]) -> bool:
    """Whether a key has lost the version that signed, or its second rotation after that is still to come."""
    active = next((v for v in versions if v.state is VersionState.ACTIVE), None)
    return lost_by_revocation(versions) if active is None else active.emergency
