"""Loading through the ring of pinned buffers: the same bits, in bounded room, whatever is stored.

Without a GPU the ring runs on CPU tensors, where queues do nothing and the rest is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zoo import bits, fine_tune, make_base

import tallstore
from tallstore.errors import ChecksumError, CorruptStoreError, DeviceError
from tallstore.loading import Loader, no_progress
from tallstore.ring import ROOMS, Ring
from tallstore.store import TallStore

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
BACKENDS = ["triton"] if DEVICE.type == "cuda" else ["cpu", "reference", "triton"]


def make_zoo(path: Path, *, exact: bool, dtype: torch.dtype = torch.float32) -> Path:
    """Tasks with masks, private heads, changed integers, non-finite weights, a longer embedding."""
    base = make_base(dtype=dtype)
    a, b = fine_tune(base, 1), fine_tune(base, 2)
    a["head.weight"] = torch.randn(5, 65).to(dtype)
    a["positions"] = torch.arange(11) + 3
    b["norm.weight"] = torch.tensor([1.0, float("nan"), 2, 3, 4, 5, 6]).to(dtype)
    b["embed.weight"] = torch.cat([b["embed.weight"], torch.ones(4, 16).to(dtype)])
    tallstore.pack(path, base, {"a": a, "b": b}, exact=exact)
    added = fine_tune(base, 3)
    added["positions"] = torch.arange(11) * 2
    tallstore.add(path, {"added": added})
    return path


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    dtype = getattr(torch, request.param)
    make_zoo(folder / "masks.tall", exact=False, dtype=dtype)
    make_zoo(folder / "exact.tall", exact=True, dtype=dtype)
    return folder


def loaders(folder: Path) -> Iterator[Loader]:
    for name in ("masks.tall", "exact.tall"):
        with TallStore(folder / name) as store:
            for task in (None, *store.tasks):
                yield store._loader(task)


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits, but of NaN: what a cast makes of those differs from device to device."""
    a, lost = a.cpu(), b.isnan()
    same = bits(a.masked_fill(lost, 0)) == bits(b.masked_fill(lost, 0))
    return a.dtype == b.dtype and torch.equal(a.isnan(), lost) and same


def on_the_cpu(loader: Loader) -> dict[int, bytes]:
    segments = loader.contents.segments
    memory = {n: np.empty(s.nbytes, np.uint8) for n, s in enumerate(segments)}
    loader.stream(list(memory), targets=memory)
    return {n: held.tobytes() for n, held in memory.items()}


def through(loader: Loader, backend: str, **options: Any) -> dict[int, bytes]:
    segments = loader.contents.segments
    targets = {
        n: torch.full((s.nbytes,), 0xAA, dtype=torch.uint8, device=DEVICE)
        for n, s in enumerate(segments)
    }
    made = []
    ring = Ring(loader.decoder, DEVICE, backend=backend, **options)
    ring.run(list(targets), targets=targets, progress=made.append)
    assert sum(made) == sum(s.nbytes for s in segments)
    return {n: bits(held.cpu()) for n, held in targets.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_as_on_the_cpu(zoo: Path, backend: str) -> None:
    pytest.importorskip("triton")
    for loader in loaders(zoo):
        assert through(loader, backend) == on_the_cpu(loader), loader.what


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_pieces_come_back_whole(zoo: Path, backend: str) -> None:
    for loader in loaders(zoo):
        segments = loader.contents.segments
        found = {n: np.full(s.nbytes, 0xAA, np.uint8) for n, s in enumerate(segments)}
        sizes = [s.nbytes // s.numel if s.numel else 1 for s in segments]

        def put(
            segment: int,
            start: int,
            data: np.ndarray,
            found: dict[int, np.ndarray] = found,
            sizes: list[int] = sizes,
        ) -> None:
            first = start * sizes[segment]
            found[segment][first : first + data.size] = data

        Ring(loader.decoder, DEVICE, backend=backend).run(
            list(found), targets={}, put=put, progress=no_progress
        )
        assert {n: a.tobytes() for n, a in found.items()} == on_the_cpu(loader), loader.what


def test_a_cast_is_that_of_the_loaded_weights(zoo: Path) -> None:
    for loader in loaders(zoo):
        segments = loader.contents.segments
        kinds = {n: "float64" for n, s in enumerate(segments) if s.dtype.startswith(("fl", "bf"))}
        kinds |= {n: "float16" for n in list(kinds)[::2]}
        loaded = loader._load_on(DEVICE, kinds, no_progress)
        plain = on_the_cpu(loader)
        for n, held in loaded.items():
            stored = torch.frombuffer(bytearray(plain[n]), dtype=getattr(torch, segments[n].dtype))
            wanted = stored.to(getattr(torch, kinds[n]))
            got = held if held.dtype != torch.uint8 else held.view(wanted.dtype)
            assert alike(got, wanted), (loader.what, n)


def test_many_spans_take_the_room_of_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots and rooms are used again: in order, and by no two spans at a time."""
    monkeypatch.setattr("tallstore.layout.SPAN", 2048)
    n = 60 * 2048 + 7
    base = {"w": torch.randn(n), "v": torch.randn(3 * 2048)}
    tuned = {k: v + 0.01 * torch.randn(v.shape) for k, v in base.items()}
    path = tmp_path / "z.tall"
    tallstore.pack(path, base, {"t": tuned}, exact=True)
    with TallStore(path) as store:
        loader = store._loader("t")
        assert len(loader.decoder.spans([0, 1])) > 60
        assert through(loader, BACKENDS[0], threads=3) == on_the_cpu(loader)
        targets = {0: torch.empty(n, device=DEVICE)}
        ring = Ring(loader.decoder, DEVICE, backend=BACKENDS[0], threads=3)
        ring.run([0], targets=targets, progress=no_progress)
        assert bits(targets[0].cpu()) == bits(tuned["w"])
        host, device = ring.nbytes()
        span = 2048 * (4 + 2 + 4) + 2048 // 8
        assert 0 < device <= ROOMS * span and 0 < host <= (2 * 3 + 2) * span


def test_a_damaged_chunk_is_refused_and_nothing_hangs(tmp_path: Path) -> None:
    path = make_zoo(tmp_path / "z.tall", exact=False)
    raw = bytearray(path.read_bytes())
    with TallStore(path) as store:
        loader = store._loader("a")
        before = through(loader, BACKENDS[0])
    for place in range(len(raw) // 3, len(raw), len(raw) // 40):
        raw[place] ^= 0x10
    path.write_bytes(raw)
    with pytest.raises(CorruptStoreError), TallStore(path) as store:
        assert through(store._loader("a"), BACKENDS[0]) == before
        raise AssertionError("no damage was found")


def test_out_says_that_it_is_undefined_when_the_device_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_zoo(tmp_path / "z.tall", exact=False)

    def fail(*args: object, **options: object) -> None:
        raise DeviceError("cuda:0: out of memory while loading")

    with TallStore(path) as store:
        out = {name: torch.zeros_like(t) for name, t in store.load("a").items()}
        monkeypatch.setattr(Loader, "stream", fail)
        with pytest.raises(DeviceError, match=r"out of memory .*out= are partly .*undefined"):
            store.load("a", out=out)


def test_out_of_memory_names_what_was_asked_and_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tallstore.ring import on_device

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 20, 9 << 20))
    with (
        pytest.raises(DeviceError, match=r"cuda:1: out of memory while x; 3 of 9 MiB are free"),
        on_device(torch.device("cuda", 1), "x"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        type("PTXASError", (Exception,), {"__module__": "triton.runtime.errors"})("ptxas fatal"),
    ],
    ids=["driver", "torch", "compiler"],
)
def test_what_a_device_or_triton_raises_is_a_device_error(failure: Exception) -> None:
    from tallstore.ring import on_device

    place = torch.device("cuda", 0)
    with pytest.raises(DeviceError, match="cuda:0: failed while x: "), on_device(place, "x"):
        raise failure


def test_other_failures_stay_what_they_are() -> None:
    from tallstore.ring import on_device

    for failure in (DeviceError("of CUDA"), ChecksumError("of Triton"), RuntimeError("a bug")):
        with pytest.raises(type(failure)) as caught, on_device(DEVICE, "x"):
            raise failure
        assert caught.value is failure


def test_results_to_be_cast_take_the_room_of_a_span(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans of few and of many tensors, in which the large one comes first, second, third, ..."""
    monkeypatch.setattr("tallstore.layout.SPAN", 16 * 1024)
    base = {}
    for span in range(16):
        for i in range(span):
            base[f"{span:02}.{i:02}"] = torch.randn(1024)
        base[f"{span:02}.rest"] = torch.randn((16 - span) * 1024)
    path = tmp_path / "m.tall"
    tallstore.save(base, path)
    with TallStore(path) as store:
        loader = store._loader(None)
        segments = loader.contents.segments
        targets = {
            n: torch.empty(s.numel, dtype=torch.float64, device=DEVICE)
            for n, s in enumerate(segments)
        }
        ring = Ring(loader.decoder, DEVICE, threads=1)
        ring.run(list(targets), targets=targets, progress=no_progress)
        assert ring.nbytes()[1] == ROOMS * 16 * 1024 * (4 + 4)
        ring.run(list(targets), targets={}, put=lambda *piece: None, progress=no_progress)
        assert ring.nbytes()[0] <= (4 + ROOMS) * 16 * 1024 * 4
        for n, (name, tensor) in enumerate(base.items()):
            assert torch.equal(targets[n].cpu(), tensor.double()), name


@pytest.mark.skipif(DEVICE.type == "cpu", reason="no GPU")
def test_loading_to_a_gpu_end_to_end(zoo: Path) -> None:
    for name in ("masks.tall", "exact.tall"):
        path = zoo / name
        for task in (None, "a", "b", "added"):
            plain = tallstore.load(path, task=task)
            loaded = tallstore.load(path, task=task, device="cuda")
            assert all(t.is_cuda and bits(t.cpu()) == bits(plain[n]) for n, t in loaded.items())
            cast = tallstore.load(path, task=task, device="cuda", dtype="bfloat16")
            for n, t in cast.items():
                wanted = plain[n].bfloat16() if plain[n].is_floating_point() else plain[n]
                assert alike(t, wanted)
            out = {n: torch.zeros_like(t).cuda() for n, t in plain.items()}
            pointers = {n: t.data_ptr() for n, t in out.items()}
            tallstore.load(path, task=task, out=out)
            assert all(bits(t.cpu()) == bits(plain[n]) for n, t in out.items())
            assert pointers == {n: t.data_ptr() for n, t in out.items()}


@pytest.mark.skipif(DEVICE.type == "cpu", reason="no GPU")
def test_a_gpu_holds_the_result_and_the_ring_alone(tmp_path: Path) -> None:
    n = 12 << 20
    base = {f"w{i}": torch.randn(n).bfloat16() for i in range(6)}
    tuned = {k: v + 0.01 for k, v in base.items()}
    path = tmp_path / "z.tall"
    tallstore.pack(path, base, {"t": tuned})
    result = 6 * n * 2
    ring = ROOMS * ((1 << 20) * 4 + (1 << 20) // 8)
    torch.cuda.synchronize()
    for out in (None, {k: torch.empty(n, dtype=torch.bfloat16, device="cuda") for k in base}):
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        if out is None:
            loaded = tallstore.load(path, task="t", device="cuda")
        else:
            tallstore.load(path, task="t", out=out)
        peak = torch.cuda.max_memory_allocated() - held
        assert peak <= (result if out is None else 0) + ring + (1 << 20)
        if out is None:
            del loaded


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "m.tall"
    tallstore.save({"w": torch.ones(3)}, path)
    if DEVICE.type == "cpu":
        with pytest.raises(DeviceError, match="device='cuda': no CUDA device can be used here"):
            tallstore.load(path, device="cuda")
    else:
        with pytest.raises(DeviceError, match="there are 1 CUDA devices"):
            tallstore.load(path, device=f"cuda:{torch.cuda.device_count()}")


def test_checksums_are_verified_on_the_way(tmp_path: Path) -> None:
    path = tmp_path / "m.tall"
    tallstore.save({"w": torch.randn(1 << 18)}, path)
    raw = bytearray(path.read_bytes())
    raw[len(raw) - 300_000] ^= 1
    path.write_bytes(raw)
    with TallStore(path) as store, pytest.raises(ChecksumError):
        through(store._loader(None), BACKENDS[0])
