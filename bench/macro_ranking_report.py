"""What `bench/macro_ranking.py` found: does strict fairness rank networks better at equal path-gradients?

    python bench/macro_ranking_report.py OUT TABLE

OUT is its folder of results, TABLE nas-bench-macro_cifar10.json. Prints tables and a verdict, and draws
OUT/macro_ranking.png. Runs that are missing are named, and the rest is reported.

Rules, fixed before looking. Truth is the table's mean accuracy over its seeds. Rankings are compared by Kendall's
tau-b between one-shot and true accuracy, over the networks that all runs judged. The interval of a single run is the
2.5 to 97.5 percentile of 2,000 bootstrap resamples of networks. Strategies are compared by the difference of their
taus, a mean over the seeds that both have, under 2,000 resamples of networks (the same for both) and, independently,
of seeds (likewise). A difference is resolved if the 95 % interval excludes zero, there are at least three seeds, and
the difference has the same sign in each of them; everything else is "not resolved at this budget".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from macro_ranking import PATH_GRADIENTS, SEEDS, STRATEGY_NAMES
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import kendalltau

from pynas.rank import rank, write_png
from pynas.truth import Truth, read_truth

Floats = NDArray[np.float64]
RESAMPLES, LEVEL, ENOUGH_SEEDS = 2000, 0.95, 3
OURS = "fairnas"
COLOURS = {"fairnas": "#1f5fa8", "spos": "#d1495b", "ef": "#e8a33d", "one_shot": "#4b9b6a"}


@dataclass(frozen=True)
class Result:
    """One run: one-shot accuracies at the end by key, and what was seen on the way."""

    strategy: str
    seed: int
    accuracies: Mapping[str, float]
    history: Sequence[Mapping[str, Any]]
    updates: Mapping[str, Any]
    trained_on: str = "cpu"


def read(out: Path) -> tuple[list[Result], list[str]]:
    """The results that there are, and the names of those that are not."""
    found, missing = [], []
    for name in STRATEGY_NAMES:
        for seed in SEEDS:
            path = out / f"{name}-{seed}.json"
            if not path.exists():
                missing.append(f"{name}:{seed}")
                continue
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                taken = [record[field] for field in ("strategy", "seed", "accuracies", "history", "updates")]
            except (json.JSONDecodeError, KeyError) as error:
                sys.exit(
                    f"{path} is no result of bench/macro_ranking.py: {error!r}. Remove it and run its piece again."
                )
            if record["path_gradients"] != PATH_GRADIENTS:
                sys.exit(f"{path} took {record['path_gradients']} path-gradients, not {PATH_GRADIENTS}: no comparison.")
            found.append(Result(*taken, record.get("trained_on", "cpu")))
    return found, missing


def common_keys(results: Sequence[Result], truth: Truth) -> list[str]:
    """Networks that all runs judged and the table holds."""
    keys = set(truth.accuracy)
    for result in results:
        keys &= set(result.accuracies)
    return sorted(keys)


class Taus:
    """Kendall's tau of every run, as it is and under resamples of networks that are the same for all runs."""

    def __init__(self, results: Sequence[Result], truth: Truth, keys: Sequence[str], resamples: int) -> None:
        self.random = np.random.default_rng(0)
        true = np.array([truth.accuracy[key] for key in keys])
        draws = [self.random.integers(len(keys), size=len(keys)) for _ in range(resamples)]
        self.value: dict[tuple[str, int], float] = {}
        self.drawn: dict[tuple[str, int], Floats] = {}
        for result in results:
            guessed = np.array([result.accuracies[key] for key in keys])
            run = (result.strategy, result.seed)
            self.value[run] = tau(guessed, true)
            self.drawn[run] = np.array([tau(guessed[draw], true[draw]) for draw in draws])
        self.resamples = resamples

    def seeds(self, name: str) -> list[int]:
        return sorted(seed for strategy, seed in self.value if strategy == name)

    def interval(self, name: str, seed: int) -> tuple[float, float]:
        return quantiles(self.drawn[name, seed])

    def mean(self, name: str) -> float:
        return float(np.mean([self.value[name, seed] for seed in self.seeds(name)]))

    def difference(self, ours: str, other: str) -> tuple[float, float, float, list[int]]:
        """Mean over common seeds, its interval over networks and seeds, and these seeds."""
        seeds = [seed for seed in self.seeds(ours) if seed in self.seeds(other)]
        value = float(np.mean([self.value[ours, seed] - self.value[other, seed] for seed in seeds]))
        drawn = np.stack([self.drawn[ours, seed] - self.drawn[other, seed] for seed in seeds])
        picked = self.random.integers(len(seeds), size=(len(seeds), self.resamples))
        low, high = quantiles(np.take_along_axis(drawn, picked, axis=0).mean(0))
        return value, low, high, seeds


def tau(a: Floats, b: Floats) -> float:
    """Kendall's tau-b; 0 where all values are equal, which order nothing."""
    if (a == a[0]).all() or (b == b[0]).all():
        return 0.0
    return float(kendalltau(a, b, variant="b").statistic)


def quantiles(drawn: Floats) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


# Tables


def rankings(results: Sequence[Result], taus: Taus, truth: Truth, keys: Sequence[str]) -> str:
    """A row for each run, and what MACs and another training seed of the table reach on the same networks."""
    rows = ["| strategy | seed | Kendall's tau | Spearman | top-10 regret, points | one-shot accuracy, least to most |"]
    rows.append("| --- | --- | --- | --- | --- | --- |")
    for name in STRATEGY_NAMES:
        runs = [result for result in results if result.strategy == name]
        for run in runs:
            guessed = {key: run.accuracies[key] for key in keys}
            found = rank(guessed, truth, k=(10,), resamples=1)
            regret = found.regret[10].value if 10 in found.regret else None
            values = list(guessed.values())
            low, high = taus.interval(name, run.seed)
            rows.append(
                f"| `{name}` | {run.seed} | {taus.value[name, run.seed]:.3f} [{low:.3f}, {high:.3f}] "
                f"| {_number(found.spearman.value, 3)} | {_number(regret, 2, 100)} "
                f"| {np.mean(values):.2%}, {min(values):.2%} to {max(values):.2%} |"
            )
        if len(runs) > 1:
            each = [taus.value[name, run.seed] for run in runs]
            rows.append(f"| `{name}` | mean | {taus.mean(name):.3f}, {min(each):.3f} to {max(each):.3f} | | | |")
    true = np.array([truth.accuracy[key] for key in keys])
    for what, guess in (("MACs", truth.macs), ("parameters", truth.params)):
        values = np.array([float(guess[key]) for key in keys])
        rows.append(f"| {what} | | {tau(values, true):.3f} | | | |")
    seeds = [np.array([truth.seeds[key][i] for key in keys]) for i in range(min(map(len, truth.seeds.values())))]
    pairs = [tau(a, b) for i, a in enumerate(seeds) for b in seeds[i + 1 :]]
    if pairs:
        rows.append(f"| one training of the table against another | | {np.mean(pairs):.3f} | | | |")
    return "\n".join(rows)


def _number(value: float | None, digits: int, times: float = 1.0) -> str:
    return "-" if value is None else f"{times * value:.{digits}f}"


def over_training(results: Sequence[Result]) -> str:
    """Mean one-shot accuracy and its range after each part of the training, averaged over seeds."""
    shares = sorted({entry["share"] for result in results for entry in result.history})
    rows = ["| strategy | " + " | ".join(f"{share:.0%}" for share in shares) + " | mean fell |"]
    rows.append("| --- |" + " --- |" * (len(shares) + 1))
    for name in STRATEGY_NAMES:
        runs = [result for result in results if result.strategy == name]
        if not runs:
            continue
        cells = []
        for share in shares:
            entries = [e for run in runs for e in run.history if e["share"] == share]
            if not entries:
                cells.append("-")
                continue
            mean, least, most = (np.mean([entry[field] for entry in entries]) for field in ("mean", "least", "most"))
            cells.append(f"{100 * mean:.1f} ({100 * least:.1f} to {100 * most:.1f})")
        means = [[entry["mean"] for entry in run.history] for run in runs]
        falls = sum(later < earlier for run in means for earlier, later in zip(run, run[1:], strict=False))
        steps = sum(len(run) - 1 for run in means)
        rows.append(f"| `{name}` | {' | '.join(cells)} | {falls} of {steps} times |")
    return "\n".join(rows)


def verdicts(taus: Taus, ours: str = OURS) -> list[str]:
    """Strict fairness against every other strategy, by the rule above."""
    if not taus.seeds(ours):
        return [f"No verdict: there is no run of {ours}."]
    out = []
    for other in STRATEGY_NAMES:
        if other == ours:
            continue
        if not set(taus.seeds(ours)) & set(taus.seeds(other)):
            out.append(f"{ours} against {other}: no verdict, they have no seed in common.")
            continue
        value, low, high, seeds = taus.difference(ours, other)
        each = [taus.value[ours, seed] - taus.value[other, seed] for seed in seeds]
        told = f"tau {value:+.3f} [{low:+.3f}, {high:+.3f}], seeds {', '.join(map(str, seeds))}"
        if len(seeds) < ENOUGH_SEEDS:
            verdict = f"not resolved at this budget ({len(seeds)} of {ENOUGH_SEEDS} seeds)"
        elif low > 0 and min(each) > 0:
            verdict = f"resolved: {ours} ranks better"
        elif high < 0 and max(each) < 0:
            verdict = f"resolved: {other} ranks better"
        else:
            verdict = "not resolved at this budget"
        out.append(f"{ours} against {other}: {verdict}; {told}.")
    return out


# Picture


def draw(results: Sequence[Result], taus: Taus, truth: Truth, keys: Sequence[str]) -> Figure:
    """Left a panel for each strategy, one-shot against true accuracy; right the course of the training."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    panels = left.subplots(2, 2, sharex=True, sharey=True)
    true = [100 * truth.accuracy[key] for key in keys]
    for axes, name in zip(panels.flat, STRATEGY_NAMES, strict=True):
        runs = [result for result in results if result.strategy == name]
        for run in runs:
            guessed = [100 * run.accuracies[key] for key in keys]
            marker = "os^Dvx"[run.seed % 6]
            axes.scatter(guessed, true, s=9, marker=marker, color=COLOURS[name], alpha=0.4, linewidths=0)
        told = f"tau {taus.mean(name):.3f}, {len(runs)} seed{'s' * (len(runs) != 1)}" if runs else "missing"
        axes.set_title(f"{name}: {told}", fontsize=9)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
    left.supxlabel("one-shot accuracy (%)", fontsize=9)
    left.supylabel("true accuracy, trained alone (%)", fontsize=9)
    axes = right.subplots()
    for place, name in enumerate(STRATEGY_NAMES):
        histories = [result.history for result in results if result.strategy == name and result.history]
        shares = [entry["share"] for entry in min(histories, key=len)] if histories else []
        if not shares:
            continue
        mean, least, most = (
            np.array([100 * np.mean([history[i][field] for history in histories]) for i in range(len(shares))])
            for field in ("mean", "least", "most")
        )
        # Side by side, for ranges that lie over each other cannot be told apart.
        x = 100 * np.array(shares) + 1.6 * (place - (len(STRATEGY_NAMES) - 1) / 2)
        style = {"marker": "o", "markersize": 4, "linewidth": 1.2, "elinewidth": 1, "capsize": 2}
        axes.errorbar(x, mean, (mean - least, most - mean), color=COLOURS[name], label=name, **style)
    axes.set_xlabel("training done (%)", fontsize=9)
    axes.set_ylabel("one-shot accuracy (%): mean and range over networks", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    if axes.containers:
        axes.legend(fontsize=9, loc="lower right")
    return figure


def report(out: Path, table: Path, resamples: int = RESAMPLES) -> str:
    """Everything in words, and the picture in the folder."""
    truth = read_truth(table)
    results, missing = read(out)
    if not results:
        sys.exit(f"{out} holds no result yet. Make some: python bench/macro_ranking.py IMAGES {table} {out}")
    keys = common_keys(results, truth)
    if len(keys) < 3:
        sys.exit(f"The runs in {out} have {len(keys)} networks of {table} in common: nothing to rank.")
    taus = Taus(results, truth, keys, resamples)
    picture = write_png(draw(results, taus, truth, keys), out / "macro_ranking.png")
    parts = [
        f"{len(results)} runs, {len(keys)} networks, {PATH_GRADIENTS:,} path-gradients each.",
        f"Trained on: {', '.join(sorted({result.trained_on for result in results}))}.",
        f"Missing: {', '.join(missing)}." if missing else "No run is missing.",
        "",
        rankings(results, taus, truth, keys),
        "",
        "One-shot accuracy over training, mean (least to most) of the networks judged on the way, in %:",
        "",
        over_training(results),
        "",
        *verdicts(taus),
        "",
        f"Picture: {picture}",
    ]
    return "\n".join(parts)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(report(Path(sys.argv[1]), Path(sys.argv[2])))


if __name__ == "__main__":
    main()
