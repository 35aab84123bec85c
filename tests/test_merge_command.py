"""``tallstore merge``: what it makes, prints and refuses."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from cli_helpers import TASKS, make_store, make_zoo, ok, ok_json, refused, run
from helpers import assert_same
from safetensors.torch import load_file

import tallstore
from tallstore.cli import printing
from tallstore.cli.merge import RULE_NAMES
from tallstore.cli.pack import MASKLESS
from tallstore.cli.root import root
from tallstore.merging import RULES, merge_rule


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(make_zoo(tmp_path))


def test_the_command_knows_every_rule_and_option() -> None:
    assert tuple(RULES) == RULE_NAMES
    assert tuple(name for name in RULES if not merge_rule(name).masks) == MASKLESS
    options = {p.name for p in root.commands["merge"].params if isinstance(p, click.Option)}
    assert {option for recipe in RULES.values() for option in recipe.options} <= options
    for recipe in RULES.values():
        found = inspect.signature(recipe.make).parameters
        assert set(recipe.options) <= found.keys()
        assert all(found[name].default is not inspect.Parameter.empty for name in recipe.options)


def test_a_file(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    text = ok(
        *("merge", store, out, "--rule", "consensus-ties", "--k", 2, "--alpha", 0.4),
        *("--private", "base", "--tasks", "math,code"),
    )
    start = "consensus-ties, keep 0.2, k 2, alpha 0.4, of 2 tasks -> "
    assert text.startswith(start) and text.endswith("from the exact tier\n")
    assert "1 file, " in text and text.count("\n") == 1
    expected = tallstore.merge(
        store, rule="consensus-ties", k=2, alpha=0.4, private="base", tasks=["math", "code"]
    )
    state = load_file(out)
    assert state.keys() == expected.state.keys()
    for name, tensor in expected.state.items():
        assert torch.equal(state[name], tensor)


def test_a_model_directory_of_shards_in_json(store: Path, tmp_path: Path) -> None:
    args = ("merge", store, tmp_path / "out", "--rule", "sce", "--select", "0.5")
    found = ok_json(*args, "--private", "math", "--max-shard-size", "8kB")
    assert (found["rule"], found["alpha"], found["parameters"]) == ("sce", 1.0, {"select": 0.5})
    assert (found["layout"], found["vectors"], found["task"]) == ("math", "exact", None)
    assert found["tasks"] == list(TASKS) and found["notes"] == []
    assert found["store"] == str(store) and found["out"] == str(tmp_path / "out")
    assert {Path(f["path"]).stat().st_size for f in found["files"]} == {
        f["bytes"] for f in found["files"]
    }
    assert len(found["files"]) == 3 and (tmp_path / "out/model.safetensors.index.json").is_file()


def test_as_a_task(store: Path) -> None:
    args = ("merge", store, "--as-task", "both", "--rule", "ties", "--private", "code")
    text = ok(*args, "--alpha", 0.3)
    assert text.startswith("ties, keep 0.2, alpha 0.3, of 3 tasks -> task both of ")
    tasks = list(TASKS)
    expected = tallstore.merge(store, rule="ties", alpha=0.3, private="code", tasks=tasks).state
    assert_same(tallstore.load(store, task="both"), expected)
    assert "give another name" in refused(*args, "--tasks", "math", "--alpha", 0.5)
    ok(*args, "--tasks", "math,code", "--alpha", 0.5, "--overwrite", "--yes")
    expected = tallstore.merge(
        store, rule="ties", alpha=0.5, private="code", tasks=["math", "code"]
    ).state
    assert_same(tallstore.load(store, task="both"), expected)


def test_options_reach_the_rules(store: Path, tmp_path: Path) -> None:
    for rule, given in {
        "average": ["--weights", "code=1,math=3"],
        "ties": ["--keep", "0.5"],
        "breadcrumbs": ["--beta", "0.5", "--gamma", "0.1"],
        "dare": ["--drop", "0.5", "--seed", "3"],
    }.items():
        args = ("merge", store, tmp_path / f"{rule}.safetensors", "--rule", rule, *given)
        found = ok_json(*args, "--tasks", "code,math", "--private", "base")["parameters"]
        made = merge_rule(rule, **_typed(given))
        assert found == json.loads(json.dumps(dict(made.parameters()), default=dict))


def _typed(given: list[str]) -> dict[str, Any]:
    pairs = zip(given[::2], given[1::2], strict=True)
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name == "--weights":
            found["weights"] = {"code": 1.0, "math": 3.0}
        else:
            found[name[2:]] = int(value) if name == "--seed" else float(value)
    return found


def test_remarks_go_to_stderr(tmp_path: Path) -> None:
    store = make_store(make_zoo(tmp_path), exact=False)
    args = ("merge", store, tmp_path / "a.safetensors", "--private", "base")
    shown = run(*args)
    assert shown.exit_code == 0, shown.output
    assert "note: merged from the stored shared vector (ta, bfloat16)" in shown.stderr
    assert "note: alpha 0.3, a common choice for sums" in shown.stderr
    assert shown.stdout.endswith(", from the stored shared vector\n")
    shown = run("merge", store, tmp_path / "b.safetensors", "--rule", "ties", *args[3:], "-q")
    assert shown.stderr == "" and shown.stdout.endswith("from masks alone, an approximation\n")


def test_what_is_there_stays(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "m.safetensors"
    out.write_text("precious")
    args = ("merge", store, out, "--private", "base", "--alpha", "0.4")
    assert "there already" in refused(*args)
    assert "give --yes" in refused(*args, "--overwrite")
    monkeypatch.setattr(printing, "interactive", lambda: True)
    assert run(*args, "--overwrite", input="n\n").exit_code == 1
    assert out.read_text() == "precious"
    assert run(*args, "--overwrite", input="y\n").exit_code == 0
    assert set(load_file(out)) == {"layer.weight", "layer.bias", "steps"}


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--rule", "ta", "--k", "2"], "'ta' takes no k"),
        (["--rule", "consensus-ta", "--k", "-1"], "k=-1: a whole number"),
        (["--alpha", "0"], "alpha=0.0: finite numbers above 0"),
        (["--alpha", "nan"], "alpha=nan"),
        (["--rule", "breadcrumbs", "--beta", "0.9", "--gamma", "0.5"], "together below 1"),
        (["--rule", "average", "--weights", "code=1"], "no weight for 'math'"),
        (["--tasks", "code,maths"], "no task 'maths'; there are 'code', 'math'"),
        (["--tasks", "code,code"], "'code' is named twice"),
        (["--private", "maths"], "private='maths' is no task"),
        ([], "the tasks differ in what no rule merges: 'head' ([2, 64], other values); choose"),
    ],
)
def test_refusals(store: Path, tmp_path: Path, args: list[str], part: str) -> None:
    private = [] if not args or "--private" in args else ["--private", "base"]
    assert part in refused("merge", store, tmp_path / "out", *args, *private)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["merge"], "Missing argument 'STORE'"),
        (["merge", "a.tall"], "Give either OUT or --as-task"),
        (["merge", "a.tall", "out", "--as-task", "b"], "Give either OUT or --as-task"),
        (["merge", "a.tall", "out", "--rule", "mean"], "'mean'"),
        (["merge", "a.tall", "out", "--k", "two"], "'two'"),
        (["merge", "a.tall", "out", "--tasks", ","], "name tasks"),
        (["merge", "a.tall", "out", "--weights", "a"], "'a' is no weight"),
        (["merge", "a.tall", "out", "--weights", "a=x"], "'a=x' is no weight"),
        (["pack", "a.tall", "b=c", "--base", "b", "--merge", "consensus-ta"], "'consensus-ta'"),
    ],
)
def test_wrong_usage(args: list[str], part: str) -> None:
    assert part in refused(*args, code=2)


def test_packing_takes_the_rules_too(store: Path) -> None:
    new = store.parent / "new.tall"
    ok("pack", new, store.parent / "tasks", "--base", store.parent / "base.pt", "--merge", "varm")
    assert ok_json("info", new)["vector"]["rule"] == "varm"
