"""``tallstore switch-bench``: a table of a user's own zoo."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import TASKS, make_store, make_zoo, ok, ok_json, refused


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(make_zoo(tmp_path_factory.mktemp("zoo")))


def test_the_table(store: Path) -> None:
    lines = ok("switch-bench", store, "--repeats", 2).splitlines()
    assert lines[0].split() == [
        "task",
        "switch",
        "slowest",
        "first",
        "hits",
        "moved",
        "load",
        "faster",
    ]
    assert [line.split()[0] for line in lines[1:4]] == list(TASKS)
    assert all(" ms" in line and "2/2" in line for line in lines[1:4])
    assert "on cpu beside the model: base" in lines[4]


def test_json(store: Path) -> None:
    found = ok_json("switch-bench", store, "--codes", "--tasks", "math", "--repeats", 1)
    (task,) = found["tasks"]
    assert task["task"] == "math" and task["hits"] == 1 and task["moved_bytes"] > 0
    assert task["switch_ms"] > 0 < task["load_ms"] and found["vector_bytes"] > 0
    assert (found["device"], found["resident"], found["repeats"]) == ("cpu", "all", 1)


def test_codes_in_the_store(store: Path) -> None:
    found = ok_json("switch-bench", store, "--resident", "stream", "--budget", "1B")
    assert [task["hits"] for task in found["tasks"]] == [0, 0, 0]


def test_refusals(store: Path, tmp_path: Path) -> None:
    assert "no task 'z'" in refused("switch-bench", store, "--tasks", "z")
    assert "budget=1: resident='all' takes" in refused("switch-bench", store, "--budget", "1B")
    assert "no such store" in refused("switch-bench", tmp_path / "none.tall")
    refused("switch-bench", store, "--repeats", 0, code=2)
    refused("switch-bench", store, "--resident", "some", code=2)
