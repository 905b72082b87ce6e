"""How values look to people: times, durations, tables, details. Nothing here asks anybody for anything."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import click

_UNITS = ((86_400, "d"), (3600, "h"), (60, "m"), (1, "s"))
_ENDLESS = 4000
"""Columns of an output that is no terminal: nothing is cut or folded there."""


def clean(value: object) -> str:
    """Text that cannot steer a terminal: what is not printable is shown as `?`."""
    return "".join(ch if ch.isprintable() or ch == "\n" else "?" for ch in str(value))


def when(instant: datetime | None) -> str:
    """An instant in UTC to the second; `-` for one that has not come."""
    return "-" if instant is None else instant.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def duration(seconds: int) -> str:
    """Whole seconds with the largest unit that divides them: `90d`, `1h`, `5m`, `61s`."""
    size, unit = next((s, u) for s, u in _UNITS if seconds % s == 0) if seconds else (1, "s")
    return f"{seconds // size}{unit}"


def yes(value: bool) -> str:
    """A truth in words."""
    return "yes" if value else "no"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on standard output; long values are folded on a terminal and whole everywhere else."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(column, overflow="fold")
    empty = True
    for row in rows:
        empty = False
        grid.add_row(*(Text(clean(cell)) for cell in row))
    if empty:
        click.echo("(none)")
    else:
        _print(grid)


def details(*pairs: tuple[str, object]) -> None:
    """Names and values, one a line."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(name, Text(clean(value)))
    _print(grid)


def note(text: str) -> None:
    """A remark on standard error, which programs do not read."""
    click.echo(clean(text), err=True)


def _print(grid: object) -> None:
    from rich.console import Console

    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    console = Console(
        file=sys.stdout, width=_ENDLESS if wide else None, markup=False, highlight=False, emoji=False, soft_wrap=False
    )
    with console.capture() as captured:
        console.print(grid)
    # Cells are padded to their column's width; nobody wants the blanks at the end of a line.
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))
