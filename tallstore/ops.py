"""Reconstruction on the CPU, in pieces that stay in the cache and without whole-model temporaries.

The arithmetic is float32: ``t = level * v``, then ``base + t``, each rounded, then one rounding to
the output dtype (design: numerics). `tallstore.kernels.reference` is the plain form; this one is
tested to give the same bits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from tallstore.errors import MismatchError
from tallstore.scratch import Scratch

__all__ = ["TALL_LEVELS", "Workers", "reconstruct", "workers"]

#: Levels of a TALL mask: a weight takes the shared vector or leaves it.
TALL_LEVELS: Final = (0.0, 1.0)

#: Weights a step: its scratch fills half of a second-level cache.
_STEP: Final = 1 << 18

_WORD: Final = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.uint16}
_T = TypeVar("_T")
_R = TypeVar("_R")


def _byte_rows(rows: npt.NDArray[Any]) -> npt.NDArray[np.void]:
    """256 rows of 8 as single items, which `numpy.take` moves in one piece."""
    packed: npt.NDArray[np.void] = np.ascontiguousarray(rows).view(
        np.dtype((np.void, 8 * rows.dtype.itemsize))
    )
    return packed.ravel()


def _bits_of_bytes() -> npt.NDArray[np.uint8]:
    return np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")


def _keep_rows(word: type[np.unsignedinteger[Any]]) -> npt.NDArray[np.void]:
    """For each byte of a plane, eight masks: 1 * v keeps v, 0 * v keeps the sign of v alone."""
    every = np.iinfo(word).max
    return _byte_rows(np.where(_bits_of_bytes(), word(every), word(every // 2 + 1)))


_KEEP: Final = {word: _keep_rows(word) for word in (np.uint32, np.uint16)}


def _words(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A float tensor's bit patterns, without a copy."""
    word = _WORD[tensor.dtype]
    signed = torch.int32 if word is np.uint32 else torch.int16
    return tensor.view(signed).numpy().view(word)


def _check(
    base: torch.Tensor,
    planes: torch.Tensor | None,
    vector: torch.Tensor | None,
    levels: Sequence[float],
    out: torch.Tensor,
) -> None:
    for name, tensor in (("base", base), ("vector", vector), ("out", out)):
        if tensor is None:
            continue
        if tensor.dtype not in _WORD:
            raise MismatchError(f"{name}: dtype {tensor.dtype} has no reconstruction")
        if tensor.dim() != 1 or tensor.numel() != base.numel() or not tensor.is_contiguous():
            raise MismatchError(
                f"{name}: shape {tuple(tensor.shape)}, a contiguous ({base.numel()},) is needed"
            )
        if tensor.device.type != "cpu":
            raise MismatchError(f"{name}: on {tensor.device}; this path runs on the CPU")
    count = 0 if planes is None else planes.shape[0]
    if len(levels) != 1 << count:
        raise MismatchError(f"{len(levels)} levels for {count} planes; {1 << count} are needed")
    if planes is not None and planes.shape[1] * 8 < base.numel():
        raise MismatchError(f"planes of {planes.shape[1]} bytes for {base.numel()} weights")


def reconstruct(
    base: torch.Tensor,
    planes: torch.Tensor | None,
    vector: torch.Tensor | None,
    levels: Sequence[float],
    out: torch.Tensor,
    *,
    scratch: Scratch | None = None,
) -> None:
    """Fill `out` with base + levels[code] * vector, on the calling thread.

    Parameters
    ----------
    base
        Shape (n,), float32, bfloat16 or float16.
    planes
        uint8, shape (K, at least ceil(n / 8)), LSB-first; None: K = 0, `out` becomes the base.
    vector
        Shape (n,), float32, bfloat16 or float16; None stands for 1.
    levels
        2**K coefficients.
    out
        Shape (n,), any of the three dtypes; may be `base` itself.
    scratch
        Buffers to use again; worth giving where this is called often.

    Raises
    ------
    MismatchError
        Shapes, dtypes or devices clash; nothing was written.
    """
    _check(base, planes, vector, levels, out)
    if planes is None:
        out.copy_(base)
        return
    scratch = Scratch() if scratch is None else scratch
    plain = vector is not None and tuple(levels) == TALL_LEVELS
    rows = None if plain or planes.shape[0] != 1 else _level_rows(levels)
    for start in range(0, base.numel(), _STEP):
        stop = min(start + _STEP, base.numel())
        piece = planes[:, start // 8 : -(-stop // 8)].numpy()
        part = None if vector is None else vector[start:stop]
        if plain and part is not None:
            step = _masked(piece[0], part, scratch)
        else:
            step = _scaled(piece, part, levels, rows, stop - start, scratch)
        _add(base[start:stop], step, out[start:stop])


def _level_rows(levels: Sequence[float]) -> npt.NDArray[np.void]:
    low, high = np.asarray(levels, np.float32)
    return _byte_rows(np.where(_bits_of_bytes(), high, low))


def _expand(
    plane: npt.NDArray[np.uint8], rows: npt.NDArray[np.void], scratch: Scratch
) -> npt.NDArray[np.uint8]:
    """The row of each byte of a plane, one after the other."""
    found = scratch.take("rows", plane.size * rows.itemsize)
    # "clip" never clips here; it spares a copy that "raise" makes of the output.
    np.take(rows, plane, out=found.view(rows.dtype), mode="clip")
    return found


def _masked(plane: npt.NDArray[np.uint8], vector: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Levels (0, 1): the product by bit operations, in the vector's own dtype, sign of zero too."""
    words = _words(vector)
    kept = _expand(plane, _KEEP[words.dtype.type], scratch).view(words.dtype)[: words.size]
    np.bitwise_and(kept, words, out=kept)
    signed = np.int32 if words.itemsize == 4 else np.int16
    return torch.from_numpy(kept.view(signed)).view(vector.dtype)


def _scaled(
    planes: npt.NDArray[np.uint8],
    vector: torch.Tensor | None,
    levels: Sequence[float],
    rows: npt.NDArray[np.void] | None,
    count: int,
    scratch: Scratch,
) -> torch.Tensor:
    if rows is not None:
        found = _expand(planes[0], rows, scratch).view(np.float32)[:count]
    else:
        code = np.zeros(count, np.uint8)
        for k, plane in enumerate(planes):
            code |= np.unpackbits(plane, count=count, bitorder="little") << np.uint8(k)
        found = np.take(np.asarray(levels, np.float32), code)
    step = torch.from_numpy(found)
    return step if vector is None else step.mul_(vector)


def _add(base: torch.Tensor, step: torch.Tensor, out: torch.Tensor) -> None:
    if base.dtype == step.dtype == out.dtype == torch.float32:
        # numpy's add stays on this thread, whatever torch's thread count.
        np.add(base.numpy(), step.numpy(), out=out.numpy())
        return
    common = torch.promote_types(base.dtype, step.dtype)
    if common not in (torch.float32, out.dtype):
        # Both of one half-precision dtype, wanted in another: torch would round twice.
        base = base.float()
    torch.add(base, step, out=out)  # computes in float32, rounds once


class Workers:
    """A few threads that work on spans; see `workers`."""

    def __init__(self, pool: ThreadPoolExecutor, count: int) -> None:
        self._pool = pool
        self.count = count

    def each(self, work: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
        """``work(item)`` for each item, results in order, at most two a thread under way.

        The first failure is raised once the calls under way have ended.
        """
        pending: list[Future[_R]] = []
        try:
            for item in items:
                pending.append(self._pool.submit(work, item))
                if len(pending) > 2 * self.count:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def workers(count: int | None = None) -> Iterator[Workers]:
    """Threads for the length of a block, each with torch's own threads switched off.

    Parameters
    ----------
    count
        Threads; the cores that this process may use, at most 16, where it is None.
    """
    count = count or min(cores(), 16)
    threads = torch.get_num_threads()
    ready = threading.Barrier(count + 1)

    def prepare() -> None:
        torch.set_num_threads(1)
        ready.wait()

    with ThreadPoolExecutor(count, thread_name_prefix="tallstore") as pool:
        for _ in range(count):
            pool.submit(prepare)
        ready.wait()
        # The call in the workers also set the process-wide default: put that back.
        torch.set_num_threads(threads)
        yield Workers(pool, count)
