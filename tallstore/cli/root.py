"""The group of all commands."""

from __future__ import annotations

import click

from tallstore.cli.add import add
from tallstore.cli.compact import compact
from tallstore.cli.completion import completion
from tallstore.cli.demo import demo
from tallstore.cli.doctor import doctor
from tallstore.cli.failing import CarefulGroup
from tallstore.cli.info import info
from tallstore.cli.ls import ls
from tallstore.cli.merge import merge
from tallstore.cli.options import examples
from tallstore.cli.pack import pack
from tallstore.cli.relink import relink
from tallstore.cli.repack import repack
from tallstore.cli.report import report
from tallstore.cli.rm import rm
from tallstore.cli.stats import stats
from tallstore.cli.strip import strip
from tallstore.cli.switch_bench import switch_bench
from tallstore.cli.unpack import unpack
from tallstore.cli.verify import verify
from tallstore.version import __version__

__all__ = ["root"]


class _InOrder(CarefulGroup):
    """Lists commands in the order of use, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_InOrder,
    epilog=examples(
        "tallstore pack zoo.tall --base base/ math=math/ code=code.safetensors",
        "tallstore ls zoo.tall",
        "tallstore unpack zoo.tall math out/",
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="tallstore")
def root() -> None:
    """Many full fine-tunes of one model in one file.

    A checkpoint is a safetensors file, a model directory, a .pt file, or a task of another
    store (STORE::TASK). Sizes are decimal: 1 MB is 1,000,000 bytes. Exit status: 0 done,
    1 refused or damaged, 2 wrong usage, 130 interrupted. TALLSTORE_DEBUG=1 shows where an
    error comes from; NO_COLOR=1 keeps colour away.
    """


for _command in (
    pack,
    add,
    ls,
    info,
    stats,
    report,
    unpack,
    merge,
    verify,
    rm,
    repack,
    strip,
    relink,
    compact,
    switch_bench,
    doctor,
    demo,
    completion,
):
    root.add_command(_command)
