"""A stored task's weights, reconstructed on a device and brought back: the same bits."""

from __future__ import annotations

import numpy as np
import torch

from tallstore.codecs import Bytes
from tallstore.devices import Desk, on_device
from tallstore.dtypes import itemsize, torch_dtype
from tallstore.ops import add_residual, choose_backend, reconstruct

__all__ = ["DeviceWeights"]


class DeviceWeights:
    """Reconstructs spans on a device, each thread on a queue of its own.

    Raises
    ------
    DeviceError
        The backend cannot run there.
    """

    def __init__(self, device: torch.device, *, backend: str | None = None) -> None:
        self._device = device
        self._backend = choose_backend(device, backend)
        self._desk = Desk(device)

    def fill(
        self,
        out: Bytes,
        base: tuple[Bytes, str],
        codes: tuple[Bytes, int] | None,
        levels: tuple[torch.Tensor, torch.Tensor | None] | None,
        vector: tuple[Bytes, str] | None,
        residual: Bytes | None,
        dtype: str,
    ) -> None:
        """Fill `out` with the weights of a span as bytes of `dtype`.

        Parameters
        ----------
        base, vector
            Their bytes and dtypes.
        codes
            Packed planes, one after the other, and how many; None: the base alone.
        levels
            Of the codes: the table, and the row of each block.
        residual
            The exact tier's; None: leave it out.
        """
        desk = self._desk
        with on_device(self._device, "reconstructing a task"), desk.working():
            there = desk.upload("base", base[0], torch_dtype(base[1]))
            made = desk.room("made", there.numel() * itemsize(dtype)).view(torch_dtype(dtype))
            planes = step = rows = None
            table = torch.ones(1, 1, dtype=torch.float32, device="cpu")
            if codes is not None and levels is not None:
                planes = desk.upload("planes", codes[0], torch.uint8).view(codes[1], -1)
                table, rows = levels
                if vector is not None:
                    step = desk.upload("vector", vector[0], torch_dtype(vector[1]))
            if rows is not None:
                rows = rows.to(self._device)
            reconstruct(there, planes, step, table, made, rows=rows, backend=self._backend)
            if residual is not None:
                zigzag = desk.upload("residual", residual, torch.uint8)
                add_residual(made, zigzag, made, backend=self._backend)
            # Waits for the queue, so that what was uploaded from may be used again.
            np.copyto(out, made.view(torch.uint8).cpu().numpy())
