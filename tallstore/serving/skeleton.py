"""A module with the tensors of a task and nothing else: what can be switched without the model."""

from __future__ import annotations

import torch

from tallstore.errors import OptionError
from tallstore.store import TallStore

__all__ = ["skeleton"]


def skeleton(
    store: TallStore, task: str, *, device: torch.device | str | None = None
) -> torch.nn.Module:
    """Modules nested by the dots in the names of a task's tensors, which they hold.

    Parameters
    ----------
    device
        Where the tensors are put; None: the CPU.

    Raises
    ------
    OptionError
        The task is no flat dict of tensors.
    UnknownTaskError, CorruptStoreError, DeviceError
    """
    state = store.load(task, device=device)
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise OptionError(f"{store.path}: task {task!r} is a nest of objects, no state dict")
    root = torch.nn.Module()
    for name, tensor in state.items():
        owner = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        if tensor.is_floating_point():
            owner.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(leaf, tensor)
    return root
