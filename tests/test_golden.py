"""Stores written once and committed: what is on disk today must be read for ever.

The files come from tests/golden/make.py and are never made by a test. A second reader,
tests/format_reader.py, knows FORMAT.md alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import struct
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from format_reader import SIZES, Reader, corrected, narrowed, widened
from helpers import assert_same
from zoo import ROOT, bits, fine_tune

import tallstore

HERE = Path(__file__).resolve().parent / "golden"
#: Another digest is another format: see tests/golden/make.py.
DIGESTS: dict[str, str] = {
    "codes.tall": "fdef18dd0db87230bedfa69d21f41e5e83151a8b37bf5f7395d3dc75a8beafbd",
    "external.tall": "cb5101d1894bf4b37c4ca4acf86aeaf227a9e3eb29b1a7e7a0d5f2d16b153d5c",
    "plain.tall": "52f0388b363bfc2a38de4a33f4d655ab3f4523a2741b1b5b00f36be3a0b3cbfa",
    "zoo.tall": "66acb9e7af3f7bffef095d572f6d75a5677bea06d8da5256bca64f45dae12d77",
}


def _make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_make", HERE / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _make()


@pytest.fixture
def golden(tmp_path: Path) -> dict[str, Path]:
    """Copies: opening a store makes a lock file beside it."""
    return {name: Path(shutil.copyfile(HERE / name, tmp_path / name)) for name in sorted(DIGESTS)}


def test_the_files_are_those_that_were_committed() -> None:
    assert len(DIGESTS) == 4
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in HERE.glob("*.tall")}
    assert found == DIGESTS
    assert all(path.stat().st_size < 128 << 10 for path in HERE.glob("*.tall"))


def test_git_does_not_ignore_them() -> None:
    done = subprocess.run(
        ["git", "check-ignore", *(str(HERE / name) for name in DIGESTS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (1, 128), done.stdout  # 128: no repository, as in an archive


def test_the_plain_save(golden: dict[str, Path]) -> None:
    path = golden["plain.tall"]
    assert_same(tallstore.load(path), make.plain())
    assert_same(tallstore.load(path, task="later"), make.plain_task())
    with tallstore.open(path) as store:
        assert store.verify().ok and list(store.tasks) == ["later"]


def test_the_packed_zoo(golden: dict[str, Path]) -> None:
    path = golden["zoo.tall"]
    base, tasks = make.zoo()
    with tallstore.open(path) as store:
        assert store.verify().ok
        assert list(store.tasks) == ["one", "two", "added"]
        assert {n: (t.code, t.exact) for n, t in store.tasks.items()} == {
            "one": ("tall", True),
            "two": ("tall", True),
            "added": ("none", True),
        }
        assert store.vector is not None
        assert (store.vector.dtype, store.vector.rule) == ("bfloat16", "ta")
        assert_same(store.load(), base)
        for name, state in {**tasks, "added": make.added()}.items():
            assert_same(store.load(name), state)


def test_the_store_with_its_base_in_another(golden: dict[str, Path]) -> None:
    path = golden["external.tall"]
    base, _ = make.zoo()
    with tallstore.open(path) as store:
        assert store.format_version == 2 and store.external_base == golden["zoo.tall"]
        assert store.verify().ok
        assert list(store.tasks) == ["three", "four"]
        assert_same(store.load(), base)
        for name, state in make.others().items():
            assert_same(store.load(name), state)


def test_the_store_of_all_codes(golden: dict[str, Path]) -> None:
    path = golden["codes.tall"]
    base, tasks = make.coded()
    with tallstore.open(path) as store:
        assert store.format_version == 2 and store.verify().ok
        assert {name: task.code for name, task in store.tasks.items()} == {
            name: options["code"] for name, options in make.CODES.items()
        }
        assert_same(store.load(), base)
        for name, options in make.CODES.items():
            assert store.tasks[name].exact == options.get("exact", False)
            if options.get("exact"):
                assert_same(store.load(name), tasks[name])


def test_what_is_written_today_is_written_in_the_version_that_it_needs(tmp_path: Path) -> None:
    base, tasks = make.zoo()
    tallstore.pack(tmp_path / "zoo.tall", base, tasks)
    tallstore.save(make.plain(), tmp_path / "plain.tall")
    for name in ("zoo.tall", "plain.tall"):
        assert set(Reader(tmp_path / name).manifest["body"]) == {"base", "vector", "tasks"}


def coded(name: str, base: Any, tasks: Any) -> list[tuple[str, torch.Tensor]]:
    """What the masks of a task alone give, computed from the originals."""
    found = []
    for key, start in base.items():
        if not start.is_floating_point():
            continue
        rows = [t[key] for t in tasks.values() if t[key].shape == start.shape]
        vector = torch.zeros(start.shape)
        for row in rows:
            step = row.float() - start.float()
            vector = vector + torch.where(step.isfinite(), step, 0.0)
        vector = vector.bfloat16().float()
        tuned = tasks[name][key]
        if tuned.shape != start.shape or not bool(tuned.isfinite().all()):
            found.append((key, tuned))
            continue
        base32, tuned32 = start.float(), tuned.float()
        scale = torch.tensor(make.LAMBDA, dtype=torch.float32)
        mask = (base32 - tuned32).abs() > ((base32 + vector) - tuned32).abs() * scale
        found.append((key, (base32 + mask.float() * vector).to(start.dtype)))
    return found


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_masks_of_the_packed_zoo(golden: dict[str, Path], name: str) -> None:
    base, tasks = make.zoo()
    state = tallstore.load(golden["zoo.tall"], task=name, fidelity="codes")
    differing = 0
    for key, expected in coded(name, base, tasks):
        assert bits(state[key]) == bits(expected), key
        differing += bits(expected) != bits(tasks[name][key])
    assert differing >= 2, "the masks are lossless: nothing is shown"


def test_a_golden_store_can_be_written_to(golden: dict[str, Path]) -> None:
    path = golden["zoo.tall"]
    base, tasks = make.zoo()
    tallstore.save(fine_tune(base, 1), path, task="new")
    with tallstore.open(path, "a") as store:
        store.remove("two")
        assert list(store.tasks) == ["one", "added", "new"]
    tallstore.compact(path)
    assert_same(tallstore.load(path, task="one"), tasks["one"])
    assert_same(tallstore.load(path, task="new"), fine_tune(base, 1))


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_every_chunk_by_the_format(golden: dict[str, Path], name: str) -> None:
    reader = Reader(golden[name])
    assert len([reader.stream(number) for number in reader.streams]) >= 5
    more = {"requires"} if name in ("external.tall", "codes.tall") else set()
    assert set(reader.manifest["body"]) == {"base", "vector", "tasks"} | more


@pytest.mark.parametrize("store", ["zoo.tall", "external.tall"])
def test_a_task_by_the_format(golden: dict[str, Path], store: str) -> None:
    """Base, mask, shared vector and residual to the original's bits, without tallstore."""
    reader = Reader(golden[store])
    body = reader.manifest["body"]
    base = json.loads(reader.stream(body["base"]["document"]))
    places = reader.places(base["segments"])
    home, home_streams = reader, base["streams"]
    if body["base"].get("external"):
        home = Reader(golden[store].parent / body["base"]["external"])
        there = home.manifest["body"]["base"]
        assert there["identity"] == body["base"]["identity"] and not any(home_streams)
        home_streams = json.loads(home.stream(there["document"]))["streams"]
    tasks = {"zoo.tall": make.zoo()[1], "external.tall": make.others()}[store]
    seen = dict.fromkeys("bco", 0)
    for name in tasks:
        task = json.loads(reader.stream(body["tasks"][name]["document"]))
        own_places = reader.places(task["own"])
        codes = {code[0]: code[1:] for code in task["codes"]}
        for key, segment, dtype, shape, _, _, _ in task["tensors"]:
            width = SIZES[dtype]
            data = b""
            for kind, number, start, count in task["parts"][segment]:
                seen[kind] += 1
                if kind == "o":
                    arena, first = own_places[number]
                    raw = reader.stream(task["own_streams"][arena])
                    data += raw[first * width : (first + count) * width]
                    continue
                arena, first = places[number]
                first += start
                raw = home.stream(home_streams[arena])
                plain = raw[first * width : (first + count) * width]
                if kind == "b":
                    data += plain
                    continue
                code_dtype, planes, exact = codes[arena]
                assert code_dtype == dtype
                word = {2: np.uint16, 4: np.uint32, 8: np.uint64}[width]
                predicted = np.frombuffer(plain, word)
                if planes is not None:
                    plane = np.frombuffer(reader.stream(planes), np.uint8)
                    bit = np.unpackbits(plane, bitorder="little")[first : first + count]
                    raw = reader.stream(body["vector"]["streams"][arena])
                    assert body["vector"]["dtype"] == "bfloat16"
                    vector = widened(np.frombuffer(raw, np.uint16)[first : first + count])
                    weights = widened(predicted) + np.float32(bit) * vector
                    predicted = narrowed(weights, word)
                raw = reader.stream(exact)[first * width : (first + count) * width]
                data += corrected(predicted, np.frombuffer(raw, word), dtype).tobytes()
            expected = tasks[name][key]
            assert list(expected.shape) == shape
            assert data == bits(expected), (name, key)
    assert min(seen.values()) > 0, f"a kind of part was never met: {seen}"


def test_the_lengths_that_the_format_demands(golden: dict[str, Path]) -> None:
    for path in golden.values():
        data = path.read_bytes()
        metas = []
        for page in (0, 4096):
            magic, version = struct.unpack_from("<II", data, page + 16)
            assert (magic, version) == (0xBEEFC0DE, 1)
            (size,) = struct.unpack_from("<I", data, page + 16 + 24)
            last, transaction = struct.unpack_from("<QQ", data, page + 16 + 120)
            metas.append((transaction, (last + 1) * size))
        assert len(data) >= max(metas)[1]
