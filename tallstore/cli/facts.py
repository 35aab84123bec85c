"""What is printed of a store, as plain data: the content of ``--json``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tallstore.store import TallStore

__all__ = ["base_facts", "store_facts", "task_facts", "tasks_facts", "tensor_facts"]


def _bits(nbytes: int, weights: int) -> float | None:
    return 8 * nbytes / weights if weights else None


def task_facts(store: TallStore, name: str) -> dict[str, Any]:
    """One task, every field of its record."""
    record = store.tasks[name]
    stored = store.stored_bytes(name)
    return {
        "task": name,
        "kept_as": record.kept_as,
        "stored_bytes": stored,
        "original_bytes": record.nbytes,
        "bits_per_weight": _bits(stored, record.weights),
        "code": record.code,
        "planes": record.bits,
        "tall_lambda": record.tall_lambda,
        "density": record.density,
        "relative_error": record.relative_error,
        "score": record.score,
        "exact": record.exact,
        "parameters": dict(record.parameters) if record.parameters else None,
        "over_shared_vector": record.uses_vector,
        "tensors": record.tensors,
        "weights": record.weights,
        "coded_weights": record.coded,
        "own_weights": record.own,
        "label": record.label,
        "kind": record.kind,
        "base": record.base,
        "created": record.created,
    }


def tasks_facts(store: TallStore, names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Several tasks; all if `names` is None."""
    return [task_facts(store, name) for name in (store.tasks if names is None else names)]


def base_facts(store: TallStore) -> dict[str, Any]:
    """The base."""
    record, external = store.base, store.external_base
    return {
        "stored_bytes": store.stored_bytes(),
        "original_bytes": record.nbytes,
        "tensors": record.tensors,
        "weights": record.weights,
        "label": record.label,
        "kind": record.kind,
        "identity": record.identity,
        "external": None if external is None else str(external),
        "created": record.created,
    }


def _vector_facts(store: TallStore) -> dict[str, Any] | None:
    record = store.vector
    if record is None:
        return None
    return {
        "stored_bytes": store.vector_bytes(),
        "dtype": record.dtype,
        "rule": record.rule,
        "parameters": dict(record.parameters),
        "merged_from": list(record.tasks),
        "created": record.created,
    }


def store_facts(store: TallStore) -> dict[str, Any]:
    """The whole store."""
    used, whole = store.file_bytes()
    tasks = tasks_facts(store)
    here = store.base.nbytes if store.external_base is None else 0
    original = here + sum(task["original_bytes"] for task in tasks)
    coded = store.vector_bytes() + sum(task["stored_bytes"] for task in tasks)
    return {
        "store": str(store.path),
        "format_version": store.format_version,
        "written_by": store.written_by,
        "generation": store.generation,
        "file_bytes": whole,
        "free_bytes": max(whole - used, 0),
        "original_bytes": original,
        "original_to_file": original / whole if whole else None,
        "bits_per_weight_and_task": _bits(coded, sum(task["weights"] for task in tasks)),
        "base": base_facts(store),
        "vector": _vector_facts(store),
        "tasks": tasks,
    }


def tensor_facts(store: TallStore, task: str | None) -> list[dict[str, Any]]:
    """Every tensor of a task, or of the base."""
    described = store.describe(task)
    stats = described.segment_stats()
    bits = store.tensor_bits(task) if task is not None else {}
    rows = []
    for tensor in described.contents.tensors:
        found = stats.get(tensor.name)
        rows.append(
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "kept": described.kept(tensor),
                "density": None if found is None else found.density,
                "relative_error": None if found is None else found.relative_error,
                "moved": None if found is None else found.moved,
                "gain": None if found is None else found.gain,
                "cosine": None if found is None else found.cosine,
                "code": described.code_of(tensor),
                "bits_per_weight": bits.get(tensor.name),
            }
        )
    return rows
