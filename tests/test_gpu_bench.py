"""The GPU benchmarks can be tried without a GPU, and without waiting: their checks all hold."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from zoo import ROOT

pytest.importorskip("triton")


@pytest.mark.parametrize("module", ["kernels", "loading", "serving"])
def test_they_run(module: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", f"bench.gpu.{module}", "--try"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tried only, nothing written" in done.stdout


def test_the_one_command_says_what_is_missing() -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [ROOT / "bench" / "gpu.sh"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1 and "this python finds no CUDA device" in done.stderr
