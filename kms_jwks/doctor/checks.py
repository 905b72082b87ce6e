"""The result of a check: a name, a state, what was found, and how to fix it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from kms_jwks import errors


class State(StrEnum):
    """The state of a check's subject."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `next_step` is empty if there is nothing to do."""

    name: str
    state: State
    detail: str
    next_step: str = ""


def worst(checks: Iterable[Check]) -> State:
    """The worst state among the checks."""
    order = list(State)
    return max((check.state for check in checks), key=order.index, default=State.OK)


def failed(name: str, error: errors.Error, step: str) -> Check:
    """A check that ended in an error. `step` is the advice if the error has only the general advice of its class."""
    special = isinstance(error, errors.SchemaMismatch | errors.PoolerUnsuitable)
    own = error.next_step if special or error.next_step != type(error).next_step else ""
    return Check(name, State.FAILURE, error.detail.rstrip("."), own or step)


def some(names: list[str]) -> str:
    """At most five names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
