"""Timing on a device: by turns in one run, each run by events on the stream.

Without a GPU the benchmarks can still be tried (``--try``): tiny sizes, Triton's interpreter, and
nothing written. The times are meaningless then, and not shown.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Clock", "Times"]

#: Cycles, some 2 ms: longer than anything here takes to be queued.
_BUSY = 1 << 22


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of one thing."""

    p20: float
    p50: float
    p80: float
    runs: int

    def to_json(self) -> dict[str, float]:
        """For a row."""
        return {"p20_ms": self.p20, "p50_ms": self.p50, "p80_ms": self.p80, "runs": self.runs}


class Clock:
    """Times functions that queue work on the current stream.

    Parameters
    ----------
    trying
        Run everything once, on the CPU where there is no GPU.
    """

    def __init__(self, *, trying: bool) -> None:
        self.trying = trying
        if trying and not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"
            self.device = torch.device("cpu")
        else:
            self.device = torch.device("cuda", torch.cuda.current_device())

    def name(self) -> str:
        """The device, in words."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "none"

    def by_turns(
        self, runs: Mapping[str, Callable[[], object]], *, repeats: int = 21, warmup: int = 3
    ) -> dict[str, Times]:
        """Times of each; all of them, by turns."""
        spent: dict[str, list[float]] = {name: [] for name in runs}
        if self.trying:
            repeats, warmup = 1, 0
        for turn in range(warmup + repeats):
            for name, run in runs.items():
                took = self._one(run)
                if turn >= warmup:
                    spent[name].append(took)
        return {name: _times(found) for name, found in spent.items()}

    def _one(self, run: Callable[[], object]) -> float:
        if self.device.type == "cpu":
            began = time.perf_counter()
            run()
            return (time.perf_counter() - began) * 1e3
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device is kept busy until all is queued: what Python takes to launch is not counted.
        torch.cuda._sleep(_BUSY)
        first.record()
        run()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))


def _times(found: list[float]) -> Times:
    ordered = sorted(found)

    def at(share: float) -> float:
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    return Times(at(0.2), at(0.5), at(0.8), len(ordered))
