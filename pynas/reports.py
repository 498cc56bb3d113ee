"""What finished searches say: how even their training was, how well they rank networks, how cells look."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pynas import pipeline, settings
from pynas.api import opened
from pynas.architecture import Architecture
from pynas.console import Show
from pynas.draw import draw_cells, draw_credit, draw_strip, save_figure
from pynas.kernels import setting
from pynas.pipeline import NothingShared
from pynas.plan import make_plan
from pynas.published import published
from pynas.rank import FEWEST, Ranking, check_png, rank, scatter, write_png
from pynas.report.ranks import as_plain
from pynas.results import Alone, Run
from pynas.summary import show_fairness, show_ranking
from pynas.training.run import RunFolder
from pynas.truth import Truth, read_truth


def fairness(runs: list[str], *, quiet: bool = False) -> list[dict[str, Any]]:
    """Prints for some runs whether the options of a layer had equal chances of training (FairNAS, table 1).

    EF, fairness in expectation: whether updates of options are no more unequal than independent draws of equal
    probability make them (chi-square, p of 0.001 or more). SF, strict fairness: whether they were equal after every
    step. Updates through soft gates count as much as the gate.

    Args:
        runs: Folders of searches, finished or not.
        quiet: Prints nothing.

    Returns:
        For every run its strategy, `pynas.updates.Verdict` as plain values, and the updates of every option.

    Raises:
        ValueError: If a search has not finished an epoch, or was made before updates were counted.
    """
    found = []
    for path in runs:
        folder = RunFolder.open(path)
        record: dict[str, Any] = (folder.metrics("search") or [{}])[-1]
        if "fairness" not in record:
            raise ValueError(f"{folder.path} has no counts of updates: no epoch of its search is finished.")
        strategy = folder.config()["strategy"]["name"]
        found.append(
            {"run": str(folder.path), "strategy": strategy, **record["fairness"], "updates": record["updates"]}
        )
    show_fairness(found, Show(quiet))
    return found


def rank_run(
    run: str, *, truth: str | None = None, path: str | None = None, seed: int = 0, quiet: bool = False
) -> Ranking:
    """Prints how well the accuracies of a run's shared weights order networks, draws them, and keeps the numbers.

    They lie in `ranking.json` of the run, where `pynas.report` finds them.

    Args:
        run: Folder of a finished search. All networks that it judged count, not only those that it found.
        truth: A table of networks that were trained alone, in the format of NAS-Bench-Macro's JSON, for the run's
            space. By default the networks that the run itself trained alone: its best, its random ones, and what
            `pynas retrain RUN --net` added; those that it has not judged yet are judged now.
        path: Of the scatter plot, a PNG; `ranking.png` in the run by default.
        seed: Of the bootstrap.
        quiet: Prints nothing.

    Returns:
        Kendall's tau, Spearman's coefficient and regret with their intervals.

    Raises:
        ValueError: If the table is of another space, or there are fewer than three networks to compare.
    """
    show, finished = Show(quiet), Run.open(run)
    target = Path(path) if path is not None else finished.folder / "ranking.png"
    check_png(target)
    space = finished.best.search_space()
    key: Callable[[Architecture], str] = _fingerprint
    known: Truth | tuple[Alone, ...] = finished.trained
    if truth is not None:
        sizes = [len(choice.options) for choice in space.choices()]
        known = read_truth(truth, space=space.name, options=sizes)
        key = known.key
    elif len(finished.trained) >= FEWEST:
        finished = _with_trained(finished, show)
    ranking = rank(finished, known, seed=seed)
    macs = {key(net.architecture): net.macs / 1e6 for net in finished.judged if net.macs is not None}
    colours = macs if set(ranking.keys) <= set(macs) else None  # older runs did not count
    write_png(scatter(ranking, colours=colours, colour_name="MACs (millions)"), target)
    RunFolder(finished.folder).write_json("ranking.json", as_plain(ranking))
    show_ranking(ranking, target, show)
    return ranking


def draw(
    net: str, path: str | None = None, *, what: Literal["cells", "epochs", "credit"] = "cells", quiet: bool = False
) -> Path:
    """Draws cells as graphs, PNG or SVG.

    Args:
        net: A run's folder, an architecture file, or the name of a published network.
        path: File to write; by default `<what>.png` in the run, or `<name>.png` here.
        what: The "cells" of the network; of a run also the most probable cells over the "epochs" of its search, or the
            "credit" that the loss gave every edge (strategy snas).
        quiet: Prints nothing.

    Returns:
        The path.

    Raises:
        ValueError: If the space has no cells, or the run kept none of it.
    """
    run = Run.open(net) if Path(net).is_dir() else None
    if run is None and what != "cells":
        raise ValueError(f"what={what!r} is drawn of a run: give its folder, for instance runs/0001, not {net!r}.")
    if run is not None:
        figure = {"epochs": draw_strip, "credit": draw_credit}.get(what, lambda found: draw_cells(found.best))(run)
        target = run.folder / f"{what}.png"
    else:
        figure = draw_cells(Architecture.load(net) if Path(net).is_file() else published(net))
        target = Path(f"{Path(net).stem}.png")
    written = save_figure(figure, target if path is None else path)
    Show(quiet).line(f"drawn: {written}")
    return written


def _with_trained(run: Run, show: Show) -> Run:
    """The run with everything that it trained alone judged; without the networks for which there are no weights."""
    known = {net.architecture.fingerprint for net in run.judged}
    if all(alone.architecture.fingerprint in known for alone in run.trained):
        return run
    folder, config = opened(run.folder)
    settings.use_threads(config)
    with setting.using(config["kernels"]):
        plan = make_plan(config, Show(quiet=True), folder)
        try:
            return pipeline.judge_trained(plan, run, show)
        except NothingShared as error:
            show.line(f"Only networks that were judged in the search count. {error}")
            return run


def _fingerprint(architecture: Architecture) -> str:
    return architecture.fingerprint
