"""The power goes: writes that were not synced are lost, torn or reordered.

``python -m bench.power --count 5000 --seed 0``. Each writing operation runs once with every write,
truncation, sync and rename recorded (``bench/faults/shim.c``). Then disks are made as they may look
after a power cut at any moment of it: all that was synced is there; of the rest any 512-byte
sectors of writes, any change of size, and any changes of names, each or not. A sector is whole or
not written, as disks promise, and LMDB relies on. On each such disk the store must open, verify,
and hold what it held before or all of the new; the latter for sure once the operation had returned.
SIGINT ends it early.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.faults.driver import Driver
from bench.faults.operations import OPERATIONS
from bench.faults.shim import Event, read_log
from bench.faults.template import prepare
from bench.interrupt import interruptible
from bench.rows import write

__all__ = ["Recording", "cut_power", "record"]

_SECTOR: Final = 512
#: How much of what was not synced survives: the share of sectors, sizes and names.
_SHARES: Final = (0.0, 0.1, 0.5, 0.9, 1.0)

#: A change of one file: (offset, bytes), or (new size, None).
_Change = tuple[int, bytes | None]
#: A change of names: a path and the file that it now names, or None.
_Naming = list[tuple[str, int | None]]


class Recording:
    """What one operation did, and the directory that it started from."""

    def __init__(self, place: Path, events: Sequence[Event]) -> None:
        self.place = place
        self.events = list(events)
        self.files: dict[int, bytes] = {}
        self.names: dict[str, int] = {}
        self.directories: set[str] = set()
        for path in place.rglob("*"):
            if path.is_dir():
                self.directories.add(str(path))
            else:
                number = len(self.files)
                self.files[number] = path.read_bytes()
                self.names[str(path)] = number


def record(driver: Driver, name: str) -> Recording:
    """Run an operation and record it."""
    prepare(driver.template, driver.place, name)
    recording = Recording(Path(os.path.realpath(driver.place)), ())
    driver.run(name, arm={"log": str(driver.log)})
    recording.events = list(read_log(driver.log))
    return recording


class _Disk:
    """The state of a disk in the middle of a recording: what is durable, and what is pending."""

    def __init__(self, recording: Recording) -> None:
        self.durable = {number: bytearray(data) for number, data in recording.files.items()}
        self.pending: dict[int, list[_Change]] = defaultdict(list)
        self.names = dict(recording.names)
        #: By directory: the changes of names that were not synced.
        self.namings: list[tuple[set[str], _Naming]] = []
        self.live = dict(recording.names)
        self.directories = set(recording.directories)
        self.finished = False

    def play(self, event: Event) -> None:
        """One recorded call."""
        if event.kind == "m":
            self.finished = True
        elif event.kind == "d":
            # A directory's own durability is its parent's sync; what is in it is judged by name.
            self.directories.add(event.path)
        elif event.kind == "o":
            number = len(self.durable)
            self.durable[number] = bytearray()
            self._name([(event.path, number)])
        elif event.kind == "u":
            if event.path in self.live:
                self._name([(event.path, None)])
        elif event.kind == "r":
            self._rename(event.path, event.second)
        elif event.kind == "s":
            self._sync(event.path)
        else:
            self._write(event)

    def _name(self, naming: _Naming) -> None:
        for path, number in naming:
            if number is None:
                self.live.pop(path, None)
            else:
                self.live[path] = number
        self.namings.append(({os.path.dirname(path) for path, _ in naming}, naming))

    def _rename(self, old: str, new: str) -> None:
        if old in self.directories:
            self.directories.add(new)
            inside = [path for path in self.live if path.startswith(old + "/")]
            self.directories |= {
                new + path[len(old) :] for path in self.directories if path.startswith(old + "/")
            }
            moved: _Naming = [(new + path[len(old) :], self.live[path]) for path in inside]
            naming = [*((path, None) for path in inside), *moved]
            self._name(naming)
            # One entry of one directory.
            self.namings[-1] = ({os.path.dirname(old), os.path.dirname(new)}, naming)
            return
        self._name([(old, None), (new, self.live[old])])

    def _sync(self, path: str) -> None:
        if path in self.live:
            number = self.live[path]
            for change in self.pending.pop(number, []):
                _apply(self.durable[number], change)
            return
        kept = []
        for where, naming in self.namings:
            if path in where:
                _rename_in(self.names, naming)
            else:
                kept.append((where, naming))
        self.namings = kept

    def _write(self, event: Event) -> None:
        number = self.live.get(event.path)
        if number is None:  # a lock file that was removed already
            return
        change: _Change = (event.offset, event.data if event.kind == "w" else None)
        if event.durable:
            _apply(self.durable[number], change)
        else:
            self.pending[number].append(change)

    def cut(self, draw: random.Random, share: float) -> dict[str, bytes]:
        """The files by name after a power cut now."""
        names = dict(self.names)
        for _, naming in self.namings:
            if draw.random() < share:
                _rename_in(names, naming)
        found = {}
        for path, number in names.items():
            data = bytearray(self.durable[number])
            for change in self.pending.get(number, ()):
                for part in _sectors(change):
                    if draw.random() < share:
                        _apply(data, part)
            found[path] = bytes(data)
        return found


def _rename_in(names: dict[str, int], naming: _Naming) -> None:
    for path, number in naming:
        if number is None:
            names.pop(path, None)
        else:
            names[path] = number


def _sectors(change: _Change) -> list[_Change]:
    """A write as writes of whole sectors, each of which may be lost."""
    offset, data = change
    if data is None:
        return [change]
    parts: list[_Change] = []
    at = 0
    while at < len(data):
        size = min(_SECTOR - (offset + at) % _SECTOR, len(data) - at)
        parts.append((offset + at, data[at : at + size]))
        at += size
    return parts


def _apply(file: bytearray, change: _Change) -> None:
    offset, data = change
    if data is None:
        del file[offset:]
        file.extend(bytes(offset - len(file)))
    else:
        file.extend(bytes(max(0, offset - len(file))))
        file[offset : offset + len(data)] = data


def cut_power(
    recording: Recording, moment: int, draw: random.Random, place: Path
) -> tuple[bool, float]:
    """Put at `place` what a power cut after `moment` calls may leave.

    Returns
    -------
    tuple
        Whether the operation had returned by then, and the share of what was pending that was
        kept.
    """
    disk = _Disk(recording)
    for event in recording.events[:moment]:
        disk.play(event)
    share = draw.choice(_SHARES)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    root = str(recording.place)
    for directory in sorted(recording.directories):
        (place / os.path.relpath(directory, root)).mkdir(exist_ok=True)
    for path, data in disk.cut(draw, share).items():
        target = place / os.path.relpath(path, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A lock file was written through its map: nobody knows what is left of it.
        target.write_bytes(draw.randbytes(len(data)) if path.endswith("-lock") else data)
    return disk.finished, share


def measure(driver: Driver, *, count: int, seed: int) -> list[dict[str, Any]]:
    """Cut the power `count` times, spread over all operations and all of their moments."""
    draw = random.Random(seed)
    recordings = {name: record(driver, name) for name in OPERATIONS}
    moments = [
        (name, moment)
        for name, recording in recordings.items()
        for moment in range(len(recording.events) + 1)
    ]
    started = time.perf_counter()
    cuts: Counter[str] = Counter()
    new: Counter[str] = Counter()
    failures: list[str] = []
    stopped = interruptible()
    for number in range(count):
        if stopped():
            break
        if number % len(moments) == 0:
            draw.shuffle(moments)
        name, moment = moments[number % len(moments)]
        finished, share = cut_power(recordings[name], moment, draw, driver.place)
        cuts[name] += 1
        try:
            new[name] += driver.check(name, finished=finished)
        except AssertionError as exc:
            failures.append(f"{name}, after call {moment}, {share:.0%} kept: {exc}")
            print(failures[-1], flush=True)
        if (number + 1) % 500 == 0:
            print(f"{number + 1} cuts", flush=True)
    row = {
        "what": "all operations",
        "seed": seed,
        "cuts": cuts.total(),
        "moments": len(moments),
        "new_was_there": new.total(),
        "failures": failures,
        "seconds": time.perf_counter() - started,
    }
    print(f"{row['cuts']} cuts, {len(failures)} failures, {row['seconds']:.0f} s")
    return [row] + [
        {
            "what": name,
            "calls": len(recordings[name].events),
            "cuts": cuts[name],
            "new_was_there": new[name],
        }
        for name in OPERATIONS
    ]


def main() -> None:
    """Cut, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="where to make the stores")
    args = parser.parse_args()
    with Driver(args.dir) as driver:
        rows = measure(driver, count=args.count, seed=args.seed)
    print(write("power", rows))


if __name__ == "__main__":
    main()
