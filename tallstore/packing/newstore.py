"""A store that is being made, in a file that is nobody's until it is done."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tallstore.catalog import BaseRecord, Catalog, VectorRecord, now
from tallstore.decoding import Decoder
from tallstore.describing import describe
from tallstore.documents import BaseDocument, Contents, ExternalReference
from tallstore.dtypes import CODABLE, itemsize
from tallstore.engine.manifest import Manifest
from tallstore.engine.newfile import NewFile
from tallstore.engine.session import WriteSession
from tallstore.engine.snapshot import Snapshot
from tallstore.layout import lay_out
from tallstore.loading import Loader
from tallstore.mergestream.survey import survey
from tallstore.merging import MergeRule
from tallstore.packing.base import refer_to_base, write_base
from tallstore.packing.calibrating import Calibrate
from tallstore.packing.choosing import Evaluate, choose_lambda, read_memory, score_of, state_of
from tallstore.packing.codeoptions import CodeOptions
from tallstore.packing.encodings import Policy
from tallstore.packing.files import known_files
from tallstore.packing.gathering import Candidate
from tallstore.packing.masks import SpanMasks, tall_span
from tallstore.packing.overspending import overspent
from tallstore.packing.planning import Planner
from tallstore.packing.suggesting import suggest
from tallstore.packing.target import Target
from tallstore.packing.tasks import encode_tasks
from tallstore.packing.vector import CandidateFeed, write_vector
from tallstore.progress import Meter
from tallstore.sources.source import Source
from tallstore.version import WRITTEN_BY
from tallstore.workers import Workers

__all__ = ["NewStore", "contents_of"]


def contents_of(base: Source) -> Contents:
    """A checkpoint as a base's document has it."""
    return Contents(
        kind=base.kind,
        tree=base.tree,
        tensors=tuple(base.tensors),
        segments=tuple(base.segments),
    )


class NewStore:
    """The two commits of a pack: base and vector, then tasks against them.

    The file is nobody's until both are done, so two commits show as one.
    """

    def __init__(
        self,
        new: NewFile,
        base: Source,
        candidates: Sequence[Candidate],
        pool: Workers,
        meter: Meter,
        external: ExternalReference | None = None,
    ) -> None:
        self._new = new
        self._base = base
        self._candidates = candidates
        self._pool = pool
        self._meter = meter
        self._external = external
        self._manifest = Manifest(store=os.urandom(16))
        self._created = now()
        self._weights = sum(s.nbytes for c in candidates for s in c.source.segments)
        self._done: tuple[BaseRecord, BaseDocument, VectorRecord | None] | None = None

    def base_and_vector(self, rule: MergeRule | None, dtype: str, encoding: Policy) -> None:
        """Write the base, and merge the shared vector, if there is to be one."""
        room = self._room(dtype if rule is not None else None)
        with WriteSession(self._new.environment, self._manifest, room=room) as session:
            record, document = self._write_base(session, encoding)
            vector = None if rule is None else self._vector(session, rule, dtype)
            catalog = Catalog(base=record, vector=vector)
            self._manifest = session.commit(
                catalog.to_json(), live=catalog.live_streams(), written_by=WRITTEN_BY
            )
        self._done = record, document, vector

    def _vector(self, session: WriteSession, rule: MergeRule, dtype: str) -> VectorRecord:
        layout = lay_out(tuple(self._base.segments))
        feed = CandidateFeed(contents_of(self._base), layout, self._base.read, self._candidates)
        surveying = self._meter.stage("survey", self._weights * rule.surveys)
        return write_vector(
            session,
            survey(rule, feed, workers=self._pool, progress=surveying),
            feed,
            # A vector of magnitudes needs no sign.
            dtype=f"u{dtype}" if dtype in ("int8", "int4") and rule.name == "profile" else dtype,
            created=self._created,
            workers=self._pool,
            progress=self._meter.stage("merge", self._weights),
        )

    def _write_base(
        self, session: WriteSession, encoding: Policy
    ) -> tuple[BaseRecord, BaseDocument]:
        if self._external is not None:
            return refer_to_base(session, self._base, self._external, created=self._created)
        total = sum(segment.nbytes for segment in self._base.segments)
        return write_base(
            session,
            self._base,
            encoding=encoding,
            created=self._created,
            workers=self._pool,
            progress=self._meter.stage("base", total),
        )

    def _room(self, dtype: str | None) -> int:
        """Bytes that the base and a shared vector of a dtype take."""
        base = self._base.segments
        stored = 0 if self._external is not None else sum(segment.nbytes for segment in base)
        weights = sum(segment.numel for segment in base if segment.dtype in CODABLE)
        if dtype is None:
            return stored
        return stored + weights * (itemsize(dtype) if dtype in CODABLE else 2)

    def masks(
        self,
        lambdas: Sequence[float],
        evaluate: Evaluate | None,
        masks: SpanMasks,
        *,
        exact: bool,
    ) -> list[str]:
        """Choose lambdas and write the tasks as TALL masks; returns remarks."""
        with self._reading() as (snapshot, _, document, vector):
            if vector is None:
                raise RuntimeError("masks take a shared vector")
            targets = [
                self._target(snapshot, document, vector, candidate, lambdas, evaluate, masks, exact)
                for candidate in self._candidates
            ]
            catalog = self._write(snapshot, targets, masks)
            decoder = Decoder(snapshot, document)
            remark = suggest(
                self._candidates,
                catalog.tasks,
                lambda arena, span: decoder.base_and_vector(arena, span)[0],
                mask_bits=self._mask_bits(catalog, vector),
            )
        return [] if remark is None else [remark]

    def _mask_bits(self, catalog: Catalog, vector: VectorRecord) -> float:
        """Bits a coded weight and task of masks and shared vector, on the disk."""
        with self._snapshot() as written:
            found = [describe(written, catalog, task=name).task for name in catalog.tasks]
            planes = {code.planes for task in found if task for code in task.codes}
            stored = sum(written.stream(n).stored for n in {*planes, *vector.streams} if n)
        coded = sum(task.coded for task in catalog.tasks.values())
        return 8 * stored / coded if coded else 0.0

    def codes(
        self,
        options: CodeOptions,
        evaluate: Evaluate | None,
        calibrate: Calibrate | None,
        *,
        exact: bool,
    ) -> list[str]:
        """Survey the tasks, and write them with codes of other kinds; returns remarks."""
        targets, notes = self.targets(options, evaluate, calibrate, exact=exact)
        with self._reading() as (snapshot, *_):
            catalog = self._write(snapshot, targets, tall_span)
        if options.budget is not None and options.keep is None:
            with self._snapshot() as written:
                remark = overspent(written, catalog, options.budget)
            if remark is not None:
                notes.append(remark)
        return notes

    def targets(
        self,
        options: CodeOptions,
        evaluate: Evaluate | None,
        calibrate: Calibrate | None,
        *,
        exact: bool,
    ) -> tuple[list[Target], list[str]]:
        """What `codes` writes, and remarks."""
        tried = evaluate is not None or calibrate is not None
        targets, notes = [], []
        with self._reading() as (snapshot, _, document, vector):
            planner = Planner(
                snapshot, document, vector, options, workers=self._pool, meter=self._meter
            )
            trial = _Trial(self, snapshot, evaluate) if tried else None
            for candidate in self._candidates:
                target, remarks = planner.target(
                    candidate,
                    exact=exact,
                    trial=trial,
                    scored=evaluate is not None,
                    calibrate=calibrate,
                )
                targets.append(target)
                notes += remarks
        return targets, notes

    def trial(self, snapshot: Snapshot, target: Target) -> Any:
        """What a target will load as: it is written, for a moment as the only task."""
        catalog = self._write(snapshot, [target], tall_span)
        with self._snapshot() as written:
            name = target.candidate.name
            return Loader(written, catalog, task=name, fidelity="codes").load()

    @contextmanager
    def _reading(
        self,
    ) -> Iterator[tuple[Snapshot, BaseRecord, BaseDocument, VectorRecord | None]]:
        """What is committed of the new store."""
        if self._done is None:
            raise RuntimeError("base_and_vector comes first")
        with self._snapshot() as snapshot:
            yield snapshot, *self._done

    @contextmanager
    def _snapshot(self) -> Iterator[Snapshot]:
        """Of what is committed."""
        self._new.environment.handles += 1
        snapshot = Snapshot(self._new.environment)
        try:
            yield snapshot
        finally:
            snapshot.close()

    def _write(self, snapshot: Snapshot, targets: Sequence[Target], masks: SpanMasks) -> Catalog:
        if self._done is None:
            raise RuntimeError("base_and_vector comes first")
        record, document, vector = self._done
        # A bit per weight; a residual, before it is compressed, is as long as the weights.
        room = sum(c.plan.coded for c in self._candidates) // 8
        room += self._weights if any(target.exact for target in targets) else 0
        with WriteSession(self._new.environment, self._manifest, room=room) as session:
            records = encode_tasks(
                session,
                snapshot,
                document,
                vector,
                targets,
                identity=record.identity,
                known_files=known_files(snapshot, document),
                created=self._created,
                compress=True,
                masks=masks,
                workers=self._pool,
                progress=self._meter.stage("masks", self._weights),
            )
            catalog = Catalog(base=record, vector=vector, tasks=records)
            self._manifest = session.commit(
                catalog.to_json(), live=catalog.live_streams(), written_by=WRITTEN_BY
            )
        return catalog

    def _target(
        self,
        snapshot: Snapshot,
        document: BaseDocument,
        vector: VectorRecord,
        candidate: Candidate,
        lambdas: Sequence[float],
        evaluate: Evaluate | None,
        masks: SpanMasks,
        exact: bool,
    ) -> Target:
        value, score = lambdas[0], None
        if evaluate is not None:
            value, score = choose_lambda(
                snapshot,
                document,
                vector,
                candidate,
                lambdas,
                evaluate,
                masks=masks,
                workers=self._pool,
            )
        if score is not None and not math.isfinite(score):
            score = None  # the best of them was hopeless; a record holds numbers
        return Target(
            candidate=candidate,
            tall_lambda=value,
            exact=exact,
            code="tall",
            parameters={} if exact else None,
            score=score,
        )


class _Trial:
    """Loads targets by writing them into the new file; see `tallstore.packing.planning.Trial`."""

    def __init__(self, packing: NewStore, snapshot: Snapshot, evaluate: Evaluate | None) -> None:
        self._packing = packing
        self._snapshot = snapshot
        self._evaluate = evaluate

    def coded(self, target: Target) -> Any:
        return self._packing.trial(self._snapshot, target)

    def whole(self, candidate: Candidate) -> Any:
        return state_of(candidate.source, read_memory(candidate.source))

    def score(self, target: Target, what: str) -> float:
        return self._score(target.candidate, self.coded(target), what)

    def original(self, candidate: Candidate) -> float:
        return self._score(candidate, self.whole(candidate), "the original")

    def _score(self, candidate: Candidate, state: Any, what: str) -> float:
        if self._evaluate is None:
            raise RuntimeError("there is nothing to score with")
        return score_of(self._evaluate, candidate.name, state, what)
