"""How a key comes to have a version that signs and a standby behind it: creation, publication, activation.

Of a key that has no version that signs, or that lost it by a revocation; `rotation` has the scheduled ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.model import Id, Instant, Key, KeySet, KeyVersion, Policy, VersionState
from kms_jwks.timeline.calendar import later, shown
from kms_jwks.timeline.invariants import lost_by_revocation, of_document, usable_at
from kms_jwks.timeline.steps import Obstacle, Step, StepKind, due_after, waiting_words

_S = VersionState

AFTER_GIVING_UP = 3600
"""Seconds until another version is asked for, after a module declined for good to make one."""


def creation(key: Key, versions: Sequence[KeyVersion], now: Instant) -> list[Step]:
    """I4: a key that signs, or signed until a revocation, has a version published or coming."""
    if any(v.state in (_S.CREATING, _S.PUBLISHED) for v in versions):
        return []
    active = next((v for v in versions if v.state is _S.ACTIVE), None)
    if active is not None:
        since = active.activated_at
        reason = f"version {active.number} signs and has no published standby (I4)"
    elif lost_by_revocation(versions):
        since = max(v.revoked_at for v in versions if v.revoked_at is not None)
        reason = "the version that signed was revoked and nothing succeeds it"
    else:
        return []
    declined = [v.destroyed_at for v in versions if v.kid is None and v.destroyed_at is not None]
    retry = [Obstacle(t, f"its module declined at {shown(t)} and is asked again") for t in (_again(declined),) if t]
    due = due_after(now, retry, None)
    return [Step(StepKind.CREATE, due, key.id, reason, waiting_words(now, retry, None, now), since or now)]


def _again(declined: Sequence[Instant]) -> Instant | None:
    return later(max(declined), AFTER_GIVING_UP) if declined else None


def publication(key_set: KeySet, versions: Sequence[KeyVersion], disabled: set[Id], now: Instant) -> list[Step]:
    """A version is published as soon as its pair is made; the first ones of a document all at once."""
    creating = [v for v in versions if v.state is _S.CREATING]
    steps = []
    for version in creating:
        obstacles = []
        asked = [v for v in of_document(version.alg, creating) if v.kid is not None or v.key_id not in disabled]
        made = [v for v in asked if v.kid is not None]
        if version.kid is None:
            who = "its key is disabled" if version.key_id in disabled else "the custodian makes its key pair"
            obstacles.append(Obstacle(None, who))
        elif _is_first(key_set, version, versions) and len(made) < len(asked):
            words = f"the first document waits for every pair asked for: {len(made)} of {len(asked)} are made"
            obstacles.append(Obstacle(None, words))
        due = due_after(now, obstacles, None)
        reason = f"version {version.number} of a key is published before it signs"
        waits = waiting_words(now, obstacles, None, now)
        steps.append(Step(StepKind.PUBLISH, due, version.id, reason, waits, version.created_at))
    return steps


def _is_first(key_set: KeySet, version: KeyVersion, versions: Sequence[KeyVersion]) -> bool:
    """Whether the document that a version belongs to has published nothing yet."""
    if ALGORITHMS[version.alg].is_post_quantum:
        return all(v.published_at is None for v in of_document(version.alg, versions))
    return key_set.first_published_at is None


def successor(versions: Sequence[KeyVersion], policy: Policy) -> KeyVersion | None:
    """The published version that signs next: the one that may sign first, and of several the oldest."""
    waiting = [v for v in versions if v.state is _S.PUBLISHED]

    def order(version: KeyVersion) -> tuple[bool, Instant, int]:
        usable = usable_at(version, policy)
        return usable is None, usable or Instant(0), version.number

    return min(waiting, key=order, default=None)


def activation(key: Key, versions: Sequence[KeyVersion], now: Instant) -> list[Step]:
    """The first version of a key signs when I1 allows it; the successor of a revoked one at once, however young."""
    if any(v.state is _S.ACTIVE for v in versions):
        return []
    version = successor(versions, key.policy)
    if version is None:
        return []
    usable = usable_at(version, key.policy)
    if lost_by_revocation(versions):
        # Signing has ended: the successor takes over however young it is, and the breach stays on it.
        early = usable is None or usable > now
        reason = "emergency: the active version was revoked"
        return [Step(StepKind.ACTIVATE, now, version.id, reason, breach="I1" if early else None)]
    obstacles = [*visibility(version, key.policy), *held(key.policy)]
    # Nobody holds a document that never was: its first versions need no quiet hour.
    governed = None if version.first_fill else key.policy
    return [
        Step(
            StepKind.ACTIVATE,
            due_after(version.published_at or now, obstacles, governed),
            version.id,
            f"the key has no version that signs, and version {version.number} is published",
            waiting_words(version.published_at, obstacles, governed, now),
            version.published_at,
        )
    ]


def visibility(version: KeyVersion, policy: Policy) -> list[Obstacle]:
    """I1 as an obstacle."""
    usable = usable_at(version, policy)
    if version.visible_since is None or usable is None:
        return [Obstacle(None, f"not every live worker publishes version {version.number} yet")]
    lead = 0 if version.first_fill else policy.publish_lead
    words = (
        f"version {version.number}, visible since {shown(version.visible_since)}, may sign {lead} s later "
        f"(publish_lead), at {shown(usable)} (I1)"
    )
    return [Obstacle(usable, words)]


def held(policy: Policy) -> list[Obstacle]:
    """`hold_until` as an obstacle."""
    if policy.hold_until is None:
        return []
    return [Obstacle(policy.hold_until, f"hold_until {shown(policy.hold_until)}")]
