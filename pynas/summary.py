"""What a search says before it starts and when it is done."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pynas.architecture import Architecture
from pynas.branch_plan import branch_rows, space_text
from pynas.budget import cost_range
from pynas.console import Show
from pynas.plan import Plan, kernels_used
from pynas.rank import Estimate, Ranking
from pynas.registry import STRATEGIES
from pynas.results import Run
from pynas.strategies.pareto_set import settings_of
from pynas.subsets import picks_any
from pynas.training.run import RunFolder
from pynas.training.where import describe

MOST_ROWS = 16  # of a Pareto set in the table


def show_plan(plan: Plan, show: Show) -> None:
    """Says what will be done, under which budget, and what that costs."""
    strategy, name = plan.strategy, plan.config["strategy"]["name"]
    feed = plan.feed(strategy.batch_size)
    steps = sum(strategy.steps(feed, epoch) for epoch in range(strategy.epochs))
    show.line(f"data: {plan.data.describe()}")
    show.line(f"device: {plan.device.describe()}")
    for line in _branches(plan) if plan.branches is not None else _space(plan):
        show.line(line)
    config, images = plan.config, getattr(plan.strategy, "batch_size", 16)
    show.line(f"kernels: {kernels_used(plan.space, config['amp'], images, config['train_on'])}")
    if config["train_on"] != "cpu":
        show.line(f"trains on: {describe(config['train_on'])}")
    macs = steps * strategy.batch_size * strategy.macs_per_image(plan.space)
    show.line(
        f"strategy: {name}, {strategy.epochs} epochs, {steps:,} steps of {strategy.batch_size} images, "
        f"{macs / 1e12:,.3g} tera-MACs here; published cost: {strategy.COST}"
    )


def _space(plan: Plan) -> list[str]:
    """What is searched, and under which budget."""
    bounds, networks = cost_range(plan.table), 1
    for choice in plan.space.choices():
        networks *= len(choice.options)
    where = f"{plan.space.name}, {len(plan.space.choices())} choices, {networks:.3g} networks"
    lines = [f"space: {where}, predicted {bounds.low:.3g} to {bounds.high:.3g} ms{_share_fitted(plan)}"]
    if plan.goals:
        return lines + _goals(plan)
    if plan.budget is None:
        return [*lines, "budget: none; latency is weighed by the strategy's own loss"]
    if plan.budget >= bounds.high:
        return [*lines, f"budget: {plan.budget:g} ms does not bind; every network of the space meets it"]
    return [*lines, f"budget: {plan.budget:g} ms"]


def _branches(plan: Plan) -> list[str]:
    """The same where subsets of branches are searched."""
    assert plan.branches is not None
    nothing = Architecture(plan.space.name, {c.name: () for c in plan.space.choices()}, plan.space.options())
    cost_ms = plan.predicted_ms(nothing)
    return [space_text(plan.space, plan.branches, cost_ms), f"budget: {plan.branches.describe()}"]


def _share_fitted(plan: Plan) -> str:
    fitted, total = plan.table.sources.get("fitted", 0), sum(plan.table.sources.values())
    return f", {fitted} of {total} ops fitted" if fitted else ""


def _goals(plan: Plan) -> list[str]:
    """What is pursued, within which limits, and by how large an evolution."""
    pursued = ", ".join(f"{goal.name} ({goal.direction})" for goal in plan.goals if goal.pursued)
    limits = ", ".join(goal.bound for goal in plan.goals if goal.limit is not None)
    evaluations = plan.strategy.evaluations  # type: ignore[attr-defined]  # goals come to strategies that have them
    settings = settings_of(plan.problem(), evaluations)
    size = f"population {settings.population}, {settings.children} children a generation"
    return [
        f"objectives: {pursued}; limits: {limits or 'none, the set spans the whole space'}",
        f"evolution: {evaluations} networks judged, {size}",
    ]


def show_result(run: Run, show: Show) -> None:
    """The closing tables: the Pareto set; best net, accuracy, MACs, latencies, random baseline, places."""
    best, figures = run.candidates[0], run.figures
    if RunFolder(run.folder).config().get("objectives"):
        show_pareto(run, show)
    if not figures:
        branches = picks_any(best.architecture.search_space().choices())
        cost = f"costs {best.cost:.4g} of the branch budget" if branches else f"predicted {best.cost:.3g} ms"
        show.line(f"best: {best.architecture}, {cost}; train it with: pynas retrain {run.folder}")
        return
    try:
        rows = _rows(run)
    except KeyError as error:
        raise ValueError(f"{run.folder / 'result.json'} lacks {error}. Remove it and resume the run.") from None
    show.table("Result", ("what", "value"), rows, note=f"latency: {figures['device']}")


def show_pareto(run: Run, show: Show) -> None:
    """The Pareto set, most accurate first. Of a long one some networks evenly, the first and the last among them."""
    nets = run.candidates
    trained = {alone.architecture.fingerprint: f"{alone.accuracy:.2%}" for alone in run.trained}
    last, rows = min(len(nets), MOST_ROWS) - 1, []
    for row in range(last + 1):
        number = round(row * (len(nets) - 1) / last) if last else 0
        net = nets[number]
        rows.append(
            (
                str(number + 1),
                f"{net.accuracy:.2%}",
                f"{net.cost:.4g}",
                f"{net.macs:,}",
                f"{net.params:,}",
                trained.get(net.architecture.fingerprint, "-"),
            )
        )
    columns = ("net", "accuracy, inherited", "predicted ms", "MACs", "params", "trained alone")
    some = f", {len(rows)} of them shown" if len(rows) < len(nets) else ""
    others = (
        f"; others: pynas retrain {run.folder} --net 2, then pynas export {run.folder} --net 2 (--weights inherited "
        "needs no training)"
    )
    note = (
        f"{len(nets)} of {len(run.judged)} judged networks{some}; net 1, the most accurate, is the best"
        f"{others if len(nets) > 1 else ''}; picture: {run.folder / 'pareto.png'}"
    )
    show.table("Pareto set", columns, rows, note=note)


def show_ranking(ranking: Ranking, picture: Path, show: Show) -> None:
    """How well predictions order networks."""
    rows = [
        ("networks", f"{len(ranking.keys)}, against {ranking.truth}"),
        ("Kendall's tau", str(ranking.kendall)),
        ("Spearman", str(ranking.spearman)),
        *[(f"top-{k} regret", f"{_points(estimate)}") for k, estimate in ranking.regret.items()],
        ("verdict", ranking.verdict),
        ("picture", str(picture)),
    ]
    show.table("Ranking", ("what", "value"), rows, note=f"intervals: {ranking.level:.0%}, bootstrap over networks")


def _points(estimate: Estimate) -> str:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return str(estimate)
    return f"{100 * estimate.value:.2f} points [{100 * estimate.low:.2f}, {100 * estimate.high:.2f}]"


def show_fairness(runs: Sequence[Mapping[str, Any]], show: Show) -> None:
    """A line for each run: what was computed, how evenly it fell on the options, and what the article says."""
    columns = ("run", "strategy", "gradients", "paths", "updates", "EF", "SF", "article")
    rows = [
        (
            run["run"],
            run["strategy"],
            f"{run['path_gradients']:,.0f}",
            f"{run['paths']:.3g}",
            f"{_times(run['least'])} to {_times(run['most'])}",
            f"{_yes(run['expectation'])}, p={run['p']:.2g}",
            _yes(run["strict"]),
            " ".join(STRATEGIES.get(run["strategy"]).FAIR),
        )
        for run in runs
    ]
    note = (
        "gradients: computed, of single paths; paths: that a pass differentiates; updates: of an option, from least to "
        "most; EF: equal in expectation; SF: equal after every step; article: EF and SF in its table, from memory"
    )
    show.table("Fairness", columns, rows, note=note)


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"


def _fairness(figures: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """How evenly the search trained the options, where it means to."""
    found, strategy = figures.get("fairness"), str(figures.get("strategy"))
    if not found or strategy not in STRATEGIES or STRATEGIES.get(strategy).FAIR[0] != "yes":
        return []
    how = "equal after every step" if found["strict"] else f"expectations {'' if found['expectation'] else 'not '}equal"
    text = f"{_times(found['least'])} to {_times(found['most'])}, {how}; see: pynas fairness {folder}"
    return [("updates of an option", text)]


def _times(count: float) -> str:
    return f"{count:,.0f}" if count == int(count) else f"{count:,.1f}"


def _rows(run: Run) -> list[tuple[str, str]]:
    figures = run.figures
    return [
        ("best net", figures["branches"]["host"] if "branches" in figures else figures["net"]),
        *branch_rows(figures),
        ("test accuracy", f"{figures['test_accuracy']:.2%} of {figures['test_images']} images"),
        ("params / MACs", f"{figures['params']:,} / {figures['macs']:,}"),
        *_inherited(figures),
        ("predicted latency", f"{figures['predicted_ms']:.3g} ms{_budget(figures)}{_fitted(figures.get('fitted'))}"),
        ("measured latency", _measured(figures)),
        *[(f"on {price['device']}", _elsewhere(price)) for price in figures.get("elsewhere", [])],
        ("random search", _baseline(figures)),
        ("kernels", figures["kernels"]),
        *([("trained on", figures["trained_on"])] if figures.get("trained_on", "cpu") != "cpu" else []),
        *_collapse(figures),
        *_fairness(figures, run.folder),
        ("export", figures["export"]["check"]),
        ("run folder", str(run.folder)),
        ("exported file", figures["export"]["path"]),
    ]


def _inherited(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the found net did with the weights of the search, where the search itself is a network to compare with."""
    found = figures.get("inherited")
    if not found:
        return []
    text = f"{found['accuracy']:.2%} of held-out images"
    if found["calibrate"]:
        text += f" ({found['accuracy_without_recalibration']:.2%} before batch norms were recalibrated)"
    if found["search_accuracy"] is not None:
        text += f"; the whole search network {found['search_accuracy']:.2%}"
    return [("without retraining", text)]


def _collapse(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How sure theta became, and whether it fled into skips."""
    end = figures["search_end"]
    if not end:
        return []
    text = f"skips {end['skip_share']:.0%} of theta's probability, mean entropy {end['mean_entropy']:.2f} nats a layer"
    if end["skip_share"] > 0.5 and hasattr(STRATEGIES.get(figures["strategy"]), "skip_dropout"):
        text += "; collapsed to skips: try --strategy.skip_dropout 0.5"
    return [("theta at the end", text)]


def _budget(figures: Mapping[str, Any]) -> str:
    if figures["budget_ms"] is None:
        return ""
    if figures.get("objectives") or "branches" in figures:
        return f" (limit {figures['budget_ms']:g} ms)"
    share = figures["predicted_ms"] / figures["budget_ms"]
    text = f"{share:.0%} of the budget {figures['budget_ms']:g} ms"
    if share < 1 - figures["slack"]:
        text += "; no network of the space lies between, or the budget does not bind"
    return f" ({text})"


def _measured(figures: Mapping[str, Any]) -> str:
    if figures["measured_ms"] is None:
        return "not here: the table's device is not this host"
    ratio = figures["measured_ms"] / figures["predicted_ms"]
    return (
        f"{figures['measured_ms']:.3g} ms, spread {figures['measured_spread_ms']:.2g} ms, on this host, whole net "
        f"({ratio:.0%} of predicted)"
    )


def _elsewhere(price: Mapping[str, Any]) -> str:
    told = f"{price['source']} by {price['runner']}{_fitted(price['fitted'])}"
    return f"{price['predicted_ms']:.3g} ms, {told}; see: pynas list devices"


def _fitted(ops: int | None) -> str:
    """How much of a prediction stands on rows of other ops; nothing where none does, or older runs did not count."""
    return f", {ops} of its ops fitted" if ops else ""


def _baseline(figures: Mapping[str, Any]) -> str:
    found = [entry["accuracy"] for entry in figures["baseline"]]
    if not found:
        return "not asked for (baseline=0)"
    ahead = figures["test_accuracy"] - statistics.fmean(found)
    random = ", random branches" if "branches" in figures else ""
    same = "predicted latency" if figures.get("objectives") else "budget"
    return (
        f"{len(found)} nets of the same {same} and recipe{random}: mean {statistics.fmean(found):.2%}, "
        f"best {max(found):.2%}; found net {100 * ahead:+.2f} points against the mean"
    )
