"""What the commands print: tables, details, notes, JSON, errors. No control character from outside reaches a terminal.

`clean_output` is the one place where text leaves: while it is in force, standard output and standard error replace
control characters in everything that is written to them, Click's own messages included. JSON keeps its meaning: such
characters are written as JSON escapes.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any, TextIO, cast

import click

from kms_jwks import errors

_UNITS = ((86_400, "d"), (3600, "h"), (60, "m"), (1, "s"))
_UNLIMITED = 4000
"""Columns of an output that is not a terminal: nothing is cut or folded there."""
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
    """An instant in UTC to the second; `-` for one that has not come."""
    return "-" if instant is None else instant.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def duration(seconds: int) -> str:
    """Whole seconds with the largest unit that divides them: `90d`, `1h`, `5m`, `61s`."""
    size, unit = next((s, u) for s, u in _UNITS if seconds % s == 0) if seconds else (1, "s")
    return f"{seconds // size}{unit}"


def yes(value: bool) -> str:
    """`yes` or `no`."""
    return "yes" if value else "no"


# --- tables, details, lines -------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; long values are folded on a terminal and whole everywhere else."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(clean(cell)) for cell in row))
    if grid.row_count:
        _print_grid(grid)
    else:
        click.echo("(none)")


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


def _print_grid(grid: object) -> None:
    from rich.console import Console

    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    console = Console(
        file=sys.stdout, width=_UNLIMITED if wide else None, markup=False, highlight=False, emoji=False, soft_wrap=False
    )
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
