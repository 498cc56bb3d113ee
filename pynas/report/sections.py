"""The sections of a report, in order; see the recipe in `pynas.report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pynas.report import deployed, found, head, learning, ranks, sources
from pynas.report.parts import Absent, Part, Section
from pynas.report.told import Told

Maker = Callable[[Told], Part | Sequence[Part]]


@dataclass(frozen=True)
class Planned:
    """A section before a run is looked at.

    Args:
        key: Its anchor.
        title: Its head.
        parts: What makes each part, by a name for the list of what is left out.
    """

    key: str
    title: str
    parts: tuple[tuple[str, Maker], ...]


SECTIONS: tuple[Planned, ...] = (
    Planned("asked", "What was asked and found", (("Asked and found", head.asked),)),
    Planned(
        "networks",
        "Networks and baselines",
        (
            ("Pareto set", found.pareto),
            ("Found against random", found.tested),
            ("Networks that were derived", found.candidates),
        ),
    ),
    Planned("network", "The network", (("Layer by layer", found.drawn),)),
    Planned("latency", "Latency", (("Where the latency goes", found.layers), ("Predicted and measured", found.whole))),
    Planned("theta", "How the search made up its mind", (("Theta", learning.theta), ("Entropy", learning.entropy))),
    Planned("curves", "Curves", (("Curves", learning.panels),)),
    Planned(
        "cells", "Cells over the epochs", (("Cells over the epochs", learning.epochs), ("Credit", learning.credit))
    ),
    Planned("deployment", "Files to deploy", (("Files to deploy", deployed.files),)),
    Planned("ranking", "Ranking", (("Ranking", ranks.ranking),)),
    Planned("comparison", "Comparison", (("Comparison", ranks.compared),)),
    Planned("sources", "Where the numbers come from", (("Sources of the numbers", sources.numbers),)),
    Planned("again", "How to get this again", (("Command", sources.again), ("Versions", sources.versions))),
)


def build(told: Told) -> tuple[list[Section], list[tuple[str, str]]]:
    """All sections that the run has data for, and what was left out, with the reason of each."""
    sections, left_out = [], []
    for planned in SECTIONS:
        parts: list[Part] = []
        for name, make in planned.parts:
            try:
                made = make(told)
            except KeyError as error:
                left_out.append((name, f"a file of the run lacks {error}"))
            except (Absent, ValueError, OSError) as error:
                left_out.append((name, str(error).rstrip(".")))
            else:
                parts += list(made) if isinstance(made, Sequence) else [made]
        if parts:
            sections.append(Section(planned.key, planned.title, parts))
    return sections, left_out
