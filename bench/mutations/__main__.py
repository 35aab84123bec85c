"""Damage stores in many ways; see what comes of each.

``python -m bench.mutations [--count 10000] [--seed 1] [--jobs 2] [--only SEED]``. Every mutation is
judged in a process of its own, with a limit on its address space and on its time. Three stores are
damaged: two zoos with a history, of masks and of all other codes (loaded task by task, verified,
then written to, compacted or repaired), and one of the engine's whose tree is three levels deep
(read chunk by chunk). No two runs make quite the same stores: what should not be is kept, for
``--only SEED --file FILE``. An interrupt (SIGINT) ends it with the rows of what was tried.

- *harmless*: everything loads bit for bit, and `verify` finds nothing that concerns a task;
- *refused*: something was refused, with an error that names what is damaged, or `verify` found it;
  the rest loads bit for bit;
- *silent*: other weights, tasks missing without a word, damage that `verify` does not find, or a
  write, or a repair, that loses what loaded before;
- *crashed*: a signal, an error that is no refusal, too much time or memory.

The last two must be 0. Writes a row for each kind of damage to bench/results/mutations.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from bench.interrupt import interruptible
from bench.mutations.damage import Mutation, Victim, mutate
from bench.mutations.judge import judge_deep, judge_zoo
from bench.mutations.regions import regions
from bench.mutations.stores import Wanted, make_codes, make_deep, make_zoo
from bench.rows import write

#: Memory that one judgement may add to the process it was forked from.
BUDGET_MB: Final = 256
#: Address space it may add; LMDB maps the file into it.
_SPACE: Final = 3 << 30
_SECONDS: Final = 120
_SEED: Final = 1


def _made(folder: Path) -> None:
    for seed in (_SEED, _SEED + 1):
        for name, make in (("zoo", make_zoo), ("codes", make_codes)):
            held = make(folder / f"{name}-{seed}.tall", seed)
            torch.save(asdict(held), folder / f"{name}-{seed}.wanted")
        make_deep(folder / f"deep-{seed}.tall", seed)
    (folder / "whole").mkdir()
    whole = shutil.copyfile(folder / f"codes-{_SEED}.tall", folder / "whole" / "zoo.tall")
    wanted = Wanted(**torch.load(folder / f"codes-{_SEED}.wanted"))
    for turn in range(3):
        verdict = judge_zoo(whole, wanted, _SEED, turn)
        if verdict.wrong or verdict.refused or verdict.found or verdict.writes_refused:
            raise SystemExit(f"judged a whole store to be damaged: {verdict}")
    names = [name for name in sys.modules if name.startswith("tallstore.")]
    (folder / "modules").write_text("\n".join(names))


def _in_child(do: Any) -> int:
    """Run in a fork; this process must have no threads."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            do()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def _victims(folder: Path) -> list[Victim]:
    status = _in_child(lambda: _made(folder))
    if status:
        raise SystemExit("the stores could not be made")
    # Else every judgement would import them anew.
    for name in (folder / "modules").read_text().splitlines():
        importlib.import_module(name)
    found = []
    for name in ("zoo", "codes", "deep"):
        one, two = (folder / f"{name}-{seed}.tall" for seed in (_SEED, _SEED + 1))
        held = one.with_suffix(".wanted")
        wanted = Wanted(**torch.load(held)) if held.exists() else None
        data = (one.read_bytes(), regions(one), two.read_bytes(), regions(two))
        found.append(Victim(name, *data, wanted))
    return found


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _judge(victim: Victim, mutation: Mutation, seed: int, folder: Path, answer: Path) -> None:
    # What a fork shares with its parent counts from the start.
    resident = _resident()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + _SPACE, used + _SPACE))
    path = folder / "zoo.tall"
    path.write_bytes(mutation.data)
    if victim.wanted is None:
        judged = judge_deep(path, _SEED)
    else:
        judged = judge_zoo(path, victim.wanted, _SEED, seed // 3)
    judged.skipped = mutation.data == victim.data
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer.write_text(json.dumps({**judged.to_json(), "grown_mb": (peak - resident) / 1e6}))


def _outcome(status: int, answer: Path) -> tuple[str, str, dict[str, Any]]:
    """(what it was, why, the child's answer)."""
    if os.WIFSIGNALED(status):
        return "crashed", signal.Signals(os.WTERMSIG(status)).name, {}
    if os.WEXITSTATUS(status):
        return "crashed", "an error that is no refusal", {}
    verdict = json.loads(answer.read_text())
    if verdict["grown_mb"] > BUDGET_MB:
        return "crashed", f"{verdict['grown_mb']:.0f} MB", verdict
    if verdict["wrong"]:
        return "silent", "; ".join(verdict["wrong"]), verdict
    if verdict["refused"] or verdict["found"]:
        return "refused", "", verdict
    return "harmless", "", verdict


def _start(victim: Victim, mutation: Mutation, seed: int, place: Path) -> int:
    """Fork a judgement; its process."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / "store").mkdir()
    pid = os.fork()
    if pid:
        return pid
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status = 1
    try:
        with (place / "errors").open("w") as errors:
            os.dup2(errors.fileno(), 2)
            _judge(victim, mutation, seed, place / "store", place / "answer")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


class _Watch:
    """Waits for judgements, and kills those that hang.

    Time is counted in ticks that are waited for: while this process is stopped, none pass.
    """

    def __init__(self) -> None:
        self._ticks: dict[int, int] = {}
        self._handles: dict[int, int] = {}

    def start(self, pid: int) -> None:
        self._ticks[pid] = 0
        self._handles[os.pidfd_open(pid)] = pid

    def wait(self) -> tuple[int, int]:
        """The next judgement that ends, and its status."""
        while not (ended := select.select(self._handles, (), (), 1.0)[0]):
            for pid in self._ticks:
                self._ticks[pid] += 1
                if self._ticks[pid] == _SECONDS:
                    os.kill(pid, signal.SIGALRM)
        os.close(ended[0])
        pid = self._handles.pop(ended[0])
        del self._ticks[pid]
        return os.waitpid(pid, 0)


@dataclass(frozen=True)
class _Running:
    victim: str
    mutation: Mutation
    seed: int
    place: Path


class _Tally:
    def __init__(self) -> None:
        self.by_kind: dict[str, Counter[str]] = defaultdict(Counter)
        self.bad: list[dict[str, Any]] = []
        self.peak = 0.0
        self.tried = 0

    def add(self, run: _Running, status: int) -> None:
        kind, how, place = run.mutation.kind, run.mutation.how, run.place
        outcome, why, verdict = _outcome(status, place / "answer")
        row = self.by_kind[kind]
        row["tried"] += 1
        self.tried += 1
        row[outcome] += 1
        row["unchanged"] += bool(verdict.get("skipped"))
        row["writes"] += verdict.get("writes", 0)
        row["writes refused"] += verdict.get("writes_refused", 0)
        self.peak = max(self.peak, verdict.get("grown_mb", 0.0))
        if outcome in ("silent", "crashed"):
            text = (place / "errors").read_text()[-3000:]
            name, seed = run.victim, run.seed
            self.bad.append({"seed": seed, "store": name, "kind": kind, "how": how, "why": why})
            kept = Path(tempfile.gettempdir()) / f"mutation-{seed}.tall"
            kept.write_bytes(run.mutation.data)
            what = f"{outcome}: seed {seed}, {name} ({kept}), {kind}: {how}: {why}"
            print(f"{what}\n{text}", flush=True)


def _run(
    seeds: list[int], victims: list[Victim], folder: Path, *, jobs: int, file: Path | None
) -> _Tally:
    tally = _Tally()
    running: dict[int, _Running] = {}
    watch = _Watch()
    free = [folder / f"job-{number}" for number in range(jobs)]
    todo = iter(seeds)
    stopped = interruptible()
    while True:
        while free and not stopped() and (seed := next(todo, None)) is not None:
            victim = victims[seed % 3]
            place = free.pop()
            mutation = mutate(victim, seed)
            if file is not None:
                mutation = replace(mutation, data=file.read_bytes())
            pid = _start(victim, mutation, seed, place)
            running[pid] = _Running(victim.name, mutation, seed, place)
            watch.start(pid)
        if not running:
            return tally
        pid, status = watch.wait()
        run = running.pop(pid)
        tally.add(run, status)
        if tally.tried % 1000 == 0:
            print(f"{tally.tried} tried", flush=True)
        free.append(run.place)


def main() -> int:
    """Damage, judge, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1, help="the first one")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", type=int, help="judge this one seed")
    parser.add_argument("--file", type=Path, help="the damaged store to judge, with --only")
    parser.add_argument("--results", type=Path, help="a directory to write the rows to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    folder = Path(tempfile.mkdtemp(prefix="mutations-", dir=shared))
    started = time.monotonic()
    try:
        victims = _victims(folder)
        seeds = (
            [args.only] if args.only is not None else list(range(args.seed, args.seed + args.count))
        )
        tally = _run(seeds, victims, folder, jobs=args.jobs, file=args.file)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
    columns = ("tried", "refused", "harmless", "silent", "crashed", "writes", "writes refused")
    print(f"{'':<24}" + "".join(f"{column:>16}" for column in columns))
    rows: list[dict[str, Any]] = []
    total: Counter[str] = Counter()
    for kind, counts in sorted(tally.by_kind.items()):
        total += counts
        rows.append({"kind": kind, **{column: counts[column] for column in columns}})
        rows[-1]["unchanged"] = counts["unchanged"]
        print(f"{kind:<24}" + "".join(f"{counts[column]:>16}" for column in columns))
    print(f"{'all':<24}" + "".join(f"{total[column]:>16}" for column in columns))
    rows.append({"kind": "all", **{column: total[column] for column in columns},
                 "unchanged": total["unchanged"], "bad": tally.bad,
                 "memory_mb_peak": round(tally.peak, 1), "budget_mb": BUDGET_MB,
                 "seconds": round(time.monotonic() - started)})  # fmt: skip
    if args.only is None:
        print(write("mutations", rows, results=args.results))
    return int(total["silent"] + total["crashed"] > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
