"""tallstore doctor: what it tells, what it finds wrong, and that it needs nothing it looks at."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import ok, ok_json
from cli_helpers import run as cli
from stored import rewrite
from zoo import ROOT, child_environment, fine_tune, make_base, run_child

import tallstore
from tallstore.doctor import examine, examining, probing
from tallstore.doctor import place as place_module
from tallstore.doctor.diagnosis import Diagnosis, Problem
from tallstore.doctor.machine import machine
from tallstore.doctor.place import place
from tallstore.doctor.probing import probe
from tallstore.doctor.programs import NEEDED, PACKAGES, gpu, programs
from tallstore.doctor.storefile import storefile
from tallstore.engine.filesystem import FileSystem
from tallstore.engine.keys import chunk_key

Found = dict[str, dict[str, Any]]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "zoo.tall"
    base = make_base()
    tallstore.pack(path, base, {"one": fine_tune(base, 1)}, exact=True)
    return path


def run(*arguments: object, path: Path | None = None, **options: Any) -> Any:
    """(exit status, the JSON) of the command in a process of its own."""
    environment = child_environment()
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), environment["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "tallstore", "doctor", *map(str, arguments), "--json"],
        env=environment,
        cwd=options.pop("cwd", ROOT),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )
    assert done.stdout, done.stderr
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def block(folder: Path, name: str, code: str) -> Path:
    """A package of that name which does something else when it is imported."""
    package = folder / "instead" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    return folder / "instead"


# -- what it tells ------------------------------------------------------------------------


def test_of_a_store(store: Path) -> None:
    status, facts = run(store)
    assert status == 0 and facts["ok"], facts["problems"]
    assert facts.keys() == {"ok", "programs", "gpu", "machine", "place", "store", "problems"}
    assert facts["programs"]["tallstore"] == tallstore.__version__
    assert facts["programs"]["python"] == platform.python_version()
    for name in NEEDED:
        found = facts["programs"]["packages"][name]
        assert found["version"].partition("+")[0] == metadata.version(name).partition("+")[0]
    lmdb = facts["programs"]["packages"]["lmdb"]
    assert re.fullmatch(r"0\.9\.\d+", lmdb["library"]) and lmdb["data_version"] == 1
    here = facts["machine"]
    assert here["bits"] == 64 and here["page_bytes"] == resource.getpagesize()
    assert here["usable_cores"] == len(os.sched_getaffinity(0))
    assert 0 < here["available_bytes"] <= here["memory_bytes"]
    there = facts["place"]
    assert there["directory"] == str(store.parent) and there["file_system"] != "unknown"
    assert there["free_bytes"] > 0 and there["writable"] and not there["network"]
    with tallstore.open(store) as opened:
        expected = {
            "path": str(store),
            "exists": True,
            "file_bytes": store.stat().st_size,
            "format_version": opened.format_version,
            "generation": opened.generation,
            "written_by": opened.written_by,
            "tasks": 1,
            "base": opened.base.identity,
            "external_base": None,
            "stray_chunks": 0,
            "readers": [],
            "stale_readers": 0,
            "leftovers": {},
            "writer": None,
        }
    assert {name: facts["store"][name] for name in expected} == expected
    assert not list(store.parent.glob("*-lock")), "it left LMDB's lock file behind"


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that are all well, without importing them: that takes seconds."""
    monkeypatch.setattr(examining, "probe", lambda names: healthy())


@pytest.mark.usefixtures("probed")
def test_without_a_store_it_looks_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    facts = ok_json("doctor")
    assert "store" not in facts and facts["place"]["directory"] == str(tmp_path)


@pytest.mark.usefixtures("probed")
def test_as_text(store: Path) -> None:
    text = ok("doctor", store)
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines() if "  " in line)
    assert lines["tallstore"] == tallstore.__version__ and "inside" in lines["lmdb"]
    for name in ("gpu", "driver", "triton", "memory", "file system", "free", "format", "readers"):
        assert lines[name], name
    assert text.endswith("Nothing is wrong.\n")
    store.unlink()
    result = cli("doctor", store)
    assert result.exit_code == 1
    assert f"wrong: {store}: no such store. Cure: " in result.stdout
    assert "Nothing is wrong" not in result.stdout


def test_nothing_that_it_looks_at_is_imported_to_look_at_it() -> None:
    run_child("""
import sys
import tallstore.cli.root
from tallstore.doctor import examine
assert examine().sections["programs"].facts["packages"]["torch"]["version"]
assert not {"torch", "triton", "lmdb", "numpy", "matplotlib"} & set(sys.modules)
""")


def test_the_versions_that_are_needed_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert dict(text.split(">=") for text in project["dependencies"]) == NEEDED
    assert project["optional-dependencies"]["gpu"][0].startswith("triton>=3.4;")


# -- packages that cannot be imported -----------------------------------------------------

BROKEN = {
    "absent": "raise ModuleNotFoundError(\"No module named 'NAME'\", name='NAME')",
    "broken": "raise ImportError('libcudart.so.99: cannot open shared object file')",
}


@pytest.mark.parametrize(
    ("name", "how"), [("torch", "broken"), ("lmdb", "absent"), ("triton", "absent")]
)
def test_with_a_package_that_cannot_be_imported(
    store: Path, tmp_path: Path, name: str, how: str
) -> None:
    instead = block(tmp_path, name, BROKEN[how].replace("NAME", name))
    status, facts = run(store, path=instead)
    error = facts["programs"]["packages"][name]["error"]
    assert {"absent": "No module named", "broken": "libcudart"}[how] in error
    if name == "triton":  # nothing needs it where there is no GPU
        assert status == 0 and facts["ok"]
        assert "device='cuda'" in facts["gpu"]["without_triton"]
        assert facts["store"]["tasks"] == 1
        return
    assert status == 1 and not facts["ok"]
    first = facts["problems"][0]
    assert first["what"].startswith(f"{name} cannot be imported: ") and first["serious"]
    assert first["cure"] == f"pip install '{name}>={NEEDED[name]}'"
    assert facts["store"]["file_bytes"] == store.stat().st_size
    # Listing takes no torch.
    assert ("tasks" in facts["store"]) == (name == "torch")


def test_a_package_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instead = block(tmp_path, "sleeper", "import time; time.sleep(600)")
    monkeypatch.syspath_prepend(str(instead))
    monkeypatch.setattr(probing, "_PATIENCE", 0.5)
    assert probe(("sleeper",)) == {"sleeper": {"error": "no answer within 0 s"}}


def test_a_package_that_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.syspath_prepend(str(block(tmp_path, "deadly", code)))
    assert probe(("deadly",)) == {
        "deadly": {"error": "importing it ended the process with signal 11"}
    }


def test_a_package_that_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; print('{}'); sys.stderr.write('hello\\n'); __version__ = '7.1'"
    monkeypatch.syspath_prepend(str(block(tmp_path, "talker", code)))
    assert probe(("talker",)) == {"talker": {"version": "7.1"}}


# -- judgements ---------------------------------------------------------------------------


def healthy() -> Found:
    found: Found = {name: {"version": NEEDED.get(name, "9.9")} for name in PACKAGES}
    found["lmdb"].update(library="0.9.36", data_version=1)
    found["torch"].update(cuda="12.9", devices=[], gpu_error=None)
    found["triton"].update(kernels_error=None)
    return found


DEVICE = {"name": "H200", "capability": "9.0", "memory_bytes": 10**11, "free_bytes": 10**10}


def whats(problems: tuple[Problem, ...], *, serious: bool) -> list[str]:
    assert all(problem.cure for problem in problems)
    return [problem.what for problem in problems if problem.serious == serious]


def test_healthy_programs() -> None:
    assert programs(healthy()).problems == gpu(healthy()).problems == ()
    assert programs(healthy()).facts["packages"]["lmdb"]["library"] == "0.9.36"


@pytest.mark.parametrize(
    ("name", "version"), [("torch", "2.5.1+cu121"), ("lmdb", "2.2.9"), ("numpy", "1.26.4")]
)
def test_programs_that_are_too_old(name: str, version: str) -> None:
    found = healthy()
    found[name]["version"] = version
    (what,) = whats(programs(found).problems, serious=True)
    assert what == f"{name} {version} is older than {NEEDED[name]}"


@pytest.mark.parametrize("version", ["2.6.0", "2.10.0a0+git1234", "3.0", "unknown"])
def test_programs_that_are_not_too_old(version: str) -> None:
    found = healthy()
    found["torch"]["version"] = version
    assert programs(found).problems == ()


def test_lmdb_that_writes_another_format() -> None:
    found = healthy()
    found["lmdb"]["data_version"] = 2
    (what,) = whats(programs(found).problems, serious=True)
    assert what == "lmdb writes data version 2, stores are of version 1"


def broken_gpu(found: Found) -> None:
    found["torch"]["gpu_error"] = "RuntimeError: CUDA error: uncorrectable ECC"


def no_triton(found: Found) -> None:
    found["torch"]["devices"] = [DEVICE]
    found["triton"] = {"error": "ModuleNotFoundError: No module named 'triton'"}


def old_triton(found: Found) -> None:
    found["torch"]["devices"] = [DEVICE]
    found["triton"]["version"] = "3.3.1"


def odd_triton(found: Found) -> None:
    found["torch"]["devices"] = [DEVICE]
    found["triton"]["kernels_error"] = "AttributeError: module 'triton' has no attribute 'jit'"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (broken_gpu, "a GPU that does not work: RuntimeError: CUDA error: uncorrectable ECC"),
        (no_triton, "no Triton (ModuleNotFoundError: No module named 'triton'): load(device='cuda"),
        (old_triton, "triton 3.3.1 is older than 3.4"),
        (odd_triton, "no Triton (AttributeError: module 'triton' has no attribute 'jit')"),
    ],
)
def test_gpus_that_cannot_be_used(change: Callable[[Found], None], said: str) -> None:
    found = healthy()
    change(found)
    (what,) = whats(gpu(found).problems, serious=True)
    assert said in what


def test_a_gpu_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    found = healthy()
    found["torch"]["devices"] = [DEVICE]
    assert gpu(found).problems == () and gpu(found).facts["devices"] == [DEVICE]
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    (what,) = whats(gpu(found).problems, serious=True)
    assert what.startswith("no C compiler")


@pytest.mark.parametrize(
    ("limit", "fact", "said"),
    [
        ("RLIMIT_AS", "address_space_limit", "ulimit -v"),
        ("RLIMIT_FSIZE", "file_size_limit", "ulimit -f"),
    ],
)
def test_limits_of_the_process(limit: str, fact: str, said: str) -> None:
    done = run_child(
        """
import json, resource, sys
resource.setrlimit(getattr(resource, sys.argv[1]), (8 << 30, 8 << 30))
from tallstore.doctor.machine import machine
found = machine()
told = [[p.what, p.cure, p.serious] for p in found.problems]
print(json.dumps([found.facts[sys.argv[2]], told]))
""",
        limit,
        fact,
    )
    value, problems = json.loads(done.stdout)
    assert value == 8 << 30
    (problem,) = (p for p in problems if said in p[0])
    assert problem[1].startswith(f"{said} unlimited") and not problem[2]


def test_a_machine_that_stores_are_not_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "maxsize", (1 << 31) - 1)
    (what,) = whats(machine().problems, serious=True)
    assert what.startswith("a 32-bit, ")


def test_a_network_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mounted(path: Path) -> FileSystem:
        return FileSystem("nfs4", "server:/export", "/home", False, True)

    monkeypatch.setattr(place_module, "file_system", mounted)
    found = place(tmp_path)
    (what,) = whats(found.problems, serious=False)
    assert "nfs4, server:/export" in what and found.facts["network"]


@pytest.mark.parametrize(("free", "needed"), [(10**6, 0), (5 * 10**9, 10**10)])
def test_little_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, needed: int
) -> None:
    monkeypatch.setattr(place_module, "free_room", lambda path: free)
    (problem,) = place(tmp_path, needed=needed).problems
    assert not problem.serious and f"{free} bytes are free" in problem.what
    assert (f"compact takes {needed} bytes" in problem.cure) == bool(needed)


def test_no_such_directory(tmp_path: Path) -> None:
    (what,) = whats(place(tmp_path / "none").problems, serious=True)
    assert what == f"{tmp_path / 'none'}: no such directory"


def test_read_only_media(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mounted(path: Path) -> FileSystem:
        return FileSystem("iso9660", "/dev/sr0", "/media", True, False)

    monkeypatch.setattr(place_module, "file_system", mounted)
    found = place(tmp_path)
    (what,) = whats(found.problems, serious=False)
    assert "read alone" in what and not found.facts["writable"]


# -- stores -------------------------------------------------------------------------------


def look(path: Path) -> tuple[Mapping[str, Any], tuple[Problem, ...]]:
    section = storefile(path, readable=True)
    return section.facts, section.problems


def test_a_store_that_is_open_here_is_left_alone(store: Path) -> None:
    with tallstore.open(store) as opened:
        facts, problems = look(store)
        assert facts["readers"] is None and facts["tasks"] == 1 and problems == ()
        assert set(opened.load("one")) == set(make_base())


READER = """
import sys, time
import tallstore
store = tallstore.open(sys.argv[1])
store.load()
print("open", flush=True)
time.sleep(600)
"""


def test_readers_and_the_slots_of_those_that_were_killed(store: Path) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(store)],
            env=child_environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for child in children:
            assert child.stdout is not None and child.stdout.readline() == "open\n"
        facts, problems = look(store)
        assert facts["readers"] == sorted(child.pid for child in children)
        assert facts["stale_readers"] == 0 and problems == ()
        children[0].send_signal(signal.SIGKILL)
        children[0].wait()
        facts, problems = look(store)
        assert facts["readers"] == [children[1].pid] and facts["stale_readers"] == 1
        (what,) = whats(problems, serious=False)
        assert what.startswith("1 slots of readers that were killed")
        assert look(store)[0]["stale_readers"] == 0
    finally:
        for child in children:
            child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()


def test_what_killed_writes_left(store: Path) -> None:
    left = store.with_name(".zoo.tall.0123456789ab.tmp")
    left.write_bytes(b"x" * 1000)
    beside = store.with_name(".zoo.tall.more.0123456789ab.tmp")  # of zoo.tall.more
    other = store.with_name(".other.tall.0123456789ab.tmp")
    other.write_bytes(b"x")

    def leave(items: dict[bytes, bytes]) -> None:
        items[chunk_key(1 << 40, 0)] = b"half a chunk"

    rewrite(store, leave)
    facts, problems = look(store)
    assert facts["leftovers"] == {str(left): 1000} and facts["stray_chunks"] == 1
    first, second = whats(problems, serious=False)
    assert str(left) in first and "1 chunks of an interrupted write" in second
    with left.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # somebody is writing it
        assert look(store)[0]["leftovers"] == {}
    assert left.exists() and not beside.exists()
    tallstore.save(make_base(), store, overwrite=True)
    assert look(store)[1] == (), "the next write removes them"


def test_a_writer_at_work(store: Path) -> None:
    mark = store.with_name("zoo.tall-writer")
    mark.write_text("4242")
    assert look(store)[0]["writer"] is None  # of a killed one
    with mark.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert look(store)[0]["writer"] == 4242


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def write_over(path: Path) -> None:
    path.write_text("a diary, no store")


@pytest.mark.parametrize(
    ("harm", "said"),
    [(cut, "truncated"), (write_over, "not a tallstore"), (Path.unlink, "no such store")],
)
def test_a_store_that_cannot_be_opened(
    store: Path, harm: Callable[[Path], None], said: str
) -> None:
    harm(store)
    facts, problems = look(store)
    (what,) = whats(problems, serious=True)
    assert said in what and str(store) in what
    assert facts["exists"] == (harm is not Path.unlink) and "tasks" not in facts


def test_a_store_whose_base_is_elsewhere(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.tall"
    base = make_base()
    tallstore.pack(path, None, {"two": fine_tune(base, 2)}, external_base=store)
    facts, problems = look(path)
    assert problems == () and facts["external_base"] == str(store)
    assert facts["format_version"] == 2
    shutil.move(store, tmp_path / "moved.tall")
    facts, problems = look(path)
    (what,) = whats(problems, serious=True)
    assert facts["base"] in what and f"{store}: no such store" in what
    assert f"tallstore relink {path}" in problems[0].cure
    assert facts["tasks"] == 1


@pytest.mark.usefixtures("probed")
def test_a_diagnosis_is_sound_if_nothing_is_serious(store: Path) -> None:
    found = examine(store)
    assert isinstance(found, Diagnosis) and found.ok
    store.unlink()
    found = examine(store)
    assert not found.ok and found.problems[0].serious
    assert found.to_json()["problems"][0]["what"] == found.problems[0].what
