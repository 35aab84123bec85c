"""Tasks back to checkpoints on disk: a safetensors file, or a model directory as it came."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from tallstore.codecs import Bytes
from tallstore.dtypes import itemsize
from tallstore.engine.environment import lmdb_errors
from tallstore.engine.filesystem import sync_directory
from tallstore.engine.temporary import claimed, remove_stale
from tallstore.errors import CorruptStoreError, OptionError, StoreExistsError
from tallstore.loading import Loader, Progress, no_progress
from tallstore.sources.safetensors_file import METADATA_FILE
from tallstore.sources.safetensors_writer import SafetensorsWriter
from tallstore.specs import TensorSpec, contiguous_stride

__all__ = ["DEFAULT_SHARD", "check_place", "export", "write_files"]

#: Bytes of tensors a shard, as other tools have it.
DEFAULT_SHARD: Final = 5 * 10**9


def export(
    loader: Loader,
    out: Path,
    *,
    max_shard_size: int = DEFAULT_SHARD,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> list[Path]:
    """Write what a loader reads to `out`; whole or not at all.

    Parameters
    ----------
    out
        ``NAME.safetensors`` makes one file; any other name a model directory: the weights in
        shards of at most `max_shard_size` bytes, and the stored files byte for byte.

    Returns
    -------
    list of Path
        The files made.

    Raises
    ------
    StoreExistsError
        There is something at `out`, and `overwrite` is false.
    OptionError
        The task is a nest of objects, which no safetensors file can hold.
    """
    check_place(loader, out, overwrite=overwrite)
    tensors = _flat(loader)
    if out.suffix == ".safetensors":
        _write_shards(loader, [(out, tensors)], progress)
        return [out]
    return _export_directory(loader, tensors, out, max_shard_size, progress)


def check_place(loader: Loader, out: Path, *, overwrite: bool) -> None:
    """Refuse what `export` would, before any work; raises as it does."""
    _flat(loader)
    if out.exists() and not overwrite:
        raise StoreExistsError(f"{out}: there already; remove it, or name another place")
    if not out.parent.is_dir():
        raise OptionError(f"{out}: there is no directory {out.parent}; make it first")
    if out.suffix == ".safetensors":
        if out.is_dir():
            raise StoreExistsError(f"{out}: a directory is in the way")
    elif out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise StoreExistsError(f"{out}: not an empty directory; name another place")


def _flat(loader: Loader) -> list[TensorSpec]:
    """The tensors under the names that a file is to give them."""
    found = loader.contents.flat()
    if found is None:
        raise OptionError(
            f"{loader.what}: it is no flat dict of tensors but a nest of objects, which a "
            "safetensors file cannot hold; load it with tallstore.load"
        )
    if not found:
        raise OptionError(f"{loader.what}: it has no tensors")
    return [replace(loader.contents.tensors[n], name=name) for name, n in found.items()]


def _metadata(loader: Loader) -> dict[str, str]:
    if not any(file.path == METADATA_FILE for file in loader.contents.files):
        return {}
    try:
        found = json.loads(loader.read_file(METADATA_FILE))
    except ValueError as exc:
        raise CorruptStoreError(f"{loader.what}: {METADATA_FILE} is no JSON: {exc}") from exc
    return {str(key): str(value) for key, value in found.items()}


def _nbytes(tensor: TensorSpec) -> int:
    return tensor.numel * itemsize(tensor.dtype)


def _write_shards(
    loader: Loader, shards: Sequence[tuple[Path, list[TensorSpec]]], progress: Progress
) -> None:
    """Stream segments into files; a tensor that is no plain run of its segment is built first."""
    segments = loader.contents.segments
    writer_of: dict[int, list[tuple[SafetensorsWriter, TensorSpec]]] = defaultdict(list)
    odd: list[tuple[SafetensorsWriter, TensorSpec]] = []
    metadata = _metadata(loader)
    with ExitStack() as stack:
        for path, tensors in shards:
            layout = [(t.name, t.dtype, t.shape) for t in tensors]
            writer = stack.enter_context(SafetensorsWriter(path, layout, metadata))
            for tensor in tensors:
                whole = tensor.numel == segments[tensor.segment].numel
                plain = tensor.stride == contiguous_stride(tensor.shape) and not (
                    tensor.offset or tensor.conj or tensor.neg
                )
                if whole and plain and tensor.dtype == segments[tensor.segment].dtype:
                    writer_of[tensor.segment].append((writer, tensor))
                else:
                    odd.append((writer, tensor))

        def put(segment: int, start: int, data: Bytes) -> None:
            first = start * itemsize(segments[segment].dtype)
            for writer, tensor in writer_of[segment]:
                writer.write(tensor.name, first, data)

        loader.stream(sorted(writer_of), targets={}, put=put, progress=progress)
        for writer, tensor in odd:
            found = loader.load(names=[tensor.name], progress=progress)[tensor.name]
            writer.write(tensor.name, 0, _raw(found))


def _raw(tensor: Any) -> Bytes:
    import torch

    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    raw: Bytes = plain.reshape(-1).view(torch.uint8).numpy()
    return raw


def _shards(tensors: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + _nbytes(tensor) > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += _nbytes(tensor)
    return shards


def _safe(directory: Path, path: str, what: str) -> Path:
    """A stored file's place; nothing is ever written outside `directory`."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or not pure.parts or ".." in pure.parts or "\0" in path:
        raise CorruptStoreError(f"{what}: a stored file is called {path!r}, outside its directory")
    return directory.joinpath(*pure.parts)


def _export_directory(
    loader: Loader,
    tensors: Sequence[TensorSpec],
    out: Path,
    max_shard_size: int,
    progress: Progress,
) -> list[Path]:
    if max_shard_size <= 0:
        raise OptionError(f"max_shard_size={max_shard_size}: a positive number of bytes")
    remove_stale(out.parent, rf"\.{re.escape(out.name)}\.[0-9a-f]{{12}}\.tmp")
    with lmdb_errors(out, doing="write", needed=sum(_nbytes(t) for t in tensors)):
        temporary, claim = _temporary_directory(out)
        try:
            write_files(loader, temporary)
            _write_weights(loader, tensors, temporary, max_shard_size, progress)
            for directory in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
                sync_directory(directory)
            os.replace(temporary, out)
            sync_directory(out.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            os.close(claim)
    return sorted(path for path in out.rglob("*") if path.is_file())


def write_files(loader: Loader, directory: Path) -> None:
    """Write the stored files, which are never weights, into a directory.

    Raises
    ------
    CorruptStoreError
        One is damaged, or is called what would lead outside the directory.
    """
    for file in loader.contents.files:
        if file.path == METADATA_FILE:
            continue
        place = _safe(directory, file.path, loader.what)
        place.parent.mkdir(parents=True, exist_ok=True)
        _write_file(place, loader.read_file(file.path))


def _temporary_directory(out: Path) -> tuple[Path, int]:
    """A new directory beside `out`, and the descriptor that claims it."""
    while True:
        temporary = out.with_name(f".{out.name}.{secrets.token_hex(6)}.tmp")
        temporary.mkdir()
        claim = claimed(temporary)
        if claim is not None:
            return temporary, claim


def _write_file(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _write_weights(
    loader: Loader,
    tensors: Sequence[TensorSpec],
    directory: Path,
    limit: int,
    progress: Progress,
) -> None:
    shards = _shards(tensors, limit)
    if len(shards) == 1:
        _write_shards(loader, [(directory / "model.safetensors", shards[0])], progress)
        return
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    _write_shards(
        loader, [(directory / n, s) for n, s in zip(names, shards, strict=True)], progress
    )
    index = {
        "metadata": {"total_size": sum(_nbytes(t) for t in tensors)},
        "weight_map": {
            t.name: name for name, shard in zip(names, shards, strict=True) for t in shard
        },
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    _write_file(directory / "model.safetensors.index.json", text.encode())
