"""One writer and eight readers at once: every load is its task, bit for bit, and none waits.

``python -m bench.many --seconds 60``. Four processes and four threads of a fifth load tasks of one
store, now by a fresh handle, now by one held and refreshed, and compare a hash of every weight. A
third of the time nobody writes; a third, a writer replaces one task again and again and adds and
removes another; a third, a writer stands still in the middle of its commit, the locks held. The
longest loads of the three are set side by side: a reader that waited for a writer would show in the
last. At the end a reader is killed, and its slot must be free for the next.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import xxhash

import tallstore
from bench.rows import write
from tallstore.engine import session
from tallstore.engine.environment import open_environment

__all__ = ["measure", "synthetic"]

_ROOT: Final = Path(__file__).parent.parent
_READERS: Final = (1, 1, 1, 1, 4)  # threads, of each process
_TURNING: Final = "turning"
State = Mapping[str, torch.Tensor]


def _hash(state: State) -> str:
    found = xxhash.xxh3_128()
    for name, tensor in state.items():
        found.update(name.encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return str(found.hexdigest())


# -- what the children do -----------------------------------------------------------------


def _read(path: Path, wanted: dict[str, list[str]], until: threading.Event, seed: int) -> Any:
    """Load until told to stop; (begin, end) of every load, on the clock all processes share."""
    loads: list[tuple[float, float]] = []
    names = list(wanted)
    with tallstore.open(path) as held:
        number = seed
        while not until.is_set():
            name = names[number % len(names)]
            begin = time.monotonic()
            if number % 2:
                state = tallstore.load(path, task=name)
            else:
                held.refresh()
                state = held.load(name)
            loads.append((begin, time.monotonic()))
            if _hash(state) not in wanted[name]:
                raise AssertionError(f"{name} came back with other weights")
            number += 1
    return loads


def _reader(path: Path, wanted: dict[str, list[str]], threads: int) -> None:
    until = threading.Event()
    loads: list[Any] = [None] * threads

    def run(index: int) -> None:
        try:
            loads[index] = _read(path, wanted, until, seed=index + os.getpid())
        except BaseException as exc:
            loads[index] = f"{type(exc).__name__}: {exc}"

    running = [threading.Thread(target=run, args=(index,)) for index in range(threads)]
    for thread in running:
        thread.start()
    print("ready", flush=True)
    sys.stdin.read()
    until.set()
    for thread in running:
        thread.join()
    print(json.dumps(loads))


def _writer(path: Path, states: list[State], *, stop_at: str) -> None:
    """Write until told to stop; or stand still at a step of the first commit."""
    if stop_at:

        def step(self: session.WriteSession, name: str) -> None:
            if name == stop_at:
                print("still", flush=True)
                os.kill(os.getpid(), signal.SIGSTOP)

        session.WriteSession.step = step  # type: ignore[method-assign]
    until = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), until.set()), daemon=True).start()
    commits = 0
    while not until.is_set():
        tallstore.save(states[commits % 2], path, task=_TURNING, overwrite=True)
        commits += 1
        if stop_at:
            break
        if commits == 1:
            print("writing", flush=True)
        if commits % 3 == 0:
            with tallstore.open(path, "a") as store:
                store.add({"passing": states[0]})
                store.remove("passing")
            commits += 2
    print(json.dumps(commits))


# -- the parent ---------------------------------------------------------------------------


def _child(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench.many", *arguments],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def _end(child: subprocess.Popen[str]) -> Any:
    out, _ = child.communicate(timeout=120)
    if child.returncode:
        raise AssertionError(f"a child ended with {child.returncode}")
    return json.loads(out)


def synthetic(folder: Path, *, weights: int = 200_000) -> Path:
    """A small zoo: a base and four fine-tunes as a store with the exact tier."""
    draw = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(weights, generator=draw), "b": torch.randn(99, generator=draw)}
    tasks = {
        f"t{n}": {k: v + 0.01 * torch.randn(v.shape, generator=draw) for k, v in base.items()}
        for n in range(4)
    }
    tallstore.pack(folder / "many.tall", base, tasks, exact=True)
    return folder / "many.tall"


def _slots(path: Path) -> int:
    """Taken slots of LMDB's reader table, after the check that opening makes."""
    environment = open_environment(path)
    try:
        # A heading, and a line for each; or one line that there are none.
        lines = str(environment.lmdb.readers()).strip().splitlines()
        return sum(line.split()[0].isdigit() for line in lines)
    finally:
        environment.close()


def measure(path: Path, *, seconds: float, threads: tuple[int, ...] = _READERS) -> dict[str, Any]:
    """Read and write one store for `seconds`; raises AssertionError for any wrong weight."""
    with tallstore.open(path) as store:
        names = list(store.tasks)
        states = [store.load(name) for name in names[:2]]
        wanted = {name: [_hash(store.load(name))] for name in names}
    tallstore.save(states[0], path, task=_TURNING, overwrite=True)
    wanted[_TURNING] = [_hash(state) for state in states]
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "wanted.json"
        told.write_text(json.dumps(wanted))
        readers = [_child("--reader", str(path), str(told), str(n)) for n in threads]
        victim = _child("--reader", str(path), str(told), "1")
        children = [*readers, victim]
        phases: list[tuple[str, float, float]] = []
        try:
            for reader in (*readers, victim):
                assert _line(reader) == "ready"
            phases.append(_phase("alone", seconds / 3))
            writer = _child("--writer", str(path), *names[:2])
            children.append(writer)
            assert _line(writer) == "writing"
            phases.append(_phase("beside a writer", seconds / 3))
            commits = _end(writer)
            still = _child("--writer", str(path), *names[:2], "--stop-at", "manifest")
            children.append(still)
            assert _line(still) == "still"
            phases.append(_phase("beside a writer that stands still", seconds / 3))
            os.kill(still.pid, signal.SIGCONT)
            commits += _end(still)
            victim.kill()
            victim.wait()
            loads = [load for reader in readers for load in _checked(_end(reader))]
        finally:
            for child in children:
                child.kill()
                child.wait()
                for pipe in (child.stdin, child.stdout):
                    if pipe is not None:
                        pipe.close()
    left = _slots(path)
    if left:
        raise AssertionError(f"{left} slots of dead readers are still taken")
    row: dict[str, Any] = {
        "readers": sum(threads),
        "processes": len(threads),
        "seconds": seconds,
        "commits": commits,
        "loads": len(loads),
        "wrong": 0,
    }
    for name, begin, end in phases:
        taken = sorted(b - a for a, b in loads if begin <= a and b <= end)
        row[name] = {
            "loads": len(taken),
            "median_s": statistics.median(taken),
            "longest_s": taken[-1],
        }
    with tallstore.open(path, "a") as store:
        assert store.verify().ok
        store.remove(_TURNING)
    return row


def _phase(name: str, seconds: float) -> tuple[str, float, float]:
    begin = time.monotonic()
    time.sleep(seconds)
    return name, begin, time.monotonic()


def _checked(threads: list[Any]) -> list[Any]:
    for loads in threads:
        if isinstance(loads, str):
            raise AssertionError(loads)
    return [load for loads in threads for load in loads]


def main() -> None:
    """Measure, print, write the row; or be a child."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--zoo", type=Path, help="a folder of base/ and tasks; synthetic if absent")
    parser.add_argument("--dir", type=Path, help="where to make the store")
    parser.add_argument("--reader", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--writer", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--stop-at", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.reader:
        path, told, threads = args.reader
        _reader(Path(path), json.loads(Path(told).read_text()), int(threads))
        return
    if args.writer:
        path, *names = args.writer
        states = [tallstore.load(path, task=name) for name in names]
        _writer(Path(path), states, stop_at=args.stop_at)
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        if args.zoo is None:
            path = synthetic(Path(name))
        else:
            path = Path(name) / "many.tall"
            tasks = sorted(p for p in args.zoo.iterdir() if p.name != "base" and p.is_dir())
            tallstore.pack(path, args.zoo / "base", {p.name: p for p in tasks}, exact=True)
        row = measure(path, seconds=args.seconds)
    row = {"what": args.zoo.name if args.zoo else "synthetic", **row}
    print(json.dumps(row, indent=1))
    print(write("many", [row]))


if __name__ == "__main__":
    main()
