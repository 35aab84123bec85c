"""Codes that touch few weights: applied to, and taken back from, the weights they touch.

Two forms: `SparseCode` has positions, `SeededCode` hashes them. Level 0, of what is not touched,
is -0.0, so that the untouched weights keep every bit (x + -0.0 is x); what comes out is a full
reconstruction, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

import torch

from tallstore.errors import DeviceError, MismatchError, OptionError
from tallstore.kernels import seeded_reference, sparse_reference
from tallstore.kernels.seeded_reference import SeededCode
from tallstore.kernels.sparse_reference import SparseCode, compress
from tallstore.ops import compiled, cpu_sparse, touches
from tallstore.ops.backend import choose_backend, same_device
from tallstore.ops.checks import check_planes, check_rows, check_table, check_weights
from tallstore.ops.reconstruction import reconstruct

__all__ = [
    "DENSE_FROM",
    "AnySparseCode",
    "SeededCode",
    "SparseCode",
    "apply_sparse",
    "compress_planes",
    "density",
    "expand_sparse",
    "locate_seeded",
    "restore_sparse",
    "switch_sparse",
]

AnySparseCode = SparseCode | SeededCode

#: Share of the weights that a switch touches, old and new together, from which one pass over all
#: of them is faster on CUDA, by the bytes of a weight of `out`. Measured on an H200 with random
#: positions (`bench.gpu.kernels sparse`). On the CPU a switch is faster at any density.
DENSE_FROM: Final = {2: 0.03, 4: 0.1}


def compress_planes(
    planes: torch.Tensor,
    weights: int,
    levels: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
) -> SparseCode:
    """The compact form of packed planes, 16 bits a touched weight.

    Parameters
    ----------
    planes
        uint8, shape (K, at least ceil(weights / 8)), K = 1..4, LSB-first.
    weights
        Weights of the arena.
    levels
        float32, shape (R, 2**K), on the planes' device; the first of each row is -0.0.
    rows
        int32, shape (at least ceil(weights / 1024),): the row of each block; None: row 0.

    Raises
    ------
    MismatchError, OptionError
    """
    same_device(planes=planes, levels=levels, rows=rows)
    count = check_planes(planes, weights)
    check_table(levels, 1 << count)
    check_rows(rows, levels.shape[0], weights)
    first = levels[:, 0]
    if not bool((first == 0).all() and first.signbit().all()):
        raise OptionError(
            f"levels: the level of code 0 is {first.tolist()[:4]}; -0.0 is needed, which leaves a "
            "weight as it is"
        )
    there = None if rows is None else rows.contiguous()
    return compress(planes, weights, table=levels, rows=there)


def density(code: AnySparseCode) -> float:
    """Fraction of the arena's weights that a code touches, padding included."""
    if isinstance(code, SparseCode):
        touched = code.entries.numel()
    else:
        touched = sum(tensor.groups for tensor in code.tensors)
    return touched / code.weights if code.weights else 0.0


def apply_sparse(
    code: AnySparseCode, base: torch.Tensor, out: torch.Tensor, *, backend: str | None = None
) -> None:
    """Make the touched weights of `out` base + level; no other is read or written.

    A float32 sum, rounded once to the dtype of `out`.

    Parameters
    ----------
    code
        Of an arena of n weights.
    base
        Shape (n,), float32, bfloat16 or float16.
    out
        Shape (n,), any of the three dtypes; may be `base` itself.
    backend
        See `choose_backend`.

    Raises
    ------
    MismatchError
        Shapes, dtypes or devices clash; nothing was written.
    DeviceError
        The backend cannot run there.
    """
    _kernels(code, base, out, backend).apply(code, base, out)


def restore_sparse(
    code: AnySparseCode, base: torch.Tensor, out: torch.Tensor, *, backend: str | None = None
) -> None:
    """Make the touched weights of `out` the base again, rounded; see `apply_sparse`."""
    _kernels(code, base, out, backend).restore(code, base, out)


def switch_sparse(
    old: AnySparseCode,
    new: AnySparseCode,
    base: torch.Tensor,
    out: torch.Tensor,
    *,
    backend: str | None = None,
    dense_from: float | None = None,
) -> None:
    """From one code to another in place, touching only the weights that either does.

    On CUDA a `SparseCode` writes whole sectors of 32 bytes: weights beside the touched ones are
    written as they were. Where codes touch many weights, one pass over all is faster, and is made
    instead.

    Parameters
    ----------
    old, new
        Codes of one arena; `out` holds `old` applied over `base`.
    base, out
        As for `apply_sparse`, but two.
    dense_from
        Share of the weights touched, old and new together, from which a full pass is made; None:
        `DENSE_FROM` on CUDA, never on the CPU.

    Raises
    ------
    MismatchError, DeviceError
        As `apply_sparse` does.
    """
    kernels = _kernels(new, base, out, backend)
    before = _kernels(old, base, out, backend)
    if out.numel() and out.data_ptr() == base.data_ptr():
        raise MismatchError("out: it is the base itself, which a switch restores from")
    if dense_from is None and out.device.type != "cpu":
        dense_from = DENSE_FROM[out.element_size()]
    many = dense_from is not None and density(old) + density(new) >= dense_from
    if many and _planes_of(new) is not None:
        table, rows = _levels(new)
        full = expand_sparse(new, backend=backend)
        reconstruct(base, full, None, table, out, rows=rows, backend=backend)
    elif kernels is before:
        kernels.switch(old, new, base, out)
    else:
        before.restore(old, base, out)
        kernels.apply(new, base, out)


def expand_sparse(code: AnySparseCode, *, backend: str | None = None) -> torch.Tensor:
    """The packed planes of a code.

    Returns
    -------
    torch.Tensor
        uint8, shape (K, whole words of 32 weights), LSB-first. Of a `SeededCode` of B bits, K is
        B + 1: code 0 where nothing is touched, 1 + the value's code elsewhere.

    Raises
    ------
    OptionError
        Seeded values of 4 bits: their 17 codes have no planes.
    DeviceError
        The backend cannot run there.
    """
    count = _planes_of(code)
    if count is None:
        raise OptionError(
            f"values of {code.bits} bits and none make {(1 << code.bits) + 1} codes; 4 planes "
            "hold 16"
        )
    device = code.table.device
    if choose_backend(device, backend) != "triton":
        found: torch.Tensor = _reference(code).expand(code)
        return found
    size = sparse_reference.plane_bytes(code.weights)
    planes = torch.empty((count, size), dtype=torch.uint8, device=device)
    _triton(code).expand(code, planes)
    return planes


def locate_seeded(code: SeededCode, *, backend: str | None = None) -> SparseCode:
    """The same code with the places of its values, which no operation has to work out then.

    Parameters
    ----------
    code
        On the CPU.
    backend
        ``"cpu"``, ``"compiled"`` or None; see `choose_backend`.

    Returns
    -------
    SparseCode
        16 bits a value. A value's code may be 0: its level counts like any other.

    Raises
    ------
    DeviceError
        The backend cannot run there.
    """
    chosen = choose_backend(code.table.device, backend, compiles=True)
    if chosen not in ("cpu", "compiled"):
        raise DeviceError(f"backend={chosen!r}: places are worked out on the CPU; move the code")
    kernels: Any = touches if chosen == "compiled" else cpu_sparse
    found: SparseCode = kernels.located(code)
    return found


def _planes_of(code: AnySparseCode) -> int | None:
    if isinstance(code, SparseCode):
        return code.bits
    return code.bits + 1 if code.bits < 4 else None


def _levels(code: AnySparseCode) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(code, SparseCode):
        return code.table, code.rows
    return seeded_reference.expanded_levels(code)


def _reference(code: AnySparseCode) -> ModuleType:
    return sparse_reference if isinstance(code, SparseCode) else seeded_reference


def _triton(code: AnySparseCode) -> ModuleType:
    from tallstore.kernels import seeded, sparse

    return sparse if isinstance(code, SparseCode) else seeded


def _kernels(
    code: AnySparseCode, base: torch.Tensor, out: torch.Tensor, backend: str | None
) -> Any:
    """The module that works on tensors of that device, after they were checked."""
    device = same_device(base=base, out=out, code=code.table)
    check_weights(code.weights, base=base, out=out)
    chosen = choose_backend(device, backend, compiles=True)
    if chosen == "compiled" and compiled.takes(base, out):
        return touches
    if chosen in ("cpu", "compiled"):
        return cpu_sparse
    pick: Callable[[AnySparseCode], ModuleType] = _triton if chosen == "triton" else _reference
    return pick(code)
