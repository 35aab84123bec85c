"""The compiled loops: the same bits as the plain reference, many tensors in one call."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import bits, run_child

pytest.importorskip("numba")

from tallstore import compiling, ops
from tallstore.errors import DeviceError
from tallstore.kernels import reference, seeded_reference, sparse_reference
from tallstore.kernels.seeded_reference import SeededTensor, build, value_groups
from tallstore.ops import programs
from tallstore.ops.programs import Planes
from tallstore.ops.touches import PIECE, Applied, Start, Touches, located

assert compiling.load()

FLOATS = (torch.float32, torch.bfloat16)


def draw(generator: np.random.Generator, n: int, dtype: torch.dtype) -> torch.Tensor:
    weights = torch.from_numpy(generator.standard_normal(n, np.float32))
    weights[::7], weights[3::11] = -0.0, torch.inf
    return weights.to(dtype)


def draw_planes(generator: np.random.Generator, count: int, n: int, density: float) -> torch.Tensor:
    found = generator.random((count, -(-n // 8) * 8)) < density
    return torch.from_numpy(np.packbits(found, axis=1, bitorder="little"))


def by_threads(start: Start | None, threads: int) -> None:
    if start is not None:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(start.work) for _ in range(threads)]:
                done.result()


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    count=st.integers(1, 4),
    dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 2),
    vector=st.sampled_from([None, *FLOATS]),
    threads=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_planes_of_many_tensors(
    sizes: list[int],
    count: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    vector: torch.dtype | None,
    threads: int,
    seed: int,
) -> None:
    generator = np.random.default_rng(seed)
    levels = torch.from_numpy(generator.standard_normal((len(sizes), 1 << count), np.float32))
    parts, wanted = [], []
    for row, n in enumerate(sizes):
        base = draw(generator, n, dtypes[0])
        step = None if vector is None else draw(generator, n, vector)
        planes = draw_planes(generator, count, n, 0.5)
        parts.append((base, planes, step, row, torch.empty(n, dtype=dtypes[1])))
        line = levels[row].tolist()
        wanted.append(reference.reconstruct(base, planes, step, line, dtypes[1]))
    by_threads(Start(Planes(parts, levels).start(), 0), threads)
    assert [bits(part[-1]) for part in parts] == [bits(tensor) for tensor in wanted]


def code_of(generator: np.random.Generator, kind: str, n: int) -> Any:
    if kind == "sparse":
        rows = torch.from_numpy(generator.integers(0, 2, -(-n // 1024)).astype(np.int32))
        table = torch.tensor([[-0.0, 0.5, -0.25, 2.0], [-0.0, -1.0, 1.0, 0.125]])
        planes = draw_planes(generator, 2, n, 0.03)
        return ops.compress_planes(planes, n, table, rows=rows)
    cut, stride = n // 2 // 1024 * 1024, int(generator.integers(1, 9))
    tensors = [
        SeededTensor(seed=5, number=number, stride=stride, offset=offset, numel=numel)
        for number, (offset, numel) in enumerate([(0, cut), (cut, n - cut)])
        if numel
    ]
    count = int(generator.integers(1, 5))
    planes = draw_planes(generator, count, value_groups(tensors)[-1], 0.5)
    table = torch.from_numpy(generator.standard_normal((len(tensors), 1 << count), np.float32))
    code = build(tensors, planes, table, n)
    return located(code) if kind == "located" else code


def plain(code: Any) -> Any:
    return sparse_reference if isinstance(code, ops.SparseCode) else seeded_reference


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=4),
    kinds=st.lists(
        st.lists(st.sampled_from(["sparse", "seeded", "located", "none", "unknown"]), min_size=4),
        min_size=3,
        max_size=3,
    ),
    dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 2),
    keeps=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_from_code_to_code(
    sizes: list[int],
    kinds: list[list[str]],
    dtypes: tuple[torch.dtype, torch.dtype],
    keeps: bool,
    threads: int,
    seed: int,
) -> None:
    """Each tensor goes through three codes: "none" is the base, "unknown" is left to the next."""
    generator = np.random.default_rng(seed)
    bases = [draw(generator, n, dtypes[0]) for n in sizes]
    outs = [torch.full((n,), 7.0, dtype=dtypes[1]) for n in sizes]
    before: list[Applied] = []
    for kind in kinds:
        chosen = [
            (None if name == "none" else code_of(generator, name, base.numel()), base, out)
            for name, base, out in zip(kind, bases, outs, strict=False)
            if name != "unknown"
        ]
        after = []
        # Two programs, as two arenas have.
        for parts in (chosen[:1], chosen[1:]):
            if parts:
                program = Touches(parts)
                kept = np.empty(program.under, np.uint8) if keeps else None
                by_threads(program.start(before, kept), threads)
                after.append(Applied(program, kept))
        for code, base, out in chosen:
            wanted = base.to(dtypes[1]).clone()
            if code is not None:
                plain(code).apply(code, base, wanted)
            assert bits(out) == bits(wanted)
        before = after


@pytest.mark.parametrize("stride", [1, 3, 50, 5000, 10**6, 2**31 - 1])
@pytest.mark.parametrize("n", [PIECE - 5, 3 * PIECE + 4097])
def test_seeded_values_of_large_tensors(n: int, stride: int) -> None:
    """Pieces of a tensor, which threads do, end in the middle of a group of seeded values."""
    generator = np.random.default_rng(stride)
    first = 1024 * 77
    tensors = [
        SeededTensor(seed=9, number=4, stride=stride, offset=first, numel=n - first),
        SeededTensor(seed=8, number=3, stride=7, offset=0, numel=first - 3),
    ]
    planes = draw_planes(generator, 3, value_groups(tensors)[-1], 0.5)
    code = build(
        tensors, planes, torch.from_numpy(generator.standard_normal((2, 8), np.float32)), n
    )
    base = draw(generator, n, torch.float32)
    wanted = base.clone()
    plain(code).apply(code, base, wanted)
    out = base.clone()
    program = Touches([(code, base, out)])
    kept = np.empty(program.under, np.uint8)
    by_threads(program.start(kept=kept), 2)
    assert bits(out) == bits(wanted)
    by_threads(Touches([(None, base, out)]).start([Applied(program, kept)]), 2)
    assert bits(out) == bits(base)
    sparse_reference.apply(located(code), base, out)
    assert bits(out) == bits(wanted)


def test_what_torch_makes_of_nan() -> None:
    kinds = np.array([0x7F800001, 0x7FC00000, 0xFFC00001, 0x7F7FFFFF, 0x7F800000], np.uint32)
    base = torch.from_numpy(np.tile(kinds, 40).view(np.float32))
    out, planes = torch.empty(200, dtype=torch.bfloat16), torch.zeros(1, 25, dtype=torch.uint8)
    ops.reconstruct(base, planes, None, [-0.0, 1.0], out, backend="compiled")
    assert bits(out) == bits(base.to(torch.bfloat16))


def test_nowhere_to_keep_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from tallstore import jit

    def refuse(**options: bool) -> Any:
        if options.get("cache"):
            raise RuntimeError("no locator available")
        return lambda function: function

    monkeypatch.setattr(jit, "njit", refuse)
    assert jit.compiled(max) is max


def test_without_numba() -> None:
    run_child("""
import sys
sys.modules["numba"] = None
import torch
from tallstore import errors, ops
from tallstore import compiling
assert not compiling.load() and not compiling.loaded()
assert ops.choose_backend(torch.device("cpu"), None, compiles=True) == "cpu"
try:
    ops.choose_backend(torch.device("cpu"), "compiled", compiles=True)
except errors.DeviceError as exc:
    assert "pip install 'tallstore[cpu]'" in str(exc), exc
else:
    raise SystemExit("no refusal")
""")


def test_loops_stay_on_the_cpu() -> None:
    with pytest.raises(DeviceError, match="backend='compiled': the tensors are on meta"):
        ops.choose_backend(torch.device("meta"), "compiled")


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=4),
    dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 2),
    vector=st.sampled_from([None, *FLOATS]),
    seed=st.integers(0, 99),
)
def test_past_the_caches_it_is_the_same(
    sizes: list[int],
    dtypes: tuple[torch.dtype, torch.dtype],
    vector: torch.dtype | None,
    seed: int,
) -> None:
    generator = np.random.default_rng(seed)
    levels = torch.from_numpy(generator.standard_normal((len(sizes), 2), np.float32))
    parts, wanted = [], []
    for row, n in enumerate(sizes):
        base = draw(generator, n, dtypes[0])
        base[5::13] = torch.nan
        step = None if vector is None else draw(generator, n, vector)
        planes = draw_planes(generator, 1, n, 0.5)
        # Some begin at a line of memory, others do not.
        out = torch.full((n + 3,), 7.0, dtype=dtypes[1])[row % 3 : row % 3 + n]
        parts.append((base, planes, step, row, out))
        wanted.append(reference.reconstruct(base, planes, step, levels[row].tolist(), dtypes[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "_PAST", 0)
        Planes(parts, levels).start()()
    assert [bits(part[-1]) for part in parts] == [bits(tensor) for tensor in wanted]


@pytest.mark.parametrize("past", [0, 1 << 40])
def test_what_is_there_already_is_left_alone(past: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_PAST", past)
    generator = np.random.default_rng(3)
    n, marked = 4096 + 40, 70
    base, vector = draw(generator, n, torch.float32), draw(generator, n, torch.bfloat16)
    outs = [torch.empty(n), torch.empty(n), torch.empty(n)]
    masks = [draw_planes(generator, 1, n, 0.5) for _ in range(2)]
    masks[1][:, 8:256] = masks[0][:, 8:256]
    levels = torch.tensor([[0.0, 1.0], [-0.0, 1.0]])

    def program(mask: torch.Tensor, rows: tuple[int, int, int]) -> Planes:
        return Planes(
            [(base, mask, vector, row, out) for row, out in zip(rows, outs, strict=True)], levels
        )

    first, second = program(masks[0], (0, 0, 0)), program(masks[1], (0, 1, 0))
    first.since(None)
    assert first.start()() == 0
    second.since(first)
    for out in outs:
        out[marked] = 5.0
    # Of other levels nothing is left alone, though -0.0 == 0.0; the marks tell what is.
    assert second.start()() == 2 * 248 * 8
    assert [float(out[marked]) == 5.0 for out in outs] == [True, False, True]
    for row, out in zip((0, 1, 0), outs, strict=True):
        wanted = reference.reconstruct(base, masks[1], vector, levels[row].tolist(), torch.float32)
        out[marked] = wanted[marked]
        assert bits(out) == bits(wanted)
    # Elsewhere, or over another vector, it is as if nothing were known.
    other = Planes([(base, masks[1], vector.clone(), 0, outs[0])], levels)
    other.since(second)
    assert other.start()() == 0
    elsewhere = Planes([(base, masks[1], vector, 0, torch.empty(n))], levels)
    elsewhere.since(second)
    assert elsewhere.start()() == 0
    second.since(None)
    assert second.start()() == 0


def test_tensors_of_no_weights_do_not_shift_the_others() -> None:
    """All of them lie nowhere, so that they are one to whoever goes by addresses."""
    generator = np.random.default_rng(3)
    sizes = [0, 5000, 0, 3000, 0, 700]
    bases = [draw(generator, n, torch.float32) for n in sizes]
    outs = [base.clone() for base in bases]

    def written(codes: list[Any], before: list[Applied]) -> list[Applied]:
        program = Touches(list(zip(codes, bases, outs, strict=True)))
        kept = np.empty(program.under, np.uint8)
        by_threads(program.start(before, kept), 2)
        for code, base, out in zip(codes, bases, outs, strict=True):
            wanted = base.clone()
            if code is not None:
                plain(code).apply(code, base, wanted)
            assert torch.equal(out, wanted)
        return [Applied(program, kept)]

    before: list[Applied] = []
    for _ in range(3):
        codes = [code_of(generator, "sparse", n) if n else None for n in sizes]
        before = written(codes, before)
    before = written([None] * len(sizes), before)
    program = Touches([(None, base, out) for base, out in zip(bases, outs, strict=True)])
    assert program.start(before) is None


def test_tensors_of_no_weights_do_not_stand_for_one_that_is_unknown() -> None:
    nothing, base, out, other = torch.zeros(0), torch.randn(100), torch.zeros(100), torch.randn(50)
    first = Touches([(None, nothing, nothing)])
    second = Touches([(None, nothing, nothing), (None, other, torch.zeros(50))])
    program = Touches([(None, nothing, nothing), (None, base, out)])
    by_threads(program.start([Applied(first), Applied(second)]), 2)
    assert torch.equal(out, base)
