"""32 weights at once, written past the caches, and sharing rows: for loops of numba's.

A store reads the line that it writes to before it writes it, to keep what it does not overwrite.
Here whole lines are written, so that reading is half of the traffic for nothing; a store that is
marked non-temporal spares it. LLVM takes such stores in vectors alone, which numba has no word for.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["LINE", "WIDTH", "draw", "fence", "fetch", "write"]

#: Weights a step: those of 32 bits of a plane.
WIDTH: Final = 32
#: Bytes that an address must be a multiple of.
LINE: Final = 64

_BIT, _SHORT, _WORD = (ir.VectorType(ir.IntType(n), WIDTH) for n in (1, 16, 32))
_FLOAT: Final = ir.VectorType(ir.FloatType(), WIDTH)
_SHIFT: Final = ir.Constant(_WORD, [16] * WIDTH)


@intrinsic
def write(
    typing: Any, base: Any, vector: Any, bits: Any, low: Any, high: Any, out: Any,
    base_like: Any, vector_like: Any, out_like: Any, nan: Any,
) -> Any:  # fmt: skip
    """Write base + (high where a bit is set, else low) * vector, of 32 weights.

    Parameters
    ----------
    base, vector, out
        Addresses; `out` of a whole line.
    bits
        uint32.
    low, high
        float32.
    base_like, vector_like, out_like
        Arrays that have the dtypes: float32, or the bits of bfloat16; no vector: None.
    nan
        The bits of a NaN in bfloat16.
    """
    alone = isinstance(vector_like, types.NoneType)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where, step, mask, zero, one, to = arguments[:6]
        chosen = builder.select(
            builder.bitcast(mask, _BIT), _all(builder, one, _FLOAT), _all(builder, zero, _FLOAT)
        )
        if not alone:
            chosen = builder.fmul(chosen, _load(builder, step, vector_like))
        value = builder.fadd(_load(builder, where, base_like), chosen)
        if not isinstance(out_like.dtype, types.Float):
            value = _narrow(builder, value, arguments[9])
        stored = builder.store(value, builder.inttoptr(to, value.type.as_pointer()))
        stored.align = LINE
        stored.set_metadata(
            "nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        )
        return context.get_dummy_value()

    given = (base, vector, types.uint32, types.float32, types.float32, out)
    return types.void(*given, base_like, vector_like, out_like, types.uint16), generate


@intrinsic
def fetch(typing: Any, address: Any) -> Any:
    """Have a line of memory on its way into the nearest cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        call = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        # To be read, often, as data.
        how = [ir.Constant(number, value) for value in (0, 3, 1)]
        builder.call(call, [builder.inttoptr(arguments[0], pointer), *how])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def fence(typing: Any) -> Any:
    """Have what was written past the caches be there for other threads: nothing else sees to it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def draw(typing: Any, address: Any) -> Any:
    """The int64 at an address, which counts up by that: no two threads get the same."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(64)
        pointer = builder.inttoptr(arguments[0], number.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(number, 1), "monotonic")

    return types.int64(types.int64), generate


def _load(builder: Any, address: Any, like: Any) -> Any:
    """Weights as float32."""
    kind = _FLOAT if isinstance(like.dtype, types.Float) else _SHORT
    found = builder.load(builder.inttoptr(address, kind.as_pointer()))
    found.align = like.dtype.bitwidth // 8
    if kind is _FLOAT:
        return found
    return builder.bitcast(builder.shl(builder.zext(found, _WORD), _SHIFT), _FLOAT)


def _narrow(builder: Any, value: Any, nan: Any) -> Any:
    """Float32 rounded to bfloat16, to the nearest and to even, as `ops.weightloops` does it."""
    bits = builder.bitcast(value, _WORD)
    odd = builder.and_(builder.lshr(bits, _SHIFT), ir.Constant(_WORD, [1] * WIDTH))
    near = builder.add(builder.add(bits, ir.Constant(_WORD, [0x7FFF] * WIDTH)), odd)
    rounded = builder.trunc(builder.lshr(near, _SHIFT), _SHORT)
    number = builder.fcmp_ordered("ord", value, value)
    return builder.select(number, rounded, _all(builder, nan, _SHORT))


def _all(builder: Any, value: Any, kind: Any) -> Any:
    """A number in every place."""
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_WORD, [0] * WIDTH))
