"""A checkpoint with other biases: those with which its coded weights do what it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from tallstore.codecs import Bytes
from tallstore.documents import CODE
from tallstore.dtypes import is_codable, torch_dtype
from tallstore.packing.calibrating import Calibration
from tallstore.packing.gathering import Candidate
from tallstore.packing.target import Target
from tallstore.specs import TensorSpec, contiguous_stride

__all__ = ["BIAS_BITS", "Correction", "place_of"]

#: Of a corrected bias: rounded to fewer, what it is off by is heard.
BIAS_BITS: Final = 4
#: Of a budget, what biases may take.
_SHARE: Final = 1 / 4
#: Bits that a bias's levels take in the document.
_ENTRY: Final = 400


class Correction:
    """Which biases of a checkpoint are corrected, and to what.

    Parameters
    ----------
    candidate
        The checkpoint.
    calibration
        Of its module.
    load
        Gives what a target's codes will load as: a state dict.
    """

    def __init__(
        self, candidate: Candidate, calibration: Calibration, load: Callable[[Target], Any]
    ) -> None:
        self._candidate = candidate
        self._calibration = calibration
        self._load = load
        there = set(calibration.names)
        specs = [spec for spec in candidate.source.tensors if spec.name in there]
        # One that several layers add cannot be right for all.
        uses = Counter(spec.segment for spec in specs)
        #: By segment of the base: name, and the segment that the checkpoint has it in.
        self._biases = {
            place: (spec.name, spec.segment)
            for spec in specs
            if uses[spec.segment] == 1 and (place := place_of(candidate, spec)) is not None
        }

    def within(self, budget: float | None) -> dict[int, float]:
        """The base's segments to correct, and the bits that each takes: the smallest first.

        They are many where layers are wide; and where those are corrected that sum up what wide
        ones give, most is done.

        Parameters
        ----------
        budget
            In bits, of which a quarter is spent; None: there is none.
        """
        segments = self._candidate.source.segments
        sizes = {n: segments[own].numel for n, (_, own) in self._biases.items()}
        left = np.inf if budget is None else _SHARE * budget
        found: dict[int, float] = {}
        for place, size in sorted(sizes.items(), key=lambda item: (item[1], item[0])):
            bits = float(BIAS_BITS * size + _ENTRY)
            if bits > left:
                break
            left -= bits
            found[place] = bits
        return found

    def applied(self, target: Target, segments: Mapping[int, float]) -> tuple[Candidate, float]:
        """The checkpoint with the biases that a target's codes need, and what they leave.

        Parameters
        ----------
        segments
            What `within` gave.

        Returns
        -------
        Candidate
            Whose codes are to be kept.
        float
            See `Calibration.corrected`.

        Raises
        ------
        OptionError
            See `Calibration.corrected`.
        """
        names = {self._biases[place][0]: self._biases[place][1] for place in segments}
        values, distance = self._calibration.corrected(self._load(target), names)
        own = self._candidate.source.segments
        changed = {names[n]: _bytes(value, own[names[n]].dtype) for n, value in values.items()}
        return replace(self._candidate, changed=changed), distance


def place_of(candidate: Candidate, spec: TensorSpec) -> int | None:
    """The base's segment that a tensor is coded over, if it is simply all of it."""
    segment = candidate.source.segments[spec.segment]
    parts = candidate.plan.parts[spec.segment]
    whole = spec.numel == segment.numel and spec.stride == contiguous_stride(spec.shape)
    if not whole or len(parts) != 1 or parts[0].kind != CODE or not is_codable(segment.dtype):
        return None
    return parts[0].segment


def _bytes(value: Tensor, dtype: str) -> Bytes:
    flat = value.to(torch_dtype(dtype)).contiguous().cpu()
    found: Bytes = flat.view(torch.uint8).numpy()
    return found
