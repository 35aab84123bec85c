"""The hash that places seeded values: fixed to the bit, the same everywhere, and even."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_helpers import DEVICE
from seeds import SEED, make, mix, positions

pytest.importorskip("triton")

from tallstore.kernels import seeded
from tallstore.kernels import seeded_reference as plain
from tallstore.kernels.seeded_reference import BLOCK, SeededTensor

#: (seed, number, weights a group): key, position in each of `GROUPS`. They are the format's.
GROUPS = (0, 1, 2, 3, 1023, 1024, 2**31, 2**32 - 1, 2**32, 2**40 + 5)
VECTORS = {
    (0, 0, 50): ((0x29DCEA06, 0x42F99747), (5, 45, 31, 11, 6, 45, 37, 5, 40, 47)),
    (0, 1, 50): ((0xAD00BCE4, 0xEE3ACD6A), (32, 43, 32, 23, 14, 12, 46, 10, 18, 43)),
    (1, 0, 50): ((0x87D583BC, 0x7A74EB73), (48, 25, 12, 16, 36, 30, 7, 6, 47, 35)),
    (SEED, 7, 50): ((0xB72DCB98, 0x8D8A5E53), (42, 39, 49, 14, 49, 27, 30, 42, 33, 20)),
    (2**64 - 1, 2**32 - 1, 2**31 - 1): (
        (0x2D58668C, 0x654A2771),
        (257240157, 324858517, 271859815, 1045326530, 666796912, 922831703, 1847978630, 87617317,
         1179165961, 1259824656),
    ),
}  # fmt: skip


def test_mixing_is_fixed() -> None:
    words = {0: 0, 1: 0x688990C0, 2: 0xD1132181, 0xFFFFFFFF: 0x6768824A, 0x12345678: 0xF5E71C96}
    assert plain.mix(torch.tensor(list(words))).tolist() == list(words.values())
    assert mix(np.array(list(words), dtype=np.uint32)).tolist() == list(words.values())


@pytest.mark.parametrize("asked", VECTORS)
def test_keys_and_positions_are_fixed(asked: tuple[int, int, int]) -> None:
    seed, number, size = asked
    key, wanted = VECTORS[asked]
    assert plain.key(seed, number) == key
    assert tuple(positions(seed, number, GROUPS, [size] * len(GROUPS))) == wanted
    one = SeededTensor(seed=seed, number=number, stride=size, offset=0, numel=4 * size)
    offsets = plain.support(one) - torch.arange(4) * size
    assert tuple(offsets.tolist()) == wanted[:4]


@pytest.mark.parametrize("asked", [asked for asked in VECTORS if asked[2] == 50])
def test_the_kernel_has_the_same_positions(asked: tuple[int, int, int]) -> None:
    seed, number, size = asked
    one = SeededTensor(seed=seed, number=number, stride=size, offset=0, numel=1)
    code = replace(make((one,), 1), table=torch.ones(1, 2, device=DEVICE))
    for group, wanted in zip(GROUPS, VECTORS[asked][1], strict=True):
        # A block of a tensor far too large, and the arena begins there.
        first = group // BLOCK * BLOCK
        key = int(code.index[0, 4])
        index = [-first * size, (first + BLOCK) * size, size, -first, key]
        faked = replace(code, index=torch.tensor([index], device=DEVICE))
        out = torch.zeros(BLOCK * size, device=DEVICE)
        seeded.apply(faked, torch.zeros_like(out), out)
        (at,) = out.cpu().nonzero(as_tuple=True)
        lane = group - first
        assert at.numel() == BLOCK and int(at[lane]) == lane * size + wanted


def chi_square(*digits: torch.Tensor, sides: int) -> float:
    """How far counts of tuples are from even: in standard deviations of that statistic."""
    at = torch.zeros_like(digits[0])
    for digit in digits:
        at = at * sides + digit
    cells = sides ** len(digits)
    counts = torch.bincount(at, minlength=cells).double()
    even = at.numel() / cells
    statistic = float(((counts - even) ** 2 / even).sum())
    return (statistic - (cells - 1)) / (2 * (cells - 1)) ** 0.5


@pytest.mark.parametrize("stride", [3, 50, 64])
def test_positions_look_random(stride: int) -> None:
    """Even, and independent of those of the groups, tensors and seeds next to them."""
    groups = 40_000

    def found(seed: int, number: int) -> torch.Tensor:
        one = SeededTensor(seed=seed, number=number, stride=stride, offset=0, numel=groups * stride)
        return plain.support(one) - torch.arange(groups) * stride

    scores = {}
    for seed, number in itertools.product((0, 1, SEED), (0, 1, 2**32 - 1)):
        here = found(seed, number)
        name = f"seed {seed}, tensor {number}"
        scores[name] = chi_square(here, sides=stride)
        for lag in (1, 2, 32, 1024):
            scores[f"{name}, lag {lag}"] = chi_square(here[lag:], here[:-lag], sides=stride)
        others = {
            "seed": found(seed ^ 1, number),
            "high seed": found(seed ^ 1 << 32, number),
            "tensor": found(seed, number ^ 1),
            "both": found(seed ^ 1, number ^ 1),
        }
        for what, other in others.items():
            scores[f"{name}, other {what}"] = chi_square(here, other, sides=stride)
        scores[f"{name}, mirrored"] = chi_square(here, here.flip(0), sides=stride)
    # The mirrored pairs count twice, which doubles that statistic's deviation.
    assert max(abs(score) for score in scores.values()) < 5, scores
    mean = sum(scores.values()) / len(scores)
    assert abs(mean) < 4 / len(scores) ** 0.5, mean
