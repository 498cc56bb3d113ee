"""What `bench/cell_claims.py` found: children without retraining, edges that vanish, found cells trained again.

    python bench/cell_claims_report.py OUT

OUT is its folder of results. Prints tables and verdicts, and draws into OUT: claims.png (search network against child;
entropy; retrained cells), sweep-<seed>.png (the cells by eta), strip-<arm>.png (cells over the search), each as .svg,
too. Runs that are missing are named, and the rest is reported.

Rules, fixed before looking. A gap is the child's accuracy on the test images with inherited weights minus the search
network's on the same images, in points, for the child of the arm's own rule; batch norms as they are ("bare") and
recalibrated. Arms are compared by paired differences over the seeds that both have: the mean, and Student's 95 %
interval for a mean of so many differences. A difference is resolved if that interval excludes zero, there are at least
three seeds, and the difference has the same sign in each of them; everything else is "not resolved at this budget".
The sweep counts the edges and nodes of SNAS's children that are reached; "falls" means that a count never rises and
ends lower than it began, as eta grows, for a seed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cell_claims import ARMS, ETAS, RETRAINED, SEEDS, SNAS_ARMS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from pynas.architecture import Architecture
from pynas.draw import draw_grid, save_figure

LEVEL, ENOUGH_SEEDS = 0.95, 3
COLOURS = {"uniform": "#777777", "single": "#e8a33d", "darts": "#d1495b"}
BLUES = ("#9ecae1", "#4a90c2", "#1f5fa8", "#0b2f5b")
GAPS = {"accuracy_without_recalibration": "bare", "accuracy": "recalibrated"}

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """What there is, by arm and seed."""

    searches: Mapping[tuple[str, int], Record]
    retrainings: Mapping[tuple[str, int], Record]
    missing: Sequence[str]
    setting: Mapping[str, Any]


def read(out: Path) -> Results:
    """All results of a folder. Exits where one is broken, or where they were made with different sizes."""
    searches, retrainings, missing, settings = {}, {}, [], []
    for prefix, arms, found in (("", ARMS, searches), ("retrain-", RETRAINED, retrainings)):
        for arm in arms:
            for seed in SEEDS:
                path = out / f"{prefix}{arm}-{seed}.json"
                if not path.exists():
                    missing.append(f"{prefix}{arm}:{seed}")
                    continue
                found[arm, seed] = record = _record(path, "retrain" if prefix else "search")
                settings.append(record["setting"])
    for setting in settings[1:]:
        if setting != settings[0]:
            sys.exit(f"The results in {out} were made with different sizes: {settings[0]} and {setting}.")
    return Results(searches, retrainings, missing, settings[0] if settings else {})


def _record(path: Path, kind: str) -> Record:
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        if record["kind"] != kind:
            raise KeyError(kind)
        wanted = ("search_accuracy", "children", "history", "computed") if kind == "search" else ("accuracy", "params")
        for field in (*wanted, "setting", "training_cpu_s"):
            record[field]
    except (json.JSONDecodeError, KeyError) as error:
        sys.exit(f"{path} is no result of bench/cell_claims.py: {error!r}. Remove it and run its piece again.")
    return record


# Values of a run


def child(record: Record) -> Record:
    """The child of the arm's own rule."""
    found: Record = record["children"][record["rule"]]
    return found


def gap(field: str) -> Callable[[Record], float]:
    """Points that the child lies above its search network."""
    return lambda record: 100 * (child(record)[field] - record["search_accuracy"])


def entropy(record: Record) -> float:
    """Of the last distribution, mean over edges, in nats."""
    return float(record["history"][-1]["mean_entropy"])


def total(record: Record, what: str) -> int:
    """Edges or nodes of both cells."""
    return sum(child(record)[what].values())


def retrained(record: Record) -> float:
    """Accuracy in points."""
    return 100 * float(record["accuracy"])


# Statistics


@dataclass(frozen=True)
class Difference:
    """Of two arms, paired over seeds."""

    mean: float
    low: float
    high: float
    each: tuple[float, ...]
    form: str = "+.2f"

    @property
    def resolved(self) -> bool:
        same = min(self.each) > 0 or max(self.each) < 0
        return len(self.each) >= ENOUGH_SEEDS and same and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        mean, low, high = (format(value, self.form) for value in (self.mean, self.low, self.high))
        interval = f" [{low}, {high}]" if len(self.each) > 1 else ""
        return f"{mean}{interval}, {len(self.each)} seed{'s' * (len(self.each) != 1)}"


def difference(
    records: Mapping[tuple[str, int], Record], a: str, b: str, value: Callable[[Record], float], form: str = "+.2f"
) -> Difference | None:
    """A value of arm a minus that of arm b; None where no seed has both."""
    seeds = [seed for seed in SEEDS if (a, seed) in records and (b, seed) in records]
    if not seeds:
        return None
    each = tuple(value(records[a, seed]) - value(records[b, seed]) for seed in seeds)
    mean, half = float(np.mean(each)), math.inf
    if len(each) > 1:
        spread = float(np.std(each, ddof=1)) / math.sqrt(len(each))
        half = float(stats.t.ppf((1 + LEVEL) / 2, len(each) - 1)) * spread
    return Difference(mean, mean - half, mean + half, each, form)


def verdict(found: Difference | None, above: str, below: str, what: str) -> str:
    """A sentence on which of two arms has more."""
    if found is None:
        return f"{what}, {above} against {below}: no verdict, they have no seed in common."
    if not found.resolved:
        told = "not resolved at this budget"
    else:
        told = f"resolved: {above if found.mean > 0 else below} is higher"
    return f"{what}, {above} against {below}: {told}; {found}."


# Tables


def _mean(values: Sequence[float], form: str) -> str:
    if not values:
        return "missing"
    mean = format(np.mean(values), form)
    return mean if min(values) == max(values) else f"{mean} ({', '.join(format(value, form) for value in values)})"


def _of(records: Mapping[tuple[str, int], Record], arm: str) -> list[Record]:
    return [records[arm, seed] for seed in SEEDS if (arm, seed) in records]


def without_retraining(results: Results) -> str:
    """Mean over seeds, and each seed, in the order of seeds."""
    rows = ["| arm | search network % | child % bare | child % recalibrated | gap bare | gap recalibrated | entropy |"]
    rows.append("| --- | --- | --- | --- | --- | --- | --- |")
    for arm in ARMS:
        runs = _of(results.searches, arm)
        cells = [
            _mean([100 * run["search_accuracy"] for run in runs], ".2f"),
            *(_mean([100 * child(run)[field] for run in runs], ".2f") for field in GAPS),
            *(_mean([gap(field)(run) for run in runs], "+.2f") for field in GAPS),
            _mean([entropy(run) for run in runs], ".3f"),
        ]
        rows.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def other_rule(results: Results) -> str:
    """Children of both rules of derivation, after recalibration."""
    rows = ["| arm | arg-max with `none` % | two strongest edges % |", "| --- | --- | --- |"]
    for arm in ARMS:
        runs = [run for run in _of(results.searches, arm) if "argmax" in run["children"]]
        if runs:
            told = [
                _mean([100 * run["children"][rule]["accuracy"] for run in runs], ".2f") for rule in ("argmax", "top2")
            ]
            rows.append(f"| `{arm}` | {' | '.join(told)} |")
    return "\n".join(rows)


def sweep(results: Results) -> str:
    """Size of SNAS's children by eta."""
    rows = [
        "| eta | edges normal | edges reduction | nodes normal | nodes reduction | params | MACs | child % | note |"
    ]
    rows.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for eta, arm in zip(ETAS, SNAS_ARMS, strict=True):
        runs = _of(results.searches, arm)
        counts = [
            _mean([child(run)[what].get(cell, 0) for run in runs], ".3g")
            for what in ("edges", "nodes")
            for cell in ("normal", "reduce")
        ]
        sizes = [_mean([child(run)[what] for run in runs], ",.0f") for what in ("params", "macs")]
        dead = sum(not run["most_probable_reads_image"] for run in runs)
        note = f"{dead} of {len(runs)} reached nothing and got an edge back" if dead else ""
        accuracy = _mean([100 * child(run)["accuracy"] for run in runs], ".2f")
        rows.append(f"| {eta:g} | {' | '.join((*counts, *sizes, accuracy))} | {note} |")
    return "\n".join(rows)


def again(results: Results) -> str:
    """Found cells, restacked and trained from scratch."""
    rows = ["| cells of | test accuracy % | params | MACs | training CPU s |", "| --- | --- | --- | --- | --- |"]
    for arm in RETRAINED:
        runs = _of(results.retrainings, arm)
        told = [
            _mean([retrained(run) for run in runs], ".2f"),
            *(_mean([run[what] for run in runs], ",.0f") for what in ("params", "macs", "training_cpu_s")),
        ]
        rows.append(f"| `{arm}` | {' | '.join(told)} |")
    return "\n".join(rows)


def cost(results: Results) -> str:
    """What it took."""
    passes = sorted({run["computed"]["gradient_passes"] for run in results.searches.values()})
    hours = {
        name: sum(run["training_cpu_s"] for run in some.values()) / 3600
        for name, some in (("searching", results.searches), ("retraining", results.retrainings))
    }
    told = ", ".join(f"{value:.2f} core-hours of {name}" for name, value in hours.items())
    return f"Gradient computations of a search: {' or '.join(map(str, passes)) or 'none'}. {told}, without judging."


# Verdicts


def verdicts(results: Results) -> list[str]:
    """The claims, one by one."""
    searches, retrainings = results.searches, results.retrainings
    out = ["Children without retraining:"]
    for field, word in GAPS.items():
        for arm in SNAS_ARMS:
            for other in ("darts", "single"):
                out.append(verdict(difference(searches, arm, other, gap(field)), arm, other, f"gap, {word}"))
    out.append("Entropy of the last distribution:")
    for arm in SNAS_ARMS:
        out.append(verdict(difference(searches, arm, "darts", entropy, "+.3f"), arm, "darts", "entropy"))
    out += ["Cost prunes:", *_falls(results), "Retrained:"]
    snas = [arm for arm in RETRAINED if arm in SNAS_ARMS]
    pairs = [(arm, other) for arm in snas for other in RETRAINED if other not in SNAS_ARMS]
    for a, b in (*pairs, ("uniform", "single"), ("darts", "single")):
        out.append(verdict(difference(retrainings, a, b, retrained), a, b, "retrained accuracy"))
    return out


def _falls(results: Results) -> list[str]:
    told = []
    seeds = [seed for seed in SEEDS if all((arm, seed) in results.searches for arm in SNAS_ARMS)]
    for what in ("edges", "nodes"):
        counts = {seed: [total(results.searches[arm, seed], what) for arm in SNAS_ARMS] for seed in seeds}
        falls = [all(b <= a for a, b in zip(n, n[1:], strict=False)) and n[-1] < n[0] for n in counts.values()]
        each = (
            "; ".join(f"seed {seed}: {', '.join(map(str, n))}" for seed, n in counts.items()) or "no seed is complete"
        )
        told.append(f"{what} fall as eta grows in {sum(falls)} of {len(seeds)} seeds ({each}).")
    return told


# Pictures


def draw(results: Results) -> Figure:
    """Search network against child, entropy over the search, and retrained cells."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.35, 1, 1))
    _draw_children(left, results)
    _draw_entropy(middle, results)
    _draw_retrained(right, results)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
    return figure


def colour(arm: str) -> str:
    """Of an arm in all pictures."""
    return COLOURS.get(arm) or BLUES[SNAS_ARMS.index(arm)]


def _draw_children(axes: Axes, results: Results) -> None:
    for row, arm in enumerate(reversed(ARMS)):
        for run in _of(results.searches, arm):
            y = row + 0.16 * (run["seed"] - 1)
            before, bare, after = (
                100 * value
                for value in (run["search_accuracy"], *(child(run)[field] for field in GAPS))
            )  # fmt: skip
            axes.plot((before, after), (y, y), color=colour(arm), linewidth=1.5, zorder=2)
            axes.plot(before, y, "o", color=colour(arm), markersize=6, zorder=3)
            axes.plot(after, y, marker=">" if after > before else "<", color=colour(arm), markersize=7, zorder=3)
            axes.plot(bare, y, "x", color=colour(arm), markersize=5, zorder=3)
    axes.set_yticks(range(len(ARMS)), [*reversed(ARMS)])
    axes.set_xlabel("test accuracy (%)", fontsize=9)
    axes.set_title("search network (dot), its child without retraining\n(arrow: recalibrated; x: bare)", fontsize=9)


def _draw_entropy(axes: Axes, results: Results) -> None:
    for arm in ARMS:
        runs = _of(results.searches, arm)
        for run in runs:
            x = [entry["gradient_passes"] for entry in run["history"]]
            label = arm if run is runs[0] else None
            axes.plot(x, [entry["mean_entropy"] for entry in run["history"]], color=colour(arm), label=label, lw=1.3)
    axes.axhline(math.log(8), color="#444444", linestyle=":", linewidth=1)
    axes.set_xlabel("gradient computations", fontsize=9)
    axes.set_title("entropy of the distribution (nats an edge);\ndotted: uniform over 8 operations", fontsize=9)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _draw_retrained(axes: Axes, results: Results) -> None:
    for row, arm in enumerate(RETRAINED):
        values = [retrained(run) for run in _of(results.retrainings, arm)]
        if values:
            axes.plot([row] * len(values), values, "o", color=colour(arm), markersize=6)
            axes.plot((row - 0.25, row + 0.25), [np.mean(values)] * 2, color=colour(arm), linewidth=2)
    axes.set_xticks(range(len(RETRAINED)), RETRAINED, rotation=20)
    axes.set_ylabel("test accuracy (%)", fontsize=9)
    axes.set_title("found cells in a larger network, trained from scratch\n(seeds, and their mean)", fontsize=9)


def pictures(results: Results, out: Path) -> list[Path]:
    """Draws everything that can be drawn."""
    figures = {"claims": draw(results)} if results.searches else {}
    for seed in SEEDS:
        runs = {eta: results.searches.get((arm, seed)) for eta, arm in zip(ETAS, SNAS_ARMS, strict=True)}
        nets = {f"eta {eta:g}": Architecture.from_json(child(run)["net"]) for eta, run in runs.items() if run}
        if nets:
            space = next(iter(nets.values())).search_space()
            figures[f"sweep-{seed}"] = draw_grid(
                space,
                {title: {name: options[0] for name, options in net.choices.items()} for title, net in nets.items()},
            )
    for arm in ARMS:
        run = next((run for run in _of(results.searches, arm) if run["cells"]), None)
        if run is not None:
            shown = sorted({round(part) for part in np.linspace(0, len(run["cells"]) - 1, 6)})
            titles = {
                f"after {run['history'][part]['gradient_passes']} gradients": run["cells"][part] for part in shown
            }
            figures[f"strip-{arm}"] = draw_grid(Architecture.from_json(child(run)["net"]).search_space(), titles)
    for name, figure in figures.items():
        save_figure(figure, out / f"{name}.svg")
    return [save_figure(figure, out / f"{name}.png") for name, figure in figures.items()]


def report(out: Path) -> str:
    """Everything in words, and the pictures in the folder."""
    results = read(out)
    if not results.searches:
        sys.exit(f"{out} holds no result yet. Make some: python bench/cell_claims.py IMAGES {out}")
    drawn = pictures(results, out)
    parts = [
        f"{len(results.searches)} searches, {len(results.retrainings)} retrainings; sizes: {results.setting}.",
        cost(results),
        f"Missing: {', '.join(results.missing)}." if results.missing else "No run is missing.",
        "Values are means over seeds, with each seed in brackets where they differ.",
        "",
        without_retraining(results),
        "",
        other_rule(results),
        "",
        sweep(results),
        "",
        again(results),
        "",
        *verdicts(results),
        "",
        f"Pictures: {', '.join(path.name for path in drawn)} in {out}",
    ]
    return "\n".join(parts)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(report(Path(sys.argv[1]).resolve()))


if __name__ == "__main__":
    main()
