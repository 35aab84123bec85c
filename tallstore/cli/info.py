"""``tallstore info``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from tallstore.cli.options import complete_task, examples, json_option, store_argument
from tallstore.cli.printing import Table, emit_json, number, pairs, percent, ratio, size

if TYPE_CHECKING:
    from tallstore.store import TallStore

__all__ = ["info"]


@click.command(
    epilog=examples(
        "tallstore info zoo.tall",
        "tallstore info zoo.tall math --tensors",
    )
)
@store_argument
@click.argument("task", required=False, shell_complete=complete_task)
@click.option("--tensors", is_flag=True, help="List every tensor of the task, or of the base.")
@json_option
def info(*, store: str, task: str | None, tensors: bool, as_json: bool) -> None:
    """Tell what a store, or one task of it, is made of."""
    from tallstore.cli.facts import tensor_facts
    from tallstore.store import TallStore

    with TallStore(store) as opened:
        facts = _store(opened) if task is None else _task(opened, task)
        rows = tensor_facts(opened, task) if tensors else []
    if as_json:
        emit_json({**facts, "tensor_list": rows} if tensors else facts)
        return
    pairs(_store_pairs(facts) if task is None else _task_pairs(facts))
    if tensors:
        click.echo()
        _tensor_table(rows, coded=task is not None).echo()


def _store(store: TallStore) -> dict[str, Any]:
    from tallstore.cli.facts import store_facts

    return store_facts(store)


def _task(store: TallStore, task: str) -> dict[str, Any]:
    from tallstore.cli.facts import task_facts
    from tallstore.sources.safetensors_file import METADATA_FILE  # kept as a file, but is none

    described = store.describe(task)  # first: it names the tasks there are
    files = [file.path for file in described.contents.files if file.path != METADATA_FILE]
    overall = {"gain": described.gain, "cosine": described.cosine}
    return {"store": str(store.path), **task_facts(store, task), **overall, "files": files}


def _exactly(nbytes: int) -> str:
    return f"{size(nbytes)} ({nbytes:,} bytes)"


def _parameters(found: dict[str, Any] | None) -> str:
    return f", {json.dumps(found)}" if found else ""


def _where(base: dict[str, Any]) -> str:
    if base["external"] is not None:
        return f"in another store, {base['external']}"
    return f"{_exactly(base['stored_bytes'])} of {size(base['original_bytes'])}"


def _store_pairs(facts: dict[str, Any]) -> list[tuple[str, str]]:
    base, vector, tasks = facts["base"], facts["vector"], facts["tasks"]
    whole, free = facts["file_bytes"], facts["free_bytes"]
    hint = "; compact gives it back" if 10 * free > whole else ""
    shared = "none: no task uses one"
    if vector is not None:
        shared = (
            f"{size(vector['stored_bytes'])} as {vector['dtype']}; {vector['rule']}"
            f"{_parameters(vector['parameters'])}, merged from {len(vector['merged_from'])} tasks"
        )
    stored = sum(task["stored_bytes"] for task in tasks)
    original = facts["original_bytes"]
    bits = facts["bits_per_weight_and_task"]
    return [
        ("store", facts["store"]),
        ("format", f"version {facts['format_version']}, written by {facts['written_by']}"),
        ("commits", str(facts["generation"])),
        ("file", f"{_exactly(whole)}, {percent(free, whole)} free{hint}"),
        ("base", f"{base['weights']:,} weights in {base['tensors']} tensors"),
        ("base stored", _where(base)),
        ("base from", f"{base['label']} ({base['kind']}), {base['created']}"),
        ("base identity", base["identity"]),
        ("shared vector", shared),
        ("tasks", f"{len(tasks)}, {size(stored)} together"),
        ("bits/weight", f"{bits:.2f} a task, shared vector included" if bits else ""),
        ("originals", f"{_exactly(original)}; the file is {ratio(original, whole)} of them"),
    ]


def _task_pairs(facts: dict[str, Any]) -> list[tuple[str, str]]:
    coded, weights, own = facts["coded_weights"], facts["weights"], facts["own_weights"]
    masked = facts["code"] == "tall"
    what = "masks" if masked else "codes"
    lossless = "bit for bit" if facts["exact"] else f"an approximation ({what} alone are lossy)"
    of_codes = f" (of the {what} alone)" if facts["exact"] else ""
    error = facts["relative_error"]
    planes = facts["planes"]
    code = {"none": "none", "tall": f"masks, {planes} bit a weight"}.get(
        facts["code"], f"{facts['code']}{_parameters(facts['parameters'])}"
    )
    gain, cosine = facts.get("gain"), facts.get("cosine")
    return [
        ("task", facts["task"]),
        ("kept as", facts["kept_as"]),
        ("loads as", lossless),
        ("stored", f"{_exactly(facts['stored_bytes'])} of {size(facts['original_bytes'])}"),
        ("bits/weight", number(facts["bits_per_weight"])),
        ("weights", f"{weights:,} in {facts['tensors']} tensors"),
        ("coded", f"{coded:,} weights, {percent(coded, weights)}"),
        ("kept whole", f"{own:,} weights (heads, what the base lacks)" if own else "none"),
        ("code", code),
        ("tall lambda", number(facts["tall_lambda"])),
        ("density", number(facts["density"], 4)),
        ("relative error", "" if error is None else f"{error:.4f}{of_codes}"),
        ("gain", "" if gain is None else f"{gain:.4f}"),
        ("cosine", "" if cosine is None else f"{cosine:.4f}"),
        ("score", number(facts["score"], 4)),
        ("files", ", ".join(facts["files"])),
        ("from", f"{facts['label']} ({facts['kind']}), {facts['created']}"),
        ("written against", f"base {facts['base']}"),
    ]


def _tensor_table(rows: list[dict[str, Any]], *, coded: bool) -> Table:
    titles = ("kept", "bits", "density", "rel. error", "cosine", "gain") if coded else ()
    table = Table("tensor", "dtype", "shape", *titles, name_last=True)
    for row in rows:
        shape = "x".join(map(str, row["shape"])) or "scalar"
        names = ("bits_per_weight", "density", "relative_error", "cosine", "gain")
        cells = (row["code"] or row["kept"], *(number(row[name]) for name in names))
        table.add(row["name"], row["dtype"], shape, *(cells if coded else ()))
    return table
