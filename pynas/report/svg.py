"""Figures as SVG that lives in a page: its colours follow the page's, its text is text, its names are its own."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from pynas.plots.style import DARK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
COLOUR = re.compile(r"#[0-9a-fA-F]{6}\b")
FONTS = re.compile(r"'?DejaVu Sans'?[^;]*")
LINK = re.compile(r"url\(#([^)]+)\)")
USED = re.compile(r"""(?:url\(|href=["'])#([^)"']+)""")
DROPPED = (f"{{{SVG}}}style", f"{{{SVG}}}metadata")


def to_svg(figure: Figure, prefix: str) -> str:
    """A figure as an `svg` element.

    Args:
        figure: Drawn in colours of `pynas.plots.style.DARK`.
        prefix: Before every id, different for every figure of a page.

    Raises:
        ValueError: For a colour that has no counterpart on dark pages.
    """
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "pynas", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, dpi=72, metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(buffer.getvalue())
    _drop(root)
    used = set(USED.findall(ElementTree.tostring(root, encoding="unicode")))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)  # the same image twice has the same
        for key, value in element.attrib.items():
            element.set(key, _adapted(key, value, prefix))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("aria-hidden", "true")  # the box around it has the words
    root.set("focusable", "false")
    return ElementTree.tostring(root, encoding="unicode")


def _drop(element: ElementTree.Element) -> None:
    for child in list(element):
        if child.tag in DROPPED:
            element.remove(child)
        else:
            _drop(child)


def _adapted(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return f"{prefix}-{value}"
    if key in (f"{{{XLINK}}}href", "href"):
        return f"#{prefix}-{value[1:]}" if value.startswith("#") else value
    if key in ("style", "fill", "stroke"):
        return FONTS.sub("var(--sans)", COLOUR.sub(_variable, LINK.sub(rf"url(#{prefix}-\1)", value)))
    return LINK.sub(rf"url(#{prefix}-\1)", value)


def _variable(match: re.Match[str]) -> str:
    colour = match[0].lower()
    if colour not in DARK:
        raise ValueError(f"The colour {colour} has no counterpart on dark pages; see pynas.plots.style.DARK.")
    return f"var({variable(colour)})"


def variable(colour: str) -> str:
    """The CSS variable of a colour."""
    return f"--c{colour[1:]}"


def palette() -> tuple[str, str]:
    """CSS declarations of all colours, for light pages and for dark ones."""
    light = "".join(f"{variable(colour)}:{colour};" for colour in DARK)
    return light, "".join(f"{variable(colour)}:{dark};" for colour, dark in DARK.items())
