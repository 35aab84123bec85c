"""Devices: which one is meant, what its failures are called, and memory that is used again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from tallstore.errors import DeviceError, OptionError, TallstoreError

__all__ = ["Buffers", "Desk", "new_queue", "on_device", "ring_queues", "wanted_device"]

#: Since torch 2.8.
_Failure: Final = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)


def wanted_device(device: torch.device | str | None) -> torch.device:
    """The device that is meant, with its number; None stands for the CPU.

    Raises
    ------
    OptionError
        It is neither ``"cpu"`` nor ``"cuda"``, ``"cuda:1"``, ...
    DeviceError
        It is not there.
    """
    try:
        place = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as exc:
        raise OptionError(f"device={device!r}: {' '.join(str(exc).split())}") from exc
    if place.type not in ("cpu", "cuda"):
        raise OptionError(f"device={device!r}: tensors load to 'cpu' or 'cuda'")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device={device!r}: no CUDA device can be used here; load with device='cpu'"
        )
    if place.type == "cuda":
        count = torch.cuda.device_count()
        try:
            number = torch.cuda.current_device() if place.index is None else place.index
        except RuntimeError as exc:  # CUDA starts here: another process may hold the device
            raise DeviceError(f"device={device!r}: CUDA cannot start: {exc}") from exc
        if number >= count:
            raise DeviceError(f"device={device!r}: there are {count} CUDA devices, from 0 on")
        place = torch.device("cuda", number)
    return place


@cache
def ring_queues(device: torch.device) -> tuple[Any, Any]:
    """Two streams of the device's, always the same.

    torch keeps memory that was given back for the stream that it was taken on: with new streams
    every time it would keep that of many.
    """
    return new_queue(device), new_queue(device)


def new_queue(device: torch.device) -> Any:
    """A stream of the device's; of the CPU one that does nothing."""
    if device.type == "cuda":
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return torch.cpu.Stream()


@contextmanager
def on_device(device: torch.device, doing: str) -> Iterator[None]:
    """Turn a device's failures into errors that say what was being done.

    Raises
    ------
    DeviceError
    """
    try:
        yield
    except torch.OutOfMemoryError as exc:
        free, total = torch.cuda.mem_get_info(device)
        raise DeviceError(
            f"{device}: out of memory while {doing}; {free >> 20} of {total >> 20} MiB are free. "
            "Free some, load fewer tensors (names=), or load with device='cpu'"
        ) from exc
    except Exception as exc:
        if not _of_a_device(exc):
            raise
        raise DeviceError(f"{device}: failed while {doing}: {exc}") from exc


def _of_a_device(exc: Exception) -> bool:
    if isinstance(exc, TallstoreError):
        return False
    # Triton has classes of its own, but for what the driver says; so had torch before 2.8.
    said = isinstance(exc, RuntimeError) and ("CUDA" in str(exc) or "Triton" in str(exc))
    return said or isinstance(exc, _Failure) or type(exc).__module__.startswith("triton.")


class Buffers:
    """Memory by name, grown when more is asked for, used again and again."""

    def __init__(self, make: Callable[[int], torch.Tensor]) -> None:
        self._make = make
        self._held: dict[str, torch.Tensor] = {}

    def take(self, name: str, size: int) -> torch.Tensor:
        """`size` bytes of the buffer called `name`, content undefined."""
        held = self._held.get(name)
        if held is None or held.numel() < size:
            self._held.pop(name, None)
            held = self._held[name] = self._make(size)
        return held[:size]

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(held.numel() for held in self._held.values())


class Desk(threading.local):
    """What a thread that works on a device keeps: a queue, and memory that it uses again."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._host = Buffers(
            lambda n: torch.empty(n, dtype=torch.uint8, device="cpu", pin_memory=cuda)
        )
        self._room = Buffers(lambda n: torch.empty(n, dtype=torch.uint8, device=device))
        self._module = torch.get_device_module(device)
        self._queue = new_queue(device)

    def working(self) -> Any:
        """A context in which what is queued is this thread's."""
        return self._module.stream(self._queue)

    def room(self, name: str, size: int) -> torch.Tensor:
        """Bytes on the device, content undefined."""
        return self._room.take(name, size)

    def upload(self, name: str, data: npt.NDArray[np.uint8], dtype: torch.dtype) -> torch.Tensor:
        """Elements on their way to the device; not to be asked for again before they are there."""
        host = self._host.take(name, data.size)
        np.copyto(host.numpy(), data)
        return self.room(name, data.size).copy_(host, non_blocking=True).view(dtype)
