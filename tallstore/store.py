"""The handle on a store: thin, over the streams of packing and loading."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

from tallstore.catalog import BaseRecord, Catalog, TaskRecord, VectorRecord
from tallstore.engine.environment import open_environment
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import (
    CorruptStoreError,
    OptionError,
    StoreClosedError,
    StoreWarning,
    TallstoreError,
    UnknownTaskError,
)

if TYPE_CHECKING:
    import torch

    from tallstore.checking import Verification
    from tallstore.codes import SegmentStats
    from tallstore.describing import Description
    from tallstore.loading import Loader
    from tallstore.mask_statistics import MaskStatistics
    from tallstore.mergestream.grid import EvaluateMerge
    from tallstore.mergestream.merge import Merge
    from tallstore.merging import MergeRule
    from tallstore.packing.calibrating import Calibrate
    from tallstore.packing.choosing import Evaluate
    from tallstore.packing.codeoptions import CodeOptions
    from tallstore.progress import Report
    from tallstore.specs import TensorSpec
    from tallstore.storesource import StoreSource

__all__ = ["StorePath", "TallStore", "open_snapshot", "store_path"]

StorePath = str | os.PathLike[str]


def store_path(path: StorePath) -> Path:
    """A caller's path, made absolute; raises OptionError for anything that is no path."""
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise OptionError(f"path={path!r}: the path of a store is needed, such as 'zoo.tall'")
    if "\0" in str(path):
        raise OptionError(f"path={path!r}: a path has no NUL characters")
    # Through links: what is written takes the place of the file, not of the link to it.
    return Path(os.path.realpath(path))


def open_snapshot(path: Path) -> Snapshot:
    """A snapshot with a handle of its own on the environment."""
    environment = open_environment(path)
    try:
        return Snapshot(environment)
    except BaseException:
        environment.close()
        raise


class TallStore:
    """An open store. Use it as a context manager, or call `close`.

    It shows one generation: what was committed when it was opened, or last refreshed. Its own
    writes refresh it. Handles are safe to share between threads, and must be opened anew after a
    fork.

    Parameters
    ----------
    path
        The store's file.
    mode
        ``"r"`` to read, ``"a"`` to read and write. Stores are made by `tallstore.save` and
        `tallstore.pack`.
    timeout
        Seconds that a write waits for another writer.
    external_base
        To read alone: where the store is that has this one's base, if it is not where this one
        says; `tallstore.relink` says so for good.

    Raises
    ------
    StoreNotFoundError, NotAStoreError, NewerFormatError, TruncatedStoreError, CorruptStoreError
    OptionError
        `external_base` for a store that has its base itself, or one that is to be written.
    """

    def __init__(
        self,
        path: StorePath,
        mode: str = "r",
        *,
        timeout: float = 60.0,
        external_base: StorePath | None = None,
    ) -> None:
        if mode not in ("r", "a"):
            raise OptionError(f"mode={mode!r}: 'r' to read, 'a' to read and write")
        self.path = store_path(path)
        if mode != "r" and external_base is not None:
            raise OptionError(
                f"{self.path}: external_base= is for reading alone; to write, say for good where "
                "the base is: tallstore relink, or tallstore.relink"
            )
        self.mode = mode
        self._base_at = None if external_base is None else store_path(external_base)
        self._timeout = timeout
        self._snapshot: Snapshot | None = open_snapshot(self.path)
        try:
            self._catalog = self._read_catalog()
        except BaseException:
            self.close()
            raise

    def _read_catalog(self) -> Catalog:
        catalog = Catalog.from_json(self._held().manifest.body, what=str(self.path))
        if self._base_at is None:
            return catalog
        from tallstore.externalbase import with_base_at

        return with_base_at(self.path, catalog, self._base_at)

    def _held(self) -> Snapshot:
        if self._snapshot is None:
            raise StoreClosedError(f"{self.path}: this handle was closed; open the store again")
        return self._snapshot

    # -- what is there --------------------------------------------------------------------

    @property
    def format_version(self) -> int:
        """Version of the format that the file is written in."""
        return self._held().manifest.format_version

    @property
    def written_by(self) -> str:
        """The program that wrote the last commit."""
        return self._held().manifest.written_by

    @property
    def generation(self) -> int:
        """How many commits led to what this handle shows."""
        return self._held().manifest.generation

    @property
    def base(self) -> BaseRecord:
        """The base in a few words."""
        if self._catalog.base is None:
            raise CorruptStoreError(f"{self.path}: the store holds no base")
        return self._catalog.base

    @property
    def external_base(self) -> Path | None:
        """The store that has the base's elements; None where this one has them."""
        from tallstore.externalbase import place_of

        recorded = self.base.external
        return None if recorded is None else place_of(self.path, recorded)

    @property
    def vector(self) -> VectorRecord | None:
        """The shared vector in a few words; None where no task uses one."""
        return self._catalog.vector

    @property
    def tasks(self) -> Mapping[str, TaskRecord]:
        """The tasks by name, in the order in which they came."""
        return MappingProxyType(dict(self._catalog.tasks))

    def tensors(self, task: str | None = None) -> tuple[TensorSpec, ...]:
        """Name, dtype, shape and more of every tensor of the base, or of a task."""
        return self.describe(task).contents.tensors

    def segment_stats(self, task: str) -> Mapping[str, SegmentStats]:
        """Density, relative error and norm of each coded tensor of a task, by name."""
        return self.describe(task).segment_stats()

    def tensor_bits(self, task: str) -> Mapping[str, float]:
        """Bits a weight that each tensor of a task takes in the file, by name.

        Chunks hold several tensors: their bytes are shared out by the entropy of the codes.
        """
        from tallstore.tensorbits import tensor_bits

        return tensor_bits(self.describe(task), self.stream_bytes)

    def describe(self, task: str | None = None) -> Description:
        """The documents of the base, or of a task: every tensor, file and part."""
        from tallstore.describing import describe

        return describe(self._held(), self._catalog, task=task)

    def stored_bytes(self, task: str | None = None) -> int:
        """Bytes that the base, or a task, takes in the file; the shared vector is apart."""
        record = self.base if task is None else self._task(task)
        numbers = {record.document, *record.streams}
        if task is not None:
            numbers -= set(self.base.streams)  # files that the task shares with the base
        return sum(self._held().stream(number).stored for number in numbers)

    def stream_bytes(self, number: int) -> int:
        """Bytes that a stream takes in the file; the documents of `describe` name them."""
        return self._held().stream(number).stored

    def vector_bytes(self) -> int:
        """Bytes that the shared vector takes in the file."""
        vector = self._catalog.vector
        numbers = [number for number in vector.streams if number] if vector else []
        return sum(self._held().stream(number).stored for number in numbers)

    def file_bytes(self) -> tuple[int, int]:
        """(bytes of the file in use, bytes of the file); `compact` gives back the difference."""
        return self._held().stored_sizes()

    def _task(self, name: str) -> TaskRecord:
        try:
            return self._catalog.tasks[name]
        except KeyError:
            known = ", ".join(map(repr, self._catalog.tasks)) or "none"
            raise UnknownTaskError(f"{self.path}: no task {name!r}; there are: {known}") from None

    def _loader(
        self,
        task: str | None,
        *,
        fidelity: str | None = None,
        device: torch.device | str | None = None,
    ) -> Loader:
        from tallstore.loading import Loader

        return Loader(self._held(), self._catalog, task=task, fidelity=fidelity, device=device)

    # -- reading --------------------------------------------------------------------------

    def load(
        self,
        task: str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        names: Iterable[str] | None = None,
        out: Any = None,
        fidelity: str | None = None,
        report: Report | None = None,
    ) -> Any:
        """The base, or a task; see `tallstore.load`."""
        from tallstore.progress import Meter

        loader = self._loader(task, fidelity=fidelity, device=device)
        total = sum(segment.nbytes for segment in loader.contents.segments)
        progress = Meter(report).stage("load", total)
        if out is None:
            return loader.load(names=names, dtype=dtype, progress=progress)
        if device is not None or dtype is not None:
            raise OptionError("out= has its own device and dtype; leave device= and dtype= away")
        loader.load_into(_named(out), names=names, progress=progress)
        return out

    def source(self, task: str | None = None) -> StoreSource:
        """The base, or a task, as a checkpoint to pack, add or save elsewhere."""
        from tallstore.storesource import StoreSource

        label = str(self.path) if task is None else f"{self.path}::{task}"
        return StoreSource(self._loader(task), label=label)

    def unpack(
        self,
        task: str | None,
        out: StorePath,
        *,
        max_shard_size: int | None = None,
        overwrite: bool = False,
        device: torch.device | str | None = None,
        report: Report | None = None,
    ) -> list[Path]:
        """Write a task (None: the base) to ``OUT.safetensors`` or a model directory.

        Weights are reconstructed on `device`, on their way; None: on the CPU.

        Returns
        -------
        list of Path
            The files made.
        """
        from tallstore.exporting import DEFAULT_SHARD, export
        from tallstore.progress import Meter

        loader = self._loader(task, device=device)
        total = sum(segment.nbytes for segment in loader.contents.segments)
        return export(
            loader,
            store_path(out),
            max_shard_size=DEFAULT_SHARD if max_shard_size is None else max_shard_size,
            overwrite=overwrite,
            progress=Meter(report).stage("unpack", total),
        )

    def merge(
        self,
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
        report: Report | None = None,
    ) -> Merge:
        """Merge tasks into one model; see `tallstore.merge`."""
        from tallstore.mergestream.merge import merge_tasks

        if as_task is not None:
            self._check_writing()
        result = merge_tasks(
            self._held(),
            self._catalog,
            rule=rule,
            tasks=tasks,
            alpha=alpha,
            k=k,
            private=private,
            evaluate=evaluate,
            out=None if out is None else store_path(out),
            as_task=as_task,
            device=device,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            timeout=self._timeout,
            report=report,
        )
        if as_task is not None:
            self._show_written()
        return result

    def verify(self, *, report: Report | None = None) -> Verification:
        """Check every chunk and every document; damage is listed, not raised.

        A base in another store is checked too: its chunks, and that they are the base meant.
        """
        from tallstore.checking import verify_snapshot
        from tallstore.progress import Meter

        return verify_snapshot(self._held(), self._catalog, meter=Meter(report))

    def statistics(
        self,
        *,
        tasks: Sequence[str] | None = None,
        cosine: bool = False,
        device: torch.device | str | None = None,
        report: Report | None = None,
    ) -> MaskStatistics:
        """Count the masks: densities, how many tasks use a weight, overlaps of tasks.

        Parameters
        ----------
        tasks
            Which; all that have masks if None.
        cosine
            Decode the task vectors as well, for the cosines between them; always on the CPU.
        device
            Where masks are counted; None: on the CPU. The counts are the same.
        report
            Told of progress.

        Raises
        ------
        UnknownTaskError, OptionError
            A task is not there, or has no masks; or no task has.
        DeviceError
            The device is not there.
        """
        from tallstore.mask_statistics import study

        return study(
            self._held(),
            self._catalog,
            tasks=tasks,
            cosine=cosine,
            device=device,
            report=report,
        )

    # -- writing --------------------------------------------------------------------------

    def _check_writing(self) -> None:
        self._held()
        if self.mode != "a":
            raise OptionError(f"{self.path}: opened to read; open it with mode 'a' to write")

    def add(
        self,
        tasks: Mapping[str, Any],
        *,
        code: CodeOptions | None = None,
        like_store: bool = False,
        evaluate: Evaluate | None = None,
        calibrate: Calibrate | None = None,
        distil: int | None = None,
        exact: bool | None = None,
        overwrite: bool = False,
        strict: bool = True,
        report: Report | None = None,
    ) -> list[str]:
        """Add tasks; see `tallstore.add`. Without `code`, as exact differences from the base."""
        from contextlib import ExitStack

        from tallstore.appending import append_tasks
        from tallstore.opening import open_checkpoint

        self._check_writing()
        with ExitStack() as stack:
            sources = {
                name: stack.enter_context(open_checkpoint(what)) for name, what in tasks.items()
            }
            notes = append_tasks(
                self.path,
                sources,
                options=code,
                like_store=like_store,
                evaluate=evaluate,
                calibrate=calibrate,
                distil=distil,
                exact=exact,
                overwrite=overwrite,
                strict=strict,
                compress=True,
                timeout=self._timeout,
                report=report,
            )
        self._show_written()
        return notes

    def remove(self, *names: str) -> None:
        """Remove tasks for good; `compact` gives their space back to the file system."""
        from tallstore.writing import remove_tasks

        self._check_writing()
        remove_tasks(self.path, names, timeout=self._timeout)
        self._show_written()

    def _show_written(self) -> None:
        """Show what was just written, if LMDB lets it: tidying up may have failed after it."""
        try:
            self.refresh()
        except TallstoreError as exc:
            if exc is not self._held().failed_write:
                raise
            warnings.warn(
                f"{self.path}: what was written is there, but this handle cannot show it, since "
                f"tidying up failed afterwards ({exc}); close it and open the store again",
                StoreWarning,
                stacklevel=3,
            )

    def refresh(self) -> None:
        """Show what is committed now."""
        self._held()
        fresh = open_snapshot(self.path)
        held, self._snapshot = self._snapshot, fresh
        if held is not None:
            held.close()
        self._catalog = self._read_catalog()

    def close(self) -> None:
        """Give the handle back; what was loaded stays."""
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is not None:
            snapshot.close()

    def __enter__(self) -> TallStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A handle that nobody holds must not keep others from replacing the file.
        with contextlib.suppress(Exception):
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._snapshot is None else f"{len(self._catalog.tasks)} tasks"
        return f"<TallStore {str(self.path)!r}, {state}>"


def _named(out: Any) -> Mapping[str, torch.Tensor]:
    """Tensors by name from a module, or from a mapping of them."""
    state_dict = getattr(out, "state_dict", None)
    found = state_dict() if callable(state_dict) else out
    if not isinstance(found, Mapping):
        raise OptionError(f"out={type(out).__name__}: a dict of tensors, or a module, is needed")
    return found
