"""Merging what a store holds: against plain code over whole vectors, and at its ends to the bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import assert_same
from naive_merging import NAIVE
from safetensors.torch import load_file, save_file
from zoo import State, bits, fine_tune, make_base

import tallstore
from tallstore import layout as layout_module
from tallstore import workers as workers_module
from tallstore.engine.keys import chunk_key
from tallstore.layout import lay_out
from tallstore.mergestream import stored as stored_module
from tallstore.merging import RULES, Consensus, TaskArithmetic, Ties, merge_rule
from tallstore.specs import SegmentSpec

Floats = npt.NDArray[np.float32]
LAMBDA = 0.4


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of 1024 weights, so that a small model has several, and rows that they cut."""
    monkeypatch.setattr(layout_module, "SPAN", 1024)


def zoo(dtype: torch.dtype = torch.float32, tasks: int = 3) -> tuple[State, dict[str, State]]:
    base = make_base(3, dtype)
    return base, {f"t{n}": fine_tune(base, n, step=0.02 * (n + 1)) for n in range(tasks)}


def packed(path: Path, base: Any, tasks: Any, **options: Any) -> Path:
    tallstore.pack(path, base, tasks, tall_lambda=LAMBDA, **{"exact": True, **options})
    return path


# -- the plain twin -----------------------------------------------------------------------


class Flat:
    """A model's floating weights as one vector, and what rules take beside it."""

    def __init__(self, base: State, tasks: Mapping[str, State]) -> None:
        self.names = [name for name, tensor in base.items() if tensor.is_floating_point()]
        self.base = self._flat(base)
        self.vectors = np.stack([self._flat(state) - self.base for state in tasks.values()])
        self.tuned = np.stack([self._flat(state) for state in tasks.values()])
        places, stop = [], 0
        layout = lay_out([SegmentSpec("float32", base[name].numel()) for name in self.names])
        self.tensors = []
        for name, place in zip(self.names, layout.places, strict=True):
            count = base[name].numel()
            places.append(np.arange(place.offset, place.offset + count))
            self.tensors.append((slice(stop, stop + count), tuple(base[name].shape)))
            stop += count
        self.places = np.concatenate(places)

    def _flat(self, state: State) -> Floats:
        found = torch.cat([state[name].reshape(-1).float() for name in self.names])
        return found.numpy()

    def masks(self, vector: str) -> Any:
        """TALL masks for the vector as it is stored, in bfloat16."""
        merged = NAIVE[vector](self.vectors)
        rounded = torch.from_numpy(merged).bfloat16().float().numpy()
        away = np.abs((self.base + rounded) - self.tuned) * np.float32(LAMBDA)
        return np.abs(self.base - self.tuned) > away

    def merge(self, base: State, rule: str, names: list[str], alpha: float, **more: Any) -> State:
        """base + alpha * v in float32, rounded once."""
        merged = NAIVE[rule](
            self.vectors, tensors=self.tensors, names=names, places=self.places, **more
        )
        step = merged * np.float32(alpha)
        whole = torch.from_numpy(self.base + step)
        found = dict(base)
        for name, (place, shape) in zip(self.names, self.tensors, strict=True):
            rounded = whole[place].reshape(shape).to(base[name].dtype)
            still = torch.from_numpy(step[place] == 0).reshape(shape)
            found[name] = torch.where(still, base[name], rounded)
        return found


@pytest.mark.usefixtures("spans")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_rule_against_its_plain_twin(tmp_path: Path, dtype: torch.dtype) -> None:
    base, tasks = zoo(dtype)
    stores = {v: packed(tmp_path / f"{v}.tall", base, tasks, merge=v) for v in ("ta", "ties")}
    flat = Flat(base, tasks)
    for rule in RULES:
        vector = "ties" if rule.endswith("ties") else "ta"
        merge = tallstore.merge(stores[vector], rule=rule, alpha=0.7)
        expected = flat.merge(base, rule, list(tasks), 0.7, masks=flat.masks(vector))
        assert_same(merge.state, expected)
        assert (merge.rule, merge.alpha, merge.tasks) == (rule, 0.7, tuple(tasks))
        assert (merge.vectors, merge.layout, merge.notes) == ("exact", None, ())
        assert merge.k == (2 if rule.startswith("consensus") else None)
        differing = [n for n in flat.names if bits(base[n]) != bits(expected[n])]
        assert len(differing) >= (1 if rule == "sce" else 4), "nothing was merged"


@pytest.mark.usefixtures("spans")
def test_the_vector_that_packing_stores_is_the_one_that_merging_takes(tmp_path: Path) -> None:
    """The same objects over checkpoints and over a store give the same bits."""
    base, tasks = zoo()
    for rule in RULES:
        if merge_rule(rule).masks:
            continue
        path = packed(tmp_path / f"{rule}.tall", base, tasks, merge=rule, vector_dtype="float32")
        merge = tallstore.merge(path, rule=rule, alpha=1.0).state
        with tallstore.open(path) as store:
            assert store.vector is not None and store.vector.rule == rule
            raw = []
            for number in store.vector.streams:
                if number:
                    stream = store._held().stream(number)
                    raw.append(np.empty(stream.raw, np.uint8))
                    store._held().read(stream, 0, raw[-1])
        vector = np.concatenate(raw).view(np.float32)[Flat(base, tasks).places]
        flat = Flat(base, tasks)
        found = np.concatenate([merge[n].reshape(-1).numpy() for n in flat.names])
        expected = np.where(vector == 0, flat.base, flat.base + vector)
        np.testing.assert_array_equal(found, expected)


def test_cores_show_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "SPAN", 1024)
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    found = []
    for cores in (1, 4, 16):
        monkeypatch.setattr(workers_module, "cores", lambda cores=cores: cores)
        monkeypatch.setattr(stored_module, "cores", lambda cores=cores: cores)
        rules = ("ties", "consensus-ta", "breadcrumbs", "breadcrumbs-rows", "sce", "dare")
        found.append({rule: tallstore.merge(path, rule=rule).state for rule in rules})
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


# -- at its ends --------------------------------------------------------------------------


def odd_zoo() -> tuple[State, dict[str, State]]:
    """Zeros of both signs, subnormals, and weights so apart that float32 sums round."""
    draw = torch.Generator().manual_seed(5)
    base = {"w": torch.randn(50, 60, generator=draw), "n": torch.arange(4)}
    base["w"][0, :6] = torch.tensor([-0.0, 0.0, -0.0, 0.0, 1e-45, -1e-45])
    tuned = base["w"] * (1 + 1e3 * torch.randn(50, 60, generator=draw))
    tuned[0, :6] = torch.tensor([0.0, -0.0, -0.0, 0.0, -0.0, 1e30])
    other = base["w"] + 0.1 * torch.randn(50, 60, generator=draw)
    return base, {"one": {"w": tuned, "n": base["n"]}, "two": {"w": other, "n": base["n"]}}


@pytest.mark.parametrize("inner", ["ta", "ties"])
def test_consensus_ends_in_its_rule_and_in_the_base(tmp_path: Path, inner: str) -> None:
    base, tasks = odd_zoo()
    path = packed(tmp_path / "z.tall", base, tasks, merge=inner)
    plain = tallstore.merge(path, rule=inner, alpha=0.4).state
    assert_same(tallstore.merge(path, rule=f"consensus-{inner}", k=0, alpha=0.4).state, plain)
    above = tallstore.merge(path, rule=f"consensus-{inner}", k=3, alpha=0.4)
    assert_same(above.state, base)
    assert above.notes == ("k 3 of 2 tasks: the merge is the base",)
    within = tallstore.merge(path, rule=f"consensus-{inner}", k=2, alpha=0.4).state
    assert bits(within["w"]) not in (bits(plain["w"]), bits(base["w"]))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "masks"])
@pytest.mark.parametrize("task", ["one", "two"])
def test_one_task_with_alpha_1_is_that_task(tmp_path: Path, task: str, exact: bool) -> None:
    base, tasks = odd_zoo()
    path = packed(tmp_path / "z.tall", base, tasks, exact=exact)
    expected = tallstore.load(path, task=task)
    if exact:
        assert_same(expected, tasks[task])
        wrong = base["w"] + (tasks["one"]["w"] - base["w"])
        assert bits(wrong) != bits(tasks["one"]["w"]), "float32 sums happen not to round here"
    for rule in ("ta", "average", "varm", Ties(keep=1.0), merge_rule("sce", select=1.0)):
        assert_same(tallstore.merge(path, rule=rule, tasks=[task], alpha=1).state, expected)
    assert_same(
        tallstore.merge(
            path, rule=Consensus(inner=TaskArithmetic(), k=0), tasks=[task], alpha=1
        ).state,
        expected,
    )
    half = tallstore.merge(path, tasks=[task], alpha=0.5).state
    assert bits(half["w"]) != bits(expected["w"])


def test_weights_that_no_task_moved_are_the_bases_bits(tmp_path: Path) -> None:
    base = {"w": torch.linspace(-1, 1, 4000), "nan": torch.linspace(-1, 1, 100)}
    base["nan"][3] = torch.tensor(0x7FA00001, dtype=torch.int32).view(torch.float32)
    base["w"][7] = -0.0
    tasks = {f"t{n}": {k: w.clone() for k, w in base.items()} for n in range(2)}
    tasks["t0"]["w"][100:200] += 1
    path = packed(tmp_path / "z.tall", base, tasks)
    merged = tallstore.merge(path, rule="ta", alpha=0.5).state
    assert_same(merged["nan"], base["nan"])
    assert bits(merged["w"][:100]) == bits(base["w"][:100])
    assert torch.equal(merged["w"][100:200], base["w"][100:200] + 0.5)


def test_sums_that_overflow_stay_finite(tmp_path: Path) -> None:
    for dtype, top in ((torch.float16, 65504.0), (torch.float32, 3.4028234663852886e38)):
        base = {"w": torch.zeros(16, dtype=dtype)}
        tasks = {f"t{n}": {"w": torch.full((16,), 0.9 * top, dtype=dtype)} for n in range(2)}
        path = packed(tmp_path / f"{dtype}.tall", base, tasks)
        merged = tallstore.merge(path, alpha=1).state["w"]
        assert torch.equal(merged, torch.full((16,), top, dtype=dtype))


# -- masks alone --------------------------------------------------------------------------


def test_the_stored_vector_stands_in_for_what_masks_cannot_tell(tmp_path: Path) -> None:
    base, tasks = zoo()
    flat = Flat(base, tasks)
    rounded = torch.from_numpy(NAIVE["ta"](flat.vectors)).bfloat16().float().numpy()
    path = packed(tmp_path / "z.tall", base, tasks, exact=False)
    for rule, alpha, expected in (
        ("ta", 0.4, rounded * np.float32(0.4)),
        ("average", 1.0, rounded / np.float32(3)),
        ("consensus-ta", 0.4, np.where(flat.masks("ta").sum(0) >= 2, rounded, 0) * np.float32(0.4)),
    ):
        merge = tallstore.merge(path, rule=rule, alpha=alpha)
        assert merge.vectors == "shared vector"
        assert "merged from the stored shared vector (ta, bfloat16)" in merge.notes[0]
        found = np.concatenate([merge.state[n].reshape(-1).numpy() for n in flat.names])
        np.testing.assert_array_equal(
            found, np.where(expected == 0, flat.base, flat.base + expected)
        )


def test_otherwise_masks_are_taken_at_their_word(tmp_path: Path) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks, exact=False)
    tallstore.add(path, {"late": fine_tune(base, 9)})
    loaded = {name: tallstore.load(path, task=name) for name in (*tasks, "late")}
    for rule, names, kind in (
        ("ties", ["t0", "t1", "t2"], "masks"),  # the stored vector is of another rule
        ("ta", ["t1", "t0"], "masks"),  # ... of other tasks
        ("ta", ["t0", "late"], "exact and masks"),
        ("average", ["late"], "exact"),
    ):
        merge = tallstore.merge(path, rule=rule, tasks=names, alpha=0.5)
        assert merge.vectors == kind
        lossy = [name for name in names if name != "late"]
        assert [n for n in merge.notes if "masks alone, which are lossy" in n] == [
            f"task vectors of {', '.join(lossy)} come from masks alone, which are lossy; pack with "
            "exact=True (--exact) to merge from the originals"
        ] * bool(lossy)
        chosen = {name: loaded[name] for name in names}
        assert_same(merge.state, Flat(base, chosen).merge(base, rule, names, 0.5))


def test_masks_made_for_another_rules_vector_are_said_to_be(tmp_path: Path) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    (note,) = tallstore.merge(path, rule="consensus-ties", alpha=0.4).notes
    assert note.startswith("the masks were made for a vector of ta; the paper makes them for")


# -- heads, buffers, files ----------------------------------------------------------------


def headed(tmp_path: Path) -> tuple[Path, State, dict[str, State]]:
    """Tasks with heads that the base lacks, of shapes of their own; as model directories."""
    base, tasks = zoo()
    for n, state in enumerate(tasks.values()):
        state["classifier.weight"] = torch.full((n + 2, 5), float(n))
        state["classifier.bias"] = torch.zeros(2)
    for name, state in {"base": base, **tasks}.items():
        folder = tmp_path / "in" / name
        folder.mkdir(parents=True)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"name": name}))
        (folder / "tokenizer.json").write_text("{}")
    paths = {name: tmp_path / "in" / name for name in tasks}
    return packed(tmp_path / "z.tall", tmp_path / "in" / "base", paths), base, tasks


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


# -- where it goes ------------------------------------------------------------------------


@pytest.mark.usefixtures("spans")
def test_as_a_task_and_as_a_file_it_is_the_same(tmp_path: Path) -> None:
    path, _, tasks = headed(tmp_path)
    before = {name: tallstore.load(path, task=name) for name in tasks}
    options: dict[str, Any] = {"rule": "ties", "alpha": 0.4, "private": "t1"}
    state = tallstore.merge(path, **options).state
    made = tallstore.merge(path, tmp_path / "m.safetensors", **options)
    assert made.files == (tmp_path / "m.safetensors",) and made.task is None
    assert made.state is None
    stored = tallstore.merge(path, as_task="merged", **options)
    assert stored.task == "merged" and stored.files == ()
    loaded = tallstore.load(path, task="merged")
    assert loaded.keys() == state.keys() == load_file(tmp_path / "m.safetensors").keys()
    for name, tensor in load_file(tmp_path / "m.safetensors").items():
        assert bits(tensor) == bits(loaded[name]) == bits(state[name]), name
    with tallstore.open(path) as store:
        assert store.verify().ok
        assert store.tasks["merged"].exact and store.tasks["merged"].code == "none"
        assert list(store.tasks) == [*tasks, "merged"]
        store.unpack("merged", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"name": "t1"}
    for name, before_state in before.items():
        assert_same(tallstore.load(path, task=name), before_state)


def test_a_handle_shows_the_task_that_it_merged(tmp_path: Path) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    with tallstore.open(path, "a") as store:
        store.merge(as_task="merged", alpha=0.4)
        assert_same(store.load("merged"), store.merge(alpha=0.4, tasks=list(tasks)).state)
        store.merge(as_task="merged", alpha=0.2, tasks=list(tasks), overwrite=True)
        assert_same(store.load("merged"), store.merge(alpha=0.2, tasks=list(tasks)).state)


def test_shards_and_overwriting(tmp_path: Path) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    made = tallstore.merge(path, tmp_path / "out", alpha=0.4, max_shard_size=5_000)
    assert sum(p.suffix == ".safetensors" for p in made.files) > 1
    place = tmp_path / "m.safetensors"
    place.write_bytes(b"precious")
    with pytest.raises(tallstore.errors.StoreExistsError, match="there already"):
        tallstore.merge(path, place, alpha=0.4)
    assert place.read_bytes() == b"precious"
    tallstore.merge(path, place, alpha=0.4, overwrite=True)
    state = tallstore.merge(path, alpha=0.4).state
    assert all(bits(w) == bits(state[name]) for name, w in load_file(place).items())


# -- choosing -----------------------------------------------------------------------------


def test_evaluate_chooses_alpha_and_k(tmp_path: Path) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    wanted = tallstore.merge(path, rule="consensus-ta", alpha=0.6, k=3).state
    seen: list[State] = []

    def evaluate(state: State) -> float:
        seen.append(state)
        return -float((state["layers.0.weight"] - wanted["layers.0.weight"]).norm())

    merge = tallstore.merge(
        path, tmp_path / "m.safetensors", rule="consensus-ta", evaluate=evaluate
    )
    assert (merge.alpha, merge.k, merge.score) == (0.6, 3, 0.0)
    assert len(seen) == 30
    pairs = [(k, n / 10) for k in (1, 2, 3) for n in range(1, 11)]
    for (k, alpha), state in zip(pairs, seen, strict=True):
        assert_same(state, tallstore.merge(path, rule="consensus-ta", alpha=alpha, k=k).state)
    written = load_file(tmp_path / "m.safetensors")
    assert all(bits(written[n]) == bits(w) for n, w in wanted.items())


def test_the_first_of_equals_is_taken(tmp_path: Path) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    calls: list[Any] = []
    merge = tallstore.merge(path, alpha=(0.5, 0.2, 0.5), evaluate=lambda s: calls.append(s) or 1.0)
    assert (merge.alpha, merge.score, len(calls)) == (0.2, 1.0, 2)
    hopeless = tallstore.merge(path, alpha=(0.2, 0.5), evaluate=lambda _: float("-inf"))
    assert (hopeless.alpha, hopeless.score) == (0.2, float("-inf"))
    fixed = tallstore.merge(path, rule=Consensus(inner=TaskArithmetic(), k=3), evaluate=lambda _: 1)
    assert (fixed.k, fixed.alpha) == (3, 0.1)
    several = tallstore.merge(path, rule="consensus-ta", k=[2, 1], alpha=0.5, evaluate=lambda _: 1)
    assert several.k == 2


def test_what_evaluate_does_wrong_is_named(tmp_path: Path) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    with pytest.raises(
        tallstore.errors.OptionError, match=r"failed at ta, \{\}, alpha 0.1: KeyErr"
    ):
        tallstore.merge(path, evaluate=lambda state: state["absent"])
    with pytest.raises(tallstore.errors.OptionError, match="gave NaN at ta"):
        tallstore.merge(path, evaluate=lambda _: float("nan"))


# -- memory -------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models of 4 and of 40 spans take the same memory, a tensor over all of them."""
    monkeypatch.setattr(layout_module, "SPAN", 1 << 16)
    for module in (workers_module, stored_module):
        monkeypatch.setattr(module, "cores", lambda: 1)
    span = 4 << 16
    for rule in ("consensus-ties", "breadcrumbs-rows", "sce"):
        peaks = []
        for count in (4, 40):
            base = {"w": torch.randn(count << 8, 256), "v": torch.randn(100)}
            tasks = {n: {k: w + 0.01 for k, w in base.items()} for n in ("one", "two", "three")}
            path = packed(tmp_path / f"{rule}{count}.tall", base, tasks)
            del base, tasks
            tracemalloc.start()
            tallstore.merge(path, tmp_path / f"{rule}{count}.safetensors", rule=rule, alpha=0.5)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < peaks[0] + span, (rule, peaks)


def test_threads_are_as_many_as_memory_allows(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(stored_module, "cores", lambda: 64)
    base, tasks = zoo(tasks=2)
    path = packed(tmp_path / "z.tall", base, tasks)
    with tallstore.open(path) as store:
        document = store.describe("t0").task
        assert document is not None
        seen = {}
        for count in (1, 8, 20, 200):
            feed = stored_module.StoreFeed(
                store._held(),
                store.describe().base,
                {f"t{n}": document for n in range(count)},
                vector=store.vector,
            )
            seen[count] = feed.threads
    assert seen == {1: 9, 8: 6, 20: 4, 200: 1}


# -- bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"rule": "mean"}, "OptionError", "no merge rule is called 'mean'; there are ta, average"),
        ({"alpha": 0}, "OptionError", "alpha=0: finite numbers above 0"),
        ({"alpha": -0.3}, "OptionError", "alpha=-0.3"),
        ({"alpha": float("nan")}, "OptionError", "alpha=nan"),
        ({"alpha": float("inf")}, "OptionError", "alpha=inf"),
        ({"alpha": "0.4"}, "OptionError", "alpha='0.4'"),
        ({"alpha": []}, "OptionError", "alpha=[]"),
        ({"alpha": True}, "OptionError", "alpha=True"),
        ({"alpha": [0.1, 0.2]}, "OptionError", "choosing one of several takes evaluate"),
        ({"rule": "consensus-ta", "k": [1, 2]}, "OptionError", "k=[1, 2]: choosing one of several"),
        ({"rule": "consensus-ta", "k": -1}, "OptionError", "k=-1: a whole number of tasks"),
        ({"rule": "consensus-ta", "k": 1.5}, "OptionError", "k=1.5"),
        ({"rule": "consensus-ta", "k": []}, "OptionError", "k=[]"),
        ({"rule": "ta", "k": 2}, "OptionError", "'ta' takes no k"),
        ({"rule": Ties(), "k": 2}, "OptionError", "k: goes with a rule's name"),
        ({"tasks": []}, "OptionError", "no tasks to merge"),
        ({"tasks": "t0"}, "OptionError", "tasks='t0': a list of names, such as ['t0']"),
        ({"tasks": ["t0", "t0"]}, "OptionError", "'t0' is named twice"),
        ({"tasks": ["t0", "t9"]}, "UnknownTaskError", "no task 't9'; there are 't0', 't1', 't2'"),
        ({"private": "t9"}, "UnknownTaskError", "private='t9' is no task; there are 'base'"),
        ({"out": "a", "as_task": "b"}, "OptionError", "goes to one of them"),
        ({"out": "/absent/there"}, "OptionError", "there is no directory /absent"),
        ({"out": "/tmp"}, "StoreExistsError", "/tmp: there already"),
        ({"as_task": "t1"}, "TaskExistsError", "holds a task 't1' already"),
        ({"as_task": "a/b"}, "TaskNameError", "'a/b'"),
        ({"device": "cuda:99"}, "DeviceError", "no CUDA device"),
        ({"device": "tpu"}, "OptionError", "device='tpu'"),
        (
            {"rule": merge_rule("average", weights={"t0": 1})},
            "OptionError",
            "no weight for 't1', 't2'",
        ),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, Any], kind: str, message: str) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    if kind == "DeviceError" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(tallstore.TallstoreError) as caught:
        tallstore.merge(path, **{"alpha": 0.4, **options})
    assert type(caught.value).__name__ == kind
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["z.tall"]
    with tallstore.open(path) as store:
        assert store.verify().ok and list(store.tasks) == list(tasks)


def test_consensus_without_masks_is_refused_by_name(tmp_path: Path) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    tallstore.add(path, {"late": fine_tune(base, 8)})
    with pytest.raises(tallstore.errors.OptionError) as caught:
        tallstore.merge(path, rule="consensus-ta", alpha=0.4)
    assert "consensus-ta counts TALL masks, and 'late' has none" in str(caught.value)
    assert "pack the originals again, all together, or name other tasks" in str(caught.value)
    tallstore.merge(path, rule="consensus-ta", alpha=0.4, tasks=list(tasks))
    plain = tmp_path / "plain.tall"
    tallstore.save(base, plain)
    tallstore.add(plain, {"a": tasks["t0"], "b": tasks["t1"]})
    with pytest.raises(tallstore.errors.OptionError, match="'a', 'b' has none"):
        tallstore.merge(plain, rule="consensus-ties", alpha=0.4)
    expected = Flat(base, {"a": tasks["t0"], "b": tasks["t1"]}).merge(base, "ties", ["a", "b"], 0.4)
    assert_same(tallstore.merge(plain, rule="ties", alpha=0.4).state, expected)


def test_masks_of_another_vector_are_refused_by_name(tmp_path: Path) -> None:
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    with tallstore.open(path) as store:
        vector = dataclasses.replace(store.vector, tasks=("t0", "t2"))  # type: ignore[type-var]
        store._catalog = dataclasses.replace(store._catalog, vector=vector)
        with pytest.raises(tallstore.errors.OptionError) as caught:
            store.merge(rule="consensus-ta", alpha=0.4)
        assert "the masks of 't1' were made for another shared vector" in str(caught.value)
        assert "which is of 't0', 't2'" in str(caught.value)
        store.merge(rule="consensus-ta", alpha=0.4, tasks=["t2", "t0"])


def test_stores_with_nothing_to_merge(tmp_path: Path) -> None:
    tallstore.save({"w": torch.ones(3)}, tmp_path / "alone.tall")
    with pytest.raises(tallstore.errors.OptionError, match="no tasks to merge; add some"):
        tallstore.merge(tmp_path / "alone.tall")
    tallstore.save({"n": torch.arange(9)}, tmp_path / "whole.tall")
    tallstore.save({"n": torch.arange(9) + 1}, tmp_path / "whole.tall", task="a")
    with pytest.raises(tallstore.errors.MismatchError, match="no float32, bfloat16 or float16"):
        tallstore.merge(tmp_path / "whole.tall")


def test_masks_are_no_rule_to_pack_with(tmp_path: Path) -> None:
    base, tasks = zoo()
    with pytest.raises(tallstore.errors.OptionError, match="merge='consensus-ta': it takes stored"):
        tallstore.pack(tmp_path / "z.tall", base, tasks, merge="consensus-ta")
    with pytest.raises(tallstore.errors.OptionError, match="no task 'x'"):
        rule = merge_rule("average", weights={"t0": 1, "t1": 1, "t2": 1, "x": 1})
        tallstore.pack(tmp_path / "z.tall", base, tasks, merge=rule)
    assert list(tmp_path.iterdir()) == []


def test_a_nest_merges_as_an_object_and_not_as_a_file(tmp_path: Path) -> None:
    base, tuned = make_base(), fine_tune(make_base(), 1)
    tallstore.save({"model": base, "step": 1}, tmp_path / "z.tall")
    tallstore.save({"model": tuned, "step": 2}, tmp_path / "z.tall", task="a")
    tallstore.save({"model": fine_tune(base, 2), "step": 3}, tmp_path / "z.tall", task="b")
    merge = tallstore.merge(tmp_path / "z.tall", alpha=0.5)
    expected = Flat(base, {"a": tuned, "b": fine_tune(base, 2)}).merge(base, "ta", ["a", "b"], 0.5)
    assert_same(merge.state, {"model": expected, "step": 1})
    with pytest.raises(tallstore.errors.OptionError, match="no flat dict of tensors"):
        tallstore.merge(tmp_path / "z.tall", tmp_path / "out", alpha=0.5)
    assert not (tmp_path / "out").exists()


def test_damage_is_found_and_nothing_is_left(tmp_path: Path) -> None:
    """A flipped bit in each kind of chunk that merging reads."""
    base, tasks = zoo()
    path = packed(tmp_path / "z.tall", base, tasks)
    with tallstore.open(path) as store:
        described = store.describe("t1")
        assert described.task is not None and store.vector is not None
        (code,) = [code for code in described.task.codes if code.planes]
        streams = [described.base.streams[code.arena], code.planes, code.exact]
    for stream in streams:
        assert stream is not None
        copy = Path(shutil.copyfile(path, tmp_path / f"{stream}.tall"))
        with (
            lmdb.Environment(str(copy), subdir=False, lock=False, lib_version=0) as environment,
            environment.begin(write=True) as transaction,
        ):
            value = bytearray(transaction.get(chunk_key(stream, 0)))
            value[-1] ^= 1
            transaction.put(chunk_key(stream, 0), bytes(value))
        for out in (tmp_path / "m.safetensors", tmp_path / "model"):
            with pytest.raises(tallstore.errors.CorruptStoreError):
                tallstore.merge(copy, out, rule="consensus-ta", alpha=0.5)
            assert not out.exists()
        with pytest.raises(tallstore.errors.CorruptStoreError):
            tallstore.merge(copy, as_task="merged", rule="consensus-ta", alpha=0.5)
        with tallstore.open(copy) as store:
            assert list(store.tasks) == list(tasks)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
