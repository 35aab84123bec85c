"""A full disk, and one that fails: at every call by which a writing operation changes a file.

``python -m bench.failures --seed 0``. For each operation and each such call (counted by
``bench/faults/shim.c``), the call fails: with ENOSPC, and all later ones that take room too, as on
a full disk, or after half of the write where it is one; or with EIO, once or from then on. The
operation must be refused with an error of the right kind, or succeed all the same (where the call
was only to tidy up); then the store must open, verify, and hold what it held before, or all of the
new. SIGINT ends it early.
"""

from __future__ import annotations

import argparse
import errno
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from bench.faults.driver import Driver
from bench.faults.operations import OPERATIONS
from bench.faults.shim import FAIL, HALF, STICKY
from bench.interrupt import interruptible
from bench.rows import write

__all__ = ["FAULTS", "Failures"]

#: By name: what goes wrong at the call, and the error that the operation is to be refused with.
FAULTS: Final[dict[str, tuple[dict[str, Any], tuple[str, ...]]]] = {
    "full disk": (
        {"error": errno.ENOSPC, "kinds": "wtoda", "action": FAIL | STICKY},
        ("StoreFullError",),
    ),
    "full disk, half a write": (
        # LMDB calls a write that came short an input/output error; here the disk has room.
        {"error": errno.ENOSPC, "kinds": "wta", "action": FAIL | STICKY | HALF},
        ("StoreFullError", "StoreIOError"),
    ),
    "quota": (
        {"error": errno.EDQUOT, "kinds": "wtoda", "action": FAIL | STICKY},
        ("StoreFullError",),
    ),
    "failing device": (
        {"error": errno.EIO, "kinds": "wtsoruda", "action": FAIL},
        ("StoreIOError",),
    ),
    "device gone": (
        {"error": errno.EIO, "kinds": "wtsoruda", "action": FAIL | STICKY},
        ("StoreIOError",),
    ),
    "failing reads": ({"error": errno.EIO, "kinds": "p", "action": FAIL}, ("StoreIOError",)),
    "read-only": (
        {"error": errno.EROFS, "kinds": "wtoruda", "action": FAIL | STICKY},
        ("StoreReadOnlyError",),
    ),
}


class Failures:
    """Has operations of one driver fail, and counts."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.faults: Counter[tuple[str, str]] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []

    def calls(self, name: str, fault: str) -> int:
        """How many calls of an operation a fault can strike."""
        kinds = FAULTS[fault][0]["kinds"]
        outcome = self._driver.run(name, arm={"kinds": kinds})
        return int(outcome["count"])

    def at(self, name: str, fault: str, number: int) -> None:
        """Have call `number` fail."""
        arm, wanted = FAULTS[fault]
        try:
            outcome = self._driver.run(name, arm={**arm, "at": number})
            self.faults[name, fault] += 1
            kind = outcome.get("refused")
            self.refused[name, fault] += kind is not None
            is_new = self._driver.check(name, finished=kind is None)
            if kind is not None and kind not in wanted:
                raise AssertionError(f"refused with {kind}: {outcome['message']}")
            if kind and str(self._driver.place) not in outcome["message"]:
                raise AssertionError(f"nothing is named in: {outcome['message']}")
            # After a sync that failed nobody knows.
            if kind and is_new and name != "compact" and "StoreIOError" not in wanted:
                raise AssertionError(f"done, and yet refused: {outcome['message']}")
        except AssertionError as exc:
            self.failures.append(f"{name}, {fault}, call {number}: {exc}")
            print(self.failures[-1], flush=True)


def measure(failures: Failures, *, seed: int, count: int | None) -> list[dict[str, Any]]:
    """Every call of every operation with every fault, or `count` of them at random."""
    started = time.perf_counter()
    cases = [
        (name, fault, number)
        for name in OPERATIONS
        for fault in FAULTS
        for number in range(1, failures.calls(name, fault) + 1)
    ]
    draw = random.Random(seed)
    draw.shuffle(cases)
    stopped = interruptible()
    for done, (name, fault, number) in enumerate(cases[:count], 1):
        if stopped():
            break
        failures.at(name, fault, number)
        if done % 500 == 0:
            print(f"{done} faults", flush=True)
    row = {
        "what": "all operations",
        "seed": seed,
        "cases": len(cases),
        "faults": failures.faults.total(),
        "refused": failures.refused.total(),
        "failures": failures.failures,
        "seconds": time.perf_counter() - started,
    }
    print(f"{row['faults']} faults, {len(failures.failures)} failures, {row['seconds']:.0f} s")
    return [row] + [
        {
            "what": fault,
            "faults": sum(n for (_, f), n in failures.faults.items() if f == fault),
            "refused": sum(n for (_, f), n in failures.refused.items() if f == fault),
        }
        for fault in FAULTS
    ]


def main() -> None:
    """Fail, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, help="how many; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="where to make the stores")
    args = parser.parse_args()
    with Driver(args.dir) as driver:
        rows = measure(Failures(driver), seed=args.seed, count=args.count)
    print(write("failures", rows))


if __name__ == "__main__":
    main()
