"""Reads a report as a browser would, and checks what holds for every one of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

LOADED = re.compile(r"""(?:src|href)\s*=\s*["'](?!#|data:)|@import|url\(\s*["']?(?!#|data:)""", re.IGNORECASE)
COLOUR = re.compile(r"#[0-9a-fA-F]{6}\b")


@dataclass
class Shown:
    """A figure of a page: its section, its title, what is said of it, and the cells of its table."""

    section: str
    title: str = ""
    alts: list[str] = field(default_factory=list)
    pictures: int = 0
    cells: list[str] = field(default_factory=list)


class Page(HTMLParser):
    """Sections, figures, ids and references of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.figures: list[Shown] = []
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.styles: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self._inside: Shown | None = None
        self.feed(text)

    @property
    def titles(self) -> list[str]:
        return [shown.title for shown in self.figures]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self._open.append(tag)
        if "id" in given:
            self.ids.append(given["id"])
        for value in given.values():
            self.references |= set(re.findall(r"url\(#([^)]+)\)", value))
        for name in ("href", "xlink:href", "aria-labelledby"):
            if given.get(name, "").startswith("#") or (name == "aria-labelledby" and name in given):
                self.references.add(given[name].removeprefix("#"))
        if tag == "section":
            self.sections.append(given["id"])
        if tag == "figure":
            self._inside = Shown(self.sections[-1])
            self.figures.append(self._inside)
        if self._inside is not None and given.get("role") == "img":
            self._inside.alts.append(given["aria-label"])
        if self._inside is not None and tag == "svg":
            self._inside.pictures += 1
        if self._inside is not None and tag in ("td", "th"):
            self._inside.cells.append("")
        if "svg" in self._open:
            self.styles += [given[name] for name in ("style", "fill", "stroke") if name in given]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass
        if tag == "figure":
            self._inside = None

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._inside is not None and "h3" in self._open:
            self._inside.title += data
        if self._inside is not None and ("td" in self._open or "th" in self._open):
            self._inside.cells[-1] += data


def checked(path: Path) -> Page:
    """A page after checks that any report must pass."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not LOADED.search(text), "something is loaded from elsewhere"
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids)), "an id comes twice"
    assert page.references <= set(page.ids), sorted(page.references - set(page.ids))
    assert not [style for style in page.styles if COLOUR.search(style)], "a colour does not follow the page's"
    for shown in page.figures:
        assert shown.pictures == 2, shown
        assert len(shown.alts) == 2, shown
        assert len(shown.alts[0]) > 20, shown
        assert len(shown.cells) > 3, shown
    assert path.stat().st_size < 4e6
    return page
