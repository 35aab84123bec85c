"""What users may rely on: names, docstrings, and the tree of errors."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from typing import Any

import pytest

import tallstore
from tallstore import errors

PUBLIC = [
    "TallStore",
    "TallstoreError",
    "__version__",
    "add",
    "compact",
    "errors",
    "load",
    "merge",
    "open",
    "pack",
    "relink",
    "repack",
    "save",
    "strip",
]

#: Each error with its parent and the builtin that catches it, too.
ERRORS: dict[str, tuple[str, type[BaseException]]] = {
    "OptionError": ("TallstoreError", ValueError),
    "StoreNotFoundError": ("TallstoreError", FileNotFoundError),
    "StoreExistsError": ("TallstoreError", FileExistsError),
    "NotAStoreError": ("TallstoreError", ValueError),
    "NewerFormatError": ("TallstoreError", ValueError),
    "CorruptStoreError": ("TallstoreError", ValueError),
    "TruncatedStoreError": ("CorruptStoreError", ValueError),
    "ChecksumError": ("CorruptStoreError", ValueError),
    "StoreLockedError": ("TallstoreError", BlockingIOError),
    "StoreReadOnlyError": ("TallstoreError", PermissionError),
    "StoreFullError": ("TallstoreError", OSError),
    "StoreIOError": ("TallstoreError", OSError),
    "StoreClosedError": ("TallstoreError", ValueError),
    "UnknownTaskError": ("TallstoreError", KeyError),
    "TaskExistsError": ("TallstoreError", ValueError),
    "TaskNameError": ("TallstoreError", ValueError),
    "UnknownTensorError": ("TallstoreError", KeyError),
    "MismatchError": ("TallstoreError", ValueError),
    "WrongBaseError": ("MismatchError", ValueError),
    "EmptyZooError": ("TallstoreError", ValueError),
    "UnsupportedObjectError": ("TallstoreError", TypeError),
    "CheckpointError": ("TallstoreError", ValueError),
    "UnsafePickleError": ("CheckpointError", ValueError),
    "DeviceError": ("TallstoreError", RuntimeError),
}


def test_all_is_pinned() -> None:
    assert tallstore.__all__ == PUBLIC == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(tallstore, name) is not None
    assert set(PUBLIC) <= set(dir(tallstore))
    assert re.fullmatch(r"\d+\.\d+\.\d+", tallstore.__version__)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        tallstore.lode  # noqa: B018


def test_signatures_are_pinned() -> None:
    """Whatever follows what is acted on is given by keyword."""
    positional = {
        "save": ["obj", "path"],
        "load": ["path"],
        "merge": ["path", "out"],
        "open": ["path", "mode"],
        "pack": ["path", "base", "tasks"],
        "add": ["path", "tasks"],
        "compact": ["path"],
        "relink": ["path", "base"],
    }
    for name, first in positional.items():
        parameters = inspect.signature(getattr(tallstore, name)).parameters.values()
        found = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        assert found == first, name
    for wanted in ("task", "device", "dtype", "names", "out"):
        assert wanted in inspect.signature(tallstore.load).parameters


def public_members(thing: Any) -> dict[str, Any]:
    return {
        name: member
        for name, member in vars(thing).items()
        if not name.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, (property, classmethod)))
    }


def test_every_public_thing_has_a_docstring() -> None:
    for name in PUBLIC:
        if name == "__version__":
            continue
        assert inspect.getdoc(getattr(tallstore, name)), name
    for name, member in public_members(tallstore.TallStore).items():
        assert inspect.getdoc(member), f"TallStore.{name}"
    for name in ("save", "load", "pack", "merge"):
        text = inspect.getdoc(getattr(tallstore, name)) or ""
        for parameter in inspect.signature(getattr(tallstore, name)).parameters:
            assert re.search(rf"\b{parameter}\b", text), f"{name}: {parameter}"


def every_module() -> list[str]:
    found = [
        info.name
        for info in pkgutil.walk_packages(tallstore.__path__, "tallstore.")
        if not info.name.endswith("__main__")
    ]
    assert len(found) > 50
    return found


@pytest.mark.parametrize("name", every_module())
def test_every_module_says_what_it_is_and_what_it_exports(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__ and module.__doc__.strip(), name
    exported = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported), "a name twice in __all__"
    for item in exported:
        member = getattr(module, item)
        made = "<locals>" in getattr(member, "__qualname__", "")  # by a factory: click's options
        if not made and (inspect.isclass(member) or inspect.isfunction(member)):
            assert inspect.getdoc(member), f"{name}.{item}"


# -- errors -------------------------------------------------------------------------------


def defined() -> dict[str, type[Exception]]:
    return {
        name: member
        for name, member in vars(errors).items()
        if inspect.isclass(member) and issubclass(member, Exception)
    }


def test_errors_have_their_parents_and_builtins() -> None:
    assert set(errors.__all__) == defined().keys() == {*ERRORS, "TallstoreError", "StoreWarning"}
    assert errors.StoreWarning.__bases__ == (UserWarning,)
    assert errors.TallstoreError is tallstore.TallstoreError
    assert errors.TallstoreError.__mro__[1] is Exception
    for name, (parent, builtin) in ERRORS.items():
        kind = getattr(errors, name)
        assert kind.__bases__[0] is getattr(errors, parent), name
        assert issubclass(kind, (errors.TallstoreError,)) and issubclass(kind, builtin), name
        assert inspect.getdoc(kind) and kind.__doc__ != Exception.__doc__


def test_the_tree_in_the_docstring_is_the_classes() -> None:
    assert errors.__doc__ is not None
    drawn: dict[str, tuple[str, str | None]] = {}
    parents = ["TallstoreError"]
    line = re.compile(r"^    ((?:[|` ]   )*)[|`]-- (\w+) *(?:\(also (\w+)\))? +(\S.*)$")
    for text in errors.__doc__.splitlines():
        found = line.match(text)
        if found is None:
            assert "--" not in text, f"a line of the tree that cannot be read: {text!r}"
            continue
        depth = len(found[1]) // 4
        parents[depth + 1 :] = [found[2]]
        drawn[found[2]] = parents[depth], found[3]
    wanted = {
        # those of a family share the parent's builtin, drawn once
        name: (parent, builtin.__name__ if parent == "TallstoreError" else None)
        for name, (parent, builtin) in ERRORS.items()
    }
    assert drawn == wanted


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_shows_its_message_alone(name: str) -> None:
    error = getattr(errors, name)("zoo.tall: it's gone\\")
    assert str(error) == "zoo.tall: it's gone\\"
