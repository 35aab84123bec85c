"""How failures end: one line on stderr, an exit status, and no traceback."""

from __future__ import annotations

import os
import traceback
from typing import IO, Any

import click

from tallstore.cli import INTERRUPTED
from tallstore.cli.printing import printable, styled
from tallstore.errors import TallstoreError

__all__ = ["CarefulGroup", "Refusal"]


class Refusal(click.ClickException):
    """Ends the command with ``Error: ...`` on stderr and exit status 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        # Messages quote names and labels of files that may be hostile.
        message = printable(" ".join(self.message.splitlines()))
        click.echo(f"{styled('Error:', fg='red')} {message}", file=file, err=file is None)


class CarefulGroup(click.Group):
    """A group whose commands fail in one line.

    What is no expected failure, a bug, keeps its traceback: a report of it needs that.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TallstoreError as exc:
            raise _refusal(str(exc)) from exc
        except (KeyboardInterrupt, click.Abort):
            click.echo("Interrupted.", err=True)
            ctx.exit(INTERRUPTED)
        except MemoryError as exc:
            raise _refusal(f"out of memory: {exc}" if str(exc) else "out of memory") from exc
        except BrokenPipeError:
            raise  # click ends quietly: whoever read has read enough
        except OSError as exc:
            raise _refusal(str(exc)) from exc
        except RuntimeError as exc:
            if "allocate memory" not in str(exc):
                raise
            raise _refusal(f"out of memory: {exc}") from exc


def _refusal(message: str) -> Refusal:
    if os.environ.get("TALLSTORE_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
    return Refusal(message)
