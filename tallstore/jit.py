"""What loops that numba compiles are made with; imported only where numba is: see `compiling`."""

from __future__ import annotations

from typing import Any

from numba import carray, njit, types
from numba.extending import intrinsic

__all__ = ["array_at", "compiled"]


def compiled(function: Any) -> Any:
    """Compile a loop when it is first called, once a machine where there is a place to keep it."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither beside its file nor at home
        return njit(nogil=True)(function)


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@compiled
def array_at(address: Any, count: Any, like: Any) -> Any:
    """An array of memory that somebody holds on to, of the dtype of another."""
    return carray(_pointer(address), (count,), like.dtype)
