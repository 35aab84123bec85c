"""How far work has come, on stderr: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from types import TracebackType
from typing import TextIO

from tallstore.cli.printing import size
from tallstore.progress import Report

__all__ = ["Progress"]

_BAR = 24
#: Seconds of work before anything is shown: on a terminal, and in plain lines.
_PATIENCE, _PLAIN_PATIENCE = 0.3, 2.0
#: Seconds between two drawings of the bar; between two plain lines, however slow.
_REDRAW, _PLAIN_EVERY = 0.1, 5.0
_PLAIN_STEP = 0.1  # of a stage


class Progress:
    """A context manager; `report` is what the library's functions take.

    Parameters
    ----------
    quiet
        Show nothing.
    stream
        Where it is shown; stderr if None.
    """

    def __init__(self, *, quiet: bool, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._bar = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self.report: Report | None = None if quiet else self._report
        self._began = self._shown = 0.0
        self._stage = ""
        self._stage_began = self._began
        self._share = 0.0
        self._drawn = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.report = None
        self.clear()

    def _report(self, stage: str, done: int, total: int) -> None:
        if not total:
            return
        now = time.monotonic()
        if not self._began:
            # Not before: the imports that come first are no work to tell of.
            self._began = self._shown = now
        share = done / total
        if stage != self._stage or not done:
            self._stage, self._stage_began, self._share = stage, now, 0.0
        if self._due(now, share):
            self._shown, self._share = now, share
            self._show(stage, share, done / max(now - self._stage_began, 1e-3))

    def _due(self, now: float, share: float) -> bool:
        if self._bar:
            return now - self._began > _PATIENCE and now - self._shown >= _REDRAW
        if now - self._began <= _PLAIN_PATIENCE or share == 0:
            return False
        return share - self._share >= _PLAIN_STEP or now - self._shown >= _PLAIN_EVERY

    def _show(self, stage: str, share: float, rate: float) -> None:
        text = f"{stage:<8} {share:>4.0%}  {size(rate)}/s"
        if not self._bar:
            self._write(text + "\n")
            return
        full = round(_BAR * share)
        text = f"{stage:<8} [{'#' * full}{'.' * (_BAR - full)}] {share:>4.0%}  {size(rate)}/s"
        self._write("\r" + text + " " * (self._drawn - len(text)))
        self._drawn = len(text)

    def clear(self) -> None:
        """Take the bar away, so that something else can be printed."""
        if self._drawn:
            self._write("\r" + " " * self._drawn + "\r")
            self._drawn = 0

    def _write(self, text: str) -> None:
        # Work goes on when nobody reads stderr any more.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()
