"""tallstore: many full fine-tunes of one model in one file.

`save` and `load` stand in for ``torch.save`` and ``torch.load``; `pack` puts a base and its
fine-tunes into a store; `merge` makes one model of them; `open` gives a handle on a store.
Importing this package imports neither torch nor triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tallstore import errors
from tallstore.errors import TallstoreError
from tallstore.version import __version__

if TYPE_CHECKING:
    from tallstore.api import compact, load, merge, open, pack, relink, save
    from tallstore.recoding import add, repack, strip
    from tallstore.store import TallStore

__all__ = [
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

_HOME = {
    "TallStore": "tallstore.store",
    **dict.fromkeys(
        ("compact", "load", "merge", "open", "pack", "relink", "save"), "tallstore.api"
    ),
    **dict.fromkeys(("add", "repack", "strip"), "tallstore.recoding"),
}


def __getattr__(name: str) -> Any:
    # Late, so that `tallstore ls` starts without torch.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
