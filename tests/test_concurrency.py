"""One writer and many readers, in processes and threads: every load is one commit, whole."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_same
from zoo import State, child_environment, fine_tune, make_base, run_child

import tallstore
from tallstore.errors import StoreClosedError, TallstoreError

COUNT = 30_000


def version(number: int) -> State:
    """A state whose every tensor tells which version it belongs to."""
    return {
        "number": torch.tensor(number),
        "a": torch.full((COUNT,), float(number)),
        "b": torch.arange(COUNT, dtype=torch.int32) * number,
        "c": torch.full((70, 3), number, dtype=torch.bfloat16),
    }


def check_version(state: State) -> int:
    """Which version this is; fails unless it is all of one."""
    number = int(state["number"])
    assert_same(state, version(number))
    return number


READER = """
import sys, time
import tallstore
from test_concurrency import check_version
path, until = sys.argv[1], time.monotonic() + float(sys.argv[2])
last = {None: -1, "t": -1}
loads = changes = 0
print("ready", flush=True)
sys.stdin.readline()
until = time.monotonic() + float(sys.argv[2])
while time.monotonic() < until:
    for task in last:
        number = check_version(tallstore.load(path, task=task))
        assert number >= last[task], "an older version after a newer one"
        changes += number > last[task]
        last[task] = number
        loads += 1
    with tallstore.open(path) as store:
        # one handle sees one generation, base and task alike, however long it takes
        first = check_version(store.load()), check_version(store.load("t"))
        time.sleep(0.01)
        assert first == (check_version(store.load()), check_version(store.load("t")))
        assert store.verify().ok
        loads += 4
print(loads, changes)
"""


def test_readers_beside_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "m.tall"
    tallstore.save(version(0), path)
    tallstore.save(version(0), path, task="t")
    seconds = 3.0
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(path), str(seconds)],
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
    failures: list[BaseException] = []
    loads = [0, 0]
    stop = threading.Event()

    def read(index: int) -> None:
        try:
            last = -1
            with tallstore.open(path) as store:
                while not stop.is_set():
                    number = check_version(store.load("t"))
                    assert number >= last
                    last = number
                    loads[index] += 1
                    store.refresh()
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for reader in readers:
        assert reader.stdin is not None
        reader.stdin.write("\n")
        reader.stdin.flush()
    written = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        written += 1
        tallstore.save(version(written), path, task="t", overwrite=True)
        if written % 3 == 0:
            with tallstore.open(path, "a") as store:
                store.add({"passing": version(written)})
                store.remove("passing")
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not failures, failures
    for reader in readers:
        out, errors = reader.communicate(timeout=60)
        assert reader.returncode == 0, errors
        count, changes = map(int, out.split())
        assert count > 5 and changes > 1, "the reader saw nothing happen"
    assert written > 3 and min(loads) > 3
    assert check_version(tallstore.load(path, task="t")) == written
    assert check_version(tallstore.load(path)) == 0
    tallstore.compact(path)
    assert os.listdir(tmp_path) == ["m.tall"]


def test_a_base_saved_over_again_and_again(tmp_path: Path) -> None:
    # Now replaced by a new file, now given a new generation in place, as readers come and go.
    path = tmp_path / "m.tall"
    tallstore.save(version(0), path)
    failures: list[BaseException] = []
    loads = [0, 0]
    inodes = set()
    stop = threading.Event()

    def read(index: int) -> None:
        try:
            last = -1
            while not stop.is_set():
                number = check_version(tallstore.load(path))
                assert number >= last
                last = number
                loads[index] += 1
                time.sleep(0.005 * index)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 2
    written = 0
    while time.monotonic() < until and not failures:
        written += 1
        tallstore.save(version(written), path)
        inodes.add(path.stat().st_ino)
        time.sleep(0.005)
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a reader hangs"
    assert not failures, failures
    assert written > 5 and min(loads) > 5
    assert check_version(tallstore.load(path)) == written
    assert os.listdir(tmp_path) == ["m.tall"]


def test_two_writers_wait_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "m.tall"
    base = make_base()
    tallstore.save(base, path)
    code = """
import sys, tallstore
from zoo import fine_tune, make_base
for number in range(4):
    name = f"{sys.argv[2]}{number}"
    tallstore.save(fine_tune(make_base(), number), sys.argv[1], task=name)
"""
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(path), name], env=child_environment())
        for name in ("x", "y")
    ]
    failures: list[BaseException] = []

    def write(name: str) -> None:
        try:
            for number in range(4):
                tallstore.save(fine_tune(base, number), path, task=f"{name}{number}")
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=write, args=(name,)) for name in ("p", "q")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    assert [child.wait(60) for child in children] == [0, 0]
    with tallstore.open(path) as store:
        assert sorted(store.tasks) == sorted(f"{n}{i}" for n in "xypq" for i in range(4))
        for name in store.tasks:
            assert_same(store.load(name), fine_tune(base, int(name[1])))
        assert store.verify().ok
    assert os.listdir(tmp_path) == ["m.tall"]


def test_one_handle_shared_by_threads(tmp_path: Path) -> None:
    path = tmp_path / "m.tall"
    base = make_base()
    tuned = {f"t{i}": fine_tune(base, i) for i in range(4)}
    tallstore.pack(path, base, tuned, exact=True)
    failures: list[BaseException] = []
    with tallstore.open(path) as store:

        def read(name: str) -> None:
            try:
                for _ in range(10):
                    assert_same(store.load(name), tuned[name])
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=read, args=(name,)) for name in tuned]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not failures, failures


def test_a_store_opened_twice_in_one_process(tmp_path: Path) -> None:
    path = tmp_path / "m.tall"
    base = make_base()
    tallstore.save(base, path)
    first = tallstore.open(path)
    second = tallstore.open(os.path.relpath(path))
    third = tallstore.open(path, "a")
    first.close()
    assert_same(second.load(), base)
    third.add({"t": fine_tune(base, 1)})
    assert_same(third.load("t"), fine_tune(base, 1))
    assert not second.tasks
    second.refresh()
    second.close()
    assert_same(third.load("t"), fine_tune(base, 1))
    third.close()
    assert os.listdir(tmp_path) == ["m.tall"]


def test_a_symbolic_link_is_the_same_store(tmp_path: Path) -> None:
    path = tmp_path / "real" / "m.tall"
    path.parent.mkdir()
    link = tmp_path / "link.tall"
    link.symlink_to(path)
    base = make_base()
    tallstore.save(base, path)
    with tallstore.open(path) as store, tallstore.open(link) as other:
        assert_same(store.load(), base)
        assert_same(other.load(), base)
    assert_same(tallstore.load(link), base)
    tallstore.save(fine_tune(base, 1), link, task="t")
    assert_same(tallstore.load(path, task="t"), fine_tune(base, 1))
    tallstore.save(make_base(1), link, overwrite=True)
    assert_same(tallstore.load(link), make_base(1))
    assert os.listdir(path.parent) == ["m.tall"]


def test_a_forked_child(tmp_path: Path) -> None:
    path = tmp_path / "m.tall"
    tallstore.save(version(1), path)
    code = """
import os, sys
import torch
torch.set_num_threads(1)
import tallstore
from tallstore.errors import StoreClosedError
from test_concurrency import check_version, version
path = sys.argv[1]
parent = tallstore.open(path)
assert check_version(parent.load()) == 1
pid = os.fork()
if not pid:
    try:
        for use in (parent.load, parent.verify, lambda: parent.tensors()):
            try:
                result = use()
                assert use == parent.verify and not result.ok, "an inherited handle was used"
                assert "opened before a fork" in result.problems[0].message
            except StoreClosedError as exc:
                assert str(exc).startswith(path) and "opened before a fork" in str(exc), exc
                assert "open it again" in str(exc)
        assert check_version(tallstore.load(path)) == 1
        with tallstore.open(path, "a") as store:
            store.add({"t": version(2)})
            assert check_version(store.load("t")) == 2
        parent.close()
        assert check_version(tallstore.load(path, task="t")) == 2
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
status = os.waitpid(pid, 0)[1]
assert status == 0, status
# the parent's handle outlives the child's
assert check_version(parent.load()) == 1 and not parent.tasks
parent.refresh()
assert check_version(parent.load("t")) == 2
assert parent.verify().ok
parent.close()
"""
    run_child(code, path)
    assert check_version(tallstore.load(path, task="t")) == 2
    assert os.listdir(tmp_path) == ["m.tall"]


def test_no_litter_after_the_last_close(tmp_path: Path) -> None:
    path = tmp_path / "m.tall"
    base = make_base()
    tallstore.save(base, path)
    assert os.listdir(tmp_path) == ["m.tall"]
    with tallstore.open(path), tallstore.open(path):
        pass
    assert os.listdir(tmp_path) == ["m.tall"]
    with pytest.raises(TallstoreError):
        tallstore.load(path, task="absent")
    tallstore.save(fine_tune(base, 1), path, task="t")
    with tallstore.open(path, "a") as store:
        store.remove("t")
        store.refresh()
    tallstore.compact(path)
    assert os.listdir(tmp_path) == ["m.tall"]
    with pytest.raises(StoreClosedError):
        store.load()


def test_the_lock_file_stays_while_another_process_reads(tmp_path: Path) -> None:
    path = tmp_path / "m.tall"
    tallstore.save(version(1), path)
    code = """
import sys, tallstore
from test_concurrency import check_version
with tallstore.open(sys.argv[1]) as store:
    print("open", flush=True)
    sys.stdin.readline()
    assert check_version(store.load()) == 1
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == "open\n"
        assert check_version(tallstore.load(path)) == 1
        for number in range(2, 6):  # pages that the child sees are not used again
            tallstore.save(version(number), path)
        assert sorted(os.listdir(tmp_path)) == ["m.tall", "m.tall-lock"]
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.wait(60) == 0
    assert os.listdir(tmp_path) == ["m.tall"]
    assert check_version(tallstore.load(path)) == 5


def test_a_killed_reader_holds_no_space_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "m.tall"
    tallstore.save(version(0), path)
    code = """
import os, signal, sys, tallstore
store = tallstore.open(sys.argv[1])
store.load()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run_child(code, path, check=False).returncode == -9
    assert sorted(os.listdir(tmp_path)) == ["m.tall", "m.tall-lock"]
    with tallstore.open(path) as other:  # keeps the file in place, so that pages must be reused
        sizes = []
        for number in range(1, 31):
            tallstore.save(version(number), path)
            other.refresh()
            sizes.append(path.stat().st_size)
        assert sizes[-1] == sizes[14], sizes
    assert os.listdir(tmp_path) == ["m.tall"]
