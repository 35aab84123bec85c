"""Packing a zoo: a base and its fine-tunes into a new store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tallstore.catalog import check_task_name
from tallstore.devices import wanted_device
from tallstore.documents import ExternalReference
from tallstore.dtypes import CODABLE
from tallstore.engine.newfile import NewFile
from tallstore.engine.writerlock import WriterLock
from tallstore.errors import EmptyZooError, MismatchError, OptionError, StoreExistsError
from tallstore.layout import lay_out
from tallstore.matching import match
from tallstore.merging import MergeRule, Profile, merge_rule
from tallstore.packing.calibrating import Calibrate
from tallstore.packing.choosing import Evaluate, check_lambdas
from tallstore.packing.codeoptions import CodeOptions
from tallstore.packing.encodings import policy
from tallstore.packing.gathering import Candidate
from tallstore.packing.masks import masks_on
from tallstore.packing.newstore import NewStore, contents_of
from tallstore.progress import Meter, Report
from tallstore.sources.source import Source
from tallstore.workers import workers

if TYPE_CHECKING:
    import torch

__all__ = ["VECTOR_DTYPES", "pack_zoo"]

#: How the shared vector can be kept.
VECTOR_DTYPES: Final = (*sorted(CODABLE), "int8", "int4")


def _rule(
    merge: str | MergeRule | None, tasks: Sequence[str], options: CodeOptions
) -> MergeRule | None:
    """What makes the shared vector; None where the codes need none."""
    if not options.shared:
        if merge is not None:
            raise OptionError(
                f"merge={merge!r}: code={options.code!r} has no shared vector to merge; "
                "code='tall' and over='shared' have"
            )
        return None
    if options.code == "levels" and merge in (None, "profile"):
        return Profile()
    rule = merge_rule("ta" if merge is None else merge)
    if rule.masks:
        raise OptionError(
            f"merge={rule.name!r}: it takes stored masks, which are made for a shared vector; pack "
            "with 'ta' or 'ties', then merge the store with it"
        )
    rule.check(tasks)
    return rule


def _candidates(base: Source, tasks: Mapping[str, Source]) -> list[Candidate]:
    contents = contents_of(base)
    layout = lay_out(contents.segments)
    if not any(arena.dtype in CODABLE and arena.weights for arena in layout.arenas):
        raise MismatchError(
            f"{base.label}: the base has no float32, bfloat16 or float16 weights to mask"
        )
    found = []
    for name, source in tasks.items():
        plan = match(
            source.label,
            source.tensors,
            source.segments,
            base=contents,
            layout=layout,
            floats_only=True,
            strict=True,
        )
        found.append(Candidate(check_task_name(name), source, plan, layout))
    return found


def pack_zoo(
    path: Path,
    base: Source,
    tasks: Mapping[str, Source],
    *,
    merge: str | MergeRule | None = None,
    options: CodeOptions | None = None,
    tall_lambda: float | Sequence[float] | None = None,
    evaluate: Evaluate | None = None,
    calibrate: Calibrate | None = None,
    vector_dtype: str = "bfloat16",
    exact: bool = False,
    compress: bool = False,
    device: torch.device | str | None = None,
    external: ExternalReference | None = None,
    overwrite: bool = False,
    timeout: float = 60.0,
    report: Report | None = None,
    locked: bool = False,
    before_publishing: Callable[[], None] | None = None,
) -> list[str]:
    """Write a new store from a base and its fine-tunes; see `tallstore.pack`.

    Parameters
    ----------
    options
        How tasks are coded; TALL masks if None.
    external
        Refer to the base there, which `base` reads, in place of writing its elements.
    locked
        Whether the caller has the lock of writers to `path`.
    before_publishing
        Called once all is written, before the file takes its place.

    Returns
    -------
    list of str
        Remarks on what was found and done.
    """
    if not tasks:
        raise EmptyZooError(f"{path}: no tasks to pack; give NAME=PATH, or a directory of them")
    if vector_dtype not in VECTOR_DTYPES:
        raise OptionError(f"vector_dtype={vector_dtype!r}: {', '.join(VECTOR_DTYPES)}")
    options = CodeOptions() if options is None else options
    rule = _rule(merge, list(tasks), options)
    lambdas = check_lambdas(tall_lambda, evaluate=evaluate is not None)
    if options.code != "tall" and tall_lambda is not None:
        raise OptionError(f"tall_lambda={tall_lambda}: it is for code='tall'")
    on = wanted_device(device)
    if options.code != "tall" and on.type != "cpu":
        raise OptionError(
            f"device={device}: code={options.code!r} is encoded on the CPU; leave device= away"
        )
    masks = masks_on(on)
    candidates = _candidates(base, tasks)
    with nullcontext() if locked else WriterLock(path, timeout=timeout):
        if path.exists() and not overwrite:
            raise StoreExistsError(f"{path}: there already; remove it, or pack to another path")
        new = NewFile(path)
        try:
            with workers() as pool:
                packing = NewStore(new, base, candidates, pool, Meter(report), external)
                packing.base_and_vector(rule, vector_dtype, policy(compress))
                if options.code == "tall":
                    remarks = packing.masks(lambdas, evaluate, masks, exact=exact)
                else:
                    remarks = packing.codes(options, evaluate, calibrate, exact=exact)
            if before_publishing is not None:
                before_publishing()
            tried = options.code != "tall" and (evaluate is not None or calibrate is not None)
            _publish(new, path, tried=tried, timeout=timeout)
        finally:
            new.discard()
    notes = [note for candidate in candidates for note in candidate.plan.notes]
    return [*base.notes, *(n for s in tasks.values() for n in s.notes), *notes, *remarks]


def _publish(new: NewFile, path: Path, *, tried: bool, timeout: float) -> None:
    """Put the new file in its place; without the room of what was tried, where anything was."""
    if not tried:
        new.publish(timeout=timeout)
        return
    small = NewFile(path)
    try:
        small.copy_of(new.environment)
        small.publish(timeout=timeout)
    finally:
        small.discard()
