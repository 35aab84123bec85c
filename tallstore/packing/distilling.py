"""Values of a code trained to give what the original gives.

A few per cent of a task's weights carry it as they are, made longer (``gain="unbiased"``), but they
are noise to each other. Trained on inputs that need no labels, with what the original makes of them
as the target (distillation: Hinton et al., arXiv 1503.02531), the same few take each other into
account. Their places stay, and so does what they take on disk. Of dense codes every weight learns
which way to be rounded (as in AdaRound, arXiv 2004.10568), and the levels how long to be (as
BitDelta's scales do, arXiv 2402.10193, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from tallstore.codecs import Bytes
from tallstore.codes import PLANES, SPARSE
from tallstore.dtypes import torch_dtype
from tallstore.errors import OptionError, TallstoreError
from tallstore.packing.calibrating import Calibration
from tallstore.packing.correcting import place_of
from tallstore.packing.drafts import Draft
from tallstore.packing.gathering import Candidate
from tallstore.packing.target import Target
from tallstore.seeding import Positions
from tallstore.wording import error_words

__all__ = ["Distillation", "all_steps"]

#: Of a step of Adam, of values in root mean squares of the tensor's, of a gain in itself. Which is
#: best depends on how much there is to be made good: each is tried for a share of the steps.
_RATES: Final = (0.015, 0.004, 0.001, 0.00025)
_TRIAL: Final = 8
#: The same of dense codes, of which a step does nothing but where it takes a weight across to
#: another level: so many times the others' rate, and at most.
_DENSE: Final = 30.0
_DENSE_MOST: Final = 0.03
_BETAS: Final = (0.9, 0.95)
#: A gain that is trained stays above this.
_LEAST: Final = 0.05


class Distillation:
    """Trains the codes of a checkpoint.

    Parameters
    ----------
    candidate
        The checkpoint.
    calibration
        Of its module.
    load
        Gives what a target's codes will load as: a state dict.
    steps
        How many, a batch each; Adam, with a rate that falls along a cosine, and of which some are
        tried before.
    progress
        Called when training begins: gives what is called with 1 after each step.
    """

    def __init__(
        self,
        candidate: Candidate,
        calibration: Calibration,
        load: Callable[[Target], Any],
        *,
        steps: int,
        progress: Callable[[], Callable[[int], None]],
    ) -> None:
        self._candidate = candidate
        self._calibration = calibration
        self._load = load
        self._steps = steps
        self._progress = progress

    def distance(self, target: Target) -> float:
        """See `Calibration.distance`."""
        return self._calibration.distance(self._load(target))

    def trained(
        self, target: Target, picked: Mapping[int, Positions]
    ) -> tuple[Candidate, dict[int, Draft]]:
        """What to code for a target's codes to give what the original gives.

        Parameters
        ----------
        picked
            By segment of the base, which weights have a value each, of all that are `SEEDED`.

        Returns
        -------
        Candidate
            With the trained values where there are some, and the base's weights beside them.
        dict
            By segment of the base, how to code what was trained; of `SEEDED` magnitudes are still
            to be fitted.

        Raises
        ------
        OptionError
            The module fails, or cannot be trained with.
        """
        drafts = target.drafts or {}
        none = {n: Draft(n, SPARSE, cut=math.inf, left=True) for n in drafts}
        base = self._load(replace(target, coded=None, drafts=none))
        coded = self._load(target)
        # Also for a caller in inference mode, whose tensors take no part in training.
        with torch.inference_mode(False), torch.enable_grad(), self._calibration.evaluating():
            fixed = {n: t.detach().clone() for n, t in coded.items() if isinstance(t, Tensor)}
            pupils = [
                _Pupil(
                    _tied(coded, names),
                    own,
                    drafts[place],
                    picked.get(place),
                    base[names[0]],
                    fixed[names[0]],
                    self._original(target, own) if drafts[place].form == PLANES else None,
                )
                for place, (own, names) in self._places().items()
                if place in drafts and not drafts[place].left
                if any(map(self._calibration.trains, names))
            ]
            pupils = [pupil for pupil in pupils if pupil.moved]
            if not self._train(pupils, fixed):
                pupils = []
        segments = self._candidate.source.segments
        changed = {p.own: p.bytes(segments[p.own].dtype) for p in pupils}
        kept = {} if target.coded is None else target.coded.changed
        made = {pupil.draft.segment: pupil.draft_of() for pupil in pupils}
        return replace(self._candidate, changed={**kept, **changed}), made

    def _original(self, target: Target, own: int) -> Tensor:
        """The weights that dense codes of a segment round: flat, float32."""
        changed = {} if target.coded is None else target.coded.changed
        source, found = self._candidate.source, changed.get(own)
        if found is None:
            found = np.empty(source.segments[own].nbytes, np.uint8)
            source.read(own, 0, found)
        return torch.from_numpy(found).view(torch_dtype(source.segments[own].dtype)).float()

    def _places(self) -> dict[int, tuple[int, tuple[str, ...]]]:
        """By segment of the base: the task's own, and the names of its tensors."""
        found: dict[int, tuple[int, tuple[str, ...]]] = {}
        for spec in self._candidate.source.tensors:
            place = place_of(self._candidate, spec)
            if place is not None and isinstance(spec.name, str):
                names = found.get(place, (spec.segment, ()))[1]
                found[place] = spec.segment, (*names, spec.name)
        return found

    def _train(self, pupils: Sequence[_Pupil], fixed: Mapping[str, Tensor]) -> bool:
        """Train; gives whether there was anything to be learnt."""
        numbers = [number for pupil in pupils for number in pupil.numbers]
        if not numbers:
            return False
        advance = self._progress()
        starts = [number.detach().clone() for number in numbers]
        tried: dict[float, float] = {}
        for rate in _RATES:
            tried[rate] = self._run(pupils, fixed, rate, _trial(self._steps), advance)
            with torch.no_grad():
                for number, start in zip(numbers, starts, strict=True):
                    number.copy_(start)
        best = min(tried, key=lambda rate: tried[rate])
        if tried[best] == math.inf:
            return False
        self._run(pupils, fixed, best, self._steps, advance)
        return True

    def _run(
        self,
        pupils: Sequence[_Pupil],
        fixed: Mapping[str, Tensor],
        rate: float,
        steps: int,
        advance: Callable[[int], None],
    ) -> float:
        """Train for some steps; gives what is left to be learnt in the last of them."""
        rates = [both for pupil in pupils for both in pupil.rated(rate)]
        optimizer = torch.optim.Adam(
            [{"params": [number], "lr": most} for number, most in rates], betas=_BETAS
        )
        left: list[float] = []
        for step in range(steps):
            for group, (_, most) in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = most * _share(step, steps)
            state = dict(fixed)
            for pupil in pupils:
                weights = pupil.weights()
                for name in pupil.names:
                    shape = fixed[name].shape
                    # The same tensor for all names, where it can be: the module may tie them.
                    state[name] = weights if weights.shape == shape else weights.view(shape)
            try:
                loss = self._calibration.loss(state, step % self._calibration.batches)
                if not loss.requires_grad:
                    return math.inf  # the module has no use for what is trained
                # Not backward(): what else the module has would get gradients too.
                found = torch.autograd.grad(
                    loss, [number for number, _ in rates], allow_unused=True
                )
            except TallstoreError:
                raise
            except Exception as exc:
                raise OptionError(
                    f"distil={self._steps}: the module of task {self._candidate.name!r} cannot be "
                    f"trained with: {error_words(exc)}"
                ) from exc
            # A batch that says nothing finite teaches nothing; `distance` has the last word.
            for (number, _), gradient in zip(rates, found, strict=True):
                number.grad = None if gradient is None else gradient.nan_to_num(0.0, 0.0, 0.0)
            optimizer.step()
            left.append(float(loss.detach()))
            advance(1)
        last = mean(left[-max(steps // 3, 1) :])
        return last if math.isfinite(last) else math.inf


def _tied(state: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, ...]:
    """All names of a tensor in a state dict, in its order: one object may have several."""
    there = state[names[0]]
    others = [n for n, tensor in state.items() if tensor is there and n not in names]
    return (*names, *others)


def _trial(steps: int) -> int:
    """How many each rate is tried for."""
    return max(steps // _TRIAL, 1)


def all_steps(steps: int) -> int:
    """How many training takes with those that find the rate."""
    return steps + len(_RATES) * _trial(steps)


def _share(step: int, steps: int) -> float:
    """Of the rate: up in a tenth of the steps, then down along a cosine."""
    return min(1.0, 10 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2


class _Pupil:
    """A tensor whose code is trained, and its numbers."""

    def __init__(
        self,
        names: tuple[str, ...],
        own: int,
        draft: Draft,
        picked: Positions | None,
        base: Tensor,
        coded: Tensor,
        original: Tensor | None,
    ) -> None:
        self.names = names
        self.own = own
        """Segment of the task."""
        self.draft = draft
        self._shape = coded.shape
        # Clones, since what was loaded in inference mode takes no part in training.
        self._base = base.clone().float().reshape(-1)
        moved = coded.float().reshape(-1) - self._base
        #: Which weights have values; None: all.
        self._at: Tensor | None = None
        if draft.form == SPARSE:
            self._at = moved.nonzero().view(-1)
        elif picked is not None:
            # The task may have fewer rows than the base.
            self._at = torch.from_numpy(picked[picked < moved.numel()])
        before = None if original is None else original - self._base
        self._moved = moved if self._at is None else moved[self._at]
        size = float(self._moved.square().mean().sqrt()) if self._moved.numel() else 0.0
        self.moved = size > 0
        self._size = size or 1.0
        sizes = self._moved.abs() / self._size
        levels = np.array(_scaled(draft.magnitudes, sizes, before), np.float32)
        # Of numpy's, not made by torch: that may have another device or dtype by default.
        self._levels = torch.from_numpy(levels)
        self._between = (self._levels[1:] + self._levels[:-1]) / 2
        self._gain = torch.from_numpy(np.ones((), np.float32)).requires_grad_()
        values = self._moved / self._size
        if before is not None:
            # As they were before they were rounded, made as long as their levels are.
            values = before * (float(self._levels[-1]) / draft.magnitudes[-1])
        self._values = values.requires_grad_()
        self.numbers = (self._gain, self._values)

    def rated(self, rate: float) -> tuple[tuple[Tensor, float], ...]:
        """Its numbers, and how large a step of each is."""
        of_values = min(_DENSE * rate, _DENSE_MOST) if self._at is None else rate
        return (self._gain, rate), (self._values, of_values)

    def draft_of(self) -> Draft:
        """How it is to be coded now; of `SEEDED` the magnitudes are fitted to its values."""
        gain = float(self._gain.detach().clamp(min=_LEAST))
        if self.draft.form == PLANES:
            levels = self._levels * (gain * self._size)
            return replace(self.draft, magnitudes=tuple(levels.tolist()), corrected=True)
        if self.draft.form == SPARSE:
            level = float(self._levels[0]) * gain * self._size
            return replace(self.draft, magnitudes=(level,), cut=level / 2, corrected=True)
        return replace(self.draft, corrected=True)

    def weights(self) -> Tensor:
        """Of the tensor, with gradients: of values as if they were not rounded to levels."""
        there = self._values.detach()
        rounded = torch.copysign(self._levels[torch.bucketize(there.abs(), self._between)], there)
        # To the gradient what rounding adds is a constant (straight through: arXiv 1308.3432).
        values = self._gain.clamp(min=_LEAST) * (self._values + (rounded - there))
        if self._at is None:
            return (self._base + self._size * values).view(self._shape)
        at = self._base[self._at] + self._size * values
        return self._base.index_copy(0, self._at, at).view(self._shape)

    def bytes(self, dtype: str) -> Bytes:
        """The weights as the task's dtype has them."""
        flat = self.weights().detach().reshape(-1).to(torch_dtype(dtype))
        found: Bytes = flat.contiguous().view(torch.uint8).numpy()
        return found


def _scaled(magnitudes: Sequence[float], sizes: Tensor, before: Tensor | None) -> list[float]:
    """Magnitudes as long as those that some sizes were rounded to; the sizes may be a bit off.

    Parameters
    ----------
    before
        What was rounded to the magnitudes as they are; None: nobody knows.
    """
    there = torch.tensor(magnitudes, dtype=torch.float64, device=sizes.device)
    if not sizes.numel():
        return list(magnitudes)
    sizes = sizes.double()
    if before is not None:
        chosen = there[torch.bucketize(before.abs().double(), (there[1:] + there[:-1]) / 2)]
        factor = float((sizes @ chosen) / (chosen @ chosen).clamp(min=1e-300))
        return [factor * level for level in magnitudes]

    def fitted(factor: float) -> tuple[float, float]:
        levels = factor * there
        chosen = there[torch.bucketize(sizes, (levels[1:] + levels[:-1]) / 2)]
        better = float((sizes @ chosen) / (chosen @ chosen).clamp(min=1e-300))
        return float((sizes - better * chosen).abs().mean()), better

    # The largest of the sizes is one of the levels.
    tries = [fitted(float(sizes.max()) / level) for level in magnitudes if level > 0]
    return [min(tries)[1] * level for level in magnitudes] if tries else list(magnitudes)
