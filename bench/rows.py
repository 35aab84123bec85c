"""What every result carries: machine, versions, commit; written as JSON, one file a run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["context", "write"]

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "triton", "numpy", "lmdb", "zstandard", "xxhash", "safetensors", "numba")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str:
    def git(*args: str) -> str:
        root = Path(__file__).parent.parent
        command = ["git", *args]
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        except OSError:  # a machine without git
            return ""
        return done.stdout.strip()

    dirty = "+" if git("status", "--porcelain", "--", "tallstore", "kernels") else ""
    return git("rev-parse", "--short=12", "HEAD") + dirty


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _module() -> str:
    path = Path(sys.argv[0]).resolve().relative_to(RESULTS.parent.parent).with_suffix("")
    return ".".join(path.parts)


def context() -> dict[str, Any]:
    """Where and on what a measurement was made. A "+" after the commit: with changes."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "commit": _commit(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "versions": _versions(),
    }


def write(name: str, rows: list[dict[str, Any]], *, results: Path | None = None) -> Path:
    """Write rows, with their context, to ``bench/results/NAME.json``, or elsewhere."""
    folder = RESULTS if results is None else results
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"context": context(), "rows": rows}, indent=1) + "\n")
    return path
