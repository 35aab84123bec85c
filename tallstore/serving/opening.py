"""Opening the store that is served, and what a switcher may be asked for."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import torch

from tallstore import compiling
from tallstore.devices import wanted_device
from tallstore.errors import OptionError, StoreLockedError
from tallstore.serving.model import Model
from tallstore.serving.offer import Choice, Offer
from tallstore.serving.results import Residency
from tallstore.serving.stock import Stock
from tallstore.serving.writer import Writer
from tallstore.store import StorePath, TallStore
from tallstore.workers import Workers

__all__ = ["Opening", "check_options", "start"]

_RESIDENT: Final = ("all", "masks-on-host", "stream")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What is opened, and how much of it is to be in memory."""

    path: StorePath
    base_at: StorePath | None
    choice: Choice
    resident: Residency
    budget: int | None
    pool: Workers

    def open(
        self, stack: ExitStack, model: Model, writer: Writer, older: Stock | None = None
    ) -> Stock:
        """The store as it is now, in memory as far as was asked for.

        Parameters
        ----------
        stack
            Closes the store.
        older
            See `Stock`.
        """
        try:
            store = TallStore(self.path, external_base=self.base_at)
        except StoreLockedError:
            if older is None:
                raise
            # Another file is in its place: it cannot be opened while this one is.
            older.offer.store.close()
            store = TallStore(self.path, external_base=self.base_at)
        stack.callback(store.close)
        stock = Stock(
            Offer(store, model, self.choice, self.pool),
            model.device,
            resident=self.resident,
            budget=self.budget,
            writer=writer,
            older=older,
        )
        model.watch(stock.offer.places)
        return stock


def start(device: torch.device) -> None:
    """Get ready to write weights on a device.

    Raises
    ------
    OptionError, DeviceError
        It is none that weights can be written on, or is not there.
    """
    if wanted_device(device).type == "cpu":
        # They will be written often: starting the compiled loops, if they are there, pays.
        compiling.load()


def check_options(resident: str, budget: int | None, fidelity: str | None, private: str) -> None:
    """Refuse what makes no sense; see `TaskSwitcher`.

    Raises
    ------
    OptionError
    """
    if resident not in _RESIDENT:
        raise OptionError(f"resident={resident!r}: it is one of {', '.join(map(repr, _RESIDENT))}")
    if budget is not None and (not isinstance(budget, int) or budget < 0):
        raise OptionError(f"budget={budget!r}: bytes of codes on the device, 0 or more")
    if fidelity not in (None, "codes"):
        raise OptionError(f"fidelity={fidelity!r}: None or 'codes'")
    if private not in ("replace", "skip"):
        raise OptionError(f"private={private!r}: 'replace' or 'skip'")
