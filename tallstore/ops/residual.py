"""The exact tier's last step, wherever the weights are."""

from __future__ import annotations

from typing import Final

import torch

from tallstore.coding import add_residual as on_cpu
from tallstore.dtypes import dtype_name
from tallstore.errors import MismatchError
from tallstore.ops.backend import choose_backend, same_device

__all__ = ["add_residual"]

_ORDERED: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WORDS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def add_residual(
    predicted: torch.Tensor,
    zigzag: torch.Tensor,
    out: torch.Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Fill `out` with what a prediction and its residual stand for; see `coding.residual`.

    Parameters
    ----------
    predicted
        Shape (n,), contiguous, elements of 1, 2, 4 or 8 bytes.
    zigzag
        uint8, contiguous: as many bytes.
    out
        The shape and dtype of `predicted`; may be `predicted` itself.
    backend
        See `choose_backend`.

    Raises
    ------
    MismatchError
        Shapes, dtypes or devices clash; nothing was written.
    DeviceError
        The backend cannot run there.
    """
    device = same_device(predicted=predicted, zigzag=zigzag, out=out)
    size = predicted.element_size()
    for name, tensor in (("predicted", predicted), ("zigzag", zigzag), ("out", out)):
        dtype = torch.uint8 if name == "zigzag" else predicted.dtype
        fits = tensor.dim() == 1 and tensor.is_contiguous() and tensor.nbytes == predicted.nbytes
        if not fits or tensor.dtype != dtype or size not in _WORDS:
            raise MismatchError(
                f"{name}: {tensor.dtype}, shape {tuple(tensor.shape)}; contiguous {dtype} of "
                f"{predicted.nbytes} bytes, elements of 8 or fewer, is needed"
            )
    chosen = choose_backend(device, backend)
    if chosen == "cpu":
        name = dtype_name(predicted.dtype)
        on_cpu(_raw(predicted).numpy(), zigzag.numpy(), name, _raw(out).numpy())
        return
    word = _WORDS[size]
    if predicted.dtype not in _ORDERED:
        # Of dtypes that are no floats of more than a byte the words differ as they are.
        predicted, out = predicted.view(word), out.view(word)
    if chosen == "triton":
        from tallstore.kernels.residual import add_residual as launch

        launch(predicted, zigzag.view(word), out)
    else:
        from tallstore.kernels.reference import add_residual as plain

        out.copy_(plain(predicted, zigzag.view(word)))


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)
