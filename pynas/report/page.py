"""The page: one HTML file with everything inside, no script, nothing from elsewhere."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Sequence
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

from cost_models.files import write_atomic
from pynas.console import Show
from pynas.report import head, many
from pynas.report.parts import HALF, NARROW, WHOLE, Fact, Image, Part, Picture, Section
from pynas.report.ranks import COMPARISON
from pynas.report.sections import build
from pynas.report.svg import palette, to_svg
from pynas.report.told import Told
from pynas.results import Run

HERE = Path(__file__).parent
FILE = "report.html"


def report(
    runs: str | Path | Run | Sequence[str | Path | Run], *, path: str | Path | None = None, quiet: bool = False
) -> Path:
    """Writes what a run asked for and found as one HTML file, with pictures, tables and the source of every number.

    The file needs no network and holds no script; it adapts to phones and to dark mode. Parts that a run has no data
    for are named at its end, each with the reason. A search that is still going on has a report, too.

    Args:
        runs: A run or its folder; several, to compare them; or the folder of a comparison (`pynas compare`).
        path: Of the file to write; by default `report.html` in the run's folder, of several runs in this folder.
        quiet: Prints nothing.

    Returns:
        The path.

    Raises:
        FileNotFoundError: If there is no run at a folder.
        ValueError: If a folder is no run, or its settings are broken.
        OSError: If the file cannot be written.
    """
    given = [runs] if isinstance(runs, str | Path | Run) else list(runs)
    if not given:
        raise ValueError("Name a run: pynas report runs/0001")
    places = [each.folder if isinstance(each, Run) else Path(each) for each in given]
    alone = places[0] if len(given) == 1 else None
    target = Path(path) if path is not None else (alone or Path()) / FILE
    if target.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"A report is written as .html, not as {target.name!r}.")
    if alone is not None and (alone / COMPARISON).is_file() and not (alone / "config.yaml").is_file():
        page = _comparison(alone)
    elif alone is not None:
        page = _single(Told.of(given[0]))
    else:
        page = _several([Told.of(each) for each in given])
    write_atomic(target, page)
    Show(quiet).line(f"report: {target} ({target.stat().st_size / 1e6:.2g} MB)")
    return target


def _single(told: Told) -> str:
    sections, left = build(told)
    return _page(told.name, head.title(told), head.subtitle(told), head.verdict(told), head.facts(told), sections, left)


def _several(runs: Sequence[Told]) -> str:
    sections, left = many.build_many(runs)
    told = f"{len(runs)} runs of {', '.join(dict.fromkeys(run.strategy for run in runs))}, side by side."
    verdict = (
        "Differences of single runs may be noise of their seeds; pynas compare runs several seeds at equal computation."
    )
    return _page("comparison", f"{len(runs)} searches compared", told, verdict, [], sections, left)


def _comparison(folder: Path) -> str:
    sections, left = many.build_comparison(folder)
    told = f"What pynas compare left in {folder}."
    return _page(str(folder), "Strategies compared", told, "Every search had equal computation.", [], sections, left)


def _page(
    name: str,
    title: str,
    subtitle: str,
    verdict: str,
    facts: Sequence[Fact],
    sections: Sequence[Section],
    left: Sequence[tuple[str, str]],
) -> str:
    """Fills the template; it escapes every text."""
    import matplotlib
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    numbers = count(1)

    def svg(picture: Picture, width: float) -> Markup:
        with matplotlib.rc_context({"text.parse_math": False}):  # names of runs and devices are no formulas
            figure = picture.draw(width)
        return Markup(to_svg(figure, f"f{next(numbers)}"))  # its texts are escaped in it

    def form(parts: Sequence[Part], place: int) -> str:
        """Class of a picture: over the whole width, or alone in its row, where words go beside it."""
        part = parts[place]
        if not isinstance(part, Picture) or part.whole:
            return "whole"
        first = place
        while first > 0 and form(parts, first - 1) != "whole":
            first -= 1
        follows = place + 1 < len(parts) and isinstance(after := parts[place + 1], Picture) and not after.whole
        return "alone" if (place - first) % 2 == 0 and not follows else ""

    def kind(part: Any) -> str:
        return type(part).__name__.lower()

    def data(image: Image) -> str:
        return "data:image/png;base64," + base64.b64encode(image.png).decode()

    template = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    ).get_template("page.html.jinja")
    light, dark = palette()
    style = (HERE / "page.css").read_text(encoding="utf-8")
    return template.render(
        name=name,
        title=title,
        subtitle=subtitle,
        verdict=verdict,
        facts=facts,
        sections=sections,
        left=left,
        svg=svg,
        form=form,
        kind=kind,
        data=data,
        widths={"narrow": NARROW, "half": HALF, "whole": WHOLE},
        style=Markup(style.replace("/*light*/", light).replace("/*dark*/", dark)),
        version=metadata.version("pynas"),
        date=datetime.date.today().isoformat(),
    )
