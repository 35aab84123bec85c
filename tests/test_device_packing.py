"""Masks made on a device are those made on the CPU, bit for bit; their statistics agree.

Without a GPU the same code runs on CPU tensors, through Triton's interpreter and the reference.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_helpers import run
from zoo import State, bits, fine_tune, make_base

import tallstore
from tallstore.errors import DeviceError, OptionError
from tallstore.packing import pack as packing
from tallstore.packing.masks import masks_on
from tallstore.store import TallStore

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
BACKENDS = ["triton"] if GPU else ["triton", "reference"]


def zoo(dtype: torch.dtype, other: torch.dtype) -> tuple[State, dict[str, State]]:
    base = make_base(dtype=dtype)
    tasks = {"a": fine_tune(base, 1), "b": fine_tune(base, 2, dtype=other)}
    tasks["a"]["head.weight"] = torch.randn(5, 65)
    tasks["a"]["layers.0.bias"] = base["layers.0.bias"].clone()
    tasks["b"]["norm.weight"] = torch.tensor([1, float("inf"), 2, 3, 4, 5, 6]).to(other)
    tasks["b"]["embed.weight"] = torch.cat(
        [tasks["b"]["embed.weight"], torch.ones(4, 16).to(other)]
    )
    return base, tasks


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "other", "exact"),
    [
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float16, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
    ],
)
def test_the_masks_are_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    dtype: torch.dtype,
    other: torch.dtype,
    exact: bool,
) -> None:
    pytest.importorskip("triton")
    base, tasks = zoo(dtype, other)
    tallstore.pack(tmp_path / "cpu.tall", base, tasks, exact=exact)
    calls = []

    def on_device(device: torch.device) -> object:
        calls.append(device)
        return masks_on(DEVICE, backend=backend)

    monkeypatch.setattr(packing, "masks_on", on_device)
    tallstore.pack(tmp_path / "device.tall", base, tasks, exact=exact)
    assert calls == [torch.device("cpu")]
    with TallStore(tmp_path / "cpu.tall") as one, TallStore(tmp_path / "device.tall") as two:
        for task in tasks:
            for fidelity in ("codes", "exact") if exact else ("codes",):
                plain = one.load(task, fidelity=fidelity)
                made = two.load(task, fidelity=fidelity)
                assert {n: bits(t) for n, t in plain.items()} == {
                    n: bits(t) for n, t in made.items()
                }
            mine, theirs = two.segment_stats(task), one.segment_stats(task)
            assert mine.keys() == theirs.keys()
            for name, stats in mine.items():
                assert stats.density == theirs[name].density
                assert stats.relative_error == pytest.approx(theirs[name].relative_error, rel=1e-5)
                assert stats.moved == pytest.approx(theirs[name].moved, rel=1e-5)


def test_differences_too_large_for_a_sum_are_still_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"w": torch.ones(3000)}
    tasks = {"a": {"w": torch.full((3000,), 1e25)}, "b": {"w": torch.full((3000,), 1.5)}}
    monkeypatch.setattr(packing, "masks_on", lambda device: masks_on(DEVICE, backend=BACKENDS[-1]))
    tallstore.pack(tmp_path / "z.tall", base, tasks)
    with TallStore(tmp_path / "z.tall") as store:
        stats = store.segment_stats("a")["w"]
        assert stats.moved == pytest.approx(1e25 * 3000**0.5, rel=1e-3)


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    base, tasks = zoo(torch.float32, torch.float32)
    with pytest.raises(OptionError, match="device='tpu'"):
        tallstore.pack(tmp_path / "z.tall", base, tasks, device="tpu")
    if not GPU:
        with pytest.raises(DeviceError, match="device='cuda': no CUDA device"):
            tallstore.pack(tmp_path / "z.tall", base, tasks, device="cuda")
        tallstore.pack(tmp_path / "z.tall", base, tasks)
        with TallStore(tmp_path / "z.tall") as store, pytest.raises(DeviceError):
            store.unpack("a", tmp_path / "a.safetensors", device="cuda")
        assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_the_command_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    base, tasks = zoo(torch.float32, torch.float32)
    tallstore.save(base, tmp_path / "base.tall")
    tallstore.save(tasks["a"], tmp_path / "a.tall")
    store = tmp_path / "z.tall"
    arguments = ["pack", store, "--base", tmp_path / "base.tall", f"a={tmp_path / 'a.tall'}"]
    done = run(*arguments, "--device", "cuda")
    assert done.exit_code == 1 and "no CUDA device can be used here" in done.output
    assert not store.exists()
    assert run(*arguments, "--device", "cpu").exit_code == 0
    done = run("unpack", store, "a", tmp_path / "a.safetensors", "--device", "cuda:3")
    assert done.exit_code == 1 and "no CUDA device can be used here" in done.output


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_packed_and_unpacked_on_a_gpu(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base, tasks = zoo(torch.float32, torch.float32)
    tallstore.pack(tmp_path / "z.tall", base, tasks, device="cuda")
    tallstore.pack(tmp_path / "c.tall", base, tasks)
    with TallStore(tmp_path / "z.tall") as store, TallStore(tmp_path / "c.tall") as other:
        for task in tasks:
            store.unpack(task, tmp_path / f"{task}.safetensors", device="cuda")
            made = load_file(tmp_path / f"{task}.safetensors")
            assert {n: bits(t) for n, t in made.items()} == {
                n: bits(t) for n, t in other.load(task).items()
            }
