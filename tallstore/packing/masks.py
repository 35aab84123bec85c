"""TALL masks of the consecutive weights of an arena, on the CPU or on a device: the same bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from tallstore.codecs import Bytes
from tallstore.coding import CodeStats, encode_tall, to_float32
from tallstore.devices import Desk, on_device
from tallstore.dtypes import itemsize, torch_dtype
from tallstore.layout import BLOCK
from tallstore.mergestream.feed import block_weights, blocks
from tallstore.ops import TallSums, choose_backend, reduce_sums
from tallstore.ops import encode_tall as encode_tall_on
from tallstore.packing.gathering import Candidate, Held

__all__ = ["SpanMasks", "masks_on", "same_bytes", "tall_span"]

#: Makes the masks of a span; called as `tall_span` is.
SpanMasks = Callable[
    [Candidate, int, int, Bytes, Bytes, str, float],
    tuple[Bytes, list[tuple[int, CodeStats]], Bytes],
]


def masks_on(device: torch.device, *, backend: str | None = None) -> SpanMasks:
    """What makes masks on a device.

    Raises
    ------
    DeviceError
        The backend cannot run there.
    """
    if device.type == "cpu" and backend is None:
        return tall_span
    return _DeviceMasks(device, choose_backend(device, backend)).span


def tall_span(
    candidate: Candidate,
    arena: int,
    place: int,
    base: Bytes,
    vector: Bytes,
    vector_dtype: str,
    tall_lambda: float,
) -> tuple[Bytes, list[tuple[int, CodeStats]], Bytes]:
    """The masks of consecutive weights of an arena, on the CPU.

    Parameters
    ----------
    place
        First weight, in the arena.
    base, vector
        Their bytes.

    Returns
    -------
    planes
        Packed bits.
    stats
        For each of the base's segments touched.
    raw
        The checkpoint's own bytes.
    """
    base_dtype = candidate.layout.arenas[arena].dtype
    dtype = candidate.plan.dtypes[arena]
    width, vector_width, own_width = (itemsize(d) for d in (base_dtype, vector_dtype, dtype))
    count = base.size // width
    planes = np.zeros((count + 7) // 8, np.uint8)
    raws, stats = [], []
    for start, stop in blocks(count, block_weights(1)):
        base_piece = base[start * width : stop * width]
        base32 = to_float32(base_piece, base_dtype)
        vector32 = to_float32(vector[start * vector_width : stop * vector_width], vector_dtype)
        raw, held = candidate.gather(arena, place + start, base_piece)
        own32 = to_float32(raw, dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            merged = base32 + vector32
            for item in held:
                low, high = item.start, item.stop
                packed, sums = encode_tall(
                    base32[low:high], merged[low:high], own32[low:high], tall_lambda=tall_lambda
                )
                sums.same = dtype == base_dtype and same_bytes(raw, base_piece, item, own_width)
                first = (start + low) // 8
                planes[first : first + packed.size] = packed
                stats.append((item.base_segment, sums))
        raws.append(raw)
    return planes, stats, raws[0] if len(raws) == 1 else np.concatenate(raws)


def same_bytes(raw: Bytes, base: Bytes, item: Held, width: int) -> bool:
    """Whether the weights that a checkpoint holds are the base's, bit for bit."""
    low, high = item.start * width, item.stop * width
    return bool(np.array_equal(raw[low:high], base[low:high]))


class _DeviceMasks:
    """Masks made on a device, each thread on a queue of its own."""

    def __init__(self, device: torch.device, backend: str) -> None:
        self._device = device
        self._backend = backend
        self._desk = Desk(device)

    def span(
        self,
        candidate: Candidate,
        arena: int,
        place: int,
        base: Bytes,
        vector: Bytes,
        vector_dtype: str,
        tall_lambda: float,
    ) -> tuple[Bytes, list[tuple[int, CodeStats]], Bytes]:
        """See `tall_span`."""
        base_dtype = candidate.layout.arenas[arena].dtype
        dtype = candidate.plan.dtypes[arena]
        raw, held = candidate.gather(arena, place, base)
        data = {"base": (base, base_dtype), "vector": (vector, vector_dtype), "own": (raw, dtype)}
        with on_device(self._device, f"encoding task {candidate.name!r}"):
            planes, sums = self._encode(data, held, tall_lambda)
        if bool((sums.finite & ~torch.isfinite(sums.moved + sums.error)).any()):
            # Finite weights so far apart that their squares are none in float32, but in float64.
            return tall_span(candidate, arena, place, base, vector, vector_dtype, tall_lambda)
        stats = [(item.base_segment, _stats(item, sums, row)) for row, item in enumerate(held)]
        return planes, stats, raw

    def _encode(
        self, data: Mapping[str, tuple[Bytes, str]], held: Sequence[Held], tall_lambda: float
    ) -> tuple[Bytes, TallSums]:
        with self._desk.working():
            weights = {
                name: self._desk.upload(name, given, torch_dtype(dtype))
                for name, (given, dtype) in data.items()
            }
            count = weights["base"].numel()
            plane = self._desk.room("plane", (count + 7) // 8).zero_()
            sums = TallSums.empty(-(-count // BLOCK), self._device)
            for item in held:
                encode_tall_on(
                    weights["base"],
                    weights["vector"],
                    weights["own"],
                    plane,
                    tall_lambda=tall_lambda,
                    sums=sums,
                    start=item.start,
                    stop=item.stop,
                    backend=self._backend,
                )
            # Waits for the queue, so that what was uploaded from may be used again.
            packed: Bytes = plane.cpu().numpy().copy()
            ranges = [(item.start // BLOCK, -(-item.stop // BLOCK)) for item in held]
            return packed, reduce_sums(sums.to("cpu"), ranges)


def _stats(item: Held, sums: TallSums, row: int) -> CodeStats:
    return CodeStats(
        item.stop - item.start,
        int(sums.ones[row]),
        float(sums.moved[row]),
        float(sums.error[row]),
        same=bool(sums.same[row]),
        finite=bool(sums.finite[row]),
    )
