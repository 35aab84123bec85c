"""Asking the server: run an operation with a fault in it, then check what is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.faults.operations import OPERATIONS
from bench.faults.shim import build
from bench.faults.template import prepare

__all__ = ["Driver", "Outcome"]

_ROOT = Path(__file__).parent.parent.parent
Outcome = dict[str, Any]


class Driver:
    """A context manager; needs a C compiler.

    Parameters
    ----------
    folder
        Where places are made, on the file system to be tried; a temporary directory if None.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tallstore-faults-", dir=folder))
        self.template = self.folder / "template"
        self.place = self.folder / "place"
        self.log = self.folder / "log"

    def __enter__(self) -> Driver:
        shim = build(self.folder)
        if shim is None:
            raise RuntimeError("a C compiler is needed, to build bench/faults/shim.c")
        environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(_ROOT)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "bench.faults.server"],
            env=environment,
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.template.mkdir()
        self._expect_success(self.ask(do="template", place=str(self.template), operation=""))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, **request: Any) -> Outcome:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError("the server is gone")
        found: Outcome = json.loads(answer)
        if found["hanging"]:
            raise AssertionError(f"{request} hangs")
        return found

    def _expect_success(self, outcome: Outcome) -> None:
        if outcome["exit"]:
            raise AssertionError(outcome.get("trace") or f"the child ended with {outcome}")

    def run(self, name: str, **request: Any) -> Outcome:
        """Run an operation in a fresh place; it succeeds, is refused, or is killed."""
        prepare(self.template, self.place, name)
        outcome = self.ask(do="run", place=str(self.place), operation=name, **request)
        if outcome["exit"] not in (0, -signal.SIGKILL):
            self._expect_success(outcome)
        return outcome

    def check(self, name: str, *, finished: bool, place: Path | None = None) -> bool:
        """Check what is left; returns whether the new is there."""
        outcome = self.ask(
            do="check",
            place=str(place or self.place),
            template=str(self.template),
            operation=name,
            finished=finished,
        )
        self._expect_success(outcome)
        return bool(outcome["new"])

    def undisturbed(self, name: str) -> Outcome:
        """Run and check an operation that nothing happens to: seconds, and calls that count."""
        outcome = self.run(name)
        self._expect_success(outcome)
        if "refused" in outcome:
            raise AssertionError(outcome["message"])
        self.check(name, finished=True)
        return outcome

    @property
    def operations(self) -> list[str]:
        return list(OPERATIONS)
