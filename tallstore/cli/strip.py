"""``tallstore strip``."""

from __future__ import annotations

import os

import click

from tallstore.cli.options import (
    complete_task,
    examples,
    json_option,
    quiet_option,
    store_argument,
    timeout_option,
    yes_option,
)
from tallstore.cli.printing import ask, emit_json, printable, size
from tallstore.cli.progressbar import Progress

__all__ = ["strip"]


@click.command(
    epilog=examples(
        "tallstore strip zoo.tall --exact",
        "tallstore strip zoo.tall math --exact",
    )
)
@store_argument
@click.argument("tasks", metavar="[TASK]...", nargs=-1, shell_complete=complete_task)
@click.option("--exact", is_flag=True, help="The exact tier; what there is to strip.")
@yes_option
@timeout_option
@json_option
@quiet_option
def strip(
    *,
    store: str,
    tasks: tuple[str, ...],
    exact: bool,
    yes: bool,
    timeout: float,
    as_json: bool,
    quiet: bool,
) -> None:
    """Drop the exact tier of tasks.

    They then load as their codes alone give them. Without TASK, of all tasks that have
    codes. add --exact restores it from the original.
    """
    if not exact:
        raise click.UsageError("Say what to strip: --exact.")
    from tallstore import recoding
    from tallstore.store import TallStore

    with TallStore(store) as opened:
        names = list(tasks) or [n for n, t in opened.tasks.items() if t.exact and t.code != "none"]
        if names:
            ask(f"Drop the exact tier of {', '.join(names)} in {store} for good?", yes=yes)
        before = {n: opened.stored_bytes(n) for n in names if n in opened.tasks}
    with Progress(quiet=quiet) as progress:
        done = recoding.strip(store, list(tasks) or None, timeout=timeout, report=progress.report)
    with TallStore(store) as opened:
        freed = sum(before.get(name, 0) - opened.stored_bytes(name) for name in done)
    if as_json:
        emit_json({"store": os.path.abspath(store), "stripped": done, "freed_bytes": freed})
        return
    click.echo(
        printable(f"stripped {', '.join(done)}: {size(freed)}. ") + "compact gives the space back."
    )
