"""The places that operations are run in, copied from a template that is made once."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file

import tallstore
from bench.faults.checks import content, demand, same
from bench.faults.operations import OPERATIONS
from bench.faults.states import OLD, base, other, tuned

__all__ = ["make_template", "prepare"]


def _write_inputs(folder: Path) -> None:
    (folder / "base").mkdir(parents=True)
    save_file(base(), folder / "base" / "model.safetensors", metadata={"format": "pt"})
    (folder / "base" / "config.json").write_text('{"model_type": "small"}\n')
    (folder / "base" / "words").mkdir()
    (folder / "base" / "words" / "vocab.txt").write_text("a\nb\n")
    for name, seed in (("x", 8), ("z", 10)):
        save_file(tuned(seed), folder / f"{name}.safetensors")


def make_template(folder: Path) -> None:
    """A place to copy: a store of the base and three tasks, with space that removed ones left."""
    _write_inputs(folder / "in")
    path = folder / "zoo.tall"
    gone = {"gone": tuned(50)}
    old = {name: state for name, state in OLD.items() if name is not None}
    tallstore.pack(path, str(folder / "in" / "base"), {**old, **gone}, exact=True)
    tallstore.save(other(9), path, task="gone too")
    with tallstore.open(path, "a") as store:
        store.remove("gone", "gone too")
    # What `unpack` must make, to the byte.
    wanted = folder / "wanted"
    wanted.mkdir()
    with tallstore.open(path) as store:
        store.unpack("t1", wanted / "out.safetensors")
        store.unpack(None, wanted / "out", max_shard_size=20_000)
    tallstore.merge(path, wanted / "merged.safetensors", tasks=["t0", "t2"])
    (wanted / "before").write_bytes(b"what was there before")
    demand(same(content(path), OLD), "the template is not what it should be")
    for name in ("add codes", "strip", "repack"):
        _expect(folder, name)
    tallstore.strip(shutil.copyfile(path, folder / "stripped.tall"), ["t1"])


def _expect(folder: Path, name: str) -> None:
    """Keep what an operation makes of the tasks that are lossy after it."""
    place = folder / "expected"
    prepare(folder, place, name)
    operation = OPERATIONS[name]
    operation.run(place)
    for task, called in operation.after.items():
        if isinstance(called, str):
            state = tallstore.load(place / "zoo.tall", task=task)
            save_file(state, folder / "wanted" / f"{called}.safetensors")


def prepare(template: Path, place: Path, name: str) -> None:
    """Make `place` ready for an operation."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    shutil.copytree(template / "in", place / "in")
    operation = OPERATIONS[name]
    if operation.before is not None:
        shutil.copyfile(template / operation.start, place / "zoo.tall")
    if name == "unpack over a file":
        shutil.copyfile(template / "wanted" / "before", place / "out.safetensors")
