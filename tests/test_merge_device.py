"""Tasks reconstructed on a device merge to the same bits as tasks reconstructed on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_helpers import run
from zoo import bits, fine_tune, make_base

import tallstore
from tallstore.errors import DeviceError
from tallstore.mergestream import merge as merging
from tallstore.mergestream.ondevice import DeviceWeights
from tallstore.mergestream.stored import StoreFeed

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
BACKENDS = ["triton"] if GPU else ["triton", "reference"]


@pytest.fixture
def stores(tmp_path: Path) -> list[Path]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for exact in (False, True):
            base = make_base(dtype=dtype)
            tasks = {name: fine_tune(base, seed) for seed, name in enumerate("abc")}
            path = tmp_path / f"{dtype}-{exact}.tall"
            tallstore.pack(path, base, tasks, exact=exact)
            found.append(path)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["average", "consensus-ties"])
def test_the_same_merge(
    stores: list[Path], monkeypatch: pytest.MonkeyPatch, backend: str, rule: str
) -> None:
    pytest.importorskip("triton")
    wanted = [tallstore.merge(path, rule=rule, alpha=0.5).state for path in stores]
    filled = []
    fill = DeviceWeights.fill

    def counted(self: DeviceWeights, *args: object) -> None:
        filled.append(args)
        fill(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(DeviceWeights, "fill", counted)

    def feed(*args: object, **options: object) -> StoreFeed:
        return StoreFeed(*args, **{**options, "device": DeviceWeights(DEVICE, backend=backend)})  # type: ignore[arg-type]

    monkeypatch.setattr(merging, "StoreFeed", feed)
    for path, plain in zip(stores, wanted, strict=True):
        made = tallstore.merge(path, rule=rule, alpha=0.5).state
        assert {n: bits(t) for n, t in made.items()} == {n: bits(t) for n, t in plain.items()}
    assert filled


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_a_device_that_is_not_there(stores: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no CUDA device can be used here"):
        tallstore.merge(stores[0], tmp_path / "m.safetensors", device="cuda")
    done = run("merge", stores[0], tmp_path / "m.safetensors", "--device", "cuda")
    assert done.exit_code == 1 and "no CUDA device can be used here" in done.output
    assert not (tmp_path / "m.safetensors").exists()
    assert run("merge", stores[0], tmp_path / "m.safetensors", "--device", "cpu").exit_code == 0


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_merged_with_a_gpu(stores: list[Path]) -> None:
    for path in stores:
        plain = tallstore.merge(path, rule="ties", alpha=0.5).state
        made = tallstore.merge(path, rule="ties", alpha=0.5, device="cuda").state
        assert all(t.is_cuda and bits(t.cpu()) == bits(plain[n]) for n, t in made.items())
