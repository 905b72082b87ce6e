"""The steps of one key: what happens, when, why, and what it waits for.

Creation, publication and first activation of versions, the takeover after a revocation, retirement and destruction.
Rotations, which the keys of a set do one at a time, are in `rotation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from kms_jwks import errors
from kms_jwks.algorithms import ALGORITHMS
from kms_jwks.model import DAY, SECOND, Id, Instant, Key, KeySet, KeyVersion, Policy, VersionState
from kms_jwks.timeline.invariants import (
    destructible_at,
    is_to_be_published,
    lost_by_revocation,
    of_document,
    retirable_at,
    usable_at,
)
from kms_jwks.timeline.policies import TELL_DAYS, window
from kms_jwks.times import format_instant, later

_S = VersionState

RETRY_AFTER_REFUSAL = 3600
"""Seconds until another version is requested, after a module declined to make one."""
_OUTAGES = frozenset({errors.BackendUnavailable.code, errors.BackendThrottled.code, errors.BackendTimeout.code})
"""Failures of a module that did not decline. The attempts for a version are over, those for the next one begin."""


class StepKind(StrEnum):
    """What the custodian does by itself. The deactivation of a version is part of its standby's activation.

    The values are part of the API.
    """

    CREATE = "create"
    PUBLISH = "publish"
    ACTIVATE = "activate"
    RETIRE = "withdraw"
    """Take a retiring version out of the JWKS; its state becomes `retired`."""
    TELL = "tell"
    """Tell the module a destruction date, or that the destruction was cancelled."""
    DESTROY = "destroy"
    REMOVE_EXTERNAL = "remove-external"


@dataclass(frozen=True, slots=True)
class Step:
    """One step. `subject` is the id of a key, a version or an external key."""

    kind: StepKind
    due: Instant | None
    """When it happens, as far as can be foreseen; None while it waits for a module or a worker, which has no date."""
    subject: Id
    reason: str
    waits_for: str = ""
    """What delays the step although its reason exists; empty where nothing does."""
    since: Instant | None = None
    """Since when, or from when on, the reason exists."""
    breach: str | None = None
    """The invariant that the step overrides in an emergency; it is recorded on the version."""

    def is_due(self, now: Instant) -> bool:
        """Whether the step can be taken now."""
        return self.due is not None and self.due <= now


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Something a step waits for: until an instant, or without a date where `until` is None."""

    until: Instant | None
    words: str


def due_after(wanted: Instant | None, obstacles: Sequence[Obstacle], policy: Policy | None) -> Instant | None:
    """When a step wanted at `wanted` can happen: after every obstacle, and in the window of `policy` if given."""
    instants = [wanted, *(o.until for o in obstacles)]
    if any(i is None for i in instants):
        return None
    ready = max(i for i in instants if i is not None)
    return ready if policy is None else window(policy.rotate_window).opens(ready)


def describe_delay(wanted: Instant | None, obstacles: Sequence[Obstacle], policy: Policy | None, now: Instant) -> str:
    """What delays a step after `wanted`, seen from `now`, as text; empty where nothing does."""
    since = now if wanted is None else max(wanted, now)
    words = [o.words for o in obstacles if o.until is None or o.until > since]
    ready = due_after(wanted, obstacles, None)
    if policy is not None and ready is not None:
        opens = window(policy.rotate_window).opens(max(ready, now))
        if opens > max(ready, now):
            words.append(f"rotate_window {policy.rotate_window!r} opens at {format_instant(opens)}")
    return "; ".join(words)


# --- creation, publication, activation --------------------------------------------------------------------------------


def creation(key: Key, versions: Sequence[KeyVersion], now: Instant) -> list[Step]:
    """I4: a key that signs, or signed until a revocation, has a version that is published or being made."""
    if any(v.state in (_S.CREATING, _S.PUBLISHED) for v in versions):
        return []
    active = next((v for v in versions if v.state is _S.ACTIVE), None)
    if active is not None:
        since = active.activated_at
        reason = f"version {active.number} signs and has no published standby (I4)"
    elif lost_by_revocation(versions):
        since = max(v.revoked_at for v in versions if v.revoked_at is not None)
        reason = "the version that signed was revoked and the key has no standby"
    else:
        return []
    refused = [v.destroyed_at for v in versions if v.kid is None and v.destroyed_at is not None and _declined(v)]
    obstacles = []
    if refused:
        at = later(max(refused), RETRY_AFTER_REFUSAL)
        words = f"its module declined at {format_instant(max(refused))} and is asked again at {format_instant(at)}"
        obstacles.append(Obstacle(at, words))
    due = due_after(now, obstacles, None)
    return [Step(StepKind.CREATE, due, key.id, reason, describe_delay(now, obstacles, None, now), since or now)]


def _declined(version: KeyVersion) -> bool:
    return version.failure is None or version.failure["code"] not in _OUTAGES


def publication(key_set: KeySet, versions: Sequence[KeyVersion], disabled: set[Id], now: Instant) -> list[Step]:
    """A version is published once its key pair is made; the first versions of a document all at once."""
    creating = [v for v in versions if is_to_be_published(v)]
    steps = []
    for version in creating:
        obstacles = []
        requested = [v for v in of_document(version.alg, creating) if v.kid is not None or v.key_id not in disabled]
        made = [v for v in requested if v.kid is not None]
        if version.kid is None:
            words = "its key is disabled" if version.key_id in disabled else "the custodian makes its key pair"
            obstacles.append(Obstacle(None, words))
        elif _is_first_document(key_set, version, versions) and len(made) < len(requested):
            words = f"the first document waits for every requested key pair: {len(made)} of {len(requested)} are made"
            obstacles.append(Obstacle(None, words))
        due = due_after(now, obstacles, None)
        reason = f"version {version.number} of a key is published before it signs"
        waits = describe_delay(now, obstacles, None, now)
        steps.append(Step(StepKind.PUBLISH, due, version.id, reason, waits, version.created_at))
    return steps


def _is_first_document(key_set: KeySet, version: KeyVersion, versions: Sequence[KeyVersion]) -> bool:
    """Whether the document that `version` belongs to has never published a key."""
    if ALGORITHMS[version.alg].is_post_quantum:
        return all(v.published_at is None for v in of_document(version.alg, versions))
    return key_set.first_published_at is None


def choose_standby(versions: Sequence[KeyVersion], policy: Policy) -> KeyVersion | None:
    """The published version that signs next: the one that may sign earliest; of equal ones the oldest."""
    published = [v for v in versions if v.state is _S.PUBLISHED]

    def order(version: KeyVersion) -> tuple[bool, Instant, int]:
        usable = usable_at(version, policy)
        return usable is None, usable or Instant(0), version.number

    return min(published, key=order, default=None)


def activation(key: Key, versions: Sequence[KeyVersion], now: Instant) -> list[Step]:
    """The first version of a key signs when I1 allows it; the standby of a revoked version signs at once."""
    if any(v.state is _S.ACTIVE for v in versions):
        return []
    version = choose_standby(versions, key.policy)
    if version is None:
        return []
    usable = usable_at(version, key.policy)
    if lost_by_revocation(versions):
        # The key cannot sign: the standby takes over even if I1 does not hold, and the breach is recorded on it.
        early = usable is None or usable > now
        reason = "emergency: the active version was revoked"
        return [Step(StepKind.ACTIVATE, now, version.id, reason, breach="I1" if early else None)]
    obstacles = [*publish_lead_obstacles(version, key.policy), *hold_obstacles(key.policy)]
    # The rotation window does not apply to the first versions of a document: verifiers hold no earlier one.
    governed = None if version.first_fill else key.policy
    return [
        Step(
            StepKind.ACTIVATE,
            due_after(version.published_at or now, obstacles, governed),
            version.id,
            f"the key has no version that signs, and version {version.number} is published",
            describe_delay(version.published_at, obstacles, governed, now),
            version.published_at,
        )
    ]


def publish_lead_obstacles(version: KeyVersion, policy: Policy) -> list[Obstacle]:
    """I1 as an obstacle."""
    usable = usable_at(version, policy)
    if version.visible_since is None or usable is None:
        return [Obstacle(None, f"not every live worker publishes version {version.number} yet")]
    lead = 0 if version.first_fill else policy.publish_lead
    words = (
        f"version {version.number}, visible since {format_instant(version.visible_since)}, may sign {lead} s later "
        f"(publish_lead), at {format_instant(usable)} (I1)"
    )
    return [Obstacle(usable, words)]


def hold_obstacles(policy: Policy) -> list[Obstacle]:
    """`hold_until` as an obstacle."""
    if policy.hold_until is None:
        return []
    return [Obstacle(policy.hold_until, f"hold_until {format_instant(policy.hold_until)}")]


# --- retirement, destruction ------------------------------------------------------------------------------------------


def retirement_at(key: Key, version: KeyVersion, *, urgent: bool) -> Instant | None:
    """When a retiring version leaves the JWKS: when I2 allows it, and in the window unless it is `urgent`."""
    soonest = retirable_at(version)
    if soonest is None or urgent:
        return soonest
    return window(key.policy.rotate_window).opens(soonest)


def retirement(key: Key, version: KeyVersion, now: Instant, *, urgent: bool) -> list[Step]:
    """A retiring version leaves the JWKS once no token it signed can be alive (I2)."""
    wanted = retirable_at(version)
    if version.state is not _S.RETIRING or wanted is None:
        return []
    b, since = version.bounds, format_instant(version.deactivated_at or wanted)
    reason = (
        f"no token that version {version.number} signed can be alive (I2): deactivated at {since} + handover "
        f"{b.handover} s + lease {b.lease} s + max_token_ttl {b.max_token_ttl} s + clock_skew {b.clock_skew} s"
    )
    waits = describe_delay(wanted, [], None if urgent else key.policy, now)
    return [Step(StepKind.RETIRE, retirement_at(key, version, urgent=urgent), version.id, reason, waits, wanted)]


def destruction(key: Key, version: KeyVersion, now: Instant) -> list[Step]:
    """A retired or revoked version is destroyed on its date. Its module is told the date, or a cancellation, before."""
    if version.state not in (_S.RETIRED, _S.REVOKED):
        return []
    at = destructible_at(version)
    if version.destroy_at is None or at is None:
        if version.destroy_told is None:
            return []
        return [Step(StepKind.TELL, now, version.id, "the destruction that its module was told is cancelled")]
    alive = [Obstacle(at, f"a token it signed can be alive until {format_instant(at)} (I2)")]
    destroy = Step(
        StepKind.DESTROY,
        due_after(version.destroy_at, alive, key.policy),
        version.id,
        f"its destruction is dated {format_instant(version.destroy_at)}",
        describe_delay(version.destroy_at, alive, key.policy, now),
        version.destroy_at,
    )
    if destroy.is_due(now) or version.destroy_told == version.destroy_at:
        return [destroy]
    earliest = later(at, -TELL_DAYS[1] * DAY)
    ended = version.revoked_at or version.retired_at or now
    words = f"its module is told its destruction date {format_instant(at)}, at most {TELL_DAYS[1]} d ahead"
    return [Step(StepKind.TELL, max(earliest, ended), version.id, words), destroy]


def days_until(destroy_at: Instant, now: Instant) -> int:
    """In how many days a module has to destroy a key, rounded up so that it never destroys before `destroy_at`."""
    days = -((now - destroy_at) // (DAY * SECOND))
    return min(max(days, TELL_DAYS[0]), TELL_DAYS[1])
