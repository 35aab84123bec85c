"""The stream from chunks to weights: into memory, into given tensors, or piece by piece."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Final

import numpy as np
import torch

from tallstore import compiling
from tallstore.advice import prefer_huge_pages
from tallstore.catalog import Catalog
from tallstore.codecs import Bytes
from tallstore.decoding import Decoder
from tallstore.describing import describe
from tallstore.devices import on_device, wanted_device
from tallstore.documents import CODE, BaseDocument, Contents, TaskDocument
from tallstore.dtypes import is_codable, itemsize, torch_dtype
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import (
    CorruptStoreError,
    DeviceError,
    MismatchError,
    OptionError,
    UnknownTensorError,
)
from tallstore.objects import assemble, build_tensor
from tallstore.ring import Ring
from tallstore.spans import Run
from tallstore.specs import SegmentSpec, TensorSpec, contiguous_stride
from tallstore.workers import workers

__all__ = ["Loader", "Progress", "Put", "no_progress"]

#: Called with the bytes that were just dealt with; from any thread.
Progress = Callable[[int], None]
#: Takes the bytes of a segment from an element on; from any thread. The buffer is reused.
Put = Callable[[int, int, Bytes], None]


#: Weights from which it pays to start the compiled loops for a single load.
_MANY: Final = 1 << 28
#: The same where the exact tier is decoded, which takes longer without them.
_MANY_EXACT: Final = 1 << 27


def no_progress(count: int) -> None:
    """Show nothing."""


def _exact_alone(task: TaskDocument) -> bool:
    """Whether what is coded has no codes but the exact difference from the base."""
    parts = (part for parts in task.parts for part in parts)
    return not any(code.coded for code in task.codes) and any(p.kind == CODE for p in parts)


class Loader:
    """Reads the base, or one task, of a snapshot.

    Parameters
    ----------
    snapshot
        Stays the caller's.
    catalog
        Of the snapshot.
    task
        A task's name; None for the base.
    fidelity
        ``"exact"`` takes the residual in where there is one, ``"codes"`` leaves it out.
    device
        Where weights are reconstructed, and where `load` leaves them; None: the CPU.

    Raises
    ------
    UnknownTaskError
        There is no such task; the message lists those there are.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        catalog: Catalog,
        *,
        task: str | None,
        fidelity: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if fidelity not in (None, "exact", "codes"):
            raise OptionError(f"fidelity={fidelity!r}: it is 'exact' or 'codes'")
        self.snapshot = snapshot
        self.device = wanted_device(device)
        described = describe(snapshot, catalog, task=task)
        if fidelity == "exact" and task is not None and not catalog.tasks[task].exact:
            raise OptionError(
                f"{described.what}: it has masks alone, no exact tier; load it without "
                "fidelity='exact', or pack it again with exact=True (--exact)"
            )
        self.what = described.what
        self.base: BaseDocument = described.base
        self.task: TaskDocument | None = described.task
        self.contents: Contents = described.contents
        self.decoder = Decoder(
            snapshot,
            self.base,
            task=self.task,
            vector=catalog.vector,
            exact=fidelity != "codes",
        )
        if fidelity == "codes" and self.task is not None and _exact_alone(self.task):
            raise OptionError(
                f"{self.what}: it has no codes, it is kept exactly; load it without "
                "fidelity='codes'"
            )
        weights = sum(segment.numel for segment in self.contents.segments)
        many = _MANY_EXACT if self.decoder.has_exact else _MANY
        if self.decoder.has_codes and weights >= many:
            compiling.load()

    def read_file(self, path: str) -> bytes:
        """The content of one of the stored files."""
        for file in self.contents.files:
            if file.path == path:
                stream = self.snapshot.stream(file.stream)
                if file.offset + file.nbytes > stream.raw:
                    raise CorruptStoreError(f"{self.what}: file {path!r} leads past its stream")
                data = np.empty(file.nbytes, np.uint8)
                self.snapshot.read(stream, file.offset, data)
                return data.tobytes()
        raise UnknownTensorError(f"{self.what}: no file is called {path!r}")

    # -- choosing -------------------------------------------------------------------------

    def choose(self, names: Iterable[str] | None) -> dict[str, int]:
        """Tensor numbers by name, for `names`, shell patterns allowed; None: all.

        Raises
        ------
        UnknownTensorError
            A name or pattern fits no tensor.
        """
        index = self.contents.names()
        if names is None:
            return index
        chosen: set[str] = set()
        for name in [names] if isinstance(names, str) else names:
            if not isinstance(name, str):
                raise OptionError(f"names={name!r}: names of tensors are text")
            found = {name} if name in index else {n for n in index if fnmatchcase(n, name)}
            if not found:
                raise UnknownTensorError(_no_tensor(self.what, name, list(index)))
            chosen |= found
        return {name: number for name, number in index.items() if name in chosen}

    # -- reading --------------------------------------------------------------------------

    def stream(
        self,
        segments: Sequence[int],
        *,
        targets: Mapping[int, Bytes],
        put: Put | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """Decode segments, a span at a time and several at once, to the host's memory.

        Parameters
        ----------
        segments
            Which.
        targets
            Memory for whole segments, filled in place.
        put
            Takes the pieces of segments that have no target.
        """
        if self.device.type != "cpu" and not targets:
            ring = Ring(self.decoder, self.device)
            ring.run(segments, targets={}, put=put, progress=progress)
            return
        wanted = set(segments)
        decoder = self.decoder
        sizes = [itemsize(segment.dtype) for segment in self.contents.segments]

        def work(key: tuple[bool, int, int]) -> None:
            runs = [run for run in decoder.runs(key) if run.segment in wanted]
            into = None
            if len(runs) == 1 and not runs[0].coded and runs[0].segment in targets:
                size = sizes[runs[0].segment]
                start = runs[0].start * size
                into = targets[runs[0].segment][start : start + runs[0].count * size]
            data = decoder.load(key, into=into, coded=any(run.coded for run in runs))
            if into is not None and data.base is into:
                progress(into.size)
                return
            filled = [(run, room(run)) for run in runs]
            decoder.decode(data, key, filled)
            data.release()
            for run, out in filled:
                if put is not None and run.segment not in targets:
                    put(run.segment, run.start, out)
                progress(out.size)

        def room(run: Run) -> Bytes:
            size = sizes[run.segment]
            target = targets.get(run.segment)
            if target is None:
                return np.empty(run.count * size, np.uint8)
            return target[run.start * size : (run.start + run.count) * size]

        spans = decoder.spans(segments)
        with workers(1 if len(spans) <= 1 else None) as pool:
            for _ in pool.each(work, spans):
                pass

    def load(
        self,
        *,
        names: Iterable[str] | None = None,
        dtype: torch.dtype | str | None = None,
        progress: Progress = no_progress,
    ) -> Any:
        """The object as it was saved, or a dict of the tensors called `names`."""
        cast = _wanted_dtype(dtype)
        chosen = self.choose(names)
        specs = self.contents.tensors
        needed = sorted({specs[number].segment for number in chosen.values()})
        # Bytes of a numpy array, or two dtypes over one storage, are not weights to convert.
        raw = {s.segment for s in specs if s.dtype != self.contents.segments[s.segment].dtype}
        kinds = {n: _kind(self.contents.segments[n], None if n in raw else cast) for n in needed}
        if self.device.type == "cpu":
            memory = {n: _allocate(self.contents.segments[n]) for n in needed}
            self.stream(
                needed, targets={n: held.numpy() for n, held in memory.items()}, progress=progress
            )
        else:
            memory = self._load_on(self.device, kinds, progress)
        tensors: list[Any] = [None] * len(specs)
        segments: dict[int, torch.Tensor] = {}
        for number in sorted(set(chosen.values())):
            spec = specs[number]
            kind = kinds[spec.segment]
            if spec.segment not in segments:
                held = memory.pop(spec.segment)
                stored = self.contents.segments[spec.segment].dtype
                segments[spec.segment] = _converted(held, stored, kind)
            held = segments[spec.segment]
            if kind != self.contents.segments[spec.segment].dtype and is_float(spec.dtype):
                spec = replace(spec, dtype=kind)
            tensors[number] = build_tensor(spec, held)
        if names is not None:
            return {name: tensors[number] for name, number in chosen.items()}
        return assemble(self.contents.tree, tensors)

    def _load_on(
        self, device: torch.device, kinds: Mapping[int, str], progress: Progress
    ) -> dict[int, torch.Tensor]:
        """Segments on a device, as bytes of the dtypes asked for."""
        segments = self.contents.segments
        with on_device(device, f"loading {self.what}"):
            typed = {
                n: torch.empty(segments[n].numel, dtype=torch_dtype(kind), device=device)
                if kind != segments[n].dtype
                else torch.empty(segments[n].nbytes, dtype=torch.uint8, device=device)
                for n, kind in kinds.items()
            }
            Ring(self.decoder, device).run(list(kinds), targets=typed, progress=progress)
        return typed

    def load_into(
        self,
        out: Mapping[str, torch.Tensor],
        *,
        names: Iterable[str] | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """Fill existing tensors in place.

        Parameters
        ----------
        out
            Tensor by name. Without `names` it must name every tensor of the object.

        Raises
        ------
        MismatchError
            A tensor is absent, or its shape or dtype differs; nothing was written.
        """
        specs = self.contents.tensors
        chosen = self.choose(names)
        pairs = [(replace(specs[n], name=name), out.get(name)) for name, n in chosen.items()]
        _check_out(self.what, pairs, out, names is None)
        targets: dict[int, torch.Tensor] = {}
        later: list[tuple[TensorSpec, torch.Tensor]] = []
        for spec, tensor in pairs:
            if tensor is None:
                continue
            segment = self.contents.segments[spec.segment]
            if spec.segment not in targets and _fits(spec, segment, tensor):
                targets[spec.segment] = _as_bytes(tensor)
            else:
                later.append((spec, tensor))
        for spec, _ in later:
            if spec.segment not in targets:
                targets[spec.segment] = _allocate(self.contents.segments[spec.segment])
        by_device: dict[torch.device, dict[int, torch.Tensor]] = defaultdict(dict)
        for number, held in targets.items():
            by_device[held.device][number] = held
        # Made before anything is written: a device that cannot do it is refused with `out` whole.
        rings = {d: Ring(self.decoder, d) for d in by_device if d.type != "cpu"}
        try:
            for device, some in by_device.items():
                if device in rings:
                    rings[device].run(sorted(some), targets=some, progress=progress)
                else:
                    arrays = {number: held.numpy() for number, held in some.items()}
                    self.stream(sorted(some), targets=arrays, progress=progress)
            with torch.no_grad():
                for spec, tensor in later:
                    with on_device(tensor.device, f"filling {spec.name!r}"):
                        tensor.copy_(build_tensor(spec, targets[spec.segment]))
        except (CorruptStoreError, DeviceError) as exc:
            raise type(exc)(
                f"{exc} (the tensors given as out= are partly overwritten: their content is "
                "undefined)"
            ) from exc


def is_float(name: str) -> bool:
    """Whether a cast to another floating dtype concerns a dtype."""
    return is_codable(name) or name == "float64"


def _wanted_dtype(dtype: torch.dtype | str | None) -> str | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if not is_float(name):
        raise OptionError(f"dtype={dtype}: float32, bfloat16, float16 or float64 is possible")
    return name


def _allocate(segment: SegmentSpec) -> torch.Tensor:
    memory = torch.empty(segment.nbytes, dtype=torch.uint8, device="cpu")
    prefer_huge_pages(memory.numpy())
    return memory


def _kind(segment: SegmentSpec, cast: str | None) -> str:
    return cast if cast is not None and is_float(segment.dtype) else segment.dtype


def _converted(held: torch.Tensor, stored: str, kind: str) -> torch.Tensor:
    """The bytes of a segment in the dtype wanted; on a device they have it already."""
    if held.dtype != torch.uint8:
        return held.view(torch.uint8)
    if kind == stored or held.device.type != "cpu":
        return held
    return held.view(torch_dtype(stored)).to(torch_dtype(kind)).view(torch.uint8)


def _fits(spec: TensorSpec, segment: SegmentSpec, tensor: torch.Tensor) -> bool:
    """Whether a segment can be decoded straight into a tensor's memory."""
    return (
        tensor.device.type in ("cpu", "cuda")
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not (spec.conj or spec.neg)
        and spec.dtype == segment.dtype
        and spec.offset == 0
        and spec.stride == contiguous_stride(spec.shape)
        and spec.numel == segment.numel
    )


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    size = flat.element_size()
    raw.set_(flat.untyped_storage(), flat.storage_offset() * size, (flat.numel() * size,), (1,))
    return raw


def _check_out(
    what: str,
    pairs: Sequence[tuple[TensorSpec, torch.Tensor | None]],
    out: Mapping[str, torch.Tensor],
    whole: bool,
) -> None:
    known = {spec.name for spec, _ in pairs}
    problems = [f"{name!r} is not in the store" for name in out if whole and name not in known]
    for spec, tensor in pairs:
        if tensor is None:
            problems.append(f"{spec.name!r} is missing from out")
        elif not isinstance(tensor, torch.Tensor):
            problems.append(f"{spec.name!r} is {type(tensor).__name__}, no tensor")
        elif any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
            problems.append(f"{spec.name!r} is expanded: its elements share memory")
        elif tuple(tensor.shape) != spec.shape:
            problems.append(f"{spec.name!r} has shape {list(tensor.shape)}, not {list(spec.shape)}")
        elif tensor.dtype != torch_dtype(spec.dtype):
            problems.append(f"{spec.name!r} is {tensor.dtype}, stored as {spec.dtype}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise MismatchError(f"{what}: out= does not fit: {'; '.join(problems[:5])}{more}")


def _no_tensor(what: str, name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, 3)
    hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
    return f"{what}: no tensor is called {name!r}{hint}"
