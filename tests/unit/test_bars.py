"""Time as lines of text: what a person reads in a terminal, with and without block characters."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kms_jwks import wire
from kms_jwks.cli.bars import check_bars, key_bars

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
WIDTHS = (40, 80, 160)


def day(days: float) -> datetime:
    return NOW + timedelta(days=days)


def version(number: int, state: str, *spans: tuple[str, float, float | None], **more: Any) -> wire.TimelineVersion:
    return wire.TimelineVersion(
        number=number,
        kid=f"kid-{number}",
        state=state,
        spans=[
            wire.TimelineSpan(
                state=name, start=day(start), end=None if end is None else day(end), planned=day(start) > NOW
            )
            for name, start, end in spans
        ],
        checks=[],
        next="",
        next_at=more.get("next_at"),
    )


def key(*versions: wire.TimelineVersion, steps: tuple[float, ...] = ()) -> wire.Timeline:
    return wire.Timeline(
        key_set="main",
        key="default",
        enabled=True,
        now=NOW,
        until=day(120),
        versions=list(versions),
        steps=[wire.TimelineStep(kind="activate", due=day(due), number=2, reason="", breach=None) for due in steps],
    )


ROTATION = key(
    version(1, "active", ("creating", -40, -39.9999), ("published", -39.9999, -39), ("active", -39, 40),
            ("retiring", 40, 40.05), ("retired", 40.05, 70), ("destroyed", 70, None)),
    version(2, "published", ("creating", -39, -38.9999), ("published", -38.9999, 40), ("active", 40, None)),
    version(3, "destroyed", ("destroyed", -50, None)),
    steps=(40, 40.05, 70),
)  # fmt: skip


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("columns", WIDTHS)
def test_no_line_is_wider_than_the_terminal_and_no_state_is_lost(columns: int, plain: bool) -> None:
    lines = key_bars(ROTATION, columns, ascii_only=plain)
    assert max(map(len, lines)) <= columns
    assert all(line.isascii() for line in lines) or not plain
    first, second = (line for line in lines if line.startswith(("1 active", "2 published")))
    marks = ("-", "#", "=", ".") if plain else ("░", "█", "▒", "·")
    bar = first.removeprefix("1 active")
    assert [bar.index(mark, 1) for mark in marks] == sorted(bar.index(mark, 1) for mark in marks)
    assert second.rstrip()[-1] == marks[1], "what has no end goes on to the edge"


def test_the_axis_says_from_when_to_when_and_where_now_is() -> None:
    dates, marker, first, *_ = key_bars(ROTATION, 80, ascii_only=True)
    assert dates.split() == ["2026-09-22", "2027-01-21"]
    place = marker.index("v")
    assert marker.strip() == "v now"
    assert first[place] == "#", "it signs now"


def test_a_gone_version_is_not_drawn_and_no_version_is_no_bar() -> None:
    assert not any(line.startswith("3") for line in key_bars(ROTATION, 80))
    assert key_bars(key(), 80) == []


def test_the_legend_explains_what_is_drawn_and_nothing_else() -> None:
    text = "\n".join(key_bars(ROTATION, 80))
    assert "█ signs" in text
    assert "revoked" not in text
    young = key(version(1, "active", ("creating", 0, 0), ("active", 0, None)))
    assert "█ signs" in "\n".join(key_bars(young, 40)), "a key that has no past"


def check(invariant: str, left: float | None, right: float | None) -> wire.SafetyCheck:
    sides = [None if at is None else day(at) for at in (left, right)]
    holds = left is not None and right is not None and left >= right
    return wire.SafetyCheck(invariant=invariant, holds=holds, statement="", left=sides[0], right=sides[1])


def safety(*checks: wire.SafetyCheck) -> wire.Safety:
    return wire.Safety(kid="kid", state="retiring", now=NOW, checks=list(checks), next="", next_at=None)


@pytest.mark.parametrize("columns", WIDTHS)
def test_both_sides_of_an_invariant_and_which_comes_first(columns: int) -> None:
    lines = check_bars(safety(check("I1", -2, -3), check("I2", 0, 1)), columns, ascii_only=True)
    assert max(map(len, lines)) <= columns
    holds = next(line for line in lines if line.startswith("I1"))
    early = next(line for line in lines if line.startswith("I2"))
    assert holds.index("[") < holds.index("*")
    assert "=" in holds
    assert early.index("*") < early.index("[")
    assert "=" not in early
    assert "-" in early


def test_a_side_that_has_not_come_draws_nothing() -> None:
    assert check_bars(safety(check("I1", 0, None)), 80) == []
