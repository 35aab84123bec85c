"""Switching a live model on a device: its time, the kernel's floor, and reloading from page cache.

``python -m bench.gpu.serving [--cache DIR] [--results DIR] [--seconds S] [--try]``. Synthetic
bfloat16 weights in the shapes of language models of 1 and 7 billion weights, each tensor by itself.

- A switch: `tallstore.serving`, host time from the call until the device is done.
- The floor: the kernel over flat arrays of as many weights, and ``torch.add`` of them, which moves
  a sixteenth less; device time.
- The rival: ``safetensors`` from page cache to the device, and ``load_state_dict``.

At 1 B the store is a real one, and what is switched to is what `tallstore.load` gives, to the bit.
At 7 B base, vector and masks are drawn on the device: a store of that size takes minutes to make.
After the first switches to each task nothing may be allocated. Without a GPU, ``--try`` runs it in
small.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tallstore
from bench.gpu.clock import Clock
from bench.rows import write
from tallstore.layout import BLOCK
from tallstore.ops import TALL_LEVELS, compress_planes, reconstruct, reconstruct_placed
from tallstore.serving import TaskSwitcher
from tallstore.serving.arrangement import arrange
from tallstore.serving.forms import PlanesForm, SparseForm
from tallstore.serving.planning import Run
from tallstore.serving.reading import TaskCode
from tallstore.serving.skeleton import skeleton
from tallstore.serving.writer import Writer
from tallstore.workers import workers

_REPEATS = 15
#: A switch waits for the host as well, which is less steady than the device.
_SWITCHES = 60
_LEAST_ROOM = 1 << 30


@dataclass(frozen=True)
class Shape:
    """A language model's tensors."""

    name: str
    layers: int
    width: int
    inner: int
    words: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes."""
        yield "embed.weight", (self.words, self.width)
        for layer in range(self.layers):
            for name in ("q", "k", "v", "o"):
                yield f"layers.{layer}.{name}.weight", (self.width, self.width)
            for name in ("gate", "up"):
                yield f"layers.{layer}.{name}.weight", (self.inner, self.width)
            yield f"layers.{layer}.down.weight", (self.width, self.inner)
            for name in ("norm1", "norm2"):
                yield f"layers.{layer}.{name}.weight", (self.width,)
        yield "norm.weight", (self.width,)


ONE = Shape("1 B", 16, 2048, 8192, 32_000)
SEVEN = Shape("7 B", 32, 4096, 11_008, 32_000)
TINY = Shape("tiny", 2, 64, 96, 200)


class Bench:
    """Measures on one device, and keeps the rows."""

    def __init__(self, clock: Clock, folder: Path, *, seconds: float) -> None:
        self.clock = clock
        self.device = clock.device
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self._ends = time.perf_counter() + seconds
        self._draw = torch.Generator(self.device).manual_seed(0)

    def left(self) -> float:
        """Seconds until the bench has to end."""
        return self._ends - time.perf_counter()

    def normal(self, size: tuple[int, ...] | int, scale: float) -> torch.Tensor:
        """bfloat16 weights, drawn on the device."""
        made = torch.empty(size, dtype=torch.bfloat16, device=self.device)
        return made.normal_(0, scale, generator=self._draw)

    def bytes(self, *shape: int) -> torch.Tensor:
        """Random bytes on the device."""
        made = torch.empty(shape, dtype=torch.uint8, device=self.device)
        return made.random_(0, 256, generator=self._draw)

    def add(self, shape: Shape, what: str, ms: float, **facts: Any) -> None:
        """Keep a row, and print it."""
        self.rows.append({"what": what, "model": shape.name, "ms": ms, **facts})
        if not self.clock.trying:
            more = ", ".join(f"{k} {v:.3g}" for k, v in facts.items() if isinstance(v, float))
            print(f"{shape.name:<6}{what:<52}{ms:>10.3f} ms   {more}", flush=True)

    def wall(self, run: Callable[[], object], repeats: int) -> float:
        """Median milliseconds of the host's clock, the device's work included."""
        spent = []
        for turn in range(repeats + 1):
            began = time.perf_counter()
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                spent.append((time.perf_counter() - began) * 1e3)
        return median(spent)

    def allocations(self) -> int:
        """Blocks that torch ever took on the device."""
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.memory_stats(self.device)["allocation.all.allocated"])


def _alternating(one: Callable[[], object], other: Callable[[], object]) -> Callable[[], None]:
    turn = [0]

    def run() -> None:
        turn[0] += 1
        (one if turn[0] % 2 else other)()

    return run


def floors(bench: Bench, shape: Shape, base: torch.Tensor, vector: torch.Tensor) -> float:
    """Device times of the flat kernel, and of a plain sum; gives the kernel's."""
    out = torch.empty_like(base)
    planes = bench.bytes(1, base.numel() // 8)
    levels = torch.tensor([TALL_LEVELS], device=bench.device)
    times = bench.clock.by_turns(
        {
            "kernel": lambda: reconstruct(base, planes, vector, levels, out),
            "torch.add": lambda: torch.add(base, vector, out=out),
        },
        repeats=_REPEATS,
    )
    floor = times["kernel"].p50
    rate = base.numel() * 6.125 / floor / 1e6
    bench.add(shape, "floor: the kernel over flat arrays", floor, gb_per_s=rate)
    bench.add(shape, "torch.add of the same", times["torch.add"].p50)
    return floor


def report_switch(
    bench: Bench, shape: Shape, switch: Callable[[], None], floor: float, rival: float | None
) -> None:
    """Time switches; refuse those that allocate."""
    for _ in range(3):
        switch()
    before = bench.allocations()
    ms = bench.wall(switch, _SWITCHES)
    taken = bench.allocations() - before
    if taken:
        raise SystemExit(f"{shape.name}: {taken} allocations in {_SWITCHES} switches")
    facts = {"of_the_floor": ms / floor, "allocations": taken}
    if rival is not None:
        facts["faster_than_safetensors"] = rival / ms
    bench.add(shape, "switch", ms, **facts)


def reload(bench: Bench, shape: Shape, file: Path, model: torch.nn.Module, repeats: int) -> float:
    """The rival: safetensors from page cache, and load_state_dict."""
    from safetensors.torch import load_file

    place = str(bench.device)
    ms = bench.wall(lambda: model.load_state_dict(load_file(file, device=place)), repeats)
    bench.add(shape, "safetensors + load_state_dict", ms, gb_per_s=file.stat().st_size / ms / 1e6)
    return ms


def real(bench: Bench, shape: Shape) -> None:
    """A store of two tasks."""
    from safetensors.torch import save_file

    base = {name: bench.normal(size, 0.02) for name, size in shape.tensors()}
    save_file({n: t.cpu() for n, t in base.items()}, bench.folder / "base.safetensors")
    files = {}
    for task in ("a", "b"):
        tuned = {name: (t + bench.normal(t.shape, 0.001)).cpu() for name, t in base.items()}
        files[task] = bench.folder / f"{task}.safetensors"
        save_file(tuned, files[task])
    del base, tuned
    store = bench.folder / "zoo.tall"
    began = time.perf_counter()
    device = None if bench.device.type == "cpu" else bench.device
    tallstore.pack(store, bench.folder / "base.safetensors", files, device=device)
    bench.add(shape, "(packing the two tasks)", (time.perf_counter() - began) * 1e3)
    with tallstore.open(store) as opened:
        model = skeleton(opened, "a", device=bench.device)
    with TaskSwitcher(model, store) as switcher:
        for task in ("b", "a"):
            switcher.switch(task)
            wanted = tallstore.load(store, task=task)
            for name, tensor in model.state_dict().items():
                if not torch.equal(tensor.cpu(), wanted[name]):
                    raise SystemExit(f"{task}: {name} is not what loading gives")
        rival = reload(bench, shape, files["a"], model, 5)
        resident = switcher._stock.offer.resident
        floor = floors(bench, shape, resident.base(0), resident.vector(0))
        for form in switcher._stock.take("a").code.forms:
            if isinstance(form, PlanesForm):
                _placed(bench, shape, form, form.arrangement.runs, floor)
        run = _alternating(lambda: switcher.switch("b"), lambda: switcher.switch("a"))
        report_switch(bench, shape, run, floor, rival)
        host = {}
        for resident_mode in ("masks-on-host", "stream"):
            budget = switcher.need().largest
            with TaskSwitcher(model, store, resident=resident_mode, budget=budget) as other:
                run = _alternating(lambda o=other: o.switch("b"), lambda o=other: o.switch("a"))
                host[resident_mode] = bench.wall(run, 5)
            bench.add(shape, f"switch, {resident_mode}, a miss each time", host[resident_mode])
    for file in (bench.folder / "base.safetensors", *files.values(), store):
        file.unlink()


def drawn(bench: Bench, shape: Shape, *, file: bool) -> None:
    """Resident forms drawn on the device, without a store."""
    sizes = dict(shape.tensors())
    model: dict[str, torch.Tensor] = {}
    runs, first = [], 0
    for number, (name, size) in enumerate(sizes.items()):
        model[name] = torch.zeros(size, dtype=torch.bfloat16, device=bench.device)
        runs.append(Run(number, first, model[name].view(-1)))
        first += -(-model[name].numel() // BLOCK) * BLOCK
    base, vector = bench.normal(first, 0.02), bench.normal(first, 0.001)
    there = arrange(runs, base, vector)
    levels = torch.tensor([TALL_LEVELS] * (len(runs) + 1), device=bench.device)
    codes = [
        TaskCode((PlanesForm(there, bench.bytes(1, first // 8), levels),), ()) for _ in range(2)
    ]
    with workers() as pool:
        writer = Writer(bench.device, pool)
        writer.write(codes[0])
        _check_drawn(codes[0].forms[0], runs)
        rival = None
        if file:
            rival = _rival(bench, shape, model)
        floor = floors(bench, shape, base, vector)
        if there.places is not None or bench.clock.trying:
            _placed(bench, shape, codes[0].forms[0], runs, floor)
        run = _alternating(lambda: writer.write(codes[0]), lambda: writer.write(codes[1]))
        report_switch(bench, shape, run, floor, rival)
        _sparse(bench, shape, runs, base, writer)


def _check_drawn(form: Any, runs: list[Run]) -> None:
    from tallstore.kernels.reference import reconstruct as plain

    for run in (runs[0], runs[1], runs[-1]):
        count = min(run.out.numel(), 1 << 20)
        at = slice(run.first, run.first + count)
        planes = form.planes[:, run.first // 8 : (run.first + count + 7) // 8]
        there = form.arrangement
        wanted = plain(there.base[at], planes, there.vector[at], TALL_LEVELS, run.out.dtype)
        if not torch.equal(run.out[:count], wanted):
            raise SystemExit("the switch gives other weights than the reference")


def _placed(bench: Bench, shape: Shape, form: Any, runs: Sequence[Run], floor: float) -> None:
    """The one launch of a switch, by the device's clock."""
    from tallstore.ops import place

    there = form.arrangement
    places = there.places or place([(run.first, run.out) for run in runs], there.base.numel())
    backend = "triton" if bench.clock.trying else None

    def launch() -> None:
        reconstruct_placed(
            there.base, form.planes, there.vector, form.levels, places, backend=backend
        )

    ms = bench.clock.by_turns({"placed": launch}, repeats=_REPEATS)["placed"].p50
    bench.add(shape, "the kernel of a switch, device time", ms, of_the_floor=ms / floor)


def _sparse(
    bench: Bench, shape: Shape, runs: list[Run], base: torch.Tensor, writer: Writer
) -> None:
    """Signs of 2 % of the weights, one weight in 64 by + and one by -."""
    levels = torch.tensor([[-0.0, 0.001, -0.001, -0.0]], device=bench.device)
    forms = []
    for _ in range(2):
        pieces = []
        for run in runs:
            size = -(-run.out.numel() // 8)
            some = bench.bytes(2, size)
            for _ in range(5):
                some &= bench.bytes(2, size)
            some[1] &= ~some[0]
            code = compress_planes(some, run.out.numel(), levels)
            pieces.append((code, base[run.first : run.stop], run.out))
        forms.append(TaskCode((SparseForm(tuple(pieces)),), ()))
    writer.write(forms[0])
    run = _alternating(lambda: writer.write(forms[1]), lambda: writer.write(forms[0]))
    for _ in range(3):
        run()
    ms = bench.wall(run, _REPEATS)
    kept = sum(form.nbytes for form in forms[0].forms)
    bench.add(shape, "switch of 3 % signs to others", ms, bits_a_weight=8 * kept / base.numel())


def _rival(bench: Bench, shape: Shape, model: dict[str, torch.Tensor]) -> float | None:
    from safetensors.torch import save_file

    size = sum(tensor.nbytes for tensor in model.values())
    if shutil.disk_usage(bench.folder).free < size + _LEAST_ROOM or bench.left() < 60 * (
        size / 14e9
    ):
        print(f"{shape.name}: no room or no time for a file of {size / 1e9:.0f} GB", flush=True)
        return None
    file = bench.folder / "one.safetensors"
    save_file({name: tensor.cpu() for name, tensor in model.items()}, file)

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in model.items():
                self.register_buffer(name.replace(".", "_"), tensor)

    from safetensors.torch import load_file

    holder = Holder()

    def load() -> None:
        found = load_file(file, device=str(bench.device))
        holder.load_state_dict({name.replace(".", "_"): t for name, t in found.items()})

    ms = bench.wall(load, 2)
    bench.add(shape, "safetensors + load_state_dict", ms, gb_per_s=size / ms / 1e6)
    file.unlink()
    return ms


def _folder(cache: Path | None) -> Path | None:
    """Where files go: memory, if there is room for them."""
    memory = Path("/dev/shm")
    if cache is None and memory.is_dir() and os.access(memory, os.W_OK):
        room = shutil.disk_usage(memory).free
        return memory if room > 20 << 30 else None
    return cache


def main() -> None:
    """Measure, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="where the files go, some 14 GB")
    parser.add_argument("--results", type=Path, help="where the rows go, not bench/results")
    parser.add_argument("--seconds", type=float, default=140, help="until it has to end")
    parser.add_argument("--try", dest="trying", action="store_true", help="tiny, nothing written")
    args = parser.parse_args()
    clock = Clock(trying=args.trying)
    with tempfile.TemporaryDirectory(dir=_folder(args.cache)) as name:
        bench = Bench(clock, Path(name), seconds=args.seconds)
        drawn(bench, TINY if args.trying else SEVEN, file=True)
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()
        if bench.left() > 50:
            real(bench, TINY if args.trying else ONE)
    if args.trying:
        print(f"{len(bench.rows)} rows; tried only, nothing written")
        return
    print(
        write("gpu_serving", [{"gpu": clock.name(), **r} for r in bench.rows], results=args.results)
    )


if __name__ == "__main__":
    main()
