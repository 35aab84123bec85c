"""Arguments and options that several commands take."""

from __future__ import annotations

import re
from typing import Final

import click
from click.shell_completion import CompletionItem

from tallstore.errors import TallstoreError

__all__ = [
    "complete_task",
    "device_option",
    "examples",
    "external_base_option",
    "json_option",
    "overwrite_option",
    "parse_size",
    "quiet_option",
    "store_argument",
    "timeout_option",
    "yes_option",
]

_FACTORS: Final = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)},
    **{f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)},
}


def parse_size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """Bytes of ``5GB``, ``500 MB``, ``2GiB``, ``1000000``; a callback for an option."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value, re.ASCII)
    factor = _FACTORS.get(found[2].upper()) if found else None
    if found is None or factor is None or float(found[1]) * factor < 1:
        raise click.BadParameter(
            f"{value!r} is no size; give one like 5GB, 500MB or 2GiB", ctx=ctx, param=param
        )
    return int(float(found[1]) * factor)


def examples(*lines: str) -> str:
    """The end of a help text; the backspace keeps click from joining the lines."""
    title = "Examples:" if len(lines) > 1 else "Example:"
    return "\n".join(["\b", title, *(f"  {line}" for line in lines)])


def complete_task(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The tasks of the store that the command line names; none if it cannot be read."""
    from tallstore.store import TallStore

    given = ctx.params.get(param.name or "") or ()
    try:
        with TallStore(str(ctx.params.get("store") or "")) as store:
            names = [name for name in store.tasks if name.startswith(incomplete)]
    except TallstoreError:
        return []
    return [CompletionItem(name) for name in names if name not in given]


store_argument = click.argument("store", metavar="STORE", type=click.Path())

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document; sizes are exact bytes."
)
device_option = click.option(
    "--device",
    metavar="DEVICE",
    default="cpu",
    show_default=True,
    help="Where the arithmetic is done: cpu, cuda, cuda:1, ...; the result is the same.",
)
external_base_option = click.option(
    "--external-base",
    metavar="STORE",
    type=click.Path(),
    help="Where the store is that has the base, if it was moved; relink says so for good.",
)
quiet_option = click.option(
    "-q", "--quiet", is_flag=True, help="Show neither progress nor remarks."
)
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask before destroying.")
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace what is there; asks, unless --yes is given."
)
timeout_option = click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="How long to wait for another writer.",
)
