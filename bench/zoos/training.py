"""What the zoos' training runs share: the order of the rows and the loop over the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Batch = TypeVar("Batch")


def row_batches(rows: int, *, batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Yield the rows of a batch a step, all rows in a fresh order each time round."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < batch:
            waiting += torch.randperm(rows, generator=generator).tolist()
        yield waiting[:batch]
        del waiting[:batch]


def fit(
    model: nn.Module,
    loss_of: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    *,
    groups: list[dict[str, Any]],
    weight_decay: float,
    steps: int,
    warmup: float,
) -> None:
    """Train a model in place by AdamW, its rate raised over ``warmup`` and lowered to the end.

    Parameters
    ----------
    model
        Left in training mode.
    loss_of, batches
        What to minimize on each of ``steps`` batches.
    groups
        AdamW's parameter groups, with their rates.
    warmup
        The share of the steps over which the rate rises.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
    warm = max(1, round(warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm + 1))
    )
    model.train()
    for batch in batches:
        loss = loss_of(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict as a file takes it: detached and contiguous."""
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
