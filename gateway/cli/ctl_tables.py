"""What `gateway ctl` prints: rich tables on a terminal, plain aligned columns elsewhere.

Much of it was said by clients (HELO, users), so nothing is printed as it came: control characters are escaped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import click

if TYPE_CHECKING:
    from rich.table import Table as RichTable

MINUTE: Final = 60
HOUR: Final = 3600
DAY: Final = 86_400


class Column(NamedTuple):
    """A heading; numbers stand at the right."""

    name: str
    right: bool = False


class Table(NamedTuple):
    """Columns and rows of texts; `empty` is said instead of a table without rows."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    empty: str = ""


def columns(text: str) -> list[Column]:
    """Headings from words; those that begin with `>` stand at the right."""
    return [Column(word.lstrip(">").replace("_", " "), word.startswith(">")) for word in text.split()]


def on_terminal() -> bool:
    """Whether somebody looks."""
    return sys.stdout.isatty()


def show(table: Table) -> None:
    """Print it."""
    if not table.rows and table.empty:
        click.echo(table.empty)
    elif on_terminal():
        from rich.console import Console

        Console(highlight=False).print(rich_table(table))
    else:
        for line in lines(table):
            click.echo(line)


def lines(table: Table) -> Iterable[str]:
    """Aligned columns, two spaces apart; a heading first."""
    rows = [[column.name.upper() for column in table.columns], *([shown(cell) for cell in row] for row in table.rows)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(table.columns))]
    for row in rows:
        cells = [
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(row, widths, table.columns, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def rich_table(table: Table) -> RichTable:
    """For a terminal: unusual states in color."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in table.columns:
        made.add_column(column.name, justify="right" if column.right else "left", overflow="fold")
    for row in table.rows:
        made.add_row(*(Text(shown(cell), style=COLORS.get(cell, "")) for cell in row))
    return made


COLORS: Final[Mapping[str, str]] = {
    "up": "green", "serving": "green", "down": "bold red", "ejected": "red", "resting": "yellow",
    "draining": "yellow", "slow": "yellow", "reloading": "yellow", "failed": "bold red", "joined": "cyan",
}  # fmt: skip


def shown(text: str) -> str:
    """The text in one line, with what a terminal would obey, and what is no character, escaped."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def text_of(value: object) -> str:
    """A value of the API as a cell; nothing is `-`."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(text_of(one) for one in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {text_of(one)}" for name, one in value.items()) or "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def number(value: object) -> float:
    """A number, 0 for anything else."""
    return value if isinstance(value, (int, float)) else 0


def duration(seconds: object) -> str:
    """`4.2s`, `3m20s`, `5h07m`, `12d03h`."""
    left = number(seconds)
    if left < 10:
        return f"{left:.1f}s"
    whole = int(left)
    if whole < MINUTE:
        return f"{whole}s"
    if whole < HOUR:
        return f"{whole // MINUTE}m{whole % MINUTE:02}s"
    if whole < DAY:
        return f"{whole // HOUR}h{whole % HOUR // MINUTE:02}m"
    return f"{whole // DAY}d{whole % DAY // HOUR:02}h"


def octets(size: object) -> str:
    """`512`, `1.5K`, `20M`: powers of 1024."""
    left = number(size)
    for unit in ("", "K", "M", "G"):
        if left < 1024:
            return f"{left:.0f}{unit}" if not unit or left >= 10 else f"{left:.1f}{unit}"
        left /= 1024
    return f"{left:.1f}T"
