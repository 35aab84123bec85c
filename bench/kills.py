"""kill -9 in every writing operation: what was stored stays, what was new is all there or not.

``python -m bench.kills --count 500 --seed 0``. A child process does one operation on a small zoo
and is killed in it: at every named step of a commit; at every system call that changes a file,
before it and, of a write, after half of it; and `--count` times at a random moment of its duration.
Each time the store must open, verify, hold all that it held bit for bit and all or nothing of the
new; nothing that `unpack` made may look whole and not be; and the next write, and the next unpack,
must work and leave no litter.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.faults.driver import Driver
from bench.faults.operations import OPERATIONS
from bench.faults.shim import CHANGES, HALF, KILL
from bench.interrupt import interruptible
from bench.rows import write

__all__ = ["Kills"]


class Kills:
    """Kills operations of one driver, and counts."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.kills: Counter[str] = Counter()
        self.new: Counter[str] = Counter()
        self.failures: list[str] = []
        self.whole: dict[str, dict[str, Any]] = {}

    def learn(self, name: str) -> dict[str, Any]:
        """Seconds, and calls, of an operation that nothing happens to."""
        if name not in self.whole:
            self.whole[name] = self._driver.undisturbed(name)
        return self.whole[name]

    def _once(self, name: str, what: str, **request: Any) -> bool:
        """Run, kill, check; returns whether it was killed before it ended."""
        outcome = self._driver.run(name, **request)
        killed = bool(outcome["exit"])
        try:
            is_new = self._driver.check(name, finished=not killed)
        except AssertionError as exc:
            self.failures.append(f"{name}, {what}: {exc}")
            print(self.failures[-1], flush=True)
            is_new = False
        self.kills[name] += killed
        self.new[name] += killed and is_new
        return killed

    def at_steps(self, name: str) -> None:
        """At each named step, and at its second coming where there is one."""
        for step in OPERATIONS[name].steps:
            for occurrence in (1, 2):
                request = {"step": step, "occurrence": occurrence}
                if not self._once(name, f"step {step} {occurrence}", **request):
                    if occurrence == 1:
                        self.failures.append(f"{name} never came to step {step!r}")
                    break

    def at_call(self, name: str, number: int, *, half: bool) -> None:
        """At a system call that changes a file; `half`: of a write, half of it is done."""
        action = KILL | (HALF if half else 0)
        arm = {"at": number, "kinds": "w" if half else CHANGES, "action": action}
        self._once(name, f"call {number}{' half' * half}", arm=arm)

    def at_calls(self, name: str) -> None:
        """At every such call."""
        for half in (False, True):
            number = 1
            while True:
                before = self.kills[name]
                self.at_call(name, number, half=half)
                if self.kills[name] == before:
                    break
                number += 1

    def at_random(self, name: str, draw: random.Random) -> bool:
        """At a random moment."""
        delay = draw.random() * self.learn(name)["seconds"]
        return self._once(name, f"after {delay:.4f} s", delay=delay)


def measure(kills: Kills, *, count: int, seed: int) -> list[dict[str, Any]]:
    """All kills; one row for all of them, and one for each operation."""
    names = list(OPERATIONS)
    counted: dict[str, int] = {}
    started = time.perf_counter()
    for name in names:
        kills.learn(name)
    for kind, run in (("steps", kills.at_steps), ("calls", kills.at_calls)):
        before = kills.kills.total()
        for name in names:
            run(name)
            print(f"{kind}: {name}: {kills.kills[name]} kills", flush=True)
        counted[kind] = kills.kills.total() - before
    draw = random.Random(seed)
    done = late = 0
    stopped = interruptible()
    while done < count and not stopped():
        killed = kills.at_random(names[(done + late) % len(names)], draw)
        done, late = done + killed, late + (not killed)
        if killed and done % 100 == 0:
            print(f"random: {done} kills", flush=True)
    row = {
        "what": "all operations",
        "seed": seed,
        "kills": kills.kills.total(),
        "at_named_steps": counted["steps"],
        "at_system_calls": counted["calls"],
        "at_random_moments": done,
        "ended_before_the_kill": late,
        "new_was_there": kills.new.total(),
        "failures": kills.failures,
        "seconds": time.perf_counter() - started,
    }
    print(f"{row['kills']} kills, {len(kills.failures)} failures, {row['seconds']:.0f} s")
    return [row] + [
        {"what": name, "kills": kills.kills[name], "new_was_there": kills.new[name]}
        for name in names
    ]


def main() -> None:
    """Kill, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="where to make the stores")
    args = parser.parse_args()
    with Driver(args.dir) as driver:
        rows = measure(Kills(driver), count=args.count, seed=args.seed)
    print(write("kills", rows))


if __name__ == "__main__":
    main()
