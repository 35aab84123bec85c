"""The colours of a report, in light and in dark.

Contrast by WCAG 2: text has 4.5:1 on the background and on every cell of a heat map, whose
strongest colour is `heat`; bars have 3:1 on the background.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["DARK", "LIGHT", "ROLES", "SENTINELS", "css"]

#: What colours are for: text, lines, and the marks of charts.
ROLES: Final = ("bg", "ink", "muted", "grid", "none", "one", "many", "rest", "heat", "panel")

LIGHT: Final[Mapping[str, str]] = {
    "bg": "#ffffff",
    "ink": "#1c2128",
    "muted": "#57606a",
    "grid": "#d0d7de",
    "none": "#6e7781",
    "one": "#bc4c00",
    "many": "#0969da",
    "rest": "#8250df",
    "heat": "#6cb6ff",
    "panel": "#f6f8fa",
}
DARK: Final[Mapping[str, str]] = {
    "bg": "#12161c",
    "ink": "#e6edf3",
    "muted": "#9da7b3",
    "grid": "#343b44",
    "none": "#8b949e",
    "one": "#f0883e",
    "many": "#58a6ff",
    "rest": "#bc8cff",
    "heat": "#1f62c4",
    "panel": "#1a2029",
}
#: Charts on the page are drawn in these, each of which stands for a role; see `svg`.
SENTINELS: Final[Mapping[str, str]] = {role: f"#01fe{n:02x}" for n, role in enumerate(ROLES, 1)}


def css(palette: Mapping[str, str]) -> str:
    """The palette as declarations of CSS variables."""
    return " ".join(f"--{role}: {colour};" for role, colour in palette.items())
