"""``tallstore pack``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from tallstore.cli.coding import coding_options, coding_values
from tallstore.cli.merge import RULE_NAMES
from tallstore.cli.options import (
    device_option,
    examples,
    json_option,
    overwrite_option,
    quiet_option,
    timeout_option,
    yes_option,
)
from tallstore.cli.printing import Table, ask, emit_json, notes, number, printable, ratio, size
from tallstore.cli.progressbar import Progress
from tallstore.cli.zoo import read_tasks, split_store
from tallstore.errors import StoreExistsError

__all__ = ["MASKLESS", "VECTOR_DTYPES", "pack", "report_pack"]

#: `tallstore.packing.pack.VECTOR_DTYPES`, without its imports; a test compares them.
VECTOR_DTYPES: Final = ("bfloat16", "float16", "float32", "int8", "int4")

#: The rules that need no masks: those are made for the vector.
MASKLESS: Final = tuple(name for name in RULE_NAMES if not name.startswith("consensus"))
_OTHERS: Final = [name for name in MASKLESS if name not in ("ta", "ties")]


@click.command(
    epilog=examples(
        "tallstore pack zoo.tall --base base/ math=math/ code=code.safetensors",
        "tallstore pack zoo.tall --base base/ --exact fine-tunes/",
        "tallstore pack zoo.tall --base base/ --code auto fine-tunes/",
        "tallstore pack more.tall --external-base zoo.tall others/",
    )
)
@click.argument("items", metavar="STORE NAME=PATH...", nargs=-1, required=True, type=click.Path())
@click.option("--base", metavar="PATH", help="The pretrained checkpoint.")
@click.option(
    "--external-base",
    metavar="STORE",
    type=click.Path(),
    help="In place of --base: refer to the base of another store, which has to stay.",
)
@coding_options()
@click.option(
    "--merge",
    type=click.Choice(MASKLESS),
    metavar="RULE",
    help="Shared vector: the sum of the task vectors (ta, the default), ties, or "
    f"{', '.join(_OTHERS)}.",
)
@click.option(
    "--tall-lambda",
    type=float,
    metavar="NUMBER",
    help="Above 0; a larger one masks more weights away.  [default: 0.4]",
)
@click.option(
    "--vector-dtype",
    type=click.Choice(VECTOR_DTYPES),
    default="bfloat16",
    show_default=True,
    help="How the shared vector is kept.",
)
@click.option("--exact", is_flag=True, help="Keep the residual: load the originals bit for bit.")
@click.option("--compress", is_flag=True, help="Compress the base too: smaller, slower to load.")
@device_option
@overwrite_option
@yes_option
@timeout_option
@json_option
@quiet_option
def pack(
    *,
    items: tuple[str, ...],
    base: str | None,
    external_base: str | None,
    code: str | None,
    merge: str | None,
    tall_lambda: float | None,
    vector_dtype: str,
    exact: bool,
    compress: bool,
    device: str,
    overwrite: bool,
    yes: bool,
    timeout: float,
    as_json: bool,
    quiet: bool,
    **coding: Any,
) -> None:
    """Pack a base and its fine-tunes into a new store.

    Tasks are given as NAME=PATH, as bare paths (the name is the file's, without its suffix),
    or as a directory of checkpoints. One shared vector and one bit per weight and task are
    kept, or what --code says; that is lossy. With --exact the originals are kept too.
    """
    place, rest = split_store(items)
    if not rest:
        raise click.UsageError("No tasks are named; give NAME=PATH, or a directory of checkpoints.")
    if (base is None) == (external_base is None):
        raise click.UsageError("One of --base and --external-base is needed.")
    tasks = read_tasks(rest, base=base or external_base)
    _may_replace(place, overwrite=overwrite, yes=yes)
    from tallstore import api

    with Progress(quiet=quiet) as progress:
        remarks = api.pack(
            place,
            base,
            tasks,
            code=code or "tall",
            merge=merge,
            tall_lambda=tall_lambda,
            vector_dtype=vector_dtype,
            exact=exact,
            compress=compress,
            device=device,
            external_base=external_base,
            overwrite=overwrite,
            timeout=timeout,
            report=progress.report,
            **coding_values(coding),
        )
    report_pack(place, remarks, as_json=as_json, quiet=quiet)


def _may_replace(place: str, *, overwrite: bool, yes: bool) -> None:
    """Ask before a store is replaced; what is no store is never replaced."""
    if not Path(place).exists():
        return
    from tallstore.store import TallStore

    with TallStore(place) as store:
        names = ", ".join(store.tasks)
        if not overwrite:
            raise StoreExistsError(
                f"{place}: there already; give --overwrite to replace it, or another path"
            )
        ask(f"Replace {place}, which holds {len(store.tasks)} tasks ({names})?", yes=yes)


def report_pack(place: str, remarks: list[str], *, as_json: bool, quiet: bool) -> None:
    """Print what a store holds that was just packed."""
    from tallstore.cli.facts import store_facts
    from tallstore.store import TallStore

    with TallStore(place) as store:
        facts = store_facts(store)
    lossy = [task["task"] for task in facts["tasks"] if not task["exact"]]
    notes(remarks, quiet=quiet)
    if as_json:
        emit_json({**facts, "lossy": bool(lossy), "notes": remarks})
        return
    _table(facts).echo()
    click.echo(_summary(facts))
    masks = all(task["code"] == "tall" for task in facts["tasks"])
    click.echo(_fidelity(lossy=bool(lossy), masks=masks))


def _table(facts: dict[str, Any]) -> Table:
    table = Table("task", "stored", "bits/weight", "density", "rel. error", "original")
    for task in facts["tasks"]:
        table.add(
            task["task"],
            size(task["stored_bytes"]),
            number(task["bits_per_weight"]),
            number(task["density"]),
            number(task["relative_error"]),
            size(task["original_bytes"]),
        )
    base, vector = facts["base"], facts["vector"]
    if base["external"] is None:
        table.add("(base)", size(base["stored_bytes"]), "", "", "", size(base["original_bytes"]))
    if vector is not None:
        table.add("(shared vector)", size(vector["stored_bytes"]))
    table.add("(whole file)", size(facts["file_bytes"]), "", "", "", size(facts["original_bytes"]))
    return table


def _summary(facts: dict[str, Any]) -> str:
    original, whole = facts["original_bytes"], facts["file_bytes"]
    bits = facts["bits_per_weight_and_task"]
    shared = f"\n{bits:.2f} bits per weight and task, shared vector included." if bits else ""
    external = facts["base"]["external"]
    count = len(facts["tasks"]) + (external is None)
    beside = f"\nThe base is not in it but in {printable(external)}." if external else ""
    return (
        f"{count} checkpoints of {size(original)} in one file of {size(whole)}: "
        f"{ratio(original, whole)} of them.{shared}{beside}"
    )


def _fidelity(*, lossy: bool, masks: bool) -> str:
    what = "Masks" if masks else "Codes"
    if lossy:
        return (
            f"{what} alone are lossy: a task loads as an approximation, whose error is relative\n"
            "to the change that fine-tuning made. --exact keeps the residual, and with it the\n"
            "originals bit for bit."
        )
    return (
        f"Exact: every task loads bit for bit as it was. The error is that of the {what.lower()}\n"
        "alone, which the residual makes good."
    )
