"""Single tensors: which cannot be stored, sparse ones in parts, strided ones as views."""

from __future__ import annotations

from typing import Any, Final

import torch

from tallstore.dtypes import itemsize, torch_dtype
from tallstore.errors import CorruptStoreError, UnsupportedObjectError
from tallstore.specs import TensorSpec

__all__ = ["PART_NAMES", "build_sparse", "build_tensor", "sparse_parts", "why_not"]

#: The strided tensors that each sparse layout is made of; torch's constructors take this order.
PART_NAMES: Final = {
    "sparse_coo": ("indices", "values"),
    "sparse_csr": ("crow_indices", "col_indices", "values"),
    "sparse_csc": ("ccol_indices", "row_indices", "values"),
    "sparse_bsr": ("crow_indices", "col_indices", "values"),
    "sparse_bsc": ("ccol_indices", "row_indices", "values"),
}
_INT64_END: Final = 1 << 63


def why_not(tensor: torch.Tensor) -> str | None:
    """Why a tensor cannot be stored and what to do, or None if it can."""
    for test, reason in (
        (
            lambda t: type(t) not in (torch.Tensor, torch.nn.Parameter),
            "is of a subclass of torch.Tensor; convert it to a plain tensor, for example by "
            "full_tensor(), dequantize() or as_subclass(torch.Tensor)",
        ),
        (lambda t: t.is_nested, "is a nested tensor; store the list that unbind() gives"),
        (lambda t: t.is_quantized, "is quantized; store int_repr(), scale and zero point"),
        (lambda t: t.is_meta, "is on the meta device and has no values; give it some"),
        (lambda t: t.is_mkldnn, "has the mkldnn layout; store to_dense()"),
        (lambda t: t._is_zerotensor(), "is a zero tensor without memory; store clone()"),
        (_is_named, "has named dimensions; store rename(None)"),
        (_lacks_storage, "has no storage of its size in memory; materialize or clone it"),
    ):
        if test(tensor):
            return reason
    return None


def _is_named(tensor: Any) -> bool:
    # torch dropped named dimensions, and the method with them, after 2.12
    return hasattr(tensor, "has_names") and bool(tensor.has_names())


def _lacks_storage(tensor: torch.Tensor) -> bool:
    if tensor.layout != torch.strided:
        return False
    try:
        storage = tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return True
    first, last = tensor.storage_offset(), tensor.storage_offset()
    last += sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    size = tensor.element_size()
    return tensor.numel() > 0 and (first < 0 or (last + 1) * size > storage.nbytes())


def sparse_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Take a sparse tensor apart, in the order of `PART_NAMES`; the parts share its memory."""
    bare = tensor.detach()
    if bare.layout == torch.sparse_coo:
        # indices() and values() refuse tensors that are not coalesced
        return bare._indices(), bare._values()
    names = PART_NAMES[str(bare.layout).removeprefix("torch.")]
    return tuple(getattr(bare, name)() for name in names)


def build_sparse(
    layout: str, parts: tuple[torch.Tensor, ...], size: tuple[int, ...], *, coalesced: bool
) -> torch.Tensor:
    """Put a sparse tensor together; torch checks that its indices are in bounds."""
    # torch's own signatures for mypy lack the parts
    if layout == "sparse_coo":
        build: Any = torch.sparse_coo_tensor
        options = {"is_coalesced": coalesced}
    else:
        build = torch.sparse_compressed_tensor
        options = {"layout": getattr(torch, layout)}
    tensor: torch.Tensor = build(*parts, size, check_invariants=True, **options)
    return tensor


def _bad(spec: TensorSpec, reason: str) -> CorruptStoreError:
    return CorruptStoreError(f"tensor {spec.name!r} is described wrongly: {reason}")


def _check_geometry(spec: TensorSpec, size: int, available: int) -> None:
    if len(spec.shape) != len(spec.stride):
        raise _bad(spec, f"{len(spec.shape)} sizes but {len(spec.stride)} strides")
    numbers = (*spec.shape, *spec.stride, spec.offset)
    if any(type(n) is not int or not 0 <= n < _INT64_END for n in numbers):
        raise _bad(spec, "a size, a stride or the offset is not a natural number below 2**63")
    count, last = 1, spec.offset
    for n, step in zip(spec.shape, spec.stride, strict=True):
        count *= max(n, 1)
        last += max(n - 1, 0) * step
        # also of tensors without elements: torch multiplies all sizes
        if count >= _INT64_END:
            raise _bad(spec, "it has 2**63 elements or more")
    end = spec.offset if 0 in spec.shape else last + 1
    if end * size > available:
        raise _bad(spec, f"it reaches {end * size} bytes into a segment of {available}")


def build_tensor(spec: TensorSpec, segment: torch.Tensor) -> torch.Tensor:
    """Build the tensor that `spec` describes as a view of `segment`.

    Parameters
    ----------
    spec
        May be hostile; it is checked.
    segment
        The segment's bytes, as a contiguous tensor of one dimension, of any dtype and on any
        device, that starts at a multiple of the itemsize in its storage.

    Returns
    -------
    torch.Tensor
        It shares the segment's storage, so tensors of one segment share it among themselves.

    Raises
    ------
    CorruptStoreError
        The description makes no sense, or reaches outside of the segment.
    """
    try:
        size = itemsize(spec.dtype)
    except UnsupportedObjectError as exc:
        raise _bad(spec, str(exc)) from exc
    _check_geometry(spec, size, segment.numel() * segment.element_size())
    start = segment.storage_offset() * segment.element_size()
    if start % size:
        raise _bad(spec, f"its segment starts at byte {start}, not a multiple of {size}")
    tensor = torch.empty(0, dtype=torch_dtype(spec.dtype), device=segment.device)
    try:
        tensor.set_(segment.untyped_storage(), start // size + spec.offset, spec.shape, spec.stride)
        return _flagged(spec, tensor)
    except (RuntimeError, TypeError, ValueError, OverflowError) as exc:
        raise _bad(spec, str(exc)) from exc


def _flagged(spec: TensorSpec, tensor: torch.Tensor) -> torch.Tensor:
    if spec.conj:
        if not tensor.is_complex():
            raise ValueError("the conjugate bit of a dtype that is not complex")
        tensor = tensor.conj()
    if spec.neg:
        tensor = torch._neg_view(tensor)
    if spec.parameter:
        return torch.nn.Parameter(tensor, requires_grad=spec.requires_grad)
    return tensor.requires_grad_() if spec.requires_grad else tensor
