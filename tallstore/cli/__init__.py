"""The ``tallstore`` command: it parses, calls the library, and prints.

Everything heavy is imported inside functions, so that ``tallstore ls`` starts without torch, and
Ctrl-C is quiet from the first moment on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Final

__all__ = ["INTERRUPTED", "main"]

#: Exit status after Ctrl-C, as shells have it: 128 + SIGINT.
INTERRUPTED: Final = 130


def main() -> None:
    """Run the command line of this process, and exit."""
    try:
        from tallstore.cli.entry import run

        run()
    except KeyboardInterrupt:
        # While modules were imported or arguments read; later on the command has caught it.
        print("Interrupted.", file=sys.stderr)
        _end_interrupted()
    except SystemExit as exc:
        if exc.code == INTERRUPTED:
            _end_interrupted()
        raise


def _end_interrupted() -> None:
    """End with the right status, everything being cleaned up by now.

    After an interrupt that passed through exec() of a string, Python would end with another
    status, whatever sys.exit() says.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(INTERRUPTED)
