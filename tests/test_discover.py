"""The checkpoints of a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tallstore.errors import CheckpointError, EmptyZooError, OptionError
from tallstore.sources.discover import discover_zoo


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_files_and_directories_are_tasks(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *("zeta.safetensors", "math.v2.pt", "b.pth", "c.ckpt", "d.bin", "E.SAFETENSORS"),
        *("single/model.safetensors", "sharded/model.safetensors.index.json"),
        *("old/pytorch_model.bin", "adapter/adapter_config.json"),
        *("notes.txt", ".hidden.pt", ".git/model.safetensors", "logs/run.txt", "README.md"),
    )
    found = discover_zoo(tmp_path)
    assert list(found) == sorted(
        ["zeta", "math.v2", "b", "c", "d", "E", "single", "sharded", "old", "adapter"]
    )
    assert found["math.v2"] == tmp_path / "math.v2.pt"
    assert found["single"] == tmp_path / "single"
    assert discover_zoo(str(tmp_path)) == found


def test_links_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "real/m/model.safetensors", "zoo/keep")
    (tmp_path / "zoo" / "linked").symlink_to(tmp_path / "real" / "m")
    (tmp_path / "zoo" / "loop").symlink_to("loop")
    assert list(discover_zoo(tmp_path / "zoo")) == ["linked"]


@pytest.mark.parametrize("other", ["math.safetensors", "math/model.safetensors"])
def test_two_of_one_name_are_refused(tmp_path: Path, other: str) -> None:
    touch(tmp_path, "math.pt", other)
    with pytest.raises(OptionError, match=r"two checkpoints for task 'math': math") as caught:
        discover_zoo(tmp_path)
    assert "math.pt" in str(caught.value)
    assert other.split("/")[0] in str(caught.value)
    assert "rename" in str(caught.value)


def test_nothing_to_find(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt", "sub/b.txt")
    with pytest.raises(EmptyZooError, match="holds no checkpoint") as caught:
        discover_zoo(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_model_directory_is_no_zoo(tmp_path: Path) -> None:
    touch(tmp_path, "model.safetensors", "config.json", "training_args.bin")
    with pytest.raises(OptionError, match=r"is itself a model directory \(it has config.json\)"):
        discover_zoo(tmp_path)


def test_what_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        discover_zoo(tmp_path / "absent")
    touch(tmp_path, "a.pt")
    with pytest.raises(CheckpointError, match="is a file, not a directory"):
        discover_zoo(tmp_path / "a.pt")
