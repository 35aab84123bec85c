"""A file that `torch.save` wrote, as a source. Nothing in it is ever executed."""

from __future__ import annotations

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from tallstore.errors import CheckpointError, UnsafePickleError, UnsupportedObjectError
from tallstore.sources.mapped_file import MappedFile
from tallstore.sources.reading import ReadOnlyFile, foreign_cause

if TYPE_CHECKING:
    from tallstore.objects import ObjectSource
    from tallstore.sources.source import Bytes
    from tallstore.specs import JSON, FileSpec, SegmentSpec, TensorSpec

__all__ = ["PREFIXES", "WRAPPERS", "TorchFile"]

#: Keys under which checkpoints keep their state dict; the first that fits is taken.
WRAPPERS: Final = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "params_ema",
    "params",
    "ema",
)
#: What wrappers of modules put in front of every key.
PREFIXES: Final = ("module.", "_orig_mod.")

_MAX_DEPTH: Final = 4
_ZIP_MAGIC: Final = b"PK\x03\x04"
#: How torch's unpickler says that a pickle asks for something outside its list.
_GLOBAL: Final = re.compile(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)")
#: The same for objects that are made or called rather than named.
_CALL: Final = re.compile(
    r"(?:Trying to call reduce for unrecognized function|allowlisted via `add_safe_globals`,? "
    r"but got) ([^\n]+)"
)


class TorchFile:
    """A ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file.

    It is unpickled with ``weights_only=True``. The usual wrappers are taken off: a dict that
    keeps its state dict under one of `WRAPPERS`, and one of `PREFIXES` in front of every key.
    Each thing taken off or left out is said in `notes`. A dict that also holds floating weights
    beside the wrapper is kept whole. Tensors that share storage still do.

    The tensors' bytes are read from the file by positioned reads, not through torch's memory
    map, so memory does not grow with the model. Only the legacy format from before torch 1.6,
    and files of the other byte order, are held in memory.

    Parameters
    ----------
    path
        The file.
    label
        What messages call it; its path if not given.

    Raises
    ------
    UnsafePickleError
        The pickle asks for code. It was refused before anything ran.
    CheckpointError
        It cannot be read, is truncated, or is not a torch file, or holds no tensor.
    """

    kind: Final = "torch"

    def __init__(self, path: str | Path, *, label: str | None = None) -> None:
        from tallstore.objects import ObjectSource

        self.path = Path(path)
        self.label = str(path) if label is None else label
        notes: list[str] = []
        self._file = ReadOnlyFile(path)
        try:
            state = _take_off_prefixes(_take_off_wrappers(_load(self._file), notes), notes)
            self._inner: ObjectSource = _as_source(ObjectSource, state, self.label)
            self._begins = _file_offsets(self._inner, state, self._file)
        except BaseException:
            self._file.close()
            raise
        self.notes: Sequence[str] = (*notes, *self._inner.notes)

    @property
    def tree(self) -> JSON:
        """The nest around the tensors."""
        return self._inner.tree

    @property
    def tensors(self) -> Sequence[TensorSpec]:
        """Every tensor, in the order of the state dict."""
        return self._inner.tensors

    @property
    def segments(self) -> Sequence[SegmentSpec]:
        """The used parts of the storages."""
        return self._inner.segments

    @property
    def files(self) -> Sequence[FileSpec]:
        """None."""
        return self._inner.files

    def read(self, segment: int, start: int, out: Bytes) -> None:
        """Fill `out` with the segment's bytes from byte `start` on. Thread-safe.

        Raises
        ------
        CheckpointError
            The file changed since it was opened, or cannot be read.
        """
        begin = self._begins.get(segment)
        if begin is None:
            self._inner.read(segment, start, out)
        else:
            self._file.read_into(begin + start, out)

    def read_file(self, path: str) -> bytes:
        """There is no file beside the tensors."""
        raise CheckpointError(f"{self.label} has no file {path!r}; a torch file has none")

    def close(self) -> None:
        """Close the file and let go of the tensors; once more does nothing."""
        self._file.close()
        self._inner.close()

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _load(file: ReadOnlyFile) -> Any:
    """Unpickle `file`; the tensors stay on disk where its format allows."""
    if file.size == 0:
        raise CheckpointError(f"{file.path} is empty; copy or download it again")
    head = file.read(0, min(file.size, 64))
    if (cause := foreign_cause(head)) is not None:
        raise CheckpointError(f"{file.path} {cause}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(
                file.path,
                map_location="cpu",
                weights_only=True,
                mmap=head.startswith(_ZIP_MAGIC),
            )
    except pickle.UnpicklingError as exc:
        raise _refusal(file.path, str(exc)) from exc
    except MemoryError as exc:
        raise CheckpointError(
            f"{file.path} does not fit into memory, which its legacy format asks for; "
            "save it again with a newer torch"
        ) from exc
    except Exception as exc:
        raise _unreadable(file, exc) from exc


def _refusal(path: Path, message: str) -> CheckpointError:
    """What torch's unpickler refused: code, or bytes that are no pickle."""
    asked = _GLOBAL.search(message) or _CALL.search(message)
    if asked is None:
        reason = message.strip().splitlines()[-1] if message.strip() else "it is malformed"
        if "WeightsUnpickler error:" in message:
            reason = message.split("WeightsUnpickler error:", 1)[1].strip().splitlines()[0]
        return CheckpointError(
            f"{path} is not a checkpoint that torch can read safely: {reason}; "
            "save its state dict again, best as safetensors"
        )
    name = asked.group(1).rstrip(".")
    return UnsafePickleError(
        f"{path} is a pickle that asks for {name}, which is not plain data; it was refused and "
        "nothing in it was executed. Save only the state dict (torch.save(model.state_dict(), "
        f"...)) where you trust it, or allow {name} with torch.serialization.add_safe_globals"
    )


def _unreadable(file: ReadOnlyFile, exc: Exception) -> CheckpointError:
    text = str(exc)
    first = f"its bytes make no sense ({type(exc).__name__})"
    if isinstance(exc, RuntimeError | ValueError | OSError) and text.strip():
        first = text.strip().splitlines()[0]
    if "TorchScript" in text:
        return CheckpointError(
            f"{file.path} is a TorchScript archive, which is a program; save the state dict "
            "of the module that it was made from"
        )
    if "legacy .tar format" in text:
        return CheckpointError(
            f"{file.path} is in torch's tar format of before 2017, which cannot be read safely; "
            "load it with an old torch and save its state dict again"
        )
    if "central directory" in text or isinstance(exc, EOFError):
        return CheckpointError(
            f"{file.path} of {file.size} bytes ends too early: it is truncated, or not a torch "
            "file; copy or download it again"
        )
    return CheckpointError(
        f"{file.path} is not a file that torch can read: {first}; copy or save it again"
    )


def _as_source(make: type[ObjectSource], state: Any, label: str) -> ObjectSource:
    try:
        source = make(state, label=label)
    except UnsupportedObjectError as exc:
        raise CheckpointError(
            f"{label} holds something that cannot be stored: {exc}; save its state dict alone"
        ) from exc
    if not source.tensors:
        raise CheckpointError(f"{label} holds no tensor; give a checkpoint that has weights")
    return source


def _take_off_wrappers(obj: Any, notes: list[str]) -> Any:
    """The state dict inside `obj`; `obj` itself if it is not wrapped."""
    path: list[str] = []
    for _ in range(_MAX_DEPTH):
        key = _wrapper_key(obj)
        if key is None:
            break
        siblings = [str(other) for other in obj if other != key]
        path.append(key)
        if siblings:
            notes.append(f"left out what stands beside {'.'.join(path)!r}: {_listed(siblings)}")
        obj = obj[key]
    if path:
        notes.insert(0, f"took the state dict at {'.'.join(path)!r}")
    return obj


def _wrapper_key(obj: Any, depth: int = _MAX_DEPTH) -> str | None:
    """The key of `obj` that leads to a state dict."""
    if not isinstance(obj, Mapping) or any(map(_is_weight, obj.values())) or not depth:
        return None
    for key in WRAPPERS:
        value = obj.get(key)
        if _is_state_dict(value) or _wrapper_key(value, depth - 1) is not None:
            return key
    return None


def _is_weight(value: Any) -> bool:
    # A wrapper may hold counters and random states beside the weights, but no floating arrays.
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 1


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and all(isinstance(key, str) for key in value)
        and any(isinstance(item, torch.Tensor) for item in value.values())
    )


def _take_off_prefixes(state: Any, notes: list[str]) -> Any:
    """`state` without the prefixes that all its keys have."""
    if not _is_state_dict(state):
        return state
    while (prefix := _common_prefix(state)) is not None:
        notes.append(f"took {prefix!r} off every name")
        state = _without_prefix(state, prefix)
    return state


def _common_prefix(state: Mapping[str, Any]) -> str | None:
    for prefix in PREFIXES:
        if all(key.startswith(prefix) and len(key) > len(prefix) for key in state):
            return prefix
    return None


def _without_prefix(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    make: type[dict[str, Any]] = OrderedDict if isinstance(state, OrderedDict) else dict
    result = make((key.removeprefix(prefix), value) for key, value in state.items())
    versions = getattr(state, "_metadata", None)
    if isinstance(versions, Mapping) and isinstance(result, OrderedDict):
        # torch keeps the versions of modules there, by their names.
        vars(result)["_metadata"] = OrderedDict(
            (f"{key}.".removeprefix(prefix).removesuffix("."), value)
            for key, value in versions.items()
            if f"{key}.".startswith(prefix)
        )
    return result


def _listed(names: Sequence[str], limit: int = 8) -> str:
    shown = ", ".join(name if len(name) <= 60 else f"{name[:60]}..." for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _file_offsets(source: ObjectSource, state: Any, file: ReadOnlyFile) -> dict[int, int]:
    """Where in `file` each segment begins, for those that torch mapped from it."""
    # Names lead back to tensors only where nothing nests and no name had to be changed.
    if not isinstance(state, Mapping) or not all(map(_is_plain, state.items())):
        return {}
    mapped = MappedFile.find(file)
    if mapped is None:
        return {}
    result: dict[int, int] = {}
    for spec in source.tensors:
        tensor = state.get(spec.name)
        if spec.segment in result or not isinstance(tensor, torch.Tensor) or not tensor.numel():
            continue
        begin = tensor.data_ptr() - spec.offset * tensor.element_size()
        size = source.segments[spec.segment].nbytes
        storage = tensor.untyped_storage()
        # A segment of mixed dtypes may reach beyond its storage, and is zero there.
        if begin + size > storage.data_ptr() + storage.nbytes():
            continue
        offset = mapped.file_offset(begin, size)
        if offset is not None:
            result[spec.segment] = offset
    return result


def _is_plain(item: tuple[Any, Any]) -> bool:
    key, value = item
    if not isinstance(key, str) or not key or any("\ud800" <= char <= "\udfff" for char in key):
        return False
    if isinstance(value, torch.Tensor):
        return value.layout == torch.strided
    return value is None or isinstance(value, str | bytes | int | float | complex)
