"""The ring's order on a device that is slow: nothing runs before it must, or runs at any time.

Queues here put work off, and do some of it whenever the host turns to them, as chance has it. What
the ring reads too early, writes too early or forgets to wait for shows as other bits.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from zoo import bits

import tallstore
from tallstore import ring as ringing
from tallstore.decoding import Decoder
from tallstore.errors import ChecksumError
from tallstore.loading import Loader, no_progress
from tallstore.ring import Ring
from tallstore.store import TallStore

CPU = torch.device("cpu")
COPY = torch.Tensor.copy_


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.queue: Queue | None = None
        self.done = True

    def record(self, queue: Queue) -> None:
        self.queue, self.done = queue, False
        queue.add(self._finish)

    def _finish(self) -> None:
        self.done = True

    def synchronize(self) -> None:
        with self.device.lock:
            while not self.done:
                assert self.queue is not None
                self.queue.step()


class Queue:
    """Work in order, put off."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.work: deque[Callable[[], object] | Event] = deque()

    def add(self, item: Callable[[], object] | Event) -> None:
        with self.device.lock:
            self.work.append(item)
            self.device.go_on()

    def wait_event(self, event: Event) -> None:
        self.add(event)

    def wait_stream(self, other: Queue) -> None:
        event = Event(self.device)
        event.record(other)
        self.add(event)

    def step(self) -> None:
        """Do one thing; what it waits for comes first."""
        item = self.work[0]
        if isinstance(item, Event):
            item.synchronize()
        else:
            before, self.device.working = self.device.working, True
            item()
            self.device.working = before
        self.work.popleft()

    def able(self) -> bool:
        return bool(self.work) and not (isinstance(self.work[0], Event) and not self.work[0].done)


class Device:
    """What the ring takes for `torch.cuda`."""

    def __init__(self, seed: int, eager: float) -> None:
        self.lock = threading.RLock()
        self.random = random.Random(seed)
        self.eager = eager
        self.working = False
        self.default = Queue(self)
        self.queues = [self.default]
        self.now = self.default

    def queue(self) -> Queue:
        self.queues.append(Queue(self))
        return self.queues[-1]

    def go_on(self) -> None:
        while self.random.random() < self.eager:
            able = [queue for queue in self.queues if queue.able()]
            if not able:
                return
            self.random.choice(able).step()

    def current_stream(self) -> Queue:
        return self.now

    @contextmanager
    def stream(self, queue: Queue) -> Iterator[None]:
        before, self.now = self.now, queue
        try:
            yield
        finally:
            self.now = before

    def Event(self) -> Event:
        return Event(self)

    def later(self, work: Callable[..., object]) -> Callable[..., None]:
        def put_off(*args: Any, **options: Any) -> None:
            self.now.add(lambda: work(*args, **options))

        return put_off


class Copies(TorchFunctionMode):
    """Copies of this thread go to the current queue."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with self.device.lock:
            if function is not COPY or self.device.working:
                return function(*args, **(kwargs or {}))
            target, source = args
            self.device.now.add(lambda: COPY(target, source))
            return target


@pytest.fixture(params=[(0, 0.0), (1, 0.3), (2, 0.7), (3, 0.9)], ids=str)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device(*request.param)
    monkeypatch.setattr(ringing, "ring_queues", lambda _: (made.queue(), made.queue()))
    monkeypatch.setattr(torch, "get_device_module", lambda _: made)
    for name in ("reconstruct", "add_residual"):
        monkeypatch.setattr(ringing, name, made.later(getattr(ringing, name)))
    return made


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loader]:
    """Over a hundred spans, most with several tensors, of all kinds of runs."""
    monkeypatch.setattr("tallstore.layout.SPAN", 4096)
    generator = torch.Generator().manual_seed(0)
    sizes = [40 * 4096 + 7, 900, 1, 2000, 20 * 4096, 5, 3000, 30 * 4096 + 4095, 0, 8]
    base = {f"w{i}": torch.randn(n, generator=generator) for i, n in enumerate(sizes)}
    base["steps"] = torch.arange(10_000)
    tuned = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
    tuned["steps"] = base["steps"] + 1
    tuned["head"] = torch.randn(9000, generator=generator)
    path = tmp_path / "z.tall"
    tallstore.pack(path, base, {"t": tuned}, exact=True)
    with TallStore(path) as store:
        yield store._loader("t")


def plain(loader: Loader) -> list[bytes]:
    memory = [np.empty(s.nbytes, np.uint8) for s in loader.contents.segments]
    loader.stream(range(len(memory)), targets=dict(enumerate(memory)))
    return [held.tobytes() for held in memory]


def differing(loader: Loader, found: list[bytes]) -> list[int]:
    """Segments; the bytes themselves would take minutes to show."""
    return [n for n, raw in enumerate(plain(loader)) if found[n] != raw]


def test_targets_are_filled_in_order(device: Device, loader: Loader) -> None:
    targets = {
        n: torch.zeros(s.nbytes, dtype=torch.uint8) for n, s in enumerate(loader.contents.segments)
    }
    for target in targets.values():
        # What the caller queued before must not run after the load.
        device.default.add(lambda target=target: target.fill_(0xAA))
    ring = Ring(loader.decoder, CPU, backend="cpu", threads=2)
    with Copies(device):
        ring.run(list(targets), targets=targets, progress=no_progress)
    assert not differing(loader, [bits(t) for t in targets.values()])


def test_casts_are_made_in_order(device: Device, loader: Loader) -> None:
    wanted = {
        n: torch.frombuffer(bytearray(raw), dtype=torch.float32).double()
        for n, raw in enumerate(plain(loader))
        if loader.contents.segments[n].dtype == "float32" and raw
    }
    targets = {n: torch.zeros_like(t) for n, t in wanted.items()}
    ring = Ring(loader.decoder, CPU, backend="cpu", threads=2)
    with Copies(device):
        ring.run(list(targets), targets=targets, progress=no_progress)
    assert not [n for n, t in targets.items() if bits(t) != bits(wanted[n])]


def test_pieces_come_back_in_order(device: Device, loader: Loader) -> None:
    segments = loader.contents.segments
    found = [np.full(s.nbytes, 0xAA, np.uint8) for s in segments]

    def put(segment: int, start: int, data: np.ndarray) -> None:
        first = start * (segments[segment].nbytes // segments[segment].numel)
        found[segment][first : first + data.size] = data

    ring = Ring(loader.decoder, CPU, backend="cpu", threads=2)
    with Copies(device):
        ring.run(range(len(segments)), targets={}, put=put, progress=no_progress)
    assert not differing(loader, [held.tobytes() for held in found])


@pytest.mark.parametrize("where", ["reading", "putting"])
def test_a_failure_leaves_nothing_on_its_way(
    device: Device, loader: Loader, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    count = 0
    load = Decoder.load

    def read(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 20:
            raise ChecksumError("damaged")
        return load(*args, **options)

    def put(segment: int, start: int, data: np.ndarray) -> None:
        nonlocal count
        count += 1
        if count == 20:
            raise KeyboardInterrupt

    if where == "reading":
        monkeypatch.setattr(Decoder, "load", read)
    before = threading.active_count()
    ring = Ring(loader.decoder, CPU, backend="cpu", threads=2)
    wanted = ChecksumError if where == "reading" else KeyboardInterrupt
    with pytest.raises(wanted), Copies(device):
        segments = range(len(loader.contents.segments))
        sink = put if where == "putting" else lambda *piece: None
        ring.run(segments, targets={}, put=sink, progress=no_progress)
    assert not any(queue.work for queue in device.queues)
    assert threading.active_count() == before
