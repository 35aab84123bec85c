"""Fuzz the targets with atheris, one after another, each in processes of its own.

``python -m bench.fuzz --minutes 40 [--target NAME]... [--work DIR]``. Needs atheris, which is not
among the project's requirements. An input that ends in anything but a refusal is written to
``DIR/found/TARGET-*``; the run goes on. Ends with a table, and a row for each target in
bench/results/fuzz.json. Exit code 1 if anything was found.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from bench.rows import RESULTS, write

#: What no honest file says.
_NASTY = (
    *(0, 1, -1, 2**31, 2**32, 2**53, 2**60, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30),
    *(
        "",
        ".",
        "..",
        "../x",
        "/etc/x",
        "a\0b",
        "a\nb",
        "x" * 10_000,
        "$tensor",
        "\ud800",
        "float32",
    ),
    *(0.5, 1e308, True, False, None, [], {}, [[[[]]]], {"$tensor": 0}, {"": None}, "float32"),
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        here = todo.pop()
        items = here.items() if isinstance(here, dict) else enumerate(here)
        for key, inner in items:
            found.append((here, key))
            if isinstance(inner, (dict, list)):
                todo.append(inner)
    return found


def _mutated_json(data: bytes, draw: random.Random) -> bytes | None:
    """The input with some of its values replaced, repeated, swapped or dropped."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, (dict, list)):
        return None
    for _ in range(draw.randint(1, 4)):
        places = _places(value)
        if not places:
            break
        (here, key), (there, other) = draw.choice(places), draw.choice(places)
        action = draw.randrange(6)
        if action == 0:
            # A copy: a later change must not change what it was drawn from, nor tie it in a knot.
            here[key] = copy.deepcopy(draw.choice(_NASTY))
        elif action == 1:
            here[key] = json.loads(json.dumps(there[other]))
        elif action == 2 and type(here[key]) is int:
            here[key] += draw.choice((-1, 1, 8, 1024, 2**20, 2**59))
        elif action == 3:
            here.pop(key)
        elif action == 4 and isinstance(here, list):
            here.insert(key, json.loads(json.dumps(here[key])))
        else:
            here[key] = {draw.choice(("$tuple", "$dict", "$odict", "$set", "x")): here[key]}
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return None


def _fuzz(target: str, work: Path, seconds: int) -> None:
    """In a child: libFuzzer's loop; it leaves by itself."""
    import atheris
    import torch
    from torch import _weights_only_unpickler

    _weights_only_unpickler.Unpickler.load = atheris.instrument_func(
        _weights_only_unpickler.Unpickler.load
    )
    with atheris.instrument_imports(include=["tallstore"]):
        from bench.fuzz import targets
        from bench.fuzz.seeds import seeds

    torch.set_num_threads(1)
    corpus, found = work / "corpus" / target, work / "found"
    corpus.mkdir(parents=True, exist_ok=True)
    found.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()[target]):
        (corpus / f"seed-{number}").write_bytes(seed)
    taken = [0, 0]

    def one(data: bytes) -> None:
        try:
            taken[targets.play(target, data)] += 1
        except Exception as exc:
            last = traceback.extract_tb(exc.__traceback__)[-1]
            place = f"{type(exc).__name__}-{Path(last.filename).stem}-{last.lineno}"
            name = hashlib.sha256(place.encode()).hexdigest()[:8]
            path = found / f"{target}-{name}"
            if not path.exists():
                path.write_bytes(data)
                (found / f"{target}-{name}.txt").write_text(traceback.format_exc())

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if target in targets.JSON_TARGETS and draw.random() < 0.6:
            changed = _mutated_json(data, draw)
            if changed is not None and len(changed) <= max_size:
                return changed
        return bytes(atheris.Mutate(data, max_size))

    options = [f"-max_total_time={seconds}", "-rss_limit_mb=2048", "-timeout=20", "-max_len=65536"]
    # What instruments numpy keeps a few kB a run, which alone came to 2 GB: begin anew in time.
    options += ["-runs=250000"]
    options += [f"-artifact_prefix={found}/{target}-", "-print_final_stats=1", "-seed=7"]
    atheris.Setup([target, *options, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


def _run(target: str, work: Path, seconds: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.fuzz", "--child", target, "--work", str(work)]
    started = time.monotonic()
    executions = edges = starts = 0
    while (left := seconds - int(time.monotonic() - started)) > 2 and starts < 20:
        starts += 1
        done = subprocess.run(
            [*command, "--minutes", str(left / 60)],
            capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        (work / f"{target}.log").write_text(done.stderr[-200_000:])
        counted = re.findall(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
        counted = counted or re.findall(r"^#(\d+)", done.stderr, re.MULTILINE)
        executions += int(counted[-1]) if counted else 0
        edges = max([edges, *map(int, re.findall(r"cov: (\d+)", done.stderr))])
    found = [path.name for path in (work / "found").glob(f"{target}-*") if path.suffix != ".txt"]
    return {
        "target": target,
        "seconds": round(time.monotonic() - started),
        "executions": executions,
        "edges": edges,
        "corpus": len(list((work / "corpus" / target).iterdir())),
        "found": sorted(found),
    }


def main() -> int:
    """Run, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--target", action="append")
    parser.add_argument("--work", type=Path, default=Path("fuzz-work"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _fuzz(args.child, args.work, round(args.minutes * 60))
        return 0
    from bench.fuzz.targets import TARGETS

    names = args.target or list(TARGETS)
    args.work.mkdir(parents=True, exist_ok=True)
    print(f"{'target':<16}{'seconds':>8}{'inputs':>12}{'edges':>8}{'corpus':>8}  found")
    kept = RESULTS / "fuzz.json"
    others = json.loads(kept.read_text())["rows"] if args.target and kept.exists() else []
    rows = [row for row in others if row["target"] not in names]
    for name in names:
        row = _run(name, args.work.absolute(), round(args.minutes * 60 / len(names)))
        print(f"{name:<16}{row['seconds']:>8}{row['executions']:>12}{row['edges']:>8}"
              f"{row['corpus']:>8}  {' '.join(row['found']) or '-'}", flush=True)  # fmt: skip
        rows.append(row)
        place = write("fuzz", rows)  # after each: the run is long
    print(place)
    return int(any(row["found"] for row in rows if row["target"] in names))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
