"""The base and the shared vector, on the device for as long as tasks are served."""

from __future__ import annotations

import threading
from typing import Any, Final

import numpy as np
import torch

from tallstore.advice import prefer_huge_pages
from tallstore.catalog import QUANTIZED, Catalog
from tallstore.codecs import Bytes
from tallstore.codecs.quantized import FORMS, dequantize
from tallstore.describing import read_base
from tallstore.devices import on_device
from tallstore.dtypes import itemsize, torch_dtype
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import CorruptStoreError
from tallstore.externalbase import base_elements
from tallstore.layout import Arena
from tallstore.workers import Workers

__all__ = ["Resident", "host_memory"]


def host_memory(size: int, device: torch.device) -> torch.Tensor:
    """Bytes of the host's memory, pinned where there is a device to pin them for."""
    memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    prefer_huge_pages(memory.numpy())
    return memory


class Resident:
    """Arenas of the base and of the shared vector; read when they are first asked for.

    Parameters
    ----------
    snapshot, catalog
        Of the store.
    device
        Where they are kept.
    pool
        Threads to read with.
    """

    def __init__(
        self, snapshot: Snapshot, catalog: Catalog, device: torch.device, pool: Workers
    ) -> None:
        self.device = device
        self.document = read_base(snapshot, catalog)
        self._snapshot = snapshot
        self._vector = catalog.vector
        self._pool = pool
        self._held: dict[tuple[str, int], torch.Tensor] = {}
        self._lock: Final = threading.Lock()

    def base_bytes(self, arena: int) -> int:
        """Bytes of an arena of the base."""
        found = self.document.layout.arenas[arena]
        return found.weights * itemsize(found.dtype)

    def vector_bytes(self, arena: int) -> int:
        """Bytes of an arena of the shared vector."""
        record = self._vector
        weights = self.document.layout.arenas[arena].weights
        return 0 if record is None else weights * itemsize(record.decoded_dtype)

    def base(self, arena: int) -> torch.Tensor:
        """An arena of the base: shape (weights,), of its dtype.

        Raises
        ------
        CorruptStoreError, DeviceError
        """
        home, streams = base_elements(self._snapshot, self.document)
        dtype = self.document.layout.arenas[arena].dtype
        return self._take("base", arena, home, streams[arena], dtype)

    def vector(self, arena: int) -> torch.Tensor:
        """An arena of the shared vector: shape (weights,); raises as `base` does."""
        record = self._vector
        number = record.streams[arena] if record and arena < len(record.streams) else 0
        if record is None or not number:
            raise CorruptStoreError(
                f"{self._snapshot.path}: a task is coded over a shared vector that is not there"
            )
        form = record.dtype if record.dtype in QUANTIZED else None
        return self._take("vector", arena, self._snapshot, number, record.decoded_dtype, form)

    def _take(
        self,
        what: str,
        arena: int,
        home: Snapshot,
        number: int,
        dtype: str,
        form: str | None = None,
    ) -> torch.Tensor:
        with self._lock:
            if (what, arena) not in self._held:
                shape = self.document.layout.arenas[arena]
                raw = _read(home, number, shape, dtype, form, self.device, self._pool)
                self._held[what, arena] = raw.view(torch_dtype(dtype))
            return self._held[what, arena]

    def held(self) -> int:
        """Bytes that were read."""
        return sum(tensor.nbytes for tensor in self._held.values())

    def inherit(self, older: Resident, *, vector: bool) -> None:
        """Take over what another one read, the vector too if it is the same."""
        kept = ("base", "vector") if vector else ("base",)
        self._held = {key: held for key, held in older._held.items() if key[0] in kept}


def _read(
    snapshot: Snapshot,
    number: int,
    arena: Arena,
    dtype: str,
    form: str | None,
    device: torch.device,
    pool: Workers,
) -> torch.Tensor:
    """The bytes of a stream over an arena, checked, on a device; dequantized if it has a form."""
    stream = snapshot.stream(number)
    width = itemsize(dtype)
    with on_device(device, "loading what all tasks share"):
        if device.type == "cpu":
            whole = host_memory(arena.weights * width, device)
        else:
            # Threads fill it, whose mode is not the caller's.
            with torch.inference_mode(False):
                whole = torch.empty(arena.weights * width, dtype=torch.uint8, device=device)
        desk = threading.local()

        def read(span: int) -> None:
            first = span * arena.span
            count = min(arena.span, arena.weights - first)
            target = whole[first * width : (first + count) * width]
            if device.type == "cpu":
                decode(span, count, target.numpy())
                return
            staged: Any = getattr(desk, "staged", None)
            if staged is None:
                staged = desk.staged = host_memory(arena.span * width, device)
            decode(span, count, staged[: count * width].numpy())
            target.copy_(staged[: count * width])

        def decode(span: int, count: int, out: Bytes) -> None:
            if form is None:
                snapshot.read_chunk(stream, span, out)
                return
            raw = np.empty(stream.raw_size(span), np.uint8)
            snapshot.read_chunk(stream, span, raw)
            dequantize(raw, count, FORMS[form], out=out.view(np.float32))

        for _ in pool.each(read, range(arena.spans)):
            pass
    return whole
