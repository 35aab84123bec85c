"""A Hugging Face model directory as a source: single or sharded weights, and what is beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tallstore.errors import CheckpointError
from tallstore.sources.model_files import Weights, find_weights, list_files
from tallstore.sources.reading import ReadOnlyFile
from tallstore.sources.safetensors_file import METADATA_FILE, SafetensorsFile, metadata_bytes
from tallstore.sources.shard_index import read_index
from tallstore.sources.source import Bytes
from tallstore.specs import JSON, FileSpec, SegmentSpec, TensorSpec

if TYPE_CHECKING:
    from tallstore.sources.torch_file import TorchFile

__all__ = ["ModelDirectory"]


class ModelDirectory:
    """A directory as `save_pretrained` writes it.

    The weights are, first to last: ``model.safetensors``; the shards of
    ``model.safetensors.index.json``, or of the only other ``*.safetensors.index.json``; the only
    other ``*.safetensors``; ``pytorch_model.bin``; the shards of ``pytorch_model.bin.index.json``.
    Tensors come in the order of the index, or of the single file.

    All other files, in subdirectories too, are `files`, byte for byte. Left out, with a note:
    other weights, weights of other frameworks, files over 256 MiB, ``.git`` and caches. How the
    weights were sharded is not kept. The shards' ``__metadata__`` is, as `METADATA_FILE`.

    Parameters
    ----------
    path
        The directory.
    label
        What messages call it; its path if not given.

    Raises
    ------
    CheckpointError
        It has no weights, or weights that cannot be read or are not where the index says.
    """

    kind: Final = "model-directory"

    def __init__(self, path: str | Path, *, label: str | None = None) -> None:
        self.path = Path(path)
        self.label = str(path) if label is None else label
        weights = find_weights(self.path)
        with ExitStack() as stack:
            index = _index(weights)
            self._shards: list[SafetensorsFile | TorchFile] = []
            for shard in dict.fromkeys(index.values() if index else [weights.path.name]):
                self._shards.append(_open_shard(weights.path.parent / shard, weights))
                stack.callback(self._shards[-1].close)
            notes = [note for shard in self._shards for note in shard.notes]
            self._places = _places(self._shards, index, weights.path, notes)
            self._stack = stack.pop_all()
        self._assemble()
        self._list_files(weights, notes)
        self.notes: Sequence[str] = tuple(dict.fromkeys(notes))

    def _assemble(self) -> None:
        """Number the segments that the tensors use, over all shards."""
        numbers: dict[tuple[int, int], int] = {}
        tensors: list[TensorSpec] = []
        for shard, spec in self._places:
            number = numbers.setdefault((shard, spec.segment), len(numbers))
            tensors.append(replace(spec, segment=number))
        self.tensors: Sequence[TensorSpec] = tuple(tensors)
        self._segments = tuple(numbers)
        self.segments: Sequence[SegmentSpec] = tuple(
            self._shards[shard].segments[segment] for shard, segment in numbers
        )

    def _list_files(self, weights: Weights, notes: list[str]) -> None:
        used = {weights.path, *(shard.path for shard in self._shards)}
        names = frozenset(path.relative_to(self.path).as_posix() for path in used)
        files, left = list_files(self.path, names)
        notes.extend(left)
        self._metadata = metadata_bytes(_joint_metadata(self._shards, notes))
        if self._metadata:
            if any(file.path == METADATA_FILE for file in files):
                notes.append(f"left out {METADATA_FILE}: the weights' own metadata has that name")
            files = [file for file in files if file.path != METADATA_FILE]
            files.append(FileSpec(METADATA_FILE, len(self._metadata)))
        self.files: Sequence[FileSpec] = tuple(files)

    @property
    def tree(self) -> JSON:
        """What is around the tensors: a flat dict, or what a single torch file had."""
        from tallstore.objects import flat_tree

        if len(self._shards) == 1 and not isinstance(self._shards[0], SafetensorsFile):
            return self._shards[0].tree
        return flat_tree([tensor.name for tensor in self.tensors])

    def read(self, segment: int, start: int, out: Bytes) -> None:
        """Fill `out` with the segment's bytes from byte `start` on. Thread-safe.

        Raises
        ------
        CheckpointError
            A file changed since it was opened, or cannot be read.
        """
        shard, inner = self._segments[segment]
        self._shards[shard].read(inner, start, out)

    def read_file(self, path: str) -> bytes:
        """The content of one of `files`.

        Raises
        ------
        CheckpointError
            It is not one of them, has changed in size, or cannot be read.
        """
        spec = next((file for file in self.files if file.path == path), None)
        if spec is None:
            raise CheckpointError(f"{self.label} has no file {path!r}; see its `files`")
        if path == METADATA_FILE and self._metadata:
            return self._metadata
        with ReadOnlyFile(self.path / path) as file:
            if file.size != spec.nbytes:
                raise CheckpointError(
                    f"{file.path} changed: it had {spec.nbytes} bytes when the directory was "
                    f"opened and has {file.size} now; wait until its writer is done"
                )
            return file.read(0, file.size)

    def close(self) -> None:
        """Close the files of the weights; once more does nothing."""
        self._stack.close()

    def __enter__(self) -> ModelDirectory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _index(weights: Weights) -> dict[str, str]:
    """Which shard each tensor is in; empty where the weights are a single file."""
    if not weights.is_index:
        return {}
    with ReadOnlyFile(weights.path) as file:
        return read_index(file)


def _open_shard(path: Path, weights: Weights) -> SafetensorsFile | TorchFile:
    if weights.is_index and not path.exists():
        raise CheckpointError(
            f"{path} is missing, but {weights.path} names it as a shard; "
            "copy or download the rest of the checkpoint"
        )
    if weights.is_safetensors:
        return SafetensorsFile(path)
    # Only here, so that safetensors are read without torch.
    from tallstore.sources.torch_file import TorchFile

    return TorchFile(path)


def _places(
    shards: Sequence[SafetensorsFile | TorchFile],
    index: Mapping[str, str],
    index_path: Path,
    notes: list[str],
) -> list[tuple[int, TensorSpec]]:
    """Every tensor with the number of its shard, in the order of the index."""
    if not index:
        return [(0, spec) for spec in shards[0].tensors]
    numbers = {shard: number for number, shard in enumerate(dict.fromkeys(index.values()))}
    held = [{spec.name: spec for spec in shard.tensors} for shard in shards]
    places = {name: numbers[shard] for name, shard in index.items()}
    for name, number in places.items():
        if name not in held[number]:
            raise CheckpointError(
                f"{shards[number].path} lacks tensor {name!r}, which {index_path} says it holds; "
                "copy or download the checkpoint again"
            )
    _add_unlisted(places, held, shards, notes)
    return [(number, held[number][name]) for name, number in places.items()]


def _add_unlisted(
    places: dict[str, int],
    held: Sequence[Mapping[str, TensorSpec]],
    shards: Sequence[SafetensorsFile | TorchFile],
    notes: list[str],
) -> None:
    """Take in what shards hold beyond the index, as loaders of such checkpoints do."""
    listed = frozenset(places)
    for number, specs in enumerate(held):
        path = shards[number].path
        for name in specs:
            if name not in places:
                places[name] = number
                notes.append(f"took tensor {name!r} of {path.name}, which the index does not name")
            elif places[name] != number and name in listed:
                notes.append(f"left out {name!r} of {path.name}: the index names another shard")
            elif places[name] != number:
                raise CheckpointError(
                    f"tensor {name!r} is both in {shards[places[name]].path} and in {path}, and "
                    "the index does not say which to take; repair the index"
                )


def _joint_metadata(
    shards: Sequence[SafetensorsFile | TorchFile], notes: list[str]
) -> dict[str, str]:
    """The ``__metadata__`` of all shards; the first one's where they differ."""
    joint: dict[str, str] = {}
    for shard in shards:
        for key, value in getattr(shard, "metadata", {}).items():
            if joint.setdefault(key, value) != value:
                notes.append(f"the shards' metadata {key!r} differ; kept the first")
    return joint
