"""Coding all tasks of a store anew: other codes, other bits, another vector, or one task more.

What the tasks were is read from their exact tiers, or from originals that are given; the new file
takes the old one's place once it is whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tallstore.catalog import Catalog, check_task_name
from tallstore.documents import ExternalReference
from tallstore.engine.writerlock import WriterLock
from tallstore.errors import OptionError, TaskExistsError, UnknownTaskError
from tallstore.externalbase import place_of, refer
from tallstore.loading import Loader
from tallstore.merging import MergeRule, merge_rule
from tallstore.originals import check_original
from tallstore.packing.calibrating import Calibrate
from tallstore.packing.choosing import Evaluate
from tallstore.packing.codeoptions import CodeOptions
from tallstore.packing.pack import pack_zoo
from tallstore.progress import Meter, Report
from tallstore.sources.source import Source
from tallstore.store import open_snapshot
from tallstore.storesource import StoreSource
from tallstore.workers import workers

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["repack_store"]


def repack_store(
    path: Path,
    out: Path | None,
    *,
    options: CodeOptions,
    originals: Mapping[str, Source] | None = None,
    newcomers: Mapping[str, Source] | None = None,
    merge: str | MergeRule | None = None,
    tall_lambda: float | Sequence[float] | None = None,
    evaluate: Evaluate | None = None,
    calibrate: Calibrate | None = None,
    vector_dtype: str | None = None,
    exact: bool | None = None,
    compress: bool = False,
    overwrite: bool = False,
    replace_tasks: bool = False,
    timeout: float,
    report: Report | None,
) -> list[str]:
    """Pack a store's tasks anew, all or nothing; see `tallstore.repack`.

    Parameters
    ----------
    out
        Where the new store goes; None: in the place of the old one.
    originals
        Checkpoints that tasks were made from: they are compared with what the store has of them.
    newcomers
        Tasks to add on the way.
    replace_tasks
        Whether newcomers take the place of tasks of the same name.
    vector_dtype
        None: as it is.
    exact
        Whether the exact tier is kept; None: if every task has one.

    Returns
    -------
    list of str
        Remarks.

    Raises
    ------
    UnknownTaskError
        An original is given for no task.
    MismatchError
        An original is not the checkpoint that its task was made from.
    TaskExistsError, TaskNameError
    OptionError
        A task is only there as codes, and no original of it is given; or the codes' own refusals.
    """
    given = dict(originals or {})
    fresh = dict(newcomers or {})
    with ExitStack() as stack:
        if out is None:
            # Before anything is read: what another writer commits from here on would be lost.
            stack.enter_context(WriterLock(path, timeout=timeout))
        snapshot = open_snapshot(path)
        closing = stack.enter_context(ExitStack())
        closing.callback(snapshot.close)
        catalog = Catalog.from_json(snapshot.manifest.body, what=str(path))
        if replace_tasks:
            gone = fresh.keys() & catalog.tasks.keys()
            there = {n: task for n, task in catalog.tasks.items() if n not in gone}
            catalog = replace(catalog, tasks=there)
        _check(path, catalog, given, fresh)
        meter = Meter(report)
        with workers() as pool:
            for name, source in given.items():
                checking = meter.stage("check", catalog.tasks[name].nbytes)
                check_original(snapshot, catalog, name, source, workers=pool, progress=checking)

        def stored(task: str | None) -> StoreSource:
            label = str(path) if task is None else f"{path}::{task}"
            return StoreSource(Loader(snapshot, catalog, task=task), label=label)

        tasks: dict[str, Source] = {n: given[n] if n in given else stored(n) for n in catalog.tasks}
        base = stored(None)
        external = None
        if catalog.base is not None and catalog.base.external is not None:
            external = ExternalReference(catalog.base.external, catalog.base.identity)
            if out is not None:
                # A path from the old store's directory leads elsewhere from the new one's.
                external = refer(out, place_of(path, external.path), external.identity)
        rule, dtype = _vector(catalog, options, merge, vector_dtype)
        whole = all(task.exact for task in catalog.tasks.values())
        return pack_zoo(
            path if out is None else out,
            base,
            {**tasks, **fresh},
            merge=rule,
            options=options,
            tall_lambda=tall_lambda,
            evaluate=evaluate,
            calibrate=calibrate,
            vector_dtype=dtype,
            exact=whole if exact is None else exact,
            compress=compress,
            external=external,
            overwrite=True if out is None else overwrite,
            timeout=timeout,
            report=report,
            locked=out is None,
            # The old file is not replaced while it is being read.
            before_publishing=closing.close,
        )


def _check(
    path: Path, catalog: Catalog, given: Mapping[str, Any], fresh: Mapping[str, Any]
) -> None:
    for name in given:
        if name not in catalog.tasks:
            known = ", ".join(map(repr, catalog.tasks)) or "none"
            raise UnknownTaskError(
                f"{path}: an original is given for {name!r}, and there is no such task; there are: "
                f"{known}"
            )
    for name in fresh:
        if check_task_name(name) in catalog.tasks:
            raise TaskExistsError(
                f"{path}: holds a task {name!r} already; give another name, or remove it first"
            )
    lossy = [n for n, task in catalog.tasks.items() if not task.exact and n not in given]
    if lossy:
        raise OptionError(
            f"{path}: of {', '.join(map(repr, lossy))} there are codes alone, which are lossy; "
            "coding them again would add to the loss. Give their originals (--original NAME=PATH)"
        )


def _vector(
    catalog: Catalog,
    options: CodeOptions,
    merge: str | MergeRule | None,
    dtype: str | None,
) -> tuple[str | MergeRule | None, str]:
    """The rule and dtype of the shared vector: as they are, unless the caller says otherwise."""
    kept = catalog.vector
    if kept is None or not options.shared:
        return merge, dtype or "bfloat16"
    if dtype is None:
        dtype = kept.dtype.removeprefix("u") if kept.dtype.startswith("u") else kept.dtype
    if merge is None and options.code == "tall" and kept.rule != "profile":
        parameters = {n: value for n, value in kept.parameters.items() if value is not None}
        merge = merge_rule(kept.rule, **parameters)
    return merge, dtype
