"""``tallstore stats``: what it prints is what the library counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_helpers import TASKS, make_store, make_zoo, ok, ok_json, process, refused

import tallstore
from tallstore import api


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(make_zoo(tmp_path))


def test_tables(store: Path) -> None:
    with tallstore.open(store) as opened:
        found = opened.statistics()
    text = ok("stats", store)
    lines = text.splitlines()
    assert lines[:2] == ["Tasks", "task  no.  coded   used  density  selfish"]
    task = found.tasks["math"]
    row = f"math    2  3,136  {task.ones:,}     {task.density:.2f}   {100 * task.selfish:.1f} %"
    assert row in lines
    assert any(line.startswith("法律    3  3,136") for line in lines)
    weights, share = found.use.histogram[0], 100 * (found.use.catastrophic or 0)
    assert any(
        line.split() == ["0", "(catastrophic)", f"{weights:,}", f"{share:.1f}", "%"]
        for line in lines
    )
    assert f"{found.jaccard[0][1]:.2f}" in text
    assert "Overlap of masks" in text and "Cosines" not in text and "tensor" not in text
    assert text.endswith("3,136 weights that at least one task codes.\n")
    assert max(map(len, lines)) <= 80
    assert "at least one" not in ok("stats", store, "-q")


def test_per_tensor_and_cosines(store: Path) -> None:
    text = ok("stats", store, "--per-tensor", "--cosine")
    rows = [line.split()[-1] for line in text.splitlines() if line]
    assert rows.count("layer.weight") == rows.count("layer.bias") == 2
    assert "Cosines between task vectors, of originals" in text


def test_cosines_say_that_they_are_of_reconstructions(tmp_path: Path) -> None:
    store = make_store(make_zoo(tmp_path), exact=False)
    assert "of reconstructions from masks" in ok("stats", store, "--cosine")


def test_json_is_what_the_library_gives(store: Path) -> None:
    with tallstore.open(store) as opened:
        wanted = opened.statistics(cosine=True).to_json()
    facts = ok_json("stats", store, "--cosine", "--per-tensor")
    assert facts.pop("store") == str(store)
    assert facts == wanted
    assert list(facts["tasks"]) == list(TASKS)
    less = ok_json("stats", store)
    assert "tensors" not in less and less["layers"] == wanted["layers"]
    assert less["cosine"] is None


def test_some_tasks(store: Path) -> None:
    facts = ok_json("stats", store, "--tasks", "法律, code")
    assert list(facts["tasks"]) == ["法律", "code"] and len(facts["histogram"]) == 3
    one = ok("stats", store, "--tasks", "math")
    assert "Overlap" not in one and "2  " not in one.split("Layers")[0].split("used by")[1]


def test_tasks_without_masks_are_named(store: Path, tmp_path: Path) -> None:
    ok("add", store, f"late={tmp_path / 'tasks' / 'math.pt'}")
    assert "Left out, since they have no masks: late." in ok("stats", store)
    assert ok_json("stats", store)["without_masks"] == ["late"]
    message = refused("stats", store, "--tasks", "math,late")
    assert "'late' has no masks" in message and "leave it out" in message


def test_refusals(store: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.tall"
    api.save({"w": torch.ones(4)}, plain)
    message = refused("stats", plain)
    assert "no masks here" in message and "tallstore pack" in message
    assert "there are 'code', 'math', '法律'" in refused("stats", store, "--tasks", "code,maths")
    assert "none twice" in refused("stats", store, "--tasks", "code,code")
    for wrong in ("code,,math", "", ","):
        assert "commas" in refused("stats", store, "--tasks", wrong, code=2)
    assert "nowhere.tall" in refused("stats", tmp_path / "nowhere.tall")


def test_names_that_would_act_on_a_terminal(tmp_path: Path) -> None:
    base = {"a\x1b[2J.weight": torch.randn(9, 9)}
    task = {name: weight + torch.randn(9, 9) for name, weight in base.items()}
    api.pack(tmp_path / "z.tall", base, {"t": task})
    done = process("stats", tmp_path / "z.tall", "--per-tensor")
    assert done.returncode == 0 and "\x1b" not in done.stdout
    assert r"a\x1b[2J.weight" in done.stdout
