"""Quantized shared vectors to float32, wherever they are."""

from __future__ import annotations

import torch

from tallstore.codecs import quantized
from tallstore.codecs.quantized import FORMS, quantized_size
from tallstore.errors import MismatchError, OptionError
from tallstore.ops.backend import choose_backend, same_device
from tallstore.ops.checks import check_weights

__all__ = ["dequantize"]


def dequantize(
    raw: torch.Tensor, out: torch.Tensor, *, form: str, backend: str | None = None
) -> None:
    """Fill `out` with what the bytes of a quantized vector stand for.

    The bits are the same whatever the backend.

    Parameters
    ----------
    raw
        uint8, contiguous, as `tallstore.codecs.quantized.quantize` gives them: of one span.
    out
        Shape (n,), float32.
    form
        A name in `tallstore.codecs.quantized.FORMS`.
    backend
        See `choose_backend`.

    Raises
    ------
    OptionError
        There is no such form.
    MismatchError
        Shapes, dtypes or devices clash; nothing was written.
    DeviceError
        The backend cannot run there.
    """
    found = FORMS.get(form)
    if found is None:
        raise OptionError(f"form={form!r}: it is one of {', '.join(FORMS)}")
    device = same_device(raw=raw, out=out)
    count = out.numel()
    check_weights(count, out=out)
    if out.dtype != torch.float32:
        raise MismatchError(f"out: {out.dtype}; a quantized vector becomes float32")
    size = quantized_size(count, found)
    fits = raw.dtype == torch.uint8 and raw.dim() == 1 and raw.is_contiguous()
    if not fits or raw.numel() != size:
        raise MismatchError(
            f"raw: {raw.dtype}, shape {tuple(raw.shape)}; contiguous uint8, ({size},), is needed"
        )
    if raw.numel() and raw.data_ptr() % 2:
        raise MismatchError("raw: starts at an odd address; clone it")
    chosen = choose_backend(device, backend)
    if chosen == "cpu":
        quantized.dequantize(raw.numpy(), count, found, out=out.numpy())
        return
    head = 2 * -(-count // quantized.BLOCK)
    scales, values = raw[:head].view(torch.bfloat16), raw[head:]
    if chosen == "triton":
        from tallstore.kernels.dequantize import dequantize as launch

        launch(values, scales, out, bits=found.bits, signed=found.signed)
    else:
        from tallstore.kernels.reference import dequantize as plain

        out.copy_(plain(values, scales, count, bits=found.bits, signed=found.signed))
