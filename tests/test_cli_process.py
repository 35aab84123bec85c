"""The command as a process: what it imports, interrupts, completion; and its small parts."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_helpers import ROOT, TASKS, make_store, make_zoo, process
from click.testing import CliRunner

from tallstore.cli import printing, progressbar
from tallstore.cli.root import root


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_zoo(tmp_path_factory.mktemp("zoo"))
    make_store(made)
    return made


_NO_TORCH = """
import sys
from tallstore.cli import main
try:
    main()
finally:
    heavy = {"torch", "triton", "scipy", "sklearn"} & set(sys.modules)
    assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["pack", "--help"],
        ["ls", "{store}"],
        ["info", "{store}"],
        ["info", "{store}", "math", "--tensors"],
        ["completion", "zsh"],
    ],
)
def test_no_torch_is_imported(zoo: Path, args: list[str]) -> None:
    filled = [arg.format(store=zoo / "zoo.tall") for arg in args]
    done = subprocess.run(
        [sys.executable, "-c", _NO_TORCH, *filled], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout and not done.stderr, done.stderr


_SLOW = """
import time
from tallstore.packing import newstore
def stuck(*args, **options):
    print("packing", flush=True)
    time.sleep(60)
newstore.encode_tasks = stuck
from tallstore.cli import main
main()
"""


def test_ctrl_c_in_the_middle_leaves_everything_as_it_was(zoo: Path, tmp_path: Path) -> None:
    store = tmp_path / "zoo.tall"
    for before in (None, (zoo / "zoo.tall").read_bytes()):
        if before is not None:
            store.write_bytes(before)
        args = ["pack", store, "--base", zoo / "base.pt", zoo / "tasks", "--overwrite", "--yes"]
        running = subprocess.Popen(
            [sys.executable, "-c", _SLOW, *map(str, args)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Whoever runs the tests may have it ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert running.stdout is not None and running.stdout.readline() == "packing\n"
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=30)
        assert running.returncode == 130 and errors == "Interrupted.\n", errors
        left = [path.name for path in tmp_path.iterdir()]
        assert left == ([] if before is None else ["zoo.tall"])
        assert before is None or store.read_bytes() == before


def test_a_reader_that_has_read_enough(zoo: Path) -> None:
    command = f"{sys.executable} -m tallstore info {zoo}/zoo.tall --json | head -c 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "{" and done.stderr == ""


def test_an_encoding_that_lacks_a_name(zoo: Path) -> None:
    done = process("ls", zoo / "zoo.tall", env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0 and "\\u6cd5" in done.stdout


def test_errors_of_a_process(tmp_path: Path) -> None:
    done = process("ls", tmp_path / "none.tall")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert process("ls").returncode == 2


# -- completion ---------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str) -> None:
    result = CliRunner().invoke(root, ["completion", shell])
    assert result.exit_code == 0 and "_TALLSTORE_COMPLETE" in result.stdout


@pytest.mark.parametrize("command", ["info", "unpack", "rm"])
def test_tasks_are_completed(zoo: Path, command: str) -> None:
    def complete(words: str) -> list[str]:
        env = {**os.environ, "_TALLSTORE_COMPLETE": "bash_complete", "COMP_WORDS": words}
        done = process(env={**env, "COMP_CWORD": "3"})
        return [line.split(",", 1)[1] for line in done.stdout.splitlines() if line]

    assert complete(f"tallstore {command} {zoo}/zoo.tall ma") == ["math"]
    if command == "rm":
        assert complete(f"tallstore {command} {zoo}/zoo.tall ") == list(TASKS)
        assert complete(f"tallstore {command} {zoo}/none.tall ") == []


# -- small parts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9994, "9.99 kB"), (9995, "10.0 kB")),
        *((99_949, "99.9 kB"), (99_950, "100 kB"), (999_499, "999 kB"), (999_500, "1.00 MB")),
        *((45_600_000, "45.6 MB"), (7 * 10**9, "7.00 GB")),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert printing.size(count) == text


def test_tables_align_names_of_any_kind() -> None:
    table = printing.Table("task", "stored", "original")
    names = ["a", "法律", "e\u0301t", "long " * 40]
    for name in names:
        table.add(name, "1.00 MB", "10 MB")
    lines = table.lines()
    assert names[-1] in lines and "\\x1b" not in "".join(lines)
    assert lines[1] == "a     1.00 MB     10 MB" and lines[2] == "法律  1.00 MB     10 MB"
    assert lines[3] == "e\u0301t    1.00 MB     10 MB" and lines[-1] == lines[1].replace("a", " ")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setenv("TERM", "xterm")
    stream = _Terminal() if terminal else io.StringIO()
    with progressbar.Progress(quiet=False, stream=stream) as progress:
        assert progress.report is not None
        for step in range(1001):
            progress.report("masks", step * 10**6, 10**9)
            now += 0.01
            if now < 102 and not terminal:
                assert stream.getvalue() == ""
        progress.report("nothing", 0, 0)
    text = stream.getvalue()
    if terminal:
        assert "50%" in text and "[############............]" in text and text.endswith(" \r")
    else:
        lines = text.splitlines()
        assert 5 <= len(lines) <= 10 and lines[0].startswith("masks") and "MB/s" in lines[0]


def test_quiet_progress() -> None:
    assert progressbar.Progress(quiet=True).report is None
