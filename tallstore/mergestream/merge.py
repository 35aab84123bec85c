"""Merging the tasks of a store into one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tallstore.catalog import Catalog, check_task_name
from tallstore.describing import Description, describe
from tallstore.devices import wanted_device
from tallstore.documents import TaskDocument
from tallstore.dtypes import is_codable
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import CorruptStoreError, MismatchError, OptionError, TaskExistsError
from tallstore.exporting import DEFAULT_SHARD, check_place, export
from tallstore.loading import Loader
from tallstore.mergestream.blend import Blend
from tallstore.mergestream.grid import EvaluateMerge, check_alphas, check_ks, score_of
from tallstore.mergestream.layouts import choose_layout, unmerged
from tallstore.mergestream.merged import MergedLoader, MergedSource
from tallstore.mergestream.ondevice import DeviceWeights
from tallstore.mergestream.origins import (
    check_masks,
    chosen_tasks,
    origin,
    over_shared,
    remarks,
    shared_divisor,
)
from tallstore.mergestream.stored import StoreFeed
from tallstore.mergestream.survey import survey
from tallstore.merging import RULES, Consensus, MergeRule, merge_rule
from tallstore.progress import Meter, Report
from tallstore.workers import workers

if TYPE_CHECKING:
    import torch

__all__ = ["Merge", "merge_tasks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """What was merged, and how."""

    rule: str
    tasks: tuple[str, ...]
    alpha: float
    k: int | None
    """Of Consensus Merging; None for other rules."""
    score: float | None
    """What `evaluate` gave for the chosen alpha and k."""
    vectors: str
    """Where task vectors came from: ``"exact"``, ``"masks"`` (lossy), ``"exact and masks"``, or
    ``"shared vector"``, as it is stored."""
    layout: str | None
    """The task whose private tensors and files went in; None: the base's."""
    files: tuple[Path, ...] = ()
    """The files made."""
    task: str | None = None
    """The task made."""
    notes: tuple[str, ...] = ()
    """Remarks."""
    state: Any = field(default=None, repr=False, compare=False)
    """The merged object, where it was to go nowhere else."""


def merge_tasks(
    snapshot: Snapshot,
    catalog: Catalog,
    *,
    rule: str | MergeRule = "ta",
    tasks: Sequence[str] | None = None,
    alpha: float | Sequence[float] | None = None,
    k: int | Sequence[int] | None = None,
    private: str | None = None,
    evaluate: EvaluateMerge | None = None,
    out: Path | None = None,
    as_task: str | None = None,
    device: torch.device | str | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    timeout: float = 60.0,
    report: Report | None = None,
) -> Merge:
    """Merge tasks and write the result; see `tallstore.merge`."""
    if out is not None and as_task is not None:
        raise OptionError("out= and as_task=: a merge goes to one of them")
    merging = _Merging(snapshot, catalog, tasks, private, wanted_device(device), Meter(report))
    rules = [merging.ready(made) for made in _rules(rule, k, evaluate, len(merging.tasks))]
    alphas = check_alphas(alpha, usual=rules[0].usual_alpha, evaluate=evaluate is not None)
    # What can be refused is refused before the work.
    if as_task is not None and check_task_name(as_task) in catalog.tasks and not overwrite:
        raise TaskExistsError(
            f"{snapshot.path}: holds a task {as_task!r} already; give another name, or "
            "overwrite=True (--overwrite) to replace it"
        )
    if out is not None:
        check_place(merging.plain(), out, overwrite=overwrite)
    result, loader = merging.choose(rules, alphas, evaluate)
    if alpha is None and result.alpha != 1 and evaluate is None:
        note = f"alpha {result.alpha}, a common choice for sums; others may do better on your data"
        result = replace(result, notes=(*result.notes, note))
    if out is not None:
        shard = DEFAULT_SHARD if max_shard_size is None else max_shard_size
        return replace(result, files=tuple(merging.write(loader, out, shard, overwrite)))
    if as_task is not None:
        merging.store(loader, as_task, overwrite, timeout)
        return replace(result, task=as_task)
    # The last one loaded is not kept over the search: two models in memory are one too many.
    return replace(result, state=merging.load(loader))


def _rules(
    rule: str | MergeRule,
    k: int | Sequence[int] | None,
    evaluate: EvaluateMerge | None,
    tasks: int,
) -> list[MergeRule]:
    """The rule, for each k to try."""
    named = isinstance(rule, str) and rule in RULES and "k" in RULES[rule].options
    if k is None and not named:
        return [merge_rule(rule)]
    ks = check_ks(k, evaluate=evaluate is not None, tasks=tasks)
    if isinstance(rule, Consensus):
        return [rule if value is None else replace(rule, k=value) for value in ks]
    return [merge_rule(rule, k=value) for value in ks]


class _Merging:
    """The tasks of one merge, checked and described."""

    def __init__(
        self,
        snapshot: Snapshot,
        catalog: Catalog,
        tasks: Sequence[str] | None,
        private: str | None,
        device: torch.device,
        meter: Meter,
    ) -> None:
        self._device = device
        self._weights = None if device.type == "cpu" else DeviceWeights(device)
        self._snapshot = snapshot
        self._catalog = catalog
        self._meter = meter
        self.tasks = chosen_tasks(snapshot, catalog, tasks)
        described = {name: describe(snapshot, catalog, task=name) for name in self.tasks}
        self._documents = {name: _document(found) for name, found in described.items()}
        self._base = next(iter(described.values())).base
        if not any(a.weights and is_codable(a.dtype) for a in self._base.layout.arenas):
            raise MismatchError(
                f"{snapshot.path}: the base has no float32, bfloat16 or float16 weights to merge"
            )
        self._like = choose_layout(snapshot, described, private, known=list(catalog.tasks))
        self._unmerged = unmerged(described)

    def ready(self, rule: MergeRule) -> MergeRule:
        """A rule whose needs the tasks meet.

        Raises
        ------
        OptionError
            Its options do not fit the tasks; or it needs masks, and a task has none, or one made
            for another vector.
        """
        rule.check(self.tasks)
        if rule.masks:
            check_masks(self._snapshot, self._catalog, self.tasks, rule.name)
        return rule

    def plain(self) -> Loader:
        """A loader of what the merge is laid out like."""
        return Loader(self._snapshot, self._catalog, task=self._like)

    def _surveyed(self, rule: MergeRule) -> Blend:
        """A rule that has made its surveys, its scaling still to be set."""
        shared = shared_divisor(self._catalog, self.tasks, rule)
        feed = StoreFeed(
            self._snapshot,
            self._base,
            self._documents,
            vector=self._catalog.vector,
            masks=rule.masks,
            shared=shared,
            device=self._weights,
        )
        if shared is not None:
            rule = over_shared(rule)
        arenas = [self._base.layout.arenas[n] for n in feed.arenas]
        total = sum(a.weights * a.chunk_size // a.span for a in arenas) * len(self.tasks)
        progress = self._meter.stage("survey", total * rule.surveys)
        with workers(feed.threads) as pool:
            return Blend(
                feed=feed,
                surveyed=survey(rule, feed, workers=pool, progress=progress),
                alpha=1.0,
            )

    def choose(
        self,
        rules: Sequence[MergeRule],
        alphas: Sequence[float],
        evaluate: EvaluateMerge | None,
    ) -> tuple[Merge, MergedLoader]:
        """The best of all, the first of equals: the smallest k, then the smallest alpha."""
        best: tuple[Merge, MergedLoader] | None = None
        for rule in rules:
            surveyed = self._surveyed(rule)
            if evaluate is not None and len(alphas) > 1:
                surveyed = replace(surveyed, kept={})
            for alpha in alphas:
                blend = replace(surveyed, alpha=alpha)
                loader = MergedLoader(
                    self._snapshot, self._catalog, like=self._like, blend=blend, device=self._device
                )
                found = self._result(rule, blend)
                if evaluate is not None:
                    what = f"{rule.name}, {dict(rule.parameters())}, alpha {alpha}"
                    score = score_of(evaluate, self.load(loader), what)
                    found = replace(found, score=score)
                if best is None or _better(found, best[0]):
                    best = found, loader
        if best is None:
            raise OptionError("no alpha to choose from")
        return best

    def _result(self, rule: MergeRule, blend: Blend) -> Merge:
        shared = blend.feed.shared
        return Merge(
            rule=rule.name,
            tasks=self.tasks,
            alpha=blend.alpha,
            k=rule.k if isinstance(rule, Consensus) else None,
            score=None,
            vectors=origin(self._catalog, self.tasks, shared),
            layout=self._like,
            notes=(*self._unmerged, *remarks(self._catalog, self.tasks, rule, shared)),
        )

    # -- where it goes ----------------------------------------------------------------------

    def _stage(self, loader: MergedLoader) -> Callable[[int], None]:
        total = sum(segment.nbytes for segment in loader.contents.segments)
        return self._meter.stage("merge", total)

    def load(self, loader: MergedLoader) -> Any:
        """The merged object in memory, just as it would be written."""
        return loader.load(progress=self._stage(loader))

    def write(self, loader: MergedLoader, out: Path, shard: int, overwrite: bool) -> list[Path]:
        """A safetensors file, or a model directory."""
        progress = self._stage(loader)
        return export(loader, out, max_shard_size=shard, overwrite=overwrite, progress=progress)

    def store(self, loader: MergedLoader, name: str, overwrite: bool, timeout: float) -> None:
        """A task of the same store, an exact difference from the base."""
        from tallstore.appending import append_tasks

        with MergedSource(loader, label=loader.what) as source:
            append_tasks(
                self._snapshot.path,
                {name: source},
                overwrite=overwrite,
                strict=False,
                compress=True,
                timeout=timeout,
                report=self._meter.report,
            )


def _better(one: Merge, other: Merge) -> bool:
    return one.score is not None and other.score is not None and one.score > other.score


def _document(described: Description) -> TaskDocument:
    if described.task is None:
        raise CorruptStoreError(f"{described.what}: it has no document")
    return described.task
