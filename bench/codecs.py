"""What codecs cost against the entropy, and how fast one core decodes them.

``python -m bench.codecs [--cache DIR] [--zoo DIR]``. Sparse signs at random places; a task vector
of MiniLM rounded to multiples of a step, its codes side by side and plane by plane; shared vectors
in 8 and 4 bits; reconstruction from one to four planes beside ``torch.add``; residuals of a real
fine-tune of MiniLM by byte planes and given the base; and what knowing the shared vector's
magnitude would save on TALL masks, with the time that sorting by it takes alone.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors.torch import load_file

from bench.exact import flat
from bench.rows import write
from bench.timing import by_turns
from bench.zoos.minilm import Zoo, zoo
from tallstore.bits import pack_bits
from tallstore.codecs import GUIDED, PLANES, SPARSE, SYMBOLS, ZSTD, Codec
from tallstore.codecs.guided import DTYPES
from tallstore.codecs.quantized import FORMS, dequantize, quantize
from tallstore.codecs.sparse import compact_form
from tallstore.codecs.zstd import literals
from tallstore.coding import add_residual, from_float32, residual, tall_mask
from tallstore.dtypes import itemsize
from tallstore.ops import reconstruct
from tallstore.scratch import Scratch

_SPAN = 1 << 20
_BINS = 16


def _speeds(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """G weights a second of each, over a span: by the fastest of the runs."""
    times = by_turns(runs, repeats=15, warmup=2)
    return {name: _SPAN / found["min"] / 1e9 for name, found in times.items()}


def _show(what: str, **cells: float) -> dict[str, Any]:
    print(f"{what:<34}" + "  ".join(f"{n} {v:.3f}" for n, v in cells.items()), flush=True)
    return {"what": what, **cells}


def _entropy(p: float) -> float:
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p) if 0 < p < 1 else 0.0


def sparse() -> list[Any]:
    """Signs at random places, by density."""
    rows = []
    for density in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2):
        draw = np.random.default_rng(0).random(_SPAN)
        plus, minus = draw < density / 2, (draw >= density / 2) & (draw < density)
        data = np.concatenate([pack_bits(plus), pack_bits(minus)])
        payload = SPARSE.encode(data, parameter=0, min_gain=0.05)
        assert payload is not None
        view, out = memoryview(payload), np.empty_like(data)
        SPARSE.decode(view, out, parameter=0)
        assert np.array_equal(out, data)
        share = float(np.count_nonzero(plus | minus)) / _SPAN
        speeds = _speeds(
            {
                "planes": lambda view=view, out=out: SPARSE.decode(view, out, parameter=0),
                "touched": lambda view=view: SPARSE.touched(view, _SPAN),
                "compact": lambda view=view: compact_form(SPARSE.touched(view, _SPAN), _SPAN),
                "encode": lambda data=data: SPARSE.encode(data, parameter=0, min_gain=0.05),
            }
        )
        bits = 8 * len(payload) / _SPAN
        rows.append(
            _show(
                f"sparse, density {density:g}",
                bits=bits,
                over_entropy=bits / (_entropy(share) + share),
                **speeds,
            )
        )
    return rows


def rounded(start: Any, tuned: Any) -> list[Any]:
    """2**20 weights that moved, the last, rounded to multiples of a step: of root mean squares."""
    rows = []
    moved = tuned - start
    moved = moved[moved != 0][-_SPAN:]
    size = np.abs(moved) / np.sqrt(np.mean(moved * moved))
    for count in (2, 3, 4):
        for step in (0.5, 1.0, 1.4, 2.0, 2.8):
            most = (1 << (count - 1)) - 1
            codes = np.minimum(np.rint(size / step), most).astype(np.uint8)
            share = np.bincount(codes) / _SPAN
            # Nothing has no sign.
            entropy = 1 - share[0] - sum(p * math.log2(p) for p in share.tolist() if p)
            codes |= ((moved < 0) & (codes > 0)).astype(np.uint8) << np.uint8(count - 1)
            bits = [(codes >> np.uint8(k) & np.uint8(1)).view(np.bool_) for k in range(count)]
            data = np.concatenate([pack_bits(plane) for plane in bits])
            payload = SYMBOLS.encode(data, parameter=count, min_gain=-1.0)
            alone = ZSTD.encode(data, parameter=0, min_gain=0.0)
            assert payload is not None
            view, out = memoryview(payload), np.empty_like(data)
            SYMBOLS.decode(view, out, parameter=count)
            assert np.array_equal(out, data)
            speeds = _speeds(
                {
                    "decode": lambda view=view, out=out, count=count: SYMBOLS.decode(
                        view, out, parameter=count
                    ),
                    "encode": lambda data=data, count=count: SYMBOLS.encode(
                        data, parameter=count, min_gain=-1.0
                    ),
                }
            )
            facts = {
                "nothing": float(share[0]),
                "entropy": entropy,
                "bits": 8 * len(payload) / _SPAN,
                "over_entropy": 8 * len(payload) / _SPAN / entropy,
                "by_plane": 8 * (data.size if alone is None else len(alone)) / _SPAN,
            }
            rows.append(_show(f"{count} planes, step {step:g}", **facts, **speeds))
    return rows


def quantized() -> list[Any]:
    """Shared vectors, normally distributed."""
    rows = []
    for name, form in FORMS.items():
        values = np.random.default_rng(0).standard_normal(_SPAN).astype(np.float32)
        values = values if form.signed else np.abs(values)
        raw, out = quantize(values, form), np.empty(_SPAN, np.float32)
        dequantize(raw, _SPAN, form, out=out)
        error = float(np.linalg.norm(out - values) / np.linalg.norm(values))
        speeds = _speeds(
            {"decode": lambda raw=raw, out=out, form=form: dequantize(raw, _SPAN, form, out=out)}
        )
        rows.append(_show(f"vector, {name}", bits=8 * raw.size / _SPAN, error=error, **speeds))
    return rows


def reconstruction() -> list[Any]:
    """Base + level [x vector], by planes, beside base + vector of the same arrays."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        base, vector = (torch.randn(_SPAN).to(dtype) for _ in range(2))
        out, scratch = torch.empty(_SPAN, dtype=dtype), Scratch()
        for count in range(1, 5):
            planes = torch.randint(0, 256, (count, _SPAN // 8), dtype=torch.uint8)
            levels = torch.randn(1 << count).tolist()

            def ours(
                step: torch.Tensor | None,
                base: torch.Tensor = base,
                planes: torch.Tensor = planes,
                levels: list[float] = levels,
                out: torch.Tensor = out,
                scratch: Scratch = scratch,
                backend: str = "cpu",
            ) -> None:
                reconstruct(base, planes, step, levels, out, scratch=scratch, backend=backend)

            speeds = _speeds(
                {
                    "vector": lambda ours=ours, vector=vector: ours(vector),
                    "none": lambda ours=ours: ours(None),
                    "compiled": lambda ours=ours, v=vector: ours(v, backend="compiled"),
                    "compiled, none": lambda ours=ours: ours(None, backend="compiled"),
                    "add": lambda base=base, vector=vector, out=out: torch.add(
                        base, vector, out=out
                    ),
                }
            )
            speeds["share_of_add"] = speeds["vector"] / speeds["add"]
            speeds["compiled_share"] = speeds["compiled"] / speeds["add"]
            rows.append(_show(f"{count} planes, {dtype}".replace("torch.", ""), **speeds))
    return rows


def residuals(start: Any, tuned: Any) -> list[Any]:
    """2**20 weights from the middle."""
    rows = []
    middle = slice(start.size // 2, start.size // 2 + _SPAN)
    for dtype in DTYPES:
        side, actual = from_float32(start[middle], dtype), from_float32(tuned[middle], dtype)
        data = residual(actual, side, dtype)
        found: dict[str, float] = {}
        runs: dict[str, Callable[[], object]] = {}
        chosen: list[tuple[str, Codec, int]] = [
            ("planes", PLANES, itemsize(dtype)),
            ("exact", GUIDED, DTYPES[dtype]),
        ]
        for name, codec, parameter in chosen:
            payload = codec.encode(data, parameter=parameter, min_gain=0.0, side=side)
            assert payload is not None
            found[f"{name}_bits"] = 8 * len(payload) / _SPAN
            out, view = np.empty_like(data), memoryview(payload)

            def decode(
                codec: Codec = codec,
                view: memoryview = view,
                out: Any = out,
                parameter: int = parameter,
                side: Any = side,
            ) -> None:
                codec.decode(view, out, parameter=parameter, side=side)

            def encode(
                codec: Codec = codec, data: Any = data, parameter: int = parameter, side: Any = side
            ) -> None:
                codec.encode(data, parameter=parameter, min_gain=0.0, side=side)

            decode()
            assert np.array_equal(out, data)
            runs |= {f"{name}_decode": decode, f"{name}_encode": encode}
        runs["add"] = lambda side=side, data=data, dtype=dtype: add_residual(side, data, dtype)
        rows.append(_show(f"residual, {dtype}", **found, **_speeds(runs)))
    return rows


def masks(start: Any, tuned: dict[str, Any]) -> list[Any]:
    """TALL masks, given which of 16 bins of a span's magnitudes a weight of the vector is in.

    And given, too, how many ones its block of 128 has, in 8 classes, which would be stored; and,
    without the vector, blocks of a class together, Huffman-coded: what could be decoded fast.
    """
    vector = np.float32(0.4) * sum(weights - start for weights in tuned.values())
    rows, bits = (
        [],
        {"order_0": 0.0, "given_bin": 0.0, "given_both": 0.0, "by_block": 0.0, "zstd_1": 0.0},
    )
    weights = 0
    for begin in range(0, start.size - _SPAN, 4 * _SPAN):
        at = slice(begin, begin + _SPAN)
        size = np.abs(vector[at])
        bins = np.searchsorted(np.quantile(size, np.arange(1, _BINS) / _BINS), size)
        for task in tuned.values():
            mask, _, _ = tall_mask(start[at], start[at] + vector[at], task[at], tall_lambda=0.4)
            bits["order_0"] += _SPAN * _entropy(float(mask.mean()))
            bits["given_bin"] += _given(bins, mask)
            block = np.minimum(mask.reshape(-1, 128).mean(axis=1) * 8, 7).astype(np.int64)
            bits["given_both"] += _given(bins + _BINS * np.repeat(block, 128), mask)
            shares = np.bincount(block) / block.size
            bits["given_both"] -= block.size * sum(p * math.log2(p) for p in shares.tolist() if p)
            packed = pack_bits(mask)
            frame = zstandard.ZstdCompressor(level=1).compress(packed.tobytes())
            bits["zstd_1"] += 8 * min(len(frame), packed.size)
            bits["by_block"] += 8 * _by_block(packed)
            weights += _SPAN
    small = bins.astype(np.uint8)
    runs: dict[str, Callable[[], object]] = {
        "sorting": lambda: [
            np.argsort(small[i : i + (1 << 15)], kind="stable") for i in range(0, _SPAN, 1 << 15)
        ]
    }
    per_weight = {name: found / weights for name, found in bits.items()}
    gain = 1 - per_weight["given_both"] / per_weight["zstd_1"]
    rows.append(_show("TALL masks, lambda 0.4", **per_weight, gain=gain, **_speeds(runs)))
    return rows


def _by_block(packed: Any) -> int:
    blocks = packed.reshape(-1, 16)
    classes = (np.bitwise_count(blocks).sum(axis=1) + 15) // 16
    groups = [classes.astype(np.uint8), *(blocks[classes == c].ravel() for c in range(1, 9))]
    return sum(min(len(literals(group)), group.size) for group in groups if group.size)


def _given(contexts: Any, mask: Any) -> float:
    """Bits of a mask, given the context of each weight."""
    counts, ones = np.bincount(contexts), np.bincount(contexts, mask)
    pairs = zip(counts.tolist(), ones.tolist(), strict=True)
    return sum(n * _entropy(o / n) for n, o in pairs if n)


def main() -> None:
    """Measure, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--zoo", type=Path, help="a directory of trained tasks to take as it is")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = Zoo.at(args.zoo) if args.zoo else zoo(args.cache)
    base = load_file(found.base / "model.safetensors")
    states = {t: load_file(p / "model.safetensors") for t, p in found.tasks.items()}
    names = [
        n for n, w in base.items() if w.is_floating_point() and n in next(iter(states.values()))
    ]
    start, tuned = flat(base, names), {t: flat(s, names) for t, s in states.items()}
    print("speeds: G weights/s of one core")
    rows = sparse() + rounded(start, next(iter(tuned.values()))) + quantized() + reconstruction()
    rows += residuals(start, next(iter(tuned.values()))) + masks(start, tuned)
    print(write("codecs", rows))


if __name__ == "__main__":
    main()
