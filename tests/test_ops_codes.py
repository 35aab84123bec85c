"""Encoders, sparse codes and residuals of `ops`: backends agree, and clashes are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_helpers import CPU_BACKENDS
from zoo import bits

from tallstore import ops
from tallstore.errors import DeviceError, MismatchError, OptionError
from tallstore.kernels.seeded_reference import SeededTensor, build, value_groups

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [*((name, "cpu") for name in (*CPU_BACKENDS, "reference")), ("triton", DEVICE)]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = torch.tensor([[-0.0, 0.5, -0.25, 2.0], [-0.0, -1.0, 1.0, 0.125]])


def draw(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    values[::5] = -0.0
    return values.to(dtype)


def draw_planes(count: int, n: int, seed: int, density: float = 0.1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(count, -(-n // 8), 8, generator=generator) < density
    return (keep * (1 << torch.arange(8))).sum(2).to(torch.uint8)


def moved(value: Any, device: str) -> Any:
    return value.to(device) if hasattr(value, "to") else value


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 9000),
    dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 2),
    densities=st.tuples(*[st.sampled_from([0.0, 0.01, 0.3])] * 2),
    dense_from=st.sampled_from([0.0, 0.06, 9.0]),
    seed=st.integers(0, 99),
)
def test_a_switch_is_a_full_reconstruction(
    n: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    densities: tuple[float, float],
    dense_from: float,
    seed: int,
) -> None:
    base = draw(n, dtypes[0], seed)
    rows = torch.arange(-(-n // 1024), dtype=torch.int32) % 2
    planes = [draw_planes(2, n, seed + i, density) for i, density in enumerate(densities)]
    wanted = torch.empty(n, dtype=dtypes[1])
    ops.reconstruct(base, planes[1], None, LEVELS, wanted, rows=rows)
    for backend, device in BACKENDS:
        old, new = (
            ops.compress_planes(p.to(device), n, LEVELS.to(device), rows=rows.to(device))
            for p in planes
        )
        there = base.to(device)
        out = there.to(dtypes[1]).clone()
        ops.apply_sparse(old, there, out, backend=backend)
        ops.switch_sparse(old, new, there, out, backend=backend, dense_from=dense_from)
        assert bits(out.cpu()) == bits(wanted)
        ops.restore_sparse(new, there, out, backend=backend)
        assert bits(out.cpu()) == bits(base.to(dtypes[1]))
        again = ops.expand_sparse(new, backend=backend)[:, : planes[1].shape[1]].cpu()
        tail = (1 << (n % 8 or 8)) - 1
        trimmed = planes[1].clone()
        trimmed[:, -1] &= tail
        assert torch.equal(again, trimmed)


def seeded(numels: list[int], stride: int, count: int, seed: int) -> ops.SeededCode:
    tensors, offset = [], 0
    for number, numel in enumerate(numels):
        tensors.append(
            SeededTensor(seed=seed, number=number, stride=stride, offset=offset, numel=numel)
        )
        offset += -(-numel // 1024) * 1024
    groups = value_groups(tensors)[-1]
    planes = draw_planes(count, groups, seed, 0.5)
    table = torch.randn(len(numels), 1 << count, generator=torch.Generator().manual_seed(seed))
    return build(tensors, planes, table, offset)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_from_seeded_to_sparse_and_back(count: int) -> None:
    numels = [3000, 5, 1024]
    code = seeded(numels, 7, count, 3)
    n = code.weights
    assert ops.density(code) == sum(-(-numel // 7) for numel in numels) / n
    base = draw(n, torch.bfloat16, 1)
    sparse = ops.compress_planes(draw_planes(2, n, 2, 0.02), n, LEVELS)
    for backend, device in BACKENDS:
        there = base.to(device)
        a, b = code.to(device), sparse.to(device)
        wanted = {}
        for name, one in (("a", a), ("b", b)):
            wanted[name] = there.clone()
            ops.apply_sparse(one, there, wanted[name], backend="reference")
        out = there.clone()
        ops.apply_sparse(a, there, out, backend=backend)
        assert bits(out.cpu()) == bits(wanted["a"].cpu())
        for limit in (9.0, 0.0):
            ops.switch_sparse(a, b, there, out, backend=backend, dense_from=limit)
            assert bits(out.cpu()) == bits(wanted["b"].cpu())
            ops.switch_sparse(b, a, there, out, backend=backend, dense_from=limit)
            assert bits(out.cpu()) == bits(wanted["a"].cpu())
        if count == 4:
            with pytest.raises(OptionError, match="make 17 codes; 4 planes hold 16"):
                ops.expand_sparse(a, backend=backend)


@pytest.mark.parametrize("dtype", FLOATS)
def test_encoders_agree(dtype: torch.dtype) -> None:
    n = 2500
    base, vector = draw(n, dtype, 1), draw(n, dtype, 2) * 0.1
    tuned = (base.float() + 0.1 * draw(n, torch.float32, 3)).to(dtype)
    table = torch.tensor([[-0.1, 0.0, 0.05, 0.2], [0.0, 1.0, 2.0, -1.0]])
    rows = torch.tensor([1, 0, 1], dtype=torch.int32)
    found = []
    for backend, device in (("reference", "cpu"), ("triton", DEVICE)):
        b, v, t = (x.to(device) for x in (base, vector, tuned))
        plane = torch.full((-(-n // 8),), 0xAA, dtype=torch.uint8, device=device)
        planes = torch.full((2, -(-n // 8)), 0xAA, dtype=torch.uint8, device=device)
        tall, level = ops.TallSums.empty(3, device), ops.LevelSums.empty(3, 2, device)
        ops.encode_tall(b, v, t, plane, tall_lambda=0.4, sums=tall, backend=backend)
        ops.encode_levels(
            b, None, t, table.to(device), planes, rows=rows.to(device), sums=level, backend=backend
        )
        found.append((plane.cpu(), planes.cpu(), tall, level))
    (a, c, tall, level), (b, d, other, others) = found
    assert torch.equal(a, b) and torch.equal(c, d)
    ranges = [(0, 2), (2, 3), (0, 3)]
    for mine, theirs in ((tall, other), (level, others)):
        one, two = ops.reduce_sums(mine, ranges), ops.reduce_sums(theirs, ranges)
        for name in type(one).__slots__:
            x, y = getattr(one, name).cpu(), getattr(two, name).cpu()
            assert torch.equal(x, y) if not x.is_floating_point() else torch.allclose(x, y, 1e-5)


def test_what_does_not_fit_is_refused() -> None:
    base, plane = torch.ones(2048), torch.zeros(256, dtype=torch.uint8)
    code = ops.compress_planes(torch.zeros(2, 256, dtype=torch.uint8), 2048, LEVELS)
    few = ops.TallSums.empty(1, "cpu")

    def encode(*weights: torch.Tensor, into: torch.Tensor = plane, **options: Any) -> None:
        ops.encode_tall(*weights, into, tall_lambda=1.0, **options)

    cases: list[tuple[Any, str]] = [
        (
            lambda: encode(base, base[:5], base),
            r"vector: shape \(5,\)",
        ),
        (lambda: encode(base, base, base, into=plane[:9]), "9 bytes for 2048"),
        (
            lambda: encode(base, base, base, start=5),
            "multiple of 1024",
        ),
        (
            lambda: encode(base, base, base, stop=4096),
            "to 4096 of 2048",
        ),
        (
            lambda: encode(base, base, base, sums=few),
            "1 blocks for 2",
        ),
        (lambda: ops.encode_levels(base, None, base, LEVELS, plane[None]), r"shape \(2, 4\)"),
        (lambda: ops.apply_sparse(code, base[:2000], base[:2000]), r"base: shape \(2000,\)"),
        (lambda: ops.apply_sparse(code, base, base.to("meta")), "several devices: base on cpu"),
        (lambda: ops.switch_sparse(code, code, base, base), "out: it is the base itself"),
        (lambda: ops.add_residual(base, plane, base), r"zigzag: torch.uint8, shape \(256,\)"),
        (lambda: ops.add_residual(base, plane, base.double()), "zigzag"),
    ]
    for call, message in cases:
        with pytest.raises(MismatchError, match=message):
            call()
    with pytest.raises(OptionError, match=r"level of code 0 is \[0.0\]; -0.0 is needed"):
        ops.compress_planes(torch.zeros(1, 256, dtype=torch.uint8), 2048, torch.zeros(1, 2))
    assert torch.equal(base, torch.ones(2048))


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn,
     torch.int64, torch.int32, torch.int16, torch.int8, torch.bool],
)  # fmt: skip
def test_residuals_bring_back_the_bits(dtype: torch.dtype) -> None:
    from tallstore.coding import residual

    n = 1500
    generator = torch.Generator().manual_seed(1)
    size = n * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    raw = [torch.randint(0, high, (size,), generator=generator).to(torch.uint8) for _ in range(2)]
    actual, predicted = (r.view(dtype) for r in raw)
    zigzag = torch.from_numpy(
        residual(raw[0].numpy(), raw[1].numpy(), str(dtype).removeprefix("torch."))
    )
    for backend, device in (("cpu", "cpu"), ("reference", "cpu"), ("triton", DEVICE)):
        out = predicted.clone().to(device)
        ops.add_residual(out, zigzag.to(device), out, backend=backend)
        assert bits(out.cpu()) == bits(actual), backend


def test_counts_agree() -> None:
    n, tasks = 5000, 9
    masks = draw_planes(tasks, n, 3, 0.3)
    masks[:, -1] &= (1 << (n % 8 or 8)) - 1
    starts = [0, 1024, 3072]
    found = []
    for backend, device in (("cpu", "cpu"), ("reference", "cpu"), ("triton", DEVICE)):
        there = masks.to(device)
        uses = torch.full((n,), 99, dtype=torch.uint8, device=device)
        ops.count_uses(there, uses, backend=backend)
        flags = torch.empty(n, dtype=torch.bool, device=device)
        ops.unpack(there[:1], flags, backend=backend)
        code = torch.empty(n, dtype=torch.uint8, device=device)
        ops.unpack(there[:3], code, backend=backend)
        tally = ops.tally(there, starts, n, backend=backend)
        found.append(
            [
                uses.tolist(),
                flags.tolist(),
                code.tolist(),
                *(ops.at_least(there, k, n, backend=backend).tolist() for k in (0, 1, 4, 9, 10)),
                ops.use_histogram(there, stop=n, backend=backend).tolist(),
                ops.mask_overlaps(there, backend=backend).tolist(),
                ops.mask_overlaps(there, start=1024, stop=3000, backend=backend).tolist(),
                tally.ones.tolist(),
                tally.exclusive.tolist(),
                tally.used_by.tolist(),
            ]
        )
    assert found[0] == found[1] == found[2]


def test_counts_refuse_what_does_not_fit() -> None:
    masks, out = torch.zeros(3, 16, dtype=torch.uint8), torch.zeros(128, dtype=torch.uint8)
    cases: list[tuple[type[Exception], Any, str]] = [
        (MismatchError, lambda: ops.count_uses(masks[:, :9], out), "9 bytes for 128 weights"),
        (MismatchError, lambda: ops.count_uses(masks.int(), out), "masks: torch.int32"),
        (MismatchError, lambda: ops.count_uses(masks[:0], out), r"masks: torch.uint8, shape \(0,"),
        (MismatchError, lambda: ops.count_uses(masks, out.int()), "out: torch.int32"),
        (MismatchError, lambda: ops.count_uses(masks[:, ::2], out[:64]), "one after the other"),
        (MismatchError, lambda: ops.use_histogram(masks, start=5), "multiple of 1024"),
        (MismatchError, lambda: ops.unpack(masks, out.bool()), "out: torch.bool"),
        (OptionError, lambda: ops.at_least(masks, -1, 128), "k=-1"),
        (
            OptionError,
            lambda: ops.at_least(masks[:1].to(DEVICE).expand(65, -1), 1, 128, backend="triton"),
            "65 masks; 64 can be counted",
        ),
    ]
    for kind, call, message in cases:
        with pytest.raises(kind, match=message):
            call()


@settings(max_examples=15, deadline=None)
@given(
    numels=st.lists(st.integers(0, 6000), max_size=4),
    stride=st.integers(1, 3000),
    count=st.integers(1, 4),
    turned=st.booleans(),
    seed=st.integers(0, 99),
)
def test_places_of_seeded_values(
    numels: list[int], stride: int, count: int, turned: bool, seed: int
) -> None:
    code = seeded(numels, stride, count, seed)
    if turned:
        tensors = code.tensors[::-1]
        planes = draw_planes(count, value_groups(tensors)[-1], seed, 0.5)
        code = build(tensors, planes, code.table, code.weights)
    base = draw(code.weights, torch.float32, seed)
    wanted = base.clone()
    ops.apply_sparse(code, base, wanted, backend="reference")
    for backend in CPU_BACKENDS:
        found = ops.locate_seeded(code, backend=backend)
        assert found.entries.numel() == sum(tensor.groups for tensor in code.tensors)
        for other in (*CPU_BACKENDS, "reference"):
            out = base.clone()
            ops.apply_sparse(found, base, out, backend=other)
            assert bits(out) == bits(wanted), (backend, other)
    with pytest.raises(DeviceError, match="on the CPU; move the code"):
        ops.locate_seeded(code, backend="reference")
