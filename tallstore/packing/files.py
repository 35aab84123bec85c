"""Files that a store holds already."""

from __future__ import annotations

import numpy as np

from tallstore.documents import BaseDocument, StoredFile
from tallstore.engine.snapshot import Snapshot
from tallstore.packing.writing import file_digest

__all__ = ["known_files"]


def known_files(snapshot: Snapshot, base: BaseDocument) -> list[tuple[StoredFile, bytes]]:
    """The base's files with their digests: fine-tunes mostly ship the same tokenizer."""
    found = []
    for file in base.contents.files:
        data = np.empty(file.nbytes, np.uint8)
        snapshot.read(snapshot.stream(file.stream), file.offset, data)
        found.append((file, file_digest(data.tobytes())))
    return found
