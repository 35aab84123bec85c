"""Another reader of stores, written from FORMAT.md with lmdb, xxhash and zstandard alone.

In as few lines as it takes, and nothing of it shared with tallstore: where both read a store alike,
the text says what the code does.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import xxhash
import zstandard

__all__ = [
    "SIZES",
    "Reader",
    "corrected",
    "dequantized",
    "narrowed",
    "ordered",
    "seeded_places",
    "widened",
]


class Reader:
    """Sections 2 to 7 of FORMAT.md, in as few lines as they take."""

    def __init__(self, path: Path) -> None:
        options: dict[str, Any] = {"subdir": False, "readonly": True, "lock": False}
        with lmdb.Environment(str(path), **options) as env, env.begin() as txn:
            self.items = {bytes(key): bytes(value) for key, value in txn.cursor()}
        value = self.items[b"manifest"]
        magic, version, zero, self.store = struct.unpack("<8sII16s", value[:32])
        self.manifest = json.loads(self.chunk(value[32:], value[:32], b"manifest"))
        needs = self.manifest["body"].get("requires", [])
        assert (magic, version, zero) == (b"TALLSTOR", 2 if needs else 1, 0)
        assert set(needs) <= {"external-base", "codes", "quantized-vector"}
        self.streams = {row[0]: row[1:] for row in self.manifest["streams"]}
        assert {struct.unpack(">QI", k)[0] for k in self.items if len(k) == 12} == set(self.streams)

    @staticmethod
    def chunk(value: bytes, store: bytes, key: bytes, known: Any = None) -> bytes:
        """`known`: the words that a guided chunk goes by; without them it gives zeros."""
        head, payload = value[:48], value[48:]
        magic, codec, parameter, raw, size = struct.unpack("<4sBBxxQQ8x", head[:32])
        assert magic == b"TSC1" and size == len(payload)
        assert xxhash.xxh3_128(store + key + head[:32] + payload).digest() == head[32:]
        if codec == 0:
            data = payload
        elif codec == 1:
            data = zstandard.ZstdDecompressor().decompress(payload)
        elif codec == 3:
            data = sparse(payload, raw)
        elif codec == 4:
            data = bytes(raw) if known is None else guided(payload, parameter, known)
        elif codec == 5:
            data = symbols(payload, parameter)
        else:
            assert codec == 2
            lengths = struct.unpack(f"<{parameter}I", payload[: 4 * parameter])
            place, planes = 4 * parameter, []
            for length in lengths:
                body = payload[place : place + (length & 0x7FFFFFFF)]
                place += len(body)
                whole = body if length >> 31 else zstandard.ZstdDecompressor().decompress(body)
                planes.append(np.frombuffer(whole, np.uint8))
            data = np.stack(planes, 1).tobytes()
        assert len(data) == raw
        return data

    def stream(self, number: int, known: Any = None) -> bytes:
        """The raw bytes of a stream; `known`, for guided chunks, of its only one."""
        size, raw, stored = self.streams[number]
        keys = [struct.pack(">QI", number, chunk) for chunk in range(-(-raw // size))]
        assert sum(len(self.items[key]) for key in keys) == stored
        data = b"".join(self.chunk(self.items[key], self.store, key, known) for key in keys)
        assert len(data) == raw
        return data

    @staticmethod
    def places(segments: list[list[Any]]) -> list[tuple[int, int]]:
        """(arena, first weight) of each segment."""
        order: list[str] = list(dict.fromkeys(dtype for dtype, _ in segments))
        ends, found = [0] * len(order), []
        for dtype, count in segments:
            arena = order.index(dtype)
            found.append((arena, ends[arena]))
            ends[arena] += -(-count // 1024) * 1024
        return found


SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8}


def widened(words: Any) -> Any:
    """Bit patterns of float32 or bfloat16 as float32."""
    if words.dtype == np.uint32:
        return words.view(np.float32)
    return (words.astype(np.uint32) << 16).view(np.float32)


def narrowed(weights: Any, word: Any) -> Any:
    """Float32 to bit patterns, rounded to nearest even where they are bfloat16's."""
    whole = weights.view(np.uint32)
    if word is np.uint32:
        return whole
    return ((whole + 0x7FFF + ((whole >> 16) & 1)) >> 16).astype(np.uint16)


def corrected(predicted: Any, zigzag: Any, dtype: str) -> Any:
    """The exact tier."""
    word = predicted.dtype.type
    step = (zigzag >> word(1)) ^ (word(0) - (zigzag & word(1)))
    if dtype == "int64":
        return predicted + step
    sign = word(1 << (8 * predicted.itemsize - 1))
    back = ordered(predicted) + step
    return np.where(back & sign, back ^ sign, ~back).astype(word)


def ordered(words: Any) -> Any:
    """Section 7: bit patterns of floats as integers in the order of the numbers."""
    sign = words.dtype.type(1 << (8 * words.itemsize - 1))
    return np.where(words & sign, ~words, words | sign)


# -- codecs of section 3 ------------------------------------------------------------------


def body(payload: bytes, place: int, size: int) -> tuple[bytes, int]:
    """A body behind its length, and the place after it."""
    (length,) = struct.unpack_from("<I", payload, place)
    data = payload[place + 4 : place + 4 + (length & 0x7FFFFFFF)]
    place += 4 + len(data)
    whole = data if length >> 31 else zstandard.ZstdDecompressor().decompress(data)
    assert len(whole) == size
    return whole, place


def symbols(payload: bytes, count: int) -> bytes:
    """Planes from codes side by side."""
    whole = np.frombuffer(zstandard.ZstdDecompressor().decompress(payload), np.uint8)
    rows = np.unpackbits(whole.reshape(-1, 8), axis=1, bitorder="little").reshape(-1, 8, 8)
    by_row = np.packbits(rows.transpose(0, 2, 1), axis=2, bitorder="little")[:, :, 0]
    group = 8 // count
    assert not by_row[:, group * count :].any()
    planes = [by_row[:, k : group * count : count].reshape(-1) for k in range(count)]
    return np.concatenate(planes).tobytes()


def sparse(payload: bytes, raw: int) -> bytes:
    """Two bit planes from gaps and signs."""
    weights, touched, symbols, low = struct.unpack_from("<4I", payload)
    assert weights == 4 * raw and touched <= symbols <= weights // 4
    found, place = body(payload, 16, symbols)
    lows, signs = payload[place : place + touched * low], payload[place + touched * low :]
    minus = np.unpackbits(np.frombuffer(signs, np.uint8), bitorder="little")
    planes = np.zeros((2, weights), np.uint8)
    at, number = 0, 0
    for symbol in found:
        at += symbol * 256**low
        if symbol == 255:
            continue
        at += lows[number] if low else 0
        planes[minus[number], at] = 1
        at, number = at + 1, number + 1
    assert number == touched
    return np.packbits(planes, axis=1, bitorder="little").tobytes()


def unpacked(data: bytes, width: int, count: int) -> Any:
    """Symbols of 1, 2, 4 or 8 bits, the first lowest."""
    octets = np.frombuffer(data, np.uint8)
    parts = [octets >> shift & ((1 << width) - 1) for shift in range(0, 8, width)]
    return np.stack(parts, 1).ravel()[:count].astype(np.uint64)


def guided(payload: bytes, parameter: int, known: Any) -> bytes:
    """Zigzag differences from known words."""
    count, factor, c, groups, large = struct.unpack_from("<IfhHI", payload)
    assert count == known.size
    place, heads = 16, []
    for _ in range(groups):
        heads.append(struct.unpack_from("<BBBxI", payload, place))
        place += 8
    exponents, u = {
        1: (known >> 7 & 0xFF, 134), 2: (known >> 10 & 0x1F, 25), 3: (known >> 23 & 0xFF, 150)
    }[parameter]  # fmt: skip
    classes, place = body(payload, place, -(-count // 128))
    kind = np.repeat(np.frombuffer(classes, np.uint8).astype(np.int64), 128)[:count]
    context = kind + c + 2 * u + 10 - 2 * np.maximum(exponents.astype(np.int64), 1)
    context = np.where(kind == 0, 0, np.clip(context, 1, 63))
    words, escaped = np.zeros(count, np.uint64), []
    for number, shift, width, size in heads:
        at = np.flatnonzero(context == number)
        assert at.size == size
        data, place = body(payload, place, -(-size * width // 8))
        symbols = unpacked(data, width, size)
        escaped += [(n, shift) for n in at[symbols == (1 << width) - 1]]
        value, done = symbols << np.uint64(shift), 0
        while done < shift:
            part = 8 if shift - done >= 8 else 4 if shift - done >= 4 else 2
            data, place = body(payload, place, -(-size * part // 8))
            value |= unpacked(data, part, size) << np.uint64(done)
            done += part
        words[at] = value
    assert len(escaped) == large
    # The body of the large values is there even if there are none.
    data, place = body(payload, place, 4 * large)
    planes = np.frombuffer(data, np.uint8).reshape(4, large)
    for k, (n, shift) in enumerate(escaped):
        more = sum(int(plane[k]) << 8 * j for j, plane in enumerate(planes))
        words[n] += np.uint64(more << shift)
    assert place == len(payload) and set(np.unique(context)) - {0} == {h[0] for h in heads}
    found = words.astype(known.dtype)
    if factor == 1:
        return found.tobytes()
    one = known.dtype.type(1)
    step = (found >> one) ^ (known.dtype.type(0) - (found & one))
    scaled = (known.view(np.float32) * np.float32(factor)).view(known.dtype)
    start = np.where(exponents == 255, known, scaled)
    moved = ordered(start) + step - ordered(known)
    high = known.dtype.type(8 * known.itemsize - 1)
    return ((moved << one) ^ (known.dtype.type(0) - (moved >> high))).tobytes()


def dequantized(data: bytes, dtype: str, count: int) -> Any:
    """Section 3: float32 weights of a quantized vector."""
    scales = np.frombuffer(data[: 2 * -(-count // 256)], np.uint16)
    scale = np.repeat((scales.astype(np.uint32) << 16).view(np.float32), 256)[:count]
    rest = np.frombuffer(data[2 * scales.size :], np.uint8)
    if dtype.endswith("4"):
        rest = np.stack([rest & 15, rest >> 4], 1).ravel()[:count]
        values = rest.astype(np.int8)
        values = np.where(values > 7, values - 16, values) if dtype == "int4" else values
    else:
        values = rest.view(np.int8) if dtype == "int8" else rest
    return values.astype(np.float32) * scale


# -- section 7: which weights have a seeded value -----------------------------------------


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def seeded_places(count: int, stride: int, seed: int, span: int, segment: int) -> list[int]:
    """The weights of a piece that have a value."""
    one = mix(mix(mix(0x243F6A88 ^ seed) ^ span) ^ segment)
    two = mix(mix(mix(0x85A308D3 ^ seed) ^ span) ^ segment)
    found = []
    for g in range(-(-count // stride)):
        h = mix(mix(g ^ one) ^ two)
        found.append(g * stride + (h * min(stride, count - g * stride) >> 32))
    return found
