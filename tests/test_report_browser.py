"""Reports in headless Chromium, on a phone and a desk, by day and by night.

Needs `pip install '.[browser]' && playwright install chromium`, or a Chromium on the path.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import cell_run

import pynas
from pynas import Run

pytestmark = pytest.mark.browser
HOW = "pip install '.[browser]' && playwright install chromium"
WIDTHS, SCHEMES = (390, 1280), ("light", "dark")

OVERLAPS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll('svg')) {
    const box = svg.getBoundingClientRect();
    if (!box.width) continue;
    const texts = [...svg.querySelectorAll('text')].filter(text => text.textContent.trim());
    const boxes = texts.map(text => text.getBoundingClientRect());
    const name = svg.closest('figure').querySelector('h3').textContent;
    boxes.forEach((a, i) => {
      if (a.left < box.left - 2 || a.right > box.right + 2) found.push([name, texts[i].textContent, 'outside']);
      for (let j = 0; j < i; j++) {
        const b = boxes[j];
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (wide > 1 && high > 3) found.push([name, texts[i].textContent, texts[j].textContent]);
      }
    });
  }
  return found;
}"""

# Contrast of texts with what they stand on: cards, or the page (WCAG 2: 4.5 for text, 3 where it is large).
FAINT = """() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = text => {
    const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = parse(text).slice(0, 3).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      const parts = parse(colour);
      if (parts.length < 4 || parts[3] > 0) return colour;
    }
    return getComputedStyle(document.body).backgroundColor;
  };
  const found = new Set();
  for (const element of document.querySelectorAll('h1,h2,h3,p,dt,dd,th,td,a,summary,code,figcaption,svg text')) {
    if (!element.textContent.trim() || !element.getBoundingClientRect().width) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(element.closest('svg') ? style.fill : style.color), light(ground(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const said = element.textContent.trim().slice(0, 40);
    if (contrast < (element.closest('svg') ? 3 : 4.5)) found.add(`${contrast.toFixed(2)} ${said}`);
  }
  return [...found];
}"""

# Pictures of every figure that can be seen.
SEEN = """() => [...document.querySelectorAll('figure')].map(
  figure => [...figure.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().height > 40).length
)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason=f"playwright is not installed: {HOW}")
    here = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with api.sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=here, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"Chromium does not start ({str(error).strip().splitlines()[0]}): {HOW}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(unbroken: Run, searched_once: Run, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of one run, of cells, and of several runs."""
    folder = tmp_path_factory.mktemp("pages")
    given: list[Any] = [unbroken, cell_run(folder), [unbroken, searched_once]]
    return [pynas.report(each, path=folder / f"{i}.html", quiet=True) for i, each in enumerate(given)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_are_readable(width: int, scheme: str, browser: Any, pages: list[Path]) -> None:
    """No error, nothing loaded, no overflow, no overlapping labels, enough contrast, every figure visible."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    for path in pages:
        page, said, loaded = context.new_page(), [], []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("request", lambda request, loaded=loaded: loaded.append(request.url))
        page.goto(path.as_uri())
        assert said == []
        assert [url for url in loaded if not url.startswith(("file:", "data:"))] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(OVERLAPS) == []
        assert page.evaluate(FAINT) == []
        assert set(page.evaluate(SEEN)) == {1}
        page.close()
    context.close()
