"""Figures as SVG inside the page: in the page's colours and fonts, and told to screen readers."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree

from tallstore.report.palette import SENTINELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["inline_svg"]

_SVG: Final = "{http://www.w3.org/2000/svg}"
_HREF: Final = "{http://www.w3.org/1999/xlink}href"
_VARIABLES: Final = {colour: f"var(--{role})" for role, colour in SENTINELS.items()}
_COLOUR: Final = re.compile(r"#[0-9a-fA-F]{6}")
_NO_METADATA: Final = {"Date": None, "Creator": None, "Format": None, "Type": None}


def inline_svg(figure: Figure, *, name: str, title: str, description: str) -> str:
    """An ``<svg>`` element that a page can hold.

    Colours become the page's CSS variables, fonts the page's; ids, which are one name space for
    the whole page, begin with `name`.

    Parameters
    ----------
    figure
        Drawn in the colours of `SENTINELS`.
    title, description
        What a screen reader says instead of the picture.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # The page has this style; as it is here it would be the whole page's.
            if child.tag == f"{_SVG}style":
                parent.remove(child)
    referred = {
        found
        for element in root.iter()
        for value in element.attrib.values()
        for found in re.findall(r"#([A-Za-z]\w*)", value)
    }
    for element in root.iter():
        _adapt(element, name, referred)
    width = float(root.attrib["viewBox"].split()[2])
    for attribute in ("width", "height", "version"):
        del root.attrib[attribute]
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    # Smaller than this its text could not be read: then it is scrolled.
    root.set("style", f"min-width: {width:.0f}px; max-width: {1.5 * width:.0f}px")
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        element.text = text
        element.tail = "\n"
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(element: ElementTree.Element, name: str, referred: set[str]) -> None:
    element.tag = element.tag.removeprefix(_SVG)  # HTML has no name spaces
    identity = element.attrib.pop("id", None)
    if identity in referred:
        element.set("id", f"{name}-{identity}")
    if _HREF in element.attrib:
        element.set("href", f"#{name}-{element.attrib.pop(_HREF)[1:]}")
    for key, value in list(element.attrib.items()):
        if key == "style":
            kept = [part for part in value.split(";") if not part.strip().startswith("font-family")]
            value = ";".join(kept)
        if key in ("style", "fill", "stroke"):
            value = _COLOUR.sub(lambda found: _VARIABLES.get(found[0], found[0]), value)
        element.set(key, value.replace("url(#", f"url(#{name}-"))
