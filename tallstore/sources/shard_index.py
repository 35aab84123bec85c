"""The index of a sharded checkpoint: which file holds which tensor."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, Final

from tallstore.errors import CheckpointError, CorruptStoreError
from tallstore.sources.reading import ReadOnlyFile
from tallstore.strictjson import loads

__all__ = ["MAX_INDEX_BYTES", "parse_json", "read_index"]

#: A larger index is refused.
MAX_INDEX_BYTES: Final = 100_000_000


def parse_json(file: ReadOnlyFile) -> Any:
    """The content of a JSON file.

    Raises
    ------
    CheckpointError
        It is too large, or not strict JSON.
    """
    if file.size > MAX_INDEX_BYTES:
        raise CheckpointError(
            f"{file.path} has {file.size} bytes, over the cap of {MAX_INDEX_BYTES} for an index; "
            "save the checkpoint again"
        )
    try:
        return loads(file.read(0, file.size), what="its text", max_bytes=MAX_INDEX_BYTES)
    except CorruptStoreError as exc:
        raise CheckpointError(f"{file.path}: {exc}; save or download it again") from exc


def read_index(file: ReadOnlyFile) -> dict[str, str]:
    """The shard, a path relative to the index, of every tensor, in the order of the index.

    Raises
    ------
    CheckpointError
        It is not an index, or names a shard outside its directory.
    """
    record = parse_json(file)
    shards = record.get("weight_map") if isinstance(record, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(
            f"{file.path} is not the index of a sharded checkpoint: it has no weight_map; "
            "save or download it again"
        )
    for name, shard in shards.items():
        if not isinstance(shard, str) or not _is_inside(shard):
            raise CheckpointError(
                f"{file.path} puts tensor {name!r} into {shard!r}, which is not a file of its "
                "directory; do not trust this checkpoint, or repair the index"
            )
    return shards


def _is_inside(shard: str) -> bool:
    path = PurePosixPath(shard)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inside and "\0" not in shard and "\\" not in shard and shard.isprintable()
