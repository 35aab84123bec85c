"""Every form of code, read by FORMAT.md alone, gives what tallstore gives, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_reader import SIZES, Reader, corrected, dequantized, narrowed, seeded_places, widened
from test_golden import golden, make
from zoo import bits

import tallstore

__all__ = ["golden"]  # a fixture


def codes_of(reader: Reader, task: Any, segment: int, arena: int, first: int, count: int) -> Any:
    """The codes of a segment's weights, their levels, and whether they are over the vector."""
    _, _, planes, _, signs, values, width, value_width, flags = next(
        code for code in task["codes"] if code[0] == arena
    )
    _, form, levels, stride = next(c for c in task["codings"] if c[0] == segment)
    levels = np.array(levels, np.float64).astype(np.float32)
    nothing = np.float32(-0.0)
    if form == "planes":
        raw = np.frombuffer(reader.stream(planes), np.uint8).reshape(width, -1)
        bit = np.unpackbits(raw, axis=1, bitorder="little")[:, first : first + count]
        code = sum(plane.astype(np.int64) << k for k, plane in enumerate(bit[: len(bit)]))
        code &= len(levels) - 1
        return code, levels, bool(flags & 1)
    if form == "sparse":
        raw = np.frombuffer(reader.stream(signs), np.uint8).reshape(2, -1)
        plus, minus = np.unpackbits(raw, axis=1, bitorder="little")[:, first : first + count]
        code = plus.astype(np.int64) + 2 * minus
        return code, np.array([nothing, levels[0], -levels[0]], np.float32), False
    assert form == "seeded"
    raw = np.frombuffer(reader.stream(values), np.uint8).reshape(value_width, -1)
    bit = np.unpackbits(raw, axis=1, bitorder="little")
    # The pieces of a span have their values one after the other; these arenas have one span.
    start = 0
    for number, (kind, *rest) in sorted((c[0], c[1:]) for c in task["codings"]):
        place, size = (
            reader.places(reader.base["segments"])[number],
            reader.base["segments"][number],
        )
        if kind != "seeded" or place[0] != arena:
            continue
        groups = -(-size[1] // rest[1])
        if number == segment:
            break
        start += -(-groups // 1024) * 1024
    value = sum(bit[k, start : start + groups].astype(np.int64) << k for k in range(value_width))
    code = np.zeros(count, np.int64)
    code[seeded_places(count, stride, task["seed"], 0, segment)] = 1 + value
    return code, np.concatenate([[nothing], levels]).astype(np.float32), False


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tasks as they are written today: with codecs that came later."""
    path = tmp_path_factory.mktemp("fresh") / "codes.tall"
    make.write_coded(path)
    codecs = {value[4] for key, value in Reader(path).items.items() if len(key) == 12}
    assert 5 in codecs
    return path


@pytest.mark.parametrize("written", ["golden", "fresh"])
@pytest.mark.parametrize("name", make.CODES)
def test_a_code_by_the_format(
    golden: dict[str, Path], fresh: Path, name: str, written: str
) -> None:
    path = golden["codes.tall"] if written == "golden" else fresh
    reader = Reader(path)
    body = reader.manifest["body"]
    assert body["requires"] == ["codes", "quantized-vector"]
    reader.base = base = json.loads(reader.stream(body["base"]["document"]))
    places = reader.places(base["segments"])
    task = json.loads(reader.stream(body["tasks"][name]["document"]))
    loaded = tallstore.load(path, task=name, fidelity="codes")
    originals = make.coded()[1][name]
    seen = 0
    for key, number, dtype, *_ in task["tensors"]:
        ((kind, segment, start, count),) = task["parts"][number]
        arena, first = places[segment]
        width = SIZES[dtype]
        raw = reader.stream(base["streams"][arena])
        plain = np.frombuffer(raw[first * width : (first + count) * width], f"<u{width}")
        if kind == "b":
            assert plain.tobytes() == bits(originals[key])
            continue
        assert (kind, start) == ("c", 0)
        code, levels, over = codes_of(reader, task, segment, arena, first, count)
        step = levels[code]
        if over:
            vector, weights = body["vector"], len(raw) // width
            stream = reader.stream(vector["streams"][arena])
            step = step * dequantized(stream, vector["dtype"], weights)[first : first + count]
        predicted = narrowed(widened(plain) + step, plain.dtype.type)
        assert predicted.tobytes() == bits(loaded[key]), key
        exact = next(c[3] for c in task["codes"] if c[0] == arena)
        seen += 1
        if exact is None:
            continue
        known = np.frombuffer(raw, plain.dtype)
        zigzag = np.frombuffer(reader.stream(exact, known), plain.dtype)[first : first + count]
        # With these codes the residual is of the base: flag 2.
        assert next(c[8] for c in task["codes"] if c[0] == arena) & 2
        assert corrected(plain, zigzag, dtype).tobytes() == bits(originals[key]), key
    assert seen == 4
