"""From a warm file to CUDA tensors: tallstore, safetensors and torch.load, side by side.

``python -m bench.gpu.loading [--weights N] [--zoo DIR [--make]] [--results DIR] [--try]``. A
synthetic base of bfloat16 weights and two fine-tunes of it. Cold base: everything comes from the
file. Resident base: base and shared vector are on the device, and only a task's masks are read.
What is loaded is checked first.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tallstore
from bench.gpu.clock import Clock
from bench.rows import write
from tallstore.describing import describe
from tallstore.dtypes import torch_dtype
from tallstore.layout import BLOCK
from tallstore.ops import TALL_LEVELS, reconstruct
from tallstore.store import TallStore
from tallstore.workers import workers


class Resident:
    """Base and shared vector on the device; a task's masks come from the file."""

    def __init__(self, store: TallStore, device: torch.device) -> None:
        self._store = store
        self._device = device
        self._snapshot = store._held()
        document = describe(self._snapshot, store._catalog, task=None).base
        vector = store.vector
        if vector is None or len(document.layout.arenas) != 1:
            raise SystemExit("one arena and a shared vector are needed")
        (arena,) = document.layout.arenas
        self._weights = arena.weights
        self.base = self._upload(document.streams[0]).view(torch_dtype(arena.dtype))
        self.vector = self._upload(vector.streams[0]).view(torch_dtype(vector.dtype))
        self.out = torch.empty_like(self.base)
        self._levels = torch.tensor([TALL_LEVELS], device=device)
        pinned = device.type == "cuda"
        self._planes = torch.empty(arena.weights // 8, dtype=torch.uint8, pin_memory=pinned)
        self._on_device = torch.empty(arena.weights // 8, dtype=torch.uint8, device=device)

    def _upload(self, number: int) -> torch.Tensor:
        stream = self._snapshot.stream(number)
        host = np.empty(stream.raw, np.uint8)
        self._snapshot.read(stream, 0, host)
        return torch.from_numpy(host).to(self._device)

    def switch(self, task: str) -> None:
        """Make `out` a task."""
        found = describe(self._snapshot, self._store._catalog, task=task).task
        if found is None or found.codes[0].planes is None:
            raise SystemExit(f"{task} has no masks")
        stream = self._snapshot.stream(found.codes[0].planes)
        host = self._planes.numpy()

        def read(chunk: int) -> tuple[int, int]:
            first = chunk * stream.chunk_size
            last = first + stream.raw_size(chunk)
            self._snapshot.read_chunk(stream, chunk, host[first:last])
            return first, last

        with workers() as pool:
            for first, last in pool.each(read, range(stream.chunks)):
                self._on_device[first:last].copy_(self._planes[first:last], non_blocking=True)
        planes = self._on_device.unsqueeze(0)
        reconstruct(self.base, planes, self.vector, self._levels, self.out)


def make_zoo(folder: Path, weights: int, device: torch.device) -> None:
    """Stores with and without the exact tier, and the originals of two tasks as safetensors."""
    from safetensors.torch import save_file

    # Drawn where it is fast: a billion numbers take one core of the host most of a minute.
    generator = torch.Generator(device).manual_seed(0)

    def draw(scale: float) -> torch.Tensor:
        made = torch.empty(size, dtype=torch.bfloat16, device=device)
        return made.normal_(0, scale, generator=generator).cpu()

    layers = max(1, weights >> 26)
    size = weights // layers
    base = {f"layers.{n}.weight": draw(0.02) for n in range(layers)}
    paths = {}
    save_file(base, folder / "base.safetensors")
    for task in ("a", "b"):
        tuned = {name: tensor + draw(0.001) for name, tensor in base.items()}
        paths[task] = folder / f"{task}.safetensors"
        save_file(tuned, paths[task])
        if task == "a":
            torch.save(tuned, folder / "a.pt")
    for exact in (False, True):
        tallstore.pack(folder / f"{exact}.tall", folder / "base.safetensors", paths, exact=exact)


def measure(clock: Clock, folder: Path, weights: int) -> list[dict[str, Any]]:
    """Rows of every way to the device."""
    from safetensors.torch import load_file

    masks, exact = folder / "False.tall", folder / "True.tall"
    original, pickled = folder / "a.safetensors", folder / "a.pt"
    device = clock.device
    state = load_file(original)
    if not all(torch.equal(t.cpu(), state[n]) for n, t in _load(exact, device).items()):
        raise SystemExit("the exact tier differs from the original")
    wanted = tallstore.load(masks, task="a")
    if not all(torch.equal(t.cpu(), wanted[n]) for n, t in _load(masks, device).items()):
        raise SystemExit("the masks give other weights on the device than on the CPU")
    with TallStore(masks) as store:
        resident = Resident(store, device)
        resident.switch("b")
        resident.switch("a")
        flat = torch.cat([t.flatten() for t in wanted.values()])
        # Tensors of whole blocks lie side by side in the arena; the last may end anywhere.
        *whole, _ = wanted.values()
        if any(t.numel() % BLOCK for t in whole):
            raise SystemExit(f"--weights: layers of whole blocks of {BLOCK} are needed")
        if not torch.equal(resident.out[: flat.numel()].cpu(), flat):
            raise SystemExit("a resident base gives other weights")
        runs: dict[str, Callable[[], object]] = {
            "tallstore, masks, cold base": lambda: _load(masks, device),
            "tallstore, masks, resident base": lambda: resident.switch("a"),
            "tallstore, exact": lambda: _load(exact, device),
            "safetensors": lambda: load_file(original, device=str(device)),
            "torch.load(mmap=True)": lambda: torch.load(pickled, mmap=True, map_location=device),
        }
        return _rows(clock, runs, weights)


def _load(path: Path, device: torch.device) -> Any:
    return tallstore.load(path, task="a", device=device)


def _rows(
    clock: Clock, runs: dict[str, Callable[[], object]], weights: int
) -> list[dict[str, Any]]:
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(1 if clock.trying else 8):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if clock.device.type == "cuda":
                torch.cuda.synchronize()
            if turn or clock.trying:
                spent[name].append((time.perf_counter() - began) * 1e3)
    best = min(float(np.median(spent[name])) for name in ("safetensors", "torch.load(mmap=True)"))
    rows = []
    for name, found in spent.items():
        middle = float(np.median(found))
        rows.append(
            {
                "what": "load to the device",
                "who": name,
                "weights": weights,
                "p20_ms": float(np.quantile(found, 0.2)),
                "p50_ms": middle,
                "p80_ms": float(np.quantile(found, 0.8)),
                "gb_per_s": weights * 2 / middle / 1e6,
                "of_the_faster_rival": middle / best,
            }
        )
        if not clock.trying:
            print(
                f"{name:<34} {middle:9.1f} ms {weights * 2 / middle / 1e6:6.1f} GB/s "
                f"{middle / best:5.2f} x the faster rival",
                flush=True,
            )
    return rows


def main() -> None:
    """Measure, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=1 << 29)
    parser.add_argument("--zoo", type=Path, help="a folder that keeps the files, 14 bytes a weight")
    parser.add_argument("--make", action="store_true", help="make the files, and measure nothing")
    parser.add_argument("--results", type=Path, help="where the rows go, not bench/results")
    parser.add_argument("--try", dest="trying", action="store_true", help="tiny, nothing written")
    args = parser.parse_args()
    clock = Clock(trying=args.trying)
    weights = 100_000 if args.trying else args.weights
    with tempfile.TemporaryDirectory() if args.zoo is None else nullcontext(args.zoo) as name:
        folder = Path(name)
        if not (folder / "made").exists():
            folder.mkdir(exist_ok=True)
            make_zoo(folder, weights, clock.device)
            (folder / "made").touch()
        if args.make:
            return
        rows = measure(clock, folder, weights)
    if args.trying:
        print(f"{len(rows)} rows; tried only, nothing written")
        return
    print(write("gpu_loading", [{"gpu": clock.name(), **r} for r in rows], results=args.results))


if __name__ == "__main__":
    main()
