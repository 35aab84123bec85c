"""Masks and shared vectors equal the paper's, computed naively, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import State, bits, fine_tune, make_base

import tallstore
from tallstore.bits import unpack_bits
from tallstore.dtypes import torch_dtype
from tallstore.errors import OptionError
from tallstore.ops import TALL_LEVELS

VECTOR_DTYPES = ["float32", "bfloat16", "float16"]
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def reference() -> ModuleType:
    import importlib

    return importlib.import_module("tallstore.kernels.reference")


# -- the paper, over whole vectors --------------------------------------------------------


def floats(state: State) -> list[str]:
    return [name for name, tensor in state.items() if tensor.is_floating_point()]


def flat(state: State, names: list[str]) -> torch.Tensor:
    return torch.cat([state[name].reshape(-1).float() for name in names])


def naive_ta(base: torch.Tensor, tuned: list[torch.Tensor]) -> torch.Tensor:
    merged = torch.zeros_like(base)
    for theta in tuned:
        merged = merged + (theta - base)
    return merged


def naive_ties(base: torch.Tensor, tuned: list[torch.Tensor], keep: float = 0.2) -> torch.Tensor:
    """TIES as its reference implementation has it: trim, elect, disjoint sum."""
    vectors = torch.stack([theta - base for theta in tuned])
    count = vectors.shape[1]
    k = count - int(count * keep)
    threshold = vectors.abs().kthvalue(k, dim=1, keepdim=True).values
    trimmed = vectors * (vectors.abs() >= threshold)
    total = torch.zeros(count)
    for row in trimmed:
        total = total + row
    signs = torch.sign(total)
    majority = torch.sign(signs.sum())
    signs[signs == 0] = majority
    merged = torch.zeros(count)
    for row in trimmed:
        merged = merged + torch.where(torch.where(signs > 0, row > 0, row < 0), row, 0.0)
    return merged


def naive_mask(
    base: torch.Tensor, tuned: torch.Tensor, vector: torch.Tensor, tall_lambda: float
) -> torch.Tensor:
    scale = torch.tensor(tall_lambda, dtype=torch.float32)
    return (base - tuned).abs() > ((base + vector) - tuned).abs() * scale


# -- what a store holds -------------------------------------------------------------------


def read_stream(store: Any, number: int) -> np.ndarray[Any, Any]:
    stream = store._snapshot.stream(number)
    data = np.empty(stream.raw, np.uint8)
    store._snapshot.read(stream, 0, data)
    return data


def stored_vector(store: Any, names: list[str]) -> torch.Tensor:
    """The shared vector as it is stored, as float32, in the order of `names`."""
    document = store._loader(None).base
    found = []
    for name in names:
        (tensor,) = [t for t in document.contents.tensors if t.name == name]
        place = document.layout.places[tensor.segment]
        raw = read_stream(store, store.vector.streams[place.arena])
        whole = torch.from_numpy(raw).view(torch_dtype(store.vector.dtype))
        found.append(whole[place.offset : place.offset + tensor.numel].float())
    return torch.cat(found)


def stored_mask(store: Any, task: str, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(mask, packed plane) of a tensor of a task; None where it is not coded."""
    loader = store._loader(task)
    (tensor,) = [t for t in loader.contents.tensors if t.name == name]
    (part,) = loader.task.parts[tensor.segment]
    if part.kind != "c":
        return None
    place = loader.base.layout.places[part.segment]
    (code,) = [c for c in loader.task.codes if c.arena == place.arena]
    assert code.planes is not None and place.offset % 8 == 0
    plane = read_stream(store, code.planes)[place.offset // 8 :][: (tensor.numel + 7) // 8]
    return torch.from_numpy(unpack_bits(plane, tensor.numel)), torch.from_numpy(plane)


def zoo(seed: int = 0, tasks: int = 3) -> tuple[State, dict[str, State]]:
    base = make_base(seed)
    return base, {f"t{i}": fine_tune(base, 10 * seed + i) for i in range(tasks)}


def check_against_paper(
    path: Path, base: State, tasks: dict[str, State], lambdas: dict[str, float]
) -> None:
    """Masks and loaded weights of a store against the naive rule and the reference."""
    plain = reference()
    names = floats(base)
    with tallstore.open(path) as store:
        assert store.vector is not None
        vector = stored_vector(store, names)
        whole = flat(base, names)
        coded = 0
        for task, tuned in tasks.items():
            mask = naive_mask(whole, flat(tuned, names), vector, lambdas[task])
            assert 0 < int(mask.sum()) < mask.numel(), "a mask of one value proves nothing"
            loaded = store.load(task)
            assert list(loaded) == list(tuned)
            start = 0
            ones = 0
            for name in names:
                count = base[name].numel()
                found = stored_mask(store, task, name)
                assert found is not None, f"{name} is not coded"
                kept, plane = found
                assert torch.equal(kept, mask[start : start + count]), (task, name)
                expected = plain.reconstruct(
                    base[name].reshape(-1),
                    plane.unsqueeze(0),
                    vector[start : start + count].to(torch_dtype(store.vector.dtype)),
                    TALL_LEVELS,
                    tuned[name].dtype,
                ).view(tuned[name].shape)
                assert loaded[name].dtype == tuned[name].dtype
                assert bits(loaded[name]) == bits(expected), (task, name)
                start += count
                ones += int(kept.sum())
                coded += count
            assert store.tasks[task].density == pytest.approx(ones / start)
            assert store.tasks[task].tall_lambda == lambdas[task]
            assert not store.tasks[task].exact
            error = sum(
                float((loaded[n].float() - tuned[n].float()).double().square().sum()) for n in names
            )
            moved = sum(
                float((base[n].float() - tuned[n].float()).double().square().sum()) for n in names
            )
            if all(tuned[n].dtype == torch.float32 for n in names):
                assert store.tasks[task].relative_error == pytest.approx(
                    (error / moved) ** 0.5, rel=1e-3
                )
        assert coded == len(tasks) * whole.numel()
        assert store.verify().ok


# -- masks --------------------------------------------------------------------------------


@pytest.mark.parametrize("vector_dtype", VECTOR_DTYPES)
@pytest.mark.parametrize("merge", ["ta", "ties"])
def test_masks_are_the_papers(tmp_path: Path, merge: str, vector_dtype: str) -> None:
    base, tasks = zoo()
    path = tmp_path / "z.tall"
    tallstore.pack(path, base, tasks, merge=merge, vector_dtype=vector_dtype, tall_lambda=0.4)
    check_against_paper(path, base, tasks, dict.fromkeys(tasks, 0.4))


@pytest.mark.parametrize("tall_lambda", [0.2, 0.3, 0.6, 1.0, 1 / 3])
def test_masks_at_other_lambdas(tmp_path: Path, tall_lambda: float) -> None:
    base, tasks = zoo(1, 4)
    path = tmp_path / "z.tall"
    tallstore.pack(path, base, tasks, tall_lambda=tall_lambda)
    check_against_paper(path, base, tasks, dict.fromkeys(tasks, tall_lambda))


@pytest.mark.parametrize(
    ("base_dtype", "task_dtypes"),
    [
        (torch.bfloat16, [torch.bfloat16, torch.bfloat16]),
        (torch.float16, [torch.float16, torch.float16]),
        (torch.float32, [torch.bfloat16, torch.float16, torch.float32]),
        (torch.bfloat16, [torch.float32, torch.float16]),
        (torch.float16, [torch.float32, torch.bfloat16]),
    ],
    ids=str,
)
@pytest.mark.parametrize("vector_dtype", VECTOR_DTYPES)
def test_masks_of_other_dtypes(
    tmp_path: Path, base_dtype: torch.dtype, task_dtypes: list[torch.dtype], vector_dtype: str
) -> None:
    base = make_base(2, base_dtype)
    tasks = {f"t{i}": fine_tune(base, i, dtype=d, step=0.05) for i, d in enumerate(task_dtypes)}
    path = tmp_path / "z.tall"
    tallstore.pack(path, base, tasks, vector_dtype=vector_dtype, tall_lambda=0.4)
    check_against_paper(path, base, tasks, dict.fromkeys(tasks, 0.4))


def test_masks_of_a_base_of_two_dtypes(tmp_path: Path) -> None:
    base = make_base(3)
    base["head.weight"] = base["head.weight"].half()
    base["norm.weight"] = base["norm.weight"].bfloat16()
    tasks = {f"t{i}": fine_tune(base, i, step=0.05) for i in range(3)}
    path = tmp_path / "z.tall"
    tallstore.pack(path, base, tasks, tall_lambda=0.4)
    check_against_paper(path, base, tasks, dict.fromkeys(tasks, 0.4))


def test_masks_where_rounding_decides(tmp_path: Path) -> None:
    # Small integers: |base - tuned| and |merged - tuned| * 0.5 are often equal, and > is strict.
    draw = torch.Generator().manual_seed(0)
    base = {"w": torch.randint(-4, 5, (4099,), generator=draw).float()}
    tasks = {
        f"t{i}": {"w": base["w"] + torch.randint(-2, 3, (4099,), generator=draw)} for i in range(3)
    }
    path = tmp_path / "z.tall"
    tallstore.pack(path, base, tasks, tall_lambda=0.5, vector_dtype="float32")
    vector = naive_ta(base["w"], [t["w"] for t in tasks.values()])
    ties = sum(
        int(((base["w"] - t["w"]).abs() == (base["w"] + vector - t["w"]).abs() * 0.5).sum())
        for t in tasks.values()
    )
    assert ties > 100
    check_against_paper(path, base, tasks, dict.fromkeys(tasks, 0.5))


def test_masks_over_several_spans_and_blocks(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    size = (1 << 20) + 12_345
    base = {"a": torch.randn(70_001, generator=draw), "b": torch.randn(size, generator=draw)}
    tasks = {f"t{i}": fine_tune(base, i) for i in range(2)}
    path = tmp_path / "z.tall"
    tallstore.pack(path, base, tasks, merge="ties", tall_lambda=0.4)
    check_against_paper(path, base, tasks, dict.fromkeys(tasks, 0.4))
    names = floats(base)
    with tallstore.open(path) as store:
        expected = naive_ties(flat(base, names), [flat(t, names) for t in tasks.values()])
        assert torch.equal(stored_vector(store, names), expected.bfloat16().float())


# -- the shared vector --------------------------------------------------------------------


@pytest.mark.parametrize("vector_dtype", VECTOR_DTYPES)
@pytest.mark.parametrize(("merge", "naive"), [("ta", naive_ta), ("ties", naive_ties)])
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_the_vector_is_the_naive_one(
    tmp_path: Path,
    merge: str,
    naive: Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor],
    vector_dtype: str,
    tasks: int,
) -> None:
    base, tuned = zoo(4, tasks)
    names = floats(base)
    path = tmp_path / "z.tall"
    tallstore.pack(path, base, tuned, merge=merge, vector_dtype=vector_dtype)
    expected = naive(flat(base, names), [flat(t, names) for t in tuned.values()])
    with tallstore.open(path) as store:
        assert store.vector is not None and store.vector.rule == merge
        assert store.vector.tasks == tuple(tuned)
        rounded = expected.to(FLOATS[vector_dtype]).float()
        assert torch.equal(stored_vector(store, names), rounded)
        if vector_dtype != "float32":
            assert not torch.equal(rounded, expected), "nothing was rounded"


def test_ties_takes_the_majority_where_signs_cancel(tmp_path: Path) -> None:
    for flip in (1, -1):
        base = {"w": torch.zeros(400)}
        up, down = torch.zeros(400), torch.zeros(400)
        up[:20], down[:20] = 3.0, -3.0  # sums of zero, elected by the majority
        up[20:50] = 2.0 * flip
        tasks = {"up": {"w": up}, "down": {"w": down}}
        path = tmp_path / f"z{flip}.tall"
        tallstore.pack(path, base, tasks, merge="ties", vector_dtype="float32")
        expected = naive_ties(base["w"], [up, down])
        assert expected[:20].tolist() == [3.0 * flip] * 20
        with tallstore.open(path) as store:
            assert torch.equal(stored_vector(store, ["w"]), expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 4), st.integers(0, 10**6))
def test_ties_rule_on_small_integers(size: int, tasks: int, seed: int) -> None:
    # Many equal magnitudes, zeros and cancelling sums; through the rule's own surveys.
    from tallstore.merging import Stretch, Ties

    names = tuple(f"t{i}" for i in range(tasks))
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.randint(-3, 4, (tasks, size), generator=draw).float()
    rule: Any = Ties()
    while rule.surveys:
        cut = size // 2
        total = sum(
            rule.survey(Stretch(tasks=names, vectors=piece.numpy()))
            for piece in (vectors[:, :cut].contiguous(), vectors[:, cut:].contiguous())
            if piece.numel()
        )
        rule = rule.conclude(total, weights=np.full(tasks, size))
    merged = torch.from_numpy(rule.merge(Stretch(tasks=names, vectors=vectors.numpy())))
    assert torch.equal(merged, naive_ties(torch.zeros(size), list(vectors)))


def test_a_sum_that_overflows_float16_stays_finite(tmp_path: Path) -> None:
    base = {"w": torch.zeros(16)}
    tasks = {f"t{i}": {"w": torch.full((16,), 40_000.0)} for i in range(2)}
    path = tmp_path / "z.tall"
    tallstore.pack(path, base, tasks, vector_dtype="float16", exact=True)
    with tallstore.open(path) as store:
        assert torch.equal(stored_vector(store, ["w"]), torch.full((16,), 65504.0))
        assert_same(store.load("t0"), tasks["t0"])


def test_what_is_not_finite_stays_out_of_the_vector(tmp_path: Path) -> None:
    base, tasks = zoo(5, 2)
    tasks["t0"]["scale"] = torch.tensor(float("nan"))
    tasks["t0"]["norm.weight"][3] = float("-inf")
    path = tmp_path / "z.tall"
    tallstore.pack(path, base, tasks, vector_dtype="float32")
    names = ["scale", "norm.weight"]
    with tallstore.open(path) as store:
        expected = naive_ta(flat(base, names), [flat(tasks["t0"], names), flat(tasks["t1"], names)])
        alone = flat(tasks["t1"], names) - flat(base, names)
        expected = torch.where(expected.isfinite(), expected, alone)
        assert torch.equal(stored_vector(store, names), expected)
        # and the tensors that hold it are kept as they are
        assert stored_mask(store, "t0", "scale") is None
        kept = {name: tasks["t0"][name] for name in ("norm.weight", "scale")}
        assert_same(store.load("t0", names=names), kept)


# -- lambda -------------------------------------------------------------------------------


def test_the_best_lambda_is_chosen_with_the_weights_that_will_load(tmp_path: Path) -> None:
    base, tasks = zoo(6, 3)
    tasks["t0"]["norm.weight"][0] = float("nan")  # kept as it is, at every lambda
    tasks["t1"]["positions"] = tasks["t1"]["positions"] + 1
    del tasks["t2"]["scale"]
    tasks["t2"]["extra"] = torch.ones(3)
    grid = (0.6, 0.2, 0.4, 0.2)
    seen: dict[tuple[str, float], State] = {}
    scores = {
        "t0": {0.2: 1.0, 0.4: 3.0, 0.6: 2.0},
        "t1": {0.2: 5.0, 0.4: 5.0, 0.6: 5.0},
        "t2": {0.2: -3.0, 0.4: float("-inf"), 0.6: -1},
    }
    order: dict[str, list[float]] = {name: [] for name in tasks}

    def evaluate(task: str, state: State) -> float:
        value = sorted(set(grid))[len(order[task])]
        order[task].append(value)
        seen[task, value] = {name: tensor.clone() for name, tensor in state.items()}
        for tensor in state.values():
            tensor.zero_()  # the caller's to spoil
        return scores[task][value]

    path = tmp_path / "z.tall"
    tallstore.pack(path, base, tasks, tall_lambda=grid, evaluate=evaluate)
    assert order == {name: [0.2, 0.4, 0.6] for name in tasks}
    with tallstore.open(path) as store:
        assert {n: t.tall_lambda for n, t in store.tasks.items()} == {
            "t0": 0.4,
            "t1": 0.2,  # a tie goes to the smallest
            "t2": 0.6,
        }
        assert {n: t.score for n, t in store.tasks.items()} == {"t0": 3.0, "t1": 5.0, "t2": -1.0}
    for value in sorted(set(grid)):
        other = tmp_path / f"z{value}.tall"
        tallstore.pack(other, base, tasks, tall_lambda=value)
        for task in tasks:
            assert_same(seen[task, value], tallstore.load(other, task=task))
    assert bits(seen["t0", 0.2]["head.weight"]) != bits(seen["t0", 0.6]["head.weight"])


def test_a_score_of_numpy_or_torch_is_a_number(tmp_path: Path) -> None:
    base, tasks = zoo(7, 1)
    for number, score in enumerate((np.float32(2.5), torch.tensor(2.5), 2)):
        path = tmp_path / f"z{number}.tall"
        tallstore.pack(path, base, tasks, evaluate=lambda task, state, score=score: score)
        with tallstore.open(path) as store:
            assert store.tasks["t0"].score == float(score)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda: float("nan"), r"evaluate\('t0', \.\.\.\) gave NaN at lambda 0.2; give a number"),
        (lambda: 1 / 0, r"evaluate\('t0', \.\.\.\) failed at lambda 0.2: ZeroDivisionError"),
        (lambda: None, r"evaluate\('t0', \.\.\.\) failed at lambda 0.2: TypeError"),
    ],
)
def test_evaluate_that_fails(tmp_path: Path, score: Callable[[], Any], message: str) -> None:
    base, tasks = zoo(8, 1)
    path = tmp_path / "z.tall"
    with pytest.raises(OptionError, match=message):
        tallstore.pack(
            path, base, tasks, tall_lambda=(0.2, 0.4), evaluate=lambda task, state: score()
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "value",
    [0, -0.4, float("nan"), float("inf"), [], [0.2, 0.0], "0.4"],
)
def test_lambdas_that_make_no_sense(tmp_path: Path, value: Any) -> None:
    base, tasks = zoo(9, 1)
    with pytest.raises(OptionError, match="tall_lambda="):
        tallstore.pack(
            tmp_path / "z.tall", base, tasks, tall_lambda=value, evaluate=lambda task, state: 0.0
        )
    assert list(tmp_path.iterdir()) == []


def test_several_lambdas_take_an_evaluate(tmp_path: Path) -> None:
    base, tasks = zoo(9, 1)
    with pytest.raises(OptionError, match="choosing one of several takes evaluate"):
        tallstore.pack(tmp_path / "z.tall", base, tasks, tall_lambda=[0.2, 0.4])


def test_rules_and_dtypes_that_do_not_exist(tmp_path: Path) -> None:
    base, tasks = zoo(9, 1)
    with pytest.raises(OptionError, match="no merge rule is called 'mean'; there are ta, "):
        tallstore.pack(tmp_path / "z.tall", base, tasks, merge="mean")
    with pytest.raises(OptionError, match="vector_dtype='int2': bfloat16, float16, float32"):
        tallstore.pack(tmp_path / "z.tall", base, tasks, vector_dtype="int2")
