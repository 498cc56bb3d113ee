"""The front door: what a user calls, from Python or from the command line. A signature here is also a command's
flags."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from pynas import pipeline, settings
from pynas.architecture import Architecture
from pynas.console import Show
from pynas.export import Report
from pynas.export import export as export_net
from pynas.kernels import setting
from pynas.results import Run, Trained, load_model, save_model
from pynas.strategies import Strategy
from pynas.summary import show_fairness, show_plan, show_result
from pynas.training.data import open_data
from pynas.training.evaluate import accuracy
from pynas.training.run import RunFolder
from pynas.training.train import Recipe


def search(
    space: str = "fbnet_tiny",
    strategy: str | Strategy = "fbnet",
    data: str = "digits",
    device: str = "host",
    latency_ms: float | Literal["auto"] | None = "auto",
    *,
    preset: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    slack: float = 0.1,
    recipe: Recipe | None = None,
    retrain: bool = True,
    baseline: int = 3,
    seed: int = 0,
    amp: Literal["off", "bf16"] = "off",
    kernels: Literal["auto", "fused", "reference"] = "auto",
    threads: int | None = None,
    limit: int | None = None,
    augment: Literal["auto", "none", "crop", "crop_flip", "imagenet"] = "auto",
    on_corrupt: Literal["stop", "skip"] = "stop",
    space_options: dict[str, Any] | None = None,
    strict_table: bool = False,
    out: str = "runs",
    resume: str | None = None,
    quiet: bool = False,
) -> Run:
    """Searches a space for the best network on a device, trains it, exports it, and compares it with random ones.

    Args:
        space: Name of a search space; see `pynas list spaces`.
        strategy: How to search: a name (see `pynas list strategies`) or a strategy with its hyper-parameters.
        data: "digits", the name of a torchvision data set on disk, or an image folder.
        device: Whose latency table to use; "host" is this machine and is measured on first use.
        latency_ms: Budget; every returned network is predicted to meet it. "auto" is the middle between the cheapest
            and the dearest network, none trades off freely by the strategy's own loss.
        preset: Named hyper-parameters of a strategy given by name: "quick" (the default) or "paper".
        epochs: Overrides the strategy's.
        batch_size: Overrides the strategy's.
        slack: Share of the budget that a returned network may leave unused.
        recipe: How found networks are trained.
        retrain: Whether to train, test and export the best network.
        baseline: How many random networks of the same budget to train for comparison.
        seed: Of all random numbers.
        amp: Mixed precision of forward passes.
        kernels: Of training: "auto" takes fused C++ where it is faster, a rule by shape alone; "fused" wherever it can
            do what the modules do; "reference" is plain PyTorch. Results of the two agree up to rounding.
        threads: Of torch; none takes one for images below 32 pixels, where more only get in each other's way, and
            torch's default otherwise. Results repeat bit for bit on one thread.
        limit: At most so many training images, drawn evenly from the classes.
        augment: Of training images; "auto" suits it to the data.
        on_corrupt: Whether a broken image stops the search or is left out.
        space_options: Changes to the space, for instance {"width": 0.5}.
        strict_table: Refuse latencies that are fitted because the table has no row.
        out: Folder for runs.
        resume: A run folder to go on with; everything else is taken from it.
        quiet: Prints nothing.

    Returns:
        The run: `best`, `candidates`, `figures`, `folder`.

    Raises:
        ValueError: For anything that cannot work, in one sentence, before work is lost.
        OSError: For files that cannot be read or written.
    """
    asked = dict(locals())
    show = Show(quiet)
    if resume is not None:
        _only_resume(asked)
        folder, config = _opened(resume)
        if folder.read_json("result.json") is not None:
            finished = Run.open(folder.path)
            show_result(finished, show)
            return finished
    else:
        folder, config = None, settings.resolve(asked)
    settings.use_threads(config)
    with setting.using(config["kernels"]):
        plan = pipeline.make_plan(config, show, folder)
        show_plan(plan, show)
        run = folder if folder is not None else RunFolder.create(config["out"], {**config, "latency_ms": plan.budget})
        show.line(f"run folder: {run.path}")
        result = pipeline.execute(plan, run, show)
    show_result(result, show)
    return result


def _only_resume(asked: Mapping[str, Any]) -> None:
    defaults = inspect.signature(search).parameters
    changed = [k for k, v in asked.items() if k not in ("resume", "quiet") and v != defaults[k].default]
    if changed:
        raise ValueError(
            f"A resumed run takes everything from its folder; leave out {', '.join(changed)}, or start a new run."
        )


def _opened(path: str | Path) -> tuple[RunFolder, dict[str, Any]]:
    folder = RunFolder.open(path)
    return folder, settings.complete(folder.config(), folder, inspect.signature(search).parameters)


def retrain(
    run: str | Path | Run,
    *,
    net: str | None = None,
    preset: str | None = None,
    epochs: int | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    kernels: Literal["auto", "fused", "reference"] | None = None,
    quiet: bool = False,
) -> Trained:
    """Trains the best network of a run (or another architecture on its data) from scratch, and keeps the weights.

    Interrupted, the same call goes on where it stood.

    Args:
        run: A finished search, or its folder.
        net: An architecture file to train instead of the run's best.
        preset: Named recipe: "quick", "fairnas" (its paper's) or "nas_bench_macro" (its table's).
        epochs: Overrides the recipe's.
        recipe: How; the run's own by default.
        seed: Of initial weights and of the order of images.
        kernels: As in `search`; the run's own by default.
        quiet: Prints nothing.

    Returns:
        The trained network with its accuracy on the test images; its weights lie in `model/` of the run.

    Raises:
        ValueError: If the run is unfinished or broken, or the network belongs to another space.
    """
    if preset is not None and recipe is not None:
        raise ValueError("Give a recipe or a preset, not both. To change one: Recipe.preset('fairnas', epochs=30).")
    finished = run if isinstance(run, Run) else Run.open(run)
    show = Show(quiet)
    folder, config = _opened(finished.folder)
    settings.use_threads(config)
    architecture = finished.best if net is None else Architecture.load(net)
    plan = pipeline.make_plan(config, show, folder)
    if architecture.space != plan.space.name:
        raise ValueError(f"The network is of space {architecture.space!r}, the run of {plan.space.name!r}.")
    if dict(architecture.options) != dict(plan.space.options()):
        differing = [key for key, value in plan.space.options().items() if architecture.options.get(key) != value]
        raise ValueError(f"The network and the run differ in the space's {', '.join(differing)}.")
    how = recipe or (plan.recipe if preset is None else Recipe.preset(preset))
    if epochs is not None:
        how = dataclasses.replace(how, epochs=epochs)
    plan = dataclasses.replace(plan, recipe=how)
    asked = kernels if kernels is not None else config["kernels"]
    settings.check_kernels(asked, config["amp"])
    told = hashlib.sha256(f"{architecture.fingerprint} {how} {seed} {asked}".encode()).hexdigest()[:12]
    with setting.using(asked):
        trained = pipeline.train_alone(plan, architecture, folder, f"retrain-{told}", seed, show, "the same command")
    save_model(folder, trained, plan.data)
    show.line(f"test accuracy {trained.accuracy:.2%} of {trained.images} images; weights in {folder.path / 'model'}")
    return trained


def evaluate(run: str | Path | Run | Trained, *, data: str | None = None, quiet: bool = False) -> float:
    """Accuracy of a run's trained network on test images.

    Args:
        run: A run, its folder, or what `retrain` returned.
        data: Other data with the same classes; its test images are used. The run's own by default.
        quiet: Prints nothing.

    Returns:
        Top-1 accuracy between 0 and 1.
    """
    path = _folder_of(run)
    saved = load_model(path)
    _, config = _opened(path)
    settings.use_threads(config)
    images = open_data(
        config["data"] if data is None else data,
        size=saved.input_size,
        seed=config["seed"],
        limit=config["limit"],
        on_corrupt=config["on_corrupt"],
        augment=config["augment"],
    )
    images = dataclasses.replace(images, mean=saved.mean, std=saved.std)  # as the network was trained
    if images.classes != saved.classes:
        raise ValueError(
            f"The data has classes {list(images.classes)[:5]}..., the network {list(saved.classes)[:5]}..."
        )
    net = run.model if isinstance(run, Trained) else saved.net
    right = accuracy(net, images.test, images)
    Show(quiet).line(f"test accuracy {right:.2%} of {len(images.test)} images")
    return right


def export(
    net: nn.Module | str | Path | Run | Trained,
    path: str | None = None,
    *,
    input_size: int | None = None,
    format: str | None = None,
    quiet: bool = False,
) -> Report:
    """Writes a trained network for deployment, runs the file back, and compares.

    Args:
        net: A run's folder, a run, what `retrain` returned, or any module that takes (B, 3, S, S).
        path: File to write, for instance "net.onnx"; `export/net.onnx` in the run by default.
        input_size: Height and width of the image in pixels; needed for a module, known for a run.
        format: By default from the suffix; see `pynas list formats`.
        quiet: Prints nothing.

    Returns:
        What was written, and by how much its outputs differ.

    Raises:
        ValueError: If the file's outputs differ from the network's; nothing is left behind.
        MissingExtra: If the format needs a package that is not installed.
    """
    extra: dict[str, Any] = {}
    if isinstance(net, nn.Module):
        if path is None:
            raise ValueError("Say where to write the module: export(net, 'net.onnx', input_size=224).")
        if input_size is None:
            input_size = getattr(net, "input_size", None)
        if input_size is None:
            raise ValueError("Say the module's input size in pixels: export(net, 'net.onnx', input_size=224).")
        module, target = net, Path(path)
    else:
        folder = _folder_of(net)
        saved = load_model(folder)
        module = net.model if isinstance(net, Trained) else saved.net
        input_size = saved.input_size
        target = Path(path) if path is not None else folder / "export" / f"net.{format or 'onnx'}"
        if path is None:
            target.parent.mkdir(exist_ok=True)
        extra = {"labels": saved.classes, "mean": saved.mean, "std": saved.std}
    report = export_net(module, target, input_size=input_size, format=format, **extra)
    Show(quiet).line(str(report))
    return report


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


def _folder_of(run: str | Path | Run | Trained) -> Path:
    if isinstance(run, str | Path):
        return RunFolder.open(run).path
    if run.folder is None:
        raise ValueError("This network was not trained in a run; give its module to export.")
    return run.folder
