"""What the files of a model directory are: its weights, files to keep, files to leave out."""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tallstore.errors import CheckpointError
from tallstore.sources.reading import ReadOnlyFile, read_error
from tallstore.sources.shard_index import MAX_INDEX_BYTES, parse_json
from tallstore.specs import FileSpec

__all__ = [
    "MAX_FILE_BYTES",
    "Weights",
    "find_weights",
    "has_weights",
    "is_adapter",
    "list_files",
]

#: A larger file beside the weights is left out, with a note.
MAX_FILE_BYTES: Final = 256 << 20

_ADAPTER: Final = "adapter_config.json"
_MODULES: Final = "modules.json"
_INDEX_SUFFIX: Final = ".index.json"

#: Where the weights may be, first to last. Each pattern must match exactly one file.
_LAYOUTS: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "*.safetensors.index.json",
    "*.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "*.bin.index.json",
)

#: Names of weights that torch could load.
_WEIGHTS: Final = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin.index.json",
    "pytorch_model*.bin",
    "diffusion_pytorch_model*.bin",
    "adapter_model*.bin",
    "consolidated*.pth",
    "model*.pth",
    "model*.pt",
    "*.ckpt",
)
#: Names of the same weights for other frameworks, and of directories of such.
_OTHER_FRAMEWORKS: Final = (
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.ggml",
    "*.onnx",
    "*.onnx_data",
    "*.ot",
    "*.tflite",
    "*.mlmodel",
    "*.mlpackage",
    "*.ckpt.*",
    "onnx",
    "openvino",
    "coreml",
)
#: What a trainer leaves beside the weights, twice their size.
_OPTIMIZERS: Final = ("optimizer.pt", "optimizer.bin")
#: Directories that are no part of a model: histories, caches, earlier steps of a training.
_APART: Final = (".git", ".cache", "__pycache__", ".ipynb_checkpoints", "checkpoint-*")


@dataclass(frozen=True, slots=True)
class Weights:
    """The files that a directory's weights are in."""

    path: Path
    """The file, or the index of the shards."""
    is_index: bool
    is_safetensors: bool


def is_adapter(directory: Path) -> bool:
    """Whether `directory` is a PEFT adapter."""
    return (directory / _ADAPTER).exists()


def has_weights(directory: Path) -> bool:
    """Whether `directory` looks like a model directory, readable or not."""
    try:
        names = [entry.name for entry in os.scandir(directory)]
    except OSError:
        return False
    return any(_matches(name, _WEIGHTS) for name in names) or _ADAPTER in names


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def find_weights(directory: Path) -> Weights:
    """Choose the weights of a model directory.

    Raises
    ------
    CheckpointError
        It holds none, or several of which none is the usual.
    """
    try:
        names = sorted(
            entry.name for entry in os.scandir(directory) if entry.is_symlink() or entry.is_file()
        )
    except OSError as exc:
        raise read_error(directory, exc) from exc
    adapter = is_adapter(directory)
    for pattern in _LAYOUTS:
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if adapter:
            found = [name for name in found if not name.startswith("adapter_model")]
        if len(found) > 1:
            raise CheckpointError(
                f"{directory} has several weights: {_listed(found)}; name one of these files, or "
                "add the index of the shards"
            )
        if found:
            return Weights(
                directory / found[0],
                is_index=found[0].endswith(_INDEX_SUFFIX),
                is_safetensors=".safetensors" in found[0],
            )
    raise CheckpointError(_no_weights(directory, names, adapter=adapter))


def _no_weights(directory: Path, names: list[str], *, adapter: bool) -> str:
    if adapter:
        return (
            f"{directory} is a PEFT adapter (it has {_ADAPTER} and no full weights); a full "
            "checkpoint is needed: merge the adapter first (merge_and_unload) and save the model"
        )
    others = [name for name in names if _matches(name, _OTHER_FRAMEWORKS)]
    if others:
        return (
            f"{directory} has weights only for other frameworks: {_listed(others)}; "
            "convert them to safetensors first"
        )
    loose = [name for name in names if name.endswith((".pt", ".pth", ".bin", ".ckpt"))]
    if loose:
        return f"{directory} has no model.safetensors; name the file itself: {_listed(loose)}"
    below = sorted(
        entry.name for entry in os.scandir(directory) if entry.is_dir() and has_weights(Path(entry))
    )
    if below:
        return f"{directory} has weights only in its subdirectories; name one: {_listed(below)}"
    return (
        f"{directory} has no weights (model.safetensors, a safetensors index, "
        "pytorch_model.bin); check the path"
    )


def _listed(names: list[str], limit: int = 6) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def list_files(directory: Path, weights: frozenset[str]) -> tuple[list[FileSpec], list[str]]:
    """The files to keep beside `weights`, and notes on those left out.

    Files that are links are kept as what they lead to, as in the cache of the Hugging Face hub;
    directories that are links are left out, so that no loop of them is walked.

    Parameters
    ----------
    directory
        The model directory.
    weights
        Relative paths that hold the weights.
    """
    parts = _module_parts(directory)
    kept: list[FileSpec] = []
    left: dict[str, list[str]] = {}
    for path, entry in _walk(directory, ""):
        if path in weights:
            continue
        reason = _reason_to_leave(path, entry, parts)
        if reason is None:
            kept.append(FileSpec(path, entry.stat().st_size))
        else:
            left.setdefault(reason, []).append(
                ascii(path)[1:-1] if not path.isprintable() else path
            )
    notes = [f"left out {reason}: {_listed(paths)}" for reason, paths in sorted(left.items())]
    return kept, notes


def _walk(directory: Path, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every file below, and every directory that is not entered, in order of their names."""
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as exc:
        raise read_error(directory, exc) from exc
    for entry in entries:
        path = prefix + entry.name
        if entry.is_dir(follow_symlinks=False) and not _matches(
            entry.name, _APART + _OTHER_FRAMEWORKS
        ):
            yield from _walk(Path(entry), f"{path}/")
        else:
            yield path, entry


def _reason_to_leave(path: str, entry: os.DirEntry[str], parts: tuple[str, ...]) -> str | None:
    if _matches(entry.name, _OTHER_FRAMEWORKS):
        return "weights of other frameworks"
    if _matches(entry.name, _WEIGHTS) and not path.startswith(parts):
        return "other weights"
    if _matches(entry.name, _OPTIMIZERS):
        return "optimizer states"
    try:
        path.encode()
        status = entry.stat()
    except UnicodeEncodeError:
        return "names that are not Unicode"
    except OSError:
        return "broken links"
    if stat.S_ISDIR(status.st_mode):
        linked = entry.is_symlink()
        return "links to directories" if linked else "histories, caches and training steps"
    if not stat.S_ISREG(status.st_mode):
        return "pipes and devices"
    if status.st_size > MAX_FILE_BYTES:
        return f"files over {MAX_FILE_BYTES >> 20} MiB"
    return None


def _module_parts(directory: Path) -> tuple[str, ...]:
    """Subdirectories whose weights belong to the model: later modules of sentence-transformers."""
    path = directory / _MODULES
    if not path.is_file():
        return ()
    with ReadOnlyFile(path) as file:
        if file.size > MAX_INDEX_BYTES:
            return ()
        try:
            modules = parse_json(file)
        except CheckpointError:
            # It is kept byte for byte all the same; only its meaning is not known.
            return ()
    if not isinstance(modules, list):
        return ()
    found = [module.get("path") for module in modules if isinstance(module, dict)]
    return tuple(f"{part}/" for part in found if isinstance(part, str) and part)
