"""The exact tier beside lossless compression of each file, on real fine-tunes of MiniLM.

``python -m bench.exact [--cache DIR] [--zoo DIR] [--tasks TASK ...]``. In float32 and cast to
bfloat16, bits per weight: zstd-19 and ZipNN of the weights alone; with the base at hand, XOR and
zstd-19, XOR and ZipNN, byte planes of integer differences, and the exact tier; and the exact tier
over what TALL masks predict instead of the base. ZipNN is the package of that name, if it is
installed. Every one of ours is decoded and compared.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors.torch import load_file

from bench.rows import write
from bench.zoos.minilm import Zoo, zoo
from tallstore.codecs import GUIDED, PLANES, Bytes, Codec
from tallstore.codecs.guided import DTYPES
from tallstore.coding import from_float32, residual, tall_mask
from tallstore.dtypes import itemsize
from tallstore.engine.chunk import HEADER_SIZE

_SPAN = 1 << 20
_NAMES = ("zstd-19", "ZipNN", "XOR, zstd-19", "XOR, ZipNN", "planes", "exact", "exact over TALL")
Floats = Any


def flat(state: dict[str, torch.Tensor], names: list[str]) -> Floats:
    """The weights of some tensors, one after the other."""
    return torch.cat([state[name].float().flatten() for name in names]).numpy()


def chunked(codec: Codec, data: Bytes, side: Bytes, parameter: int, size: int) -> int:
    """Bytes of the chunks of a stream, headers included; decoded again and compared."""
    total = 0
    for start in range(0, data.size, _SPAN * size):
        some, known = data[start : start + _SPAN * size], side[start : start + _SPAN * size]
        payload = codec.encode(some, parameter=parameter, min_gain=0.05, side=known)
        total += HEADER_SIZE + (some.size if payload is None else len(payload))
        if payload is not None:
            out = np.empty_like(some)
            codec.decode(memoryview(payload), out, parameter=parameter, side=known)
            assert np.array_equal(out, some)
    return total


def zipnn(dtype: str) -> Callable[[bytes], int] | None:
    """Bytes that ZipNN makes of some; None where it is not installed."""
    try:
        module = importlib.import_module("zipnn")
    except ImportError:
        return None

    def size(data: bytes) -> int:
        packer = module.ZipNN(input_format="byte", bytearray_dtype=dtype, threads=1)
        # It works in the memory that it is given.
        packed = packer.compress(bytearray(data))
        assert bytes(packer.decompress(packed)) == data
        return len(packed)

    return size


def measure(dtype: str, base: Floats, tuned: Floats, merged: Floats) -> dict[str, float]:
    """Bits per weight of each."""
    start, actual = from_float32(base, dtype), from_float32(tuned, dtype)
    differences = residual(actual, start, dtype)
    mask, _, _ = tall_mask(base, merged, tuned, tall_lambda=0.4)
    predicted = from_float32(np.where(mask, merged, base), dtype)
    xor = np.bitwise_xor(start, actual).tobytes()
    best = zstandard.ZstdCompressor(level=19)
    size, packer = itemsize(dtype), zipnn(dtype)
    found: dict[str, int] = {
        "zstd-19": len(best.compress(actual.tobytes())),
        "XOR, zstd-19": len(best.compress(xor)),
        "planes": chunked(PLANES, differences, start, size, size),
        "exact": chunked(GUIDED, differences, start, DTYPES[dtype], size),
        "exact over TALL": chunked(
            GUIDED, residual(actual, predicted, dtype), predicted, DTYPES[dtype], size
        ),
    }
    if packer is not None:
        found |= {"ZipNN": packer(actual.tobytes()), "XOR, ZipNN": packer(xor)}
    return {name: 8 * nbytes / base.size for name, nbytes in found.items()}


def main() -> None:
    """Measure, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--zoo", type=Path, help="a directory of trained tasks to take as it is")
    parser.add_argument("--tasks", nargs="+", help="which to measure; all are merged")
    args = parser.parse_args()
    found = Zoo.at(args.zoo) if args.zoo else zoo(args.cache)
    base = load_file(found.base / "model.safetensors")
    states = {t: load_file(p / "model.safetensors") for t, p in found.tasks.items()}
    names = [
        n for n, w in base.items() if w.is_floating_point() and all(n in s for s in states.values())
    ]
    start = flat(base, names)
    tuned = {task: flat(state, names) for task, state in states.items()}
    merged = start + np.float32(0.4) * sum(weights - start for weights in tuned.values())
    rows: list[dict[str, Any]] = []
    print(f"{'':<22}" + "".join(f"{name:>16}" for name in _NAMES))
    for dtype in ("bfloat16", "float32"):
        for task in args.tasks or tuned:
            bits = measure(dtype, start, tuned[task], merged)
            rows.append({"task": task, "dtype": dtype, "weights": start.size, "bits": bits})
            _print(f"{task}, {dtype}", bits)
            write("exact", rows)
        some = [row["bits"] for row in rows if row["dtype"] == dtype]
        bits = {name: mean(one[name] for one in some) for name in some[0]}
        rows.append({"task": "mean", "dtype": dtype, "weights": start.size, "bits": bits})
        _print(f"mean, {dtype}", bits)
    print(write("exact", rows))


def _print(name: str, bits: dict[str, float]) -> None:
    cells = (f"{bits[n]:>16.3f}" if n in bits else f"{'-':>16}" for n in _NAMES)
    print(f"{name:<22}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
