"""How far what a module gives is from what it should give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

__all__ = ["distance", "divergence", "is_logits", "softening"]

#: To train with, logits are softened until what is likeliest has this chance on average, at most.
_SURE: Final = 0.9
_HOTTEST: Final = 4.0


def is_logits(output: Tensor) -> bool:
    """Whether there are several numbers an item: those of one axis are an item each."""
    return output.dim() > 1 and output.shape[-1] > 1


def divergence(given: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(wanted || given) of logits on the last axis; of single numbers the squared distance.

    Parameters
    ----------
    given, wanted
        float32, of one shape.
    temperature
        What logits are divided by.

    Returns
    -------
    Tensor
        The sum over the items; of logits times the temperature's square, so that gradients are as
        large at any.
    """
    if not is_logits(wanted):
        return (given - wanted).square().sum()
    one, other = ((logits / temperature).log_softmax(-1) for logits in (wanted, given))
    # What is impossible to both takes no part.
    each = torch.where(one.isneginf(), 0.0, one.exp() * (one - other))
    return temperature**2 * each.sum()


def distance(given: Sequence[list[Tensor]], wanted: Sequence[list[Tensor]]) -> float:
    """The divergence of all batches; infinite where shapes differ, or there are no numbers."""
    some, others = ([one for batch in outputs for one in batch] for outputs in (given, wanted))
    if [one.shape for one in some] != [other.shape for other in others]:
        return math.inf
    found = sum(map(float, map(divergence, some, others)))
    return found if math.isfinite(found) else math.inf


def softening(wanted: Sequence[Tensor]) -> float:
    """The temperature to learn from outputs at (Hinton et al., arXiv 1503.02531).

    1 where there are doubts about what is likeliest. Of what a module is sure of, as classifiers
    are of what they were trained on, the logits say little but for which is the largest; softened,
    all of them.
    """
    logits = [one for one in wanted if is_logits(one)]
    low, high = 1.0, _HOTTEST
    if not logits or not _sureness(logits, low) > _SURE:
        return low
    while high > 1.02 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _sureness(logits, middle) > _SURE else (low, middle)
    return high


def _sureness(logits: Sequence[Tensor], temperature: float) -> float:
    """The chance of what is likeliest, on average over the items."""
    chances = [(one / temperature).softmax(-1).amax(-1).flatten() for one in logits]
    return float(torch.cat(chances).double().mean())
