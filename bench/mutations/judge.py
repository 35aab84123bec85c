"""What came of a mutation: everything equal or refused, never anything else.

Each judgement runs in a process of its own, which may die.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import tallstore
from bench.mutations.stores import CHUNKS, NEW, State, Wanted, deep_chunk, task
from tallstore.engine.environment import open_environment
from tallstore.engine.snapshot import Snapshot
from tallstore.errors import TallstoreError
from tallstore.repairing import repair_store

__all__ = ["Verdict", "judge_deep", "judge_zoo"]

#: What a refusal must name.
_NAMED: Final = re.compile(
    r"page \d+|meta page|run of pages|free pages|stream \d+|manifest|truncated|no LMDB magic|"
    r"not a tallstore|both meta pages|LMDB data version|format version|other byte order|"
    r"cut off after \d+ bytes|base is damaged: (\d+ of its tensors \('|its document)"
)


@dataclass
class Verdict:
    """What happened."""

    refused: list[str] = field(default_factory=list)
    """Messages of what could not be read."""
    found: list[str] = field(default_factory=list)
    """What `verify` found."""
    writes_refused: int = 0
    writes: int = 0
    wrong: list[str] = field(default_factory=list)
    """What must never be: other weights, tasks unknown, errors that name nothing."""
    skipped: bool = False
    """The mutation changed nothing."""

    def to_json(self) -> dict[str, Any]:
        """For the parent."""
        return asdict(self)


def _refusal(verdict: Verdict, exc: TallstoreError, list_to: list[str]) -> None:
    message = str(exc)
    list_to.append(f"{type(exc).__name__}: {message}")
    if not _NAMED.search(message):
        verdict.wrong.append(f"a refusal that names nothing: {type(exc).__name__}: {message}")


def _same(found: State, wanted: State) -> bool:
    return list(found) == list(wanted) and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and torch.equal(
            found[name].contiguous().view(-1).view(torch.uint8),
            tensor.contiguous().view(-1).view(torch.uint8),
        )
        for name, tensor in wanted.items()
    )


def _loads(
    path: Path, wanted: dict[str | None, State], verdict: Verdict, list_to: list[str]
) -> set[str | None]:
    """The names that load, bit for bit; what is refused goes to `list_to`."""
    good: set[str | None] = set()
    try:
        store = tallstore.open(path)
    except TallstoreError as exc:
        _refusal(verdict, exc, list_to)
        return good
    with store:
        if set(store.tasks) != {name for name in wanted if name is not None}:
            verdict.wrong.append(f"it shows the tasks {list(store.tasks)}")
        for name, state in wanted.items():
            try:
                found = store.load(name)
            except TallstoreError as exc:
                _refusal(verdict, exc, list_to)
                continue
            if _same(found, state):
                good.add(name)
            else:
                verdict.wrong.append(f"{name} came back with other weights")
    return good


def _verified(path: Path, good: set[str | None], names: set[str | None], verdict: Verdict) -> None:
    """`verify` must find what does not load, list just those tasks, and cry wolf over no other."""
    with tallstore.open(path) as store:
        found = store.verify()
    verdict.found += [problem.message for problem in found.problems]
    bad = names - good
    if bad and found.ok:
        verdict.wrong.append(f"verify found nothing, but {bad} do not load")
    if set(found.tasks) != {name for name in bad if name is not None}:
        verdict.wrong.append(f"verify lists {list(found.tasks)}, {bad} do not load")


def _write(
    do: Callable[[], object],
    path: Path,
    good: set[str | None],
    wanted: dict[str | None, State],
    verdict: Verdict,
) -> bool:
    """After a write, done or refused, all that loaded before loads; whether it was done."""
    verdict.writes += 1
    done = True
    try:
        do()
    except TallstoreError as exc:
        verdict.writes_refused += 1
        _refusal(verdict, exc, [])
        done = False
    expected = wanted if done else {n: s for n, s in wanted.items() if n != NEW}
    still = _loads(path, expected, verdict, [])
    lost = good - still
    if lost:
        verdict.wrong.append(f"a write lost {lost}")
    if done and NEW in wanted and NEW not in still:
        verdict.wrong.append("what was written does not load")
    return done


def judge_zoo(path: Path, held: Wanted, seed: int, turn: int) -> Verdict:
    """Judge a damaged store of tasks; `turn` says what is tried beside reading."""
    verdict = Verdict()
    wanted = held.now
    good = _loads(path, wanted, verdict, verdict.refused)
    try:
        _verified(path, good, set(wanted), verdict)
    except TallstoreError as exc:
        _refusal(verdict, exc, verdict.found)
        if good:
            verdict.wrong.append(f"verify failed, but {good} load")
    if turn % 3 == 0:
        fresh = task(seed, 77)
        before = dict(wanted)
        # In two steps: the second write goes where the first freed pages.
        _write(
            lambda: _add(path, fresh, held.code),
            path,
            good,
            before | {NEW: fresh},
            verdict,
        )
        if NEW in _names(path):
            _write(lambda: _remove(path, NEW), path, good, before, verdict)
    elif turn % 3 == 1:
        _write(lambda: tallstore.compact(path), path, good, wanted, verdict)
    else:
        _repaired(path, held, good, verdict)
    return verdict


def _add(path: Path, state: State, code: str | None) -> None:
    if code is None:
        tallstore.save(state, path, task=NEW)
    else:
        tallstore.add(path, {NEW: state}, code=code, exact=True)


def _names(path: Path) -> set[str]:
    try:
        with tallstore.open(path) as store:
            return set(store.tasks)
    except TallstoreError:
        return set()


def _remove(path: Path, name: str) -> None:
    with tallstore.open(path, "a") as store:
        store.remove(name)


def _repaired(path: Path, held: Wanted, good: set[str | None], verdict: Verdict) -> None:
    """A repaired store is whole, and holds at least what loaded; what is not called lossy is equal.

    From the manifest of an earlier commit, which it says, it holds what that commit held.
    """
    out = path.with_name("repaired.tall")
    verdict.writes += 1
    before = path.read_bytes()
    try:
        report = repair_store(path, out=out)
    except TallstoreError as exc:
        verdict.writes_refused += 1
        _refusal(verdict, exc, [])
        if None in good:
            verdict.wrong.append(f"repair gave up, but the base loads: {exc}")
        return
    if path.read_bytes() != before:
        verdict.wrong.append("repair changed the damaged file")
    with tallstore.open(out) as store:
        if not store.verify().ok:
            verdict.wrong.append("the repaired store is damaged")
        names = set(store.tasks)
        lost = {name for name in good if name is not None} - names
        if lost:
            verdict.wrong.append(f"repair lost {lost}")
        for name in names:
            found = store.load(name)
            wanted = [held.now[name]] if name in held.now else []
            if not report.in_force:
                wanted += held.earlier.get(name, [])
            if name in report.lossy:
                if not any(_close(found, state) for state in wanted):
                    verdict.wrong.append(f"repair gives {name} weights that are far off")
            elif not any(_same(found, state) for state in wanted):
                verdict.wrong.append(f"repair gives {name} other weights, and does not say so")


def _close(found: State, wanted: State) -> bool:
    return list(found) == list(wanted) and all(
        torch.allclose(found[n].float(), w.float(), atol=0.2) for n, w in wanted.items()
    )


def judge_deep(path: Path, seed: int) -> Verdict:
    """Judge a damaged store of `make_deep`, chunk by chunk."""
    verdict = Verdict()
    try:
        environment = open_environment(path)
        try:
            snapshot = Snapshot(environment)
        except BaseException:
            environment.close()
            raise
    except TallstoreError as exc:
        _refusal(verdict, exc, verdict.refused)
        return verdict
    if set(snapshot.manifest.streams) != set(range(1, CHUNKS + 1)):
        verdict.wrong.append("it shows other streams")
    for stream in snapshot.manifest.streams.values():
        out = np.empty(stream.raw, np.uint8)
        try:
            snapshot.read(stream, 0, out)
        except TallstoreError as exc:
            _refusal(verdict, exc, verdict.refused)
            continue
        if out.tobytes() != deep_chunk(seed, stream.number - 1):
            verdict.wrong.append(f"stream {stream.number} came back with other bytes")
    snapshot.close()
    return verdict
