"""Shared vectors in 8 and 4 bits: small integers, and a scale for every block of 256 weights.

A quantized vector means ``float32(q) * scale``, one rounding, which for a scale of 8 significant
bits and a q of no more is none: it is the same everywhere. Blocks of 256 with bfloat16 scales cost
1/16 bit a weight. On task vectors of MiniLM, blocks of 1024 erred 5 to 7 % more for 3/64 bit less,
which four-bit values would gain 3 % by; scales in float32 gained nothing.

Bytes of n weights: ceil(n / 256) scales, bfloat16, little endian; then the values, one byte each,
or two weights a byte, the first in the lower half. int8 and int4 are two's complement; uint8 and
uint4, for a vector without a negative weight, are not signed.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from tallstore.codecs.codec import Bytes
from tallstore.errors import CorruptStoreError, OptionError

__all__ = ["BLOCK", "FORMS", "Form", "dequantize", "quantize", "quantized_size"]

Floats = npt.NDArray[np.float32]

#: Weights that share a scale.
BLOCK: Final = 256

#: Shares of a block's largest weight that four bits are tried to reach up to: cutting the largest
#: off makes all other steps finer, and the error a tenth smaller.
_REACH: Final = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How the values of a quantized vector are written."""

    bits: int
    """8 or 4."""
    signed: bool

    @property
    def most(self) -> int:
        """The largest value in use; the least is its negative, or 0."""
        return (1 << self.bits - self.signed) - 1

    @property
    def least(self) -> int:
        """The least value in use."""
        return -self.most if self.signed else 0


#: The forms by the names that a store calls a vector's dtype.
FORMS: Final = MappingProxyType(
    {
        "int8": Form(bits=8, signed=True),
        "int4": Form(bits=4, signed=True),
        "uint8": Form(bits=8, signed=False),
        "uint4": Form(bits=4, signed=False),
    }
)


def quantized_size(count: int, form: Form) -> int:
    """Bytes that `count` quantized weights take."""
    return 2 * -(-count // BLOCK) + (count * form.bits + 7) // 8


def quantize(values: Floats, form: Form) -> Bytes:
    """The bytes of a vector whose blocks err as little as their scales allow.

    Parameters
    ----------
    values
        float32, shape (n,), finite; not negative where the form has no sign.

    Returns
    -------
    numpy.ndarray
        uint8, shape (quantized_size(n, form),). What they stand for is `dequantize`'s to say:
        codes are to be encoded against that.

    Raises
    ------
    OptionError
        A value is not finite, or negative in a form without a sign.
    """
    if not np.isfinite(values).all():
        raise OptionError(
            f"a shared vector with values that are not finite has no form of {form.bits} bits; "
            "keep it in float32"
        )
    if not form.signed and (values < 0).any():
        raise OptionError("a shared vector with negative values needs a signed form: int8 or int4")
    blocks = np.pad(values, (0, -values.size % BLOCK)).reshape(-1, BLOCK)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    best = np.zeros(blocks.shape, np.int16)
    scales = np.zeros_like(largest)
    least = np.full(largest.shape, np.inf)
    for reach in _REACH if form.bits == 4 else _REACH[:1]:
        scale = _as_bfloat16(largest * np.float32(reach) / np.float32(form.most), form)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            steps = np.where(scale > 0, blocks / scale, 0)
        tried = np.clip(np.rint(steps), form.least, form.most)
        errors = np.square(blocks.astype(np.float64) - tried * scale).sum(axis=1, keepdims=True)
        better = errors < least
        np.copyto(best, tried, where=better, casting="unsafe")
        np.copyto(scales, scale, where=better)
        np.copyto(least, errors, where=better)
    whole = best.ravel()[: values.size].astype(np.uint8)
    if form.bits == 4:
        pairs = np.pad(whole & np.uint8(15), (0, whole.size % 2)).reshape(-1, 2)
        whole = pairs[:, 0] | pairs[:, 1] << np.uint8(4)
    return np.concatenate(
        [(scales.view(np.uint32) >> 16).astype("<u2").view(np.uint8).ravel(), whole]
    )


def _as_bfloat16(scale: Floats, form: Form) -> Floats:
    """Rounded to nearest even; down where a full value would be infinite."""
    word = scale.view(np.uint32)
    rounded = ((word + 0x7FFF + (word >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    cut = (word & np.uint32(0xFFFF0000)).view(np.float32)
    with np.errstate(over="ignore"):
        fits = np.isfinite(rounded * np.float32(form.most))
    return np.where(fits, rounded, cut)


def dequantize(raw: Bytes, count: int, form: Form, *, out: Floats | None = None) -> Floats:
    """What quantized bytes stand for, as float32.

    Parameters
    ----------
    raw
        uint8, shape (quantized_size(count, form),).
    count
        Weights.
    out
        float32, shape (count,), to fill and return; None: new memory.

    Raises
    ------
    CorruptStoreError
        `raw` has another size.
    """
    size = quantized_size(count, form)
    if raw.size != size:
        raise CorruptStoreError(f"a quantized vector of {raw.size} bytes where {size} are expected")
    result = np.empty(count, np.float32) if out is None else out
    head = 2 * -(-count // BLOCK)
    scales = (raw[:head].view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    np.copyto(result, _values(raw[head:], form)[:count])
    whole = count // BLOCK
    with np.errstate(over="ignore", invalid="ignore"):
        full = result[: whole * BLOCK].reshape(-1, BLOCK)
        np.multiply(full, scales[:whole, None], out=full)
        rest = result[whole * BLOCK :]
        np.multiply(rest, scales[whole:], out=rest)
    return result


def _values(raw: Bytes, form: Form) -> npt.NDArray[np.uint8] | npt.NDArray[np.int8]:
    if form.bits == 8:
        return raw.view(np.int8) if form.signed else raw
    # Both halves of a byte at once, as the two bytes of a little-endian word.
    wide = raw.astype("<u2")
    np.bitwise_or(wide, wide << np.uint16(4), out=wide)
    np.bitwise_and(wide, np.uint16(0x0F0F), out=wide)
    halves = wide.view(np.uint8)
    if not form.signed:
        return halves
    np.bitwise_xor(halves, np.uint8(8), out=halves)
    np.subtract(halves, np.uint8(8), out=halves)
    return halves.view(np.int8)
