"""From weights to packed codes, wherever the tensors are, with sums that tell the fidelity."""

from __future__ import annotations

import torch

from tallstore.errors import MismatchError
from tallstore.kernels import reference
from tallstore.kernels.sums import LevelSums, TallSums, reduce_sums
from tallstore.layout import BLOCK
from tallstore.ops.backend import choose_backend, same_device
from tallstore.ops.checks import check_part, check_planes, check_rows, check_table, check_weights

__all__ = ["LevelSums", "TallSums", "encode_levels", "encode_tall", "reduce_sums"]


def encode_tall(
    base: torch.Tensor,
    vector: torch.Tensor,
    finetuned: torch.Tensor,
    plane: torch.Tensor,
    *,
    tall_lambda: float,
    sums: TallSums | None = None,
    start: int = 0,
    stop: int | None = None,
    backend: str | None = None,
) -> None:
    """Fill `plane` with the packed TALL mask of a task.

    ``|base - finetuned| > |(base + vector) - finetuned| * lambda``, float32, each step rounded, in
    this order (arXiv 2405.07813, equation 5). The bits are the same whatever the backend; of the
    sums, the floating ones are sums of float32 within a block.

    Parameters
    ----------
    base, vector, finetuned
        Shape (n,), each float32, bfloat16 or float16.
    plane
        uint8, shape (at least ceil(n / 8),), LSB-first; the bits past `stop` in its byte are 0.
    tall_lambda
        The threshold's factor, rounded to float32.
    sums
        Of ceil(n / 1024) blocks, filled for those between `start` and `stop`; `reduce_sums` makes
        those of tensors of them. None: not wanted.
    start, stop
        The weights to encode; `start` is a multiple of 1024.
    backend
        See `choose_backend`; the CPU has the reference alone.

    Raises
    ------
    MismatchError
        Shapes, dtypes or devices clash; nothing was written.
    DeviceError
        The backend cannot run there.
    """
    n = base.numel()
    stop = n if stop is None else stop
    device = same_device(
        base=base,
        vector=vector,
        finetuned=finetuned,
        plane=plane,
        sums=None if sums is None else sums.ones,
    )
    check_weights(n, base=base, vector=vector, finetuned=finetuned)
    check_planes(plane.unsqueeze(0), n)
    check_part(start, stop, n)
    _check_blocks(None if sums is None else sums.ones, n)
    if choose_backend(device, backend) == "triton":
        from tallstore.kernels.encode_tall import encode_tall as launch

        launch(
            base,
            vector,
            finetuned,
            plane,
            tall_lambda=tall_lambda,
            sums=sums,
            start=start,
            stop=stop,
        )
        return
    some = slice(start, stop)
    mask = reference.encode_tall(base[some], vector[some], finetuned[some], tall_lambda=tall_lambda)
    plane[start // 8 : (stop + 7) // 8] = reference.pack(mask)
    if sums is None:
        return
    for first in range(start, stop, BLOCK):
        at = slice(first, min(first + BLOCK, stop))
        found = reference.tall_sums(
            base[at], vector[at], finetuned[at], mask[at.start - start : at.stop - start]
        )
        _put(found, sums, first // BLOCK)


def encode_levels(
    base: torch.Tensor,
    vector: torch.Tensor | None,
    finetuned: torch.Tensor,
    levels: torch.Tensor,
    planes: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    sums: LevelSums | None = None,
    backend: str | None = None,
) -> None:
    """Fill `planes` with the code of the level nearest to each weight's task vector.

    The first c of those that minimize ``|t - levels[c] * vector|``, t = finetuned - base; float32,
    each step rounded. The bits are the same whatever the backend.

    Parameters
    ----------
    base, finetuned
        Shape (n,), each float32, bfloat16 or float16.
    vector
        The same; None stands for 1.
    levels
        float32, shape (R, 2**K).
    planes
        uint8, shape (K, at least ceil(n / 8)), K = 1..4, LSB-first; the bits past n in its last
        byte become 0.
    rows
        int32, shape (at least ceil(n / 1024),): the row of each block; None: row 0.
    sums
        Of ceil(n / 1024) blocks: what levels are fitted from, and their error. None: not wanted.
    backend
        See `choose_backend`; the CPU has the reference alone.

    Raises
    ------
    MismatchError, DeviceError
        As `encode_tall` does.
    """
    n = base.numel()
    device = same_device(
        base=base,
        vector=vector,
        finetuned=finetuned,
        levels=levels,
        planes=planes,
        rows=rows,
        sums=None if sums is None else sums.moved,
    )
    check_weights(n, base=base, vector=vector, finetuned=finetuned)
    count = check_planes(planes, n)
    check_table(levels, 1 << count)
    check_rows(rows, levels.shape[0], n)
    _check_blocks(None if sums is None else sums.moved, n)
    if choose_backend(device, backend) == "triton":
        from tallstore.kernels.encode_levels import encode_levels as launch

        launch(base, vector, finetuned, levels, planes, rows=rows, sums=sums)
        return
    for block, first in enumerate(range(0, n, BLOCK)):
        at = slice(first, min(first + BLOCK, n))
        row = levels[0 if rows is None else int(rows[block])].tolist()
        step = None if vector is None else vector[at]
        code = reference.encode_levels(base[at], step, finetuned[at], row)
        for k in range(count):
            bits = reference.pack((code >> k & 1).bool())
            planes[k, first // 8 : first // 8 + bits.numel()] = bits
        if sums is not None:
            _put(reference.level_sums(base[at], step, finetuned[at], row, code), sums, block)


def _put(found: TallSums | LevelSums, sums: TallSums | LevelSums, block: int) -> None:
    for name in sums.__slots__:
        getattr(sums, name)[block] = getattr(found, name)[0]


def _check_blocks(of_blocks: torch.Tensor | None, weights: int) -> None:
    blocks = -(-weights // BLOCK)
    if of_blocks is not None and of_blocks.shape[0] < blocks:
        raise MismatchError(f"sums of {of_blocks.shape[0]} blocks for {blocks}")
