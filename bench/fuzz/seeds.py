"""Good inputs to begin with, made by the writers themselves."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

import tallstore
from bench.fuzz.targets import BASE, coded_store, side_of
from tallstore.codecs import CODECS, GUIDED, PLANES, SPARSE, SYMBOLS
from tallstore.engine.chunk import ChunkBuffer, Encoding, seal_chunk
from tallstore.engine.snapshot import Snapshot
from tallstore.store import open_snapshot

__all__ = ["seeds"]


def _state(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(4, 8, generator=draw), "b": torch.randn(7, generator=draw).bfloat16()}


#: Over the tensors of the target.
_TREES = (
    b'{"a":[{"$tuple":[{"$tensor":0},{"$set":[1]}]},{"$frozenset":["s"]}]}',
    b'{"a":{"$int":"0x7f"},"b":{"$float":"7ff8000000000000"},"c":{"$complex":[1.0,2.0]}}',
    b'{"a":{"$size":[1,2]},"b":{"$dtype":"float16"},"c":{"$device":"cpu"},"d":{"$bytes":"eA=="}}',
    b'{"$odict":{"w":{"$tensor":2}},"$metadata":{"":{"version":1}}}',
    b'[{"$dict":[1,"x",{"$tuple":[]},null]},{"$str":0},{"$scalar":["<f4","AACAPw=="]}]',
    b'[{"$ndarray":[0,"<i8",[2,4],"F"]},{"$ndarray":[3,"<f4",[0,3],"C"]}]',
    b'{"$ndarray":[0,{"fields":[["x","<f4",0],["y",{"base":"|i1","shape":[4]},4]],'
    b'"itemsize":8,"aligned":true},[8],"C"]}',
    b'{"$sparse":{"layout":"sparse_coo","size":[2,3],"parts":[1,2],"coalesced":true}}',
    b'{"$sparse":{"layout":"sparse_csr","size":[3,3],"parts":[4,5,2],"parameter":true}}',
)


def _document(snapshot: Snapshot, number: int) -> bytes:
    stream = snapshot.stream(number)
    data = np.empty(stream.raw, np.uint8)
    snapshot.read(stream, 0, data)
    return data.tobytes()


def _documents(snapshot: Snapshot) -> list[bytes]:
    tasks = dict(snapshot.manifest.body)["tasks"].values()
    return [_document(snapshot, task["document"]) for task in tasks]


def _codes(folder: Path) -> list[bytes]:
    """A task's document for each code."""
    found = []
    for code in ("signs", "seeded", "levels"):
        path = folder / f"{code}.tall"
        tallstore.pack(path, _state(0), {"x": _state(1)}, code=code, exact=code != "levels")
        snapshot = open_snapshot(path)
        found += _documents(snapshot)
        snapshot.close()
    return found


def _stores(folder: Path) -> dict[str, list[bytes]]:
    path = folder / "z.tall"
    tallstore.pack(path, _state(0), {"x": _state(1), "y": _state(2)}, exact=True)
    tallstore.save({**_state(3), "own": torch.arange(3)}, path, task="z", overwrite=True)
    found: dict[str, list[bytes]] = {"pages": [path.read_bytes()]}
    snapshot = open_snapshot(path)
    manifest = snapshot.manifest
    body = dict(manifest.body)

    found["task-document"] = _documents(snapshot)
    found["base-document"] = [BASE, _document(snapshot, body["base"]["document"])]
    record = {
        "generation": manifest.generation,
        "next_stream": manifest.next_stream,
        "written_by": manifest.written_by,
        "streams": [stream.to_json() for stream in manifest.streams.values()],
        "body": body,
    }
    found["manifest"] = [json.dumps(record).encode()]
    snapshot.close()
    with tallstore.open(path, "a") as store:
        store.remove("x")
    found["pages"].append(path.read_bytes())
    found["task-document"] += _codes(folder)
    found["decoding"] = _documents(coded_store()[0])
    return found


def _chunks() -> dict[str, list[bytes]]:
    words = np.arange(3000, dtype=np.uint32).view(np.uint8)
    signs = np.zeros((2, 6000), np.uint8)
    signs[0, ::7], signs[1, 5::490] = 4, 64
    moved = (np.arange(3000, dtype=np.uint32) % 977 * 5).view(np.uint8)
    chunks, payloads = [], []
    for number, codec in CODECS.items():
        data = {SPARSE.number: signs.ravel(), GUIDED.number: moved}.get(number, words)
        buffer = ChunkBuffer.of(data.size)
        np.copyto(buffer.data, data)
        parameter = {PLANES.number: 4, GUIDED.number: 3, SYMBOLS.number: 4}.get(number, 0)
        encoding = Encoding(codec, parameter, 0.0, side_of(data.size))
        value = bytes(seal_chunk(buffer, store=bytes(16), key=bytes(12), encoding=encoding))
        assert value[4] == number, "it gained nothing"
        size = data.size.to_bytes(3, "little")
        chunks.append(b"\1" + size + value)
        payloads.append(bytes([number, value[5]]) + size + value[48:])
    return {"chunk": chunks, "codecs": payloads}


def seeds() -> dict[str, list[bytes]]:
    """Some good inputs of each target."""
    torch_files = []
    for legacy in (False, True):
        held = io.BytesIO()
        torch.save({"state_dict": _state(4)}, held, _use_new_zipfile_serialization=not legacy)
        torch_files.append(held.getvalue())
    index = {"metadata": {"total_size": 9}, "weight_map": {"a": "m-1.safetensors", "b": "x/y"}}
    with tempfile.TemporaryDirectory() as folder:
        found = _stores(Path(folder))
    plain = save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int8)}, {"format": "pt"})
    return {
        **found,
        **_chunks(),
        "strict-json": [b'{"a":[1,-2.5e3,true,null,"\\u00e9\\ud83d\\ude00"]}'],
        "objects": list(_TREES),
        "safetensors": [plain, save({}), save({"s": torch.tensor(1.0)})],
        "torch-file": torch_files,
        "shard-index": [json.dumps(index).encode()],
    }
