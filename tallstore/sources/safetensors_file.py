"""A safetensors file as a source."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tallstore.errors import CheckpointError
from tallstore.sources.reading import ReadOnlyFile
from tallstore.sources.safetensors_format import SafetensorsTensor, parse_open_file
from tallstore.sources.source import Bytes
from tallstore.specs import JSON, FileSpec, SegmentSpec, TensorSpec, contiguous_stride

__all__ = ["METADATA_FILE", "SafetensorsFile", "metadata_bytes"]

#: The name among a source's files under which the ``__metadata__`` of safetensors files travels,
#: as JSON. It is not a file on disk: unpacking puts it back into the headers it writes.
METADATA_FILE: Final = "__metadata__.json"


def metadata_bytes(metadata: Mapping[str, str]) -> bytes:
    """The content of `METADATA_FILE`; empty where there is no metadata, and then no such file."""
    if not metadata:
        return b""
    return json.dumps(dict(metadata), ensure_ascii=False, separators=(",", ":")).encode()


class SafetensorsFile:
    """A safetensors file, read by positioned reads.

    Each tensor is a segment of its own, contiguous, in the order of the bytes. The file's
    ``__metadata__``, where it has any, is among `files` as `METADATA_FILE`.

    Parameters
    ----------
    path
        The file.
    label
        What messages call it; its path if not given.

    Raises
    ------
    CheckpointError
        It cannot be read, is truncated, or is not a well-formed safetensors file.
    """

    kind: Final = "safetensors"

    def __init__(self, path: str | Path, *, label: str | None = None) -> None:
        self.path = Path(path)
        self.label = str(path) if label is None else label
        self.notes: Sequence[str] = ()
        self._file = ReadOnlyFile(path)
        try:
            header = parse_open_file(self._file)
        except BaseException:
            self._file.close()
            raise
        self._begins = tuple(tensor.begin for tensor in header.tensors.values())
        #: What the header's ``__metadata__`` holds.
        self.metadata: dict[str, str] = dict(header.metadata)
        self.segments: Sequence[SegmentSpec] = tuple(map(_segment, header.tensors.values()))
        self.tensors: Sequence[TensorSpec] = tuple(
            TensorSpec(
                name=name,
                segment=index,
                dtype=tensor.dtype,
                shape=tensor.shape,
                stride=contiguous_stride(tensor.shape),
            )
            for index, (name, tensor) in enumerate(header.tensors.items())
        )
        content = metadata_bytes(self.metadata)
        self.files: Sequence[FileSpec] = (FileSpec(METADATA_FILE, len(content)),) if content else ()

    @property
    def tree(self) -> JSON:
        """A flat dict of the tensors."""
        from tallstore.objects import flat_tree

        return flat_tree([tensor.name for tensor in self.tensors])

    def read(self, segment: int, start: int, out: Bytes) -> None:
        """Fill `out` with the segment's bytes from byte `start` on. Thread-safe.

        Raises
        ------
        CheckpointError
            The file changed since it was opened, or cannot be read.
        """
        self._file.read_into(self._begins[segment] + start, out)

    def read_file(self, path: str) -> bytes:
        """The metadata, as JSON: there is no other file."""
        content = metadata_bytes(self.metadata)
        if path != METADATA_FILE or not content:
            raise CheckpointError(f"{self.label} has no file {path!r}; see its `files`")
        return content

    def close(self) -> None:
        """Close the file; once more does nothing."""
        self._file.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _segment(tensor: SafetensorsTensor) -> SegmentSpec:
    numel = 1
    for size in tensor.shape:
        numel *= size
    return SegmentSpec(tensor.dtype, numel)
