"""``tallstore unpack``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from tallstore.cli.options import (
    complete_task,
    device_option,
    examples,
    external_base_option,
    json_option,
    overwrite_option,
    parse_size,
    quiet_option,
    store_argument,
    yes_option,
)
from tallstore.cli.printing import ask, emit_json, printable, size
from tallstore.cli.progressbar import Progress

__all__ = ["unpack"]


@click.command(
    epilog=examples(
        "tallstore unpack zoo.tall math out/",
        "tallstore unpack zoo.tall math math.safetensors",
        "tallstore unpack --base zoo.tall base/",
    )
)
@store_argument
@click.argument("task", metavar="TASK", required=False, shell_complete=complete_task)
@click.argument("out", metavar="OUT", required=False, type=click.Path())
@click.option("--base", is_flag=True, help="Unpack the base: tallstore unpack --base STORE OUT.")
@click.option(
    "--max-shard-size",
    callback=parse_size,
    metavar="SIZE",
    default="5GB",
    show_default=True,
    help="Bytes of weights a file, in a model directory.",
)
@device_option
@external_base_option
@overwrite_option
@yes_option
@json_option
@quiet_option
def unpack(
    *,
    store: str,
    task: str | None,
    out: str | None,
    base: bool,
    max_shard_size: int,
    device: str,
    overwrite: bool,
    yes: bool,
    external_base: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a task, or the base, back to a checkpoint.

    OUT.safetensors makes one file; any other name a model directory as it came, with its
    configuration and tokenizer.
    """
    task, place = _target(task, out, base=base)
    if overwrite and Path(place).is_file():
        ask(f"Replace {place}?", yes=yes)
    from tallstore.store import TallStore

    with TallStore(store, external_base=external_base) as opened, Progress(quiet=quiet) as progress:
        if task is not None:
            opened.describe(task)  # refused before torch is imported
        exact = task is None or opened.tasks[task].exact
        files = opened.unpack(
            task,
            place,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            device=device,
            report=progress.report,
        )
    sizes = {str(path): path.stat().st_size for path in files}
    if as_json:
        listed = [{"path": path, "bytes": nbytes} for path, nbytes in sizes.items()]
        emit_json(
            {
                "store": os.path.abspath(store),
                "task": task,
                "out": os.path.abspath(place),
                "exact": exact,
                "files": listed,
            }
        )
        return
    what = "the base" if task is None else task
    fidelity = "bit for bit as it was" if exact else "from masks alone, an approximation"
    count = f"{len(files)} file{'s' * (len(files) != 1)}"
    click.echo(printable(f"{what} -> {place}: {count}, {size(sum(sizes.values()))}, {fidelity}"))


def _target(task: str | None, out: str | None, *, base: bool) -> tuple[str | None, str]:
    """The task (None: the base) and where it goes."""
    if base:
        if task is None:
            raise click.UsageError("Missing argument 'OUT'.")
        if out is not None:
            raise click.UsageError("--base takes STORE and OUT, and no task.")
        return None, task
    if task is None or out is None:
        missing = "TASK' and 'OUT" if task is None else "OUT"
        raise click.UsageError(f"Missing argument '{missing}'.")
    return task, out
