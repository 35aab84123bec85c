"""The command: what it refuses, in one line each, and with which status."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import make_store, make_zoo, ok_json, refused, run

import tallstore
from tallstore.cli import printing


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    zoo = make_zoo(tmp_path_factory.mktemp("zoo"))
    make_store(zoo, exact=False)
    return zoo


@pytest.fixture
def zoo(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "zoo"))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if somebody sat at the terminal."""
    monkeypatch.setattr(printing, "interactive", lambda: True)


@pytest.mark.parametrize("command", ["ls", "info", "stats", "verify", "compact"])
def test_no_store(command: str, tmp_path: Path) -> None:
    assert "no such" in refused(command, tmp_path / "none.tall")
    (tmp_path / "text").write_text("hello " * 3000)
    assert str(tmp_path / "text") in refused(command, tmp_path / "text")
    assert "directory" in refused(command, tmp_path)


@pytest.mark.parametrize(
    "args",
    [
        ["info", "{store}", "maths"],
        ["info", "{store}", "maths", "--tensors"],
        ["unpack", "{store}", "maths", "{out}"],
        ["rm", "{store}", "math", "maths", "--yes"],
    ],
)
def test_no_such_task(zoo: Path, args: list[str]) -> None:
    filled = [a.format(store=zoo / "zoo.tall", out=zoo / "out") for a in args]
    message = refused(*filled)
    assert "'maths'" in message and "'math'" in message
    assert len(ok_json("ls", zoo / "zoo.tall")["tasks"]) == 3


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ([], "Commands:"),
        (["nonsense"], "No such command"),
        (["ls"], "Missing argument 'STORE'"),
        (["ls", "a", "b"], "unexpected extra argument"),
        (["pack", "a.tall", "b=b.pt"], "One of --base and --external-base is needed"),
        (["pack", "a.tall", "--base", "b"], "No tasks"),
        (["pack", "a=a", "--base", "b"], "No store"),
        (["pack", "a.tall", "b=", "--base", "b"], "path is missing"),
        (["pack", "a.tall", "b=c", "--base", "b", "--merge", "sum"], "'sum'"),
        (["pack", "a.tall", "b=c", "--base", "b", "--vector-dtype", "int2"], "'int2'"),
        (["pack", "a.tall", "b=c", "--base", "b", "--tall-lambda", "x"], "'x'"),
        (["pack", "a.tall", "b=c", "--base", "b", "--timeout", "-1"], "-1"),
        (["add", "a.tall"], "No tasks"),
        (["unpack", "a.tall"], "Missing argument 'TASK' and 'OUT'"),
        (["unpack", "a.tall", "math"], "Missing argument 'OUT'"),
        (["unpack", "--base", "a.tall"], "Missing argument 'OUT'"),
        (["unpack", "--base", "a.tall", "math", "out"], "no task"),
        (["unpack", "a.tall", "math", "out", "--max-shard-size", "big"], "5GB"),
        (["unpack", "a.tall", "math", "out", "--max-shard-size", "0"], "5GB"),
        (["rm", "a.tall"], "Missing argument 'TASK...'"),
        (["completion", "tcsh"], "'tcsh'"),
    ],
)
def test_wrong_usage(args: list[str], part: str) -> None:
    assert part in refused(*args, code=2)


def test_pack_refuses(zoo: Path) -> None:
    base, tasks, new = zoo / "base.pt", zoo / "tasks", zoo / "new.tall"
    start: tuple[Any, ...] = ("pack", new, "--base", base)
    shutil.copy(tasks / "math.pt", zoo / "math.pt")
    message = refused(*start, zoo / "math.pt", tasks)
    assert "'math'" in message and f"{zoo}/math.pt" in message and f"{tasks}/math.pt" in message
    (zoo / "empty").mkdir()
    assert "no checkpoint" in refused(*start, zoo / "empty")
    assert "a task's name" in refused(*start, f"a ={tasks}/math.pt")
    assert "none.pt" in refused(*start, "a=none.pt")
    assert "none.pt" in refused("pack", new, "--base", "none.pt", tasks)
    assert "tall_lambda" in refused(*start, tasks, "--tall-lambda", "-1")
    torch.save({"layer.weight": torch.zeros(3)}, zoo / "other.pt")
    assert "other.pt" in refused(*start, zoo / "other.pt")
    torch.save({"layer.weight": torch.full((64, 48), torch.nan)}, zoo / "nan.pt")
    nan = run(*start, zoo / "nan.pt")
    assert nan.exit_code in (0, 1) and "Traceback" not in nan.output
    assert not list(zoo.glob(".*")) and (nan.exit_code == 0) == new.exists()


def test_pack_never_replaces_unasked(zoo: Path) -> None:
    store, before = zoo / "zoo.tall", (zoo / "zoo.tall").read_bytes()
    args: tuple[Any, ...] = ("pack", store, "--base", zoo / "base.pt", zoo / "tasks")
    assert "--overwrite" in refused(*args)
    assert "--yes" in refused(*args, "--overwrite")
    mistaken: tuple[Any, ...] = (zoo / "base.pt", zoo / "tasks", "--base", zoo / "base.pt")
    refused("pack", *mistaken, "--overwrite", "--yes")  # the store's path left out
    assert store.read_bytes() == before and torch.load(zoo / "base.pt")


@pytest.mark.usefixtures("answers")
def test_questions(zoo: Path) -> None:
    store = zoo / "zoo.tall"
    pack: tuple[Any, ...] = ("pack", store, "--base", zoo / "base.pt", zoo / "tasks", "--overwrite")
    for args, question in (
        (("rm", store, "math"), "Remove math"),
        (pack, "holds 3 tasks"),
        (("add", store, f"math={zoo}/tasks/math.pt", "--overwrite"), "Replace math"),
        (("unpack", store, "math", zoo / "base.pt", "--overwrite"), "base.pt"),
    ):
        before = store.read_bytes()
        result = run(*args, input="n\n")
        assert result.exit_code == 1 and question in result.stderr and result.stdout == ""
        assert "Nothing was changed" in result.stderr and store.read_bytes() == before
    assert run("rm", store, "math", input="").exit_code == 130  # Ctrl-D at the question
    assert run("rm", store, "math", input="y\n").exit_code == 0
    assert len(ok_json("ls", store)["tasks"]) == 2


def test_rm_needs_a_terminal_or_yes(zoo: Path) -> None:
    message = refused("rm", zoo / "zoo.tall", "math")
    assert "--yes" in message and "no terminal" in message
    assert len(ok_json("ls", zoo / "zoo.tall")["tasks"]) == 3


def test_add_and_unpack_refuse(zoo: Path) -> None:
    store = zoo / "zoo.tall"
    assert "--overwrite" in refused("add", store, f"math={zoo}/tasks/math.pt")
    assert "--yes" in refused("add", store, f"math={zoo}/tasks/math.pt", "--overwrite")
    assert "there already" in refused("unpack", store, "math", zoo / "tasks")
    assert "make it first" in refused("unpack", store, "math", zoo / "none" / "out")


def test_damage_that_leaves_nothing_to_open(zoo: Path) -> None:
    store = zoo / "zoo.tall"
    store.write_bytes(store.read_bytes()[:20_000])
    assert str(store) in refused("ls", store)
    result = run("verify", store)
    assert result.exit_code == 1 and "the whole store" in result.stdout
    assert run("verify", store, "--json").exit_code == 1


def test_no_escape_reaches_the_terminal(tmp_path: Path) -> None:
    hostile = "w\x1b[31m\x07\u202e"
    tallstore.save({hostile: torch.zeros(3)}, tmp_path / "a.tall")
    tallstore.save({hostile: torch.ones(3)}, tmp_path / "a.tall", task="t")
    for args in (("info", "--tensors"), ("info", "t", "--tensors"), ("info", "t\x1b]0;x\x07")):
        output = run(args[0], tmp_path / "a.tall", *args[1:]).output
        assert "\x1b" not in output and "\x07" not in output and "\u202e" not in output
    assert "w\\x1b[31m" in run("info", tmp_path / "a.tall", "--tensors").stdout


def test_failures_from_outside(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, part in (
        (MemoryError(), "out of memory"),
        (RuntimeError("can't allocate memory: 9 bytes"), "out of memory"),
        (OSError(5, "Input/output error"), "Input/output error"),
    ):

        def fail(*args: object, error: Exception = error, **options: object) -> None:
            raise error

        monkeypatch.setattr(tallstore.TallStore, "verify", fail)
        assert part in refused("verify", zoo / "zoo.tall")
    monkeypatch.setenv("TALLSTORE_DEBUG", "1")
    assert "Traceback" in run("verify", zoo / "zoo.tall").stderr
