"""Changing how a store that is there keeps its tasks: add, repack, strip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from tallstore.errors import OptionError
from tallstore.store import StorePath, TallStore, store_path

if TYPE_CHECKING:
    from tallstore.merging import MergeRule
    from tallstore.packing.calibrating import Calibrate
    from tallstore.packing.choosing import Evaluate
    from tallstore.progress import Report

__all__ = ["add", "repack", "strip"]

#: Of what goes with a code, what is not None if nobody says anything.
_DEFAULTS: Final = {"over": "none", "gain": "unbiased", "seed": 0}


def add(
    path: StorePath,
    tasks: Mapping[str, Any],
    *,
    code: str | None = None,
    density: float | None = None,
    bits: int | None = None,
    over: str = "none",
    gain: str = "unbiased",
    seed: int = 0,
    bits_per_weight: float | None = None,
    max_error: float | None = None,
    keep: float | None = None,
    evaluate: Evaluate | None = None,
    calibrate: Calibrate | None = None,
    distil: int | None = None,
    exact: bool | None = None,
    originals: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    timeout: float = 60.0,
    report: Report | None = None,
) -> list[str]:
    """Add tasks to a store; no other task is touched, and no other original is needed.

    But for one code: a TALL mask only serves tasks that the shared vector was merged from. With
    ``code="tall"`` the whole store is merged and masked anew, all or nothing, out of its exact
    tiers and `originals`.

    Parameters
    ----------
    path
        The store.
    tasks
        Checkpoints by name, each given as `pack` takes them.
    code, density, bits, over, gain, seed, bits_per_weight, max_error, keep
        As for `pack`. ``"exact"`` keeps the exact difference from the base, and no code. None: as
        the store's own tasks are coded; exact where those have TALL masks, or differ. Levels over
        a stored profile of magnitudes that serves a newcomer badly get more bits, and a remark.
    evaluate, calibrate, distil
        As for `pack`, of newcomers alone; not over a stored profile. Codes are tried out in a file
        beside the store, which takes as much room as they do.
    exact
        Keep the exact tier beside the code too. With ``exact=True`` and a task that is there as
        codes alone, the checkpoint that it was coded from restores its exact tier.
    originals
        With ``code="tall"``, checkpoints of the tasks that have no exact tier.
    overwrite
        Replace tasks of the same name.
    timeout, report
        As for `save`.

    Returns
    -------
    list of str
        Remarks.

    Raises
    ------
    TaskExistsError, TaskNameError, MismatchError
    OptionError
        A value out of range, or a code that the store cannot take.
    """
    from tallstore.packing.codeoptions import code_options

    place = store_path(path)
    given: dict[str, Any] = {
        "density": density,
        "bits": bits,
        "over": over,
        "gain": gain,
        "seed": seed,
        "bits_per_weight": bits_per_weight,
        "max_error": max_error,
        "keep": keep,
    }
    tries = {"evaluate": evaluate is not None, "calibrate": calibrate is not None}
    options = None
    if code not in (None, "exact"):
        options = code_options(code=code, distil=distil, **tries, **given)
    else:
        if calibrate is None:
            given["distil"] = distil
        idle = [n for n, value in given.items() if value != _DEFAULTS.get(n)]
        if idle:
            raise OptionError(f"{idle[0]}={given[idle[0]]!r}: it goes with a code; give code= too")
    if originals and code != "tall":
        raise OptionError("originals=: no other task is coded anew but by code='tall'")
    if code == "exact" and exact is False:
        raise OptionError("code='exact' with exact=False keeps nothing of a task")
    with ExitStack() as stack:
        if options is not None and options.code == "tall":
            from tallstore.repacking import repack_store

            return repack_store(
                place,
                None,
                options=options,
                originals=_opened(stack, originals or {}),
                newcomers=_opened(stack, tasks),
                evaluate=evaluate,
                exact=exact,
                replace_tasks=overwrite,
                timeout=timeout,
                report=report,
            )
        with TallStore(place, "a", timeout=timeout) as store:
            there = [name for name in tasks if name in store.tasks]
            lossy = [name for name in there if not store.tasks[name].exact]
            if exact and code is None and not overwrite and lossy and len(there) == len(tasks):
                from tallstore.exacttier import restore_exact

                sources = _opened(stack, {name: tasks[name] for name in lossy})
                remarks = restore_exact(place, sources, timeout=timeout, report=report)
                whole = [name for name in there if name not in lossy]
                return [*remarks, *(f"{name}: has its exact tier already" for name in whole)]
            return store.add(
                tasks,
                code=options,
                like_store=code is None,
                evaluate=evaluate,
                calibrate=calibrate,
                distil=distil,
                exact=exact,
                overwrite=overwrite,
                report=report,
            )


def _opened(stack: ExitStack, tasks: Mapping[str, Any]) -> dict[str, Any]:
    from tallstore.opening import open_checkpoint

    return {name: stack.enter_context(open_checkpoint(what)) for name, what in tasks.items()}


def repack(
    path: StorePath,
    out: StorePath | None = None,
    *,
    code: str = "tall",
    density: float | None = None,
    bits: int | None = None,
    over: str = "none",
    gain: str = "unbiased",
    seed: int = 0,
    bits_per_weight: float | None = None,
    max_error: float | None = None,
    keep: float | None = None,
    merge: str | MergeRule | None = None,
    tall_lambda: float | Sequence[float] | None = None,
    evaluate: Evaluate | None = None,
    calibrate: Calibrate | None = None,
    distil: int | None = None,
    vector_dtype: str | None = None,
    exact: bool | None = None,
    compress: bool = False,
    originals: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    timeout: float = 60.0,
    report: Report | None = None,
) -> list[str]:
    """Code all tasks of a store anew: another code, other bits, another vector or rule.

    The tasks are read from their exact tiers, or from `originals`; nothing is ever coded from what
    codes alone give back. The store is as it was until the new one is whole.

    Parameters
    ----------
    path
        The store.
    out
        Where the new store goes; None: in the place of the old one.
    code, density, bits, over, gain, seed, bits_per_weight, max_error, keep
        As for `pack`.
    merge, vector_dtype
        As for `pack`; None: as they are.
    tall_lambda, evaluate, calibrate, distil, compress
        As for `pack`.
    exact
        Keep the exact tier; None: if every task has one.
    originals
        Checkpoints of tasks that have no exact tier, by name; others than they were made from are
        refused.
    overwrite
        Replace a store at `out`.
    timeout, report
        As for `save`.

    Returns
    -------
    list of str
        Remarks.

    Raises
    ------
    OptionError
        A task is there as codes alone, and its original is not given; or a value out of range.
    UnknownTaskError, MismatchError, StoreExistsError, StoreLockedError
    """
    from tallstore.packing.codeoptions import code_options
    from tallstore.repacking import repack_store

    place = store_path(path)
    target = None if out is None else store_path(out)
    options = code_options(
        evaluate=evaluate is not None,
        calibrate=calibrate is not None,
        code=code,
        density=density,
        bits=bits,
        over=over,
        gain=gain,
        seed=seed,
        bits_per_weight=bits_per_weight,
        max_error=max_error,
        keep=keep,
        distil=distil,
    )
    with ExitStack() as stack:
        return repack_store(
            place,
            None if target == place else target,
            options=options,
            originals=_opened(stack, originals or {}),
            merge=merge,
            tall_lambda=tall_lambda,
            evaluate=evaluate,
            calibrate=calibrate,
            vector_dtype=vector_dtype,
            exact=exact,
            compress=compress,
            overwrite=overwrite,
            timeout=timeout,
            report=report,
        )


def strip(
    path: StorePath,
    tasks: Sequence[str] | None = None,
    *,
    timeout: float = 60.0,
    report: Report | None = None,
) -> list[str]:
    """Drop the exact tier of tasks: from then on they load as their codes alone give them.

    Later writes use the space again; `compact` gives it back.

    Parameters
    ----------
    path
        The store.
    tasks
        Which; None: all that have codes beside their exact tier.
    timeout, report
        As for `save`.

    Returns
    -------
    list of str
        The tasks that were stripped.

    Raises
    ------
    UnknownTaskError
    OptionError
        A task has no exact tier, or no codes.
    """
    from tallstore.exacttier import strip_exact

    if isinstance(tasks, str):
        raise OptionError(f"tasks={tasks!r}: a list of names is needed")
    return strip_exact(
        store_path(path),
        None if tasks is None else list(tasks),
        timeout=timeout,
        report=report,
    )
