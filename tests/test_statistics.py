"""Statistics of masks equal those computed naively from the checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from test_golden import make
from test_masks import naive_mask, stored_vector
from zoo import ROOT, State, fine_tune, make_base

import tallstore
from tallstore.engine.keys import chunk_key
from tallstore.errors import CorruptStoreError, OptionError, StoreClosedError, UnknownTaskError
from tallstore.mask_statistics import MaskStatistics
from tallstore.mask_statistics.layers import layer_names

LAMBDA = 0.4
Masks = dict[str, dict[str, torch.Tensor]]


def awkward_zoo() -> tuple[State, dict[str, State]]:
    """Tasks that code different tensors, in two dtypes, of sizes off every boundary."""
    base = make_base()
    base["tokens"] = torch.randn(300, 5, generator=torch.Generator().manual_seed(9))
    base["half.0.weight"] = base["layers.1.weight"][:31].bfloat16()
    tasks = {f"t{n}": fine_tune(base, n) for n in range(4)}
    for state in tasks.values():
        state["scale"] = base["scale"].clone()  # nobody's
    tasks["t0"]["embed.weight"] = base["embed.weight"].clone()  # as the base has it
    tasks["t0"]["half.0.weight"] = base["half.0.weight"].clone()
    tasks["t1"]["head.weight"] = torch.randn(5, 65)  # of other classes
    tasks["t2"]["norm.weight"][3] = float("nan")  # what masks cannot hold
    del tasks["t2"]["layers.0.bias"]
    tasks["t3"]["tokens"] = tasks["t3"]["tokens"][:290].clone()  # its common rows are coded
    return base, tasks


def naive_masks(store: Any, base: State, tasks: Mapping[str, State]) -> Masks:
    """The mask of each tensor that a task codes, from the paper's rule."""
    found: Masks = {name: {} for name in tasks}
    for name, state in tasks.items():
        for key, start in base.items():
            tuned = state.get(key)
            if tuned is None or not start.is_floating_point() or torch.equal(tuned, start):
                continue
            rows = tuned.shape[1:] == start.shape[1:] and tuned.shape[:1] == (290,)
            if (tuned.shape != start.shape and not rows) or not tuned.isfinite().all():
                continue
            vector = stored_vector(store, [key])
            flat = start.reshape(-1)[: tuned.numel()].float()
            mask = naive_mask(flat, tuned.reshape(-1).float(), vector[: tuned.numel()], LAMBDA)
            found[name][key] = mask
    return found


def widened(masks: Masks, base: State, keys: Sequence[str]) -> torch.Tensor:
    """Bool, shape (T, weights): the masks over those tensors, False where a task has none."""
    rows = []
    for own in masks.values():
        row = []
        for key in keys:
            mask = own.get(key, torch.zeros(0, dtype=torch.bool))
            row.append(torch.nn.functional.pad(mask, (0, base[key].numel() - mask.numel())))
        rows.append(torch.cat(row))
    return torch.stack(rows)


def check_use(part: Any, bits: torch.Tensor) -> None:
    uses = bits.sum(dim=0)
    histogram = torch.bincount(uses, minlength=len(bits) + 1)
    use = getattr(part, "use", part)
    assert use.histogram == tuple(histogram.tolist())
    assert use.weights == uses.numel()
    assert use.catastrophic == pytest.approx(float((uses == 0).double().mean()))
    assert use.selfish == pytest.approx(float((uses == 1).double().mean()))
    assert use.general == pytest.approx(float((uses >= 2).double().mean()))


def check(found: MaskStatistics, masks: Masks, base: State) -> None:
    names = list(masks)
    assert list(found.tasks) == names
    coded = [key for key in base if any(key in own for own in masks.values())]
    bits = widened(masks, base, coded)
    check_use(found.use, bits)
    floating = sum(t.numel() for t in base.values() if t.is_floating_point())
    assert found.uncoded == floating - bits.shape[1]
    uses = bits.sum(dim=0)
    for n, name in enumerate(names):
        task = found.tasks[name]
        assert task.coded == sum(mask.numel() for mask in masks[name].values())
        assert task.ones == int(bits[n].sum())
        assert task.exclusive == int((bits[n] & (uses == 1)).sum())
        assert task.density == pytest.approx(task.ones / task.coded)
        assert task.selfish == pytest.approx(task.exclusive / task.ones)
    wide = bits.long()
    assert torch.equal(torch.tensor(found.overlap), wide @ wide.T)
    for i, j in combinations(range(len(names)), 2):
        union = int((bits[i] | bits[j]).sum())
        assert found.jaccard[i][j] == found.jaccard[j][i] == int((bits[i] & bits[j]).sum()) / union
    assert [part.name for part in found.tensors] == coded
    for part in found.tensors:
        own = widened(masks, base, [part.name])
        check_use(part, own)
        for n, name in enumerate(names):
            mask = masks[name].get(part.name)
            task = part.tasks[name]
            assert task.coded == (0 if mask is None else mask.numel())
            assert (task.density is None) == (mask is None)
            assert task.ones == int(own[n].sum())
    layers: dict[str, list[str]] = {}
    for part in found.tensors:
        layers.setdefault(part.layer, []).append(part.name)
    assert [part.name for part in found.layers] == list(layers)
    for part in found.layers:
        own = widened(masks, base, layers[part.name])
        check_use(part, own)
        alone = own.sum(dim=0) == 1
        for n, name in enumerate(names):
            assert part.tasks[name].exclusive == int((own[n] & alone).sum())


@pytest.mark.parametrize("span", [1 << 10, 1 << 11, None])
@pytest.mark.parametrize("exact", [False, True])
def test_an_awkward_zoo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, span: int | None, exact: bool
) -> None:
    if span is not None:
        monkeypatch.setattr("tallstore.layout.SPAN", span)
    base, tasks = awkward_zoo()
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, tasks, tall_lambda=LAMBDA, exact=exact)
    with tallstore.open(path) as store:
        masks = naive_masks(store, base, tasks)
        assert "scale" not in masks["t1"] and "head.weight" not in masks["t1"]
        assert masks["t3"]["tokens"].numel() == 290 * 5
        found = store.statistics()
        check(found, masks, base)
        assert (found.cosine, found.cosine_from, found.without_masks) == (None, None, ())
        for name, record in store.tasks.items():
            assert found.tasks[name].coded == record.coded
            assert found.tasks[name].density == pytest.approx(record.density)
        some = ["t3", "t0"]  # in the order asked for
        check(store.statistics(tasks=some), {name: masks[name] for name in some}, base)
        check(store.statistics(tasks=["t2"]), {"t2": masks["t2"]}, base)


def test_more_than_one_span_of_the_real_size(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    base = {"a.0": torch.randn(700_001, generator=draw), "b": torch.randn(900_000, generator=draw)}
    tasks = {f"t{n}": fine_tune(base, n) for n in range(3)}
    tallstore.pack(tmp_path / "z.tall", base, tasks, tall_lambda=LAMBDA)
    with tallstore.open(tmp_path / "z.tall") as store:
        check(store.statistics(), naive_masks(store, base, tasks), base)


def test_the_golden_zoo(tmp_path: Path) -> None:
    path = Path(shutil.copy(ROOT / "tests" / "golden" / "zoo.tall", tmp_path))
    base, tasks = make.zoo()
    with tallstore.open(path) as store:
        found = store.statistics(cosine=True)
        check(found, naive_masks(store, base, tasks), base)
        assert found.without_masks == ("added",)
        assert found.cosine_from == "exact"


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def task_vector(state: State, base: State, masks: Mapping[str, torch.Tensor]) -> torch.Tensor:
    rows = []
    for key, start in base.items():
        if start.is_floating_point():
            row = torch.zeros(start.numel())
            if key in masks:
                count = masks[key].numel()
                flat = state[key].reshape(-1)[:count].float()
                row[:count] = flat - start.reshape(-1)[:count].float()
            rows.append(row.double())
    return torch.cat(rows)


@pytest.mark.parametrize("exact", [False, True])
def test_cosines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    monkeypatch.setattr("tallstore.layout.SPAN", 1 << 11)
    base, tasks = awkward_zoo()
    tallstore.pack(tmp_path / "z.tall", base, tasks, tall_lambda=LAMBDA, exact=exact)
    with tallstore.open(tmp_path / "z.tall") as store:
        masks = naive_masks(store, base, tasks)
        found = store.statistics(cosine=True)
        states = {name: store.load(name) for name in tasks}
    vectors = [task_vector(states[name], base, masks[name]) for name in tasks]
    assert found.cosine_from == ("exact" if exact else "codes")
    assert found.cosine is not None
    for i, row in enumerate(found.cosine):
        for j, value in enumerate(row):
            assert value == pytest.approx(cosine(vectors[i], vectors[j]), rel=1e-9), (i, j)
            assert value == found.cosine[j][i]
        assert row[i] == 1.0


def test_a_task_without_the_exact_tier_makes_all_cosines_come_from_codes(tmp_path: Path) -> None:
    base, tasks = awkward_zoo()
    tasks["t9"] = fine_tune(base, 9)
    path = tmp_path / "z.tall"
    tallstore.pack(path, base, tasks, tall_lambda=LAMBDA)
    tallstore.add(path, {"late": fine_tune(base, 3)})
    with tallstore.open(path) as store:
        assert store.tasks["late"].exact
        found = store.statistics(cosine=True, tasks=["t0", "t9"])
        assert found.cosine_from == "codes" and found.without_masks == ("late",)


def test_no_thread_schedule_changes_a_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tallstore.layout.SPAN", 1 << 10)
    base, tasks = awkward_zoo()
    tallstore.pack(tmp_path / "z.tall", base, tasks, exact=True)
    found = []
    for count in (1, 2, 5, 5):
        monkeypatch.setattr("tallstore.workers.cores", lambda count=count: count)
        with tallstore.open(tmp_path / "z.tall") as store:
            found.append(store.statistics(cosine=True))
    assert all(other == found[0] for other in found[1:])


def test_one_task(tmp_path: Path) -> None:
    base = make_base()
    tallstore.pack(tmp_path / "z.tall", base, {"only": fine_tune(base, 0)}, exact=True)
    with tallstore.open(tmp_path / "z.tall") as store:
        found = store.statistics(cosine=True)
    assert found.jaccard == found.cosine == ((1.0,),)
    assert found.tasks["only"].selfish == 1.0
    assert found.use.general == 0 and found.use.histogram[1] == found.tasks["only"].ones


def test_masks_that_use_nothing(tmp_path: Path) -> None:
    base = make_base()  # float32 alone: of bfloat16 weights, some are the merged ones to the bit
    path = tmp_path / "z.tall"
    tallstore.pack(path, base, {f"t{n}": fine_tune(base, n) for n in range(4)}, tall_lambda=1e30)
    with tallstore.open(path) as store:
        found = store.statistics(cosine=True)
    assert found.use.catastrophic == 1.0 and found.jaccard[0][1] is None
    assert found.tasks["t0"].density == 0.0 and found.tasks["t0"].selfish is None
    assert found.cosine == ((None,) * 4,) * 4


def test_a_zoo_that_changed_nothing(tmp_path: Path) -> None:
    base = make_base()
    tallstore.pack(tmp_path / "z.tall", base, {"same": dict(base)})
    with tallstore.open(tmp_path / "z.tall") as store:
        found = store.statistics(cosine=True)
    assert (found.use.weights, found.use.catastrophic, found.tensors, found.layers) == (
        *(0, None),
        *((), ()),
    )
    assert found.tasks["same"].density is None and found.uncoded > 0
    assert json.loads(json.dumps(found.to_json()))["jaccard"] == [[None]]


def test_tensors_that_share_memory_count_once(tmp_path: Path) -> None:
    weight = torch.randn(40, 10)
    base = {"embed.weight": weight, "lm_head.weight": weight}
    moved = weight + 0.1 * torch.randn(40, 10)
    task = {"embed.weight": moved, "lm_head.weight": moved}
    tallstore.pack(tmp_path / "z.tall", base, {"t": task, "u": {"embed.weight": moved * 1.1}})
    with tallstore.open(tmp_path / "z.tall") as store:
        found = store.statistics()
    assert [part.name for part in found.tensors] == ["embed.weight"]
    assert found.use.weights == 400


def test_as_json(tmp_path: Path) -> None:
    base, tasks = awkward_zoo()
    tallstore.pack(tmp_path / "z.tall", base, tasks)
    with tallstore.open(tmp_path / "z.tall") as store:
        found = store.statistics(cosine=True)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["histogram"] == list(found.use.histogram)
    assert document["jaccard"][0][1] == found.jaccard[0][1]
    assert document["cosine_from"] == "codes"
    assert [part["name"] for part in document["tensors"]] == [p.name for p in found.tensors]
    assert document["layers"][0]["tasks"]["t0"]["density"] == found.layers[0].tasks["t0"].density


def test_progress(tmp_path: Path) -> None:
    base, tasks = awkward_zoo()
    tallstore.pack(tmp_path / "z.tall", base, tasks)
    told: list[tuple[str, int, int]] = []
    with tallstore.open(tmp_path / "z.tall") as store:
        store.statistics(cosine=True, report=lambda *step: told.append(step))
    for stage in ("masks", "cosines"):
        steps = [(done, total) for name, done, total in told if name == stage]
        assert steps[0][0] == 0 and steps[-1][0] == steps[-1][1] > 0


def test_layers() -> None:
    names = {
        "embeddings.word_embeddings.weight": "embeddings",
        "encoder.layer.0.attention.bias": "encoder.layer.0",
        "encoder.layer.11.output.dense.bias": "encoder.layer.11",
        "encoder.norm.bias": "encoder.norm",
        "model.embed_tokens.weight": "model.embed_tokens",
        "model.layers.0.mlp.experts.3.weight": "model.layers.0",
        "model.norm.weight": "model.norm",
        "lm_head.weight": "lm_head",
        "scale": "scale",
        "conv1.weight": "conv1",
        "0.weight": "0",
        "": "",
        "model": "model",
    }
    assert dict(zip(names, layer_names(list(names)), strict=True)) == names
    assert layer_names([]) == []


# -- bad input ----------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    base = make_base()
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {f"t{n}": fine_tune(base, n) for n in range(2)})
    tallstore.add(path, {"late": fine_tune(base, 3)})
    return path


@pytest.mark.parametrize(
    ("tasks", "kind", "message"),
    [
        (["t0", "t7"], UnknownTaskError, "no task 't7'; there are 't0', 't1', 'late'"),
        (["late"], OptionError, "'late' has no masks.*leave it out.*With masks: 't0', 't1'"),
        (["t0", "t0"], OptionError, "none twice"),
        ([], OptionError, "at least one task"),
        ("t0", OptionError, "a list of names"),
        ([3], OptionError, "a list of names"),
    ],
)
def test_tasks_that_cannot_be_counted(
    packed: Path, tasks: Any, kind: type[Exception], message: str
) -> None:
    with tallstore.open(packed) as store, pytest.raises(kind, match=message):
        store.statistics(tasks=tasks)


def test_stores_without_masks(tmp_path: Path) -> None:
    path = tmp_path / "m.tall"
    tallstore.save(make_base(), path)
    with tallstore.open(path) as store, pytest.raises(OptionError, match=r"no tasks.*tallstore p"):
        store.statistics()
    tallstore.save(fine_tune(make_base(), 0), path, task="t")
    with tallstore.open(path) as store, pytest.raises(OptionError, match="exact differences"):
        store.statistics()
    base = make_base()
    tallstore.pack(path, base, {"t": fine_tune(base, 0)}, code="signs", overwrite=True)
    with tallstore.open(path) as store, pytest.raises(OptionError, match="are coded by 'signs'"):
        store.statistics()


def test_a_closed_handle(packed: Path) -> None:
    store = tallstore.open(packed)
    store.close()
    with pytest.raises(StoreClosedError):
        store.statistics()


def test_a_damaged_mask_is_never_counted(packed: Path) -> None:
    with tallstore.open(packed) as store:
        (code,) = store.describe("t0").task.codes  # type: ignore[union-attr]
        key = chunk_key(code.planes, 0)
        value = store._snapshot._value(key, "a mask")  # type: ignore[union-attr]
        content = bytes(value)
    # Everywhere: a page that was written anew leaves its old content behind.
    flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    data = packed.read_bytes()
    assert content in data
    packed.write_bytes(data.replace(content, flipped))
    with tallstore.open(packed) as store, pytest.raises(CorruptStoreError):
        store.statistics()
