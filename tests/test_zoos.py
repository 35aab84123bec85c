"""What the bench's zoos are built of; nothing is downloaded or trained for long."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.frontierview import plot, table
from bench.zoos import images
from bench.zoos.bytemodel import ByteModel, Shape
from bench.zoos.cache import Zoo, distance, fingerprint, is_made, noted, publish, write_notes
from bench.zoos.corpora import Corpus
from bench.zoos.efficientnet import FEATURES, Classifier, Conv
from bench.zoos.parallel import in_processes
from bench.zoos.training import fit, row_batches, trained


@dataclass(frozen=True)
class _Settings:
    steps: int = 3


def test_a_model_says_how_it_was_made(tmp_path: Path) -> None:
    target = tmp_path / "zoo" / "task"
    assert not is_made(target, _Settings())
    with publish(target) as folder:
        assert not target.exists()
        (folder / "model.safetensors").write_bytes(b"")
        write_notes(folder, _Settings(), {"score": 0.5}, {"model": "x"})
    assert is_made(target, _Settings()) and not is_made(target, _Settings(4))
    assert noted(target)["score"] == 0.5
    assert json.loads((target / "config.json").read_text())["model"] == "x"
    assert fingerprint(_Settings()) != fingerprint(_Settings(4))
    with publish(target) as folder:
        (folder / "config.json").write_text("{}")
    assert noted(target) == {} and not (target / "model.safetensors").exists()
    assert [p.name for p in target.parent.iterdir()] == ["task"]


def test_a_failed_model_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), publish(tmp_path / "task"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_zoo_at_a_folder(tmp_path: Path) -> None:
    for name in ("base", "b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    (tmp_path / "other").mkdir()
    found = Zoo.at(tmp_path)
    assert list(found.tasks) == ["a", "b"] and found.base == tmp_path / "base"


def test_distance() -> None:
    base = {"w": torch.tensor([3.0, 4.0]), "n": torch.tensor(7)}
    assert distance({"w": torch.tensor([3.0, 4.5])}, base) == pytest.approx(0.1)


def test_every_row_once_a_round() -> None:
    batches = list(row_batches(10, batch=4, steps=5, seed=1))
    seen = [row for batch in batches for row in batch]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert batches == list(row_batches(10, batch=4, steps=5, seed=1))


def test_what_is_there_starts_no_process(tmp_path: Path) -> None:
    found = in_processes(
        lambda name, root: root / name, ["b", "a"], tmp_path, made=lambda *_: True, jobs=2
    )
    assert list(found) == [("b", tmp_path / "b"), ("a", tmp_path / "a")]


def test_byte_model_learns_and_looks_at_no_later_byte() -> None:
    torch.manual_seed(0)
    model = ByteModel(Shape(width=32, layers=2, heads=2, context=16))
    text = torch.randint(97, 101, (4, 17), dtype=torch.uint8)
    changed = text.clone()
    changed[:, 9] += 1
    with torch.no_grad():
        before, after = model(text[:, :-1]), model(changed[:, :-1])
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])
    assert model.losses(text).shape == (4,)
    first = float(model.losses(text).detach().mean())
    fit(
        model,
        lambda batch: model.losses(batch).mean(),
        [text] * 20,
        groups=[{"params": list(model.parameters()), "lr": 1e-2}],
        weight_decay=0.0,
        steps=20,
        warmup=0.1,
    )
    assert float(model.losses(text).detach().mean()) < first / 2
    assert not any(tensor.requires_grad for tensor in trained(model).values())


def test_image_encoder_keeps_the_statistics_of_the_base() -> None:
    torch.manual_seed(0)
    model = Classifier(5).train()
    before = model._bn0.running_mean.clone()
    logits = model(torch.rand(2, 3, 48, 48))
    assert logits.shape == (2, 5) and torch.equal(model._bn0.running_mean, before)
    assert model.embed(torch.rand(1, 3, 33, 47)).shape == (1, FEATURES)
    encoder = Classifier(0)
    assert sum(p.numel() for p in encoder.parameters()) == 3_371_008
    with pytest.raises(TypeError):
        encoder(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize(("pixels", "stride"), [(8, 2), (7, 2), (8, 1), (9, 1)])
def test_padding_puts_the_odd_pixel_last(pixels: int, stride: int) -> None:
    conv = Conv(1, 1, 3, stride)
    torch.nn.init.ones_(conv.weight)
    out = conv(torch.ones(1, 1, pixels, pixels)).detach()
    assert out.shape[-1] == -(-pixels // stride)
    # Where an even size is halved, only the last window reaches past the edge.
    first, last = float(out[0, 0, 0, 0]), float(out[0, 0, -1, -1])
    assert (first, last) == ((9, 4) if (pixels, stride) == (8, 2) else (4, 4))


@pytest.mark.parametrize("name", ["letters", "styles", "families"])
def test_drawn_tasks_keep_glyphs_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {part: images._glyphs(images.FONTS["upright"], images.ALPHABET, part) for part in
             images.PARTS}  # fmt: skip
    glyphs = [glyph for part in parts.values() for glyph in part]
    assert len(glyphs) == len(set(glyphs)) == 4 * 26
    for constant in ("TRAIN", "VALIDATION", "TEST"):
        monkeypatch.setattr(images, constant, 12)
    task, again = (images.load(name, Path("unused")) for _ in range(2))
    assert task.train.images.shape == (12, 3, images.SIDE, images.SIDE)
    assert task.train.images.dtype == torch.uint8 and int(task.train.images.max()) > 100
    assert torch.equal(task.test.images, again.test.images)
    assert int(task.train.labels.max()) < len(task.classes)


def test_windows_are_spread_over_a_text() -> None:
    text = torch.arange(100, dtype=torch.uint8)
    corpus = Corpus(text, text[:20], text)
    assert corpus.windows("test", 10).shape == (10, 10)
    assert corpus.windows("test", 10, 3)[:, 0].tolist() == [0, 40, 90]
    assert corpus.windows("validation", 10, 3).shape == (2, 10)


def test_frontier_as_table_and_picture(tmp_path: Path) -> None:
    row = {"code": "TVQ", "setting": "2 bits", "kept_worst": 0.9, "error": 0.01}
    ours = {"code": "tallstore", "setting": "auto", "kept_worst": 0.99, "error": 0.0}
    rows = [
        {**row, "zoo": "minilm", "bits": 1.5, "kept_mean": 0.95},
        {**ours, "zoo": "minilm", "bits": 0.06, "kept_mean": 0.995},
        {**ours, "zoo": "vision", "bits": 0.07, "kept_mean": np.float64(0.2)},
    ]
    text = table(rows)
    assert "| TVQ | 2 bits | 1.5 | 95.00% ± 1.00 | 90.0% |  |  |  |" in text
    assert "| tallstore | auto | 0.06 | 99.50% ± 0.00 | 99.0% | 0.07 |" in text
    path = tmp_path / "frontier.svg"
    plot({"frontier-minilm": rows[:2], "frontier-vision": rows[2:]}, path)
    assert b"</svg>" in path.read_bytes() and path.stat().st_size < 300_000
