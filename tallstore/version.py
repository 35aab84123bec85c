"""The version, and what manifests name as their writer."""

from __future__ import annotations

from typing import Final

__all__ = ["WRITTEN_BY", "__version__"]

__version__: Final = "0.1.0"
WRITTEN_BY: Final = f"tallstore {__version__}"
