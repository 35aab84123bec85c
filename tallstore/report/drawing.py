"""The kinds of charts, drawn by matplotlib: bars, stacked bars, heat maps.

Figures are made without pyplot: nothing of the caller's is touched but matplotlib's settings,
which are put back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from tallstore.errors import OptionError
from tallstore.wording import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MOST_IN_CELLS", "WIDTH", "Palette", "bars", "heat_map", "settings", "stacked_bars"]

Palette = Mapping[str, str]

#: A heat map of more columns has no numbers in its cells.
MOST_IN_CELLS: Final = 16
#: Inches: a figure that is not made wider by its columns.
WIDTH: Final = 5.0
#: Inches: a bar, a cell of a heat map with numbers and without, what is around them.
_BAR: Final = 0.28
_CELL, _SMALL_CELL = 0.40, 0.20
_AROUND: Final = 0.8
#: Letters of a name beside a bar.
_LETTERS: Final = 24
_FONT, _SMALL_FONT = 10.0, 8.5


@contextmanager
def settings() -> Iterator[None]:
    """Draw and save within: matplotlib's own settings, whatever the user's are.

    Raises
    ------
    OptionError
        matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as exc:
        raise OptionError(
            "the report's charts are drawn by matplotlib, which is not installed: "
            "pip install 'tallstore[report]'"
        ) from exc
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A name in letters that the font lacks: on the page, the browser's fonts have them.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": _FONT,
                "svg.fonttype": "none",  # text stays text
                "svg.hashsalt": "tallstore",  # the same file every time
                "text.parse_math": False,  # names are not formulas
            }
        )
        yield


def _short(name: str) -> str:
    """A name that fits beside a bar; the table has it whole."""
    if len(name) <= _LETTERS:
        return name
    half = (_LETTERS - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def _figure(palette: Palette, width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=palette["bg"])
    axes = figure.add_subplot(facecolor=palette["bg"])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=palette["ink"])
    return figure, axes


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Names down the side, the first at the top."""
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)


def _scale(axes: Axes, palette: Palette, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_axisbelow(True)
    axes.xaxis.grid(visible=True, color=palette["grid"], linewidth=0.8)
    axes.tick_params(axis="x", colors=palette["muted"])
    axes.xaxis.set_major_locator(MaxNLocator(5))  # more would run into one another
    axes.set_xlabel(label, color=palette["muted"])


def bars(
    palette: Palette,
    names: Sequence[str],
    values: Sequence[float],
    labels: Sequence[str],
    *,
    axis: str,
    roles: Sequence[str] | None = None,
) -> Figure:
    """Horizontal bars from 0, each with its value beside it.

    Parameters
    ----------
    labels
        The values as text.
    axis
        What they are, with the unit.
    roles
        Of the colour of each bar; `many` if None.
    """
    figure, axes = _figure(palette, WIDTH, _AROUND + _BAR * len(names))
    colours = [palette[role] for role in roles or ["many"] * len(names)]
    axes.barh(range(len(names)), values, height=0.68, color=colours)
    most = max(values, default=0) or 1.0
    for place, (value, label) in enumerate(zip(values, labels, strict=True)):
        axes.text(value + 0.012 * most, place, label, va="center", color=palette["ink"])
    _rows(axes, names)
    _scale(axes, palette, axis)
    axes.set_xlim(0, 1.25 * most)
    return figure


def stacked_bars(
    palette: Palette,
    names: Sequence[str],
    parts: Mapping[str, tuple[str, Sequence[float]]],
    *,
    axis: str,
    labels: Sequence[str] = (),
) -> Figure:
    """Horizontal bars made of parts.

    Parameters
    ----------
    parts
        What each part is: the role of its colour, and its size in each bar.
    labels
        What is written beside each bar; without them, the longest fills the width.
    """
    figure, axes = _figure(palette, WIDTH, _AROUND + 0.3 + _BAR * len(names))
    left = [0.0] * len(names)
    for what, (role, values) in parts.items():
        axes.barh(
            range(len(names)),
            values,
            left=left,
            height=0.68,
            color=palette[role],
            # Gaps tell the parts apart without colour.
            edgecolor=palette["bg"],
            linewidth=1.2,
            label=what,
        )
        left = [start + value for start, value in zip(left, values, strict=True)]
    _rows(axes, names)
    _scale(axes, palette, axis)
    most = max(left, default=0) or 1.0
    for place, label in enumerate(labels):
        axes.text(left[place] + 0.012 * most, place, label, va="center", color=palette["ink"])
    axes.set_xlim(0, (1.25 if labels else 1.0) * most)
    figure.legend(
        loc="outside lower center",
        ncols=len(parts),
        frameon=False,
        labelcolor=palette["ink"],
        handlelength=1.0,
        handleheight=1.0,
    )
    return figure


def heat_map(
    palette: Palette,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    high: float,
) -> Figure:
    """A cell for each row and column, the stronger the higher its value.

    Values from 0 to `high` are told apart; None is an empty cell.
    """
    from matplotlib.patches import Rectangle

    numbers = len(columns) <= MOST_IN_CELLS
    cell = _CELL if numbers else _SMALL_CELL
    letters = max((len(_short(name)) for name in columns), default=0)
    width = max(WIDTH, 1.6 + cell * len(columns))
    height = 0.3 + 0.09 * letters + (0.28 if numbers else _SMALL_CELL) * len(rows)
    figure, axes = _figure(palette, width, height)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is None:
                continue
            strength = min(max(value / high, 0.0), 1.0) if high > 0 else 0.0
            place = (x - 0.5, y - 0.5)
            axes.add_patch(
                Rectangle(place, 1, 1, facecolor=palette["heat"], alpha=strength, linewidth=0)
            )
            if numbers:
                style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": _SMALL_FONT}
                axes.text(x, y, number(value), color=palette["ink"], **style)
    for edge in range(len(columns) + 1):
        axes.axvline(edge - 0.5, color=palette["bg"], linewidth=1)
    for edge in range(len(rows) + 1):
        axes.axhline(edge - 0.5, color=palette["bg"], linewidth=1)
    _rows(axes, rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_xticks(range(len(columns)), [_short(name) for name in columns], rotation=90)
    return figure
