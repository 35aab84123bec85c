"""``tallstore repack``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tallstore.cli.coding import coding_options, coding_values
from tallstore.cli.options import (
    examples,
    json_option,
    overwrite_option,
    quiet_option,
    store_argument,
    timeout_option,
    yes_option,
)
from tallstore.cli.pack import MASKLESS, VECTOR_DTYPES, report_pack
from tallstore.cli.printing import ask
from tallstore.cli.progressbar import Progress
from tallstore.cli.zoo import read_tasks

__all__ = ["repack"]


@click.command(
    epilog=examples(
        "tallstore repack zoo.tall --code signs --density 2%",
        "tallstore repack zoo.tall small.tall --code auto --no-exact",
        "tallstore repack zoo.tall --code levels --original math=math/",
    )
)
@store_argument
@click.argument("out", required=False, type=click.Path())
@coding_options()
@click.option("--merge", type=click.Choice(MASKLESS), metavar="RULE", help="Of the shared vector.")
@click.option("--tall-lambda", type=float, metavar="NUMBER", help="Of masks.")
@click.option("--vector-dtype", type=click.Choice(VECTOR_DTYPES), help="Of the shared vector.")
@click.option(
    "--exact/--no-exact",
    default=None,
    help="Keep the exact tier, or not.  [default: if every task has one]",
)
@click.option("--compress", is_flag=True, help="Compress the base too.")
@click.option(
    "--original",
    "originals",
    metavar="NAME=PATH",
    multiple=True,
    help="A task's original, where the store has codes of it alone.",
)
@overwrite_option
@yes_option
@timeout_option
@json_option
@quiet_option
def repack(
    *,
    store: str,
    out: str | None,
    code: str | None,
    merge: str | None,
    tall_lambda: float | None,
    vector_dtype: str | None,
    exact: bool | None,
    compress: bool,
    originals: tuple[str, ...],
    overwrite: bool,
    yes: bool,
    timeout: float,
    as_json: bool,
    quiet: bool,
    **coding: Any,
) -> None:
    """Code all tasks of a store anew.

    With another code, vector or number of bits. Tasks are read from their exact tiers or
    from --original, never from codes alone. Without OUT the store is replaced, once the new
    one is whole.
    """
    from tallstore import recoding
    from tallstore.store import TallStore

    given = read_tasks(list(originals)) if originals else {}
    with TallStore(store) as opened:
        drops = [name for name, task in opened.tasks.items() if task.exact]
    if out is None and exact is False and drops:
        ask(f"Drop the exact tier of {', '.join(drops)} in {store} for good?", yes=yes)
    if out is not None and overwrite and Path(out).exists():
        ask(f"Replace {out}?", yes=yes)
    with Progress(quiet=quiet) as progress:
        remarks = recoding.repack(
            store,
            out,
            code=code or "tall",
            merge=merge,
            tall_lambda=tall_lambda,
            vector_dtype=vector_dtype,
            exact=exact,
            compress=compress,
            originals=given,
            overwrite=overwrite,
            timeout=timeout,
            report=progress.report,
            **coding_values(coding),
        )
    report_pack(out or store, remarks, as_json=as_json, quiet=quiet)
