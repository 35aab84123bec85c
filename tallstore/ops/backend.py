"""Who does the arithmetic: the CPU path, Triton, or the plain reference."""

from __future__ import annotations

from typing import Final, Literal

import torch

from tallstore import compiling
from tallstore.errors import DeviceError, MismatchError, OptionError

__all__ = ["Backend", "choose_backend"]

Backend = Literal["cpu", "compiled", "triton", "reference"]

_BACKENDS: Final = ("cpu", "compiled", "triton", "reference")
_ON_CPU: Final = ("cpu", "compiled")
#: What is left where the kernels are not: `ops` alone takes backend=.
_ELSE: Final = "use device='cpu' (of tallstore.ops: backend='reference')"


def choose_backend(device: torch.device, backend: str | None, *, compiles: bool = False) -> Backend:
    """What runs on tensors of a device, checked to be able to.

    Parameters
    ----------
    compiles
        Whether the caller has compiled loops for the CPU; else ``"cpu"`` stands for them.
    backend
        ``"cpu"`` (numpy, on CPU tensors), ``"compiled"`` (faster, on CPU tensors; needs numba),
        ``"triton"`` (on CUDA tensors; on CPU tensors only in Triton's interpreter,
        ``TRITON_INTERPRET=1``) or ``"reference"`` (plain torch, anywhere); None: ``"triton"`` on
        CUDA tensors; on CPU tensors ``"compiled"`` once it was used in this process, and ``"cpu"``
        before that, since it takes a while to start.

    Raises
    ------
    OptionError
        There is no such backend.
    DeviceError
        It cannot run there; nothing slower steps in by itself.
    """
    if backend is not None and backend not in _BACKENDS:
        raise OptionError(f"backend={backend!r}: it is one of {', '.join(_BACKENDS)}")
    if backend is None:
        on_cpu = _ON_CPU[compiles and compiling.loaded()]
        chosen = {"cpu": on_cpu, "cuda": "triton"}.get(device.type)
        if chosen is None:
            raise DeviceError(
                f"{device}: only CPU and CUDA tensors have fast paths; pass backend='reference', "
                "or move the tensors"
            )
        backend = chosen
    if backend in _ON_CPU and device.type != "cpu":
        raise DeviceError(f"backend={backend!r}: the tensors are on {device}; leave backend= away")
    if backend == "cpu":
        return "cpu"
    if backend == "compiled":
        if not compiling.load():
            raise DeviceError(
                "backend='compiled': numba cannot be imported; pip install 'tallstore[cpu]', or "
                "leave backend= away"
            )
        return "compiled" if compiles else "cpu"
    if backend == "reference":
        return "reference"
    _check_triton(device)
    return "triton"


def _check_triton(device: torch.device) -> None:
    try:
        from tallstore.kernels.common import INTERPRETED, start_driver
    except ImportError as exc:
        raise DeviceError(
            f"{device}: the kernels need Triton, which cannot be imported ({exc}); "
            f"pip install 'tallstore[gpu]', or {_ELSE}"
        ) from exc
    if device.type == "cpu" and not INTERPRETED:
        raise DeviceError(
            "backend='triton': the tensors are on the CPU, where Triton only runs in its "
            "interpreter (TRITON_INTERPRET=1); leave backend= away"
        )
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"backend='triton': the tensors are on {device}, not on a CUDA device")
    if INTERPRETED:
        return
    try:
        start_driver()
    except Exception as exc:  # whatever a compiler, or a driver that is not there, leads to
        raise DeviceError(
            f"{device}: Triton cannot start ({type(exc).__name__}: {exc}); it needs a GPU driver, "
            f"a C compiler and Python's headers (gcc, python3-dev), or {_ELSE}"
        ) from exc


def same_device(**tensors: torch.Tensor | None) -> torch.device:
    """The device of all tensors that are there.

    Raises
    ------
    MismatchError
        They are on several.
    """
    places = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(places.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in places.items())
        raise MismatchError(f"tensors on several devices: {listed}; move them to one")
    return next(iter(places.values()))
