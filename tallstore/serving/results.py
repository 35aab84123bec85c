"""What the switcher tells: what a switch did, and what each way of serving takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tallstore.wording import size

__all__ = ["Need", "Residency", "Source", "Switch"]

#: Where codes are kept.
Residency = Literal["all", "masks-on-host", "stream"]
#: Where a switch found the task's code.
Source = Literal["live", "device", "host", "store"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """What a switch did."""

    task: str
    previous: str | None
    """The task that was live; None if none was known to be."""
    source: Source
    """``"live"``: nothing was to be done; ``"device"``: the code was there; else it came from the
    host's memory or the store."""
    moved: int
    """Bytes of the device's memory that were read and written."""
    loaded: int
    """Bytes of the code that were brought to the device first."""
    ms: float
    """Milliseconds until the weights are there; waiting for one's turn does not count."""
    replaced: tuple[str, ...] = ()
    """Tensors that were put in for ones of another shape."""
    skipped: tuple[str, ...] = ()
    """Tensors that stayed as they were: ``private="skip"``."""

    @property
    def hit(self) -> bool:
        """Whether the code was on the device."""
        return self.source in ("live", "device")


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes that serving takes beside the model, by where codes are kept."""

    base: int
    vector: int
    """0 where no task uses the shared vector."""
    codes: int
    """Of all tasks."""
    largest: int
    """Of the task whose code is largest."""
    staged: int
    """Of the largest code that is not simply the task's weights."""
    under: int = 0
    """On the CPU, of the weights that the sparse codes of two tasks touch, the live one and the
    next: what lies under a code is kept, so that it need not be looked up in the base."""

    def on_device(self, resident: Residency) -> int:
        """Bytes on the device, with codes of two tasks where not all are kept there."""
        kept = {"all": self.codes, "masks-on-host": 2 * self.largest, "stream": 2 * self.staged}
        return self.base + self.vector + self.under + min(self.codes, kept[resident])

    def on_host(self, resident: Residency) -> int:
        """Bytes of the host's memory."""
        return self.codes if resident == "masks-on-host" else 0

    def __str__(self) -> str:
        host = size(self.on_host("masks-on-host"))
        return (
            f"resident='all' takes {size(self.on_device('all'))}, 'masks-on-host' "
            f"{size(self.on_device('masks-on-host'))} and {host} of the host's, 'stream' "
            f"{size(self.on_device('stream'))}"
        )
