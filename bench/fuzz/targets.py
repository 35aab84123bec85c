"""What is fuzzed: each target takes any bytes, and may only refuse them with a TallstoreError.

Shared by the coverage-guided runs (`python -m bench.fuzz`) and by tests/test_fuzz.py, a handful
of the same.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import tallstore
from tallstore import strictjson
from tallstore.catalog import Catalog
from tallstore.codecs import CODECS, Bytes
from tallstore.codes import MAX_BITS, level_rows, seeded_capacity
from tallstore.decoding import Decoder
from tallstore.describing import read_base
from tallstore.documents import MAX_DOCUMENT, BaseDocument, TaskDocument
from tallstore.engine.chunk import ChunkBuffer, Encoding, check_chunk, seal_chunk
from tallstore.engine.datafile import check_data_file
from tallstore.engine.freepages import check_free_pages, check_runs
from tallstore.engine.keys import MANIFEST_KEY
from tallstore.engine.manifest import Manifest
from tallstore.engine.snapshot import Snapshot
from tallstore.engine.tree import walk
from tallstore.errors import TallstoreError
from tallstore.objects import assemble, build_tensor
from tallstore.sources.reading import ReadOnlyFile
from tallstore.sources.safetensors_format import parse_header
from tallstore.sources.shard_index import read_index
from tallstore.sources.torch_file import TorchFile
from tallstore.store import open_snapshot

__all__ = ["BASE", "JSON_TARGETS", "TARGETS", "coded_store", "play", "side_of"]

#: A base that fuzzed tasks refer to.
BASE: Final = (
    b'{"kind":"object","tree":{"a":{"$tensor":0},"b":{"$tensor":1}},"tensors":[["a",0,"float32",'
    b'[4,8],0,0,0],["b",1,"bfloat16",[7],0,0,0]],"segments":[["float32",32],["bfloat16",7]],'
    b'"files":[],"streams":[2,3]}'
)
#: A little memory for tensors to view: larger claims must be refused, not allocated.
_MEMORY: Final = 4096
_MAX_OUT: Final = 1 << 20


def side_of(size: int) -> Bytes:
    """What a codec may be given beside the payload: the bytes of some numbers."""
    words = np.random.default_rng(0).normal(0.0, 0.1, 4096).astype("<f4")
    return np.resize(words.view(np.uint8), size)


def _manifest(data: bytes) -> None:
    """A manifest whose checksum fits: what is left is its text."""
    version = 2 if b'"requires"' in data else 1
    prefix = b"TALLSTOR" + version.to_bytes(4, "little") + bytes(4) + bytes(16)
    buffer = ChunkBuffer.of(len(data))
    np.copyto(buffer.data, np.frombuffer(data, np.uint8))
    chunk = seal_chunk(buffer, store=prefix, key=MANIFEST_KEY, encoding=Encoding())
    found = Manifest.from_bytes(memoryview(prefix + bytes(chunk)), what="fuzz")
    catalog = Catalog.from_json(found.body, what="fuzz")
    catalog.live_streams()
    for stream in found.streams.values():
        assert 0 <= stream.chunks <= stream.raw


def _base(data: bytes) -> None:
    document = BaseDocument.from_bytes(data, what="fuzz")
    _build(document)
    document.contents.names()


def _task(data: bytes) -> None:
    base = BaseDocument.from_bytes(BASE, what="base")
    plain = b'"codings"' not in data
    document = TaskDocument.from_bytes(data, base=base, plain=plain, what="fuzz")
    _build(document)
    rows = level_rows(document.codings or {}, MAX_BITS)[1]
    assert all(len(row) == 1 << MAX_BITS for row in rows)
    for code in document.codes if document.codings else ():
        assert seeded_capacity(base.layout, document.codings, code.arena) <= 1 << 30


def _build(document: BaseDocument | TaskDocument) -> None:
    """What loading does once the segments are in memory, with little memory."""
    contents = document.contents
    built: list[Any] = []
    for tensor in contents.tensors:
        size = min(contents.segments[tensor.segment].nbytes, _MEMORY)
        built.append(build_tensor(tensor, torch.zeros(size, dtype=torch.uint8)))
    assemble(contents.tree, built)


@functools.cache
def coded_store() -> tuple[Snapshot, Catalog, BaseDocument]:
    """A store of one task for each kind of code, for documents to refer to its streams."""
    folder = Path(tempfile.mkdtemp(prefix="tallstore-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    draw = torch.Generator().manual_seed(5)
    shapes = {"a": (70, 60), "b": (1300,), "c": (7,)}
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    tuned = {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in base.items()}
    path = folder / "coded.tall"
    tallstore.pack(path, base, {"x": tuned}, code="auto", bits_per_weight=1.5, exact=True)
    tallstore.save({**tuned, "own": torch.arange(3)}, path, task="y")
    snapshot = open_snapshot(path)
    catalog = Catalog.from_json(snapshot.manifest.body, what="fuzz")
    return snapshot, catalog, read_base(snapshot, catalog)


def _decode(data: bytes) -> None:
    """A task's document over streams that do not fit it, decoded with and without exact tier."""
    snapshot, catalog, base = coded_store()
    plain = b'"codings"' not in data
    document = TaskDocument.from_bytes(data, base=base, plain=plain, what="fuzz")
    if document.contents.nbytes > _MAX_OUT:
        return
    for exact in (True, False):
        decoder = Decoder(snapshot, base, task=document, vector=catalog.vector, exact=exact)
        for key in decoder.spans(range(len(document.contents.segments))):
            span = decoder.load(key)
            runs = [(r, np.empty(r.count * decoder.width(r), np.uint8)) for r in decoder.runs(key)]
            decoder.decode(span, key, runs)
            span.release()


def _json(data: bytes) -> None:
    value = strictjson.loads(data, what="fuzz", max_bytes=MAX_DOCUMENT)
    with contextlib.suppress(ValueError):  # half a surrogate pair, or 1e999
        assert strictjson.loads(strictjson.dumps(value), what="x", max_bytes=1 << 30) == value


def _chunk(data: bytes) -> None:
    """A header of the input's choosing; with its first bit set, the checksum is made to fit."""
    if len(data) < 4:
        return
    fits, out_size, value = data[0] & 1, int.from_bytes(data[1:4], "little"), bytearray(data[4:])
    if fits and len(value) >= 48:
        import xxhash

        state = xxhash.xxh3_128(bytes(16) + bytes(12) + bytes(value[:32]))
        state.update(bytes(value[48:]))
        value[32:48] = state.digest()
    chunk = check_chunk(memoryview(bytes(value)), store=bytes(16), key=bytes(12), what="fuzz")
    out = np.empty(min(out_size, _MAX_OUT), np.uint8)
    chunk.decode(out, what="fuzz", side=side_of(out.size))


def _codecs(data: bytes) -> None:
    if len(data) < 5:
        return
    codec = CODECS[data[0] % len(CODECS)]
    out = np.empty(int.from_bytes(data[2:5], "little") % _MAX_OUT, np.uint8)
    codec.decode(memoryview(data)[5:], out, parameter=data[1], side=side_of(out.size))


def _objects(data: bytes) -> None:
    """A tree over tensors of several kinds."""
    tensors = [
        torch.arange(64, dtype=torch.uint8),
        torch.tensor([[0, 1], [2, 0]]),
        torch.ones(2),
        torch.zeros(0, dtype=torch.uint8),
        torch.tensor([0, 1, 1, 2]),
        torch.tensor([0, 2]),
    ]
    assemble(strictjson.loads(data, what="fuzz", max_bytes=1 << 24), tensors)


def _with_file(use: Callable[[Path], None]) -> Callable[[bytes], None]:
    folder = Path("/dev/shm") if os.path.isdir("/dev/shm") else Path(tempfile.gettempdir())

    def target(data: bytes) -> None:
        path = folder / f"tallstore-fuzz-{os.getpid()}"
        path.write_bytes(data)
        try:
            use(path)
        finally:
            path.unlink()

    return target


def _safetensors(path: Path) -> None:
    header = parse_header(path)
    size = path.stat().st_size
    for tensor in header.tensors.values():
        assert 0 <= tensor.begin <= tensor.end <= size


def _torch(path: Path) -> None:
    with TorchFile(path) as source:
        for number, segment in enumerate(source.segments):
            out = np.empty(min(segment.nbytes, _MAX_OUT), np.uint8)
            source.read(number, 0, out)


def _index(path: Path) -> None:
    with ReadOnlyFile(path) as file:
        for shard in read_index(file).values():
            place = os.path.realpath(path.parent / shard)
            assert place.startswith(os.path.realpath(path.parent) + os.sep)


def _pages(path: Path) -> None:
    """An LMDB file: its pages are checked before LMDB sees it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        file = check_data_file(descriptor, path)
        tree = walk(descriptor, file, file.main, path=path)
        assert (tree.places + tree.sizes <= file.nbytes).all()
        check_runs(descriptor, file, tree, range(len(tree.keys)))
        check_free_pages(descriptor, file, tree, path=path)
    finally:
        os.close(descriptor)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "manifest": _manifest,
    "base-document": _base,
    "task-document": _task,
    "decoding": _decode,
    "strict-json": _json,
    "chunk": _chunk,
    "codecs": _codecs,
    "objects": _objects,
    "safetensors": _with_file(_safetensors),
    "torch-file": _with_file(_torch),
    "shard-index": _with_file(_index),
    "pages": _with_file(_pages),
}
#: Those whose input is JSON, and is mutated as such too.
JSON_TARGETS: Final = frozenset(
    {
        *("manifest", "base-document", "task-document", "decoding"),
        *("strict-json", "objects", "shard-index"),
    }
)


def play(target: str, data: bytes) -> bool:
    """Give an input to a target; whether it was taken. Any other error than a refusal is raised."""
    try:
        TARGETS[target](data)
    except TallstoreError as exc:
        assert str(exc), "a refusal without a word"
        json.dumps(str(exc))
        return False
    return True
