"""Does packing stream? A synthetic zoo of 8 and of 16 checkpoints of 2 GB each.

``python -m bench.scale [--dir DIR] [--gigabytes 2] [--tasks 8 16]``. Makes safetensors files (34 GB
of disk for the defaults), packs them in a child process, and prints input bytes a second and the
child's peak memory above that of an interpreter with torch imported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.rows import write
from tallstore.sources.safetensors_writer import SafetensorsWriter

_LAYER = 1 << 24  # weights: 64 MiB in float32

_CHILD = """
import json, resource, sys, time
import torch, numpy
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import tallstore
store, base, merge, *tasks = sys.argv[1:]
began = time.perf_counter()
tallstore.pack(store, base, dict(t.split("=", 1) for t in tasks), merge=merge, overwrite=True)
seconds = time.perf_counter() - began
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "above": (after - before) * 1024}))
"""


def _make(path: Path, layers: int, seed: int, base: Path | None) -> None:
    """Write random weights; a task's are the base's with small steps on half of them."""
    if path.exists():
        return
    rng = np.random.default_rng(seed)
    held = None if base is None else base.open("rb")
    names = [(f"layer.{n}.weight", "float32", (_LAYER >> 12, 4096)) for n in range(layers)]
    with SafetensorsWriter(path, names) as writer:
        for name, _, _ in names:
            weights = rng.standard_normal(_LAYER, np.float32) * np.float32(0.02)
            if held is not None:
                start = base.stat().st_size - layers * 4 * _LAYER  # type: ignore[union-attr]
                held.seek(start + 4 * _LAYER * int(name.split(".")[1]))
                there = np.fromfile(held, np.float32, _LAYER)
                weights = there + np.float32(0.02) * weights
            writer.write(name, 0, weights)


def _pack(folder: Path, count: int, merge: str, total: int) -> dict[str, Any]:
    store = folder / "zoo.tall"
    tasks = [f"t{n}={folder / f't{n}.safetensors'}" for n in range(count)]
    command = [sys.executable, "-c", _CHILD, str(store), str(folder / "base.safetensors"), merge]
    done = subprocess.run([*command, *tasks], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    row = {
        "what": f"pack {count} x {total / 1e9:.1f} GB, {merge}",
        "tasks": count,
        "merge": merge,
        "input_bytes": count * total,
        "seconds": found["seconds"],
        "megabytes_per_second": count * total / found["seconds"] / 1e6,
        "peak_bytes_above_torch": found["above"],
        "store_bytes": store.stat().st_size,
    }
    store.unlink()
    print(f"{row['what']:<28}{row['megabytes_per_second']:>8.0f} MB/s of input"
          f"{row['peak_bytes_above_torch'] / 2**20:>8.0f} MiB above torch"
          f"{row['store_bytes'] / 1e9:>7.2f} GB store", flush=True)  # fmt: skip
    return row


def main() -> None:
    """Make the zoo, pack it, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=None)
    parser.add_argument("--keep", type=Path, help="make the zoo here, or take what is here")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--tasks", type=int, nargs="+", default=[8, 16])
    args = parser.parse_args()
    layers = max(1, round(args.gigabytes * 1e9 / (4 * _LAYER)))
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = args.keep or Path(name)
        base = folder / "base.safetensors"
        _make(base, layers, 0, None)
        for n in range(max(args.tasks)):
            _make(folder / f"t{n}.safetensors", layers, n + 1, base)
        total = base.stat().st_size
        rows = [_pack(folder, count, "ta", total) for count in args.tasks]
        rows.append(_pack(folder, args.tasks[0], "ties", total))
    print(write("scale", rows))


if __name__ == "__main__":
    main()
