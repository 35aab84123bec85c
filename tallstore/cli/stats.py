"""``tallstore stats``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from tallstore.cli.options import (
    device_option,
    examples,
    external_base_option,
    json_option,
    quiet_option,
    store_argument,
)
from tallstore.cli.printing import Table, emit_json, number, printable
from tallstore.cli.progressbar import Progress

if TYPE_CHECKING:
    from tallstore.mask_statistics import MaskStatistics, Matrix, PartStatistics

__all__ = ["split_tasks", "stats"]


def split_tasks(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    """Names out of ``a,b,c``; a callback for an option."""
    if value is None:
        return None
    names = tuple(name.strip() for name in value.split(","))
    if not all(names):
        raise click.BadParameter("names of tasks, with commas between them", ctx=ctx, param=param)
    return names


@click.command(
    epilog=examples(
        "tallstore stats zoo.tall",
        "tallstore stats zoo.tall --tasks math,code --cosine",
    )
)
@store_argument
@click.option(
    "--tasks",
    metavar="NAME,NAME...",
    callback=split_tasks,
    help="Count these tasks alone.  [default: all that have masks]",
)
@click.option("--per-tensor", is_flag=True, help="Tell every tensor apart, not layers alone.")
@click.option("--cosine", is_flag=True, help="Decode the tasks: cosines between task vectors.")
@device_option
@external_base_option
@json_option
@quiet_option
def stats(
    *,
    store: str,
    tasks: tuple[str, ...] | None,
    per_tensor: bool,
    cosine: bool,
    device: str,
    external_base: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Count the masks: densities, and how tasks share weights.

    A weight is catastrophic if no task uses it, selfish if exactly one does, general if two or
    more do. What a task keeps as it is, or did not change, it does not use.
    """
    from tallstore.store import TallStore

    with TallStore(store, external_base=external_base) as opened, Progress(quiet=quiet) as progress:
        found = opened.statistics(tasks=tasks, cosine=cosine, device=device, report=progress.report)
    if as_json:
        facts = found.to_json()
        if not per_tensor:
            del facts["tensors"]
        emit_json({"store": os.path.abspath(store), **facts})
        return
    for place, (title, table) in enumerate(_tables(found, per_tensor=per_tensor)):
        click.echo(f"\n{title}" if place else title)
        table.echo()
    if not quiet:
        _remarks(found)


def _tables(found: MaskStatistics, *, per_tensor: bool) -> list[tuple[str, Table]]:
    names = list(found.tasks)
    tables = [
        ("Tasks", _tasks(found)),
        ("Weights by the number of tasks that use them", _use(found)),
        ("Layers: shares of weights by use", _shares(found.layers)),
        ("Density by layer", _densities(found.layers, names)),
    ]
    if per_tensor:
        tables += [
            ("Tensors: shares of weights by use", _shares(found.tensors, name_last=True)),
            ("Density by tensor", _densities(found.tensors, names, name_last=True)),
        ]
    if len(names) > 1:
        tables.append(("Overlap of masks (Jaccard)", _matrix(names, found.jaccard)))
    if len(names) > 1 and found.cosine is not None:
        whose = "originals" if found.cosine_from == "exact" else "reconstructions from masks"
        tables.append((f"Cosines between task vectors, of {whose}", _matrix(names, found.cosine)))
    return tables


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _tasks(found: MaskStatistics) -> Table:
    table = Table("task", "no.", "coded", "used", "density", "selfish")
    for place, (name, task) in enumerate(found.tasks.items(), 1):
        row = (f"{task.coded:,}", f"{task.ones:,}", number(task.density), _share(task.selfish))
        table.add(name, str(place), *row)
    return table


def _use(found: MaskStatistics) -> Table:
    table = Table("used by", "weights", "share")
    words = {0: "0 (catastrophic)", 1: "1 (selfish)"}
    for count, weights in enumerate(found.use.histogram):
        share = weights / found.use.weights if found.use.weights else None
        table.add(words.get(count, str(count)), f"{weights:,}", _share(share))
    return table


def _shares(parts: Sequence[PartStatistics], *, name_last: bool = False) -> Table:
    what = "tensor" if name_last else "layer"
    table = Table(what, "weights", "catastrophic", "selfish", "general", name_last=name_last)
    for part in parts:
        use = part.use
        shares = (use.catastrophic, use.selfish, use.general)
        table.add(part.name, f"{use.weights:,}", *map(_share, shares))
    return table


def _densities(
    parts: Sequence[PartStatistics], names: Sequence[str], *, name_last: bool = False
) -> Table:
    what = "tensor" if name_last else "layer"
    table = Table(what, *_numbers(names), name_last=name_last)
    for part in parts:
        table.add(part.name, *(number(part.tasks[name].density) for name in names))
    return table


def _matrix(names: Sequence[str], matrix: Matrix) -> Table:
    table = Table("task", *_numbers(names))
    for name, row in zip(names, matrix, strict=True):
        table.add(name, *map(number, row))
    return table


def _numbers(names: Sequence[str]) -> list[str]:
    """Tasks as columns: their names would not fit."""
    return [str(place) for place, _ in enumerate(names, 1)]


def _remarks(found: MaskStatistics) -> None:
    click.echo(f"\n{found.use.weights:,} weights that at least one task codes.")
    if found.uncoded:
        click.echo(f"{found.uncoded:,} more that none codes are not counted.")
    if found.without_masks:
        names = ", ".join(found.without_masks)
        click.echo(printable(f"Left out, since they have no masks: {names}."))
