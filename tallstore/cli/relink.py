"""``tallstore relink``."""

from __future__ import annotations

import os

import click

from tallstore.cli.options import examples, json_option, store_argument, timeout_option
from tallstore.cli.printing import emit_json, printable

__all__ = ["relink"]


@click.command(
    epilog=examples(
        "tallstore relink more.tall archive/zoo.tall",
    )
)
@store_argument
@click.argument("base", metavar="BASE", type=click.Path())
@timeout_option
@json_option
def relink(*, store: str, base: str, timeout: float, as_json: bool) -> None:
    """Say where the store is that has this one's base.

    For stores packed with --external-base, after either was moved. BASE is a store; it is
    refused unless it holds the very same base.
    """
    from tallstore import api

    recorded = api.relink(store, base, timeout=timeout)
    if as_json:
        facts = {"store": os.path.abspath(store), "base": os.path.abspath(base)}
        emit_json({**facts, "recorded": recorded})
        return
    click.echo(printable(f"{store}: its base is in {recorded}"))
