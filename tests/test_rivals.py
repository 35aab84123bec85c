"""The codes that the frontier compares with: what they keep, and that their bits are counted."""

from __future__ import annotations

import math

import pytest
import torch

from bench.entrants import entrants
from bench.rivals.bitdelta import bitdelta
from bench.rivals.emr import emr
from bench.rivals.lowrank import tsv
from bench.rivals.masks import tall
from bench.rivals.pruning import compeft, dare, magnitude, t_switch, ultradelta
from bench.rivals.quantization import tvq
from bench.rivals.vectors import Vectors, entropy, largest, quantized_shared


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    torch.manual_seed(1)
    base = {
        "a.weight": torch.randn(64, 48),
        "a.bias": torch.randn(64),
        "still.weight": torch.randn(40, 8),
        "counter": torch.tensor(3),
    }
    tasks = {}
    for name in ("one", "two", "three"):
        state = {n: t + 0.01 * torch.randn(t.shape) for n, t in base.items() if "a." in n}
        tasks[name] = {**base, **state, "head": torch.randn(3, 4)}
    found: Vectors = Vectors.of(base, tasks)
    return found


def test_vectors_are_what_all_models_share(vectors: Vectors) -> None:
    assert vectors.layout.names == ("a.weight", "a.bias", "still.weight")
    assert vectors.layout.weights == 64 * 48 + 64 + 320
    state = vectors.state({"head": torch.zeros(1)}, vectors.tasks["one"])
    assert state["a.weight"].shape == (64, 48) and set(state) == {*vectors.layout.names, "head"}


class Net(torch.nn.Module):
    """What has the tensors of the vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.still = torch.nn.Linear(48, 64), torch.nn.Linear(8, 40, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.still(x[:, :8])], 1)


@pytest.mark.parametrize("entrant", entrants(), ids=lambda e: f"{e.name}, {e.setting}")
def test_every_entrant_runs_with_a_tensor_that_did_not_move(entrant, vectors) -> None:
    given = {"seed": 5} if entrant.random else {}
    if entrant.values:
        given[entrant.chosen] = entrant.values[-1]
    if entrant.calibrated:
        given["calibrate"] = lambda _: (Net(), [torch.rand(4, 48)])
    coded = entrant.make(vectors, **given)
    assert set(coded.vectors) == set(vectors.tasks)
    for vector in coded.vectors.values():
        assert vector.shape == vectors.base.shape and bool(vector.isfinite().all())
    assert coded.bits >= 0


def test_more_bits_come_closer(vectors: Vectors) -> None:
    def error(coded) -> float:
        return sum(float((coded.vectors[t] - v).norm()) for t, v in vectors.tasks.items())

    for first, second in (
        (magnitude(vectors, density=0.1), magnitude(vectors, density=0.5)),
        (tvq(vectors, bits=2), tvq(vectors, bits=4)),
        (tsv(vectors, share=0.2), tsv(vectors, share=0.8)),
    ):
        assert first.bits < second.bits and error(first) > error(second)


def test_bits_are_those_of_the_symbols(vectors: Vectors) -> None:
    def entropy_of(p: float) -> float:
        return -p * math.log2(p) - (1 - p) * math.log2(1 - p)

    moved = (64 * 48 + 64) / vectors.layout.weights
    scales = 3 * 32 / vectors.layout.weights
    near = pytest.approx
    signs = moved * (entropy_of(0.1) + 0.1) + scales
    assert t_switch(vectors, density=0.1).bits == near(signs, rel=0.02)
    assert dare(vectors, density=0.1, seed=0).bits == near(1.6, rel=0.2)
    assert magnitude(vectors, density=0.1).bits == near(signs + 0.7 * moved, rel=0.02)
    assert bitdelta(vectors).bits == near((64 * 48 + 16 * 64) / vectors.layout.weights, rel=0.15)
    assert emr(vectors).bits > 8 / 3  # its share of a vector in 8 bits
    assert tall(vectors, merge="ta", tall_lambda=0.4).bits > 8 / 3


def test_what_papers_say(vectors: Vectors) -> None:
    one = vectors.tasks["one"]
    piece = next(vectors.layout.pieces(one))
    switched = next(vectors.layout.pieces(t_switch(vectors, density=0.2).vectors["one"]))
    assert float(switched.norm()) == pytest.approx(float(piece.norm()), rel=1e-4)
    ternary = compeft(vectors, density=0.2, alpha=2.0).vectors["one"]
    assert ternary.abs().unique().tolist() == pytest.approx([0.0, 2.0 * float(one.std())])
    dropped = dare(vectors, density=0.5, seed=3).vectors["one"]
    kept = dropped != 0
    assert torch.allclose(dropped[kept], 2 * one[kept], rtol=0.01)
    assert not torch.equal(dropped, dare(vectors, density=0.5, seed=4).vectors["one"])
    pruned = ultradelta(vectors, density=0.3, factor=1.0, seed=0).vectors["one"]
    assert float((pruned[: piece.numel()] != 0).float().mean()) == pytest.approx(0.3, abs=0.05)


def test_helpers() -> None:
    assert entropy([1, 1]) == 2 and entropy([5, 0]) == 0
    assert largest(torch.tensor([1.0, -3.0, 2.0, 0.0]), 2).tolist() == [False, True, True, False]
    vector = torch.randn(1000)
    decoded, bits = quantized_shared(vector)
    assert bits == 8 * 1000 + 4 * 32
    assert float((decoded - vector).abs().max()) < float(vector.abs().max()) / 200
