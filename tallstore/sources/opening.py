"""Anything that holds weights, opened as a source: by what it is, not by what it is called."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tallstore.errors import CheckpointError
from tallstore.sources.model_directory import ModelDirectory
from tallstore.sources.reading import ReadOnlyFile, foreign_cause
from tallstore.sources.safetensors_file import SafetensorsFile
from tallstore.sources.safetensors_format import is_plausible_header

if TYPE_CHECKING:
    from tallstore.sources.source import Source

__all__ = ["TORCH_SUFFIXES", "is_lmdb_file", "open_source"]

#: Names of files that `torch.save` writes end so.
TORCH_SUFFIXES: Final = (".pt", ".pth", ".bin", ".ckpt")

_HEAD_BYTES: Final = 64
_LMDB_MAGIC: Final = b"\xde\xc0\xef\xbe"
_LMDB_MAGIC_AT: Final = 16
_ZIP_MAGIC: Final = b"PK\x03\x04"
#: The opcode that starts a pickle of protocol 2 or later, and the protocols there are.
_PICKLES: Final = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))


def is_lmdb_file(path: str | Path) -> bool:
    """Whether there is an LMDB file, such as a store, at `path`. False where nothing is."""
    try:
        with ReadOnlyFile(path) as file:
            return _is_lmdb(file.read(0, min(file.size, _HEAD_BYTES)))
    except CheckpointError:
        return False


def _is_lmdb(head: bytes) -> bool:
    return head[_LMDB_MAGIC_AT:].startswith(_LMDB_MAGIC)


def open_source(what: Any, *, label: str | None = None) -> Source:
    """Open a checkpoint.

    Parameters
    ----------
    what
        A path (str or PathLike) of a safetensors file, a torch file or a model directory; or
        anything in memory: a state dict, a module, any nest of tensors.
    label
        What messages and listings call it; its path, or its type, if not given.

    Raises
    ------
    CheckpointError
        It cannot be read, or is none of these. A store has to be opened as such.
    UnsupportedObjectError
        An object in memory that cannot be stored.
    """
    if isinstance(what, str | os.PathLike):
        name = os.fspath(what)
        if isinstance(name, bytes):
            name = os.fsdecode(name)
        return _open_path(Path(name) if name else None, label)
    from tallstore.objects import ObjectSource

    return ObjectSource(what, label=type(what).__name__ if label is None else label)


def _open_path(path: Path | None, label: str | None) -> Source:
    if path is None:
        raise CheckpointError("the path of the checkpoint is empty; give a file or a directory")
    if _is_directory(path):
        return ModelDirectory(path, label=label)
    with ReadOnlyFile(path) as file:
        size = file.size
        head = file.read(0, min(size, _HEAD_BYTES))
    if not size:
        raise CheckpointError(f"{path} is empty; copy or download it again")
    if _is_lmdb(head):
        raise CheckpointError(
            f"{path} is a store, which holds many tasks; name one as {path}::TASK"
        )
    if (cause := foreign_cause(head)) is not None:
        raise CheckpointError(f"{path} {cause}")
    if is_plausible_header(head):
        return SafetensorsFile(path, label=label)
    if head.startswith((_ZIP_MAGIC, *_PICKLES)):
        return _torch_file(path, label)
    # Damaged, perhaps; the reader of its kind can say how.
    if path.suffix.lower() == ".safetensors":
        return SafetensorsFile(path, label=label)
    if path.suffix.lower() in TORCH_SUFFIXES:
        return _torch_file(path, label)
    raise CheckpointError(
        f"{path} is not a checkpoint that tallstore knows; give a safetensors file, a file that "
        "torch.save wrote, or a model directory"
    )


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except ValueError as exc:
        raise CheckpointError(f"{str(path)!r} is not a path: {exc}") from exc


def _torch_file(path: Path, label: str | None) -> Source:
    # Only here, so that safetensors are read without torch.
    from tallstore.sources.torch_file import TorchFile

    return TorchFile(path, label=label)
