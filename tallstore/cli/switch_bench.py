"""``tallstore switch-bench``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from tallstore.cli.options import (
    device_option,
    examples,
    external_base_option,
    json_option,
    parse_size,
    quiet_option,
    store_argument,
)
from tallstore.cli.printing import Table, emit_json, size
from tallstore.cli.progressbar import Progress
from tallstore.cli.stats import split_tasks

if TYPE_CHECKING:
    from tallstore.serving.measuring import Measured

__all__ = ["switch_bench"]


def _budget(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    return None if value is None else parse_size(ctx, param, value)


@click.command(
    "switch-bench",
    epilog=examples(
        "tallstore switch-bench zoo.tall",
        "tallstore switch-bench zoo.tall --resident stream --budget 2GB",
    ),
)
@store_argument
@click.option(
    "--tasks",
    metavar="NAME,NAME...",
    callback=split_tasks,
    help="Switch between these tasks alone.  [default: all]",
)
@device_option
@click.option(
    "--resident",
    type=click.Choice(["all", "masks-on-host", "stream"]),
    default="all",
    show_default=True,
    help="Where the tasks' codes are: on the device, on the host, in the store.",
)
@click.option(
    "--budget", metavar="SIZE", callback=_budget, help="Most bytes of codes on the device."
)
@click.option("--codes", is_flag=True, help="Leave the exact tier out, where tasks have codes.")
@click.option(
    "--repeats",
    metavar="N",
    type=click.IntRange(min=1),
    default=7,
    show_default=True,
    help="Switches to each task, after a first one.",
)
@external_base_option
@json_option
@quiet_option
def switch_bench(
    *,
    store: str,
    tasks: tuple[str, ...] | None,
    device: str,
    resident: Any,
    budget: int | None,
    codes: bool,
    repeats: int,
    external_base: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how long switching a live model between tasks takes.

    Tensors as the tasks have them are switched by turns, in place, as tallstore.serving does;
    beside it, each task is loaded anew. Times are medians.
    """
    from tallstore.serving.measuring import measure
    from tallstore.store import TallStore

    with TallStore(store, external_base=external_base) as opened, Progress(quiet=quiet) as progress:
        found = measure(
            opened,
            tasks=tasks,
            device=device,
            resident=resident,
            budget=budget,
            fidelity="codes" if codes else None,
            repeats=repeats,
            report=progress.report,
        )
    if as_json:
        emit_json({"store": os.path.abspath(store), **_facts(found)})
        return
    _table(found).echo()
    need = found.need
    click.echo(
        f"{size(need.on_device(found.resident))} on {found.device} beside the model: base "
        f"{size(need.base)}, shared vector {size(need.vector)}, codes of all tasks "
        f"{size(need.codes)}"
    )


def _table(found: Measured) -> Table:
    table = Table("task", "switch", "slowest", "first", "hits", "moved", "load", "faster")
    for times in found.tasks:
        table.add(
            times.task,
            f"{times.switch:.2f} ms",
            f"{times.slowest:.2f} ms",
            f"{times.first:.2f} ms",
            f"{times.hits}/{found.repeats}",
            size(times.moved),
            f"{times.load:.1f} ms",
            f"{times.load / times.switch:.1f} x",
        )
    return table


def _facts(found: Measured) -> dict[str, Any]:
    need = found.need
    return {
        "device": found.device,
        "resident": found.resident,
        "repeats": found.repeats,
        "base_bytes": need.base,
        "vector_bytes": need.vector,
        "codes_bytes": need.codes,
        "tasks": [
            {
                "task": times.task,
                "switch_ms": times.switch,
                "slowest_ms": times.slowest,
                "first_ms": times.first,
                "load_ms": times.load,
                "hits": times.hits,
                "moved_bytes": times.moved,
            }
            for times in found.tasks
        ],
    }
