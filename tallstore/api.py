"""The functions most people need: save, load, open, pack, merge, relink, compact."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tallstore.errors import OptionError
from tallstore.store import StorePath, TallStore, store_path

if TYPE_CHECKING:
    import torch

    from tallstore.mergestream.grid import EvaluateMerge
    from tallstore.mergestream.merge import Merge
    from tallstore.merging import MergeRule
    from tallstore.packing.calibrating import Calibrate
    from tallstore.packing.choosing import Evaluate
    from tallstore.progress import Report

__all__ = ["compact", "load", "merge", "open", "pack", "relink", "save"]


def save(
    obj: Any,
    path: StorePath,
    *,
    task: str | None = None,
    overwrite: bool = False,
    compress: bool = False,
    timeout: float = 60.0,
    report: Report | None = None,
) -> None:
    """Save an object losslessly; in place of ``torch.save``.

    The file is there whole, and on disk, when this returns; if it fails or is killed, what was
    there before still is.

    Parameters
    ----------
    obj
        Any nesting of dict, OrderedDict, list, tuple, set, frozenset, str, bytes, int, float,
        complex, bool, None, torch.Size, dtypes, devices, numpy arrays and scalars, and tensors
        of every dtype, layout and stride; a `torch.nn.Module` stands for its state dict.
    path
        The store's file, such as ``"model.tall"``. Without `task` it is made, or replaced.
    task
        Store the object as a task of the store at `path`: an exact difference from its base.
    overwrite
        Allow replacing a store that has tasks, or the task of that name.
    compress
        Compress weights too: floats shrink by a sixth (float32) to a third (bfloat16), and
        saving takes longer.
    timeout
        Seconds to wait for another writer.
    report
        Called with (stage, bytes done, bytes in all).

    Raises
    ------
    UnsupportedObjectError
        Something in `obj` cannot be stored; the message gives its path.
    StoreExistsError, TaskExistsError
        Something would be lost; see `overwrite`.
    StoreFullError, StoreReadOnlyError, StoreLockedError, NotAStoreError
        The place does not take it.
    """
    from tallstore.appending import append_tasks
    from tallstore.objects import ObjectSource
    from tallstore.writing import write_object

    place = store_path(path)
    with ObjectSource(obj) as source:
        if task is None:
            write_object(
                place,
                source,
                overwrite=overwrite,
                compress=compress,
                timeout=timeout,
                report=report,
            )
        else:
            append_tasks(
                place,
                {task: source},
                overwrite=overwrite,
                strict=False,
                compress=compress,
                timeout=timeout,
                report=report,
            )


def load(
    path: StorePath,
    *,
    task: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    names: Iterable[str] | None = None,
    out: Any = None,
    fidelity: str | None = None,
    external_base: StorePath | None = None,
    report: Report | None = None,
) -> Any:
    """Load what was saved or packed; in place of ``torch.load``. Every byte read is verified.

    Parameters
    ----------
    path
        The store's file.
    task
        A task's name; None for the base, which is what a plain `save` stored.
    device
        Where tensors go; None for the CPU, wherever they were saved from.
    dtype
        Convert floating tensors; None keeps theirs.
    names
        Load only the tensors of these names (shell patterns such as ``"encoder.*"`` allowed),
        reading only the chunks that hold them; the result is a dict of tensors by name, in which
        a numpy array is the tensor of its bytes.
    out
        A dict of tensors, or a module: filled in place, without a second copy of the weights.
    fidelity
        ``"exact"`` insists on the exact tier, ``"codes"`` leaves it unread; None takes the best
        that is there.
    external_base
        The store that has this one's base, if it is not where this one says.
    report
        Called with (stage, bytes done, bytes in all).

    Returns
    -------
    object
        What was saved; a dict of tensors where `names` is given; `out` where that is.

    Raises
    ------
    StoreNotFoundError, NotAStoreError, NewerFormatError
        There is no such store.
    UnknownTaskError, UnknownTensorError
        There is no such task or tensor.
    TruncatedStoreError, ChecksumError, CorruptStoreError
        The file is damaged; nothing wrong is ever returned.
    MismatchError
        `out` does not fit.
    WrongBaseError
        The base is in another store, which holds another base.
    """
    with TallStore(path, external_base=external_base) as store:
        return store.load(
            task,
            device=device,
            dtype=dtype,
            names=names,
            out=out,
            fidelity=fidelity,
            report=report,
        )


def open(
    path: StorePath,
    mode: str = "r",
    *,
    timeout: float = 60.0,
    external_base: StorePath | None = None,
) -> TallStore:
    """Open a store; see `TallStore`."""
    return TallStore(path, mode, timeout=timeout, external_base=external_base)


def pack(
    path: StorePath,
    base: Any,
    tasks: Mapping[str, Any],
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
    vector_dtype: str = "bfloat16",
    exact: bool = False,
    compress: bool = False,
    device: torch.device | str | None = None,
    external_base: StorePath | None = None,
    overwrite: bool = False,
    timeout: float = 60.0,
    report: Report | None = None,
) -> list[str]:
    """Pack a base and its fine-tunes: one shared vector, and a TALL mask per task.

    Or, with `code`, other codes of the task vectors, most of which need no shared vector.
    Memory is bounded, whatever the size and number of checkpoints: they are read span by span.

    Parameters
    ----------
    path
        The store to make.
    base
        The pretrained checkpoint: a path (safetensors file, model directory, ``.pt``), a
        ``STORE`` or ``STORE::TASK``, a state dict or a module. None with `external_base`.
    tasks
        The fine-tunes by name, each given like `base`.
    code
        ``"tall"``: a mask over the shared vector (arXiv 2405.07813). ``"signs"``: plus or minus one
        step a tensor, on the weights that moved most. ``"seeded"``: values on weights that a hash
        of `seed` picks, so that their places cost nothing. ``"levels"``: for every weight one of
        2**bits levels a tensor. ``"auto"``: for every tensor what leaves the least error within
        a budget.
    density
        Share of the weights that ``"signs"`` (0.05 if None) or ``"seeded"`` (0.1) touches.
    bits
        1 to 4: bits of a value of ``"seeded"`` (4 if None) or ``"levels"`` (2).
    over
        ``"shared"``: levels are times a shared vector, the mean magnitude of all task vectors
        unless `merge` says otherwise.
    gain
        How long the coded task vector is made, by tensor. ``"unbiased"``: its projection on the
        task vector is the task vector's own, but for seeded values of which none moved much: they
        are made longer by twice their stride at most. ``"norm"``: as long as the task vector.
        ``"ls"``: of least error, which is too short, and costs accuracy.
    seed
        Of the hash, below 2**32.
    bits_per_weight, max_error, keep
        Budgets of ``"auto"``, one of them: bits a weight, of codes (the levels of its tensors take
        some 25 bytes each beside them; a remark says where that is much); relative error at most;
        the share of the fine-tuned model's score to keep, as `evaluate` tells it. 0.15 bits if none
        is given.
    merge
        What the shared vector is: ``"ta"`` (the sum of the task vectors; None), ``"ties"``, any
        other name in `tallstore.merging.RULES` that takes no masks, or a rule object.
    tall_lambda
        The masks' lambda; several to choose from by `evaluate`; None for the default.
    evaluate
        ``evaluate(task, state_dict) -> score``, higher is better, on validation data: called
        with the weights just as they will load, for each lambda. Ties go to the smallest.
    calibrate
        ``calibrate(task) -> (module, batches)``: a module of the task's shape, whose weights are
        others while this runs, and a few inputs for it, without labels: tensors, tuples or dicts
        of arguments. Biases are then coded as they have to be for the coded weights to give, on
        average over these inputs, what the original ones give, channel by channel (arXiv
        1906.04721); and ``"auto"`` tries several ways to spend a budget, and takes the one after
        which the module's outputs, taken for logits, diverge least. That takes twice a task's size
        of memory. Not for codes over a shared vector.
    distil
        Steps in which coded values, and which way each weight of dense codes is rounded, are
        trained on what `calibrate` gives, a batch a step, to make the module's outputs, taken for
        logits, the original's: some 100, over several hundred inputs; half as many more find how
        large a step is. Dense codes may take a few per cent more bits; it takes a forward and a
        backward pass a step, and their memory.
    vector_dtype
        ``"bfloat16"``, ``"float16"`` or ``"float32"``. Masks are made for the rounded vector.
    exact
        Keep the residual too: loading then gives back the originals bit for bit. Masks alone
        are lossy.
    compress
        Compress the base too: a sixth off float32, a third off bfloat16; loading takes longer.
    device
        Where masks are made: ``"cpu"`` (None) or ``"cuda"``. The masks are the same; the
        statistics agree to six digits.
    external_base
        A store whose base is this one's too: it is not written again but referred to, by its
        path and its content. That store has to stay, and be moved together with this one; see
        `relink`.
    overwrite
        Replace a store at `path`.
    timeout, report
        As for `save`.

    Returns
    -------
    list of str
        Remarks on what was found: wrappers taken off, names matched, files left out.

    Raises
    ------
    EmptyZooError, CheckpointError, MismatchError, TaskNameError, OptionError, StoreExistsError
    NotAStoreError
        There is none at `external_base`.
    """
    from tallstore.externalbase import refer
    from tallstore.opening import open_base_of, open_checkpoint
    from tallstore.packing.codeoptions import code_options
    from tallstore.packing.pack import pack_zoo
    from tallstore.storesource import StoreSource

    place = store_path(path)
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
    if (base is None) == (external_base is None):
        raise OptionError("pack: either a base, or external_base=, is needed")
    with ExitStack() as stack:
        external = None
        if external_base is None:
            opened = stack.enter_context(open_checkpoint(base))
        else:
            there = Path(os.fspath(external_base))
            found, record = open_base_of(there)
            opened = stack.enter_context(found)
            external = refer(place, there, record.identity)
        sources = {n: stack.enter_context(open_checkpoint(what)) for n, what in tasks.items()}
        for source in (opened, *sources.values()):
            if isinstance(source, StoreSource) and source.store == place:
                raise OptionError(
                    f"{place}: it is to be written and {source.label} read from it; pack to "
                    "another path, then move that here"
                )
        return pack_zoo(
            place,
            opened,
            sources,
            merge=merge,
            options=options,
            tall_lambda=tall_lambda,
            evaluate=evaluate,
            calibrate=calibrate,
            vector_dtype=vector_dtype,
            exact=exact,
            compress=compress,
            device=device,
            external=external,
            overwrite=overwrite,
            timeout=timeout,
            report=report,
        )


def merge(
    path: StorePath,
    out: StorePath | None = None,
    *,
    rule: str | MergeRule = "ta",
    tasks: Sequence[str] | None = None,
    alpha: float | Sequence[float] | None = None,
    k: int | Sequence[int] | None = None,
    private: str | None = None,
    evaluate: EvaluateMerge | None = None,
    as_task: str | None = None,
    device: torch.device | str | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    timeout: float = 60.0,
    report: Report | None = None,
) -> Merge:
    """Merge tasks of a store into one model: ``base + alpha * v``, v merged of the task vectors.

    Computed in float32, span by span, and rounded once to the dtype of the model that is written;
    where v is 0 a weight is the base's, bit for bit, and one task with alpha 1, by a rule that
    keeps it whole (``"ta"``, ``"average"``, ``"varm"``), is that task, bit for bit. Memory is
    bounded: about 512 MiB of decoded spans, whatever the size of the model; beyond a hundred tasks
    4 MiB more for each; a search over alpha holds the merged vector as well.

    Task vectors come from the exact tier where a task has one. From masks alone they are lossy,
    and `Merge.notes` says so; where the stored shared vector is the very one that the rule merges,
    that is taken in their place.

    Parameters
    ----------
    path
        The store.
    out
        ``NAME.safetensors`` for one file, else a model directory to make. Without it, and without
        `as_task`, the merged object is `Merge.state`.
    rule
        A name in `tallstore.merging.RULES`, such as ``"consensus-ties"``, or a rule object.
    tasks
        Which, in this order; None for all.
    alpha
        The scaling; several to choose from by `evaluate`. None: 0.1 .. 1.0 where there is an
        `evaluate`, else 1 for rules that average and 0.3 for rules that sum.
    k
        For Consensus Merging: how many tasks have to use a weight; several to choose from. None:
        1, 2, 3 where there is an `evaluate`, else 2.
    private
        Whose heads, buffers and files go in: a task's, or the ``"base"``'s, which leaves out what
        the base lacks. Needed where the tasks differ in them.
    evaluate
        ``evaluate(state_dict) -> score``, higher is better, on validation data: called with the
        merge just as it would be written. Ties go to the smallest k, then the smallest alpha.
    as_task
        Store the merge as a task of this name, an exact difference from the base.
    device
        Where tasks are reconstructed, on their way into the merge, and where the state dict for
        `evaluate` and `Merge.state` are left; the rules themselves run on the CPU.
    max_shard_size
        Bytes of weights a file of a model directory; None for 5 GB.
    overwrite
        Replace the file at `out`, or the task of that name.
    timeout, report
        As for `save`.

    Raises
    ------
    OptionError
        A value out of range; a rule that takes masks, and a task without; tasks that differ in
        what cannot be merged (the message lists the choices).
    UnknownTaskError, StoreExistsError, TaskExistsError, TaskNameError, MismatchError
    """
    with TallStore(path, "r" if as_task is None else "a", timeout=timeout) as store:
        return store.merge(
            out,
            rule=rule,
            tasks=tasks,
            alpha=alpha,
            k=k,
            private=private,
            evaluate=evaluate,
            as_task=as_task,
            device=device,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            report=report,
        )


def relink(path: StorePath, base: StorePath, *, timeout: float = 60.0) -> str:
    """Say for good where the store is that has this one's base; after either was moved.

    Parameters
    ----------
    path
        A store packed with ``external_base=``.
    base
        The store that has its base.
    timeout
        Seconds to wait for another writer.

    Returns
    -------
    str
        The path as recorded: from the store's directory, where they have one in common.

    Raises
    ------
    OptionError
        The store has its base itself.
    WrongBaseError, StoreNotFoundError, NotAStoreError
        `base` does not have it; nothing was changed.
    """
    from tallstore.writing import relink_store

    store_path(base)
    return relink_store(store_path(path), Path(os.fspath(base)), timeout=timeout)


def compact(path: StorePath, *, timeout: float = 60.0) -> tuple[int, int]:
    """Rewrite a store without the space that removed tasks left; returns bytes before and after.

    Raises
    ------
    StoreLockedError
        Another handle on the store is open.
    """
    from tallstore.writing import compact_store

    return compact_store(store_path(path), timeout=timeout)
