"""What the benchmarks of kernels share: random inputs, times beside a copy, checks, rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.clock import Clock

__all__ = ["BLOCK", "Bench", "ends", "same", "short"]

BLOCK = 1024


class Bench:
    """The rows of one run."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.device = clock.device
        self.rows: list[dict[str, Any]] = []
        self.failed: list[str] = []

    def size(self, n: int) -> int:
        """Weights instead of `n`: few where the benchmark is only tried.

        On a GPU, of the same powers of two in every stride, so that the same kernels are compiled.
        """
        if not self.clock.trying:
            return n
        return 64 * BLOCK if self.device.type == "cuda" else 5 * BLOCK + 8

    def sizes(self, *powers: int) -> list[int]:
        """Numbers of weights, or one small one; see `size`."""
        return sorted({self.size(1 << power) for power in powers})

    def require(self, truth: bool, what: str) -> None:
        """Note what differs from its reference: its time is worth nothing, those of others are."""
        if truth:
            return
        if self.clock.trying:
            raise ValueError(f"{what} differs from the reference")
        print(f"{what} DIFFERS from the reference", flush=True)
        self.failed.append(what)

    def floats(self, n: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers, made without a second copy of them."""
        return torch.empty(n, dtype=dtype, device=self.device).normal_(0, scale)

    def bits(self, *size: int) -> torch.Tensor:
        """Random bytes."""
        made = torch.empty(size, dtype=torch.uint8, device=self.device)
        return made.random_(0, 256)

    def compare(
        self,
        what: str,
        runs: dict[str, Callable[[], object]],
        moved: int,
        *,
        copied: int,
        **more: Any,
    ) -> dict[str, float]:
        """Time `runs`, "copy" among them; bandwidth of each of the others over the copy's.

        Parameters
        ----------
        moved
            Bytes in and out of each but the copy.
        copied
            Bytes that the copy reads and writes.
        """
        times = self.clock.by_turns(runs, repeats=more.pop("repeats", 21))
        copy = copied / times["copy"].p50
        shares = {}
        for name, time in times.items():
            speed = (copied if name == "copy" else moved) / time.p50
            shares[name] = speed / copy
            self.rows.append(
                {
                    "what": what,
                    "who": name,
                    **more,
                    **time.to_json(),
                    "bytes": copied if name == "copy" else moved,
                    "gb_per_s": speed / 1e6,
                    "of_copy_bandwidth": speed / copy,
                }
            )
            if name != "copy" and not self.clock.trying:
                extra = " ".join(f"{k}={v}" for k, v in more.items())
                print(
                    f"{what:<14} {name:<12} {extra:<58} {time.p50:9.3f} ms "
                    f"{speed / 1e6:7.0f} GB/s {speed / copy:6.1%} of copy",
                    flush=True,
                )
        return shares


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def ends(n: int) -> list[slice]:
    """The first weights of an arena and its last ones."""
    some = min(n, 1 << 20)
    return [slice(0, some), slice((n - some) // BLOCK * BLOCK, n)]


def short(dtype: torch.dtype) -> str:
    """A dtype without its module."""
    return str(dtype).removeprefix("torch.")
