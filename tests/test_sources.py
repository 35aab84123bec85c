"""Sources on disk: safetensors files, model directories, and opening by content."""

from __future__ import annotations

import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tallstore.errors import CheckpointError
from tallstore.objects import ObjectSource, assemble, build_tensor
from tallstore.sources import model_files
from tallstore.sources.model_directory import ModelDirectory
from tallstore.sources.opening import is_lmdb_file, open_source
from tallstore.sources.safetensors_file import METADATA_FILE, SafetensorsFile
from tallstore.sources.source import Source
from tallstore.sources.torch_file import TorchFile

STATE = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b.bias": torch.ones(3).bfloat16(),
    "c": torch.tensor(7),
    "d": torch.empty(0, 5),
}


def load(source: Source) -> Any:
    """What the source holds, put together again."""
    segments = []
    for index, spec in enumerate(source.segments):
        data = np.empty(spec.nbytes, np.uint8)
        middle = spec.nbytes // 2
        source.read(index, middle, data[middle:])
        source.read(index, 0, data[:middle])
        segments.append(torch.from_numpy(data))
    tensors = [build_tensor(spec, segments[spec.segment]) for spec in source.tensors]
    return assemble(source.tree, tensors)


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def write_index(directory: Path, weight_map: object, name: str = "model.safetensors") -> None:
    (directory / f"{name}.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    names = list(STATE)
    safetensors.torch.save_file({n: STATE[n] for n in names[2:]}, tmp_path / first, {"k": "v"})
    safetensors.torch.save_file({n: STATE[n] for n in names[:2]}, tmp_path / second, {"k": "v"})
    write_index(tmp_path, {name: second if name in names[:2] else first for name in names})
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(STATE, path, {"format": "pt", "é": "1"})
    with SafetensorsFile(path) as source:
        assert source.kind == "safetensors"
        assert source.label == str(path)
        assert source.notes == ()
        assert same(load(source), STATE)
        assert source.metadata == {"format": "pt", "é": "1"}
        (file,) = source.files
        content = source.read_file(METADATA_FILE)
        assert (file.path, file.nbytes) == (METADATA_FILE, len(content))
        assert json.loads(content) == source.metadata
        with pytest.raises(CheckpointError, match=r"has no file 'config\.json'"):
            source.read_file("config.json")
        source.close()
    with pytest.raises(CheckpointError, match="was closed; open it again"):
        source.read(0, 0, np.empty(1, np.uint8))
    safetensors.torch.save_file(STATE, path)
    with SafetensorsFile(path, label="base") as source:
        assert source.files == ()
        assert source.label == "base"


def test_threads_read_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state = {f"t{i}": torch.full((5000,), float(i)) for i in range(20)}
    safetensors.torch.save_file(state, path)
    wrong: list[str] = []
    with SafetensorsFile(path) as source:

        def work() -> None:
            for _ in range(20):
                if not same(load(source), state):
                    wrong.append("differs")

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_file_that_changes_is_found_out(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(1000)}, path)
    with SafetensorsFile(path) as source:
        os.truncate(path, 2000)
        with pytest.raises(CheckpointError, match="changed while it was being read") as caught:
            source.read(0, 0, np.empty(4000, np.uint8))
        assert str(path) in str(caught.value)
    safetensors.torch.save_file({"w": torch.zeros(1000)}, path)
    with SafetensorsFile(path) as source:
        with path.open("r+b") as file:
            file.seek(3000)
            file.write(b"other")
        os.utime(path, ns=(1, 1))
        with pytest.raises(CheckpointError, match="wait until its writer is done"):
            source.read(0, 0, np.empty(4000, np.uint8))


def test_a_single_model_directory(tmp_path: Path) -> None:
    safetensors.torch.save_file(STATE, tmp_path / "model.safetensors", {"format": "pt"})
    texts = {
        "config.json": b"{}",
        "README.md": b"\xff\x00 not text",
        "1_Pooling/config.json": b"[]",
        "empty.txt": b"",
        ".gitattributes": b"*",
        "deep/er/é.txt": b"x",
        "training_args.bin": b"args",
    }
    for name, content in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with ModelDirectory(tmp_path) as source:
        assert source.kind == "model-directory"
        assert same(load(source), STATE)
        assert source.notes == ()
        assert {f.path: source.read_file(f.path) for f in source.files} == {
            **texts,
            METADATA_FILE: b'{"format":"pt"}',
        }
        assert all(len(source.read_file(f.path)) == f.nbytes for f in source.files)
        with pytest.raises(CheckpointError, match=r"has no file '../secret'"):
            source.read_file("../secret")
        (tmp_path / "config.json").write_bytes(b"longer")
        with pytest.raises(CheckpointError, match=r"config.json changed: it had 2 bytes"):
            source.read_file("config.json")


def test_what_is_left_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "MAX_FILE_BYTES", 100)
    safetensors.torch.save_file(STATE, tmp_path / "model.safetensors")
    for name in (
        *("pytorch_model.bin", "model.fp16.safetensors", "tf_model.h5", "flax_model.msgpack"),
        *("onnx/model.onnx", "openvino/m.xml", "q.gguf", ".git/config", ".cache/x", "optimizer.pt"),
        *("checkpoint-500/model.safetensors", "sub/model.safetensors", "2_Dense/pytorch_model.bin"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    (tmp_path / "big.txt").write_bytes(bytes(101))
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "self").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))).write_bytes(b"")
    with ModelDirectory(tmp_path) as source:
        assert [f.path for f in source.files] == ["2_Dense/pytorch_model.bin", "modules.json"]
        assert list(source.notes) == [
            "left out broken links: gone, loop",
            "left out files over 0 MiB: big.txt",
            "left out histories, caches and training steps: .cache, .git, checkpoint-500",
            "left out links to directories: self",
            "left out names that are not Unicode: \\udcff",
            "left out optimizer states: optimizer.pt",
            "left out other weights: model.fp16.safetensors, pytorch_model.bin, "
            "sub/model.safetensors",
            "left out pipes and devices: pipe",
            "left out weights of other frameworks: flax_model.msgpack, onnx, openvino, q.gguf, "
            "tf_model.h5",
        ]


def test_the_cache_of_the_hub_is_read_through_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    safetensors.torch.save_file(STATE, blobs / "1")
    (blobs / "2").write_bytes(b"{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "config.json").symlink_to("../../blobs/2")
    with ModelDirectory(snapshot) as source:
        assert same(load(source), STATE)
        assert source.read_file("config.json") == b"{}"
    (blobs / "1").unlink()
    with pytest.raises(CheckpointError, match=r"link to .*blobs/1, which is not there"):
        ModelDirectory(snapshot)


def test_shards_are_read_in_the_order_of_the_index(sharded: Path) -> None:
    with ModelDirectory(sharded) as source:
        loaded = load(source)
        assert list(loaded) == list(STATE)
        assert same(loaded, STATE)
        assert [f.path for f in source.files] == ["config.json", METADATA_FILE]
        assert source.read_file(METADATA_FILE) == b'{"k":"v"}'
        assert source.notes == ()


def test_pickled_shards(tmp_path: Path) -> None:
    names = list(STATE)
    torch.save({n: STATE[n] for n in names[2:]}, tmp_path / "pytorch_model-1.bin")
    torch.save({n: STATE[n] for n in names[:2]}, tmp_path / "pytorch_model-2.bin")
    write_index(
        tmp_path,
        {n: f"pytorch_model-{2 if n in names[:2] else 1}.bin" for n in names},
        "pytorch_model.bin",
    )
    with ModelDirectory(tmp_path) as source:
        assert same(load(source), STATE)
        assert source.files == ()


def test_a_single_pickled_model(tmp_path: Path) -> None:
    tied = torch.ones(4)
    torch.save({"x": tied, "y": tied, "n": 3}, tmp_path / "pytorch_model.bin")
    with ModelDirectory(tmp_path) as source:
        assert len(source.segments) == 1
        loaded = load(source)
    assert loaded["n"] == 3
    assert torch.equal(loaded["y"], tied)


def test_other_names_of_the_only_weights(tmp_path: Path) -> None:
    safetensors.torch.save_file(STATE, tmp_path / "diffusion_pytorch_model.safetensors")
    with ModelDirectory(tmp_path) as source:
        assert same(load(source), STATE)
    safetensors.torch.save_file(STATE, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"several weights: diffusion.*name one of these"):
        ModelDirectory(tmp_path)


def test_tensors_beside_the_index(sharded: Path) -> None:
    path = sharded / "model-00001-of-00002.safetensors"
    more = {"extra": torch.ones(1), "a.weight": torch.ones(1)}
    safetensors.torch.save_file({"c": STATE["c"], "d": STATE["d"], **more}, path)
    with ModelDirectory(sharded) as source:
        assert same(load(source), STATE | {"extra": torch.ones(1)})
        assert sorted(source.notes) == [
            "left out 'a.weight' of model-00001-of-00002.safetensors: the index names another "
            "shard",
            "took tensor 'extra' of model-00001-of-00002.safetensors, which the index does not "
            "name",
        ]
    other = {"a.weight": STATE["a.weight"], "b.bias": STATE["b.bias"], "extra": torch.zeros(1)}
    safetensors.torch.save_file(other, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"'extra' is both in .* repair the index"):
        ModelDirectory(sharded)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../model.safetensors", "not a file of its directory"),
        ("/etc/passwd", "not a file of its directory"),
        ("a/../../b", "not a file of its directory"),
        ("a\\b", "not a file of its directory"),
        ("a\0b", "not a file of its directory"),
        ("", "not a file of its directory"),
        (".", "not a file of its directory"),
        (3, "not a file of its directory"),
        ("absent.safetensors", "absent.safetensors is missing, but .* names it as a shard"),
    ],
)
def test_shards_elsewhere_are_refused(sharded: Path, shard: object, message: str) -> None:
    write_index(sharded, {"a.weight": shard})
    with pytest.raises(CheckpointError, match=message) as caught:
        ModelDirectory(sharded)
    assert str(sharded) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "has no weight_map"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ("{", "not strict JSON"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "twice"),
        (
            '{"weight_map": {"zz": "model-00001-of-00002.safetensors"}}',
            "model-00001-of-00002.safetensors lacks tensor 'zz', which .*index.json says",
        ),
    ],
)
def test_bad_indexes_are_refused(sharded: Path, text: str, message: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        ModelDirectory(sharded)


def test_a_truncated_shard_closes_the_others(sharded: Path) -> None:
    path = sharded / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(CheckpointError, match=r"00002.safetensors has .* truncated within"):
        ModelDirectory(sharded)
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "has no weights .* check the path"),
        (("config.json",), "has no weights"),
        (("adapter_config.json", "adapter_model.safetensors"), "PEFT adapter .* full checkpoint"),
        (("tf_model.h5",), "other frameworks: tf_model.h5; convert"),
        (("q.gguf", "config.json"), "other frameworks: q.gguf"),
        (("weights.pt",), "name the file itself: weights.pt"),
        (("unet/model.safetensors", "vae/model.safetensors"), "name one: unet, vae"),
    ],
)
def test_directories_without_weights(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_files_are_opened_by_content(tmp_path: Path) -> None:
    path = tmp_path / "weights.of.something"
    safetensors.torch.save_file(STATE, path)
    with open_source(path) as source:
        assert isinstance(source, SafetensorsFile)
    for new in (True, False):
        torch.save(STATE, path, _use_new_zipfile_serialization=new)
        with open_source(str(path), label="x") as source:
            assert isinstance(source, TorchFile)
            assert source.label == "x"
            assert same(load(source), STATE)


def test_objects_are_opened() -> None:
    module = torch.nn.Linear(2, 2)
    for what in (module.state_dict(), module, [torch.ones(1)]):
        with open_source(what) as source:
            assert isinstance(source, ObjectSource)
    assert open_source({"a": torch.ones(1)}, label="mine").label == "mine"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", b"", "is empty; copy or download it again"),
        ("a", b"some text", "not a checkpoint that tallstore knows; give a safetensors file"),
        ("a.bin", b"GGUF" + bytes(64), "is a GGUF file"),
        ("a", b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 file"),
        ("a.pt", b"\x93NUMPY" + bytes(64), "is a numpy array"),
        ("a.pt", b"<!DOCTYPE html>", "is a web page"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("a.safetensors", b"12345", "ends within its 8-byte header length"),
        ("a.bin", b"some text", "is not a file that torch can read"),
        ("a", pickle.dumps({"a": 1}), "not a checkpoint that torch can read|holds no tensor"),
        ("zoo.tall", bytes(16) + b"\xde\xc0\xef\xbe" + bytes(64), "is a store, .*::TASK"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(path)
    assert str(path) in str(caught.value)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_source(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="path of the checkpoint is empty"):
        open_source("")
    with pytest.raises(CheckpointError, match="is not a path"):
        open_source("a\0b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="a pipe or device"):
        open_source(tmp_path / "pipe")


def test_lmdb_files_are_known(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    path = tmp_path / "zoo.tall"
    lmdb.open(str(path), subdir=False).close()
    assert is_lmdb_file(path)
    with pytest.raises(CheckpointError, match="is a store"):
        open_source(path)
    assert not is_lmdb_file(tmp_path)
    assert not is_lmdb_file(tmp_path / "absent")
    (tmp_path / "short").write_bytes(b"x")
    assert not is_lmdb_file(tmp_path / "short")
