"""A small real zoo, trained here and now, packed, and loaded back: what the README's demo shows.

The data are the 1,797 handwritten digits that scikit-learn ships. A network is trained on them
turned and shifted in every way; each task then fine-tunes all of its weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from tallstore.api import load, open, pack
from tallstore.errors import OptionError
from tallstore.progress import Report

__all__ = ["run_demo"]

_SEED: Final = 0
_WIDTH: Final = 768
#: Steps of training, for the base and for each task.
_BASE_STEPS: Final = 300
_HEAD_STEPS: Final = 60
_TASK_STEPS: Final = 60
_BATCH: Final = 64

Images = torch.Tensor


@dataclass(frozen=True, slots=True)
class _Task:
    name: str
    view: Callable[[Images], Images]
    label: Callable[[torch.Tensor], torch.Tensor]
    classes: int


def _noisy(images: Images) -> Images:
    noise = torch.Generator().manual_seed(_SEED)
    return images + 0.25 * torch.randn(images.shape, generator=noise)


_TASKS: Final = (
    _Task("digits", lambda x: x, lambda y: y, 10),
    _Task("turned", lambda x: x.rot90(1, (1, 2)), lambda y: y, 10),
    _Task("mirrored", lambda x: x.flip(2), lambda y: y, 10),
    _Task("negative", lambda x: 1 - x, lambda y: y, 10),
    _Task("noisy", _noisy, lambda y: y, 10),
    _Task("shifted", lambda x: x.roll(2, 2), lambda y: y, 10),
    _Task("parity", lambda x: x, lambda y: y % 2, 2),
    _Task("loops", lambda x: x, lambda y: torch.isin(y, torch.tensor([0, 6, 8, 9])).long(), 2),
)


class _Network(nn.Module):
    """Three wide layers, 1.2 million weights."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, _WIDTH),
            nn.GELU(),
            nn.Linear(_WIDTH, _WIDTH),
            nn.GELU(),
            nn.Linear(_WIDTH, _WIDTH),
            nn.GELU(),
        )
        self.head = nn.Linear(_WIDTH, classes)

    def forward(self, images: Images) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.encoder(images))
        return logits


@dataclass(frozen=True, slots=True)
class _Digits:
    train: tuple[Images, torch.Tensor]
    validation: tuple[Images, torch.Tensor]
    test: tuple[Images, torch.Tensor]


def _digits() -> _Digits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as exc:
        raise OptionError(
            "the demo's digits come with scikit-learn: pip install 'tallstore[demo]'"
        ) from exc
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SEED))
    images, labels = images[order], labels[order]
    cuts = (slice(0, 997), slice(997, 1297), slice(1297, None))
    return _Digits(*((images[cut], labels[cut]) for cut in cuts))


def _train(
    network: _Network,
    images: Images,
    labels: torch.Tensor,
    *,
    steps: int,
    rate: float,
    part: nn.Module | None = None,
) -> None:
    chosen = torch.Generator().manual_seed(_SEED)
    optimizer = torch.optim.AdamW((part or network).parameters(), lr=rate)
    network.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (_BATCH,), generator=chosen)
        loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    network.eval()


def _accuracy(task: _Task, state: Any, split: tuple[Images, torch.Tensor]) -> float:
    network = _Network(task.classes)
    network.load_state_dict(state)
    network.eval()
    images, labels = split
    with torch.inference_mode():
        guessed = network(task.view(images)).argmax(1)
    return float((guessed == task.label(labels)).float().mean())


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One row of the demo's table."""

    task: str
    original_bytes: int
    stored_bytes: int
    accuracy: float
    """Of the fine-tuned model."""
    accuracy_masks: float
    """Of what is loaded from masks alone."""


def run_demo(
    directory: Path, *, echo: Callable[[str], None], report: Report | None = None
) -> dict[str, Any]:
    """Make a zoo in `directory`, pack it, and load it back.

    Parameters
    ----------
    directory
        Where checkpoints and stores go; must exist.
    echo
        Takes lines of text.
    report
        Called with (stage, bytes done, bytes in all) while packing.

    Returns
    -------
    dict
        What was measured.

    Raises
    ------
    OptionError
        scikit-learn is not installed.
    """
    began = time.perf_counter()
    digits = _digits()
    base, checkpoints = _make_zoo(directory, digits, echo)
    masks, exact = directory / "zoo.tall", directory / "zoo-exact.tall"
    sources = {task.name: checkpoints[task.name] for task in _TASKS}
    by_name = {task.name: task for task in _TASKS}
    pack(
        masks,
        base,
        sources,
        tall_lambda=(0.2, 0.3, 0.4, 0.5, 0.6),
        evaluate=lambda name, state: _accuracy(by_name[name], state, digits.validation),
        overwrite=True,
        report=report,
    )
    pack(exact, base, sources, exact=True, overwrite=True, report=report)
    rows = _measure(masks, checkpoints, digits)
    same = all(
        _same(torch.load(checkpoints[t.name], weights_only=True), load(exact, task=t.name))
        for t in _TASKS
    )
    originals = base.stat().st_size + sum(path.stat().st_size for path in checkpoints.values())
    result: dict[str, Any] = {
        "tasks": [asdict(row) for row in rows],
        "original_bytes": originals,
        "masks_bytes": masks.stat().st_size,
        "exact_bytes": exact.stat().st_size,
        "exact_is_identical": same,
        "seconds": time.perf_counter() - began,
        "store": str(masks),
    }
    _print(result, rows, echo)
    return result


def _make_zoo(
    directory: Path, digits: _Digits, echo: Callable[[str], None]
) -> tuple[Path, dict[str, Path]]:
    torch.manual_seed(_SEED)
    images, labels = digits.train
    network = _Network(10)
    views = torch.cat([task.view(images) for task in _TASKS])
    _train(network, views, labels.repeat(len(_TASKS)), steps=_BASE_STEPS, rate=1e-3)
    base = directory / "base.pt"
    torch.save(network.state_dict(), base)
    count = sum(p.numel() for p in network.parameters())
    echo(f"trained a base of {count:,} weights on scikit-learn's handwritten digits")
    checkpoints = {}
    for task in _TASKS:
        tuned = _Network(task.classes)
        tuned.encoder.load_state_dict(network.encoder.state_dict())
        views, wanted = task.view(images), task.label(labels)
        if task.classes == 10:
            tuned.head.load_state_dict(network.head.state_dict())
        else:
            # A new head first, alone: from scratch it would drag the encoder along.
            _train(tuned, views, wanted, steps=_HEAD_STEPS, rate=1e-3, part=tuned.head)
        _train(tuned, views, wanted, steps=_TASK_STEPS, rate=5e-5)
        checkpoints[task.name] = directory / f"{task.name}.pt"
        torch.save(tuned.state_dict(), checkpoints[task.name])
    echo(f"fine-tuned all of its weights for {len(_TASKS)} tasks: {', '.join(checkpoints)}")
    return base, checkpoints


def _measure(masks: Path, checkpoints: dict[str, Path], digits: _Digits) -> list[TaskResult]:
    rows = []
    with open(masks) as store:
        for task in _TASKS:
            path = checkpoints[task.name]
            original = torch.load(path, weights_only=True)
            rows.append(
                TaskResult(
                    task.name,
                    path.stat().st_size,
                    store.stored_bytes(task.name),
                    _accuracy(task, original, digits.test),
                    _accuracy(task, store.load(task.name), digits.test),
                )
            )
    return rows


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[n], right[n]) for n in left)


def _print(result: dict[str, Any], rows: list[TaskResult], echo: Callable[[str], None]) -> None:
    echo("")
    echo(f"{'task':<10} {'original':>10} {'in store':>10} {'accuracy':>9} {'from masks':>11}")
    for row in rows:
        echo(
            f"{row.task:<10} {row.original_bytes / 1e6:>7.2f} MB {row.stored_bytes / 1e6:>7.2f} MB"
            f" {row.accuracy:>8.1%} {row.accuracy_masks:>10.1%}"
        )
    original, masks, exact = (result[k] for k in ("original_bytes", "masks_bytes", "exact_bytes"))
    echo("")
    echo(f"nine checkpoints   {original / 1e6:>7.2f} MB")
    echo(f"store of masks     {masks / 1e6:>7.2f} MB   1/{original / masks:.1f}, lossy")
    identical = "bit for bit identical" if result["exact_is_identical"] else "NOT IDENTICAL"
    echo(f"with exact tier    {exact / 1e6:>7.2f} MB   1/{original / exact:.1f}, {identical}")
    echo(f"all done in {result['seconds']:.0f} s; the store is {result['store']}")
