"""Strategies side by side at equal gradient computations and equal seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cost_models.files import write_atomic
from pynas import pipeline, settings
from pynas.comparison import entries, rows, tables
from pynas.comparison.entries import Entry
from pynas.comparison.figures import draw_all
from pynas.comparison.rows import Row
from pynas.console import Show
from pynas.kernels import setting
from pynas.plan import make_plan
from pynas.training.loop import Interrupted
from pynas.training.run import RunFolder
from pynas.training.train import Recipe


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Args:
        folder: Holds a run folder for each strategy and seed, `comparison.md`, `.csv` and `.json`, and pictures.
        rows: One for each run, seed by seed.
    """

    folder: Path
    rows: tuple[Row, ...]


def compare(
    strategies: str | list[str] = "snas,darts,enas,random",
    space: str = "cell",
    data: str = "digits",
    device: str = "host",
    *,
    seeds: str | int | list[int] = "0",
    epochs: int = 24,
    batch_size: int = 64,
    changes: dict[str, dict[str, Any]] | None = None,
    preset: str | None = None,
    latency_ms: float | Literal["auto"] | None = None,
    slack: float = 0.1,
    retrain: bool = True,
    recipe: Recipe | None = None,
    target_accuracy: float | None = None,
    watch: int = 512,
    train_on: Literal["cpu", "cuda"] = "cpu",
    amp: Literal["off", "bf16"] = "off",
    kernels: Literal["auto", "fused", "reference"] = "auto",
    threads: int | None = None,
    limit: int | None = None,
    augment: Literal["auto", "none", "crop", "crop_flip", "imagenet"] = "auto",
    on_corrupt: Literal["stop", "skip"] = "stop",
    space_options: dict[str, Any] | None = None,
    strict_table: bool = False,
    out: str = "comparison",
    quiet: bool = False,
) -> Comparison:
    """Runs strategies at equal gradient computations and equal seeds, and writes one table and figures.

    A gradient computation is an image through a backward pass; how each strategy's are counted stands in
    `pynas.comparison.budget`. Every strategy and seed is an ordinary run, in a folder of its own. Interrupted, the same
    call goes on where it stood.

    Args:
        strategies: Names, with commas between; see `pynas list strategies`. Other names are explained by `changes`.
        space: Name of a search space that all of them can search.
        data: As for `pynas.search`.
        device: Whose latency table to use.
        seeds: One or more, with commas between; every strategy runs with each.
        epochs: Gradient computations of every search, in passes over the images for the weights.
        batch_size: Of every strategy.
        changes: Hyper-parameters by name, {"snas": {"eta": 0.05}}; a name that is no strategy says of which it is a
            setting, {"single": {"strategy": "darts", "order": "single"}}.
        preset: Of all strategies; "quick" by default.
        latency_ms: Budget of every search in milliseconds; none by default.
        slack: Share of the budget that a returned network may leave unused.
        retrain: Whether the found networks are trained from scratch, tested and exported.
        recipe: How.
        target_accuracy: Between 0 and 1: adds what it took until the search, and until a network, had it.
        watch: Held-out images on which search network and child are judged after every epoch, by strategies that can;
            0 for none.
        train_on: As for `pynas.search`.
        amp: Mixed precision of forward passes.
        kernels: As for `pynas.search`.
        threads: Likewise.
        limit: At most so many training images.
        augment: As for `pynas.search`.
        on_corrupt: Likewise.
        space_options: Changes to the space, for instance {"cells": 4, "channels": 8}.
        strict_table: Refuse latencies that are fitted because the table has no row.
        out: Folder of the comparison.
        quiet: Prints nothing.

    Returns:
        The folder, and what every run said.

    Raises:
        ValueError: For anything that cannot work, and for a folder of another comparison, before any work.
        OSError: For files that cannot be read or written.
    """
    asked, show, folder = dict(locals()), Show(quiet), Path(out)
    found = entries.entries(asked, show)
    entries.check_same(folder, found)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / entries.FILE, entries.asked_text(found))
    for place, entry in enumerate(found, 1):
        told = f"{entry.gradients:,} gradient computations"
        show.line(f"{place} of {len(found)}: {entry.label}, seed {entry.seed}, {told}")
        try:
            _run(entry, folder, show)
        except KeyboardInterrupt:
            raise Interrupted("Stopped. Go on with: the same command") from None
    read = [rows.read_row(entry.label, RunFolder(folder / entry.name)) for entry in found]
    _write(read, folder, epochs, target_accuracy, show)
    return Comparison(folder, tuple(read))


def _run(entry: Entry, folder: Path, show: Show) -> None:
    """Runs or goes on with one run, unless it is done."""
    path = folder / entry.name
    if not (path / "config.yaml").is_file():
        RunFolder.create(folder, entry.config, entry.name)
    run = RunFolder.open(path)
    if (path / rows.FILE).is_file():
        return
    settings.use_threads(entry.config)
    with setting.using(entry.config["kernels"]):
        plan = make_plan(entry.config, show, run)
        rows.note(plan, run, pipeline.execute(plan, run, show))


def _write(read: Sequence[Row], folder: Path, epochs: int, target: float | None, show: Show) -> None:
    pictures = draw_all(read, folder, target)
    write_atomic(folder / "comparison.csv", tables.as_csv(read))
    write_atomic(folder / "comparison.json", tables.as_json(read, target))
    names = [path.name for path in pictures]
    write_atomic(folder / "comparison.md", tables.markdown(read, epochs, target, names))
    note = "\n".join((*tables.notes(read, epochs), f"written to {folder}: comparison.md, .csv, .json and pictures"))
    lines, heads = tables.table(read, target), tables.columns(target)
    if len(lines) <= len(heads):  # a column for each strategy: narrower
        turned = [[head, *(line[place] for line in lines)] for place, head in enumerate(heads)][1:]
        show.table("Comparison", ("", *(line[0] for line in lines)), turned, note=note)
    else:
        show.table("Comparison", heads, lines, note=note)
