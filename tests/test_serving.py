"""A switched model is the task, bit for bit, in the storages that it had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_helpers import DEVICE
from serving_helpers import Net, address, assert_is, loops, make_store
from zoo import bits, fine_tune, make_base

import tallstore
from tallstore.serving import TaskSwitcher
from tallstore.serving.results import Residency

__all__ = ["loops"]  # a fixture

pytestmark = pytest.mark.usefixtures("loops")

TASKS = ("a", "b", "added")
RESIDENT: tuple[Residency, ...] = ("all", "masks-on-host", "stream")


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("zoo")
    for exact in (False, True):
        make_store(place / f"{exact}.tall", exact=exact, dtype=getattr(torch, request.param))
    return place


def model_of(store: Path) -> Net:
    with tallstore.open(store) as opened:
        return Net(opened.load()).to(DEVICE)


@pytest.mark.parametrize("resident", RESIDENT)
@pytest.mark.parametrize("exact", [False, True])
def test_it_is_what_load_gives(folder: Path, exact: bool, resident: Residency) -> None:
    store = folder / f"{exact}.tall"
    model = model_of(store)
    before, parameters = address(model), list(model.parameters())
    with TaskSwitcher(model, store, resident=resident) as switcher:
        assert switcher.tasks == TASKS and switcher.live is None
        previous = None
        for task in ("a", "b", "added", "b", "a", "added", "a"):
            done = switcher.switch(task)
            assert (done.task, done.previous, switcher.live) == (task, previous, task)
            assert done.ms > 0 and done.moved > 0 and done.replaced == done.skipped == ()
            assert_is(model, store, task)
            previous = task
    assert address(model) == before
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_codes_alone(folder: Path) -> None:
    store = folder / "True.tall"
    model = model_of(store)
    with TaskSwitcher(model, store, fidelity="codes") as switcher:
        for task in ("a", "b", "a"):
            switcher.switch(task)
            assert_is(model, store, task, fidelity="codes")
        switcher.switch("added")  # it has no codes, and stays itself
        assert_is(model, store, "added")


def test_the_live_task_again(folder: Path) -> None:
    store = folder / "False.tall"
    model = model_of(store)
    with TaskSwitcher(model, store) as switcher:
        first = switcher.switch("a")
        assert first.hit and first.source == "device"
        again = switcher.switch("a")
        assert again.hit and again.source == "live" and again.moved == 0
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        assert switcher.switch("a", rewrite=True).moved > 0
        assert_is(model, store, "a")


def test_a_state_dict(folder: Path) -> None:
    store = folder / "False.tall"
    model = model_of(store)
    with TaskSwitcher(model.state_dict(), store) as switcher:
        switcher.switch("b")
        assert isinstance(switcher.model, dict)
    assert_is(model, store, "b")


def test_an_open_store_and_some_tasks(folder: Path) -> None:
    store = folder / "False.tall"
    model = model_of(store)
    with tallstore.open(store) as opened:
        switcher = TaskSwitcher(model, opened, tasks=["added"])
    assert switcher.tasks == ("added",) and switcher.need().vector == 0
    switcher.switch("added")
    assert_is(model, store, "added")
    switcher.close()
    switcher.close()


def test_an_optimizer_and_a_graph_go_on(folder: Path) -> None:
    store = folder / "False.tall"
    if torch.bfloat16 in {t.dtype for t in model_of(store).parameters()}:
        pytest.skip("one dtype is enough")
    model = model_of(store)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with TaskSwitcher(model, store) as switcher:
        switcher.switch("a")
        wanted = {name: t.detach().clone() for name, t in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, wanted[name] - 0.5), name


def test_a_base_in_another_store(tmp_path: Path) -> None:
    base = make_base()
    one, two = tmp_path / "one.tall", tmp_path / "two.tall"
    tallstore.pack(one, base, {"a": fine_tune(base, 1)})
    tallstore.pack(two, None, {"b": fine_tune(base, 2)}, external_base=one)
    model = Net(base).to(DEVICE)
    with TaskSwitcher(model, two) as switcher:
        switcher.switch("b")
    assert_is(model, two, "b")


def test_several_spans(tmp_path: Path) -> None:
    """Tensors that end in the middle of chunks, large and small ones side by side."""
    draw = torch.Generator().manual_seed(0)
    sizes = {"a.big": (1500, 1000), "a.small": (100,), "b.big": (700, 999), "b.small": (40_001,)}
    base = {name: torch.randn(shape, generator=draw) for name, shape in sizes.items()}
    tuned = {n: {k: v + 0.01 * torch.randn(v.shape) for k, v in base.items()} for n in ("x", "y")}
    for exact in (False, True):
        store = tmp_path / f"{exact}.tall"
        tallstore.pack(store, base, tuned, exact=exact)
        model = Net(base).to(DEVICE)
        with TaskSwitcher(model, store) as switcher:
            for task in ("x", "y", "x"):
                switcher.switch(task)
                assert_is(model, store, task)


def test_tensors_that_are_no_plain_runs(tmp_path: Path) -> None:
    """Transposed in the store, strided in the model."""
    base = {"w": torch.randn(40, 30).t(), "v": torch.randn(64, 8), "u": torch.randn(3)}
    tuned = {name: (t + 0.1).contiguous() if name != "w" else t + 0.1 for name, t in base.items()}
    store = tmp_path / "m.tall"
    tallstore.save(base, store)
    tallstore.save(tuned, store, task="t")
    held = torch.zeros(64, 16, device=DEVICE)
    model = {
        "w": torch.zeros(30, 40, device=DEVICE),
        "v": held[:, ::2],
        "u": torch.zeros(3, device=DEVICE),
    }
    with TaskSwitcher(model, store) as switcher:
        switcher.switch("t")
    for name, tensor in tuned.items():
        assert bits(model[name].cpu()) == bits(tensor), name
    assert not held[:, 1::2].any()


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return y


def make_linear(path: Path) -> tuple[Linear, torch.Tensor, dict[str, torch.Tensor]]:
    """A model on the device, an input, and what each task makes of it."""
    base = Linear().state_dict()
    tuned = {name: fine_tune(base, n, step=0.5) for n, name in enumerate("ab")}
    tallstore.pack(path, base, tuned, exact=True)
    model = Linear().to(DEVICE).eval()
    x = torch.randn(3, 64, device=DEVICE)
    wanted = {}
    for name, state in tuned.items():
        model.load_state_dict(state)
        wanted[name] = model(x).detach()
    return model, x, wanted


def test_compiled_modules_go_on(tmp_path: Path) -> None:
    store = tmp_path / "zoo.tall"
    model, x, wanted = make_linear(store)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), TaskSwitcher(compiled, store) as switcher:
        for task in "abab":
            with switcher.use(task) as live:
                assert live is compiled and torch.equal(live(x), wanted[task])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_cuda_graphs_go_on(tmp_path: Path) -> None:
    store = tmp_path / "zoo.tall"
    model, x, wanted = make_linear(store)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        model(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = model(x)
        with TaskSwitcher(model, store) as switcher:
            for task in "abab":
                switcher.switch(task)
                graph.replay()
                torch.cuda.synchronize()
                assert torch.equal(y, wanted[task])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_nothing_is_allocated_after_the_first_switches(folder: Path) -> None:
    store = folder / "False.tall"
    with TaskSwitcher(model_of(store), store) as switcher:
        for task in TASKS:
            switcher.switch(task)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        for task in (*TASKS, *TASKS):
            switcher.switch(task)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
