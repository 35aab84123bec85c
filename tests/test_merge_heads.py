"""What tasks have of their own, or in another shape, when a store is merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same
from merge_helpers import Flat, headed, packed, zoo
from safetensors.torch import load_file
from zoo import bits, fine_tune, make_base

import tallstore

# -- heads, buffers, files ----------------------------------------------------------------


def test_heads_that_differ_are_to_be_chosen(tmp_path: Path) -> None:
    path, base, tasks = headed(tmp_path)
    merged = Flat(base, tasks).merge(base, "ta", list(tasks), 0.3)
    with pytest.raises(tallstore.errors.OptionError) as caught:
        tallstore.merge(path, alpha=0.3)
    message = str(caught.value)
    assert "'classifier.weight' ([2, 5] in 't0', [3, 5] in 't1', [4, 5] in 't2')" in message
    assert "--private): 't0', 't1', 't2', or 'base'" in message and "\n" not in message
    plain = tallstore.merge(path, tmp_path / "plain", alpha=0.3, private="base")
    assert plain.layout is None
    state = load_file(tmp_path / "plain" / "model.safetensors")
    assert_same(dict(sorted(state.items())), dict(sorted(merged.items())))
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == {"name": "base"}
    for name in tasks:
        made = tallstore.merge(path, tmp_path / name, alpha=0.3, private=name)
        assert made.layout == name
        assert sorted(p.name for p in made.files) == [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
        ]
        state = load_file(tmp_path / name / "model.safetensors")
        heads = {n: w for n, w in tasks[name].items() if n.startswith("classifier")}
        assert_same(dict(sorted(state.items())), dict(sorted({**merged, **heads}.items())))
        assert json.loads((tmp_path / name / "config.json").read_text()) == {"name": name}


def test_heads_need_no_choice_where_there_is_none(tmp_path: Path) -> None:
    path, _, tasks = headed(tmp_path)
    assert tallstore.merge(path, tasks=["t1"], alpha=0.5).layout == "t1"
    for state in tasks.values():
        state["classifier.weight"] = torch.ones(3, 5)
    same = packed(tmp_path / "same.tall", make_base(3), tasks)
    merge = tallstore.merge(same, tasks=["t2", "t0"], alpha=0.5)
    assert merge.layout == "t2"
    assert torch.equal(merge.state["classifier.weight"], torch.ones(3, 5))
    tasks["t0"]["classifier.weight"][0, 0] = 2
    other = packed(tmp_path / "other.tall", make_base(3), tasks)
    with pytest.raises(tallstore.errors.OptionError, match=r"\[3, 5\], other values"):
        tallstore.merge(other, tasks=["t2", "t0"], alpha=0.5)
    assert tallstore.merge(other, tasks=["t2", "t1"], alpha=0.5).layout == "t2"


def test_buffers_are_those_of_the_layout(tmp_path: Path) -> None:
    base, tasks = zoo()
    tasks["t1"]["positions"] = torch.arange(11) + 5
    path = packed(tmp_path / "z.tall", base, tasks)
    for private, expected in ((None, base), ("base", base), ("t1", tasks["t1"])):
        merge = tallstore.merge(path, alpha=0.5, private=private)
        assert torch.equal(merge.state["positions"], expected["positions"])


def test_what_is_not_finite_counts_as_unmoved(tmp_path: Path) -> None:
    base, tasks = zoo()
    tasks["t1"]["layers.0.bias"][2] = float("nan")
    path = packed(tmp_path / "z.tall", base, tasks)
    merge = tallstore.merge(path, alpha=0.5)
    assert merge.notes == ("t1: 'layers.0.bias' counted as unmoved: not finite, or not tied",)
    still = {**tasks["t1"], "layers.0.bias": base["layers.0.bias"]}
    expected = Flat(base, {**tasks, "t1": still}).merge(base, "ta", list(tasks), 0.5)
    assert_same(merge.state, expected)


def test_tasks_of_another_dtype(tmp_path: Path) -> None:
    base = make_base(3)
    tasks = {f"t{n}": fine_tune(base, n, dtype=torch.bfloat16, step=0.05) for n in range(2)}
    path = packed(tmp_path / "z.tall", base, tasks)
    merged = Flat(base, tasks).merge(base, "ta", list(tasks), 0.5)
    assert_same(tallstore.merge(path, alpha=0.5).state, merged)
    like = tallstore.merge(path, alpha=0.5, private="t0").state
    for name, tensor in merged.items():
        expected = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert bits(like[name]) == bits(expected), name
    assert_same(tallstore.merge(path, tasks=["t1"], alpha=1).state, tasks["t1"])
    plain = tallstore.merge(path, tasks=["t1"], alpha=1, private="base").state
    assert torch.equal(plain["embed.weight"], tasks["t1"]["embed.weight"].float())


def test_tied_weights_and_resized_embeddings(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    shared = torch.randn(300, 8, generator=draw)
    base = {"embed": shared, "lm_head": shared, "w": torch.randn(9, generator=draw)}
    tasks = {}
    for n in range(2):
        grown = torch.cat([shared + 0.1 * (n + 1), torch.full((2, 8), float(n))])
        tasks[f"t{n}"] = {"embed": grown, "lm_head": grown, "w": base["w"] + n}
    path = packed(tmp_path / "z.tall", base, tasks)
    like = tallstore.merge(path, alpha=0.5, private="t1").state
    step = (tasks["t0"]["embed"][:300] - shared) + (tasks["t1"]["embed"][:300] - shared)
    assert torch.equal(like["embed"][:300], shared + 0.5 * step)
    assert torch.equal(like["embed"][300:], torch.full((2, 8), 1.0))
    assert like["embed"].data_ptr() == like["lm_head"].data_ptr()
    plain = tallstore.merge(path, alpha=0.5, private="base").state
    assert torch.equal(plain["embed"], shared + 0.5 * step)
    assert plain["embed"].data_ptr() == plain["lm_head"].data_ptr()


def test_rows_of_other_heads_are_not_merged(tmp_path: Path) -> None:
    """Of a difference from the base's head, which has other classes, none is taken."""
    base, tasks = zoo()
    for n, state in enumerate(tasks.values()):
        state["head.weight"] = torch.full((5, 65), float(n + 1))
    tallstore.save(base, tmp_path / "z.tall")
    tallstore.add(tmp_path / "z.tall", tasks)
    with tallstore.open(tmp_path / "z.tall") as store:
        assert (
            store.describe("t0").kept(
                next(t for t in store.tensors("t0") if t.name == "head.weight")
            )
            == "coded, own"
        ), "nothing is shown"
    heads = {name: {**state, "head.weight": base["head.weight"]} for name, state in tasks.items()}
    expected = Flat(base, heads).merge(base, "varm", list(tasks), 0.5)
    options: dict[str, Any] = {"rule": "varm", "alpha": 0.5}
    assert_same(tallstore.merge(tmp_path / "z.tall", private="base", **options).state, expected)
    like = {**expected, "head.weight": tasks["t1"]["head.weight"]}
    assert_same(tallstore.merge(tmp_path / "z.tall", private="t1", **options).state, like)
    tallstore.merge(tmp_path / "z.tall", as_task="merged", private="t1", **options)
    assert_same(tallstore.load(tmp_path / "z.tall", task="merged"), like)
    alone = tallstore.merge(tmp_path / "z.tall", tasks=["t2"], alpha=1).state
    assert_same(alone, tasks["t2"])


def test_untied_weights_are_left_as_the_layout_has_them(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    shared = torch.randn(300, 8, generator=draw)
    base = {"embed": shared, "lm_head": shared.view(300, 8)}
    tasks = {f"t{n}": {"embed": shared + n + 1, "lm_head": shared - n - 1} for n in range(2)}
    path = packed(tmp_path / "z.tall", base, tasks)
    merge = tallstore.merge(path, alpha=0.5)
    assert merge.notes[0] == "t0: 'lm_head' counted as unmoved: not finite, or not tied"
    step = (tasks["t0"]["embed"] - shared) + (tasks["t1"]["embed"] - shared)
    assert torch.equal(merge.state["embed"], shared + 0.5 * step)
    assert merge.state["embed"].data_ptr() == merge.state["lm_head"].data_ptr()
    like = tallstore.merge(path, alpha=0.5, private="t1").state
    assert torch.equal(like["embed"], merge.state["embed"])
    assert torch.equal(like["lm_head"], tasks["t1"]["lm_head"])
