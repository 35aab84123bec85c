"""Where in a file the bytes lie that a library has mapped into this process."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tallstore.sources.reading import ReadOnlyFile

__all__ = ["MappedFile"]

#: A line of /proc/self/smaps that opens a mapping: addresses, offset and path. Its device and
#: inode are no help: overlay file systems give those of another layer.
_HEADER: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S{4} ([0-9a-f]+) \S+ \d+ *(.*)")


@dataclass(frozen=True, slots=True)
class _Mapping:
    start: int
    end: int
    offset: int


@dataclass(frozen=True, slots=True)
class MappedFile:
    """The mappings of one file whose pages are all as the file has them.

    A reader of mapped tensors keeps every page that it touches in its memory. Given the place
    in the file instead, it can read without the map.
    """

    mappings: tuple[_Mapping, ...]

    @classmethod
    def find(cls, file: ReadOnlyFile) -> MappedFile | None:
        """The mappings of `file` in this process; None without any, or where Linux is not.

        A mapping with a page of its own (written to after it was mapped, as torch does when it
        swaps bytes) is left out: its file no longer says what it holds.
        """
        if not sys.platform.startswith("linux"):
            return None
        try:
            path = os.path.realpath(file.path)
            if not file.is_at(path):
                return None
            text = Path("/proc/self/smaps").read_text(errors="surrogateescape")
        except OSError:
            return None
        mappings = tuple(_clean_mappings(text, path))
        return cls(mappings) if mappings else None

    def file_offset(self, address: int, nbytes: int) -> int | None:
        """The offset in the file of the `nbytes` at `address`; None if they are not mapped."""
        for mapping in self.mappings:
            if mapping.start <= address and address + nbytes <= mapping.end:
                return address - mapping.start + mapping.offset
        return None


def _clean_mappings(text: str, path: str) -> list[_Mapping]:
    found: list[_Mapping] = []
    ours = False
    for line in text.split("\n"):
        if (match := _HEADER.match(line)) is not None:
            start, end, offset, name = match.groups()
            ours = name == path
            if ours:
                found.append(_Mapping(int(start, 16), int(end, 16), int(offset, 16)))
        elif ours and line.startswith(("Anonymous:", "Swap:")) and line.split()[1] != "0":
            found.pop()
            ours = False
    return found
