"""What verifying costs: loads with and without the checksums, and `verify` of whole stores.

``python -m bench.verification [--cache DIR] [--zoo DIR]``. There is no way to switch verification
off; here the comparison is taken out from under `tallstore.load`, which leaves everything else as
it is. Real fine-tunes of MiniLM, packed, and a plain 1 GB checkpoint; files are warm, and runs
by turns; ratios are of medians. Aims: loading at most 5 % slower, `verify` at least 1 GB/s on 2
cores.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import tallstore
from bench.rows import write
from bench.timing import by_turns
from bench.zoos.minilm import Zoo, zoo
from tallstore.engine import chunk

__all__ = ["unverified"]

_ENOUGH = 1.05
_FAST = 1e9


class _Anything:
    """A checksum that is never another one."""

    def __ne__(self, other: object) -> bool:
        return False


@contextmanager
def unverified() -> Iterator[None]:
    """Chunks are taken as they are: nothing is hashed, nothing compared."""
    kept = chunk._digest
    chunk._digest = lambda *arguments: _Anything()  # type: ignore[assignment,return-value]
    try:
        yield
    finally:
        chunk._digest = kept


def _check_switch(store: Path, task: str | None) -> None:
    """The switch works: a chunk under a false checksum is refused, and with it is not."""
    with tallstore.open(store) as opened:
        snapshot = opened._held()
        stream = snapshot.stream(opened.describe(task).base.streams[0])
        honest = chunk._digest
        chunk._digest = lambda *arguments: bytes(16)
        try:
            snapshot.read_chunk(stream, 0, None)
        except tallstore.errors.ChecksumError:
            pass
        else:
            raise SystemExit("a false checksum was not noticed")
        finally:
            chunk._digest = honest
        with unverified():
            snapshot.read_chunk(stream, 0, None)


def _without(run: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        with unverified():
            return run()

    return call


def load(what: str, store: Path, task: str | None, *, repeats: int, burst: int) -> dict[str, Any]:
    """A load with and without checksums."""
    _check_switch(store, task)

    def run() -> object:
        return tallstore.load(store, task=task)

    times = by_turns(
        {"verified": run, "unverified": _without(run)}, repeats=repeats, burst=burst, warmup=2
    )
    ratio = times["verified"]["median"] / times["unverified"]["median"]
    on, off = (times[name]["median"] * 1e3 for name in ("verified", "unverified"))
    fine = "" if ratio <= _ENOUGH else "   over 5 %"
    print(f"load {what:<34}{on:>9.1f} ms {off:>9.1f} ms   x{ratio:.3f}{fine}", flush=True)
    return {"what": f"load {what}", "ratio": ratio, "seconds": times}


def verify(what: str, store: Path, *, repeats: int) -> dict[str, Any]:
    """`verify` of a whole store, as fast as its bytes go by."""
    with tallstore.open(store) as opened:
        found = opened.verify()
        if not found.ok:
            raise SystemExit(f"{store}: {found.problems[0].message}")
        times = by_turns({"verify": opened.verify}, repeats=repeats, warmup=2)["verify"]
    speed = found.nbytes / times["median"]
    fine = "" if speed >= _FAST else "   under 1 GB/s"
    print(f"verify {what:<32}{times['median'] * 1e3:>9.1f} ms {speed / 1e9:>9.2f} GB/s{fine}",
          flush=True)  # fmt: skip
    return {
        "what": f"verify {what}",
        "bytes": found.nbytes,
        "chunks": found.chunks,
        "bytes_per_second": speed,
        "seconds": times,
    }


def main() -> None:
    """Measure, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--zoo", type=Path, help="a directory of trained tasks to take as it is")
    args = parser.parse_args()
    found = Zoo.at(args.zoo) if args.zoo else zoo(args.cache)
    rows = []
    print(f"{'':<39}{'verified':>12} {'without':>12}", flush=True)
    with tempfile.TemporaryDirectory(dir=args.cache) as name:
        directory = Path(name)
        task = next(iter(found.tasks))
        for exact in (False, True):
            store = directory / f"zoo-{exact}.tall"
            tallstore.pack(store, found.base, found.tasks, exact=exact)
            words = "with the exact tier" if exact else "of masks"
            rows.append(load(f"a MiniLM task {words}", store, task, repeats=15, burst=3))
            rows.append(verify(f"8 MiniLM tasks {words}", store, repeats=9))
            store.unlink()
        plain = directory / "plain.tall"
        tallstore.save({f"layer.{n}": torch.randn(1 << 22) for n in range(60)}, plain)
        rows.append(load("1 GB, plain", plain, None, repeats=9, burst=2))
        rows.append(verify("1 GB, plain", plain, repeats=9))
    print(write("verification", rows))


if __name__ == "__main__":
    main()
