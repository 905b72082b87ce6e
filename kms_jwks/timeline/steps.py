"""A step of the plan: what, when, to which thing, why, and what it waits for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from kms_jwks.model import Id, Instant, Policy
from kms_jwks.timeline.calendar import shown, window


class StepKind(StrEnum):
    """What the custodian does by itself. The deactivation of a version is part of its successor's activation."""

    CREATE = "create"
    PUBLISH = "publish"
    ACTIVATE = "activate"
    WITHDRAW = "withdraw"
    TELL = "tell"
    """Tell the module a destruction date, or that it was taken back."""
    DESTROY = "destroy"
    REMOVE_EXTERNAL = "remove-external"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do. `subject` is a key's, a version's or an external key's id."""

    kind: StepKind
    due: Instant | None
    """When it happens, as far as can be foreseen; None while it waits for what has no date: a module, a worker."""
    subject: Id
    reason: str
    waits_for: str = ""
    """Why not as soon as the reason was there; empty where nothing holds it up."""
    since: Instant | None = None
    """Since when, or from when on, the reason is there."""
    breach: str | None = None
    """The invariant that the step overrides (an emergency), to be recorded on the version."""

    def is_due(self, now: Instant) -> bool:
        """Whether it is to be done now."""
        return self.due is not None and self.due <= now


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Something a step waits for, until an instant or, where that is None, for as long as it takes."""

    until: Instant | None
    words: str


def due_after(wanted: Instant | None, obstacles: Sequence[Obstacle], policy: Policy | None) -> Instant | None:
    """When a step wanted at `wanted` can happen: past every obstacle, and in the window of `policy` if one is given."""
    instants = [wanted, *(o.until for o in obstacles)]
    if any(i is None for i in instants):
        return None
    ready = max(i for i in instants if i is not None)
    return ready if policy is None else window(policy.rotate_window).opens(ready)


def waiting_words(wanted: Instant | None, obstacles: Sequence[Obstacle], policy: Policy | None, now: Instant) -> str:
    """What holds a step up after `wanted`, and now; empty where nothing does."""
    since = now if wanted is None else max(wanted, now)
    words = [o.words for o in obstacles if o.until is None or o.until > since]
    ready = due_after(wanted, obstacles, None)
    if policy is not None and ready is not None:
        opens = window(policy.rotate_window).opens(max(ready, now))
        if opens > max(ready, now):
            words.append(f"rotate_window {policy.rotate_window!r} opens at {shown(opens)}")
    return "; ".join(words)
