"""A seeded handful of bench.kills, bench.power and bench.failures."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterator

import pytest

from bench import failures, kills, power
from bench.faults.driver import Driver
from bench.faults.operations import OPERATIONS
from bench.faults.shim import read_log

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("cc") or shutil.which("gcc")),
    reason="takes Linux and a C compiler",
)


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with Driver() as opened:
        yield opened


def test_killed_at_steps_calls_and_random_moments(driver: Driver) -> None:
    run = kills.Kills(driver)
    draw = random.Random(1)
    for name in draw.sample(list(OPERATIONS), 6):
        run.at_call(name, draw.randint(3, 14), half=False)
        run.at_call(name, draw.randint(1, 4), half=True)
        run.at_random(name, draw)
    assert not run.failures
    assert run.kills.total() >= 10, run.kills


def test_the_power_goes(driver: Driver) -> None:
    draw = random.Random(2)
    new = 0
    for name in draw.sample(list(OPERATIONS), 5):
        recording = power.record(driver, name)
        assert any(event.kind == "s" for event in recording.events), "nothing was synced"
        for moment in [len(recording.events), *draw.sample(range(len(recording.events)), 3)]:
            finished, _ = power.cut_power(recording, moment, draw, driver.place)
            new += driver.check(name, finished=finished)
    assert new >= 5, "all that was finished is there"


def test_a_write_that_is_not_synced_is_found_out(driver: Driver) -> None:
    """The simulation sees what it is there for: leave the syncs out, and a commit is lost."""
    recording = power.record(driver, "save task")
    recording.events = [event for event in recording.events if event.kind != "s"]
    draw = random.Random(3)
    with pytest.raises(AssertionError):
        for _ in range(20):
            moment = len(recording.events)
            finished, _ = power.cut_power(recording, moment, draw, driver.place)
            assert finished
            driver.check("save task", finished=True)


def test_the_device_fails_or_is_full(driver: Driver) -> None:
    run = failures.Failures(driver)
    draw = random.Random(4)
    for fault in failures.FAULTS:
        name = draw.choice(list(OPERATIONS))
        calls = run.calls(name, fault)
        for number in draw.sample(range(1, calls + 1), min(2, calls)):
            run.at(name, fault, number)
    assert not run.failures
    assert run.refused.total() >= 7, run.refused


def test_what_the_shim_records(driver: Driver) -> None:
    driver.run("unpack to a file", arm={"log": str(driver.log)})
    events = list(read_log(driver.log))
    made = driver.place / "out.safetensors"
    data = bytearray(made.stat().st_size)
    for event in events:
        if event.kind == "w" and event.path.endswith(".tmp"):
            data[event.offset : event.offset + len(event.data)] = event.data
    assert data == made.read_bytes()
    kinds = [event.kind for event in events]
    assert kinds[-1] == "m"
    renamed = kinds.index("r")
    assert events[renamed].second == str(made.resolve())
    # Synced before it is renamed, and the directory after that.
    assert events[renamed - 1].kind == "s" and events[renamed - 1].path == events[renamed].path
    assert events[renamed + 1].kind == "s" and events[renamed + 1].path == str(
        made.parent.resolve()
    )


@pytest.mark.parametrize(
    ("name", "fault"), [("pack new", "quota"), ("save over", "read-only"), ("pack over", "quota")]
)
def test_failures_around_a_commit_are_told_as_what_they_are(
    driver: Driver, name: str, fault: str
) -> None:
    """Found by bench.failures: a bare OSError, and LMDB's "an earlier write failed"."""
    run = failures.Failures(driver)
    for number in range(18, min(44, run.calls(name, fault) + 1), 2 if name == "pack over" else 1):
        run.at(name, fault, number)
    assert not run.failures
