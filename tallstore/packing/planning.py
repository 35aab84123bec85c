"""From a checkpoint and a caller's options to what is to be kept of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol

from tallstore.catalog import VectorRecord
from tallstore.codecs import Bytes
from tallstore.codes import SEEDED, SPARSE
from tallstore.coding import Floats, to_float32
from tallstore.decoding import Decoder
from tallstore.documents import BaseDocument
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import OptionError
from tallstore.fitting import Magnitudes
from tallstore.mergestream.feed import shapes
from tallstore.packing.allotting import BY_RULE, Allotment, Offers, block
from tallstore.packing.calibrating import Calibrate, Calibration
from tallstore.packing.choices import dense_choice
from tallstore.packing.codeoptions import CodeOptions
from tallstore.packing.correcting import BIAS_BITS, Correction
from tallstore.packing.distilling import Distillation, all_steps
from tallstore.packing.drafting import fixed_drafts, moving, seeded_draft
from tallstore.packing.drafts import Draft
from tallstore.packing.gathering import Candidate
from tallstore.packing.surveying import survey_candidate, survey_values
from tallstore.packing.target import Target
from tallstore.packing.writing import Progress
from tallstore.progress import Meter
from tallstore.seeding import picked
from tallstore.workers import Workers

__all__ = ["Planner", "Trial"]

#: Bits a weight that ``keep`` tries, in order.
_LADDER: Final = (0.03, 0.06, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 4)


#: What counts how much more than noise, to choose from by what a calibrated module gives.
_BY_RULE: Final = (BY_RULE, 25.0, 12.0, 6.0)


class Trial(Protocol):
    """What loads and scores weights."""

    def coded(self, target: Target) -> Any:
        """What a target's codes will load as."""
        ...

    def whole(self, candidate: Candidate) -> Any:
        """A checkpoint as it is."""
        ...

    def score(self, target: Target, what: str) -> float:
        """The score of a target's weights, just as they will load."""
        ...

    def original(self, candidate: Candidate) -> float:
        """The score of a checkpoint as it is."""
        ...


@dataclass(frozen=True, slots=True)
class _Teaching:
    """What codes are made with, of a caller that has a module to run."""

    correction: Correction
    distillation: Distillation | None


class Planner:
    """Surveys checkpoints against a base and a shared vector that are in a store.

    Parameters
    ----------
    snapshot
        Where base and vector are read; stays the caller's.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        base: BaseDocument,
        vector: VectorRecord | None,
        options: CodeOptions,
        *,
        workers: Workers,
        meter: Meter,
    ) -> None:
        self._decoder = Decoder(snapshot, base, vector=vector if options.shared else None)
        self._fans = {
            n: math.prod(shape[1:]) if len(shape) > 1 else 1
            for n, (_, shape) in shapes(base.contents.tensors, base.contents.segments).items()
        }
        self._blocks: dict[int, int | None] = {}
        for tensor in base.contents.tensors:
            self._blocks.setdefault(tensor.segment, block(tensor.name))
        self._vector = vector
        self._options = options
        self._workers = workers
        self._meter = meter

    def _read(self, arena: int, span: int) -> tuple[Bytes, Floats | None]:
        base, vector = self._decoder.base_and_vector(arena, span)
        if vector is None or self._vector is None:
            return base, None
        return base, to_float32(vector, self._vector.decoded_dtype)

    def target(
        self,
        candidate: Candidate,
        *,
        exact: bool,
        trial: Trial | None = None,
        scored: bool = True,
        calibrate: Calibrate | None = None,
    ) -> tuple[Target, list[str]]:
        """How a checkpoint is to be coded, and remarks.

        Parameters
        ----------
        trial
            Gives a target's weights, just as they will load; scoring and calibrating need it.
        scored
            Whether the target is scored.
        calibrate
            Gives what biases are corrected with; None: they are not.

        Raises
        ------
        OptionError
            A budget cannot be met; the message says what can.
        """
        options = self._options
        found = self.survey(candidate)
        module = None
        if calibrate is not None and trial is not None:
            module = self._module(candidate, calibrate, trial)
        if options.keep is not None and trial is not None:
            return self._keeping(candidate, found, trial, module, exact=exact)
        target = self.made(candidate, found, options, exact=exact, module=module)
        if trial is not None and scored:
            score = trial.score(target, options.code)
            target = replace(target, score=score if math.isfinite(score) else None)
        return target, []

    def _module(self, candidate: Candidate, calibrate: Calibrate, trial: Trial) -> _Teaching:
        """Ask the caller for a module."""
        calibration = Calibration(candidate.name, calibrate, trial.whole(candidate))
        steps = self._options.distil
        return _Teaching(
            Correction(candidate, calibration, trial.coded),
            None
            if steps is None
            else Distillation(
                candidate,
                calibration,
                trial.coded,
                steps=steps,
                progress=lambda: self._steps(candidate, all_steps(steps)),
            ),
        )

    def survey(self, candidate: Candidate) -> Mapping[int, Magnitudes]:
        """A histogram of each tensor; see `survey_candidate`."""
        return survey_candidate(
            candidate,
            self._read,
            shared=self._options.shared,
            workers=self._workers,
            progress=self._stage("survey", candidate),
        )

    def made(
        self,
        candidate: Candidate,
        found: Mapping[int, Magnitudes],
        options: CodeOptions,
        *,
        exact: bool,
        module: _Teaching | None = None,
    ) -> Target:
        """The target of a surveyed checkpoint.

        Raises
        ------
        OptionError
            A budget cannot be met, or the caller's module does not do what it is for.
        """
        if module is None:
            return self._target(candidate, self._drafts(candidate, found, options), options, exact)
        correction = module.correction
        weights = sum(seen.weights for seen in found.values())
        budget = None if options.budget is None else options.budget * weights
        biases = correction.within(budget)
        others = {n: seen for n, seen in found.items() if n not in biases}
        taken = sum(biases.values())
        best: tuple[float, Target, Candidate] | None = None
        for by_rule in (BY_RULE,) if budget is None else _BY_RULE:
            drafts = self._drafts(candidate, others, options, taken=taken, by_rule=by_rule)
            target = self._target(candidate, drafts, options, exact)
            coded, distance = correction.applied(replace(target, exact=False), biases)
            if best is None or distance < best[0]:
                best = distance, target, coded
        if best is None:
            raise RuntimeError("there is always one way")
        _, target, coded = best
        target = replace(
            target,
            coded=coded,
            drafts={**(target.drafts or {}), **self._bias_drafts(coded, biases)},
            parameters={**options.record(), "corrected": len(biases)},
        )
        if module.distillation is not None:
            return self._distilled(target, module.distillation)
        return target

    def _distilled(self, target: Target, distillation: Distillation) -> Target:
        """A target with trained codes, if they do better."""
        drafts = target.drafts or {}
        strides = {n: draft.stride for n, draft in drafts.items() if draft.form == SEEDED}
        places = picked(target.candidate.layout, strides, seed=target.seed)
        plain = replace(target, exact=False)
        coded, trained = distillation.trained(plain, places)
        values = self._values(coded, {n: strides[n] for n in trained if n in strides})
        for n, seen in values.items():
            made = seeded_draft(n, seen, drafts[n].bits, drafts[n].stride)
            trained[n] = replace(made or drafts[n], corrected=True)
        better = replace(plain, coded=coded, drafts={**drafts, **trained})
        if not distillation.distance(better) < distillation.distance(plain):
            kept = {n: v for n, v in (target.parameters or {}).items() if n != "distil"}
            return replace(target, parameters=kept)
        return replace(better, exact=target.exact)

    def _bias_drafts(self, coded: Candidate, biases: Collection[int]) -> Mapping[int, Draft]:
        """All of them, a few bits each; where they are among codes that a hash places, too."""
        found = survey_candidate(
            coded,
            self._read,
            shared=False,
            only=biases,
            workers=self._workers,
            progress=lambda _: None,
        )
        made = {n: seeded_draft(n, seen, BIAS_BITS, 1) for n, seen in moving(found).items()}
        return {n: replace(draft, corrected=True) for n, draft in made.items() if draft is not None}

    def relative_error(self, target: Target, found: Mapping[int, Magnitudes]) -> float:
        """What dense codes are going to err by, relative to the task vector."""
        error = moved = 0.0
        for segment, draft in (target.drafts or {}).items():
            choice = dense_choice(draft, found[segment], target.gain)
            moved += found[segment].moved
            error += found[segment].moved if choice is None else choice.error
        return math.sqrt(error / moved) if moved else 0.0

    def _target(
        self,
        candidate: Candidate,
        drafts: Mapping[int, Draft],
        options: CodeOptions,
        exact: bool,
    ) -> Target:
        return Target(
            candidate=candidate,
            exact=exact,
            drafts=drafts,
            shared=options.shared,
            gain=options.gain,
            seed=options.seed,
            code=options.code,
            parameters=options.record(),
        )

    def _keeping(
        self,
        candidate: Candidate,
        found: Mapping[int, Magnitudes],
        trial: Trial,
        module: _Teaching | None,
        *,
        exact: bool,
    ) -> tuple[Target, list[str]]:
        """The fewest bits of a ladder whose weights score well enough; else the exact tier."""
        options = self._options
        share = options.keep or 1.0
        whole = trial.original(candidate)
        if not (math.isfinite(whole) and whole > 0):
            raise OptionError(
                f"keep={share}: evaluate({candidate.name!r}, ...) gave {whole} for the original; a "
                "share of it needs a score above 0"
            )
        target = self._target(candidate, {}, options, True)
        for bits in _LADDER:
            rung = replace(options, bits_per_weight=bits)
            target = self.made(candidate, found, rung, exact=False, module=module)
            score = trial.score(target, f"{bits} bits a weight")
            if score >= share * whole:
                known = score if math.isfinite(score) else None
                return replace(target, exact=exact, score=known), []
        note = (
            f"{candidate.name}: {_LADDER[-1]} bits a weight score {score:.4g}, and {share:g} of "
            f"the original's {whole:.4g} was asked for: the exact tier is kept too"
        )
        return replace(target, exact=True, score=whole), [note]

    def _offers(self, found: Mapping[int, Magnitudes], *, by_rule: float = BY_RULE) -> Offers:
        gain = self._options.gain
        return Offers(found, gain, fans=self._fans, blocks=self._blocks, by_rule=by_rule)

    def _stage(self, name: str, candidate: Candidate) -> Progress:
        return self._meter.stage(name, _nbytes(candidate))

    def _steps(self, candidate: Candidate, steps: int) -> Progress:
        """Stages count bytes: of steps all weights, once each."""
        nbytes = _nbytes(candidate)
        advance = self._meter.stage(f"distil {candidate.name}", steps * nbytes)
        return lambda count: advance(count * nbytes)

    def _values(self, candidate: Candidate, strides: Mapping[int, int]) -> Mapping[int, Magnitudes]:
        return survey_values(
            candidate,
            self._read,
            strides,
            seed=self._options.seed,
            workers=self._workers,
            progress=self._stage("values", candidate),
        )

    def _drafts(
        self,
        candidate: Candidate,
        found: Mapping[int, Magnitudes],
        options: CodeOptions,
        *,
        taken: float = 0.0,
        by_rule: float = BY_RULE,
    ) -> Mapping[int, Draft]:
        """How segments are going to be coded.

        Parameters
        ----------
        taken
            Bits of a budget that are spent already.
        by_rule
            See `Offers`.
        """
        if options.max_error is not None:
            return _within_error(candidate.name, self._offers(found), options.max_error)
        bits = options.budget
        if bits is None:
            return fixed_drafts(options, found, partial(self._values, candidate))
        offers = self._offers(found, by_rule=by_rule)
        bought = offers.within(bits, taken=taken)
        nothing = bought.drafts and all(draft.left for draft in bought.drafts.values())
        if nothing and options.keep is None:
            least = offers.least_bits() + taken / offers.weights
            raise OptionError(
                f"bits_per_weight={bits}: task {candidate.name!r} takes {least:.4g} at least; with "
                "fewer nothing of it would be left but the base"
            )
        return self._buy(candidate, bought)

    def _buy(self, candidate: Candidate, bought: Allotment) -> Mapping[int, Draft]:
        """Drafts with all their magnitudes: those of seeded values from the weights picked."""
        drafts = dict(bought.drafts)
        seeded = {n: draft for n, draft in drafts.items() if draft.form == SEEDED}
        values = self._values(candidate, {n: draft.stride for n, draft in seeded.items()})
        for n, draft in seeded.items():
            made = seeded_draft(n, values[n], draft.bits, draft.stride) if n in values else None
            # None of the weights picked had moved: there is nothing to fit to.
            drafts[n] = made or Draft(n, SPARSE, cut=math.inf, left=True)
        return drafts


def _within_error(name: str, offers: Offers, max_error: float) -> Mapping[int, Draft]:
    found = offers.erring(max_error)
    if found is None:
        least = math.sqrt(offers.least_error.error / offers.moved)
        raise OptionError(
            f"max_error={max_error}: task {name!r} comes to {least:.3g} with 4 bits for every "
            "weight, and to no less; exact=True (--exact) keeps it bit for bit"
        )
    return found.drafts


def _nbytes(candidate: Candidate) -> int:
    return sum(segment.nbytes for segment in candidate.source.segments)
