"""Codes where they are at their ends: nothing, next to nothing, 16 bits, one weight changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import assert_same

import tallstore
from tallstore.errors import MismatchError, OptionError


@pytest.mark.parametrize("code", ["save", "tall", "signs", "seeded", "levels"])
def test_empty_tensors_of_another_dtype(tmp_path: Path, code: str) -> None:
    base = {"e": torch.zeros(0).bfloat16(), "f": torch.zeros(0).bfloat16(), "w": torch.randn(100)}
    task = {"e": torch.zeros(0), "f": base["f"], "w": base["w"] + 0.1}
    path = tmp_path / "zoo.tall"
    if code == "save":
        tallstore.save(base, path)
        tallstore.save(task, path, task="k")
    else:
        tallstore.pack(path, base, {"k": task}, code=code, exact=True)
    assert_same(tallstore.load(path, task="k"), task)


@pytest.mark.parametrize("scale", [1.0, 1e-10])
def test_a_seeded_value_that_tells_nothing_of_its_tensor(tmp_path: Path, scale: float) -> None:
    """No float32 level has the tensor's projection; the values behind keep their places."""
    far = torch.tensor([-0.0, -2.9482e29, 1.07e29, -3.2e29, -5.1e29, 1.04e30, 4.1e29]) * scale
    wide = torch.ones(1025).bfloat16()
    base = {"a": torch.ones(7), "e": torch.zeros(0), "w": wide, "z": torch.ones(3000)}
    task = {"a": far, "e": base["e"], "w": wide * 2, "z": base["z"] + 0.01 * torch.randn(3000)}
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {"k": task}, code="seeded", exact=True)
    assert_same(tallstore.load(path, task="k"), task)
    assert tallstore.load(path, task="k", fidelity="codes").keys() == task.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {"code": "signs"},
        {"code": "levels", "bits": 4},
        {"code": "auto", "bits_per_weight": 4},
        {"code": "tall"},
    ],
    ids=str,
)
def test_the_exact_tier_comes_back_in_16_bits(
    tmp_path: Path, options: dict[str, object], dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(1)
    for n, step in enumerate((1e-3, 1e-2, 1.0)):
        base = {"w": torch.randn(100, 100, generator=draw).to(dtype)}
        moved = (torch.randn(100, 100, generator=draw) * step).to(dtype)
        path = tmp_path / f"{n}.tall"
        tallstore.pack(path, base, {"k": {"w": base["w"] + moved}}, **options)  # type: ignore[arg-type]
        tallstore.add(path, {"k": {"w": base["w"] + moved}}, exact=True)
        assert_same(tallstore.load(path, task="k"), {"w": base["w"] + moved})


def test_an_original_with_one_weight_changed_is_another(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(2)
    base = {"w": torch.randn(1000, 100, generator=draw)}
    task = {"w": base["w"] + 0.01 * torch.randn(1000, 100, generator=draw)}
    path = tmp_path / "zoo.tall"
    tallstore.pack(path, base, {"k": task}, code="signs")
    other = {"w": task["w"].clone()}
    other["w"][5, 5] += 0.5
    with pytest.raises(MismatchError, match="not the checkpoint that the task was coded from"):
        tallstore.add(path, {"k": other}, exact=True)
    tallstore.add(path, {"k": task}, exact=True)


def test_codes_that_are_not_there_are_not_served(tmp_path: Path) -> None:
    path = tmp_path / "run.tall"
    tallstore.save({"w": torch.ones(4)}, path)
    tallstore.save({"w": torch.full((4,), 3.0)}, path, task="k")
    with pytest.raises(OptionError, match="has no codes, it is kept exactly"):
        tallstore.load(path, task="k", fidelity="codes")
