"""What `bench/repnas_cifar10.py` found: do searched branches pay at equal epochs, and does sharing help?

    python bench/repnas_report.py OUT

OUT is its folder of results. Prints tables and verdicts, and draws OUT/repnas.png. Pieces that are missing are named,
and the rest is reported.

Rules, fixed before looking. Contestants are compared by test accuracy at the end, paired by seed: a difference is
resolved if there are at least three seeds, it has the same sign in each, and the 95 % interval of a paired t-test
excludes zero; everything else is "not resolved at this budget". The importance of a branch is its logit when branches
were fixed; it is compared with the rise of the loss on held-out images without that branch by Kendall's tau-b over the
kept branches of a run.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from repnas_cifar10 import FIXED, OTHER_SEEDS, OTHER_SHARES, SEARCHED, SEEDS, SHARE, pieces
from scipy.stats import kendalltau, t

from pynas.rank import write_png

NAMES = {
    "plain": "plain",
    "repvgg": "RepVGG block",
    "acb": "ACB",
    "dbb": "DBB",
    "random": "random branches",
    "repnas": "RepNAS, shared",
    "separate": "RepNAS, separate",
}
COLOURS = dict(zip(NAMES, ("#888888", "#4b9b6a", "#7a5fa8", "#e8a33d", "#b08968", "#1f5fa8", "#d1495b"), strict=True))
ENOUGH_SEEDS, LEVEL = 3, 0.95
Record = Mapping[str, Any]


def read(out: Path) -> tuple[dict[str, Record], list[str]]:
    """Results by piece, and the pieces that are missing."""
    found: dict[str, Record] = {}
    missing = []
    for piece in pieces():
        path = out / f"{piece.replace(':', '-')}.json"
        if not path.exists():
            missing.append(piece)
            continue
        try:
            found[piece] = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            sys.exit(f"{path} is broken: {error}. Remove it and run its piece again.")
    return found, missing


def accuracies(results: Mapping[str, Record], name: str) -> dict[int, float]:
    """Test accuracy of a contestant in percent, by seed."""
    runs = {seed: results.get(f"{name}:{seed}") for seed in SEEDS}
    return {seed: 100 * run["test_accuracy"] for seed, run in runs.items() if run is not None}


def spread(values: Sequence[float], unit: str = "") -> str:
    """Mean and standard deviation."""
    deviation = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}{unit}" if values else "-"


def table(results: Mapping[str, Record]) -> None:
    """A line for every contestant: accuracy, and what a step and the folded network cost."""
    columns = ("contestant", "seeds", "test accuracy %", "step, CPU ms", "peak MB", "training params")
    columns += ("folded ms", "folded params")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for name in FIXED + SEARCHED:
        found, cost = accuracies(results, name), results.get(f"cost:{name}")
        run = next((results[f"{name}:{seed}"] for seed in found), None)
        costs = [f"{cost[key]:.4g}" for key in ("step_cpu_ms", "peak_mb")] if cost else ["-", "-"]
        params = f"{run['training_params']:,}" if run else "-"
        folded = [f"{cost['folded_ms']:.3g}", f"{cost['folded']['params']:,}"] if cost else ["-", "-"]
        cells = [NAMES[name], str(len(found)), spread(list(found.values())), *costs, params, *folded]
        print(f"| {' | '.join(cells)} |")


def verdict(results: Mapping[str, Record], ours: str, other: str) -> str:
    """Whether one contestant is better than another, paired by seed."""
    mine, theirs = accuracies(results, ours), accuracies(results, other)
    both = sorted(set(mine) & set(theirs))
    if not both:
        return f"{NAMES[ours]} against {NAMES[other]}: no seed in common"
    gaps = [mine[seed] - theirs[seed] for seed in both]
    mean = statistics.fmean(gaps)
    text = f"{NAMES[ours]} against {NAMES[other]}: {mean:+.2f} points"
    if len(gaps) < 2:
        return f"{text}, one seed"
    half = float(t.ppf(0.5 + LEVEL / 2, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    same = all(gap > 0 for gap in gaps) or all(gap < 0 for gap in gaps)
    resolved = len(gaps) >= ENOUGH_SEEDS and same and abs(mean) > half
    told = "resolved" if resolved else "not resolved at this budget"
    return f"{text} [{mean - half:+.2f}, {mean + half:+.2f}] over {len(gaps)} seeds: {told}"


def budgets(results: Mapping[str, Record]) -> list[tuple[float, list[float]]]:
    """Test accuracy in percent of RepNAS by share of the branches, over the seeds that all budgets have."""
    found = []
    for share in sorted((SHARE, *OTHER_SHARES)):
        label = "repnas" if share == SHARE else f"repnas@{share}"
        runs = [results.get(f"{label}:{seed}") for seed in OTHER_SEEDS]
        found.append((share, [100 * run["test_accuracy"] for run in runs if run is not None]))
    return found


def importance(results: Mapping[str, Record], name: str) -> list[float]:
    """Kendall's tau of logits and rises of the loss, run by run."""
    found = []
    for seed in SEEDS:
        record = results.get(f"ablate:{name}:{seed}")
        if record is not None:
            rows = record["rows"]
            tau = float(kendalltau([row["logit"] for row in rows], [row["loss_rise"] for row in rows])[0])
            found.append(tau)
    return found


def draw(results: Mapping[str, Record], path: Path) -> None:
    """Convergence on held-out images, accuracy by budget, and importance against ablation."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    curves, sweep, scatter = figure.subplots(1, 3)
    for name in FIXED + SEARCHED:
        runs = [results[f"{name}:{seed}"]["held_out"] for seed in SEEDS if f"{name}:{seed}" in results]
        if runs:
            epochs = [point["epoch"] for point in runs[0]]
            means = [100 * statistics.fmean(point["accuracy"] for point in at) for at in zip(*runs, strict=True)]
            style = "-" if name in SEARCHED else "--"
            curves.plot(epochs, means, style, color=COLOURS[name], label=NAMES[name], linewidth=1.5)
    curves.set(xlabel="epoch", ylabel="held-out accuracy, %", title="convergence, mean over seeds")
    curves.legend(fontsize=7)
    known = [(share, values) for share, values in budgets(results) if values]
    for share, values in known:
        sweep.plot([share] * len(values), values, "o", color=COLOURS["repnas"], markersize=4)
    sweep.plot([s for s, _ in known], [statistics.fmean(v) for _, v in known], "-", color=COLOURS["repnas"])
    sweep.set(xlabel="share of the branches", ylabel="test accuracy, %", title="branch budget")
    for name in SEARCHED:
        rows = [r for s in SEEDS for r in results.get(f"ablate:{name}:{s}", {}).get("rows", [])]
        scatter.plot(
            [row["logit"] for row in rows],
            [row["loss_rise"] for row in rows],
            "o",
            color=COLOURS[name],
            label=NAMES[name],
            markersize=4,
        )
    scatter.set(xlabel="logit", ylabel="rise of the loss without the branch", title="importance and ablation")
    scatter.legend(fontsize=7)
    write_png(figure, path)


def main() -> None:
    out = Path(sys.argv[1]).resolve()
    results, missing = read(out)
    if missing:
        print(f"missing: {', '.join(missing)}\n")
    table(results)
    print()
    for other in FIXED:
        print(verdict(results, "repnas", other))
    print(verdict(results, "repnas", "separate"))
    print("\nshare of the branches, test accuracy %:")
    for share, values in budgets(results):
        print(f"  {share:.2f}  {spread(values)}  ({len(values)} seeds)")
    for name in SEARCHED:
        taus = importance(results, name)
        print(f"Kendall's tau of logit and ablation, {NAMES[name]}: {spread(taus)} ({len(taus)} runs)")
    for name in SEARCHED:
        kinds: dict[str, int] = {}
        for seed in SEEDS:
            for names in results.get(f"{name}:{seed}", {}).get("branches", {}).values():
                for branch in names:
                    kinds[branch] = kinds.get(branch, 0) + 1
        print(f"kept by {NAMES[name]}: {', '.join(f'{k} {n}' for k, n in sorted(kinds.items(), key=lambda x: -x[1]))}")
    draw(results, out / "repnas.png")


if __name__ == "__main__":
    main()
