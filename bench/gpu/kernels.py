"""The kernels against a copy of the same size, in one run.

``python -m bench.gpu.kernels [--results DIR] [--try]``. Bandwidth counts every byte in and out
once; a copy reads and writes. Inputs are random and larger than the L2. What is timed is checked
against the reference first, at both ends of the arena; what differs is named, and fails the run in
the end. On a GPU, ``--try`` compiles what the benchmark runs: several at a time, before it, save
minutes.
"""

from __future__ import annotations

import argparse
import itertools
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu.clock import Clock
from bench.gpu.measuring import BLOCK, Bench, ends, same, short
from bench.gpu.shapes import draw_sparse, shapes
from bench.rows import write

_MODEL_7B = 6_738_415_616


def reconstruction(bench: Bench) -> None:
    """K = 1 with a vector at every size; K = 4 and K = 2 without one at some."""
    for dtype in (torch.bfloat16, torch.float32):
        for n in bench.sizes(28, 30, 32, 33):
            for planes in (1, 2, 4) if n <= 1 << 30 else (1,):
                _reconstruction(bench, n, dtype, planes)
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()


def _reconstruction(bench: Bench, n: int, dtype: torch.dtype, count: int) -> None:
    from tallstore.kernels import reference
    from tallstore.ops import reconstruct

    base, out = bench.floats(n, dtype), bench.floats(n, dtype)
    vector = bench.floats(n, dtype, 0.01) if count != 2 else None
    planes = bench.bits(count, -(-n // 8))
    tensors = 291
    table = bench.floats(tensors << count, torch.float32).view(tensors, -1)
    rows = torch.arange(-(-n // BLOCK), device=bench.device) * tensors // -(-n // BLOCK)
    rows = rows.to(torch.int32)

    def ours() -> None:
        reconstruct(base, planes, vector, table, out, rows=rows)

    ours()
    for some in ends(n):
        chosen = rows[some.start // BLOCK : -(-some.stop // BLOCK)]
        each = chosen.long().repeat_interleave(BLOCK)[: some.stop - some.start]
        part = planes[:, some.start // 8 : (some.stop + 7) // 8]
        code = reference.codes(part, some.stop - some.start)
        step = table[each, code]
        if vector is not None:
            step = step * vector[some].float()
        bench.require(same(out[some], (base[some].float() + step).to(dtype)), "reconstruct")
    runs: dict[str, Callable[[], object]] = {"copy": lambda: out.copy_(base), "tallstore": ours}
    if count == 1 and n == bench.size(1 << 30) and vector is not None:
        runs |= _rivals(bench, base, planes, vector, out)
    inputs = 2 if vector is not None else 1
    moved = n * dtype.itemsize * (inputs + 1) + planes.numel()
    bench.compare(
        "reconstruct",
        runs,
        moved,
        copied=2 * n * dtype.itemsize,
        weights=n,
        dtype=short(dtype),
        planes=count,
        vector=vector is not None,
    )


def _rivals(
    bench: Bench,
    base: torch.Tensor,
    planes: torch.Tensor,
    vector: torch.Tensor,
    out: torch.Tensor,
) -> dict[str, Callable[[], object]]:
    """A mask in plain torch, and compiled."""
    from tallstore.kernels import reference
    from tallstore.ops import TALL_LEVELS

    shifts = torch.arange(8, dtype=torch.uint8, device=bench.device)

    def plain(
        base: torch.Tensor, plane: torch.Tensor, vector: torch.Tensor, out: torch.Tensor
    ) -> None:
        mask = ((plane.unsqueeze(1) >> shifts) & 1).view(-1)[: base.numel()]
        out.copy_(torch.where(mask.bool(), base + vector, base))

    runs: dict[str, Callable[[], object]] = {
        "torch": lambda: plain(base, planes[0], vector, out),
    }
    if not bench.clock.trying:
        # For each size anew, which is its fastest.
        compiled = torch.compile(plain, dynamic=False)
        try:
            compiled(base, planes[0], vector, out)
        except Exception as exc:  # the kernels' own figures do not hang on it
            print(f"torch.compile: {type(exc).__name__}: {str(exc)[:300]}", flush=True)
        else:
            runs["compile"] = lambda: compiled(base, planes[0], vector, out)
    for name, run in runs.items():
        run()
        for some in ends(base.numel()):
            part = planes[:, some.start // 8 : (some.stop + 7) // 8]
            wanted = reference.reconstruct(base[some], part, vector[some], TALL_LEVELS, out.dtype)
            bench.require(bool((out[some] == wanted).all()), name)
    return runs


def encoding(bench: Bench) -> None:
    """TALL masks and nearest levels, with and without their sums."""
    from tallstore.kernels import reference
    from tallstore.ops import LevelSums, TallSums, encode_levels, encode_tall

    for dtype in (torch.bfloat16, torch.float32):
        for n in bench.sizes(28, 31 if dtype == torch.bfloat16 else 30):
            base, vector = bench.floats(n, dtype), bench.floats(n, dtype, 0.01)
            tuned = bench.floats(n, dtype, 0.01).add_(base)
            plane = bench.bits(-(-n // 8))
            blocks = -(-n // BLOCK)
            sums = TallSums.empty(blocks, bench.device)
            encode_tall(base, vector, tuned, plane, tall_lambda=0.4, sums=sums)
            for some in ends(n):
                wanted = torch.empty(-(-(some.stop - some.start) // 8), dtype=torch.uint8)
                encode_tall(
                    *(t[some].cpu() for t in (base, vector, tuned)),
                    wanted,
                    tall_lambda=0.4,
                    backend="reference",
                )
                part = plane[some.start // 8 : (some.stop + 7) // 8]
                bench.require(same(part.cpu(), wanted), "encode_tall")
            out = torch.empty_like(base)
            masks = partial(encode_tall, base, vector, tuned, plane, tall_lambda=0.4)
            bench.compare(
                "encode_tall",
                {
                    "copy": partial(out.copy_, base),
                    "masks": masks,
                    "masks + sums": partial(masks, sums=sums),
                },
                3 * n * dtype.itemsize + plane.numel(),
                copied=2 * n * dtype.itemsize,
                weights=n,
                dtype=short(dtype),
            )
            for count in (1, 2, 4) if n <= 1 << 28 else ():
                table = bench.floats(1 << count, torch.float32, 0.01).view(1, -1)
                planes = bench.bits(count, -(-n // 8))
                codes = partial(encode_levels, base, vector, tuned, table, planes)
                level_sums = LevelSums.empty(blocks, count, bench.device)
                codes(sums=level_sums)
                for some in ends(n):
                    part = planes[:, some.start // 8 : (some.stop + 7) // 8]
                    found = reference.codes(part, some.stop - some.start)
                    line = table[0].tolist()
                    near = reference.encode_levels(base[some], vector[some], tuned[some], line)
                    bench.require(torch.equal(found, near), "encode_levels")
                bench.compare(
                    "encode_levels",
                    {
                        "copy": partial(out.copy_, base),
                        "codes": codes,
                        "codes + sums": partial(codes, sums=level_sums),
                    },
                    3 * n * dtype.itemsize + planes.numel(),
                    copied=2 * n * dtype.itemsize,
                    weights=n,
                    dtype=short(dtype),
                    planes=count,
                    repeats=7,
                )


def sparse(bench: Bench) -> None:
    """A switch between two sparse codes against a dense reconstruction, density by density."""
    from tallstore.ops import apply_sparse, compress_planes, reconstruct, switch_sparse

    for dtype in (torch.bfloat16, torch.float32):
        for n in bench.sizes(30):
            base, vector = bench.floats(n, dtype), bench.floats(n, dtype, 0.01)
            out, dense, mask = base.clone(), base.clone(), bench.bits(1, -(-n // 8))
            levels = torch.tensor([[0.0, 1.0]], device=bench.device)
            table = torch.tensor([[-0.0, 0.01, -0.01, 0.0]], device=bench.device)
            for density in (0.001, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1):
                codes = [
                    compress_planes(draw_sparse(bench, n, density), n, table) for _ in range(2)
                ]
                apply_sparse(codes[0], base, out)
                tasks = itertools.cycle([(codes[0], codes[1]), (codes[1], codes[0])])

                def ours(tasks: Any = tasks, base: Any = base, out: Any = out) -> None:
                    switch_sparse(*next(tasks), base, out, dense_from=2.0)

                runs: dict[str, Callable[[], object]] = {
                    "dense": partial(reconstruct, base, mask, vector, levels, dense),
                    "switch": ours,
                    # What `switch_sparse` does instead where codes touch many weights.
                    "pass": partial(switch_sparse, *codes, base, dense, dense_from=0.0),
                }
                times = bench.clock.by_turns(runs, repeats=11)
                dense.copy_(base)
                apply_sparse(next(tasks)[0], base, dense)
                bench.require(same(out, dense), "a switch")
                ratio = times["switch"].p50 / times["dense"].p50
                bench.rows.append(
                    {
                        "what": "sparse switch",
                        "weights": n,
                        "dtype": short(dtype),
                        "density": density,
                        **times["switch"].to_json(),
                        "of_dense_time": ratio,
                        "dense_p50_ms": times["dense"].p50,
                        "pass_p50_ms": times["pass"].p50,
                    }
                )
                out.copy_(base)
                if not bench.clock.trying:
                    print(
                        f"sparse switch  {short(dtype)} {n} weights, density {density:.1%}: "
                        f"{times['switch'].p50:.3f} ms, {ratio:.2f} of the dense time; "
                        f"a pass {times['pass'].p50:.3f} ms",
                        flush=True,
                    )


def model(bench: Bench) -> None:
    """One task of a 7B model in bfloat16: the whole arena in one launch."""
    from tallstore.kernels import reference
    from tallstore.ops import TALL_LEVELS, reconstruct

    n = bench.size(_MODEL_7B)
    base, vector = (bench.floats(n, torch.bfloat16, s) for s in (1.0, 0.01))
    out, planes = torch.empty_like(base), bench.bits(1, -(-n // 8))
    table = torch.tensor([TALL_LEVELS], device=bench.device)
    reconstruct(base, planes, vector, table, out)
    for some in ends(n):
        part = planes[:, some.start // 8 : (some.stop + 7) // 8]
        wanted = reference.reconstruct(base[some], part, vector[some], TALL_LEVELS, out.dtype)
        bench.require(same(out[some], wanted), "7B switch")
    bench.compare(
        "7B switch",
        {
            "copy": lambda: out.copy_(base),
            "tallstore": lambda: reconstruct(base, planes, vector, table, out),
        },
        6 * n + planes.numel(),
        copied=4 * n,
        weights=n,
        dtype="bfloat16",
        planes=1,
    )


def counting(bench: Bench) -> None:
    """Unpacking, and counts over eight tasks' masks."""
    from tallstore.kernels import reference
    from tallstore.ops import count_uses, mask_overlaps, unpack

    for n in bench.sizes(30):
        masks = bench.bits(8, -(-n // 8))
        out = torch.empty(n, dtype=torch.uint8, device=bench.device)
        other = torch.empty_like(out)
        for some in ends(n):
            part = masks[:, some.start // 8 : (some.stop + 7) // 8]
            size = some.stop - some.start
            unpack(masks[:1], out.view(torch.bool))
            bench.require(torch.equal(out[some].long(), reference.codes(part[:1], size)), "unpack")
            count_uses(masks, out)
            bench.require(same(out[some], reference.count_uses(part, stop=size)), "count_uses")
            both = mask_overlaps(part, stop=size)
            bench.require(torch.equal(both, reference.overlaps(part, stop=size)), "mask_overlaps")
        for what, run, moved in (
            ("unpack", partial(unpack, masks[:1], out.view(torch.bool)), n + n // 8),
            ("count_uses", partial(count_uses, masks, out), n + n),
            ("mask_overlaps", partial(mask_overlaps, masks), n),
        ):
            bench.compare(
                what,
                {"copy": partial(other.copy_, out), "tallstore": run},
                moved,
                copied=2 * n,
                weights=n,
                repeats=11,
            )


PARTS = {
    "model": model,
    "reconstruction": reconstruction,
    "encoding": encoding,
    "sparse": sparse,
    "counting": counting,
    "shapes": shapes,
}


def main() -> None:
    """Measure, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--results", type=Path, help="where the rows go, not bench/results")
    parser.add_argument("--try", dest="trying", action="store_true", help="tiny, nothing written")
    args = parser.parse_args()
    bench = Bench(Clock(trying=args.trying))
    failed = bench.failed
    for name in args.parts or PARTS:
        try:
            PARTS[name](bench)
        except Exception as exc:
            if args.trying:
                raise
            # The other parts are still worth having: such a machine is not at hand every day.
            traceback.print_exception(exc)
            failed.append(name)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        if not args.trying:
            # After each part: a limit on the time takes nothing that was measured.
            rows = [{"gpu": bench.clock.name(), **row} for row in bench.rows]
            print(write("gpu_kernels", rows, results=args.results), flush=True)
    if args.trying:
        print(f"{len(bench.rows)} rows; tried only, nothing written")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
