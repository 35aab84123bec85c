"""Another reader of coded tasks, from FORMAT.md: one weight's rule, written out in numpy.

Chunks come from the engine; documents, layout, codes, levels and rounding are read here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tallstore import layout
from tallstore.store import TallStore

__all__ = ["SIZES", "NaiveTask", "narrowed", "positions", "widened"]

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int64": 8, "uint8": 1, "bool": 1}
_CODABLE = ("float32", "bfloat16", "float16")
Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int64]


def widened(raw: bytes, dtype: str) -> Floats:
    """Bytes of weights as float32."""
    if dtype == "float32":
        return np.frombuffer(raw, np.float32)
    if dtype == "float16":
        return np.frombuffer(raw, np.float16).astype(np.float32)
    return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)


def narrowed(weights: Floats, dtype: str) -> bytes:
    """Finite float32 rounded to nearest even."""
    if dtype == "float32":
        return weights.tobytes()
    if dtype == "float16":
        return weights.astype(np.float16).tobytes()
    whole = weights.view(np.uint32)
    return ((whole + 0x7FFF + ((whole >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def _mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def positions(seed: int, span: int, segment: int, stride: int, count: int) -> list[int]:
    """Which of `count` weights have a value."""
    key0 = _mix(_mix(_mix(0x243F6A88 ^ seed) ^ span) ^ segment)
    key1 = _mix(_mix(_mix(0x85A308D3 ^ seed) ^ span) ^ segment)
    found = []
    for group, start in enumerate(range(0, count, stride)):
        size = min(stride, count - start)
        found.append(start + (_mix(_mix(group ^ key0) ^ key1) * size >> 32))
    return found


def _bits(raw: bytes, first: int, count: int) -> Codes:
    """Bits `first`.. of LSB-first bytes, as numbers."""
    bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")
    return bits[first : first + count].astype(np.int64)


class NaiveTask:
    """A task as its codes alone give it back."""

    def __init__(self, path: Path, task: str) -> None:
        self.path = path
        with TallStore(path) as store:
            loader = store._loader(task)
            snapshot = loader.snapshot
            self.body = snapshot.manifest.body

            def stream(number: int) -> list[bytes]:
                record = snapshot.stream(number)
                data = np.empty(record.raw, np.uint8)
                snapshot.read(record, 0, data)
                size = record.chunk_size
                return [data[at : at + size].tobytes() for at in range(0, record.raw, size)]

            self.record = self.body["tasks"][task]
            self.base = json.loads(b"".join(stream(self.body["base"]["document"])))
            self.document = json.loads(b"".join(stream(self.record["document"])))
            wanted = {*self.record["streams"], *self.base["streams"], 0}
            vector = self.body["vector"]
            if vector is not None:
                wanted |= set(vector["streams"])
            # Codes alone: what the residual is coded with takes the base to be read.
            wanted -= {code[3] for code in self.document["codes"]}
            self.streams = {n: stream(n) for n in wanted - {0}}
        if self.body["base"].get("external"):
            raise NotImplementedError("a base in another store")
        self.places = _places(self.base["segments"])
        self.own_places = _places(self.document["own"])
        self.codings = {c[0]: c[1:] for c in self.document.get("codings", ())}
        self.codes = {c[0]: c[1:] for c in self.document["codes"]}

    # -- one segment of the base ----------------------------------------------------------

    def _span_weights(self, arena: int, span: int) -> int:
        whole = sum(
            -(-count // 1024) * 1024
            for (at, _), (_, count) in zip(self.places, self.base["segments"], strict=True)
            if at == arena
        )
        return min(layout.SPAN, whole - span * layout.SPAN)

    def _dense(self, stream: int, planes: int, arena: int, span: int) -> Codes:
        """Codes of a span, plane k bit k."""
        weights = self._span_weights(arena, span)
        raw = self.streams[stream][span]
        assert len(raw) == planes * weights // 8
        return sum(
            (_bits(raw, k * weights, weights) << k for k in range(planes)),
            np.zeros(weights, np.int64),
        )

    def _vector(self, arena: int, span: int) -> Floats:
        record = self.body["vector"]
        raw, count = self.streams[record["streams"][arena]][span], self._span_weights(arena, span)
        dtype = record["dtype"]
        if dtype in _CODABLE:
            return widened(raw, dtype)
        scales = widened(raw[: 2 * -(-count // 256)], "bfloat16")
        values = np.frombuffer(raw[2 * scales.size :], np.uint8).astype(np.int64)
        if dtype.endswith("int4"):
            values = np.stack([values & 15, values >> 4], 1).reshape(-1)
        values, half = values[:count], 128 if dtype.endswith("int8") else 8
        if not dtype.startswith("u"):
            values = np.where(values >= half, values - 2 * half, values)
        return values.astype(np.float32) * np.repeat(scales, 256)[:count]

    def _pieces(self, arena: int, span: int) -> list[tuple[int, int, int]]:
        """(segment, first weight in the span, count)."""
        low, high = span * layout.SPAN, (span + 1) * layout.SPAN
        found = []
        for number, (at, first) in enumerate(self.places):
            start, stop = max(low, first), min(high, first + self.base["segments"][number][1])
            if at == arena and start < stop:
                found.append((number, start - low, stop - start))
        return found

    def codes_of(self, segment: int, arena: int, span: int) -> tuple[Codes, list[float], bool]:
        """Codes over a whole span, their levels, and whether those are over the vector."""
        _, planes, _, *more = self.codes[arena]
        sparse, seeded, bits, value_bits, flags = more or (None, None, 1, 0, 1)
        form, levels, stride = self.codings.get(segment, ("planes", [0.0, 1.0], 0))
        if form == "planes":
            assert len(levels) <= 1 << bits
            return self._dense(planes, bits, arena, span), levels, bool(flags & 1)
        if form == "sparse":
            found = self._dense(sparse, 2, arena, span)
            assert found.max(initial=0) < 3, "a weight is moved by plus and by minus"
            return found, [-0.0, levels[0], -levels[0]], False
        found, first = np.zeros(self._span_weights(arena, span), np.int64), 0
        raw = self.streams[seeded][span]
        capacity = 8 * len(raw) // value_bits
        for number, within, count in self._pieces(arena, span):
            other = self.codings.get(number)
            if other is None or other[0] != "seeded":
                continue
            groups = -(-count // other[2])
            if number == segment:
                width = (len(levels) - 1).bit_length()
                values = sum(
                    (_bits(raw, k * capacity + first, groups) << k for k in range(width)),
                    np.zeros(groups, np.int64),
                )
                at = positions(self.document["seed"], span, segment, stride, count)
                found[within + np.array(at)] = values + 1
            first += -(-groups // 1024) * 1024
        assert first <= capacity and found.max(initial=0) < 16
        return found, [-0.0, *levels], False

    def _coded(self, segment: int, start: int, count: int) -> bytes:
        arena, first = self.places[segment]
        dtype = self.base["segments"][segment][0]
        wanted = self.codes[arena][0]
        parts = []
        for span in range(first // layout.SPAN, (first + start + count - 1) // layout.SPAN + 1):
            low = max(first + start, span * layout.SPAN) - span * layout.SPAN
            high = min(first + start + count, (span + 1) * layout.SPAN) - span * layout.SPAN
            raw = self.streams[self.base["streams"][arena]][span]
            raw = raw[low * SIZES[dtype] : high * SIZES[dtype]]
            if self.codings.get(segment) is None and "codings" in self.document:
                # No code: the prediction is the base.
                same = wanted == dtype
                parts.append(raw if same else narrowed(widened(raw, dtype), wanted))
                continue
            found, levels, shared = self.codes_of(segment, arena, span)
            level = np.array(levels, np.float32)[found[low:high]]
            if shared:
                level = level * self._vector(arena, span)[low:high]
            parts.append(narrowed(widened(raw, dtype) + level, wanted))
        return b"".join(parts)

    # -- the task -------------------------------------------------------------------------

    def segment(self, number: int) -> bytes:
        """The bytes of one of the task's segments."""
        found = []
        for kind, segment, start, count in self.document["parts"][number]:
            if kind == "c":
                found.append(self._coded(segment, start, count) if count else b"")
                continue
            if kind == "o":
                arena, first = self.own_places[segment]
                dtype = self.document["own"][segment][0]
                raw = b"".join(self.streams[self.document["own_streams"][arena]])
            else:
                arena, first = self.places[segment]
                dtype = self.base["segments"][segment][0]
                raw = b"".join(self.streams[self.base["streams"][arena]])
            size, first = SIZES[dtype], first + start
            found.append(raw[first * size : (first + count) * size])
        return b"".join(found)

    def tensors(self) -> dict[str, bytes]:
        """The bytes of all tensors, which are whole segments, by name."""
        found = {}
        for name, segment, _, _, stride, offset, flags in self.document["tensors"]:
            assert (stride, offset, flags & 3) == (0, 0, 0), name
            found[name] = self.segment(segment)
        return found


def _places(segments: list[list[Any]]) -> list[tuple[int, int]]:
    """(arena, first weight) of each segment."""
    order = list(dict.fromkeys(dtype for dtype, _ in segments))
    ends, found = [0] * len(order), []
    for dtype, count in segments:
        arena = order.index(dtype)
        found.append((arena, ends[arena]))
        ends[arena] += -(-count // 1024) * 1024
    return found
