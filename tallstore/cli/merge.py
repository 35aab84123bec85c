"""``tallstore merge``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from tallstore.cli.options import (
    complete_task,
    device_option,
    examples,
    json_option,
    overwrite_option,
    parse_size,
    quiet_option,
    store_argument,
    timeout_option,
    yes_option,
)
from tallstore.cli.printing import ask, emit_json, notes, printable, size
from tallstore.cli.progressbar import Progress

if TYPE_CHECKING:
    from tallstore.mergestream.merge import Merge

__all__ = ["RULE_NAMES", "merge"]

#: `tallstore.merging.RULES` by name, without its imports; a test compares them.
RULE_NAMES: Final = (
    "ta",
    "average",
    "ties",
    "ties-mean",
    "consensus-ta",
    "consensus-ties",
    "breadcrumbs",
    "breadcrumbs-rows",
    "varm",
    "sce",
    "dare",
    "dare-ties",
)

_SOURCES: Final = {
    "exact": "from the exact tier",
    "masks": "from masks alone, an approximation",
    "exact and masks": "from the exact tier and, of some, from masks alone",
    "shared vector": "from the stored shared vector",
}


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    """The tasks of ``a,b``; a callback."""
    if value is None:
        return None
    found = [name for name in value.split(",") if name]
    if not found:
        raise click.BadParameter("name tasks, such as a,b", ctx=ctx, param=param)
    return found


def _weights(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> dict[str, float] | None:
    """The numbers of ``a=0.5,b=0.5``; a callback."""
    found: dict[str, float] = {}
    for item in value.split(",") if value else ():
        name, _, number = item.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            name = ""
        if not name:
            raise click.BadParameter(
                f"{item!r} is no weight; give them like a=0.5,b=0.5", ctx=ctx, param=param
            )
    return found or None


@click.command(
    epilog=examples(
        "tallstore merge zoo.tall merged/ --rule consensus-ties --k 2 --alpha 0.4",
        "tallstore merge zoo.tall soup.safetensors --rule average --tasks math,code",
        "tallstore merge zoo.tall --as-task both --rule ties --alpha 0.3",
    )
)
@store_argument
@click.argument("out", metavar="[OUT]", required=False, type=click.Path())
@click.option(
    "--rule",
    type=click.Choice(RULE_NAMES),
    default="ta",
    show_default=True,
    metavar="RULE",
    help=f"How to merge: {', '.join(RULE_NAMES)}.",
)
@click.option("--tasks", callback=_names, metavar="A,B", help="Which, in order.  [default: all]")
@click.option(
    "--alpha", type=float, metavar="NUMBER", help="Scaling.  [default: 1 for means, 0.3 for sums]"
)
@click.option(
    "--private",
    metavar="base|TASK",
    shell_complete=complete_task,
    help="Whose heads, buffers and files go in; needed where tasks differ in them.",
)
@click.option("--as-task", metavar="NAME", help="Store the merge as a task, in place of OUT.")
@click.option("--k", type=int, metavar="N", help="Consensus: tasks to use it.  [default: 2]")
@click.option("--keep", type=float, metavar="SHARE", help="TIES: trim to the largest so many.")
@click.option("--weights", callback=_weights, metavar="A=N,B=N", help="Average: a weight a task.")
@click.option("--beta", type=float, metavar="SHARE", help="Breadcrumbs: smallest to drop.")
@click.option("--gamma", type=float, metavar="SHARE", help="Breadcrumbs: largest to drop.")
@click.option("--select", type=float, metavar="SHARE", help="SCE: of the largest variance.")
@click.option("--drop", type=float, metavar="SHARE", help="DARE: to drop at random.")
@click.option("--seed", type=int, metavar="N", help="DARE: of the drawing.")
@click.option(
    "--max-shard-size",
    callback=parse_size,
    metavar="SIZE",
    default="5GB",
    show_default=True,
    help="Bytes of weights a file, in a model directory.",
)
@device_option
@overwrite_option
@yes_option
@timeout_option
@json_option
@quiet_option
def merge(
    *,
    store: str,
    out: str | None,
    rule: str,
    tasks: list[str] | None,
    alpha: float | None,
    private: str | None,
    as_task: str | None,
    max_shard_size: int,
    device: str,
    overwrite: bool,
    yes: bool,
    timeout: float,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge the tasks of a store into one model.

    Weights become base + alpha * v, v being what RULE makes of the tasks' vectors; the masks
    that Consensus Merging counts are those of the store. OUT.safetensors makes one file; any
    other name a model directory, with configuration and tokenizer.
    """
    if (out is None) == (as_task is None):
        raise click.UsageError("Give either OUT or --as-task NAME.")
    from tallstore import api
    from tallstore.merging import merge_rule
    from tallstore.store import TallStore

    made = merge_rule(rule, **options)
    if overwrite and out is not None and Path(out).is_file():
        ask(f"Replace {out}?", yes=yes)
    if overwrite and as_task is not None:
        with TallStore(store) as opened:
            if as_task in opened.tasks:
                ask(f"Replace {as_task} in {store}?", yes=yes)
    with Progress(quiet=quiet) as progress:
        done = api.merge(
            store,
            out,
            rule=made,
            tasks=tasks,
            alpha=alpha,
            private=private,
            as_task=as_task,
            max_shard_size=max_shard_size,
            device=device,
            overwrite=overwrite,
            timeout=timeout,
            report=progress.report,
        )
    _report(store, out, done, dict(made.parameters()), as_json=as_json, quiet=quiet)


def _report(
    store: str,
    out: str | None,
    done: Merge,
    parameters: dict[str, Any],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    notes(done.notes, quiet=quiet)
    sizes = {str(path): path.stat().st_size for path in done.files}
    if as_json:
        emit_json(
            {
                "store": os.path.abspath(store),
                "rule": done.rule,
                "parameters": parameters,
                "alpha": done.alpha,
                "tasks": list(done.tasks),
                "vectors": done.vectors,
                "layout": done.layout,
                "out": None if out is None else os.path.abspath(out),
                "task": done.task,
                "files": [{"path": path, "bytes": nbytes} for path, nbytes in sizes.items()],
                "notes": list(done.notes),
            }
        )
        return
    chosen = "".join(f", {name} {value}" for name, value in parameters.items())
    what = f"{done.rule}{chosen}, alpha {done.alpha:g}, of {len(done.tasks)} tasks"
    count = f"{len(sizes)} file{'s' * (len(sizes) != 1)}, {size(sum(sizes.values()))}"
    where = f"task {done.task} of {store}" if done.task is not None else f"{out}: {count}"
    click.echo(printable(f"{what} -> {where}, {_SOURCES[done.vectors]}"))
