"""``tallstore report``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from tallstore.cli.options import (
    examples,
    external_base_option,
    json_option,
    overwrite_option,
    quiet_option,
    store_argument,
    yes_option,
)
from tallstore.cli.printing import ask, emit_json, printable, size
from tallstore.cli.progressbar import Progress

__all__ = ["report"]


@click.command(
    epilog=examples(
        "tallstore report zoo.tall -o report.html",
        "tallstore report zoo.tall -o report.html --png charts/",
    )
)
@store_argument
@click.option(
    "-o", "--output", required=True, metavar="FILE", type=click.Path(), help="The page to write."
)
@click.option(
    "--png", metavar="DIR", type=click.Path(), help="Write the charts alone, too, as PNG files."
)
@click.option("--cosine", is_flag=True, help="Decode the tasks: cosines between task vectors.")
@external_base_option
@overwrite_option
@yes_option
@json_option
@quiet_option
def report(
    *,
    store: str,
    output: str,
    png: str | None,
    cosine: bool,
    external_base: str | None,
    overwrite: bool,
    yes: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a page to look at: sizes, fidelity, masks.

    One HTML file that needs no network. Its charts are drawn by matplotlib, which comes with
    tallstore's extra "report".
    """
    if overwrite and Path(output).is_file():
        ask(f"Replace {output}?", yes=yes)
    from tallstore.report import write_report
    from tallstore.store import TallStore

    with TallStore(store, external_base=external_base) as opened, Progress(quiet=quiet) as progress:
        files = write_report(
            opened, output, png=png, cosine=cosine, overwrite=overwrite, report=progress.report
        )
    sizes = {str(path): path.stat().st_size for path in files}
    if as_json:
        listed = [{"path": path, "bytes": nbytes} for path, nbytes in sizes.items()]
        emit_json({"store": os.path.abspath(store), "files": listed})
        return
    images = f" and {len(files) - 1} images in {png}" if png is not None else ""
    click.echo(printable(f"{store} -> {output}, {size(sizes[str(files[0])])}{images}"))
