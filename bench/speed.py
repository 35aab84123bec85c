"""How fast: reconstruct, load and save beside what they replace, in one run.

``python -m bench.speed [--cache DIR] [--zoo DIR]``. Reconstruction in memory against ``torch.add``
of the same arrays; loading a packed task against ``torch.load`` of its original file, and saving
and loading exactly against ``torch.save`` + fsync and ``torch.load``, on real fine-tunes of MiniLM
(90.9 MB each) and on a plain 1 GB checkpoint. Files are warm. Every result is checked first.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tallstore
from bench.numbaless import without_numba
from bench.rows import write
from bench.timing import by_turns
from bench.zoos.minilm import Zoo, zoo
from tallstore.kernels.reference import reconstruct as reference
from tallstore.ops import TALL_LEVELS, reconstruct
from tallstore.scratch import Scratch
from tallstore.workers import Workers, workers

_SPAN = 1 << 23


def _row(name: str, times: dict[str, dict[str, float]], ours: str, theirs: str, **more: Any) -> Any:
    ratio = times[ours]["median"] / times[theirs]["median"]
    mine, other = (times[who]["median"] * 1e3 for who in (ours, theirs))
    print(f"{name:<44}{mine:>9.1f} ms {other:>9.1f} ms"
          f"   x{ratio:.2f}", flush=True)  # fmt: skip
    return {"what": name, "ours": ours, "theirs": theirs, "ratio": ratio, "seconds": times, **more}


def reconstruction(count: int = 1 << 26) -> list[Any]:
    """Base + vector + codes in memory, against ``torch.add(base, vector, out=)``."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        base = torch.randn(count).to(dtype)
        vector = (0.01 * torch.randn(count)).to(dtype)
        out = torch.empty(count, dtype=dtype)
        for number, backend in ((1, "cpu"), (1, "compiled"), (2, "compiled"), (4, "compiled")):
            planes = torch.randint(0, 256, (number, count // 8), dtype=torch.uint8)
            levels = TALL_LEVELS if number == 1 else torch.randn(1 << number).tolist()
            with workers() as pool:
                ours = partial(_spans, pool, base, vector, planes, levels, out, Scratch(), backend)
                ours()
                some = slice(0, 1 << 20)
                wanted = reference(base[some], planes[:, : 1 << 17], vector[some], levels, dtype)
                if not torch.equal(out[some], wanted):
                    raise SystemExit("the reconstruction differs from the reference")
                times = by_turns(
                    {"reconstruct": ours, "torch.add": partial(torch.add, base, vector, out=out)},
                    repeats=9,
                    burst=4,
                )
            what = f"{number} plane" + ("s" if number > 1 else "")
            name = f"reconstruct {what}, {backend}, {str(dtype).removeprefix('torch.')}"
            rows.append(_row(name, times, "reconstruct", "torch.add", weights=count))
    return rows


def _spans(
    pool: Workers,
    base: torch.Tensor,
    vector: torch.Tensor,
    planes: torch.Tensor,
    levels: Sequence[float],
    out: torch.Tensor,
    scratch: Scratch,
    backend: str,
) -> None:
    def span(start: int) -> None:
        some = slice(start, min(start + _SPAN, base.numel()))
        part = planes[:, some.start // 8 : some.stop // 8]
        reconstruct(
            base[some], part, vector[some], levels, out[some], scratch=scratch, backend=backend
        )

    for _ in pool.each(span, range(0, base.numel(), _SPAN)):
        pass


def _synced(obj: Any, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(obj, file)
        file.flush()
        os.fsync(file.fileno())


def packed(found: Zoo, directory: Path) -> list[Any]:
    """Loading a task of a packed zoo against ``torch.load`` of its original."""
    from safetensors.torch import load_file

    rows = []
    task, folder = next(iter(found.tasks.items()))
    state = load_file(folder / "model.safetensors")
    original = directory / "original.pt"
    torch.save(state, original)
    for exact in (False, True):
        store = directory / f"zoo-{exact}.tall"
        tallstore.pack(store, found.base, found.tasks, exact=exact)
        loaded = tallstore.load(store, task=task)
        if exact and not all(torch.equal(loaded[name], state[name]) for name in state):
            raise SystemExit("the exact tier differs from the original")

        def load(path: Path = store) -> Any:
            return tallstore.load(path, task=task)

        def load_alone() -> Any:
            with without_numba():
                return load()

        runs = {"with numba": load, "without": load_alone, "torch.load": _torch_load(original)}
        times = by_turns(runs, repeats=9, burst=3)
        name = "load a packed MiniLM task" + (", exact" if exact else "")
        size = original.stat().st_size
        rows.append(_row(name, times, "with numba", "torch.load", bytes=size))
        rows.append(_row(f"{name}, without numba", times, "without", "torch.load", bytes=size))
    return rows


def _torch_load(path: Path) -> Callable[[], Any]:
    return lambda: torch.load(path)


def plain(state: Any, name: str, directory: Path, repeats: int) -> list[Any]:
    """A plain save and load against torch's."""
    ours, theirs = directory / "plain.tall", directory / "plain.pt"
    times = by_turns(
        {
            "tallstore.save": lambda: tallstore.save(state, ours),
            "torch.save + fsync": lambda: _synced(state, theirs),
        },
        repeats=repeats,
    )
    loaded = tallstore.load(ours)
    if not all(torch.equal(loaded[key], state[key]) for key in state):
        raise SystemExit("what was loaded differs from what was saved")
    size = theirs.stat().st_size
    rows = [_row(f"save {name}", times, "tallstore.save", "torch.save + fsync", bytes=size)]
    times = by_turns(
        {"tallstore.load": lambda: tallstore.load(ours), "torch.load": lambda: torch.load(theirs)},
        repeats=repeats,
    )
    rows.append(_row(f"load {name}", times, "tallstore.load", "torch.load", bytes=size))
    ours.unlink()
    theirs.unlink()
    return rows


def main() -> None:
    """Measure, print, write the rows."""
    from safetensors.torch import load_file

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--zoo", type=Path, help="a directory of trained tasks to take as it is")
    args = parser.parse_args()
    found = Zoo.at(args.zoo) if args.zoo else zoo(args.cache)
    print(f"{'':<44}{'ours':>12} {'theirs':>12}", flush=True)
    with tempfile.TemporaryDirectory(dir=args.cache) as name:
        directory = Path(name)
        rows = reconstruction() + packed(found, directory)
        first = next(iter(found.tasks.values()))
        rows += plain(load_file(first / "model.safetensors"), "MiniLM", directory, 15)
        big = {f"layer.{n}": torch.randn(1 << 22) for n in range(60)}
        rows += plain(big, "1 GB", directory, 7)
    print(write("speed", rows))


if __name__ == "__main__":
    main()
