"""The head of a report: what was asked, what was found, in numbers and in a sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from pynas.report.parts import Fact, Listing, Part, Table, number, percent
from pynas.report.told import Told
from pynas.subsets import log10_networks


def title(told: Told) -> str:
    """The result in a line, or how far the run is."""
    figures = told.figures
    if figures:
        return f"{figures['test_accuracy']:.2%} in {figures['predicted_ms']:.3g} ms"
    if told.run is not None:
        best = told.run.candidates[0]
        found = len(told.run.candidates)
        return f"{found} network{'' if found == 1 else 's'} found, best {best.accuracy:.2%} held out"
    return f"A search in progress: {len(told.lines)} of {told.epochs} epochs"


def subtitle(told: Told) -> str:
    """What was searched, how, and for which device."""
    config = told.config
    data = str(config["data"]).rstrip("/").rsplit("/", 1)[-1]
    return f"Space {config['space']}, searched by {told.strategy} on {data} for {told.where}."


def facts(told: Told) -> list[Fact]:
    """The numbers that people look for first."""
    figures = told.figures
    if not figures:
        return _unfinished(told)
    found = [
        Fact("Test accuracy", f"{figures['test_accuracy']:.2%}", f"{figures['test_images']:,} images"),
        Fact("Predicted latency", f"{figures['predicted_ms']:.3g} ms", _budget(figures)),
    ]
    if figures.get("measured_ms") is not None:
        ratio = figures["measured_ms"] / figures["predicted_ms"]
        found.append(Fact("Measured latency", f"{figures['measured_ms']:.3g} ms", f"{ratio:.0%} of predicted"))
    found += [Fact("MACs", short(figures["macs"])), Fact("Parameters", short(figures["params"]))]
    ahead = against_random(figures)
    if ahead is not None:
        nets = len(figures["baseline"])
        found.append(Fact("Against random", f"{ahead:+.2f}", f"points from the mean of {nets}"))
    if "branches" in figures:
        branches = figures["branches"]
        found.append(Fact("Branches kept", f"{branches['kept']} of {branches['of']}", "folded away at the end"))
    return found


def _unfinished(told: Told) -> list[Fact]:
    found = [Fact("Epochs", f"{len(told.lines)} of {told.epochs}", f"{told.seconds:,.0f} s of searching")]
    if told.run is not None:
        best = told.run.candidates[0]
        found.append(Fact("Best accuracy", percent(best.accuracy), "inherited weights, held-out images"))
        found.append(Fact("Networks found", f"{len(told.run.candidates)}", f"of {len(told.run.judged)} judged"))
    elif told.lines:
        found.append(Fact("Loss", number(told.lines[-1].get("loss")), "of the last epoch"))
    return found


def short(count: float) -> str:
    """A count with three digits: 39.6 k, 1.36 G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:g}"


def against_random(figures: Mapping[str, Any]) -> float | None:
    """Points of accuracy ahead of the mean of the random networks; none where there are none."""
    others = [net["accuracy"] for net in figures["baseline"]]
    return 100 * (figures["test_accuracy"] - statistics.fmean(others)) if others else None


def _budget(figures: Mapping[str, Any]) -> str:
    budget = figures.get("budget_ms")
    if budget is None:
        return "no limit was asked for"
    return f"{figures['predicted_ms'] / budget:.0%} of {budget:.3g} ms"


def verdict(told: Told) -> str:
    """Whether searching paid, in a sentence that claims no more than the numbers do."""
    figures = told.figures
    if not figures:
        return f"This run is {told.status}; go on with: pynas search --resume {told.name}"
    others = [net["accuracy"] for net in figures["baseline"]]
    if not others:
        return "No random networks were trained for comparison (baseline=0), so whether searching paid is open."
    ahead = against_random(figures)
    assert ahead is not None
    better, many = sum(net >= figures["test_accuracy"] for net in others), len(others)
    as_well = "None" if not better else "All" if better == many else str(better)
    which = f"{as_well} of the {many} random networks" if many > 1 else "The random network"
    did = "as well" if many > 1 or better else "worse"
    images, accuracy = figures["test_images"], figures["test_accuracy"]
    noise = 196 * math.sqrt(2 * accuracy * (1 - accuracy) / images)
    where = f"{abs(ahead):.2f} points {'above' if ahead >= 0 else 'below'} their mean"
    return (
        f"{which} of the same recipe did {did}. The found network is {where}, "
        f"{'within' if abs(ahead) <= noise else 'beyond'} the {noise:.2f} points that two networks of equal accuracy "
        f"may differ by on {images:,} test images; one seed each."
    )


def asked(told: Told) -> Part:
    """What was asked, in a table."""
    config, space = told.config, told.space
    choices = space.choices()
    size = log10_networks(choices)
    networks = f"{10**size:.3g}" if size < 300 else f"10^{size:.0f}"
    rows = [
        ("Space", f"{config['space']}, {len(choices)} choices, {networks} networks, {space.input_size} pixels"),
        ("Strategy", f"{told.strategy}, {told.epochs} epochs"),
        ("Images", str(config["data"]) + (f", at most {config['limit']:,}" if config.get("limit") else "")),
        ("Device", told.where),
        ("Budget", _asked_budget(config)),
    ]
    if config.get("objectives"):
        rows.append(("Objectives", ", ".join(map(str, config["objectives"]))))
        limits = ", ".join(f"{name} {value:g}" for name, value in (config["limits"] or {}).items())
        rows.append(("Limits", limits or "none"))
    found = _found(told)
    return Listing("", Table(("what", "value"), [*rows, *found]))


def _asked_budget(config: Mapping[str, Any]) -> str:
    budget, branches = config.get("latency_ms"), config.get("budget")
    told = [f"{branches} (branches)"] if branches is not None else []
    told += [f"{budget:g} ms"] if isinstance(budget, int | float) else []
    return ", ".join(told) or "none"


def _found(told: Told) -> list[tuple[str, str]]:
    run, figures = told.run, told.figures
    if run is None:
        return [("State", told.status)]
    best = run.candidates[0]
    net = figures["branches"]["host"] if "branches" in figures else str(best.architecture)
    rows = [("Best network", net), ("How it was derived", best.origin), ("Searching took", f"{told.seconds:,.0f} s")]
    export = figures.get("export")
    return [*rows, ("Exported", str(export["check"]))] if export else rows
