"""Running the command, once everything is imported."""

from __future__ import annotations

import contextlib
import io
import sys

from tallstore.cli.root import root

__all__ = ["run"]


def run() -> None:
    """Run the command line of this process; ends in SystemExit."""
    for stream in (sys.stdout, sys.stderr):
        # A path or a task that the terminal's encoding lacks is shown escaped, not raised over.
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")
    root(prog_name="tallstore")
