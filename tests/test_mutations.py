"""A seeded handful of bench.mutations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(sys.platform != "linux", reason="takes Linux: /proc and pidfd")
def test_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.mutations", "--count", "60", "--results", tmp_path],
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *_, row = json.loads((tmp_path / "mutations.json").read_text())["rows"]
    assert row["tried"] == row["refused"] + row["harmless"] == 60
    assert row["refused"] > 20 and row["harmless"] > 10
    assert row["memory_mb_peak"] < row["budget_mb"]
