"""What a later tallstore wrote is refused by name, and never misread, lost or taken for damage."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from cli_helpers import ok, refused
from helpers import assert_same
from stored import Stored, rewrite, rewrite_body, values

import tallstore
from tallstore.engine.chunk import ChunkBuffer, Encoding, seal_chunk
from tallstore.engine.keys import MANIFEST_KEY, chunk_key
from tallstore.engine.manifest import FORMAT_VERSIONS, Manifest
from tallstore.errors import ChecksumError, CorruptStoreError, NewerFormatError, TallstoreError

Record = dict[str, Any]
CURE = "update tallstore"


def is_newer(error: BaseException, *parts: object) -> None:
    message = str(error)
    assert type(error) is NewerFormatError, f"{type(error).__name__}: {message}"
    for part in (*parts, f"tallstore {tallstore.__version__}", CURE):
        assert str(part) in message, message


def manifest_of(path: Path) -> tuple[Manifest, Record]:
    """The manifest, and its JSON."""
    value = values(path)[MANIFEST_KEY]
    manifest = Manifest.from_bytes(memoryview(value), what="test")
    streams = [stream.to_json() for _, stream in sorted(manifest.streams.items())]
    return manifest, {
        "generation": manifest.generation,
        "next_stream": manifest.next_stream,
        "written_by": manifest.written_by,
        "streams": streams,
        "body": dict(manifest.body),
    }


def sealed(data: bytes, store: bytes, key: bytes) -> bytes:
    buffer = ChunkBuffer.of(len(data))
    buffer.data[:] = memoryview(data)  # type: ignore[assignment]
    return bytes(seal_chunk(buffer, store=store, key=key, encoding=Encoding()))


def write_manifest(
    path: Path, record: Record, *, version: int | None = None, flags: int = 0
) -> None:
    """A manifest of any version (None: the one that it needs), its checksum right."""
    if version is None:
        version = 2 if record["body"].get("requires") else 1
    store = values(path)[MANIFEST_KEY][16:32]
    prefix = struct.pack("<8sII16s", b"TALLSTOR", version, flags, store)
    chunk = sealed(json.dumps(record).encode(), prefix, MANIFEST_KEY)

    def put(items: dict[bytes, bytes]) -> None:
        items[MANIFEST_KEY] = prefix + chunk

    rewrite(path, put)


def rewrite_document(path: Path, task: str | None, change: Callable[[Record], object]) -> None:
    """Change a document, with checksums and lengths that fit."""
    manifest, _ = manifest_of(path)
    owner = manifest.body["base"] if task is None else manifest.body["tasks"][task]
    number = owner["document"]
    key = chunk_key(number, 0)
    with tallstore.open(path) as store:
        data = np.empty(manifest.streams[number].raw, np.uint8)
        store._held().read(store._held().stream(number), 0, data)
    document = json.loads(data.tobytes())
    change(document)
    text = json.dumps(document).encode()
    value = sealed(text, manifest.store, key)
    stream = dataclasses.replace(manifest.streams[number], raw=len(text), stored=len(value))
    after = dataclasses.replace(manifest, streams={**manifest.streams, number: stream})

    def put(items: dict[bytes, bytes]) -> None:
        items[key] = value
        items[MANIFEST_KEY] = after.to_bytes()

    rewrite(path, put)


def test_the_surgery_is_sound(stored: Stored) -> None:
    """Without a change, everything above gives a store that is whole."""
    rewrite_document(stored.path, None, lambda document: None)
    rewrite_document(stored.path, "one", lambda document: None)
    write_manifest(stored.path, manifest_of(stored.path)[1])
    stored.check()
    with tallstore.open(stored.path) as store:
        assert store.verify().ok


# -- the manifest -------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "flags"), [(3, 0), (77, 0), (1, 1), (2, 1 << 31)])
def test_a_format_version_to_come(stored: Stored, version: int, flags: int) -> None:
    write_manifest(stored.path, manifest_of(stored.path)[1], version=version, flags=flags)
    before = stored.path.read_bytes()
    for use in (lambda: tallstore.open(stored.path), lambda: tallstore.compact(stored.path),
                lambda: tallstore.save(stored.base, stored.path, task="x")):  # fmt: skip
        with pytest.raises(TallstoreError) as caught:
            use()
        is_newer(caught.value, stored.path, f"version {version}", "reads versions 1 and 2")
    assert stored.path.read_bytes() == before
    assert CURE in refused("ls", stored.path)
    assert FORMAT_VERSIONS == (1, 2)


@pytest.mark.parametrize("at", range(8, 16))
@pytest.mark.parametrize("bit", [0, 1, 6])
def test_a_damaged_version_is_not_taken_for_a_new_one(stored: Stored, at: int, bit: int) -> None:
    def flip(items: dict[bytes, bytes]) -> None:
        value = bytearray(items[MANIFEST_KEY])
        value[at] ^= 1 << bit
        items[MANIFEST_KEY] = bytes(value)

    rewrite(stored.path, flip)
    with pytest.raises(ChecksumError, match="manifest"):
        tallstore.open(stored.path)


def test_a_version_that_contradicts_its_manifest(stored: Stored) -> None:
    """Version 2 needs something, version 1 nothing."""
    _, record = manifest_of(stored.path)
    assert record["body"].pop("requires") == ["codes"]
    write_manifest(stored.path, record, version=2)
    with pytest.raises(CorruptStoreError, match="contradicts"):
        tallstore.open(stored.path)
    record["body"]["requires"] = ["external-base"]
    write_manifest(stored.path, record, version=1)
    with pytest.raises(CorruptStoreError, match="contradicts"):
        tallstore.open(stored.path)
    write_manifest(stored.path, record, version=2)  # nor needs it what is not there
    with pytest.raises(CorruptStoreError, match="contradicts"):
        tallstore.open(stored.path)


def more_in_a_stream(record: Record) -> None:
    record["streams"][0].append(7)


@pytest.mark.parametrize(
    ("change", "found", "known"),
    [
        (lambda record: record.update(replicas=3), "'replicas'", "generation, next_stream"),
        (more_in_a_stream, "a stream's record of 5 items", "records of 4"),
    ],
)
def test_a_manifest_with_more_in_it(
    stored: Stored, change: Callable[[Record], object], found: str, known: str
) -> None:
    _, record = manifest_of(stored.path)
    change(record)
    write_manifest(stored.path, record)
    with pytest.raises(TallstoreError) as caught:
        tallstore.open(stored.path)
    is_newer(caught.value, found, known)


# -- the body -----------------------------------------------------------------------------


def at(*path: str, **values: Any) -> Callable[[Record], None]:
    """Set fields of the record at `path`."""

    def change(record: Record) -> None:
        for name in path:
            record = record[name]
        record.update(values)

    return change


BODIES: list[tuple[str, Callable[[Record], None], str, str]] = [
    ("a feature", at(requires=["signs"]), "it needs 'signs'", "external-base"),
    (
        "a feature beside one that is known",
        at(requires=["external-base", "adapters"]),
        "it needs 'adapters'",
        "external-base",
    ),
    ("a field", at(adapters={}), "a field 'adapters'", "requires, base, vector, tasks"),
    ("a field of the base", at("base", tower=1), "a field 'tower'", "document, streams"),
    ("a field of the vector", at("vector", scale=2.0), "a field 'scale'", "rule, parameters"),
    ("a field of a task", at("tasks", "one", levels=[]), "a field 'levels'", "tall_lambda"),
    ("a code", at("tasks", "two", code="waves"), "a code 'waves'", "'tall', 'none'"),
    ("more planes", at("tasks", "two", bits=9), "a code of 9 planes", "at most 4"),
    ("a dtype", at("vector", dtype="float8_e4m3fn"), "a dtype 'float8_e4m3fn'", "bfloat16"),
]


@pytest.mark.parametrize(("what", "change", "found", "known"), BODIES, ids=[b[0] for b in BODIES])
def test_a_body_with_more_in_it(
    stored: Stored, what: str, change: Callable[[Record], None], found: str, known: str
) -> None:
    rewrite_body(stored.path, change)
    before = stored.path.read_bytes()
    for use in (
        lambda: tallstore.open(stored.path),
        lambda: tallstore.add(stored.path, {"x": stored.base}),
        lambda: tallstore.save(stored.base, stored.path, overwrite=True),
        lambda: tallstore.pack(stored.path.with_name("p"), stored.path, {"a": stored.base}),
    ):
        with pytest.raises(TallstoreError) as caught:
            use()
        is_newer(caught.value, stored.path, found, known)
    assert stored.path.read_bytes() == before, "a writer that knows less went over it"
    assert found in refused("info", stored.path)


def test_a_merge_rule_to_come_stops_nobody(stored: Stored) -> None:
    """The shared vector is what it is, by whichever rule it was made."""
    rewrite_body(
        stored.path,
        at("vector", rule="quantum-annealing", parameters={"qubits": 9, "nested": {"a": [1]}}),
    )
    stored.check()
    tallstore.save(stored.base, stored.path, task="late")
    with tallstore.open(stored.path, "a") as store:
        store.remove("late")
    tallstore.compact(stored.path)
    stored.check()
    with tallstore.open(stored.path) as store:
        assert store.verify().ok and store.vector is not None
        assert store.vector.rule == "quantum-annealing"
        assert store.vector.parameters == {"qubits": 9, "nested": {"a": [1]}}
        assert store.statistics().to_json()["tasks"]
    assert "quantum-annealing" in ok("info", stored.path)


# -- documents ----------------------------------------------------------------------------


def lengthen(field: str) -> Callable[[Record], None]:
    """One more item in the first record of a field."""

    def change(document: Record) -> None:
        row = document[field][0]
        (row[0] if field == "parts" else row).append(0)

    return change


def put(field: str, place: int, value: Any) -> Callable[[Record], None]:
    """Another value in the first record of a field."""

    def change(document: Record) -> None:
        row = document[field][0]
        (row[0] if field == "parts" else row)[place] = value

    return change


DOCUMENTS: list[tuple[str, Callable[[Record], Any], str, str]] = [
    ("a field", lambda d: d.update(adapters=[]), "a field 'adapters'", "kind, tree, tensors"),
    ("a tensor of 8 items", lengthen("tensors"), "a record of 8 items", "records of 7"),
    ("a segment of 3", lengthen("segments"), "a record of 3 items", "records of 2"),
    ("flags of a tensor", put("tensors", 6, 16), "flags 16", "1, 2, 4, 8"),
    ("a dtype of a tensor", put("tensors", 2, "posit16"), "a dtype 'posit16'", "torch"),
    ("a dtype of a segment", put("segments", 0, "posit16"), "a dtype 'posit16'", "torch"),
    (
        "a file of 5",
        lambda d: d["files"].append(["x", 0, 1, 0, 0]),
        "a record of 5 items",
        "records of 4",
    ),
]
OF_TASKS: list[tuple[str, Callable[[Record], Any], str, str]] = [
    ("a kind of part", put("parts", 0, "s"), "a part of kind 's'", "b, c, o"),
    ("a part of 5", lengthen("parts"), "a record of 5 items", "records of 4"),
    ("a code of 10", lengthen("codes"), "a record of 10 items", "records of 9"),
    ("a code's dtype", put("codes", 1, "posit16"), "a dtype 'posit16'", "torch"),
    ("statistics of 6", lengthen("stats"), "a record of 6 items", "records of 5"),
]


@pytest.mark.parametrize("task", [None, "one"])
@pytest.mark.parametrize(
    ("what", "change", "found", "known"), DOCUMENTS, ids=[d[0] for d in DOCUMENTS]
)
def test_a_document_with_more_in_it(
    stored: Stored,
    task: str | None,
    what: str,
    change: Callable[[Record], Any],
    found: str,
    known: str,
) -> None:
    _check_document(stored, task, change, found, known)


@pytest.mark.parametrize(
    ("what", "change", "found", "known"), OF_TASKS, ids=[d[0] for d in OF_TASKS]
)
def test_a_tasks_document_with_more_in_it(
    stored: Stored, what: str, change: Callable[[Record], Any], found: str, known: str
) -> None:
    _check_document(stored, "one", change, found, known)


def _check_document(
    stored: Stored, task: str | None, change: Callable[[Record], Any], found: str, known: str
) -> None:
    rewrite_document(stored.path, task, change)
    with tallstore.open(stored.path) as store:
        for use in (lambda: store.load(task), lambda: store.describe(task)):
            with pytest.raises(TallstoreError) as caught:
                use()
            is_newer(caught.value, stored.path, found, known)
        problems = store.verify().problems
        concerned = {owner for problem in problems for owner in problem.owners}
        assert ("base" if task is None else "task 'one'") in concerned
        if task is not None:
            assert concerned == {"task 'one'"}
            assert_same(store.load("two"), stored.tasks["two"])


def test_a_tag_of_a_tree_to_come(stored: Stored) -> None:
    def change(document: Record) -> None:
        document["tree"] = {"$generator": {"state": document["tree"]}}

    rewrite_document(stored.path, "one", change)
    with pytest.raises(TallstoreError) as caught:
        tallstore.load(stored.path, task="one")
    is_newer(caught.value, "a tag '$generator'", "$odict")


# -- chunks -------------------------------------------------------------------------------


def reseal(value: bytes, store: bytes, key: bytes, **fields: Any) -> bytes:
    """A chunk with another header, its checksum right."""
    names = ("magic", "codec", "parameter", "flags", "raw", "size", "reserved")
    head = dict(zip(names, struct.unpack("<4sBBHQQQ", value[:32]), strict=True))
    packed = struct.pack("<4sBBHQQQ", *{**head, **fields}.values())
    return packed + xxhash.xxh3_128(store + key + packed + value[48:]).digest() + value[48:]


def exact_stream(store: Any) -> int:
    """A stream that loading task "one" cannot do without."""
    number = store.describe("one").task.codes[0].exact
    assert isinstance(number, int)
    return number


@pytest.mark.parametrize(
    ("fields", "found", "known"),
    [
        ({"codec": 6}, "codec 6", "0, 1, 2, 3, 4, 5"),
        ({"codec": 255}, "codec 255", "0, 1, 2"),
        ({"magic": b"TSC2"}, "a chunk of version b'2'", "b'1'"),
        ({"flags": 1}, "flags 0x1", "none"),
        ({"reserved": 1 << 60}, "0x1000000000000000 in a chunk's header", "none"),
    ],
)
def test_a_chunk_with_more_in_its_header(
    stored: Stored, fields: dict[str, Any], found: str, known: str
) -> None:
    manifest, _ = manifest_of(stored.path)
    with tallstore.open(stored.path) as store:
        number = exact_stream(store)
    key = chunk_key(number, 0)

    def change(items: dict[bytes, bytes]) -> None:
        assert reseal(items[key], manifest.store, key) == items[key]
        items[key] = reseal(items[key], manifest.store, key, **fields)

    rewrite(stored.path, change)
    with tallstore.open(stored.path) as store:
        with pytest.raises(TallstoreError) as caught:
            store.load("one")
        is_newer(caught.value, f"{stored.path}: stream {number}, chunk 0", found, known)
        (problem,) = store.verify().problems
        assert problem.owners == ("task 'one'",) and CURE in problem.message
        assert_same(store.load("two"), stored.tasks["two"])


@pytest.mark.parametrize("at", [0, 3, 4, 5, 6, 7, 24, 31])
def test_a_damaged_header_is_not_taken_for_a_new_one(stored: Stored, at: int) -> None:
    with tallstore.open(stored.path) as store:
        key = chunk_key(exact_stream(store), 0)

    def flip(items: dict[bytes, bytes]) -> None:
        value = bytearray(items[key])
        value[at] ^= 4
        items[key] = bytes(value)

    rewrite(stored.path, flip)
    with pytest.raises(CorruptStoreError):
        tallstore.load(stored.path, task="one")


# -- the other way round ------------------------------------------------------------------


def test_a_store_that_needs_more_is_marked_for_older_readers(tmp_path: Path) -> None:
    """The first tallstore compared one number, at byte 8 of the manifest, with 1."""
    golden = Path(__file__).parent / "golden"
    versions = {
        name: values(_copy(golden / name, tmp_path))[MANIFEST_KEY][8:12]
        for name in ("plain.tall", "zoo.tall", "external.tall")
    }
    assert {name: int.from_bytes(v, "little") for name, v in versions.items()} == {
        "plain.tall": 1,
        "zoo.tall": 1,
        "external.tall": 2,
    }


def _copy(source: Path, folder: Path) -> Path:
    target = folder / source.name
    target.write_bytes(source.read_bytes())
    return target
