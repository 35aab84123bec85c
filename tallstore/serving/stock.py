"""What is kept in memory of an offer: as much as was asked for, within what the device has."""

from __future__ import annotations

import torch

from tallstore.devices import new_queue, on_device
from tallstore.errors import DeviceError, OptionError
from tallstore.serving.codes import Codes, Taken
from tallstore.serving.offer import Offer
from tallstore.serving.reading import TaskCode
from tallstore.serving.results import Residency
from tallstore.serving.writer import Writer
from tallstore.wording import size

__all__ = ["Stock", "free_bytes"]


class Stock:
    """Base, shared vector and codes of an offer, in memory.

    Parameters
    ----------
    offer
        What is served.
    device
        Where the model is.
    resident, budget
        See `TaskSwitcher`.
    writer
        Told when it must not hold on to the live task's code.
    older
        The stock of another generation, of which everything is taken over that is the same.

    Raises
    ------
    OptionError
        The budget is too small.
    DeviceError
        The device is too small.
    CorruptStoreError
        Something that is read is damaged.
    """

    def __init__(
        self,
        offer: Offer,
        device: torch.device,
        *,
        resident: Residency,
        budget: int | None,
        writer: Writer,
        older: Stock | None = None,
    ) -> None:
        self.offer = offer
        self.device = device
        self.resident = resident
        offer.locate(budget)
        self.need = offer.need()
        self._sizes = {task: plan.nbytes for task, plan in offer.plans.items()}
        limit = self._limit(budget)
        #: Tasks that are what they were in the older one.
        self.same = offer.inherit(older.offer) if older is not None else ()
        self._host: dict[str, TaskCode] = {}
        self.codes = Codes(
            self._load,
            source="host" if resident == "masks-on-host" else "store",
            budget=limit,
            forget=writer.forget,
        )
        if older is not None:
            self.codes.adopt(older.codes, self.same)
            self._host = {t: code for t, code in older._host.items() if t in self.same}
        self._check_room(limit)
        self._fill()

    def _limit(self, budget: int | None) -> int | None:
        need = self.need
        least = {"all": need.codes, "masks-on-host": need.largest, "stream": 0}[self.resident]
        if budget is not None and budget < least:
            raise OptionError(
                f"budget={budget}: resident={self.resident!r} takes {size(least)} of codes at the "
                f"least; give budget={least} or more, serve fewer tasks (tasks=), or keep them "
                f"elsewhere (resident=). Beside the model, {need}"
            )
        if budget is not None or self.resident == "all":
            return budget
        return 2 * (need.largest if self.resident == "masks-on-host" else need.staged)

    def _check_room(self, limit: int | None) -> None:
        need = self.need
        codes = need.codes if limit is None else min(limit, need.codes)
        if self.device.type == "cpu":
            codes = max(codes, need.on_host(self.resident))
        wanted = need.base + need.vector + need.under + codes
        wanted -= self.offer.resident.held() + self.codes.nbytes()
        free = free_bytes(self.device)
        if free is not None and wanted > free:
            raise DeviceError(
                f"{self.device}: too small for resident={self.resident!r}: {size(wanted)} are "
                f"needed beside the model, {size(free)} are free. For these "
                f"{len(self.offer.plans)} tasks, {need}; tasks= serves fewer, budget= keeps fewer "
                "codes"
            )

    def _fill(self) -> None:
        """Read what is to be in memory from the beginning."""
        self.offer.load_shared()
        if self.resident == "all":
            for task in self.offer.plans:
                self.take(task)
        elif self.resident == "masks-on-host":
            for task in self.offer.plans:
                if task not in self._host:
                    self._host[task] = self._read(task)

    def _read(self, task: str) -> TaskCode:
        return self.offer.reader.read(self.offer.plans[task])

    def _load(self, task: str) -> TaskCode:
        """A code on the device; there when this returns."""
        device = self.device
        code = self._host[task] if self.resident == "masks-on-host" else self._read(task)
        if device.type == "cpu":
            return code
        with on_device(device, f"loading the code of task {task!r}"), torch.cuda.device(device):
            queue = new_queue(device)
            with torch.cuda.stream(queue):
                there = code.to(lambda tensor: tensor.to(device, non_blocking=True))
            queue.synchronize()
        return there

    def take(self, task: str, *, ahead: bool = False) -> Taken:
        """A task's code, on the device; see `Codes.take`."""
        return self.codes.take(task, self._sizes[task], ahead=ahead)

    def too_large(self, task: str) -> bool:
        """Whether a task's code is kept nowhere: ``"stream"`` decodes it into the model."""
        return self.resident == "stream" and not self.codes.fits(self._sizes[task])

    def clear(self) -> None:
        """Let go of all codes."""
        self._host = {}
        self.codes.clear()


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where nobody knows."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as file:
            found = [line for line in file if line.startswith("MemAvailable:")]
        return int(found[0].split()[1]) * 1024
    except (OSError, IndexError, ValueError):
        return None
