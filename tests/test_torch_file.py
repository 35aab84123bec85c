"""Files of torch.save: wrappers, ties, refusals, and memory that does not grow with the model."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tallstore.errors import CheckpointError, UnsafePickleError
from tallstore.objects import assemble, build_tensor
from tallstore.sources.opening import open_source
from tallstore.sources.source import Source
from tallstore.sources.torch_file import TorchFile


def load(source: Source) -> Any:
    """What the source holds, put together again."""
    segments = []
    for index, spec in enumerate(source.segments):
        data = np.empty(spec.nbytes, np.uint8)
        source.read(index, 0, data)
        segments.append(torch.from_numpy(data))
    tensors = [build_tensor(spec, segments[spec.segment]) for spec in source.tensors]
    return assemble(source.tree, tensors)


def same(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)


STATE = {"fc.weight": torch.arange(12.0).reshape(3, 4), "fc.bias": torch.ones(3).bfloat16()}


def saved(path: Path, obj: object, **options: Any) -> Path:
    torch.save(obj, path, **options)
    return path


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_state_dict_comes_back(tmp_path: Path, legacy: bool) -> None:
    path = saved(tmp_path / "a.pt", STATE, _use_new_zipfile_serialization=not legacy)
    with TorchFile(path) as source:
        assert source.kind == "torch"
        assert source.label == str(path)
        assert source.notes == ()
        assert same(load(source), STATE)
        assert len(source._begins) == (0 if legacy else 2)
        source.close()
    with pytest.raises(CheckpointError, match="closed"):
        source.read(0, 0, np.empty(1, np.uint8))
    with pytest.raises(CheckpointError, match=r"has no file 'config\.json'"):
        source.read_file("config.json")


def test_geometry_ties_and_extras_stay(tmp_path: Path) -> None:
    base = torch.arange(40.0)
    state: OrderedDict[str, Any] = OrderedDict(
        tied=base[4:24],
        also=base[8:16].view(2, 4).t(),
        parameter=torch.nn.Parameter(torch.ones(2)),
        scalar=torch.tensor(3),
        empty=torch.empty(0, 7),
        conj=torch.tensor([1 + 2j]).conj(),
        extra_state=b"bytes",
        count=7,
        nothing=None,
    )
    with TorchFile(saved(tmp_path / "a.pt", state)) as source:
        loaded = load(source)
    assert isinstance(loaded, OrderedDict)
    assert list(loaded) == list(state)
    assert (
        loaded["tied"].untyped_storage().data_ptr() == loaded["also"].untyped_storage().data_ptr()
    )
    assert loaded["also"].stride() == state["also"].stride()
    assert isinstance(loaded["parameter"], torch.nn.Parameter)
    assert loaded["conj"].is_conj()
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(loaded[name], value)
        else:
            assert loaded[name] == value


def test_nests_and_odd_names(tmp_path: Path) -> None:
    obj: dict[str, Any] = {
        "": torch.ones(2),
        "tensor": torch.zeros(2),
        "a": {"b": torch.ones(1)},
        "a.b": [1],
    }
    with TorchFile(saved(tmp_path / "a.pt", obj)) as source:
        loaded = load(source)
    assert torch.equal(loaded[""], obj[""])
    assert torch.equal(loaded["tensor"], obj["tensor"])
    assert torch.equal(loaded["a"]["b"], torch.ones(1))
    flat = {"": torch.ones(2), "tensor": torch.zeros(2)}
    with TorchFile(saved(tmp_path / "b.pt", flat)) as source:
        assert same(load(source), flat)


@pytest.mark.parametrize(
    ("obj", "notes"),
    [
        ({"state_dict": STATE}, ["took the state dict at 'state_dict'"]),
        (
            {"epoch": 3, "model": STATE, "optimizer": {}, "rng": torch.zeros(9).byte()},
            [
                "took the state dict at 'model'",
                "left out what stands beside 'model': epoch, optimizer, rng",
            ],
        ),
        (
            {"ema": STATE, "params": {"x": torch.ones(1)}, "params_ema": STATE},
            [
                "took the state dict at 'params_ema'",
                "left out what stands beside 'params_ema': ema, params",
            ],
        ),
        (
            {"model": {"net": STATE, "step": 1}, "step": 1},
            [
                "took the state dict at 'model.net'",
                "left out what stands beside 'model': step",
                "left out what stands beside 'model.net': step",
            ],
        ),
        ({f"module.{k}": v for k, v in STATE.items()}, ["took 'module.' off every name"]),
        (
            {"state_dict": {f"module._orig_mod.{k}": v for k, v in STATE.items()}},
            [
                "took the state dict at 'state_dict'",
                "took 'module.' off every name",
                "took '_orig_mod.' off every name",
            ],
        ),
        ({"model": "gpt", "state_dict": STATE}, None),
    ],
)
def test_wrappers_are_taken_off(tmp_path: Path, obj: object, notes: list[str] | None) -> None:
    with TorchFile(saved(tmp_path / "a.pth", obj)) as source:
        assert same(load(source), STATE)
        assert notes is None or list(source.notes) == notes


@pytest.mark.parametrize(
    "obj",
    [
        {"module.a": torch.ones(2), "b": torch.ones(2)},
        {"module.": torch.ones(2)},
        {"model": torch.ones(2)},
        {"model.weight": torch.ones(2), "head": torch.ones(2)},
    ],
)
def test_what_is_no_wrapper_stays(tmp_path: Path, obj: dict[str, torch.Tensor]) -> None:
    with TorchFile(saved(tmp_path / "a.pth", obj)) as source:
        assert same(load(source), obj)
        assert source.notes == ()


def test_weights_beside_a_wrapper_are_not_lost(tmp_path: Path) -> None:
    obj: dict[str, Any] = {"model": dict(STATE), "head": torch.ones(2)}
    with TorchFile(saved(tmp_path / "a.pth", obj)) as source:
        loaded = load(source)
    assert same(loaded["model"], STATE)
    assert torch.equal(loaded["head"], obj["head"])


def test_module_versions_follow_their_names(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    wrapped = torch.nn.ModuleDict({"module": module}).state_dict()
    with TorchFile(saved(tmp_path / "a.pth", wrapped)) as source:
        loaded = load(source)
    assert same(loaded, module.state_dict())
    assert loaded._metadata == vars(module.state_dict())["_metadata"]


class Touch:
    """Unpickling it would make the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.path}",)


class Evaluate(Touch):
    """The same through a builtin."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(("make", "name"), [(Touch, r"posix\.system"), (Evaluate, "eval")])
@pytest.mark.parametrize("force", ["0", "1"])
def test_a_pickle_that_runs_code_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    legacy: bool,
    make: type[Touch],
    name: str,
    force: str,
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    proof = tmp_path / "executed"
    path = tmp_path / "evil.pt"
    obj = {"state_dict": STATE, "evil": make(proof)}
    torch.save(obj, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        UnsafePickleError, match=f"asks for {name}, .*nothing .* executed"
    ) as caught:
        open_source(path)
    assert str(path) in str(caught.value)
    assert "state_dict()" in str(caught.value)
    assert "add_safe_globals" in str(caught.value)
    assert not proof.exists()
    # the same file does run code where somebody asks for that
    torch.load(path, weights_only=False)
    assert proof.exists()


def test_a_bare_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    path = tmp_path / "evil.bin"
    path.write_bytes(pickle.dumps(Touch(proof), protocol=2))
    with pytest.raises(CheckpointError):
        open_source(path)
    assert not proof.exists()


def test_a_whole_module_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", torch.nn.Linear(2, 2))
    with pytest.raises(UnsafePickleError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        TorchFile(path)


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    try:
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    except Exception as exc:  # torch means to drop it
        pytest.skip(f"this torch makes no TorchScript: {exc}")
    with pytest.raises(CheckpointError, match="TorchScript archive, which is a program"):
        TorchFile(path)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    for legacy in (False, True):
        path = saved(tmp_path / "a.pt", STATE, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        for size in {1, 2, 4, 20, len(whole) // 2, len(whole) - 30, len(whole) - 1}:
            path.write_bytes(whole[:size])
            with pytest.raises(CheckpointError, match=r"again") as caught:
                TorchFile(path)
            assert str(path) in str(caught.value)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is empty; copy or download"):
        TorchFile(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"hello, this is text")
    with pytest.raises(CheckpointError, match="its bytes make no sense"):
        TorchFile(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        TorchFile(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.txt", "x")
    with pytest.raises(CheckpointError, match="not a file that torch can read"):
        TorchFile(path)
    with pytest.raises(CheckpointError, match="holds no tensor"):
        TorchFile(saved(path, {"epoch": 1}))
    with pytest.raises(CheckpointError, match="no such file"):
        TorchFile(tmp_path / "absent.pt")


def test_a_file_cut_while_open_is_no_crash(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"w": torch.zeros(1 << 20)})
    with TorchFile(path) as source:
        os.truncate(path, 4096)
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            source.read(0, 0, np.empty(1 << 22, np.uint8))


PROBE = """
import re, sys, numpy as np
from tallstore.sources.torch_file import TorchFile
def rss():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) >> 10
before = rss()
total = 0
with TorchFile(sys.argv[1]) as source:
    out = np.empty(1 << 20, np.uint8)
    for index, segment in enumerate(source.segments):
        for start in range(0, segment.nbytes, out.size):
            part = out[: segment.nbytes - start]
            source.read(index, start, part)
            total += part.size
print(total >> 20, rss() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    path = tmp_path / "big.pt"
    torch.save({"state_dict": {f"w{i}": torch.ones(25 << 18) for i in range(12)}}, path)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    path.unlink()
    megabytes, growth = map(int, done.stdout.split())
    assert megabytes == 300
    assert growth < 100, done.stdout
