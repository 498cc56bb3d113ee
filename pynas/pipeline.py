"""From what was asked to a checked network: the stages of a search, each resumable from the run folder."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cost_models
from cost_models.runners import TorchHost, cpu_model
from pynas import kernels
from pynas.architecture import Architecture
from pynas.budget import check_budget, cost_range
from pynas.console import Show
from pynas.counting import count
from pynas.export import Report, export
from pynas.fuse import fuse
from pynas.kernels import setting
from pynas.ops import build
from pynas.registry import FAMILIES, SPACES, STRATEGIES, SearchSpace
from pynas.results import Run, Trained, read_candidates, save_model, write_candidates
from pynas.strategies import Candidate, Problem, Strategy
from pynas.strategies.random import random_architectures
from pynas.supernet import CostTable, cost_table
from pynas.timed_nets import net_specs
from pynas.training.data import Data, open_data
from pynas.training.evaluate import accuracy
from pynas.training.feed import Feed, batches
from pynas.training.loop import Interrupted, train
from pynas.training.run import RunFolder
from pynas.training.train import Recipe, Training

TIMINGS = 15
CLASS_COUNTS = (2, 5, 10, 30, 100, 300, 1000)
ELSEWHERE = ("cortex-a72",)  # devices that every result is priced on as well


@dataclass(frozen=True)
class Plan:
    """Everything that a search needs, checked before anything is written.

    Args:
        config: What was asked, as plain values.
        space: Where to search.
        strategy: How.
        data: On which images.
        device: Latency table.
        table: Its costs of the space's options.
        budget: In milliseconds, or None.
        recipe: How found networks are trained.
        elsewhere: Other devices that the result is priced on.
    """

    config: Mapping[str, Any]
    space: SearchSpace
    strategy: Strategy
    data: Data
    device: cost_models.LatencyTable
    table: CostTable
    budget: float | None
    recipe: Recipe
    elsewhere: tuple[cost_models.LatencyTable, ...] = ()


def make_plan(config: Mapping[str, Any], show: Show, folder: RunFolder | None = None) -> Plan:
    """Resolves names, opens data and table, and checks the budget. Writes nothing, but may measure the host.

    Args:
        config: Parameters of `pynas.search` by name.
        show: Where progress is shown.
        folder: The run to resume: its copies of the tables are used, so that a resumed search does not change.

    Raises:
        ValueError: For whatever cannot work, in one sentence.
        OSError: For files that cannot be read or written.
    """
    strategy = make_strategy(config["strategy"])
    try:
        recipe = Recipe(**config["recipe"])
    except TypeError as error:
        raise ValueError(f"The recipe does not fit: {error}.") from None
    unsized = make_space(config["space"], config["space_options"])
    if folder is None:
        check_writable(Path(config["out"]))
    data = open_data(
        config["data"],
        size=unsized.input_size,
        seed=config["seed"],
        limit=config["limit"],
        on_corrupt=config["on_corrupt"],
        augment=config["augment"],
    )
    space = make_space(config["space"], {**config["space_options"], "classes": len(data.classes)})
    strategy.suit(space)
    device = open_device(config["device"], space, config["strict_table"], show, folder)
    table = cost_table(space, device)
    budget = config["latency_ms"]
    if budget == "auto":
        bounds = cost_range(table)
        budget = float(f"{(bounds.low + bounds.high) / 2:.3g}")
    if budget is not None:
        check_budget(table, budget)
    elsewhere = open_elsewhere(space, device.name, show, folder)
    return Plan(config, space, strategy, data, device, table, budget, recipe, elsewhere)


def make_space(name: str, options: Mapping[str, Any]) -> SearchSpace:
    """A space by name. Raises ValueError for an unknown name or option."""
    make = SPACES.get(name)
    known = sorted(make().options())
    strange = sorted(set(options) - set(known))
    if strange:
        raise ValueError(f"Space {name!r} has no option {', '.join(map(repr, strange))}. Allowed: {', '.join(known)}.")
    try:
        return make(**options)
    except TypeError as error:
        raise ValueError(f"The options {dict(options)} do not fit space {name!r}: {error}.") from None


def make_strategy(settings: Mapping[str, Any]) -> Strategy:
    """A strategy from its name and hyper-parameters. Raises ValueError when they do not fit."""
    try:
        strategy: Strategy = STRATEGIES.get(settings["name"])(**settings["settings"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"The strategy's settings do not fit: {error}.") from None
    return strategy


def check_writable(out: Path) -> None:
    """Raises OSError unless runs can be written to this folder, without leaving anything behind."""
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".pynas-", dir=existing):
            pass
    except OSError as error:
        raise OSError(f"Cannot write runs to {out}: {error.strerror}. Choose another folder with --out.") from None


def space_specs(space: SearchSpace) -> list[cost_models.OpSpec]:
    """Every distinct op of a space, fixed ones included."""
    options = [FAMILIES.get(slot.family).spec(slot, name) for slot in space.slots() for name in slot.choice.options]
    return sorted({*space.fixed_specs(), *options})


def kernels_used(space: SearchSpace, amp: str = "off", images: int = 16) -> str:
    """In how many layers of a space's supernet training on so many images runs in fused kernels, as it is set."""
    slots, facts = space.slots(), kernels.facts()
    if amp != "off":
        return f"plain PyTorch in all {len(slots)} layers (mixed precision)"
    if facts["isa"] == "none":
        return f"plain PyTorch in all {len(slots)} layers (the C++ kernels are missing; see: pynas info)"
    fused = sum(getattr(FAMILIES.get(slot.family), "fused", lambda *_: False)(slot, images) for slot in slots)
    asked = "" if setting.current() == "auto" else f" (kernels={setting.current()!r})"
    if not fused:
        return f"plain PyTorch in all {len(slots)} layers{asked}"
    return f"fused C++ ({facts['isa']}) in {fused} of {len(slots)} layers{asked}"


def classifier_specs(space: SearchSpace) -> list[cost_models.OpSpec]:
    """The classifier for other numbers of classes, so that a table which has them can price any data set."""
    linear = [spec for spec in space.fixed_specs() if spec.kind == "linear"]
    return [dataclasses.replace(spec, out_channels=classes) for spec in linear for classes in CLASS_COUNTS]


def deployed(spec: cost_models.OpSpec) -> nn.Module:
    """The module of an op as it is deployed: eval mode, batch norm folded."""
    return fuse(build(spec))


def open_device(
    name: str, space: SearchSpace, strict: bool, show: Show, folder: RunFolder | None = None
) -> cost_models.LatencyTable:
    """The table of a device. The host is measured where rows are missing; no other device ever is.

    Raises:
        ValueError: If the device is unknown or its table does not cover the space; names the measuring command.
    """
    if folder is not None and (folder.path / "device").is_dir():
        return cost_models.load_folder(folder.path / "device", strict=strict)
    if name != "host":
        return cost_models.load(name, strict=strict)
    specs = space_specs(space)
    with show.bar("measuring this host", len(specs)) as bar:
        try:
            return cost_models.host_table(specs, build=deployed, report=bar.report)
        except KeyboardInterrupt:
            told = "Stopped while this host was measured; what was timed is kept. Go on with: the same command"
            raise Interrupted(told) from None


def open_elsewhere(
    space: SearchSpace, here: str, show: Show, folder: RunFolder | None = None
) -> tuple[cost_models.LatencyTable, ...]:
    """Tables of `ELSEWHERE` but for `here`, where there are any that can price every op of the space.

    For a run to resume those that it began with, from its folder.
    """
    kept = folder is not None and (folder.path / "device").is_dir() and (folder.path / "elsewhere").is_dir()
    found = []
    for name in ELSEWHERE:
        try:
            if folder is not None and kept:
                copy = folder.path / "elsewhere" / name
                table = cost_models.load_folder(copy) if copy.is_dir() else None
            else:
                table = cost_models.find(name) if name != here else None
        except (ValueError, OSError) as error:  # a further price is no reason to stop
            show.line(f"{name} is left out of the result: {error}")
            continue
        if table is not None and table.covers(space_specs(space)):
            found.append(table)
    return tuple(found)


def _keep_tables(plan: Plan, run: RunFolder) -> None:
    """Copies all tables into the run folder; `device` last and in one step, so that it stands for all of them."""
    (run.path / "elsewhere").mkdir(exist_ok=True)
    for table in plan.elsewhere:
        table.copy_to(run.path / "elsewhere" / table.name)
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
    candidates = _search(plan, run, show)
    best = candidates[0]
    figures: dict[str, Any] = run.read_json("result.json") or {}
    if plan.config["retrain"] and not figures:
        trained = train_alone(plan, best.architecture, run, "retrain", seed, show)
        save_model(run, trained, plan.data)
        baseline = _baseline(plan, best, run, show)
        report = export_checked(trained.model, run.path / "export" / "net.onnx", plan.data, plan.space.input_size)
        figures = _figures(plan, best, trained, baseline, (run.metrics("search") or [{}])[-1])
        figures["export"] = {"path": str(report.path), "difference": report.max_abs_diff, "check": str(report)}
        run.write_json("result.json", figures)
    return Run(run.path, best.architecture, tuple(candidates), figures)


def _search(plan: Plan, run: RunFolder, show: Show) -> list[Candidate]:
    found = read_candidates(run)
    if found:
        return found
    config, strategy = plan.config, plan.strategy
    torch.manual_seed(config["seed"])
    problem = Problem(plan.space, plan.table, plan.budget, config["slack"], config["seed"], config["amp"])
    strategy.prepare(problem)
    feed = Feed(plan.data, batch_size=strategy.batch_size, seed=config["seed"])
    total = sum(strategy.steps(feed, epoch) for epoch in range(strategy.epochs))
    with show.bar(f"search ({config['strategy']['name']})", total) as bar:
        train(strategy, feed, run, "search", bar, _resume(run))
    history = getattr(strategy, "theta_history", None)
    if history is not None:
        run.write_array("theta.npy", history())
    found = strategy.derive(feed, run)
    write_candidates(run, found)
    return found


def train_alone(
    plan: Plan, architecture: Architecture, run: RunFolder, stage: str, seed: int, show: Show, go_on: str = ""
) -> Trained:
    """Trains a network from scratch on all training images and tests it.

    Args:
        plan: Data, recipe, precision.
        architecture: What to train.
        run: Where logs and checkpoints go.
        stage: Under which name.
        seed: Of initial weights and of the order of images.
        show: Where progress is shown.
        go_on: What to type after Ctrl-C; resuming the search by default.
    """
    torch.manual_seed(seed)
    training = Training(architecture.build(), plan.recipe, plan.config["amp"])
    feed = Feed(plan.data, batch_size=plan.recipe.batch_size, seed=seed, pool="train")
    with show.bar(stage, training.epochs * feed.steps_weights) as bar:
        train(training, feed, run, stage, bar, go_on or _resume(run))
    model = training.result()
    test = plan.data.test
    return Trained(model, architecture, accuracy(model, test, plan.data), len(test), run.path)


def _baseline(plan: Plan, best: Candidate, run: RunFolder, show: Show) -> list[dict[str, Any]]:
    """Random networks of the same budget (or, without one, of the found net's cost), trained by the same recipe."""
    wanted = plan.config["baseline"]
    if not wanted:
        return []
    seed = plan.config["seed"]
    budget = plan.budget if plan.budget is not None else best.cost * 1.0001
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
    times = TorchHost().time_net_ms(fuse(net), (1, 3, size, size), TIMINGS)
    quarters = statistics.quantiles(times, n=4)
    return statistics.median(times), quarters[2] - quarters[0]


def _priced(architecture: Architecture, space: SearchSpace, device: cost_models.LatencyTable) -> dict[str, Any]:
    """What a network is predicted to cost on another device."""
    specs = net_specs(space, architecture)
    return {
        "device": device.name,
        "predicted_ms": cost_table(space, device).cost(architecture),
        "source": device.provenance.source,
        "fitted": sum(device.source(spec) == "fitted" for spec in specs),
        "runner": device.provenance.runner,
    }


def _figures(
    plan: Plan, best: Candidate, trained: Trained, baseline: list[dict[str, Any]], last: Mapping[str, Any]
) -> dict[str, Any]:
    size = plan.space.input_size
    counts = count(trained.model, (3, size, size))
    about = plan.device.provenance
    on_host = (about.runner, about.machine.get("cpu"), about.threads) == ("torch", cpu_model(), 1)
    median, spread = measured_ms(trained.model, size) if on_host else (None, None)
    return {
        "net": str(trained.architecture),
        "fingerprint": trained.architecture.fingerprint,
        "test_accuracy": trained.accuracy,
        "test_images": trained.images,
        "held_out_accuracy_inherited": best.accuracy,
        "params": counts.params,
        "macs": counts.macs,
        "budget_ms": plan.budget,
        "slack": plan.config["slack"],
        "predicted_ms": best.cost,
        "device": plan.device.describe(),
        "sources": dict(plan.table.sources),
        "elsewhere": [_priced(best.architecture, plan.space, device) for device in plan.elsewhere],
        "measured_ms": median,
        "measured_spread_ms": spread,
        "baseline": [{"accuracy": record["accuracy"], "cost": record["cost"]} for record in baseline],
        "search_end": {name: last[name] for name in ("skip_share", "entropy", "mean_entropy") if name in last},
        "strategy": plan.config["strategy"]["name"],
        "fairness": last.get("fairness", {}),
        "kernels": kernels_used(plan.space, plan.config["amp"], getattr(plan.strategy, "batch_size", 16)),
        "recipe": dataclasses.asdict(plan.recipe),
        "seed": plan.config["seed"],
    }
