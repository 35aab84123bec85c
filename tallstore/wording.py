"""Sizes, numbers and names as people read them."""

from __future__ import annotations

from textwrap import shorten
from typing import Final

__all__ = ["error_words", "number", "percent", "plural", "printable", "ratio", "size", "size_unit"]

#: Characters of an error that are shown: some libraries' go on for pages.
_LONGEST: Final = 400
_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


def printable(text: str) -> str:
    """`text` with every character escaped that a terminal would act on, or not show."""
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def error_words(exc: BaseException) -> str:
    """What somebody else's code raised, on one line."""
    text = shorten(str(exc), _LONGEST, placeholder=" ...")
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


def size(count: float) -> str:
    """Bytes in decimal units and three digits: ``"45.6 MB"`` is 45,600,000 bytes."""
    unit = 0
    while count >= 999.5 and unit < len(_UNITS) - 1:
        count /= 1000
        unit += 1
    digits = 0 if unit == 0 or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{digits}f} {_UNITS[unit]}"


def size_unit(largest: float) -> tuple[str, int]:
    """(unit, bytes in it) for an axis that reaches to `largest` bytes."""
    power = 0
    while largest >= 1000 ** (power + 1) and power < len(_UNITS) - 1:
        power += 1
    return _UNITS[power], 1000**power


def plural(count: int, what: str) -> str:
    """``"1 task"``, ``"2 tasks"``."""
    return f"{count} {what}{'s' * (count != 1)}"


def number(value: float | None, digits: int = 2) -> str:
    """A number, or nothing where there is none."""
    return "" if value is None else f"{value:z.{digits}f}"  # z: no "-0.00"


def percent(part: float, whole: float) -> str:
    """``"12 %"``."""
    return f"{100 * part / whole if whole else 0:.0f} %"


def ratio(before: float, after: float) -> str:
    """``"1/4.8"``: what is left of `before`."""
    return f"1/{before / after:.1f}" if after else "-"
