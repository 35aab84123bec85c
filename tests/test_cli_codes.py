"""pack, add, repack, strip and info with codes: what is printed, and the exit codes of refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_helpers import TASKS, make_zoo, ok, ok_json, refused

import tallstore
from tallstore.cli.coding import CODES
from tallstore.cli.pack import VECTOR_DTYPES
from tallstore.packing.codeoptions import CODE_NAMES
from tallstore.packing.pack import VECTOR_DTYPES as LIBRARY_DTYPES


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return make_zoo(tmp_path)


def packed(zoo: Path, *options: str) -> Path:
    store = zoo / "zoo.tall"
    ok("pack", store, "--base", zoo / "base.pt", zoo / "tasks", *options)
    return store


def test_the_command_has_the_library_s_names() -> None:
    assert CODES == CODE_NAMES
    assert sorted(VECTOR_DTYPES) == sorted(LIBRARY_DTYPES)


@pytest.mark.parametrize("command", ["pack", "add", "repack"])
def test_help_names_every_option(command: str) -> None:
    text = ok(command, "--help")
    for option in ("--code", "--density", "--bits", "--over", "--gain", "--bits-per-weight"):
        assert option in text
    for option in ("--keep", "--evaluate", "--calibrate", "--distil"):
        assert option in text


def test_pack_info_strip_and_back(zoo: Path) -> None:
    store = packed(zoo, "--code", "signs", "--density", "10%", "--exact")
    found = ok_json("info", store, "math", "--tensors")
    assert (found["code"], found["kept_as"], found["exact"]) == ("signs", "signs + exact", True)
    assert found["parameters"] == {"density": 0.1, "gain": "unbiased"}
    assert found["gain"] == pytest.approx(1) and 0 < found["cosine"] < 1
    rows = {row["name"]: row for row in found["tensor_list"]}
    assert rows["layer.weight"]["code"] == "signs" and rows["head"]["code"] is None
    assert rows["layer.weight"]["density"] == pytest.approx(0.1, rel=0.05)
    assert rows["layer.weight"]["bits_per_weight"] > 0 == rows["steps"]["bits_per_weight"]
    text = ok("info", store, "math", "--tensors")
    for word in ("signs", "gain", "cosine", "rel. error", "bit for bit"):
        assert word in text
    assert "math" in ok("strip", store, "math", "--exact", "--yes")
    assert ok_json("info", store, "math")["exact"] is False
    stripped = ok_json("strip", store, "--exact", "--yes")
    assert set(stripped["stripped"]) == set(TASKS) - {"math"} and stripped["freed_bytes"] > 0
    ok("add", store, f"math={zoo / 'tasks' / 'math.pt'}", "--exact")
    assert ok_json("info", store, "math")["exact"] is True
    tuned = torch.load(zoo / "tasks" / "math.pt")
    assert torch.equal(tallstore.load(store, task="math")["layer.weight"], tuned["layer.weight"])


def test_add_like_the_store_and_repack(zoo: Path) -> None:
    store = packed(zoo, "--code", "levels", "--bits", "3", "--over", "shared")
    more = f"more={zoo / 'tasks' / 'code.pt'}"
    (added,) = ok_json("add", store, more)["tasks"]
    assert (added["code"], added["over_shared_vector"]) == ("levels", True)
    originals = [f"--original={name}={zoo / 'tasks' / name}.pt" for name in TASKS]
    out = zoo / "out.tall"
    found = ok_json(
        "repack", store, out, "--code", "auto", "--bits-per-weight", "6", "--vector-dtype", "int8",
        *originals, f"--original={more}",
    )  # fmt: skip
    assert [task["code"] for task in found["tasks"]] == ["auto"] * 4 and found["vector"] is None
    assert found["bits_per_weight_and_task"] > 0
    assert ok_json("info", store)["vector"]["rule"] == "profile"


def test_evaluate_by_its_name(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (zoo / "scores.py").write_text("def one(task, state):\n    return float(len(state))\n")
    monkeypatch.chdir(zoo)
    store = packed(zoo, "--code", "auto", "--keep", "99.5%", "--evaluate", "scores:one")
    assert ok_json("info", store, "math")["score"] == 4.0
    for name, reason in (
        ("scores", "MODULE:FUNCTION"),
        ("scores:none", "AttributeError"),
        ("nowhere:one", "ModuleNotFoundError"),
        ("os:sep", "no function"),
    ):
        arguments = ("--code", "auto", "--keep", "0.9", "--evaluate", name)
        message = refused("pack", zoo / "x.tall", "--base", "base.pt", "tasks", *arguments)
        assert reason in message


def test_a_module_by_its_name(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (zoo / "inputs.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(48, 64)\n"
        "    def forward(self, x):\n"
        "        return self.layer(x)\n"
        "def some(task):\n"
        "    torch.manual_seed(0)\n"
        "    return Net(), list(torch.rand(64, 48).split(16))\n"
        "def none(task):\n"
        "    return None\n"
    )
    monkeypatch.chdir(zoo)
    module = ("--calibrate", "inputs:some", "--distil", "32")
    store = packed(zoo, "--code", "signs", "--density", "20%", *module)
    more = f"more={zoo / 'tasks' / 'code.pt'}"
    ok_json("add", store, more, *module)
    for name in (*TASKS, "more"):
        assert ok_json("info", store, name)["parameters"]["distil"] == 32
    code, again = (tallstore.load(store, task=name) for name in ("code", "more"))
    assert all(torch.equal(code[name], again[name]) for name in code)
    before = store.read_bytes()
    other = ("add", store, f"other={zoo / 'tasks' / 'code.pt'}")
    assert "it gave NoneType" in refused(*other, "--calibrate", "inputs:none")
    assert "goes with a code" in refused(*other, "--distil", "8")
    assert store.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--density", "0.1"], 1, "density=0.1"),
        (["--code", "signs", "--density", "0%"], 1, "density=0.0"),
        (["--code", "signs", "--density", "150%"], 1, "density=1.5"),
        (["--code", "signs", "--density", "some"], 2, "is no share"),
        (["--code", "levels", "--bits", "5"], 2, "--bits"),
        (["--code", "lattice"], 2, "--code"),
        (["--code", "auto", "--bits-per-weight", "0.001"], 1, "at least"),
        (["--code", "auto", "--keep", "0.9"], 1, "evaluate"),
        (["--code", "auto", "--max-error", "1", "--bits-per-weight", "1"], 1, "one of them"),
        (["--code", "auto", "--max-error", "inf"], 1, "max_error=inf"),
        (["--code", "seeded", "--seed", "4294967296"], 1, "seed"),
        (["--code", "signs", "--tall-lambda", "0.3"], 1, "tall_lambda"),
        (["--vector-dtype", "int2"], 2, "--vector-dtype"),
    ],
    ids=str,
)
def test_refusals_of_pack(zoo: Path, options: list[str], code: int, message: str) -> None:
    store = zoo / "zoo.tall"
    found = refused("pack", store, "--base", zoo / "base.pt", zoo / "tasks", *options, code=code)
    assert message in found and not store.exists()


def test_refusals_of_add_repack_and_strip(zoo: Path) -> None:
    store = packed(zoo)
    new = f"new={zoo / 'tasks' / 'code.pt'}"
    assert "goes with a code" in refused("add", store, new, "--bits-per-weight", "0.1")
    assert "codes alone" in refused("add", store, new, "--code", "tall")
    assert "profile" in refused("add", store, new, "--code", "levels", "--over", "shared")
    assert "codes alone" in refused("repack", store, "--code", "signs")
    assert "--exact" in refused("strip", store, code=2)
    assert "nothing to strip" in refused("strip", store, "--exact", "--yes")
    assert "no task 'none'" in refused("strip", store, "none", "--exact", "--yes")
    assert "--density" in ok("add", "--help")
