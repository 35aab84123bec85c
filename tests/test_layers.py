"""Design, section 4: a file imports its own layer and those below; little comes in by itself."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from zoo import ROOT, run_child

PACKAGE = ROOT / "tallstore"

#: Modules and packages from the bottom up; a package stands for all of its modules.
LAYERS: list[set[str]] = [
    {
        "bits",
        "dtypes",
        "advice",
        "compiling",
        "errors",
        "interrupts",
        "jit",
        "layout",
        "progress",
        "scratch",
        "specs",
        "strictjson",
        "version",
        "wording",
    },
    {"codecs"},
    {"engine"},
    {
        "bitsliced",
        "catalog",
        "codes",
        "coding",
        "devices",
        "counting",
        "documents",
        "fitting",
        "matching",
        "merging",
        "objects",
        "ops",
        "ring",
        "seeding",
        "workers",
        "sources",
    },
    {
        "appending",
        "checking",
        "damage",
        "decoding",
        "describing",
        "exacttier",
        "exporting",
        "loading",
        "ring",
        "mask_statistics",
        "masks",
        "mending",
        "externalbase",
        "mergestream",
        "originals",
        "opening",
        "packing",
        "codelevels",
        "spancodes",
        "spanmap",
        "spans",
        "predicting",
        "repacking",
        "repairing",
        "store",
        "storesource",
        "streamchecks",
        "tensorbits",
        "writing",
    },
    {"api", "doctor", "integrations", "recoding", "report", "serving"},
    {"cli", "demo", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

#: What may be imported from outside, and by whom (None: by everyone).
THIRD_PARTY: dict[str, set[str] | None] = {
    "numpy": None,
    "torch": {
        "api",
        "codelevels",
        "coding",
        "decoding",
        "demo",
        "devices",
        "dtypes",
        "exporting",
        "integrations",
        "loading",
        "ring",
        "mask_statistics",
        "mergestream",
        "objects",
        "ops",
        "workers",
        "packing",
        "serving",
        "sources",
        "store",
        "predicting",
    },
    "lmdb": {"engine"},
    "xxhash": {"engine", "packing"},
    "zstandard": {"codecs"},
    "click": {"cli"},
    "matplotlib": {"report"},
    "llvmlite": {"ops"},
    "numba": {"jit", "ops"},
    "transformers": {"integrations"},
    "sklearn": {"demo"},
}


def modules() -> dict[str, Path]:
    """Every module of the package but its kernels, by dotted name; the root is ``""``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == "kernels":
            continue
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def walk(node: ast.AST, *, eager: bool) -> Iterator[ast.AST]:
    """All nodes; with `eager` only what runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if eager and (
            is_type_checking(child) or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        ):
            continue
        yield child
        yield from walk(child, eager=eager)


def imports(path: Path, *, eager: bool = False) -> list[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, down to the module."""
    found = []
    for node in walk(ast.parse(path.read_text()), eager=eager):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if path.parent.name == "kernels" and node.level == 1:
                continue  # a package of any name: its files find each other by themselves
            assert node.module is not None
            assert not node.level, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                name = inner.removeprefix("tallstore.")
                known = node.module.startswith("tallstore") and name in MODULES
                found.append((node.lineno, inner if known else node.module))
    return found


def test_every_module_has_a_layer() -> None:
    assert len(MODULES) > 50
    tops = {name.partition(".")[0] for name in MODULES} - {""}
    assert tops == RANK.keys()


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_go_down(name: str) -> None:
    own = RANK[name.partition(".")[0]]
    for line, target in imports(MODULES[name]):
        if target.partition(".")[0] != "tallstore":
            continue
        inner = target.removeprefix("tallstore").removeprefix(".")
        if not inner:  # `from tallstore import __version__`: the root, for the top alone
            assert own == len(LAYERS) - 1, f"{name}:{line} imports the whole package"
            continue
        if inner.startswith("kernels"):
            assert own >= 3, f"{name}:{line} imports {target}"
            continue
        rank = RANK[inner.partition(".")[0]]
        assert rank <= own, f"{name}:{line}, layer {own}, imports {target}, layer {rank}"


def test_no_cycles() -> None:
    """Of what is imported at import time, packages' own __init__ aside."""
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        targets = {t.removeprefix("tallstore.") for _, t in imports(path, eager=True)}
        graph[name] = {t for t in targets if t in MODULES and t}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a cycle: {' -> '.join((*trail, name))}"
        if name in done:
            return
        for target in graph[name]:
            visit(target, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())
    assert sum(map(len, graph.values())) > 150


def test_the_command_leaves_the_engine_alone() -> None:
    for name, path in MODULES.items():
        if name.startswith("cli"):
            used = {target for _, target in imports(path)}
            assert not {t for t in used if t.startswith(("tallstore.codecs", "lmdb", "numpy"))}
            assert not {t for t in used if t.startswith("tallstore.engine")}, name


def test_third_parties_come_in_where_they_belong() -> None:
    seen: set[str] = set()
    for name, path in MODULES.items():
        top = name.partition(".")[0]
        for line, target in imports(path):
            outside = target.partition(".")[0]
            if outside in sys.stdlib_module_names or outside in ("tallstore", "__future__"):
                continue
            assert outside in THIRD_PARTY, f"{name}:{line} imports {target}"
            users = THIRD_PARTY[outside]
            assert users is None or top in users, f"{name}:{line} imports {target}"
            seen.add(outside)
    assert seen == THIRD_PARTY.keys()


def test_kernels_know_torch_and_triton_only() -> None:
    paths = sorted((ROOT / "kernels").rglob("*.py"))
    assert paths
    for path in paths:
        assert path.name != "__init__.py", "it would shadow another distribution's package"
        for line, target in imports(path):
            outside = target.partition(".")[0]
            allowed = outside in sys.stdlib_module_names or outside in ("torch", "triton")
            assert allowed, f"{path.name}:{line} imports {target}"


def test_importing_tallstore_imports_neither_torch_nor_triton() -> None:
    run_child("""
import sys
import tallstore
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"torch", "triton", "numpy", "lmdb", "click"}, loaded
assert set(tallstore.__all__) <= set(dir(tallstore))
tallstore.open, tallstore.TallStore, tallstore.errors.TallstoreError
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"torch", "triton", "click"}, loaded
""")


def test_listing_a_store_imports_no_torch_and_loading_no_triton_and_no_cuda(
    tmp_path: Path,
) -> None:
    path = tmp_path / "m.tall"
    run_child(
        """
import sys
import torch, tallstore
tallstore.save({"w": torch.ones(5)}, sys.argv[1])
tallstore.save({"w": torch.zeros(5)}, sys.argv[1], task="t")
tallstore.pack(sys.argv[1] + "z", {"w": torch.ones(9)}, {"t": {"w": torch.zeros(9)}}, exact=True)
assert tallstore.load(sys.argv[1], task="t")["w"].sum() == 0
assert tallstore.load(sys.argv[1] + "z", task="t")["w"].sum() == 0
assert not {"triton", "numba"} & sys.modules.keys()
assert not torch.cuda.is_initialized()
""",
        path,
    )
    run_child(
        """
import sys
import tallstore
with tallstore.open(sys.argv[1]) as store:
    assert list(store.tasks) == ["t"] and store.base.weights == 5
    assert [tensor.name for tensor in store.tensors("t")] == ["w"]
    store.stored_bytes("t"), store.file_bytes(), store.segment_stats("t")
assert "torch" not in sys.modules and "triton" not in sys.modules
""",
        path,
    )
