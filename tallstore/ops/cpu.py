"""Reconstruction on the CPU, in pieces that stay in the cache and without whole-model temporaries.

The arithmetic is float32: ``t = level * v``, then ``base + t``, each rounded, then one rounding to
the output dtype (design: numerics). `tallstore.kernels.reference` is the plain form; this one is
tested to give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from tallstore.scratch import Scratch

__all__ = ["reconstruct"]

#: Weights a step: few enough for a core's own cache.
_STEP: Final = 1 << 16

_INDEX: Final = np.dtype(np.intp)


def _byte_rows(rows: npt.NDArray[Any]) -> npt.NDArray[np.void]:
    """256 rows as single items, which `numpy.take` moves in one piece."""
    whole = np.dtype((np.void, rows.nbytes // 256))
    packed: npt.NDArray[np.void] = np.ascontiguousarray(rows).view(whole)
    return packed.ravel()


def _bits_of_bytes() -> npt.NDArray[np.uint8]:
    return np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")


def _mask_rows(dtype: torch.dtype) -> npt.NDArray[np.void]:
    """For each byte of a plane, eight zeros and ones of a floating dtype."""
    bits = torch.from_numpy(_bits_of_bytes()).to(dtype)
    return _byte_rows(bits.view(torch.uint8).numpy())


_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)
_MASKS: Final = {dtype: _mask_rows(dtype) for dtype in _FLOATS}


def reconstruct(
    base: torch.Tensor,
    planes: torch.Tensor,
    vector: torch.Tensor | None,
    levels: Sequence[float],
    out: torch.Tensor,
    scratch: Scratch,
) -> None:
    """See `tallstore.ops.reconstruct`, with one row of levels and some weights.

    Nothing is checked here, and no thread is started.
    """
    packed = planes.numpy()
    if vector is not None and _is_tall(levels):
        _masked(base, packed[0], vector, out, scratch)
    else:
        _levels(base, packed, vector, levels, out, scratch)


def _is_tall(levels: Sequence[float]) -> bool:
    return tuple(levels) == (0.0, 1.0) and math.copysign(1.0, levels[0]) > 0


def _steps(count: int) -> Iterator[slice]:
    for start in range(0, count, _STEP):
        yield slice(start, min(start + _STEP, count))


def _expand(
    plane: npt.NDArray[np.uint8],
    rows: npt.NDArray[np.void],
    into: npt.NDArray[np.uint8],
    scratch: Scratch,
) -> None:
    """Write the row of each byte of a plane, one after the other."""
    # numpy would make the same wide index of the bytes, in fresh memory each time.
    index = scratch.take("reconstruct: index", plane.size * _INDEX.itemsize).view(_INDEX)
    np.copyto(index, plane)
    # "clip" never clips here; it spares a copy that "raise" makes of the output.
    found = into[: plane.size * rows.itemsize].view(rows.dtype)
    np.take(rows, index, out=found, mode="clip")


def _masked(
    base: torch.Tensor,
    plane: npt.NDArray[np.uint8],
    vector: torch.Tensor,
    out: torch.Tensor,
    scratch: Scratch,
) -> None:
    """Levels (0, 1), in one pass: fused or not, since a product by 0 or 1 is exact."""
    alike = base.dtype == vector.dtype == out.dtype
    dtype = out.dtype if alike else torch.float32
    rows, size = _MASKS[dtype], _padded(base.numel())
    buffer = scratch.take("reconstruct: rows", size * dtype.itemsize)
    mask = _as_floats(buffer, dtype)
    widened = {
        name: _as_floats(scratch.take(f"reconstruct: {name}", 4 * size), torch.float32)
        for name, tensor in (("base", base), ("vector", vector), ("out", out))
        if tensor.dtype != dtype
    }
    for at in _steps(base.numel()):
        count = at.stop - at.start
        _expand(plane[at.start // 8 : (at.stop + 7) // 8], rows, buffer, scratch)
        one = widened["base"][:count].copy_(base[at]) if "base" in widened else base[at]
        two = widened["vector"][:count].copy_(vector[at]) if "vector" in widened else vector[at]
        into = widened["out"][:count] if "out" in widened else out[at]
        torch.addcmul(one, two, mask[:count], out=into)
        if "out" in widened:
            out[at].copy_(into)


def _levels(
    base: torch.Tensor,
    planes: npt.NDArray[np.uint8],
    vector: torch.Tensor | None,
    levels: Sequence[float],
    out: torch.Tensor,
    scratch: Scratch,
) -> None:
    """Any levels: their products, then the sum."""
    rows = _level_rows(planes.shape[0], levels)
    buffer = scratch.take("reconstruct: rows", _padded(base.numel()) * 4)
    step = _as_floats(buffer, torch.float32)
    numbers = step.numpy()
    single = vector is not None and vector.dtype == torch.float32
    factors = vector.numpy() if vector is not None and single else None
    add = _adder(base, step, out, scratch)
    # numpy's operations stay on this thread, whatever torch's thread count, and start sooner.
    with np.errstate(over="ignore", invalid="ignore"):
        for at in _steps(base.numel()):
            count = at.stop - at.start
            some = planes[:, at.start // 8 : (at.stop + 7) // 8]
            fields = some[0] if some.shape[0] == 1 else _fields(some, scratch)
            _expand(fields, rows, buffer, scratch)
            if factors is not None:
                np.multiply(numbers[:count], factors[at], out=numbers[:count])
            elif vector is not None:
                step[:count].mul_(vector[at])
            add(at, count)


#: Weights whose codes share a byte, by the number of planes.
_TOGETHER: Final = {1: 8, 2: 4, 3: 2, 4: 2}


def _level_rows(planes: int, levels: Sequence[float]) -> npt.NDArray[np.void]:
    """For each byte of `_fields`, the levels of its weights."""
    together = _TOGETHER[planes]
    bits = _bits_of_bytes()[:, : planes * together].reshape(256, planes, together)
    codes = (bits << np.arange(planes, dtype=np.uint8)[:, None]).sum(axis=1)
    return _byte_rows(np.asarray(levels, np.float32)[codes])


def _fields(planes: npt.NDArray[np.uint8], scratch: Scratch) -> npt.NDArray[np.uint8]:
    """Bytes that hold the codes of some weights each: their bits in the first plane, the next, ..

    Four weights of 2 planes, or two of 3 or 4, the first weight's bit the lowest.
    """
    count, size = planes.shape
    together = _TOGETHER[count]
    # A byte of a plane becomes a little-endian word of as many bytes as it has fields.
    word: Any = np.dtype("<u2") if together == 4 else np.dtype("<u4")
    buffers = scratch.take("reconstruct: fields", 3 * size * word.itemsize).view(word)
    joined, wide, spare = buffers.reshape(3, -1)
    mask = word.type(0x0F0F if together == 4 else 0x03030303)
    for k, plane in enumerate(planes):
        np.copyto(wide, plane)
        for shift in (4,) if together == 4 else (12, 6):
            np.left_shift(wide, shift, out=spare)
            np.bitwise_or(wide, spare, out=wide)
        np.bitwise_and(wide, mask, out=wide)
        if k == 0:
            joined, wide = wide, joined
        else:
            np.left_shift(wide, together * k, out=wide)
            np.bitwise_or(joined, wide, out=joined)
    fields: npt.NDArray[np.uint8] = joined.view(np.uint8)
    return fields


def _padded(count: int) -> int:
    """Weights of a step's scratch: whole bytes of a plane."""
    return -(-min(count, _STEP) // 8) * 8


def _as_floats(buffer: npt.NDArray[np.uint8], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(buffer).view(dtype)


def _adder(
    base: torch.Tensor, step: torch.Tensor, out: torch.Tensor, scratch: Scratch
) -> Callable[[slice, int], None]:
    """What writes ``base[at] + step[:count]`` to ``out[at]``, computed in float32, rounded once."""
    single = torch.float32
    two = step.numpy()
    # torch's add of two dtypes would widen one in memory that is new each time.
    sums = two if out.dtype != single else out.numpy()
    wide = None
    if base.dtype != single:
        wide = _as_floats(scratch.take("reconstruct: base", two.nbytes), single)
    one = base.numpy() if wide is None else wide.numpy()

    def add(at: slice, count: int) -> None:
        here = at if wide is None else slice(0, count)
        if wide is not None:
            wide[:count].copy_(base[at])
        into = sums[at] if out.dtype == single else sums[:count]
        np.add(one[here], two[:count], out=into)
        if out.dtype != single:
            out[at].copy_(step[:count])

    return add
