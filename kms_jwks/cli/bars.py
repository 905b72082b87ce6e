"""Bars of time as lines of text: the states of a key's versions, and both sides of each invariant.

Every function takes a width in columns and returns lines that are not longer. A terminal without block characters gets
the same in ASCII.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from kms_jwks.cli.output import clean, when

if TYPE_CHECKING:
    from kms_jwks import wire

_LEAST, _MOST = 40, 160
_BLOCKS = {
    "creating": ".",
    "published": "░",
    "active": "█",
    "retiring": "▒",
    "retired": "·",
    "revoked": "x",
    "destroyed": " ",
}
_ASCII = {**_BLOCKS, "published": "-", "active": "#", "retiring": "=", "retired": ".", "creating": "'"}
_UNKNOWN = "?"
"""The mark of a state that this program does not know."""
_MEANING = {
    "creating": "being made",
    "published": "published, waits",
    "active": "signs",
    "retiring": "published until its tokens expire",
    "retired": "out of the JWKS, still in the module",
    "revoked": "revoked, still in the module",
}


def width() -> int:
    """The columns of the output: COLUMNS, else the terminal's, else 100; within 40 and 160."""
    return max(_LEAST, min(_MOST, shutil.get_terminal_size((100, 24)).columns))


def key_bars(found: wire.Timeline, columns: int, *, ascii_only: bool | None = None) -> list[str]:
    """A line of states for each version that is not destroyed, under an axis with a mark at `now`."""
    plain = _is_plain() if ascii_only is None else ascii_only
    marks = _ASCII if plain else _BLOCKS
    shown = [v for v in found.versions if v.state != "destroyed"]
    if not shown:
        return []
    label = max(len(_label(v)) for v in shown)
    room = columns - label - 2
    start = min(span.start for v in shown for span in v.spans)
    # The axis ends a little after the last planned instant; a span without an end goes on to the edge.
    known = [
        found.now,
        *(s.due for s in found.steps if s.due is not None),
        *(v.next_at for v in shown if v.next_at is not None),
    ]
    end = min(found.until, max(known))
    scale = _Scale(start, max(end, found.now) + (max(end, found.now) - start) / 10, room)
    lines = [" " * (label + 2) + line for line in scale.axis(found.now, plain=plain)]
    for each in shown:
        cells, cursor = [" "] * room, 0
        for span in each.spans:
            # A span that is too short for the scale still gets one column.
            first = min(max(scale.cell(span.start), cursor), room - 1)
            last = room if span.end is None else min(room, max(first + 1, scale.cell(span.end)))
            cells[first:last] = marks.get(span.state, _UNKNOWN) * (last - first)
            cursor = last
        lines.append(f"{_label(each):<{label}}  {''.join(cells)}".rstrip())
    used = {span.state for v in shown for span in v.spans}
    return [*lines, "", *_legend([f"{marks[s]} {_MEANING[s]}" for s in _MEANING if s in used], columns)]


def check_bars(found: wire.Safety, columns: int, *, ascii_only: bool | None = None) -> list[str]:
    """A line for each invariant with two known sides: from when the step is allowed, and when it was or is made."""
    plain = _is_plain() if ascii_only is None else ascii_only
    allowed, taken, fill, gap = ("[", "*", "=", "-") if plain else ("├", "●", "━", "╌")
    known = [(c, c.left, c.right) for c in found.checks if c.left is not None and c.right is not None]
    if not known:
        return []
    instants = [found.now, *(at for _, left, right in known for at in (left, right))]
    label, room = max(len(c.invariant) for c, _, _ in known), columns - 4
    scale = _Scale(min(instants), max(instants), room)
    lines = ["    " + line for line in scale.axis(found.now, plain=plain)]
    for check, left, right in known:
        cells = [" "] * room
        a, b = scale.cell(right), scale.cell(left)
        low, high = min(a, b), max(a, b)
        cells[low : high + 1] = (fill if check.holds else gap) * (high + 1 - low)
        cells[a] = allowed
        cells[b] = taken
        lines.append(f"{clean(check.invariant):<{max(label, 2)}}  {''.join(cells)}".rstrip())
    legend = [f"{allowed} allowed from here on", f"{taken} when it was done, or now", f"{gap} too early by this much"]
    return [*lines, "", *_legend(legend, columns)]


class _Scale:
    """Maps instants to columns 0 to `room` - 1."""

    def __init__(self, start: datetime, end: datetime, room: int) -> None:
        self.start, self.room = start, room
        self.seconds = max(1.0, (end - start).total_seconds())
        self.end = end

    def cell(self, at: datetime) -> int:
        """The column of an instant, within the line."""
        place = (at - self.start).total_seconds() / self.seconds * (self.room - 1)
        return max(0, min(self.room - 1, round(place)))

    def axis(self, now: datetime, *, plain: bool) -> list[str]:
        """The dates at both ends of the line, and under them a mark at `now`."""
        left, right = (_stamp(at, self.seconds, self.room) for at in (self.start, self.end))
        dates = left + " " * max(1, self.room - len(left) - len(right)) + right
        place = self.cell(now)
        here = "v" if plain else "▼"
        text = f"{here} now" if place + 5 <= self.room else f"now {here}"
        column = place if text.startswith(here) else place - 4
        return [dates[: self.room], " " * max(0, column) + text]


def _label(version: wire.TimelineVersion) -> str:
    return clean(f"{version.number} {version.state}")


def _stamp(at: datetime, seconds: float, room: int) -> str:
    """An end of the axis as RFC 3339: a date where the axis is long or narrow, else with the time."""
    short = seconds > 20 * 86_400 or room < 2 * len("2026-11-01T12:00:00Z") + 1
    return at.astimezone(UTC).date().isoformat() if short else when(at)


def _legend(parts: Sequence[str], columns: int) -> Iterable[str]:
    line = ""
    for part in parts:
        if line and len(line) + 3 + len(part) > columns:
            yield line
            line = ""
        line = f"{line}   {part}" if line else part
    if line:
        yield line


def _is_plain() -> bool:
    """Whether standard output cannot show block characters."""
    try:
        "█░▒·▼├●━╌".encode(sys.stdout.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return True
    return False
