"""A small base, fine-tunes of it, and child processes: what several tests start from."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

__all__ = ["ROOT", "State", "bits", "child_environment", "fine_tune", "make_base", "run_child"]

ROOT = Path(__file__).resolve().parent.parent
State = dict[str, torch.Tensor]

#: Sizes off every boundary: of bytes, of blocks.
_SHAPES: Mapping[str, tuple[int, ...]] = {
    "embed.weight": (37, 16),
    "layers.0.weight": (33, 65),
    "layers.0.bias": (33,),
    "layers.1.weight": (65, 33),
    "norm.weight": (7,),
    "scale": (),
    "head.weight": (2, 65),
}


def make_base(seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    """Weights of a pretrained model, and a buffer of integers."""
    draw = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in _SHAPES.items()}
    state["positions"] = torch.arange(11)
    return state


def fine_tune(
    base: State, seed: int, *, dtype: torch.dtype | None = None, step: float = 0.01
) -> State:
    """`base`, every floating weight moved a little."""
    draw = torch.Generator().manual_seed(1000 + seed)
    tuned = {}
    for name, tensor in base.items():
        if tensor.is_floating_point():
            moved = tensor.float() + step * torch.randn(tensor.shape, generator=draw)
            tuned[name] = moved.to(dtype or tensor.dtype)
        else:
            tuned[name] = tensor.clone()
    return tuned


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor: equal only where every bit is, NaN and signs of zeros too."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def child_environment() -> dict[str, str]:
    """Environment variables for a child that imports this checkout, and what this process does."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",
    }


def run_child(
    code: str, *arguments: object, timeout: float = 120, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own; fail with its output unless it succeeds."""
    command: Sequence[str] = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command,
        env=child_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check:
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
