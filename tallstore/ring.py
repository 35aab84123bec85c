"""The stream from chunks to a device: a bounded ring of pinned buffers, three things at once.

Threads read, check and decode chunks into pinned memory; one queue of the device copies them over;
another reconstructs. Each buffer is used again, so the room taken depends on chunks and threads,
never on the model:

- on the host, ``2 * threads + 2`` slots, each with the chunks of one span: at most the base, the
  shared vector, the planes and the residual of 2**20 weights;
- on the device, `ROOMS` of the same, and of a reconstruction where it cannot go to its place at
  once (a cast, or `put`).

On CPU tensors the same code runs with queues that do nothing: so it is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from tallstore.codecs import Bytes
from tallstore.decoding import Decoder
from tallstore.devices import Buffers, on_device, ring_queues
from tallstore.dtypes import is_codable, torch_dtype
from tallstore.errors import CorruptStoreError
from tallstore.ops import add_residual, choose_backend, reconstruct
from tallstore.spans import Run, Span, SpanKey
from tallstore.workers import cores, workers

__all__ = ["ROOMS", "Ring"]

#: Spans on the device at a time: one copied, one reconstructed, and one each in between.
ROOMS: Final = 4
_THREADS: Final = 8


class _Slot:
    """A span's chunks in host memory, on their way to the device."""

    def __init__(self, ring: Ring) -> None:
        self.buffers = Buffers(ring.host_memory)
        self.copied: Any = None

    def take(self, name: str, size: int) -> Bytes:
        array: Bytes = self.buffers.take(name, size).numpy()
        return array

    def wait(self) -> None:
        """Until the device has what was in it."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None


class _Room:
    """A span's chunks on the device, and results on their way back."""

    def __init__(self, ring: Ring) -> None:
        self.buffers = Buffers(ring.device_memory)
        self.back = Buffers(ring.host_memory)
        self.done: Any = None
        self.deliveries: list[Callable[[], None]] = []

    def deliver(self) -> None:
        """Hand out what came back, before its memory is used again."""
        deliveries, self.deliveries = self.deliveries, []
        if deliveries:
            self.done.synchronize()
        for deliver in deliveries:
            deliver()


@dataclass(slots=True)
class _Loaded:
    """A span that a thread has read."""

    slot: _Slot
    arena: int
    span: Span
    runs: list[Run]


class Ring:
    """Decodes spans of one object onto a device.

    Parameters
    ----------
    decoder
        Of the object.
    device
        Where the targets are.
    backend
        Of the reconstruction; see `tallstore.ops.choose_backend`.

    Raises
    ------
    DeviceError
        The object has codes, and the backend cannot run on the device.
    """

    def __init__(
        self,
        decoder: Decoder,
        device: torch.device,
        *,
        backend: str | None = None,
        threads: int | None = None,
    ) -> None:
        self._decoder = decoder
        self._device = device
        self._backend = choose_backend(device, backend) if decoder.has_codes else None
        self._threads = threads or min(cores(), _THREADS)
        self._module = torch.get_device_module(device)
        with on_device(device, "loading"):
            self._copying, self._computing = ring_queues(device)
        self._tables: dict[int, torch.Tensor] = {}
        self._slots = [_Slot(self) for _ in range(2 * self._threads + 2)]
        self._rooms = [_Room(self) for _ in range(ROOMS)]

    def _current(self) -> Any:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def host_memory(self, size: int) -> torch.Tensor:
        """Pinned, where there is a device to pin it for."""
        return torch.empty(
            size, dtype=torch.uint8, device="cpu", pin_memory=self._device.type == "cuda"
        )

    def device_memory(self, size: int) -> torch.Tensor:
        """Bytes on the device."""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def nbytes(self) -> tuple[int, int]:
        """(bytes held on the host, bytes held on the device)."""
        rooms = [(room.back.nbytes(), room.buffers.nbytes()) for room in self._rooms]
        host = sum(slot.buffers.nbytes() for slot in self._slots) + sum(back for back, _ in rooms)
        return host, sum(held for _, held in rooms)

    def run(
        self,
        segments: Sequence[int],
        *,
        targets: Mapping[int, torch.Tensor],
        put: Callable[[int, int, Bytes], None] | None = None,
        progress: Callable[[int], None],
    ) -> None:
        """Decode segments; everything is there when this returns.

        Parameters
        ----------
        segments
            Which.
        targets
            For a segment, a flat tensor on the device: of the segment's dtype, of another floating
            dtype (then it is cast), or its bytes.
        put
            Takes the pieces of segments that have no target: segment, first element, bytes.
        progress
            Called with the bytes dealt with.
        """
        wanted = set(segments)
        spans = self._decoder.spans(segments)

        def read(item: tuple[int, SpanKey]) -> _Loaded:
            number, key = item
            slot = self._slots[number % len(self._slots)]
            slot.wait()
            runs = [run for run in self._decoder.runs(key) if run.segment in wanted]
            return self._read(slot, key, runs)

        with self._current(), on_device(self._device, "loading"):
            now = self._module.current_stream()
            self._copying.wait_stream(now)
            self._computing.wait_stream(now)
            try:
                with workers(min(self._threads, max(len(spans), 1))) as pool:
                    for number, loaded in enumerate(pool.each(read, enumerate(spans))):
                        room = self._rooms[number % ROOMS]
                        room.deliver()
                        progress(self._place(loaded, room, targets, put))
                for number in range(len(spans), len(spans) + ROOMS):
                    self._rooms[number % ROOMS].deliver()
            finally:
                # Whatever happens, nothing may still be on its way to memory that is given back.
                for queue in (self._copying, self._computing):
                    self._event(queue).synchronize()

    def _event(self, queue: Any) -> Any:
        event = self._module.Event()
        event.record(queue)
        return event

    def _read(self, slot: _Slot, key: SpanKey, runs: list[Run]) -> _Loaded:
        """On a thread: read and check the chunks of a span into a slot."""
        span = self._decoder.load(key, coded=any(run.coded for run in runs), take=slot.take)
        return _Loaded(slot, key[1], span, runs)

    def _place(
        self,
        loaded: _Loaded,
        room: _Room,
        targets: Mapping[int, torch.Tensor],
        put: Callable[[int, int, Bytes], None] | None,
    ) -> int:
        """Start the copies and the arithmetic of a span; returns the bytes it makes."""
        staged = {}
        with self._module.stream(self._copying):
            if room.done is not None:
                self._copying.wait_event(room.done)
            for name, data in loaded.span.chunks():
                host = loaded.slot.buffers.take(name, data.size)
                staged[name] = room.buffers.take(name, data.size)
                staged[name].copy_(host, non_blocking=True)
            loaded.slot.copied = copied = self._event(self._copying)
        with self._module.stream(self._computing):
            self._computing.wait_event(copied)
            places = [self._target(run, targets) for run in loaded.runs]
            results = self._results(loaded.runs, places, room)
            for run, place, into in zip(loaded.runs, places, results, strict=True):
                self._finish(run, loaded, staged, into)
                if place is not None and place is not into:
                    place.copy_(into.view(torch_dtype(self._kind(run))))
            if put is not None:
                self._send_back(loaded.runs, places, results, room, put)
            room.done = self._event(self._computing)
        return sum(result.numel() for result in results)

    def _kind(self, run: Run) -> str:
        return self._decoder.segments[run.segment].dtype

    def _target(self, run: Run, targets: Mapping[int, torch.Tensor]) -> torch.Tensor | None:
        """Where a run goes: as bytes, or of the dtype that it is to be cast to."""
        target = targets.get(run.segment)
        if target is None:
            return None
        width = self._decoder.width(run)
        if target.dtype == torch.uint8:
            return target[run.start * width : (run.start + run.count) * width]
        place = target[run.start : run.start + run.count]
        return place.view(torch.uint8) if target.dtype == torch_dtype(self._kind(run)) else place

    def _results(
        self, runs: Sequence[Run], places: Sequence[torch.Tensor | None], room: _Room
    ) -> list[torch.Tensor]:
        """Bytes to decode runs to: their places, or parts of one buffer of the room."""
        sizes = [run.count * self._decoder.width(run) for run in runs]
        direct = [place is not None and place.dtype == torch.uint8 for place in places]
        held = [0 if there else _padded(n) for n, there in zip(sizes, direct, strict=True)]
        buffer = room.buffers.take("out", sum(held)) if any(held) else None
        results, start = [], 0
        for place, size, taken in zip(places, sizes, held, strict=True):
            if buffer is not None and taken:
                results.append(buffer[start : start + size])
            elif place is not None:
                results.append(place)
            start += taken
        return results

    def _finish(
        self, run: Run, loaded: _Loaded, staged: Mapping[str, torch.Tensor], into: torch.Tensor
    ) -> None:
        """Make the bytes of a run, from the span's chunks on the device."""
        width = self._decoder.width(run)
        if run.coded:
            self._reconstruct(run, loaded, staged, self._kind(run), into)
        else:
            into.copy_(staged["base"][run.within * width : (run.within + run.count) * width])

    def _reconstruct(
        self,
        run: Run,
        loaded: _Loaded,
        staged: Mapping[str, torch.Tensor],
        kind: str,
        into: torch.Tensor,
    ) -> None:
        span = loaded.span
        if span.code is None:
            raise CorruptStoreError("a coded part without a code")
        low, high = run.within, run.within + run.count
        base = staged["base"].view(torch_dtype(span.base_dtype))[low:high]
        planes = vector = None
        levels: Any = (1.0,)
        if "planes" in staged:
            planes = staged["planes"].view(span.code_bits, -1)[:, low // 8 : (high + 7) // 8]
            levels = self._level_row(loaded.arena, run)
        if "vector" in staged:
            vector = staged["vector"].view(torch_dtype(span.vector_dtype))[low:high]
        out = into.view(torch_dtype(kind))
        if is_codable(kind):
            reconstruct(base, planes, vector, levels, out, backend=self._backend)
        else:
            out.copy_(base)  # integers that changed: their prediction is the base
        if "residual" in staged:
            width = out.element_size()
            zigzag = staged["residual"][low * width : high * width]
            add_residual(out, zigzag, out, backend=self._backend)

    def _level_row(self, arena: int, run: Run) -> torch.Tensor:
        """The levels of a run, on the device: one row."""
        levels = self._decoder.levels(arena)
        if arena not in self._tables:
            self._tables[arena] = levels.table.to(self._device)
        row = levels.row(run.origin)
        return self._tables[arena][row : row + 1]

    def _send_back(
        self,
        runs: Sequence[Run],
        places: Sequence[torch.Tensor | None],
        results: Sequence[torch.Tensor],
        room: _Room,
        put: Callable[[int, int, Bytes], None],
    ) -> None:
        """Start the way back of what has no place on the device."""
        wanted = [
            (run, made)
            for run, place, made in zip(runs, places, results, strict=True)
            if place is None
        ]
        back = room.back.take("out", sum(made.numel() for _, made in wanted))
        start = 0
        for run, made in wanted:
            host = back[start : start + made.numel()]
            start += made.numel()
            host.copy_(made, non_blocking=True)
            room.deliveries.append(partial(put, run.segment, run.start, host.numpy()))


def _padded(size: int) -> int:
    """Whole 16 bytes: what the kernels move at a time."""
    return -(-size // 16) * 16
