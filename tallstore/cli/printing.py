"""Text for people: sizes, tables, questions; and JSON for programs."""

from __future__ import annotations

import json
import math
import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Final

import click

from tallstore.errors import OptionError
from tallstore.wording import number, percent, printable, ratio, size

__all__ = [
    "Table",
    "ask",
    "emit_json",
    "interactive",
    "notes",
    "number",
    "pairs",
    "percent",
    "printable",
    "ratio",
    "size",
    "styled",
]

_WIDTH: Final = 80
_GAP: Final = 2


def styled(text: str, **style: Any) -> str:
    """`text` in a style; click drops it again where the output is no terminal."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return click.style(text, **style)


def _width(text: str) -> int:
    """Columns that `text` takes on a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)


class Table:
    """Rows of a name and right-aligned facts, at most 80 columns wide where facts allow.

    A name too long for its column gets a line of its own; none is ever cut.

    Parameters
    ----------
    titles
        Of the columns, the name's first.
    name_last
        Put names behind the facts, where they may be of any length.
    """

    def __init__(self, *titles: str, name_last: bool = False) -> None:
        self._titles = titles
        self._name_last = name_last
        self._rows: list[tuple[str, ...]] = []

    def add(self, name: str, *facts: str) -> None:
        """Add a row; missing facts are left blank."""
        blank = [""] * (len(self._titles) - 1 - len(facts))
        self._rows.append(tuple(printable(cell) for cell in (name, *facts, *blank)))

    def lines(self, *, header: bool = True) -> list[str]:
        """The table's lines."""
        titled = ([self._titles] if header else []) + self._rows
        widths = [max((_width(row[i]) for row in titled), default=0) for i in range(self._columns)]
        if self._name_last:
            return [f"{_facts(row, widths)}{' ' * _GAP}{row[0]}" for row in titled]
        room = max(_WIDTH - sum(width + _GAP for width in widths[1:]), 8)
        fitting = [_width(row[0]) for row in titled if _width(row[0]) <= room]
        widths[0] = max(fitting, default=0)
        return [line for row in titled for line in _row(row, widths)]

    @property
    def _columns(self) -> int:
        return len(self._titles)

    def echo(self, *, header: bool = True) -> None:
        """Print it."""
        for line in self.lines(header=header):
            click.echo(line)


def _facts(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = zip(row[1:], widths[1:], strict=True)
    return (" " * _GAP).join(" " * (width - _width(cell)) + cell for cell, width in cells)


def _row(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    name, room = row[0], widths[0]
    over = _width(name) > room
    first = " " * room if over else name + " " * (room - _width(name))
    line = f"{first}{' ' * _GAP}{_facts(row, widths)}".rstrip()
    return [name, line] if over else [line]


def pairs(items: Iterable[tuple[str, str]]) -> None:
    """Print names and values, one pair a line, values beneath one another."""
    shown = [(name, printable(value)) for name, value in items if value]
    widest = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        click.echo(f"{name:<{widest}}  {value}")


def notes(remarks: Iterable[str], *, quiet: bool = False) -> None:
    """Print remarks on stderr."""
    for remark in () if quiet else remarks:
        click.echo(f"note: {printable(remark)}", err=True)


def emit_json(document: Any) -> None:
    """Print one JSON document on stdout; ASCII, so that nothing in it acts on a terminal."""
    click.echo(json.dumps(_strict(document), indent=2, allow_nan=False))


def _strict(value: Any) -> Any:
    """`value` with null for what JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, (list, tuple)) else value


def interactive() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin is not None and sys.stdin.isatty()


def ask(question: str, *, yes: bool) -> None:
    """Go on only if `yes`, or if somebody at the terminal says so.

    Raises
    ------
    OptionError
        There is nobody to ask.
    click.exceptions.Exit
        The answer was no.
    """
    if yes:
        return
    if not interactive():
        raise OptionError(f"{question} There is no terminal to ask on: give --yes to go ahead")
    if not click.confirm(printable(question), err=True):
        click.echo("Nothing was changed.", err=True)
        raise click.exceptions.Exit(1)
