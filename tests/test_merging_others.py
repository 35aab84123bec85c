"""Merge rules beside public implementations of them, where those are installed.

Run with ``-m long``, where PEFT and mergekit can be imported, or in an environment into which
``pip install --no-deps peft mergekit`` put them: only files that need torch alone are loaded.
On random tensors, and on the MiniLM zoo where TALLSTORE_BENCH_ZOO names it.

Known differences, each shown by a test:

- PEFT and mergekit trim each tensor by itself, keeping int(density * n) weights; ours trims the
  whole vector and keeps int(keep * n) + 1, as the reference implementation of TIES does. Within one
  tensor the two are one if asked for the same number.
- Both take plus where the entries sum to zero: ``zero_sign="positive"``. Ours takes the majority's
  sign, as the reference does.
- PEFT divides by the number of agreeing entries: ``combine="mean"``.
- Among equal magnitudes at a threshold both keep as many as fit, in no order; ours keeps all.
- mergekit's older outlier slice was empty when nothing was to be cut at the bottom; today's is not,
  and ours is not.
- mergekit's SCE takes equal weights where the mean squares of a tensor add up to less than 1e-6,
  which those of real fine-tunes do; ours has no such limit. Elsewhere the two differ in the last
  bits: mergekit adds squares in float32, ours adds them exactly.
- DARE draws at random: the law is compared, not the draws.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Optional

import numpy as np
import pytest
import torch

from tallstore.layout import lay_out
from tallstore.mergestream.survey import merge_span, spans, survey
from tallstore.merging import Breadcrumbs, MergeRule, Sce, TaskArithmetic, Ties, merge_rule
from tallstore.specs import SegmentSpec
from tallstore.workers import workers

pytestmark = pytest.mark.long


def place(package: str, path: str) -> Path:
    """A file of a package, without importing the package: those need far more than torch."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(next(iter(found.submodule_search_locations))) / path


def functions(package: str, path: str, *names: str) -> list[Any]:
    """Functions out of a file whose imports are not there."""
    tree = ast.parse(place(package, path).read_text())
    chosen = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    assert len(chosen) == len(names), f"{package} has changed: {path}"
    space: dict[str, Any] = {"torch": torch, "Optional": Optional, "Literal": Literal}
    exec(compile(ast.Module(chosen, []), path, "exec"), space)
    return [space[name] for name in names]


def module(package: str, path: str) -> ModuleType:
    """One file of a package."""
    file = place(package, path)
    spec = importlib.util.spec_from_file_location(f"beside_{package}_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def peft() -> ModuleType:
    return module("peft", "utils/merge_utils.py")


@pytest.fixture(scope="module")
def sparsify() -> ModuleType:
    return module("mergekit", "sparsify.py")


class OneTensor:
    """Task vectors of one tensor, in memory."""

    def __init__(self, vectors: torch.Tensor) -> None:
        self.flat = vectors.flatten(1).numpy()
        self.layout = lay_out([SegmentSpec("float32", self.flat.shape[1])])
        self.shapes = {0: ("w", tuple(vectors.shape[1:]))}
        self.tasks = tuple(f"t{n}" for n in range(len(self.flat)))
        self.arenas = [0]

    def open(self, arena: int, span: int) -> Any:
        size = self.layout.arenas[0].span
        piece = np.zeros((len(self.flat), min(size, self.layout.arenas[0].weights - span * size)))
        here = self.flat[:, span * size : (span + 1) * size]
        piece[:, : here.shape[1]] = here
        whole = piece.astype(np.float32)

        class Opened:
            count = whole.shape[1]
            nbytes = count

            def vectors(self, start: int, stop: int) -> Any:
                return whole[:, start:stop].copy()

            def masks(self, start: int, stop: int) -> None:
                return None

        return Opened()

    def held(self, arena: int, start: int, count: int) -> Any:
        inside = max(min(start + count, self.flat.shape[1]) - start, 0)
        return np.full(len(self.flat), inside, np.int64)


def ours(rule: MergeRule, vectors: torch.Tensor) -> torch.Tensor:
    feed = OneTensor(vectors)
    with workers(1) as pool:
        surveyed = survey(rule, feed, workers=pool, progress=lambda _: None)
    merged = [merge_span(surveyed, feed, a, s, feed.open(a, s)) for a, s in spans(feed)]
    flat = np.concatenate(merged)[: feed.flat.shape[1]]
    return torch.from_numpy(flat).reshape(vectors.shape[1:])


def _random() -> Iterator[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    for shape in ((64, 48), (1000,), (7, 3, 5)):
        yield torch.randn((4, *shape), generator=draw)


def _real() -> Iterator[torch.Tensor]:
    folder = os.environ.get("TALLSTORE_BENCH_ZOO")
    if not folder:
        return
    from safetensors.torch import load_file

    states = {p.name: load_file(p / "model.safetensors") for p in sorted(Path(folder).iterdir())}
    base = states.pop("base")
    for name in list(base)[5:30:6]:
        if base[name].is_floating_point():
            yield torch.stack([state[name] - base[name] for state in states.values()])


@functools.cache
def _tensors() -> list[torch.Tensor]:
    return [*_random(), *_real()]


@pytest.fixture(params=range(8))
def vectors(request: pytest.FixtureRequest) -> torch.Tensor:
    found = _tensors()
    if request.param >= len(found):
        pytest.skip("no such tensor; TALLSTORE_BENCH_ZOO names no zoo")
    return found[request.param]


def at_a_limit(vectors: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """Where some task is as large as its one of a rank, counted from 0 at the largest.

    Where that is not one weight alone, any of them may be kept.
    """
    magnitudes = vectors.flatten(1).abs()
    ordered = magnitudes.sort(dim=1, descending=True).values
    found = torch.zeros_like(magnitudes[0], dtype=torch.bool)
    for rank in ranks:
        found |= (magnitudes == ordered[:, rank : rank + 1]).any(dim=0)
    return found.reshape(vectors.shape[1:])


def assert_alike_elsewhere(
    found: torch.Tensor, theirs: torch.Tensor, tied: torch.Tensor, **close: float
) -> None:
    """Equal but for rounding, save at a threshold's equals, which are few."""
    torch.testing.assert_close(found[~tied], theirs[~tied], **close)
    assert float(tied.float().mean()) < 0.2


def keep_of(density: float, count: int) -> float:
    """The share with which ours keeps int(density * count) of `count` weights."""
    return (int(density * count) - 0.5) / count


@pytest.mark.parametrize("density", [0.1, 0.2, 0.5])
def test_ties_of_peft(peft: ModuleType, vectors: torch.Tensor, density: float) -> None:
    count = vectors[0].numel()
    theirs = peft.ties(list(vectors), torch.ones(len(vectors)), density)
    rule = Ties(keep=keep_of(density, count), combine="mean", zero_sign="positive")
    tied = at_a_limit(vectors, [int(density * count) - 1])
    assert_alike_elsewhere(ours(rule, vectors), theirs, tied, rtol=1e-5, atol=1e-8)


def test_peft_keeps_one_weight_less(peft: ModuleType) -> None:
    vectors = torch.arange(1.0, 101).reshape(1, 100)
    assert int((peft.ties(list(vectors), torch.ones(1), 0.2) != 0).sum()) == 20
    assert int((ours(Ties(combine="mean"), vectors) != 0).sum()) == 21
    assert int((ours(Ties(keep=keep_of(0.2, 100)), vectors) != 0).sum()) == 20


def test_peft_takes_plus_where_entries_cancel(peft: ModuleType) -> None:
    vectors = torch.tensor([[2.0, -1, -1, -1], [-2.0, -1, -1, -1]])
    theirs = peft.ties(list(vectors), torch.ones(2), 0.99999)
    with pytest.warns(UserWarning, match="no pruning"):
        theirs = peft.ties(list(vectors), torch.ones(2), 1.0)
    plus = ours(Ties(keep=1, combine="mean", zero_sign="positive"), vectors)
    assert torch.equal(plus, theirs) and plus[0] == 2
    assert ours(Ties(keep=1, combine="mean"), vectors)[0] == -2


def test_sums_of_peft(peft: ModuleType, vectors: torch.Tensor) -> None:
    theirs = peft.task_arithmetic(list(vectors), torch.ones(len(vectors)))
    torch.testing.assert_close(ours(TaskArithmetic(), vectors), theirs, rtol=1e-5, atol=1e-7)


def test_dare_of_peft_has_the_same_law(peft: ModuleType) -> None:
    vectors = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    theirs = peft.dare_linear(list(vectors), torch.ones(1), 0.1)
    found = ours(merge_rule("dare", drop=0.9), vectors)
    for merged in (theirs, found):
        kept = merged != 0
        assert abs(float(kept.float().mean()) - 0.1) < 0.005
        torch.testing.assert_close(merged[kept], 10 * vectors[0][kept], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("beta", "gamma"), [(0.85, 0.01), (0.5, 0.1), (0.0, 0.05), (0.25, 0.0)])
def test_breadcrumbs_of_mergekit(
    sparsify: ModuleType, vectors: torch.Tensor, beta: float, gamma: float
) -> None:
    count = vectors[0].numel()
    density = (count - int(beta * count) - int(gamma * count) + 0.5) / count
    kept = [sparsify.magnitude_outliers(v, density, gamma=gamma) for v in vectors]
    theirs = torch.stack(kept).sum(0)
    found = ours(Breadcrumbs(beta=beta, gamma=gamma), vectors)
    tied = at_a_limit(vectors, [int(gamma * count), count - int(beta * count) - 1])
    assert_alike_elsewhere(found, theirs, tied, rtol=1e-5, atol=1e-7)


def test_nothing_to_cut_at_the_bottom(sparsify: ModuleType) -> None:
    vectors = torch.arange(1.0, 101).reshape(1, 100)
    theirs = sparsify.magnitude_outliers(vectors[0], 0.9, gamma=0.1)
    found = ours(Breadcrumbs(beta=0, gamma=0.1), vectors)
    assert torch.equal(found, theirs) and int((found != 0).sum()) == 90


def test_equal_magnitudes_are_all_kept(sparsify: ModuleType) -> None:
    vectors = torch.ones(1, 100)
    assert int((sparsify.magnitude_outliers(vectors[0], 0.5, gamma=0.1) != 0).sum()) == 50
    assert int((ours(Breadcrumbs(beta=0.4, gamma=0.1), vectors) != 0).sum()) == 100


@pytest.mark.parametrize("select", [0.1, 0.5, 1.0])
def test_sce_of_mergekit(vectors: torch.Tensor, select: float) -> None:
    vectors = vectors * 2.0**14  # exact, and away from mergekit's absolute limits
    theirs = mergekit_sce(vectors, select)
    found = ours(Sce(select=select), vectors)
    differing = ~torch.isclose(found, theirs, rtol=1e-4, atol=1e-4)
    # Variances that float32 cannot tell apart may fall on either side of the threshold.
    assert int(differing.sum()) <= 2 + differing.numel() // 10_000, int(differing.sum())


def test_mergekit_weighs_small_moves_alike() -> None:
    """Where mean squares are below 1e-6, as those of fine-tunes are, it does not weigh at all."""
    vectors = torch.tensor([[3.0, 1, 2, 4], [1.0, 1, 1, 1]])
    for scale, weighs in ((1.0, True), (2.0**-13, False)):
        theirs = mergekit_sce(vectors * scale, 1.0) / scale
        assert torch.allclose(ours(Sce(select=1.0), vectors * scale) / scale, theirs) is weighs
        plain = vectors.mean(0)
        assert torch.allclose(theirs, plain) is not weighs


def mergekit_sce(vectors: torch.Tensor, select: float) -> torch.Tensor:
    """mergekit's functions, called in the order in which its method calls them."""
    (get_mask,) = functions("mergekit", "merge_methods/generalized_task_arithmetic.py", "get_mask")
    sce_mask, sce_weight = functions("mergekit", "merge_methods/sce.py", "sce_mask", "sce_weight")
    if select < 1:
        vectors = vectors * sce_mask(vectors, select, vectors.dtype).unsqueeze(0)
    weights = sce_weight(vectors).reshape(-1, *[1] * (vectors.dim() - 1))
    left = weights * get_mask(vectors, method="sum")
    return (vectors * left).sum(0) / left.sum(0).clamp(min=1e-6)
