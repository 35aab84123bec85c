"""``tallstore compact``."""

from __future__ import annotations

import os

import click

from tallstore.cli.options import examples, json_option, store_argument, timeout_option
from tallstore.cli.printing import emit_json, size

__all__ = ["compact"]


@click.command(
    epilog=examples(
        "tallstore compact zoo.tall",
    )
)
@store_argument
@timeout_option
@json_option
def compact(*, store: str, timeout: float, as_json: bool) -> None:
    """Give back the space that removed tasks left in the file.

    The file is copied, checked and put into place whole; that takes as much room as the store
    for a while.
    """
    from tallstore import api

    before, after = api.compact(store, timeout=timeout)
    if as_json:
        emit_json({"store": os.path.abspath(store), "bytes_before": before, "bytes_after": after})
        return
    click.echo(f"{store}: {size(before)} before, {size(after)} after")
