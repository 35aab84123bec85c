"""Adding tasks to a store that is there: as codes, or as exact differences from its base.

No other task is touched, and none of the other originals is needed, whatever the code, but for TALL
masks: those belong to a vector that was merged from the tasks themselves (`tallstore.repacking`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from tallstore.catalog import Catalog, TaskRecord, VectorRecord, check_task_name, now
from tallstore.documents import BaseDocument
from tallstore.engine.newfile import NewFile
from tallstore.engine.session import WriteSession
from tallstore.errors import CorruptStoreError, OptionError, TallstoreError, TaskExistsError
from tallstore.externalbase import place_of, refer
from tallstore.loading import Loader
from tallstore.matching import match
from tallstore.packing.calibrating import Calibrate
from tallstore.packing.choosing import Evaluate
from tallstore.packing.codeoptions import MOST_BITS, CodeOptions, code_options
from tallstore.packing.encodings import policy
from tallstore.packing.files import known_files
from tallstore.packing.gathering import Candidate
from tallstore.packing.newstore import NewStore
from tallstore.packing.overspending import overspent
from tallstore.packing.planning import Planner
from tallstore.packing.target import Target
from tallstore.packing.tasks import encode_tasks
from tallstore.progress import Meter, Report
from tallstore.sources.source import Source
from tallstore.storesource import StoreSource
from tallstore.workers import Workers, workers
from tallstore.writing import HeldStore, commit, held_for_writing, without_idle_vector

__all__ = ["append_tasks", "options_like"]

#: A newcomer that errs so much more than the tasks a profile was made of gets another bit.
_MUCH_WORSE: Final = 1.1
#: What a module of the caller's had a part in.
_BY_MODULE: Final = frozenset({"corrected", "distil"})
#: Of what tasks were coded with, what a newcomer is; a share of a score, too, with `evaluate`.
_ALIKE: Final = ("density", "bits", "over", "gain", "bits_per_weight", "max_error")


def append_tasks(
    path: Path,
    tasks: Mapping[str, Source],
    *,
    options: CodeOptions | None = None,
    like_store: bool = False,
    evaluate: Evaluate | None = None,
    calibrate: Calibrate | None = None,
    distil: int | None = None,
    exact: bool | None = None,
    overwrite: bool,
    strict: bool,
    compress: bool,
    timeout: float,
    report: Report | None,
) -> list[str]:
    """Add tasks; no other task is touched.

    Parameters
    ----------
    options
        How they are coded; None: as exact differences from the base.
    like_store
        Where `options` is None: code them as the store's tasks are, if those are coded alike and
        without a vector that was merged from them.
    evaluate, calibrate
        The caller's, to try codes with.
    distil
        Steps, where codes are as the store's.
    exact
        Whether the exact tier is kept; None: only where there are no codes.
    overwrite
        Whether a task of the same name is replaced.
    strict
        Refuse what is no fine-tune of the base.

    Returns
    -------
    list of str
        Remarks.

    Raises
    ------
    TaskExistsError, TaskNameError, MismatchError
    OptionError
        The codes do not fit the store, or a budget cannot be met.
    """
    for name in tasks:
        check_task_name(name)
    with held_for_writing(path, timeout=timeout) as held, workers() as pool:
        catalog, base = held.catalog, held.base()
        if catalog.base is None:
            raise CorruptStoreError(f"{path}: the store holds no base")
        taken = [name for name in tasks if name in catalog.tasks]
        if taken and not overwrite:
            raise TaskExistsError(
                f"{path}: holds a task {taken[0]!r} already; give another name, or "
                "overwrite=True (--overwrite) to replace it"
            )
        if options is None and like_store:
            options = options_like(
                catalog,
                evaluate=evaluate is not None,
                calibrate=calibrate is not None,
                distil=distil,
            )
        tried = evaluate is not None or calibrate is not None
        if tried and (options is None or options.shared):
            kept = "kept exactly" if options is None else "coded over a vector that is there"
            raise OptionError(
                f"{path}: {', '.join(tasks)} would be {kept}, and nothing is to be tried out by "
                "evaluate= or calibrate=; give another code= too, or leave them away"
            )
        vector = _vector(path, catalog, options)
        meter = Meter(report)
        targets, notes = [], []
        for name, source in tasks.items():
            coded = options is not None
            candidate, remarks = _candidate(name, source, base, coded=coded, strict=strict)
            notes += remarks
            if options is None:
                # A save is to be read by every reader there is; what is added may be smaller.
                parameters: dict[str, Any] | None = {} if compress else None
                targets.append(Target(candidate=candidate, exact=True, parameters=parameters))
                continue
            if tried:
                target, remarks = _tried(
                    held, candidate, options, evaluate, calibrate, exact, pool, meter
                )
            else:
                target, remarks = _target(
                    held, base, vector, candidate, options, exact, pool, meter
                )
            targets.append(target)
            notes += remarks
        total = sum(t.candidate.plan.coded for t in targets) * 4
        room = sum(s.nbytes for source in tasks.values() for s in source.segments)
        with WriteSession(held.environment, held.manifest, room=room) as session:
            records = encode_tasks(
                session,
                held.snapshot,
                base,
                vector,
                targets,
                identity=catalog.base.identity,
                known_files=known_files(held.snapshot, base),
                created=now(),
                compress=compress,
                workers=pool,
                progress=meter.stage("add", total),
            )
            after = without_idle_vector(replace(catalog, tasks={**catalog.tasks, **records}))
            commit(session, after)
        if options is not None and options.budget is not None and options.keep is None:
            notes += _on_budget(held, replace(after, tasks=records), options.budget)
            notes += _unscored(catalog, options)
    return notes


def _on_budget(held: HeldStore, added: Catalog, budget: float) -> list[str]:
    """A remark on what was committed; none where that cannot be read: it is stored all the same."""
    with suppress(TallstoreError), held.committed() as written:
        remark = overspent(written, added, budget)
        return [] if remark is None else [remark]
    return []


def options_like(
    catalog: Catalog, *, evaluate: bool = False, calibrate: bool = False, distil: int | None = None
) -> CodeOptions | None:
    """The options of a store's tasks, where they are coded alike and are appended to.

    Parameters
    ----------
    evaluate, calibrate, distil
        What a newcomer is coded with besides.
    """
    # How codes were made by a module of the caller's says nothing of how others are coded.
    found = [
        (record.code, {n: v for n, v in (record.parameters or {}).items() if n not in _BY_MODULE})
        for record in catalog.tasks.values()
        if record.code != "none"
    ]
    if not found or any(other != found[0] for other in found) or found[0][0] == "tall":
        return None
    code, parameters = found[0]
    alike: dict[str, Any] = {n: parameters[n] for n in _ALIKE if n in parameters}
    if evaluate:
        alike["keep"] = parameters.get("keep")
    return code_options(code=code, evaluate=evaluate, calibrate=calibrate, distil=distil, **alike)


def _unscored(catalog: Catalog, options: CodeOptions) -> list[str]:
    """A remark where tasks were coded by their scores, and newcomers are not."""
    shares = [(record.parameters or {}).get("keep") for record in catalog.tasks.values()]
    if not any(shares):
        return []
    return [
        f"the store's tasks keep a share of their score (keep={max(filter(None, shares))}); what "
        f"is added without keep= and evaluate= may take {options.budget:g} bits a weight"
    ]


def _vector(path: Path, catalog: Catalog, options: CodeOptions | None) -> VectorRecord | None:
    if options is None or not options.shared:
        return None
    vector = catalog.vector
    if vector is None or vector.rule != "profile":
        kept = "none" if vector is None else f"one merged by {vector.rule!r}"
        raise OptionError(
            f"{path}: levels over a shared vector need a profile of magnitudes, and the store's "
            f"vector is {kept}; give over='none' (--over none), or repack"
        )
    return vector


def _candidate(
    name: str, source: Source, base: BaseDocument, *, coded: bool, strict: bool
) -> tuple[Candidate, list[str]]:
    plan = match(
        source.label,
        source.tensors,
        source.segments,
        base=base.contents,
        layout=base.layout,
        floats_only=coded,
        strict=strict,
    )
    return Candidate(name, source, plan, base.layout), [*source.notes, *plan.notes]


def _target(
    held: HeldStore,
    base: BaseDocument,
    vector: VectorRecord | None,
    candidate: Candidate,
    options: CodeOptions,
    exact: bool | None,
    pool: Workers,
    meter: Meter,
) -> tuple[Target, list[str]]:
    """How a newcomer is coded: over a profile made without it, with as many bits as it takes."""
    usual = _usual_error(held.catalog.tasks.values()) if vector is not None else None
    planner = Planner(held.snapshot, base, vector, options, workers=pool, meter=meter)
    found = planner.survey(candidate)
    made = planner.made(candidate, found, options, exact=bool(exact))
    first = planner.relative_error(made, found)
    if usual is None or first <= _MUCH_WORSE * usual:
        return made, []
    error, wider = first, options
    while error > _MUCH_WORSE * usual and (wider.bits or MOST_BITS) < MOST_BITS:
        wider = replace(wider, bits=(wider.bits or 0) + 1)
        made = planner.made(candidate, found, wider, exact=bool(exact))
        error = planner.relative_error(made, found)
    return made, [
        f"{candidate.name}: the stored profile was made without it and serves it badly: relative "
        f"error {first:.2f} with {options.bits} bits, {usual:.2f} for the tasks there; coded with "
        f"{wider.bits} bits, {error:.2f}"
    ]


def _tried(
    held: HeldStore,
    candidate: Candidate,
    options: CodeOptions,
    evaluate: Evaluate | None,
    calibrate: Calibrate | None,
    exact: bool | None,
    pool: Workers,
    meter: Meter,
) -> tuple[Target, list[str]]:
    """How a newcomer is coded, by what the caller's functions say of it.

    They are asked about codes that are written, for a moment, to a file beside the store.
    """
    path, record = held.snapshot.path, held.catalog.base
    if record is None:
        raise CorruptStoreError(f"{path}: the store holds no base")
    home = path if record.external is None else place_of(path, record.external)
    base = StoreSource(Loader(held.snapshot, held.catalog, task=None), label=str(path))
    new = NewFile(path)
    try:
        store = NewStore(new, base, [candidate], pool, meter, refer(path, home, record.identity))
        store.base_and_vector(None, "float32", policy(False))
        (target,), notes = store.targets(options, evaluate, calibrate, exact=bool(exact))
    finally:
        new.discard()
    return target, notes


def _usual_error(records: Iterable[TaskRecord]) -> float | None:
    errors = [
        record.relative_error
        for record in records
        if record.shared and record.relative_error is not None
    ]
    return fmean(errors) if errors else None
