"""base + levels[code] * vector, wherever the tensors are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tallstore.codes import TALL_LEVELS
from tallstore.errors import MismatchError
from tallstore.layout import BLOCK
from tallstore.ops import compiled, cpu, programs
from tallstore.ops.backend import choose_backend, same_device
from tallstore.ops.checks import check_planes, check_rows, check_table, check_weights
from tallstore.scratch import Scratch

__all__ = ["TALL_LEVELS", "reconstruct"]


def reconstruct(
    base: torch.Tensor,
    planes: torch.Tensor | None,
    vector: torch.Tensor | None,
    levels: Sequence[float] | torch.Tensor,
    out: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    backend: str | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Fill `out` with base + levels[code] * vector.

    float32: the product and the sum are each rounded, then one rounding to the dtype of `out`
    (design: numerics). The bits are the same whatever the backend. On the CPU it runs on the
    calling thread; on CUDA in one launch, on the current stream.

    Parameters
    ----------
    base
        Shape (n,), float32, bfloat16 or float16.
    planes
        uint8, shape (K, at least ceil(n / 8)), LSB-first, K = 1..4; None: K = 0, `out` becomes
        the base.
    vector
        Shape (n,), float32, bfloat16 or float16; None stands for 1.
    levels
        2**K coefficients; or, float32, shape (R, 2**K), a row of them for each of R tensors.
    out
        Shape (n,), any of the three dtypes; may be `base` itself.
    rows
        int32, shape (at least ceil(n / 1024),): the row of `levels` that each block of 1024
        weights takes. None: row 0.
    backend
        See `choose_backend`.
    scratch
        Buffers to use again on the CPU; worth giving where this is called often.

    Raises
    ------
    MismatchError
        Shapes, dtypes or devices clash; nothing was written.
    DeviceError
        The backend cannot run there.
    """
    device = same_device(base=base, planes=planes, vector=vector, rows=rows, out=out)
    count = check_planes(planes, base.numel())
    check_weights(base.numel(), base=base, vector=vector, out=out)
    table = _table(levels, 1 << count)
    check_rows(rows, table.shape[0], base.numel())
    chosen = choose_backend(device, backend, compiles=True)
    if chosen == "triton":
        from tallstore.kernels.reconstruct import reconstruct as launch

        # Copying levels over waits for the device: not where none is used.
        launch(base, planes, vector, table.to(device) if count else None, out, rows=rows)
        return
    if planes is None or not base.numel():
        out.copy_(base)
        return
    compiles = chosen == "compiled" and compiled.takes(base, vector, out)
    held = Scratch() if scratch is None else scratch
    for some, row in _runs(rows, base.numel()):
        part = planes[:, some.start // 8 : (some.stop + 7) // 8]
        step = None if vector is None else vector[some]
        if compiles:
            programs.reconstruct(base[some], part, step, table[row : row + 1], out[some])
            continue
        line = table[row].tolist()
        if chosen == "reference":
            from tallstore.kernels import reference

            out[some].copy_(reference.reconstruct(base[some], part, step, line, out.dtype))
        else:
            cpu.reconstruct(base[some], part, step, line, out[some], held)


def _table(levels: Sequence[float] | torch.Tensor, width: int) -> torch.Tensor:
    if isinstance(levels, torch.Tensor):
        check_table(levels, width)
        return levels
    if len(levels) != width:
        raise MismatchError(f"{len(levels)} levels for codes of {width} values")
    return torch.tensor([tuple(levels)], dtype=torch.float32, device="cpu")


def _runs(rows: torch.Tensor | None, weights: int) -> Iterator[tuple[slice, int]]:
    """Runs of weights that share a row of levels."""
    if rows is None:
        yield slice(0, weights), 0
        return
    blocks = rows[: -(-weights // BLOCK)]
    values, lengths = torch.unique_consecutive(blocks, return_counts=True)
    start = 0
    for row, length in zip(values.tolist(), lengths.tolist(), strict=True):
        stop = min(start + length * BLOCK, weights)
        yield slice(start, stop), row
        start = stop
