"""Where zoos are kept between runs, and what each kept model says of how it was made."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

DEFAULT_CACHE: Final = Path("~/.cache/tallstore-bench")
NOTES: Final = "tallstore_bench"  # the key in a model's config.json


@dataclass(frozen=True)
class Zoo:
    """Model directories: the pretrained base and its fine-tunes by task."""

    base: Path
    tasks: dict[str, Path]

    @classmethod
    def at(cls, folder: Path) -> Zoo:
        """Take a folder of trained tasks as it is, whatever their settings were."""
        found = sorted(p for p in folder.iterdir() if (p / "model.safetensors").is_file())
        return cls(folder / "base", {p.name: p for p in found if p.name != "base"})


def root_of(cache: Path | None) -> Path:
    """Return the cache directory, absolute; the default one if none is given."""
    return (DEFAULT_CACHE if cache is None else cache).expanduser().resolve()


def fingerprint(settings: Any) -> str:
    """Return a digest of a settings dataclass, which tells models of other settings apart."""
    return hashlib.sha256(json.dumps(asdict(settings)).encode()).hexdigest()[:16]


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Have PyTorch use so many threads for the length of a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Yield a directory to fill, which becomes ``target`` only once it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as temporary:
        fresh = Path(temporary) / "fresh"
        fresh.mkdir()
        yield fresh
        if target.exists():  # a directory cannot be renamed over a full one
            os.rename(target, Path(temporary) / "stale")
        os.rename(fresh, target)


def noted(folder: Path) -> dict[str, Any]:
    """Read what training noted in a model directory; empty where there is none."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        return {}
    found: dict[str, Any] = config.get(NOTES, {})
    return found


def write_notes(
    folder: Path, settings: Any, figures: Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> None:
    """Write a model's config.json, which says how it was made, for ``noted`` to read."""
    made = {"fingerprint": fingerprint(settings), "settings": asdict(settings)}
    text = json.dumps({**(config or {}), NOTES: {**made, **figures}}, indent=2)
    (folder / "config.json").write_text(text + "\n")


def is_made(folder: Path, settings: Any) -> bool:
    """Tell whether a model directory is there and was made with these settings."""
    return noted(folder).get("fingerprint") == fingerprint(settings)


def distance(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> float:
    """Return ||theta - theta0|| / ||theta0|| over the base's float tensors."""
    moved = norm = 0.0
    for name, start in base.items():
        if start.is_floating_point():
            first = start.double()
            moved += float((state[name].double() - first).square().sum())
            norm += float(first.square().sum())
    return math.sqrt(moved / norm)
