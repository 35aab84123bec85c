"""What the original is sure of is softened to train with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from tallstore.packing.calibrating import Calibration


def teacher(logits: Tensor) -> Calibration:
    """Of a task that gives these for the items 0, 1 ..."""
    net = nn.Embedding(*logits.shape)
    return Calibration(
        "t", lambda _: (net, list(torch.arange(len(logits)).split(4))), {"weight": logits}
    )


def draw(length: float) -> Tensor:
    return length * torch.randn(12, 6, generator=torch.Generator().manual_seed(1))


def likeliest(logits: Tensor) -> float:
    return float(logits.softmax(-1).amax(-1).mean())


def test_doubts_are_left_as_they_are() -> None:
    assert likeliest(draw(1.0)) < 0.9
    assert teacher(draw(1.0)).temperature == 1.0


def test_what_it_is_sure_of_is_softened_until_there_are_doubts() -> None:
    logits = draw(20.0)
    assert likeliest(logits) > 0.95
    temperature = teacher(logits).temperature
    assert 1 < temperature < 4
    assert likeliest(logits / temperature) == pytest.approx(0.9, abs=0.005)


@pytest.mark.parametrize("logits", [draw(1e4), torch.eye(6).log()], ids=["sure", "certain"])
def test_not_beyond_the_hottest(logits: Tensor) -> None:
    assert teacher(logits).temperature == 4.0


@pytest.mark.parametrize(
    "logits",
    [torch.full((12, 6), -math.inf), torch.full((12, 6), math.nan), torch.randn(12, 1)],
    ids=["nothing", "no number", "one"],
)
def test_where_nothing_is_likeliest_nothing_is_softened(logits: Tensor) -> None:
    assert teacher(logits).temperature == 1.0


def test_the_loss_is_the_divergence_of_what_was_softened() -> None:
    wanted, given = draw(20.0), draw(20.0) + draw(1.0).flip(0)
    calibration = teacher(wanted)
    temperature, rows = calibration.temperature, slice(4, 8)
    one, other = ((logits[rows] / temperature).log_softmax(-1) for logits in (wanted, given))
    expected = temperature**2 * kl_div(other, one, log_target=True, reduction="batchmean")
    torch.testing.assert_close(calibration.loss({"weight": given}, 1), expected)
    # What is reported, and compared, is not softened.
    one, other = (logits.log_softmax(-1) for logits in (wanted, given))
    expected = kl_div(other, one, log_target=True, reduction="sum")
    assert calibration.distance({"weight": given}) == pytest.approx(float(expected), rel=1e-5)
