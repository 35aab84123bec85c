"""Codes from the store into the forms that are kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from tallstore.codecs import Bytes
from tallstore.codes import SEEDED, ArenaCode, SegmentCode, seeded_pieces
from tallstore.errors import CorruptStoreError
from tallstore.kernels.seeded_reference import SeededTensor, build
from tallstore.layout import BLOCK
from tallstore.loading import Loader
from tallstore.ops import AnySparseCode, SeededCode, SparseCode, compress_planes, locate_seeded
from tallstore.seeding import seeded_tensor
from tallstore.serving.forms import SparseForm
from tallstore.serving.planning import Run
from tallstore.serving.resident import host_memory
from tallstore.spancodes import code_bits
from tallstore.workers import Workers

__all__ = ["compact_form", "read_planes"]


def read_planes(
    loader: Loader, arena: int, pool: Workers, *, pin_for: torch.device
) -> torch.Tensor:
    """A task's codes over an arena, checked: uint8, shape (K, weights / 8).

    Parameters
    ----------
    pin_for
        The device that they will go to.

    Raises
    ------
    CorruptStoreError
    """
    code = next(code for code in _codes(loader) if code.arena == arena)
    shape, bits = loader.base.layout.arenas[arena], code_bits(code)
    whole = host_memory(bits * shape.weights // 8, pin_for).view(bits, -1)
    planes = whole.numpy()

    def read(span: int) -> None:
        first = span * shape.span // 8
        stop = min(first + shape.span // 8, shape.weights // 8)
        alone = planes[0, first:stop]

        def take(name: str, size: int) -> Bytes:
            return alone if size == alone.size else np.empty(size, np.uint8)

        found = loader.decoder.codes(arena, span, take)
        if found is None:
            raise CorruptStoreError(f"{loader.what}: a coded part without a code")
        if bits > 1:
            planes[:, first:stop] = found[0].reshape(bits, -1)

    for _ in pool.each(read, range(shape.spans)):
        pass
    return whole


def _codes(loader: Loader) -> Sequence[ArenaCode]:
    return () if loader.task is None else loader.task.codes


def compact_form(
    loader: Loader,
    arena: int,
    runs: Sequence[tuple[Run, SegmentCode]],
    base: torch.Tensor,
    planes: torch.Tensor | None,
    pool: Workers,
    *,
    located: bool,
) -> SparseForm:
    """Sparse and seeded codes of whole segments.

    Parameters
    ----------
    base
        The arena, on the device.
    planes
        What `read_planes` gave, if there are sparse codes among them.
    located
        Keep seeded values with their places.
    """
    values = _read_values(loader, arena, pool) if any(c.form == SEEDED for _, c in runs) else []

    def make(item: tuple[Run, SegmentCode]) -> tuple[AnySparseCode, torch.Tensor, torch.Tensor]:
        run, code = item
        made: AnySparseCode
        if code.form == SEEDED:
            seeded = _seeded(loader, arena, run, code, values)
            made = locate_seeded(seeded) if located else seeded
        elif planes is None:
            raise CorruptStoreError(f"{loader.what}: sparse codes without their planes")
        else:
            made = _sparse(run, code, planes)
        return made, base[run.first : run.stop], run.out

    return SparseForm(tuple(pool.each(make, runs)))


def _sparse(run: Run, code: SegmentCode, planes: torch.Tensor) -> SparseCode:
    part = planes[: code.bits, run.first // 8 : (run.stop + 7) // 8]
    levels = torch.tensor([code.row(code.bits)], dtype=torch.float32, device="cpu")
    return compress_planes(part, run.out.numel(), levels)


def _read_values(loader: Loader, arena: int, pool: Workers) -> list[Bytes]:
    """The seeded values of each span: uint8, shape (B, bytes)."""
    code = next(code for code in _codes(loader) if code.arena == arena)
    if code.seeded is None:
        raise CorruptStoreError(f"{loader.what}: seeded codes without their values")
    stream = loader.snapshot.stream(code.seeded)

    def read(span: int) -> Bytes:
        raw = np.empty(stream.raw_size(span), np.uint8)
        loader.snapshot.read_chunk(stream, span, raw)
        return raw.reshape(code.value_bits, -1)

    return list(pool.each(read, range(loader.base.layout.arenas[arena].spans)))


def _seeded(
    loader: Loader, arena: int, run: Run, code: SegmentCode, values: Sequence[Bytes]
) -> SeededCode:
    task, layout = loader.task, loader.base.layout
    if task is None:
        raise CorruptStoreError(f"{loader.what}: codes without a task")
    size = layout.arenas[arena].span
    tensors: list[SeededTensor] = []
    parts: list[Bytes] = []
    for span in range(run.first // size, (run.stop - 1) // size + 1):
        for seeded in seeded_pieces(layout, task.codings or {}, arena, span):
            if seeded.piece.segment != run.segment:
                continue
            there = seeded_tensor(seeded, seed=task.seed, arena_span=size, span=span)
            tensors.append(replace(there, offset=there.offset - run.first))
            first, blocks = seeded.first // 8, -(-seeded.groups // BLOCK)
            parts.append(values[span][: code.bits, first : first + blocks * BLOCK // 8])
    planes = torch.from_numpy(np.ascontiguousarray(np.concatenate(parts, axis=1)))
    table = torch.tensor([code.levels] * len(tensors), dtype=torch.float32, device="cpu")
    return build(tensors, planes, table, run.out.numel())
