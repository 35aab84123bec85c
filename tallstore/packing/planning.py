"""From a checkpoint and a caller's options to what is to be kept of it."""

from __future__ import annotations

from collections.abc import Mapping

from tallstore.catalog import VectorRecord
from tallstore.codecs import Bytes
from tallstore.coding import Floats, to_float32
from tallstore.decoding import Decoder
from tallstore.documents import BaseDocument
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import OptionError
from tallstore.fitting import Magnitudes
from tallstore.packing.allotting import allot
from tallstore.packing.codeoptions import CodeOptions
from tallstore.packing.drafting import fixed_drafts
from tallstore.packing.drafts import Draft
from tallstore.packing.gathering import Candidate
from tallstore.packing.surveying import survey_candidate, survey_values
from tallstore.packing.target import Target
from tallstore.packing.writing import Progress
from tallstore.progress import Meter
from tallstore.workers import Workers

__all__ = ["Planner"]


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
        self._vector = vector
        self._options = options
        self._workers = workers
        self._meter = meter

    def _read(self, arena: int, span: int) -> tuple[Bytes, Floats | None]:
        base, vector = self._decoder.base_and_vector(arena, span)
        if vector is None or self._vector is None:
            return base, None
        return base, to_float32(vector, self._vector.dtype)

    def target(self, candidate: Candidate, *, exact: bool) -> Target:
        """How a checkpoint is to be coded.

        Raises
        ------
        OptionError
            A budget cannot be met; the message says what can.
        """
        options = self._options
        found = survey_candidate(
            candidate,
            self._read,
            shared=options.shared,
            workers=self._workers,
            progress=self._stage("survey", candidate),
        )
        drafts = self._drafts(candidate, found)
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

    def _stage(self, name: str, candidate: Candidate) -> Progress:
        return self._meter.stage(name, sum(s.nbytes for s in candidate.source.segments))

    def _drafts(self, candidate: Candidate, found: Mapping[int, Magnitudes]) -> Mapping[int, Draft]:
        options = self._options

        def values(strides: Mapping[int, int]) -> Mapping[int, Magnitudes]:
            return survey_values(
                candidate,
                self._read,
                strides,
                seed=options.seed,
                workers=self._workers,
                progress=self._stage("values", candidate),
            )

        if options.code != "auto":
            return fixed_drafts(options, found, values)
        weights = sum(seen.weights for seen in found.values())
        budget = options.bits_per_weight or 0.15
        made = allot(found, budget * weights, options.gain)
        if made is None:
            raise OptionError(f"bits_per_weight={budget}: task {candidate.name!r} needs more")
        return made.drafts
