"""From a plan to a checked network: the stages of a search, each resumable from the run folder."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cost_models
from cost_models.analytic import Macs, Params
from cost_models.runners import TorchHost, cpu_model
from pynas.architecture import Architecture
from pynas.branch_plan import STEPS, branch_figures, folded_ms
from pynas.budget import cost_range
from pynas.console import Show
from pynas.counting import count
from pynas.export import Report, export
from pynas.fuse import fuse
from pynas.plan import Plan, kernels_used
from pynas.plots import plot_pareto
from pynas.rank import write_png
from pynas.registry import SearchSpace
from pynas.results import Run, Trained, note_trained, read_candidates, save_model, write_candidates
from pynas.strategies import Candidate
from pynas.strategies.children import read_child
from pynas.strategies.fbnet import CALIBRATE
from pynas.strategies.random import random_architectures
from pynas.supernet import Supernet, cost_table
from pynas.timed_nets import net_specs
from pynas.training.data import Data
from pynas.training.evaluate import accuracy, recalibrate
from pynas.training.feed import Feed, batches
from pynas.training.judge import Judging
from pynas.training.loop import Interrupted, train
from pynas.training.run import RunFolder
from pynas.training.submodels import Submodels
from pynas.training.train import Training
from pynas.training.where import available, describe

TIMINGS = 15


def _keep_tables(plan: Plan, run: RunFolder) -> None:
    """Copies all tables into the run folder; `device` last and in one step, so that it stands for all of them."""
    (run.path / "elsewhere").mkdir(exist_ok=True)
    for table in plan.elsewhere:
        table.copy_to(run.path / "elsewhere" / table.name)
    if plan.branches is not None and plan.branches.steps is not None and not (run.path / STEPS).is_dir():
        plan.branches.steps.copy_to(run.path / STEPS)
    plan.device.copy_to(run.path / ".device").rename(run.path / "device")


def execute(plan: Plan, run: RunFolder, show: Show) -> Run:
    """Runs all stages that the run folder does not hold yet. On Ctrl-C raises Interrupted, which says how to go on."""
    try:
        return _stages(plan, run, show)
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(f"Stopped. Go on with: {_resume(run)}") from None


def _resume(run: RunFolder) -> str:
    return f"pynas search --resume {run.path}"


def _stages(plan: Plan, run: RunFolder, show: Show) -> Run:
    seed = plan.config["seed"]
    if not (run.path / "device").is_dir():
        _keep_tables(plan, run)
    judged = _search(plan, run, show)
    best = judged[0]
    if plan.goals and not (run.path / "pareto.png").exists():
        write_png(plot_pareto(Run.of(run, judged, {})), run.path / "pareto.png")
    figures: dict[str, Any] = run.read_json("result.json") or {}
    if plan.config["retrain"] and not figures:
        if plan.strategy.TRAINS:
            trained = _as_searched(plan, best.architecture, run)
        else:
            trained = train_alone(plan, best.architecture, run, "retrain", seed, show)
        save_model(run.path, trained, plan.data)
        baseline = _baseline(plan, best, run, show)
        report = export_checked(trained.model, run.path / "export" / "net.onnx", plan.data, plan.space.input_size)
        figures = _figures(plan, best, trained, baseline, run)
        figures["export"] = {"path": str(report.path), "difference": report.max_abs_diff, "check": str(report)}
        run.write_json("result.json", figures)
    return Run.of(run, judged, figures)


def _search(plan: Plan, run: RunFolder, show: Show) -> list[Candidate]:
    found = read_candidates(run)
    if found:
        return found
    config, strategy = plan.config, plan.strategy
    torch.manual_seed(config["seed"])
    strategy.prepare(plan.problem())
    feed = plan.feed(strategy.batch_size)
    total = sum(strategy.steps(feed, epoch) for epoch in range(strategy.epochs))
    with show.bar(f"search ({config['strategy']['name']})", total) as bar:
        train(strategy, feed, run, "search", bar, _resume(run))
    history = getattr(strategy, "theta_history", None)
    if history is not None:
        run.write_array("theta.npy", history())
    found = [_counted(plan, each) for each in strategy.derive(feed, run, show.bar)]
    write_candidates(run, found)
    return found


def _counted(plan: Plan, found: Candidate) -> Candidate:
    """A network with its sizes as it is deployed."""
    if plan.branches is not None:
        plain: nn.Module = plan.space.plain()  # type: ignore[attr-defined]  # spaces of subsets fold to something
        counts = count(plain, (3, plan.space.input_size, plan.space.input_size))
        return dataclasses.replace(found, macs=counts.macs, params=counts.params)
    macs, params = cost_table(plan.space, Macs()), cost_table(plan.space, Params())
    net = found.architecture
    return dataclasses.replace(found, macs=round(macs.cost(net)), params=round(params.cost(net)))


def _as_searched(plan: Plan, architecture: Architecture, run: RunFolder) -> Trained:
    """The found network as the search trained it, tested."""
    model, test = inherited(plan, architecture, run), plan.data.test
    right = accuracy(model.to(plan.config["train_on"]), test, plan.data)
    trained = Trained(model.cpu(), architecture, right, len(test), run.path)
    record = {"net": architecture.to_json(), "accuracy": trained.accuracy, "images": len(test)}
    about = {"seed": plan.config["seed"], "recipe": dataclasses.asdict(plan.recipe)}
    note_trained(run, "search", {**record, **about})
    return trained


def train_alone(
    plan: Plan, architecture: Architecture, run: RunFolder, stage: str, seed: int, show: Show, go_on: str = ""
) -> Trained:
    """Trains a network from scratch on all training images and tests it.

    Args:
        plan: Data, recipe, precision, and where to train; the trained network comes back to the CPU.
        architecture: What to train.
        run: Where logs and checkpoints go.
        stage: Under which name.
        seed: Of initial weights and of the order of images.
        show: Where progress is shown.
        go_on: What to type after Ctrl-C; resuming the search by default.
    """
    torch.manual_seed(seed)
    train_on = plan.config["train_on"]
    training = Training(architecture.build().to(train_on), plan.recipe, plan.config["amp"])
    feed = Feed(plan.data, batch_size=plan.recipe.batch_size, seed=seed, pool="train", device=train_on)
    with show.bar(stage, training.epochs * feed.steps_weights) as bar:
        train(training, feed, run, stage, bar, go_on or _resume(run))
    model = training.result()
    test = plan.data.test
    right = accuracy(model, test, plan.data)
    trained = Trained(model.cpu(), architecture, right, len(test), run.path)
    record = {"net": architecture.to_json(), "accuracy": trained.accuracy, "images": len(test), "seed": seed}
    note_trained(run, stage, {**record, "recipe": dataclasses.asdict(plan.recipe)})
    return trained


class NothingShared(ValueError):
    """A run has no shared weights: its strategy trains no supernet, or its checkpoint is gone."""


def _searched(plan: Plan, run: RunFolder) -> dict[str, Any]:
    """State of the strategy at the end of a search, with weights. Raises NothingShared."""
    state: dict[str, Any] = (run.load_checkpoint("search") or {}).get("task", {})
    if "net" not in state:
        name = plan.config["strategy"]["name"]
        why = f"strategy {name} shares none" if state else f"{run.checkpoint_path('search')} is gone"
        raise NothingShared(
            f"There are no weights to inherit: {why}. Train the network: pynas retrain {run.path} (--net NUMBER)"
        )
    return state


def _supernet(plan: Plan, run: RunFolder) -> Supernet:
    """The trained supernet of a run, on the CPU. Raises NothingShared."""
    supernet = Supernet(plan.space)
    supernet.load_state_dict(_searched(plan, run)["net"])
    return supernet


def _calibrate(plan: Plan) -> int:
    return int(getattr(plan.strategy, "calibrate", CALIBRATE))


def inherited(plan: Plan, architecture: Architecture, run: RunFolder) -> nn.Module:
    """A network with the weights of the run's supernet, its batch norms recalibrated. In eval mode, on the CPU.

    Raises:
        NothingShared: If the run's strategy trains no supernet, or its checkpoint is gone.
    """
    if plan.strategy.TRAINS:
        plan.strategy.prepare(dataclasses.replace(plan.problem(), train_on="cpu"))
        plan.strategy.load_state_dict(_searched(plan, run))
        return plan.strategy.result()
    net = _supernet(plan, run).inherit(architecture)
    if calibrate := _calibrate(plan):
        recalibrate(net, plan.data.weights, plan.data, calibrate)
    return net.eval()


def judge_trained(plan: Plan, run: Run, show: Show) -> Run:
    """The run with the networks that it trained alone among those judged with shared weights.

    Scores are kept in `submodels.jsonl`.

    Raises:
        NothingShared: If the run's strategy trains no supernet, or its checkpoint is gone.
    """
    known = {net.architecture.fingerprint for net in run.judged}
    nets = [alone.architecture for alone in run.trained if alone.architecture.fingerprint not in known]
    if not nets:
        return run
    if plan.strategy.TRAINS:
        raise NothingShared(f"Strategy {plan.config['strategy']['name']} trains one network, and judges none by it.")
    folder, how = RunFolder(run.folder), Judging(calibrate=_calibrate(plan), amp=plan.config["amp"])
    net = _supernet(plan, folder).to(available(plan.config["train_on"]))
    judges = Submodels(net, plan.data, how=how, path=folder.path / "submodels.jsonl")
    with show.bar("judging", len(nets)) as bar:
        scores = judges.scores(nets, lambda _, score: bar.advance(f"accuracy {score.accuracy:.2%}"))
    found = [
        Candidate(net, score.accuracy, plan.table.cost(net), "trained alone", front=False)
        for net, score in zip(nets, scores, strict=True)
    ]
    return dataclasses.replace(run, judged=(*run.judged, *(_counted(plan, each) for each in found)))


def _baseline(plan: Plan, best: Candidate, run: RunFolder, show: Show) -> list[dict[str, Any]]:
    """Random networks of the same budget, or of the found net's cost, trained by the same recipe."""
    wanted = plan.config["baseline"]
    if not wanted:
        return []
    seed = plan.config["seed"]
    budget = plan.budget
    if budget is None or plan.goals:  # the best of a Pareto set may cost far less than the budget
        # A budget that binds no network would let all of them in, however cheap.
        bounds = cost_range(plan.table)
        budget = max(bounds.low, min(best.cost * 1.0001, bounds.high * 0.9999))
    random = random_architectures(plan.space, plan.table, wanted, budget, plan.config["slack"], seed + 1)
    done = run.read_lines("baseline.jsonl")
    for number, architecture in enumerate(random):
        if number < len(done):
            continue
        trained = train_alone(plan, architecture, run, f"random-{number + 1}", seed, show)
        record = {"accuracy": trained.accuracy, "cost": plan.table.cost(architecture), "net": architecture.to_json()}
        done.append(record)
        run.write_lines("baseline.jsonl", done)
    return done


def export_checked(net: nn.Module, path: Path, data: Data, size: int) -> Report:
    """Exports a trained network and runs the file back on test images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples, _ = next(batches(data.test, 64, data))
    return export(
        net,
        path,
        input_size=size,
        samples=samples,
        labels=data.classes,
        mean=tuple(float(value) for value in data.mean),
        std=tuple(float(value) for value in data.std),
    )


def measured_ms(net: nn.Module, size: int) -> tuple[float, float]:
    """Median and interquartile range of a network's latency on this host: one thread, batch 1, batch norm folded."""
    times = TorchHost().time_net_ms(fuse(net, restore=False), (1, 3, size, size), TIMINGS)
    quarters = statistics.quantiles(times, n=4)
    return statistics.median(times), quarters[2] - quarters[0]


def _fitted(architecture: Architecture, space: SearchSpace, device: cost_models.LatencyTable) -> int:
    """How many ops of a network have no row in the table of a device."""
    return sum(device.source(spec) == "fitted" for spec in net_specs(space, architecture))


def _priced(architecture: Architecture, space: SearchSpace, device: cost_models.LatencyTable) -> dict[str, Any]:
    """What a network is predicted to cost on another device."""
    return {
        "device": device.name,
        "predicted_ms": folded_ms(space, architecture, device),
        "source": device.provenance.source,
        "fitted": _fitted(architecture, space, device),
        "runner": device.provenance.runner,
    }


def _figures(
    plan: Plan, best: Candidate, trained: Trained, baseline: list[dict[str, Any]], run: RunFolder
) -> dict[str, Any]:
    last = (run.metrics("search") or [{}])[-1]
    size = plan.space.input_size
    counts = count(trained.model if plan.branches is None else fuse(trained.model, restore=False), (3, size, size))
    about = plan.device.provenance
    on_host = (about.runner, about.machine.get("cpu"), about.threads) == ("torch", cpu_model(), 1)
    median, spread = measured_ms(trained.model, size) if on_host else (None, None)
    return {
        "net": str(trained.architecture),
        "fingerprint": trained.architecture.fingerprint,
        "test_accuracy": trained.accuracy,
        "test_images": trained.images,
        "held_out_accuracy_inherited": None if plan.strategy.TRAINS else best.accuracy,
        "inherited": read_child(run, best.architecture),
        "params": counts.params,
        "macs": counts.macs,
        "budget_ms": plan.latency_ms,
        "slack": plan.config["slack"],
        "predicted_ms": plan.predicted_ms(best.architecture),
        "fitted": _fitted(best.architecture, plan.space, plan.device),
        "device": plan.device.describe(),
        "sources": dict(plan.table.sources),
        "elsewhere": [_priced(best.architecture, plan.space, device) for device in plan.elsewhere],
        "measured_ms": median,
        "measured_spread_ms": spread,
        "baseline": [{"accuracy": record["accuracy"], "cost": record["cost"]} for record in baseline],
        "search_end": {name: last[name] for name in ("skip_share", "entropy", "mean_entropy") if name in last},
        "strategy": plan.config["strategy"]["name"],
        "objectives": plan.config["objectives"],
        "fairness": last.get("fairness", {}),
        "kernels": kernels_used(
            plan.space, plan.config["amp"], getattr(plan.strategy, "batch_size", 16), plan.config["train_on"]
        ),
        "trained_on": describe(available(plan.config["train_on"])),
        "recipe": dataclasses.asdict(plan.recipe),
        "seed": plan.config["seed"],
        **({} if plan.branches is None else {"branches": branch_figures(plan.space, plan.branches, best.architecture)}),
    }
