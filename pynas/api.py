"""The front door: what a user calls, from Python or from the command line. A signature here is also a command's
flags."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cost_models.names import unknown
from pynas import pipeline, settings
from pynas.architecture import Architecture
from pynas.console import Show
from pynas.evolution import EvolutionSettings
from pynas.kernels import setting
from pynas.plan import Plan, make_plan
from pynas.results import Run, SavedModel, Trained, load_model, net_folder, run_of, save_model
from pynas.strategies import Strategy
from pynas.summary import show_plan, show_result
from pynas.training.data import Data, open_data
from pynas.training.evaluate import accuracy
from pynas.training.run import RunFolder
from pynas.training.train import Recipe
from pynas.training.where import check_train_on


def search(
    space: str = "fbnet_tiny",
    strategy: str | Strategy = "auto",
    data: str = "digits",
    device: str = "host",
    latency_ms: float | Literal["auto"] | None = "auto",
    *,
    host: str | None = None,
    budget: int | float | str | None = None,
    objectives: list[str] | str | None = None,
    limits: dict[str, float] | None = None,
    directions: dict[str, Literal["max", "min"]] | None = None,
    evolution: EvolutionSettings | None = None,
    preset: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    slack: float = 0.1,
    recipe: Recipe | None = None,
    retrain: bool = True,
    baseline: int = 3,
    seed: int = 0,
    train_on: Literal["cpu", "cuda"] = "cpu",
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

    With objectives it searches for a Pareto set: networks that none of the others betters in everything.

    Args:
        space: Name of a search space; see `pynas list spaces`.
        strategy: How to search: a name (see `pynas list strategies`) or a strategy with its hyper-parameters. "auto"
            is repnas where subsets of branches are searched, and fbnet elsewhere.
        data: "digits", the name of a torchvision data set on disk, or an image folder.
        device: Whose latency table to use; "host" is this machine and is measured on first use.
        latency_ms: Budget; every returned network is predicted to meet it. "auto" is the middle between the cheapest
            and the dearest network (no limit, with objectives); none trades off freely by the strategy's own loss.
        host: Of space repnas: the network whose convolutions become blocks of branches, a name (see `pynas list hosts`)
            or a function of yours as "package.module:function".
        budget: Of space repnas: a number of branches (44), a share of them (0.34, the default), or what a training step
            may take ("250 ms", timed on this machine; "400 MB"). The folded network costs the same in any case;
            latency_ms is a limit on it.
        objectives: What to pursue at once: any of accuracy, latency, macs and params, for instance "accuracy,latency".
            The Pareto set is returned; its most accurate network is the best, is trained and exported.
        limits: Worst allowed values with objectives, of these or others, for instance {"macs": 4e8}; a limit of latency
            is latency_ms.
        directions: Of macs and params with objectives, where more is wanted: {"params": "max"}.
        evolution: How the Pareto set is looked for; by default with a population of 70, or of a quarter of the
            strategy's evaluations where these are few.
        preset: Named hyper-parameters of a strategy given by name: "quick" (the default) or "paper".
        epochs: Overrides the strategy's.
        batch_size: Overrides the strategy's.
        slack: Share of the budget that a returned network may leave unused; not with objectives.
        recipe: How found networks are trained; not with strategies whose search is the training.
        retrain: Whether to train, test and export the best network.
        baseline: How many random networks of the same budget to train for comparison.
        seed: Of all random numbers.
        train_on: Where supernets and networks train and are judged: the CPU, or a CUDA GPU. The latency is that of
            `device` in any case. On a GPU the same seed gives the same images in the same order; only the CPU gives the
            same result bit for bit. What is written can be read, exported and reported without a GPU.
        amp: Mixed precision of forward passes.
        kernels: Of training: "auto" takes fused C++ where it is faster, a rule by shape alone (on a GPU, CUDA where
            `pynas kernels tune` has timed it to be); "fused" wherever it can do what the modules do; "reference" is
            plain PyTorch. Results of the two agree up to rounding.
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
        The run: `best`, `candidates` (the Pareto set, with objectives), `figures`, `folder`.

    Raises:
        ValueError: For anything that cannot work, in one sentence, before work is lost.
        OSError: For files that cannot be read or written.
    """
    asked = dict(locals())
    show = Show(quiet)
    if resume is not None:
        _only_resume(asked)
        folder, config = opened(resume)
        if folder.read_json("result.json") is not None:
            finished = Run.open(folder.path)
            show_result(finished, show)
            return finished
        settings.check_place(config, folder)
    else:
        folder, config = None, settings.resolve(asked)
    settings.use_threads(config)
    with setting.using(config["kernels"]):
        plan = make_plan(config, show, folder)
        show_plan(plan, show)
        run = (
            folder if folder is not None else RunFolder.create(config["out"], {**config, "latency_ms": plan.latency_ms})
        )
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


def opened(path: str | Path) -> tuple[RunFolder, dict[str, Any]]:
    """A run and all its settings. Raises ValueError or FileNotFoundError when there is none, or it is broken."""
    folder = RunFolder.open(path)
    return folder, settings.complete(folder.config(), folder, inspect.signature(search).parameters)


def retrain(
    run: str | Path | Run,
    *,
    net: int | str | None = None,
    preset: str | None = None,
    epochs: int | None = None,
    recipe: Recipe | None = None,
    space_options: dict[str, Any] | None = None,
    seed: int = 0,
    train_on: Literal["cpu", "cuda"] | None = None,
    kernels: Literal["auto", "fused", "reference"] | None = None,
    quiet: bool = False,
) -> Trained:
    """Trains the best network of a run (or another one of it) from scratch, and keeps the weights.

    Interrupted, the same call goes on where it stood.

    Args:
        run: A finished search, or its folder.
        net: Instead of the best, another of the networks that the run found: its number in the table of the Pareto
            set; or an architecture file.
        preset: Named recipe: "quick", "fairnas" (its paper's), "nas_bench_macro" (its table's) or "darts" (DARTS's and
            SNAS's for cells).
        epochs: Overrides the recipe's.
        recipe: How; the run's own by default.
        space_options: The same choices in a changed space, for instance {"cells": 20, "channels": 36}: a deeper and
            wider network of the found cells.
        seed: Of initial weights and of the order of images.
        train_on: As in `search`; the run's own by default.
        kernels: As in `search`; the run's own by default.
        quiet: Prints nothing.

    Returns:
        The trained network with its accuracy on the test images; its weights lie in `model/` of the run, or of
        `nets/<number>` there. The accuracy is noted in `trained.jsonl`, see `Run.trained`.

    Raises:
        ValueError: If the run is unfinished or broken, or the network belongs to another space.
    """
    if preset is not None and recipe is not None:
        raise ValueError("Give a recipe or a preset, not both. To change one: Recipe.preset('fairnas', epochs=30).")
    finished = run if isinstance(run, Run) else Run.open(run)
    show = Show(quiet)
    architecture, place = _net(finished, net)
    folder, config = opened(finished.folder)
    config = config if train_on is None else {**config, "train_on": train_on}
    check_train_on(config["train_on"])
    settings.use_threads(config)
    plan = make_plan(config, show, folder)
    _check_space(architecture, plan)
    if space_options:
        architecture = _changed(architecture, space_options)
    how = recipe or (plan.recipe if preset is None else Recipe.preset(preset))
    if epochs is not None:
        how = dataclasses.replace(how, epochs=epochs)
    plan = dataclasses.replace(plan, recipe=how)
    asked = kernels if kernels is not None else config["kernels"]
    settings.check_kernels(asked, config["amp"], config["train_on"])
    where = "" if config["train_on"] == "cpu" else f" {config['train_on']}"
    told = hashlib.sha256(f"{architecture.fingerprint} {how} {seed} {asked}{where}".encode()).hexdigest()[:12]
    with setting.using(asked):
        trained = pipeline.train_alone(plan, architecture, folder, f"retrain-{told}", seed, show, "the same command")
    trained = dataclasses.replace(trained, folder=place)
    save_model(place, trained, plan.data)
    show.line(f"test accuracy {trained.accuracy:.2%} of {trained.images} images; weights in {place / 'model'}")
    return trained


def _net(run: Run, net: int | str | None) -> tuple[Architecture, Path]:
    """A network of a run, and the folder whose `model/` is for its weights."""
    if net is None or isinstance(net, str):
        if net is not None and not Path(net).is_file():
            raise FileNotFoundError(
                f"{net!r} is neither a number nor an architecture file. Give a number from 1 to {len(run.candidates)}, "
                f"or a file such as {run.folder / 'best.json'}."
            )
        return run.best if net is None else Architecture.load(net), run.folder
    if isinstance(net, bool) or not 1 <= net <= len(run.candidates):
        found = len(run.candidates)
        raise ValueError(f"The run found {found} networks, numbered from 1 to {found}; there is none of number {net}.")
    return run.candidates[net - 1].architecture, net_folder(run.folder, net)


def _check_space(architecture: Architecture, plan: Plan) -> None:
    if architecture.space != plan.space.name:
        raise ValueError(f"The network is of space {architecture.space!r}, the run of {plan.space.name!r}.")
    if dict(architecture.options) != dict(plan.space.options()):
        differing = [key for key, value in plan.space.options().items() if architecture.options.get(key) != value]
        raise ValueError(f"The network and the run differ in the space's {', '.join(differing)}.")


def _changed(architecture: Architecture, options: Mapping[str, Any]) -> Architecture:
    """The same choices in a space that is changed in everything but its images."""
    known = architecture.search_space().options()
    for name in options:
        if name in ("input_size", "classes"):
            raise ValueError(f"{name} is that of the run's images; a retraining cannot change it.")
        if name not in known:
            raise unknown(f"option of space {architecture.space!r}", name, known)
    return architecture.with_options(**options)


def evaluate(
    run: str | Path | Run | Trained,
    *,
    net: int | None = None,
    weights: Literal["trained", "inherited"] = "trained",
    data: str | None = None,
    quiet: bool = False,
) -> float:
    """Accuracy of a run's trained network on test images.

    Args:
        run: A run, its folder, or what `retrain` returned.
        net: Instead of the best, another of the networks that the run found, by its number.
        weights: Those of its own training, or inherited from the run's supernet.
        data: Other data with the same classes; its test images are used. The run's own by default.
        quiet: Prints nothing.

    Returns:
        Top-1 accuracy between 0 and 1.
    """
    saved, config = weighted(run, net, weights)
    settings.use_threads(config)
    images = images_of(saved, config, data)
    right = accuracy(saved.net, images.test, images)
    Show(quiet).line(f"test accuracy {right:.2%} of {len(images.test)} images")
    return right


def images_of(saved: SavedModel, config: Mapping[str, Any], data: str | None = None) -> Data:
    """The images of a run, or other ones with the same classes, normalised as its network was trained.

    Raises:
        ValueError: The classes differ, or the data is broken.
        OSError: The data cannot be read.
    """
    images = open_data(
        config["data"] if data is None else data,
        size=saved.input_size,
        seed=config["seed"],
        limit=config["limit"],
        on_corrupt=config["on_corrupt"],
        augment=config["augment"],
    )
    if images.classes != saved.classes:
        raise ValueError(
            f"The data has classes {list(images.classes)[:5]}..., the network {list(saved.classes)[:5]}..."
        )
    return dataclasses.replace(images, mean=saved.mean, std=saved.std)


def weighted(
    run: str | Path | Run | Trained, net: int | None, weights: Literal["trained", "inherited"]
) -> tuple[SavedModel, dict[str, Any]]:
    """A network of a run with weights, and the run's settings."""
    if isinstance(run, Trained):
        if run.folder is None:
            raise ValueError("This network was not trained in a run; give its module to export.")
        if net is not None or weights != "trained":
            raise ValueError("What retrain returned is one network with its weights: net and weights go with a run.")
        return dataclasses.replace(load_model(run.folder), net=run.model), opened(run_of(run.folder))[1]
    folder, config = opened(run.folder if isinstance(run, Run) else run)
    if net is None and weights == "trained":
        return load_model(folder.path), config
    architecture, place = _net(Run.open(folder.path), net)
    if weights == "trained":
        return load_model(place), config
    if weights != "inherited":
        raise unknown("kind of weights", weights, ("trained", "inherited"))
    settings.use_threads(config)
    plan = make_plan(config, Show(quiet=True), folder)
    (r, g, b), (dr, dg, db) = plan.data.mean, plan.data.std
    mean, std = (float(r), float(g), float(b)), (float(dr), float(dg), float(db))
    module = pipeline.inherited(plan, architecture, folder)
    return SavedModel(module, architecture, plan.data.classes, mean, std, place), config
