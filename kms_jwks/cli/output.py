"""What the commands print: tables, details, notes, JSON, errors. No control character from outside reaches a terminal.

`clean_output` is the one place where text leaves: while it is in force, standard output and standard error replace
control characters in everything that is written to them, Click's own messages included. JSON keeps its meaning: such
characters are written as JSON escapes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Any, TextIO, cast

import click

from kms_jwks import errors
from kms_jwks.times import format_instant, to_instant

_UNITS = ((86_400, "d"), (3600, "h"), (60, "m"), (1, "s"))
_UNLIMITED = 4000
"""Columns of an output that is not a terminal: nothing is cut or folded there."""
_GAP = 2
"""Columns between two columns of a table."""
_LEAST_PIECE = 8
"""Columns that a folded word takes at least."""
_WIDEST_PROSE = 100
TERMS = {
    "I1": "A version signs only once verifiers could fetch it for the publish lead.",
    "I2": "A version leaves the JWKS only when no token that it signed can be alive.",
    "I3": "No token lives longer than the key's max_token_ttl.",
    "I4": "Beside the version that signs, a standby is published, which takes over in an emergency.",
    "I5": "A JWKS holds at most 10 keys, so the keys of a key set rotate one at a time.",
    "LEFT": "With RIGHT the two sides of the statement, which holds when LEFT is not before RIGHT.",
    "LIVE": "Whether the worker has reported lately. Activations wait for silent workers until they are forgotten.",
    "EPOCH": "The number of the registry's state that the worker acts on.",
    "LAG": "How many changes of the registry the worker has not taken over yet.",
    "LEASE LEFT": "How long the worker may sign on without reading the registry again.",
    "HEARTBEAT": "When the worker reported last.",
    "term": "A number that grows each time another custodian takes over.",
}
"""What the words in tables mean that only this service uses."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""C0 except tab and newline, DEL, C1, and what changes the direction or the line of text."""


# --- control characters -----------------------------------------------------------------------------------------------


def clean(value: object) -> str:
    """One line of text that cannot control a terminal: newline and tab become a space, other control characters `?`."""
    text = str(value)
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character in "\n\t" else "?"


class _CleanStream:
    """A text stream that passes printable characters and newlines to `raw`, and nothing else."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        """Write `text` without colours, every other control character replaced by `?`."""
        if not isinstance(text, str):
            raise TypeError("a text stream takes str")  # Click tells text streams from binary ones by this error
        self.raw.write("\n".join(map(clean, _COLOUR.sub("", text).split("\n"))))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


@contextmanager
def clean_output() -> Iterator[None]:
    """Replace control characters in what this process prints until the end of the `with`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast("TextIO", _CleanStream(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def raw_output() -> Iterator[None]:
    """Take `clean_output` back for a process that logs: its log lines are written, and cleaned, by the log."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (getattr(stream, "raw", stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def print_styled(text: str) -> None:
    """Print text with colours. Its parts from outside have passed `clean` before."""
    click.echo(text, file=getattr(sys.stdout, "raw", sys.stdout))


def print_json(body: bytes) -> None:
    """Print JSON, with control characters as JSON escapes and a newline at its end."""
    sys.stdout.flush()
    sys.stdout.buffer.write(_escaped(body.decode("utf-8", "replace").rstrip("\n")).encode("utf-8") + b"\n")
    sys.stdout.buffer.flush()


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


# --- values -----------------------------------------------------------------------------------------------------------


def when(instant: datetime | None) -> str:
    """An instant as RFC 3339 in UTC, to the second; `-` for one that has not come."""
    return "-" if instant is None else format_instant(to_instant(instant))


def duration(seconds: int) -> str:
    """Whole seconds with the largest unit that divides them: `90d`, `1h`, `5m`, `61s`."""
    size, unit = next((s, u) for s, u in _UNITS if seconds % s == 0) if seconds else (1, "s")
    return f"{seconds // size}{unit}"


def yes(value: bool) -> str:
    """`yes` or `no`."""
    return "yes" if value else "no"


# --- tables, details, lines -------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; long values are folded on a terminal, between words where possible, and whole everywhere else."""
    from rich.table import Table
    from rich.text import Text

    cells = [[clean(cell) for cell in row] for row in rows]
    if not cells:
        click.echo("(none)")
        return
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, _GAP, 0, 0))
    by_column = [[head, *(row[place] for row in cells)] for place, head in enumerate(columns)]
    for head, width in zip(columns, _column_widths(by_column, _columns()), strict=True):
        grid.add_column(head, width=width, overflow="fold")
    for row in cells:
        grid.add_row(*map(Text, row))
    _print_grid(grid)


def _column_widths(columns: Sequence[Sequence[str]], room: int) -> list[int]:
    """The width of each column of a table that is `room` wide: a word is cut only where the words alone are wider."""
    from rich.cells import cell_len

    room -= _GAP * (len(columns) - 1)
    whole = [max(map(cell_len, cells)) for cells in columns]
    widths = [max(cell_len(word) for cell in cells for word in cell.split() or [""]) for cells in columns]
    # Ids and kids are cut before times are, and nothing is cut to pieces that cannot be read.
    for place in sorted(range(len(widths)), key=lambda place: -widths[place]):
        over = max(0, sum(widths) - room)
        widths[place] = max(min(widths[place], _LEAST_PIECE), widths[place] - over)
    while sum(widths) < room and (short := [place for place, width in enumerate(widths) if width < whole[place]]):
        # What is left goes to the columns whose text is folded most.
        widths[max(short, key=lambda place: whole[place] / max(1, widths[place]))] += 1
    return widths


def legend(*terms: str) -> None:
    """Print what terms of a table mean, a paragraph each; those that are not in `TERMS` are passed over."""
    known = [term for term in TERMS if term in terms]
    if not known:
        return
    label = max(map(len, known))
    room = min(_columns(), _WIDEST_PROSE) - label - 2
    click.echo()
    for term in known:
        first, *more = textwrap.wrap(TERMS[term], max(20, room))
        click.echo(f"{term:<{label}}  {first}")
        for line in more:
            click.echo(" " * (label + 2) + line)


def details(*pairs: tuple[str, object]) -> None:
    """Print names and values, one pair a line."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(name, Text(clean(value)))
    _print_grid(grid)


def print_line(text: str) -> None:
    """Print one line on standard output."""
    click.echo(clean(text))


def note(text: str) -> None:
    """Print a remark on standard error, which programs do not read."""
    click.echo(clean(text), err=True)


def _columns() -> int:
    """The columns of the output: COLUMNS, else the terminal's; where nothing is cut or folded, more than any line."""
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return _UNLIMITED
    return shutil.get_terminal_size().columns


def _print_grid(grid: object) -> None:
    from rich.console import Console

    console = Console(file=sys.stdout, width=_columns(), markup=False, highlight=False, emoji=False, soft_wrap=False)
    with console.capture() as captured:
        console.print(grid)
    # Cells are padded to the width of their column; the padding at the end of a line is cut off.
    print_styled("\n".join(line.rstrip() for line in captured.get().splitlines()))


# --- errors -----------------------------------------------------------------------------------------------------------


class ExitCode(IntEnum):
    """The exit codes, which scripts can rely on."""

    DONE = 0
    REFUSED = 1
    USAGE = 2
    DENIED = 3
    LATER = 4


@dataclass
class ErrorFormat:
    """How the error of a command is printed: as JSON, or for people. The command sets it before it can fail."""

    json: bool = False


def exit_code(error: errors.Error) -> ExitCode:
    """The exit code of an error, by its class; by its HTTP status where the class does not decide."""
    match error:
        case errors.Unauthenticated() | errors.Forbidden():
            return ExitCode.DENIED
        case errors.ConfigurationError():
            return ExitCode.USAGE
        case errors.ServiceUnreachable() | errors.Unavailable() | errors.BackendTimeout():
            return ExitCode.LATER
        case errors.BackendError(retryable=True):
            return ExitCode.LATER
        case _:
            return ExitCode.LATER if error.status in (429, 502, 503, 504) else ExitCode.REFUSED


def report(error: errors.Error, *, as_json: bool) -> None:
    """Print an error on standard error: for people, or as the problem's JSON."""
    if as_json:
        click.echo(_escaped(json.dumps(document(error))), err=True)
        return
    note(f"Error: {error.detail}")
    if error.next_step:
        note(f"Next: {error.next_step}")
    facts = [f"{name}: {_plain(value)}" for name, value in error.fields.items() if _plain(value) not in error.detail]
    if error.retry_after is not None:
        facts.append(f"retry after: {error.retry_after} s")
    if error.request_id is not None:
        facts.append(f"request id: {error.request_id}")
    if facts:
        note(f"({'; '.join(facts)})")


def document(error: errors.Error) -> dict[str, object]:
    """An error as a problem document (RFC 9457); without `status` and `request_id` where no service answered."""
    found: dict[str, object] = {
        "type": f"urn:kms-jwks:problem:{error.code}",
        "title": error.title,
        "detail": error.detail,
        "next_step": error.next_step,
    }
    more = {"status": error.status, "request_id": error.request_id, "retry_after": error.retry_after}
    found |= {name: value for name, value in more.items() if value is not None}
    return found | {name: value for name, value in error.fields.items() if name not in found}


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
