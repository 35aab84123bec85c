"""Which charts a report has, and the table behind each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tallstore.mask_statistics import MaskStatistics, Matrix
from tallstore.report.drawing import MOST_IN_CELLS, Palette, bars, heat_map, stacked_bars
from tallstore.report.facts import ReportFacts
from tallstore.wording import number, plural, printable, size, size_unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FIDELITY", "SECTIONS", "SHARING", "Chart", "Table", "charts"]

SIZE: Final = "Size"
#: This one has the table of tasks as well.
FIDELITY: Final = "Fidelity"
SHARING: Final = "How tasks share weights"
PAIRS: Final = "Pairs of tasks"
#: The headings of the page, in order.
SECTIONS: Final = (SIZE, FIDELITY, SHARING, PAIRS)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a name and of numbers, as text."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A picture, what it says in words, and its numbers."""

    name: str
    """Of its file, and of its place on the page."""
    section: str
    """The heading that it stands under."""
    title: str
    caption: str
    """What is to be seen."""
    table: Table
    draw: Callable[[Palette], Figure]
    """Draws it in the colours of a palette."""


def charts(facts: ReportFacts) -> list[Chart]:
    """The charts of a store, in order; those that would show nothing are left out."""
    found = [_whole(facts)]
    if facts.tasks:
        found.append(_stored(facts))
    if any(task.record.relative_error is not None for task in facts.tasks):
        found.append(_errors(facts))
    statistics = facts.statistics
    if statistics is not None and statistics.use.weights:
        found += [_use(statistics), _alone(statistics)]
        found += [_layers(statistics), _densities(statistics)]
        if len(statistics.tasks) > 1:
            found.append(_overlap(statistics))
            if statistics.cosine is not None:
                found.append(_cosines(statistics, statistics.cosine))
    return found


def _names(statistics: MaskStatistics) -> list[str]:
    return [printable(name) for name in statistics.tasks]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _whole(facts: ReportFacts) -> Chart:
    tasks = sum(task.stored for task in facts.tasks)
    original = sum(task.record.nbytes for task in facts.tasks)
    rest = max(facts.file - facts.base_stored - facts.vector_stored - tasks, 0)
    rows = (
        ("base", facts.base_original, facts.base_stored),
        ("shared vector", None, facts.vector_stored),
        ("tasks", original, tasks),
        ("index, free space", None, rest),
        ("together", facts.originals, facts.file),
    )
    unit, scale = size_unit(max(facts.originals, facts.file))
    roles = ("none", "one", "many", "rest")
    parts = {
        name: (role, [(before or 0) / scale, after / scale])
        for role, (name, before, after) in zip(roles, rows, strict=False)
        if before or 100 * after > facts.file  # what would not be seen needs no legend
    }
    return Chart(
        name="size",
        section=SIZE,
        title="The checkpoints and the store",
        caption=(
            f"{plural(len(facts.tasks) + 1, 'checkpoint')} of {size(facts.originals)}, and the one "
            f"file of {size(facts.file)} that keeps them."
        ),
        table=Table(
            ("", "originals", "in the store"),
            tuple((n, "" if a is None else size(a), size(b)) for n, a, b in rows),
        ),
        draw=lambda palette: stacked_bars(
            palette,
            ["checkpoints", "store"],
            parts,
            axis=f"{unit} (1 {unit} is {scale:,} bytes)",
            labels=[size(facts.originals), size(facts.file)],
        ),
    )


def _stored(facts: ReportFacts) -> Chart:
    names = [printable(task.name) for task in facts.tasks]
    unit, scale = size_unit(max(task.stored for task in facts.tasks))
    return Chart(
        name="stored",
        section=SIZE,
        title="What each task takes in the store",
        caption="Bytes of each task's own, beside the base and the shared vector.",
        table=Table(
            ("task", "original", "in the store", "bits a weight"),
            tuple(
                (
                    name,
                    size(task.record.nbytes),
                    size(task.stored),
                    number(8 * task.stored / task.record.weights if task.record.weights else None),
                )
                for name, task in zip(names, facts.tasks, strict=True)
            ),
        ),
        draw=lambda palette: bars(
            palette,
            names,
            [task.stored / scale for task in facts.tasks],
            [size(task.stored) for task in facts.tasks],
            axis=unit,
        ),
    )


def _errors(facts: ReportFacts) -> Chart:
    shown = [task for task in facts.tasks if task.record.relative_error is not None]
    names = [printable(task.name) for task in shown]
    errors = [task.record.relative_error or 0.0 for task in shown]
    return Chart(
        name="fidelity",
        section=FIDELITY,
        title="Relative error of the masks alone",
        caption=(
            "Norm of the error over the norm of the change that fine-tuning made. Tasks with the "
            "exact tier load bit for bit all the same."
        ),
        table=Table(
            ("task", "relative error", "loads as"),
            tuple(
                (name, number(error, 4), "bit for bit" if task.record.exact else "approximation")
                for name, error, task in zip(names, errors, shown, strict=True)
            ),
        ),
        draw=lambda palette: bars(
            palette, names, errors, [f"{error:#.3g}" for error in errors], axis="relative error"
        ),
    )


def _use(statistics: MaskStatistics) -> Chart:
    histogram, use = statistics.use.histogram, statistics.use
    names = [plural(count, "task") for count in range(len(histogram))]
    shares = [weights / use.weights for weights in histogram]
    roles = ["none", "one"] + ["many"] * (len(histogram) - 2)
    return Chart(
        name="use",
        section=SHARING,
        title="Weights by the number of tasks that use them",
        caption=(
            f"{_percent(use.catastrophic)} of the weights are catastrophic (no task uses them), "
            f"{_percent(use.selfish)} selfish (one task alone), {_percent(use.general)} general."
        ),
        table=Table(
            ("used by", "weights", "share"),
            tuple(
                (name, f"{weights:,}", _percent(share))
                for name, weights, share in zip(names, histogram, shares, strict=True)
            ),
        ),
        draw=lambda palette: bars(
            palette,
            names,
            [100 * share for share in shares],
            [_percent(share) for share in shares],
            axis="% of the weights",
            roles=roles,
        ),
    )


def _alone(statistics: MaskStatistics) -> Chart:
    names, tasks = _names(statistics), list(statistics.tasks.values())
    selfish = [100 * (task.selfish or 0.0) for task in tasks]
    shared = [
        100.0 - value if task.ones else 0.0 for value, task in zip(selfish, tasks, strict=True)
    ]
    parts = {"by it alone": ("one", selfish), "by others too": ("many", shared)}
    return Chart(
        name="selfish",
        section=SHARING,
        title="Of the weights that a task uses",
        caption="The share that no other task uses: its selfish weights.",
        table=Table(
            ("task", "coded", "used", "used by it alone", "share"),
            tuple(
                (name, f"{t.coded:,}", f"{t.ones:,}", f"{t.exclusive:,}", _percent(t.selfish))
                for name, t in zip(names, tasks, strict=True)
            ),
        ),
        draw=lambda palette: stacked_bars(
            palette, names, parts, axis="% of the weights that the task uses"
        ),
    )


def _layers(statistics: MaskStatistics) -> Chart:
    layers = statistics.layers
    names = [printable(layer.name) for layer in layers]
    uses = [layer.use for layer in layers]
    parts = {
        "catastrophic": ("none", [100 * (use.catastrophic or 0.0) for use in uses]),
        "selfish": ("one", [100 * (use.selfish or 0.0) for use in uses]),
        "general": ("many", [100 * (use.general or 0.0) for use in uses]),
    }
    return Chart(
        name="layers",
        section=SHARING,
        title="Catastrophic, selfish and general weights by layer",
        caption="Used by no task, by one alone, by two or more.",
        table=Table(
            ("layer", "weights", "catastrophic", "selfish", "general"),
            tuple(
                (
                    name,
                    f"{use.weights:,}",
                    _percent(use.catastrophic),
                    _percent(use.selfish),
                    _percent(use.general),
                )
                for name, use in zip(names, uses, strict=True)
            ),
        ),
        draw=lambda palette: stacked_bars(palette, names, parts, axis="% of the layer's weights"),
    )


def _matrix(names: Sequence[str], matrix: Matrix) -> Table:
    rows = [(name, *map(number, row)) for name, row in zip(names, matrix, strict=True)]
    return Table(("task", *names), tuple(rows))


def _off_diagonal(matrix: Matrix) -> list[list[float | None]]:
    """A task against itself tells nothing, and would outshine the rest."""
    return [[None if i == j else v for j, v in enumerate(row)] for i, row in enumerate(matrix)]


def _pairs(chart: str, title: str, caption: str, names: Sequence[str], matrix: Matrix) -> Chart:
    shown = _off_diagonal(matrix)
    known = [value for row in shown for value in row if value is not None]
    high = max(known, default=0.0)
    places = [(i, j) for i, row in enumerate(shown) for j, v in enumerate(row) if v and i < j]
    if places:
        i, j = max(places, key=lambda place: shown[place[0]][place[1]] or 0.0)
        most = number(shown[i][j])
        caption = f"{caption} Highest: {names[i]} and {names[j]}, {most}."
    return Chart(
        name=chart,
        section=PAIRS,
        title=title,
        caption=caption,
        table=_matrix(names, matrix),
        draw=lambda palette: heat_map(palette, names, names, shown, high=high),
    )


def _overlap(statistics: MaskStatistics) -> Chart:
    return _pairs(
        "overlap",
        "Overlap of masks (Jaccard)",
        "Weights that both tasks use, over those that either uses.",
        _names(statistics),
        statistics.jaccard,
    )


def _cosines(statistics: MaskStatistics, matrix: Matrix) -> Chart:
    exact = statistics.cosine_from == "exact"
    whose = (
        "the originals" if exact else "what masks alone reconstruct, more alike than the originals"
    )
    return _pairs(
        "cosine",
        "Cosines between task vectors",
        f"Of {whose}.",
        _names(statistics),
        matrix,
    )


def _densities(statistics: MaskStatistics) -> Chart:
    names = _names(statistics)
    layers = [printable(layer.name) for layer in statistics.layers]
    values = [[use.density for use in layer.tasks.values()] for layer in statistics.layers]
    known = [value for row in values for value in row if value is not None]
    rows = [
        (layer, *(number(v, 3) for v in row)) for layer, row in zip(layers, values, strict=True)
    ]
    in_cells = "" if len(names) <= MOST_IN_CELLS else " The numbers are in the table."
    return Chart(
        name="density",
        section=SHARING,
        title="Density of the masks by layer",
        caption=f"Fraction of a layer's coded weights that a task uses.{in_cells}",
        table=Table(("layer", *names), tuple(rows)),
        draw=lambda palette: heat_map(palette, layers, names, values, high=max(known, default=0.0)),
    )
