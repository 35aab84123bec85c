"""``tallstore completion``."""

from __future__ import annotations

import click

from tallstore.cli.options import examples
from tallstore.errors import OptionError

__all__ = ["completion"]


@click.command(
    epilog=examples(
        "echo 'eval \"$(tallstore completion bash)\"' >> ~/.bashrc",
        "echo 'eval \"$(tallstore completion zsh)\"' >> ~/.zshrc",
        "tallstore completion fish > ~/.config/fish/completions/tallstore.fish",
    )
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, *, shell: str) -> None:
    """Print the script that completes commands, files and tasks."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    if found is None:
        raise OptionError(f"{shell}: this version of click has no completion for it")
    script = found(ctx.find_root().command, {}, "tallstore", "_TALLSTORE_COMPLETE").source()
    click.echo(script)
