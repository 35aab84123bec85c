"""The command: what each part of it does, prints and gives as JSON."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
from cli_helpers import TASKS, make_store, make_zoo, ok, ok_json, refused, run
from helpers import assert_same

import tallstore
from tallstore.cli.root import root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    zoo = make_zoo(tmp_path_factory.mktemp("zoo"))
    make_store(zoo)
    return zoo


@pytest.fixture
def zoo(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "zoo"))


# -- help ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(root.commands))
def test_every_command_has_help_with_an_example(name: str) -> None:
    text = ok(name, "--help")
    assert "Example" in text and f"tallstore {name}" in text
    assert all(len(line) <= 80 for line in text.splitlines()), text
    for parameter in root.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts} has no help"


def test_the_group_lists_every_command() -> None:
    text = ok("--help")
    assert text == ok("-h")
    lines = [line.split() for line in text.splitlines() if line.startswith("  ")]
    for name in root.commands:
        assert any(words[0] == name and len(words) > 2 for words in lines), name
    assert "..." not in text.split("Commands:")[1].split("Examples:")[0], "cut short"


def test_version() -> None:
    assert tallstore.__version__ in ok("--version")


# -- pack and add -------------------------------------------------------------------------


def test_pack_prints_what_it_made(zoo: Path) -> None:
    tasks = [f"{name}={zoo}/tasks/{name}.pt" for name in TASKS]
    text = ok("pack", zoo / "new.tall", "--base", zoo / "base.pt", *tasks)
    lines = text.splitlines()
    assert lines[0].split() == [
        "task",
        "stored",
        "bits/weight",
        "density",
        "rel.",
        "error",
        "original",
    ]
    assert [line.split()[0] for line in lines[1:4]] == list(TASKS)
    for word in ("(base)", "(shared vector)", "(whole file)", "4 checkpoints", "bits per weight"):
        assert word in text
    assert "lossy" in text and "--exact" in text
    assert all(len(line) <= 80 for line in lines)


def test_pack_exact_says_so(zoo: Path) -> None:
    text = ok("pack", zoo / "new.tall", "--base", zoo / "base.pt", "--exact", zoo / "tasks")
    assert "bit for bit" in text and "lossy" not in text
    assert_same(
        tallstore.load(zoo / "new.tall", task="math"), torch.load(zoo / "tasks" / "math.pt")
    )


def test_pack_json_and_options(zoo: Path) -> None:
    found = ok_json(
        *("pack", zoo / "new.tall", zoo / "tasks", "--base", zoo / "base.pt", "--merge", "ties"),
        *("--tall-lambda", "0.3", "--vector-dtype", "float32", "--timeout", "5"),
    )
    assert found["lossy"] is True and all("smaller and closer" in note for note in found["notes"])
    assert found["file_bytes"] == (zoo / "new.tall").stat().st_size
    assert found["original_to_file"] == found["original_bytes"] / found["file_bytes"]
    assert found["vector"]["dtype"] == "float32" and found["vector"]["rule"] == "ties"
    assert [task["task"] for task in found["tasks"]] == list(TASKS)
    for task in found["tasks"]:
        assert task["tall_lambda"] == 0.3 and not task["exact"] and task["kept_as"] == "masks"
        assert 0 < task["density"] < 1 and task["relative_error"] > 0
        assert task["own_weights"] == 2 * 64
        assert task["bits_per_weight"] == 8 * task["stored_bytes"] / task["weights"]


def test_pack_leaves_the_base_out_of_its_directory(zoo: Path) -> None:
    shutil.copy(zoo / "base.pt", zoo / "tasks" / "base.pt")
    base = zoo / "tasks" / "base.pt"
    found = ok_json("pack", zoo / "new.tall", "--base", base, zoo / "tasks")
    assert [task["task"] for task in found["tasks"]] == list(TASKS)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_store_may_stand_anywhere(zoo: Path, place: int) -> None:
    items: list[object] = [f"a={zoo}/tasks/math.pt", zoo / "tasks" / "code.pt"]
    items.insert(place, zoo / "new.tall")
    found = ok_json("pack", *items, "--base", zoo / "base.pt")
    assert sorted(task["task"] for task in found["tasks"]) == ["a", "code"]


def test_names_of_bare_checkpoints(zoo: Path) -> None:
    model = zoo / "law"
    ok("unpack", zoo / "zoo.tall", "code", model)
    sources = [model, zoo / "tasks" / "math.pt", f"{zoo}/zoo.tall::法律"]
    found = ok_json("pack", zoo / "new.tall", "--base", f"{zoo}/zoo.tall", *sources)
    assert [task["task"] for task in found["tasks"]] == ["law", "math", "法律"]


def test_pack_overwrites_when_told_to(zoo: Path) -> None:
    args = ("pack", zoo / "zoo.tall", "--base", zoo / "base.pt", zoo / "tasks" / "math.pt")
    ok(*args, "--overwrite", "--yes")
    assert [task["task"] for task in ok_json("ls", zoo / "zoo.tall")["tasks"]] == ["math"]


def test_add(zoo: Path) -> None:
    text = ok("add", f"more={zoo}/tasks/math.pt", zoo / "zoo.tall")
    assert "more" in text and "exact" in text and "mask only serves" in text
    assert_same(
        tallstore.load(zoo / "zoo.tall", task="more"), torch.load(zoo / "tasks" / "math.pt")
    )
    found = ok_json("add", zoo / "zoo.tall", f"more={zoo}/tasks/code.pt", "--overwrite", "-y")
    assert [task["task"] for task in found["tasks"]] == ["more"]
    assert found["tasks"][0]["kept_as"] == "exact"


# -- looking ------------------------------------------------------------------------------


def test_ls_is_one_line_a_task(zoo: Path) -> None:
    lines = ok("ls", zoo / "zoo.tall").splitlines()
    assert [line.split()[0] for line in lines] == list(TASKS)
    assert all("lossless" in line and "masks + exact" in line for line in lines)
    found = ok_json("ls", zoo / "zoo.tall")
    assert set(found) == {"store", "tasks"} and len(found["tasks"]) == 3


def test_ls_of_a_base_alone(tmp_path: Path) -> None:
    tallstore.save({"a": torch.zeros(3)}, tmp_path / "a.tall")
    result = run("ls", tmp_path / "a.tall")
    assert result.exit_code == 0 and result.stdout == "" and "base alone" in result.stderr
    assert "shared vector" in ok("info", tmp_path / "a.tall")
    assert ok_json("info", tmp_path / "a.tall")["vector"] is None


def test_info(zoo: Path) -> None:
    text = ok("info", zoo / "zoo.tall")
    for word in ("version 2", "free", "shared vector", "bfloat16", "ta", "originals", "1/"):
        assert word in text
    found = ok_json("info", zoo / "zoo.tall")
    assert found["file_bytes"] == (zoo / "zoo.tall").stat().st_size
    assert found["base"]["weights"] == 64 * 48 + 64 + 1
    tensors = ok_json("info", zoo / "zoo.tall", "--tensors")["tensor_list"]
    assert [tensor["kept"] for tensor in tensors] == ["base"] * 3


def test_info_of_a_task(zoo: Path) -> None:
    text = ok("info", zoo / "zoo.tall", "math", "--tensors")
    for word in ("bit for bit", "density", "tall lambda", "kept whole", "128 weights", "64x48"):
        assert word in text
    rows = ok_json("info", "--tensors", zoo / "zoo.tall", "math")["tensor_list"]
    assert {row["name"]: row["kept"] for row in rows} == {
        "layer.weight": "coded",
        "layer.bias": "coded",
        "steps": "base",
        "head": "own",
    }
    assert rows[0]["shape"] == [64, 48] and 0 < rows[0]["density"] < 1


# -- taking apart -------------------------------------------------------------------------


def test_unpack_in_any_order_of_arguments(zoo: Path) -> None:
    ok("unpack", "--max-shard-size", "1kB", zoo / "zoo.tall", "math", zoo / "out")
    assert (zoo / "out" / "model.safetensors.index.json").is_file()
    found = ok_json("unpack", zoo / "zoo.tall", "math", zoo / "one.safetensors", "-q")
    assert found["exact"] is True and found["task"] == "math"
    assert [entry["bytes"] for entry in found["files"]] == [
        (zoo / "one.safetensors").stat().st_size
    ]
    text = ok("unpack", zoo / "zoo.tall", zoo / "base", "--base")
    assert "the base" in text and (zoo / "base" / "model.safetensors").is_file()
    ok("unpack", zoo / "zoo.tall", "code", zoo / "one.safetensors", "--overwrite", "--yes")


def test_verify(zoo: Path) -> None:
    assert "whole" in ok("verify", zoo / "zoo.tall")
    found = ok_json("verify", zoo / "zoo.tall")
    assert found["ok"] and found["chunks"] > 5 and found["problems"] == []


def test_verify_finds_a_flipped_byte(zoo: Path) -> None:
    store = zoo / "zoo.tall"
    damaged = None
    for place in range(8192, store.stat().st_size, 1024):
        data = bytearray(store.read_bytes())
        data[place] ^= 0x10
        (zoo / "bad.tall").write_bytes(data)
        result = run("verify", zoo / "bad.tall")
        if "concerns task" in result.stdout:
            damaged = result
            break
    assert damaged is not None and damaged.exit_code == 1
    assert "damaged:" in damaged.stdout and "Traceback" not in damaged.output
    result = run("verify", zoo / "bad.tall", "--json")
    assert result.exit_code == 1 and '"ok": false' in result.stdout


def test_rm_and_compact(zoo: Path) -> None:
    store = zoo / "zoo.tall"
    assert "removed math" in ok("rm", store, "math", "--yes")
    found = ok_json("rm", "-y", store, "code", "code")
    assert found["removed"] == ["code"] and found["tasks_left"] == 1
    found = ok_json("compact", store)
    assert found["bytes_after"] == store.stat().st_size <= found["bytes_before"]
    assert "before" in ok("compact", store)
    assert [task["task"] for task in ok_json("ls", store)["tasks"]] == ["法律"]


# -- demo ---------------------------------------------------------------------------------


def test_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run_demo(directory: Path, *, echo: Any, report: Any) -> dict[str, Any]:
        for name in ("base.pt", "zoo.tall"):
            (directory / name).touch()
        report("pack", 1, 1)
        echo("nine checkpoints")
        return {"tasks": [], "seconds": 1.0, "score": float("nan")}

    stub = ModuleType("tallstore.demo")
    stub.run_demo = run_demo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tallstore.demo", stub)
    place = tmp_path / "new" / "demo"
    assert ok("demo", "--dir", place) == "nine checkpoints\n"
    result = run("demo", "--json", "--dir", place)
    assert json.loads(result.stdout) == {"tasks": [], "seconds": 1.0, "score": None}
    assert "nine checkpoints" in result.stderr
    (place / "zoo.tall").unlink()
    assert "not empty" in refused("demo", "--dir", place)
