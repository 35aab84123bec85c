"""What is left of a damaged store is made whole; what is not there any more is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_same
from stored import Stored, damaged, values

import tallstore
from tallstore.engine.keys import chunk_key
from tallstore.errors import CorruptStoreError, OptionError, StoreExistsError
from tallstore.repairing import repair_store


def _hit(stored: Stored, choose: Callable[[Any], int | None]) -> None:
    """Flip a bit of the stream that `choose` takes of a handle's description."""
    with tallstore.open(stored.path) as store:
        stream = choose(store)
    assert stream is not None
    value = values(stored.path)[chunk_key(stream, 0)]
    stored.path.write_bytes(damaged(stored.path.read_bytes(), value, len(value) - 1, 3))


def test_a_whole_store_stays_whole(stored: Stored, tmp_path: Path) -> None:
    done = repair_store(stored.path, out=tmp_path / "out.tall")
    assert done.ok and done.in_force and done.whole == ("one", "two") and not done.missing
    Stored(tmp_path / "out.tall", stored.base, stored.tasks).check()


def test_a_task_without_its_exact_tier_is_lossy_now(stored: Stored) -> None:
    _hit(stored, lambda store: store.describe("one").task.codes[0].exact)
    done = repair_store(stored.path)
    assert set(done.lossy) == {"one"} and done.whole == ("two",) and not done.lost
    assert not done.ok and done.missing == 1 and done.kept.exists()
    with tallstore.open(stored.path) as store:
        assert store.verify().ok and not store.tasks["one"].exact
        assert_same(store.load("two"), stored.tasks["two"])
        found = store.load("one")
    assert found.keys() == stored.tasks["one"].keys()


def test_a_task_without_its_codes_is_lost(stored: Stored) -> None:
    _hit(stored, lambda store: store.describe("one").task.codes[0].planes)
    done = repair_store(stored.path)
    assert set(done.lost) == {"one"} and done.lost["one"].tensors and done.whole == ("two",)
    with tallstore.open(stored.path) as store:
        assert list(store.tasks) == ["two"] and store.verify().ok
        assert_same(store.load(), stored.base)
        assert_same(store.load("two"), stored.tasks["two"])


def test_without_its_shared_vector_no_task_of_masks_is_left(stored: Stored) -> None:
    _hit(stored, lambda store: store.vector.streams[0])
    done = repair_store(stored.path)
    assert set(done.lost) == {"one", "two"} and not done.whole
    assert_same(tallstore.load(stored.path), stored.base)


@pytest.mark.parametrize(
    ("choose", "words", "others_load"),
    [
        (lambda store: store.base.document, "its document", False),
        (lambda store: store.describe().base.streams[0], "of its tensors ('", True),
    ],
    ids=["document", "tensors"],
)
def test_without_a_base_there_is_no_store(
    stored: Stored, tmp_path: Path, choose: Callable[[Any], int], words: str, others_load: bool
) -> None:
    _hit(stored, choose)
    before = stored.path.read_bytes()
    with pytest.raises(CorruptStoreError) as caught:
        repair_store(stored.path, out=tmp_path / "out.tall")
    message = str(caught.value)
    assert str(stored.path) in message and "the base is damaged: " in message and words in message
    assert ("still load (names=)" in message) is others_load, "true, where it is said"
    assert stored.path.read_bytes() == before and not (tmp_path / "out.tall").exists()


def test_places_that_do_not_do(stored: Stored, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="leave out= away"):
        repair_store(stored.path, out=stored.path)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(StoreExistsError, match="there already"):
        repair_store(stored.path, out=tmp_path / "link")
    stored.check()
