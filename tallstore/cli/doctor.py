"""``tallstore doctor``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from tallstore.cli.options import examples, json_option
from tallstore.cli.printing import emit_json, pairs, printable, size, styled

__all__ = ["doctor"]


@click.command(
    epilog=examples(
        "tallstore doctor",
        "tallstore doctor zoo.tall --json",
    )
)
@click.argument("store", metavar="STORE", required=False, type=click.Path())
@json_option
def doctor(*, store: str | None, as_json: bool) -> None:
    """Tell what tallstore runs on, and what is wrong.

    Versions, GPU, memory, limits, file system; and of a STORE its format, its readers, and what
    interrupted writes left. Its chunks are not checked: that is verify. Exits with status 1 if
    something is wrong.
    """
    from tallstore.doctor import examine

    found = examine(store)
    facts = found.to_json()
    if as_json:
        emit_json(facts)
    else:
        _say(facts)
    if not found.ok:
        raise click.exceptions.Exit(1)


def _say(facts: Mapping[str, Any]) -> None:
    pairs(list(_programs(facts["programs"])))
    click.echo()
    pairs(list(_gpu(facts["gpu"])))
    click.echo()
    pairs(list(_machine(facts["machine"])))
    click.echo()
    pairs(list(_place(facts["place"])))
    if "store" in facts:
        click.echo()
        pairs(list(_store(facts["store"])))
    click.echo()
    for problem in facts["problems"]:
        head = styled("wrong:", fg="red") if problem["serious"] else styled("note:", fg="yellow")
        click.echo(f"{head} {printable(problem['what'])}. {_cure(problem['cure'])}")
    if facts["ok"]:
        click.echo("Nothing is wrong.")


def _cure(text: str) -> str:
    return printable(f"Cure: {text}")


def _programs(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "tallstore", facts["tallstore"]
    yield "python", f"{facts['python']}, {facts['python_at']}"
    for name, about in facts["packages"].items():
        if "error" in about:
            yield name, f"none ({about['error']}); for {about['needed_for']}"
        elif "library" in about:
            inside = f"LMDB {about['library']} inside, data version {about['data_version']}"
            yield name, f"{about['version']}, {inside}"
        else:
            yield name, about["version"]


def _gpu(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not facts["devices"]:
        yield "gpu", facts["error"] or "none that torch can use"
    for number, device in enumerate(facts["devices"]):
        free, total = size(device["free_bytes"]), size(device["memory_bytes"])
        about = f"{device['name']}, capability {device['capability']}, {free} free of {total}"
        yield f"gpu {number}", about
    yield "driver", facts["driver"] or "none"
    yield "torch's cuda", facts["torch_cuda"] or "none"
    if facts["triton_error"] is None:
        yield "triton", f"{facts['triton']}, can be imported"
    else:
        yield "triton", f"cannot be imported ({facts['triton_error']}); {facts['without_triton']}"
    yield "c compiler", facts["compiler"] or "none"


def _machine(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "system", f"{facts['system']}, {facts['bits']} bit, {facts['byte_order']} endian"
    yield "cores", f"{facts['usable_cores']} of {facts['cores']} may be used"
    if facts["memory_bytes"] is not None:
        rest = facts["available_bytes"]
        available = "" if rest is None else f", {size(rest)} available"
        yield "memory", size(facts["memory_bytes"]) + available
    yield "page", f"{facts['page_bytes']} bytes"
    yield "address space", _limit(facts["address_space_limit"])
    yield "file size", _limit(facts["file_size_limit"])


def _limit(value: int | None) -> str:
    return "no limit" if value is None else f"limited to {size(value)}"


def _place(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "directory", facts["directory"]
    shared = ", may be shared by other machines" if facts["network"] else ""
    where = f" at {facts['mounted_at']}" if facts["mounted_at"] else ""
    yield "file system", f"{facts['file_system']}{where}{shared}"
    if facts["free_bytes"] is not None:
        yield "free", size(facts["free_bytes"])
    yield "writable", "yes" if facts["writable"] else "no"


def _store(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "store", facts["path"]
    yield "size", size(facts["file_bytes"]) if facts["exists"] else "there is no such file"
    if "format_version" in facts:
        yield "format", f"version {facts['format_version']}, written by {facts['written_by']}"
        yield "commits", str(facts["generation"])
        yield "tasks", str(facts["tasks"])
        yield "base", facts["base"]
        yield "base in", facts["external_base"] or ""
        yield "free in it", size(facts["free_bytes"])
    if facts.get("readers") is not None:
        listed = ", ".join(map(str, facts["readers"])) or "none"
        yield "readers", f"{listed}; {facts['stale_readers']} stale slots"
    if facts["writer"] is not None:
        yield "being written by", f"process {facts['writer']}"
    yield "left of killed writes", f"{len(facts['leftovers'])} files"
    if "stray_chunks" in facts:
        yield "stray chunks", str(facts["stray_chunks"])
        yield "chunks", f"not checked here: tallstore verify {facts['path']}"
