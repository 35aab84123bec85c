"""kill -9 at every step of every write: what was stored stays, what was new is all there or not.

A child process does one write and is killed in it: at a named step of `WriteSession.step`, within
publishing, or at a random moment. Then the store must open, verify, hold what it held before bit
for bit, and either all or nothing of the new; and the next write leaves no litter.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same
from zoo import State, fine_tune, make_base

import tallstore
from tallstore.engine import newfile, session
from tallstore.errors import StoreNotFoundError

STEPS = ["chunks", "synced", "manifest", "committed", "reclaim"]
#: Moments that have no named step: just before a new file takes its place, and just after.
EDGES = ["publish", "published"]


def large(seed: int) -> State:
    """Weights enough for several chunks and pages of every kind."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(40_000, generator=draw),
        "b": torch.randn(30, 70, generator=draw).bfloat16(),
        "c": torch.arange(seed, seed + 50),
    }


BASE = make_base()
OLD = {f"t{i}": fine_tune(BASE, i) for i in range(3)}


# -- writes, run in a child ---------------------------------------------------------------


def save_new(path: Path) -> None:
    tallstore.save(large(1), path)


def save_over(path: Path) -> None:
    tallstore.save(large(1), path, overwrite=True)


def save_over_in_use(path: Path) -> None:
    with tallstore.open(path):
        tallstore.save(large(1), path, overwrite=True)


def save_task(path: Path) -> None:
    tallstore.save(large(1), path, task="new")


def save_task_over(path: Path) -> None:
    tallstore.save(fine_tune(BASE, 77), path, task="t1", overwrite=True)


def pack_new(path: Path) -> None:
    tallstore.pack(path, BASE, {"x": fine_tune(BASE, 8), "y": fine_tune(BASE, 9)}, exact=True)


def pack_over(path: Path) -> None:
    tallstore.pack(
        path,
        BASE,
        {"x": fine_tune(BASE, 8), "y": fine_tune(BASE, 9)},
        exact=True,
        overwrite=True,
    )


def remove(path: Path) -> None:
    with tallstore.open(path, "a") as store:
        store.remove("t0", "t2")


def compact(path: Path) -> None:
    tallstore.compact(path)


Content = dict[str | None, Any]
BEFORE: Content = {None: BASE, **OLD}
PACKED: Content = {None: BASE, "x": fine_tune(BASE, 8), "y": fine_tune(BASE, 9)}

#: Each write with what the store holds before and after it.
WRITES: dict[str, tuple[Callable[[Path], None], Content | None, Content]] = {
    "save new": (save_new, None, {None: large(1)}),
    "save over": (save_over, BEFORE, {None: large(1)}),
    "save over in use": (save_over_in_use, BEFORE, {None: large(1)}),
    "save task": (save_task, BEFORE, {**BEFORE, "new": large(1)}),
    "save task over": (save_task_over, BEFORE, {**BEFORE, "t1": fine_tune(BASE, 77)}),
    "pack new": (pack_new, None, PACKED),
    "pack over": (pack_over, BEFORE, PACKED),
    "rm": (remove, BEFORE, {None: BASE, "t1": OLD["t1"]}),
    "compact": (compact, BEFORE, BEFORE),
}


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # never: but no other thread gets further while the signal is delivered


def _arm(moment: str, occurrence: int) -> None:
    """Have this process killed when `moment` comes for the `occurrence`-th time."""
    left = [occurrence]

    def reached(name: str) -> None:
        if name == moment:
            left[0] -= 1
            if not left[0]:
                _die()

    session.WriteSession.step = lambda self, name: reached(name)  # type: ignore[method-assign]
    publish = newfile.NewFile.publish

    def wrapped(self: newfile.NewFile, *, timeout: float) -> None:
        reached("publish")
        publish(self, timeout=timeout)
        reached("published")

    newfile.NewFile.publish = wrapped  # type: ignore[method-assign]


def child(write: str, path: str, moment: str | None, occurrence: int, ready: Any) -> None:
    """What the child does: one write, to be killed in, or to be killed from outside."""
    torch.set_num_threads(1)
    if moment is not None:
        _arm(moment, occurrence)
    ready.set()
    WRITES[write][0](Path(path))


# -- the parent ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    context = multiprocessing.get_context("forkserver")
    # Children start in milliseconds, from a process that has imported all this and no threads.
    context.set_forkserver_preload(["test_crash", "tallstore.writing", "tallstore.packing.pack"])
    yield context


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the base and three tasks, with space that a removed one left."""
    path = tmp_path_factory.mktemp("template") / "zoo.tall"
    tallstore.pack(path, BASE, {**OLD, "gone": fine_tune(BASE, 50)}, exact=True)
    tallstore.save(large(9), path, task="gone too")
    with tallstore.open(path, "a") as store:
        store.remove("gone", "gone too")
    return path


def content(path: Path) -> Content | None:
    """Everything in the store, verified; None where there is none."""
    try:
        with tallstore.open(path) as store:
            result = store.verify()
            assert result.ok, result.problems
            return {name: store.load(name) for name in (None, *store.tasks)}
    except StoreNotFoundError:
        return None


def same(found: Content | None, wanted: Content | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    if list(found) != list(wanted):
        return False
    try:
        for name in found:
            assert_same(found[name], wanted[name])
    except AssertionError:
        return False
    return True


def run_killed(
    processes: ForkServerContext,
    write: str,
    path: Path,
    *,
    moment: str | None = None,
    occurrence: int = 1,
    delay: float = 0.0,
    durations: dict[str, float] | None = None,
) -> bool:
    """Run a write that is killed; returns whether it was, or had ended before."""
    ready = processes.Event()
    process = processes.Process(target=child, args=(write, str(path), moment, occurrence, ready))
    process.start()
    assert ready.wait(60)
    started = time.perf_counter()
    if moment is None:
        time.sleep(delay)
        process.kill()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL), f"{write}: exit {process.exitcode}"
    if durations is not None:
        durations[write] = time.perf_counter() - started
    return process.exitcode != 0


def check_after(path: Path, write: str) -> bool:
    """Check a store after a crash, and after the next write; returns whether the new is there."""
    _, before, after = WRITES[write]
    found = content(path)
    is_new, is_old = same(found, after), same(found, before)
    if found is None and before is not None:
        raise AssertionError(f"{write}: the store is gone")
    assert is_new or is_old, f"{write}: holds {None if found is None else list(found)}"
    # The next write takes over, and leaves no litter.
    if found is None:
        tallstore.save(BASE, path)
        found = {None: BASE}
    tallstore.save(fine_tune(BASE, 99), path, task="after")
    assert same(content(path), {**found, "after": fine_tune(BASE, 99)})
    with tallstore.open(path) as store:
        assert store.verify().stray == 0
    tallstore.compact(path)
    assert same(content(path), {**found, "after": fine_tune(BASE, 99)})
    assert os.listdir(path.parent) == [path.name], "litter"
    return is_new


def prepare(template: Path, tmp_path: Path, write: str) -> Path:
    place = tmp_path / "place"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    path = place / "zoo.tall"
    if WRITES[write][1] is not None:
        shutil.copyfile(template, path)
    return path


#: (write, moment, occurrence, whether the new is there afterwards).
KILLS: list[tuple[str, str, int, bool]] = [
    # Made as a new file beside: nothing shows before it is moved to its place.
    *(("save new", step, 1, False) for step in STEPS[:-1]),
    ("save new", "publish", 1, False),
    ("save new", "published", 1, True),
    *(("save over", step, 1, False) for step in STEPS[:-1]),
    ("save over", "publish", 1, False),
    ("save over", "published", 1, True),
    # A pack is two commits of a file that nobody knows yet.
    *(("pack new", step, 2, False) for step in STEPS[:-1]),
    ("pack new", "chunks", 1, False),
    ("pack new", "committed", 1, False),
    ("pack over", "committed", 2, False),
    ("pack over", "publish", 1, False),
    ("pack over", "published", 1, True),
    ("compact", "publish", 1, False),
    ("compact", "published", 1, True),
    # In place: the manifest's transaction decides.
    *(
        (write, step, 1, step in ("committed", "reclaim"))
        for write in ("save over in use", "save task over")
        for step in STEPS
    ),
    *(("save task", step, 1, step == "committed") for step in STEPS[:-1]),
    *(("rm", step, 1, step in ("committed", "reclaim")) for step in STEPS[1:]),
]


@pytest.mark.parametrize(
    ("write", "moment", "occurrence", "is_new"), KILLS, ids=lambda value: str(value)
)
def test_killed_at_a_step(
    processes: ForkServerContext,
    template: Path,
    tmp_path: Path,
    write: str,
    moment: str,
    occurrence: int,
    is_new: bool,
) -> None:
    path = prepare(template, tmp_path, write)
    killed = run_killed(processes, write, path, moment=moment, occurrence=occurrence)
    assert killed, f"{write} never came to {moment!r}"
    found = check_after(path, write)
    if write != "compact":
        assert found is is_new


def test_killed_twice_in_a_row(
    processes: ForkServerContext, template: Path, tmp_path: Path
) -> None:
    path = prepare(template, tmp_path, "save task")
    for moment in ("chunks", "synced", "manifest", "synced"):
        assert run_killed(processes, "save task", path, moment=moment)
    assert not check_after(path, "save task")


def test_a_store_beside_a_dead_writers_files_is_left_alone(
    processes: ForkServerContext, tmp_path: Path
) -> None:
    # Another store's temporary files in the same directory are not ours to clean.
    other = tmp_path / "other.tall"
    path = tmp_path / "zoo.tall"
    assert run_killed(processes, "save new", other, moment="synced")
    left = set(os.listdir(tmp_path))
    assert any(name.startswith(".other.tall.") for name in left)
    tallstore.save(BASE, path)
    assert set(os.listdir(tmp_path)) == left | {path.name}
    tallstore.save(BASE, other)
    assert set(os.listdir(tmp_path)) == {path.name, other.name}


def random_kills(
    processes: ForkServerContext,
    template: Path,
    tmp_path: Path,
    *,
    count: int,
    seed: int,
) -> None:
    """Kill each kind of write at random moments of its own duration."""
    draw = random.Random(seed)
    durations: dict[str, float] = {}
    killed = 0
    for number in range(count):
        write = draw.choice(list(WRITES))
        if write not in durations:
            path = prepare(template, tmp_path, write)
            assert not run_killed(processes, write, path, moment="never", durations=durations)
            assert same(content(path), WRITES[write][2])
        path = prepare(template, tmp_path, write)
        delay = draw.random() * durations[write]
        killed += run_killed(processes, write, path, delay=delay)
        try:
            check_after(path, write)
        except BaseException as exc:
            exc.add_note(f"kill {number}, seed {seed}: {write} after {delay:.4f} s")
            raise
    assert killed >= count // 4, f"only {killed} of {count} were killed before they ended"


def test_killed_at_random_times(
    processes: ForkServerContext, template: Path, tmp_path: Path
) -> None:
    random_kills(processes, template, tmp_path, count=20, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_many_random_times(
    processes: ForkServerContext, template: Path, tmp_path: Path, seed: int
) -> None:
    random_kills(processes, template, tmp_path, count=80, seed=100 + seed)
