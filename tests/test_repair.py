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


#: The codes that there are, and a stream of each.
CODES: dict[str, dict[str, Any]] = {
    "tall": {},
    "signs": {"code": "signs", "density": 0.1},
    "seeded": {"code": "seeded"},
    "levels": {"code": "levels", "bits": 3},
    "levels over shared": {"code": "levels", "over": "shared"},
    "auto": {"code": "auto", "bits_per_weight": 2.0},
}


def _codes(store: Any) -> int:
    code = store.describe("one").task.codes[0]
    return next(n for n in (code.planes, code.sparse, code.seeded) if n is not None)


@pytest.mark.parametrize("options", CODES.values(), ids=CODES)
def test_a_task_without_its_codes_is_as_it_was_or_lost(
    stored: Stored, tmp_path: Path, options: dict[str, Any]
) -> None:
    """It is lost where there was nothing but codes."""
    tallstore.pack(stored.path, stored.base, stored.tasks, exact=True, overwrite=True, **options)
    _hit(stored, _codes)
    done = repair_store(stored.path)
    assert done.bare == ("one",) and done.whole == ("two",) and not done.lost and not done.ok
    stored.path.with_name("zoo.tall.damaged").unlink()
    stored.check()
    with tallstore.open(stored.path) as store:
        assert store.tasks["one"].code == "none" and store.tasks["two"].code != "none"
        assert_same(store.load("one", fidelity="exact"), stored.tasks["one"])

    tallstore.pack(stored.path, stored.base, stored.tasks, overwrite=True, **options)
    before = tallstore.load(stored.path, task="two")
    _hit(stored, _codes)
    done = repair_store(stored.path)
    assert set(done.lost) == {"one"} and done.lost["one"].tensors and done.whole == ("two",)
    with tallstore.open(stored.path) as store:
        assert list(store.tasks) == ["two"] and store.verify().ok
        assert_same(store.load(), stored.base)
        assert_same(store.load("two"), before)


def test_a_task_without_codes_and_exact_tier_is_lost(stored: Stored) -> None:
    _hit(stored, _codes)
    _hit(stored, lambda store: store.describe("one").task.codes[0].exact)
    done = repair_store(stored.path)
    assert done.lost["one"].roles == {"planes", "residual"} and done.whole == ("two",)
    with tallstore.open(stored.path) as store:
        assert list(store.tasks) == ["two"] and store.verify().ok


@pytest.mark.parametrize("exact", [False, True])
def test_without_its_shared_vector_no_mask_is_left(stored: Stored, exact: bool) -> None:
    tallstore.pack(stored.path, stored.base, stored.tasks, exact=exact, overwrite=True)
    _hit(stored, lambda store: store.vector.streams[0])
    done = repair_store(stored.path)
    assert done.bare == (("one", "two") if exact else ()) and not done.whole
    assert set(done.lost) == (set() if exact else {"one", "two"})
    with tallstore.open(stored.path) as store:
        assert store.verify().ok and store.vector is None
        assert_same(store.load(), stored.base)
        for name in done.bare:
            assert_same(store.load(name), stored.tasks[name])


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
