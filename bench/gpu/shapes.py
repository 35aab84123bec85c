"""How the work of each kernel is best cut: its launcher's default should be at the top."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from bench.gpu.measuring import Bench, short

__all__ = ["draw_sparse", "shapes"]

#: Blocks a program, warps a program.
_TILES = ((1, 2), (1, 4), (1, 8), (2, 4), (2, 8), (4, 4), (4, 8))
_FEW = ((1, 2), (1, 4), (2, 2), (2, 4), (4, 4), (4, 8))
#: Groups a program, entries at once, warps a program.
_CUTS = (
    (1, 64, 1), (1, 64, 2), (1, 128, 1), (1, 128, 2), (1, 128, 4), (2, 128, 2), (2, 256, 2),
    (2, 256, 4), (4, 256, 4),
)  # fmt: skip


def shapes(bench: Bench) -> None:
    """Reconstruction, encoders, a sparse switch, counts, unpacking and the residual."""
    for dtype in (torch.bfloat16, torch.float32):
        for n in bench.sizes(30):
            _switching(bench, n, dtype)
            _encoding(bench, n, dtype)
    for n in bench.sizes(30):
        _planes(bench, n)
    for dtype in (torch.bfloat16, torch.float32):
        for n in bench.sizes(30):
            _reconstruction(bench, n, dtype)
            _residual(bench, n, dtype)


def _compare(
    bench: Bench, kernel: str, runs: dict[str, Callable[[], object]], moved: int, **more: Any
) -> None:
    """A copy of 4 GiB beside each cut."""
    size = 1 << 16 if bench.clock.trying else 1 << 31
    source, target = bench.bits(size), bench.bits(size)
    runs = {"copy": partial(target.copy_, source), **runs}
    bench.compare("shape", runs, moved, copied=2 * size, kernel=kernel, **more, repeats=7)


def _shaped(run: Callable[..., object], tiles: Iterable[tuple[int, int]]) -> dict[str, Any]:
    from tallstore.kernels.common import Shape

    return {
        f"{blocks}x{warps}": partial(run, shape=Shape(blocks=blocks, warps=warps))
        for blocks, warps in tiles
    }


def _reconstruction(bench: Bench, n: int, dtype: torch.dtype) -> None:
    from tallstore.kernels.reconstruct import reconstruct

    base, vector = bench.floats(n, dtype), bench.floats(n, dtype, 0.01)
    out = torch.empty_like(base)
    for count in (1, 4):
        planes = bench.bits(count, -(-n // 8))
        table = bench.floats(1 << count, torch.float32).view(1, -1)
        run = partial(reconstruct, base, planes, vector, table, out)
        moved = 3 * base.nbytes + planes.numel()
        _compare(
            bench, "reconstruct", _shaped(run, _TILES), moved, dtype=short(dtype), planes=count
        )


def _encoding(bench: Bench, n: int, dtype: torch.dtype) -> None:
    from tallstore.kernels.encode_levels import encode_levels
    from tallstore.kernels.encode_tall import encode_tall
    from tallstore.kernels.sums import LevelSums, TallSums

    base, vector = bench.floats(n, dtype), bench.floats(n, dtype, 0.01)
    tuned = bench.floats(n, dtype, 0.01).add_(base)
    plane, blocks = bench.bits(-(-n // 8)), -(-n // 1024)
    for sums in (None, TallSums.empty(blocks, bench.device)):
        tall = partial(encode_tall, base, vector, tuned, plane, tall_lambda=0.4, sums=sums)
        runs = {f"1x{warps}": partial(tall, warps=warps) for warps in (1, 2, 4)}
        moved = 3 * base.nbytes + plane.nbytes
        _compare(bench, "encode_tall", runs, moved, dtype=short(dtype), sums=sums is not None)
    for count, warps in ((1, (1, 2, 4)), (2, (1, 2, 4)), (4, (2, 4))):
        table = bench.floats(1 << count, torch.float32, 0.01).view(1, -1)
        planes = bench.bits(count, -(-n // 8))
        for level_sums in (None, LevelSums.empty(blocks, count, bench.device)):
            levels = partial(encode_levels, base, vector, tuned, table, planes, sums=level_sums)
            _compare(
                bench,
                "encode_levels",
                {f"1x{w}": partial(levels, warps=w) for w in warps},
                3 * base.nbytes + planes.nbytes,
                dtype=short(dtype),
                planes=count,
                sums=level_sums is not None,
            )


def _switching(bench: Bench, n: int, dtype: torch.dtype) -> None:
    """Between two codes of 2 % each; bytes are those of the weights and entries, not of sectors."""
    from tallstore.kernels.entries import Cut
    from tallstore.kernels.sectors import switch
    from tallstore.ops import compress_planes

    base = bench.floats(n, dtype)
    out = base.clone()
    table = torch.tensor([[-0.0, 0.01, -0.01, 0.0]], device=bench.device)
    old, new = (compress_planes(draw_sparse(bench, n, 0.02), n, table) for _ in range(2))
    runs: dict[str, Callable[[], object]] = {}
    for groups, chunk, warps in _CUTS:
        shape = Cut(groups=groups, chunk=chunk, warps=warps)
        runs[f"{groups}x{chunk}x{warps}"] = partial(switch, old, new, base, out, shape=shape)
    entries = old.entries.numel() + new.entries.numel()
    _compare(bench, "switch", runs, entries * (2 + 2 * dtype.itemsize), dtype=short(dtype))


def _residual(bench: Bench, n: int, dtype: torch.dtype) -> None:
    from tallstore.kernels.residual import add_residual

    base = bench.floats(n, dtype)
    zigzag = bench.bits(base.nbytes).view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    run = partial(add_residual, base, zigzag, torch.empty_like(base))
    _compare(bench, "residual", _shaped(run, _FEW), 3 * base.nbytes, dtype=short(dtype))


def _planes(bench: Bench, n: int) -> None:
    from tallstore.kernels.count import at_least, count_uses, use_histogram
    from tallstore.kernels.overlaps import overlaps
    from tallstore.kernels.unpack import unpack

    masks, out = bench.bits(8, -(-n // 8)), bench.bits(n)
    once = masks[:1].nbytes
    of_tasks = torch.empty((8, 8), dtype=torch.int64, device=bench.device)
    _compare(bench, "unpack", _shaped(partial(unpack, masks[:1], out), _FEW), n + once)
    _compare(bench, "count_uses", _shaped(partial(count_uses, masks, out), _FEW), n + masks.nbytes)
    uses = torch.empty(9, dtype=torch.int64, device=bench.device)
    for kernel, run, moved in (
        ("at_least", partial(at_least, masks, 2, out[:once], stop=n), masks.nbytes + once),
        ("histogram", partial(use_histogram, masks, uses, stop=n), masks.nbytes),
        ("overlaps", partial(overlaps, masks, of_tasks, stop=n), masks.nbytes),
    ):
        _compare(bench, kernel, _shaped(run, ((1, 4), (4, 4), (8, 4), (16, 4), (32, 8))), moved)


def draw_sparse(bench: Bench, n: int, density: float) -> torch.Tensor:
    """Two planes, "+" and "-", of random weights; made piece by piece."""
    planes = torch.zeros(2, -(-n // 8), dtype=torch.uint8, device=bench.device)
    weights = 1 << torch.arange(8, device=bench.device)
    step = 1 << 24
    for start in range(0, n, step):
        size = min(step, n - start)
        draw = torch.rand(-(-size // 8), 8, device=bench.device)
        draw.view(-1)[size:] = 1.0
        for k, bits in enumerate((draw < density / 2, (draw >= density / 2) & (draw < density))):
            part = (bits * weights).sum(1).to(torch.uint8)
            planes[k, start // 8 : start // 8 + part.numel()] = part
    return planes
