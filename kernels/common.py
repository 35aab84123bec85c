"""What the kernels share: the block, device helpers, and how a launch is shaped.

Knows triton and torch only. Every kernel is launched with `enable_fp_fusion=False`: a product and
a sum are rounded one after the other, as on the CPU. Numbers that no address depends on are not
specialized: a new end, or number of tasks, must not compile a kernel again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl

__all__ = [
    "BLOCK",
    "INTERPRETED",
    "Shape",
    "lanes",
    "launching_on",
    "rounded",
    "spread",
    "start_driver",
    "tl_dtype",
]

#: Weights a block; tensors start at its multiples, so that one block has one row of levels.
BLOCK: Final = 1024

_TL: Final = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a kernel's work is cut: blocks of `BLOCK` weights a program, warps a program."""

    blocks: int = 1
    warps: int = 4


def tl_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of a floating dtype."""
    return _TL[dtype]


def lanes(*dtypes: torch.dtype | None) -> int:
    """Weights a thread takes at once: 16 bytes of the widest dtype, at most a byte of a plane."""
    return min(8, 16 // max(dtype.itemsize for dtype in dtypes if dtype is not None))


#: One thread at a time launches: else each of several compiles the kernel that is not there yet.
_LAUNCHING: Final = threading.RLock()


@contextmanager
def launching_on(tensor: torch.Tensor) -> Iterator[None]:
    """A context in which kernels start on a tensor's device and current stream."""
    # Triton launches on torch's current device, whatever device its arguments are on.
    with _LAUNCHING, torch.cuda.device_of(tensor):
        yield


def start_driver() -> None:
    """Have Triton build what it launches kernels with; whatever keeps it from that is raised."""
    triton.runtime.driver.active.get_current_device()


@triton.jit
def spread(nibble):
    """Four bits (uint32, 0 .. 15) as the low bits of four bytes, the lowest first."""
    # Copies 7 bits apart: bit i of copy i comes to bit 8 * i, and no two bits meet.
    return (nibble * 0x00204081) & 0x01010101


@triton.jit
def rounded(x, DTYPE: tl.constexpr, SOFT: tl.constexpr):
    """`x` (float32) rounded to nearest even.

    Triton's interpreter truncates float32 to bfloat16, so under it (`SOFT`) integers do the
    rounding; the hardware has an instruction.
    """
    if SOFT and tl.bfloat16 == DTYPE:
        word = x.to(tl.uint32, bitcast=True)
        even = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        quiet = ((word >> 16) & 0x8000) | 0x7FC0
        half = tl.where(x == x, even, quiet)
        return half.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


#: Whether kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1``).
INTERPRETED: Final = not isinstance(rounded, triton.JITFunction)
