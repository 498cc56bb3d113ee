"""The parameters of a search as plain values: checked, complete, and fit for `config.yaml`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pynas.branch_budget import read_budget
from pynas.evolution import EvolutionSettings
from pynas.kernels import cuda, setting
from pynas.pareto import GOALS, Goal, goals
from pynas.plan import make_space
from pynas.registry import STRATEGIES
from pynas.subsets import picks_any
from pynas.training.data import NAMES
from pynas.training.run import RunFolder
from pynas.training.train import Recipe
from pynas.training.where import check_train_on

# Settings that came later than the first runs, which are read as if none had been asked for.
LATER: Mapping[str, Any] = {
    "objectives": None,
    "limits": {},
    "directions": {},
    "evolution": None,
    "budget": None,
    "train_on": "cpu",
}
CALL_ONLY = (
    "resume",
    "quiet",
    "preset",
    "epochs",
    "batch_size",
    "host",
)  # not settings of a run, or resolved into others


def resolve(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from the arguments of `pynas.search`, with the strategy as its name and hyper-parameters.

    Raises:
        ValueError: For a value that cannot work whatever space, data and device say.
    """
    _check_numbers(asked)
    recipe = asked["recipe"]
    if (recipe is not None and not isinstance(recipe, Recipe)) or not isinstance(asked["space_options"] or {}, Mapping):
        raise ValueError("recipe must be a pynas.Recipe and space_options a dictionary.")
    options = _space_options(asked)
    name, settings = _strategy(asked, options)
    cls = STRATEGIES.get(name)
    if isinstance(asked["strategy"], str):
        options = {**cls.SPACE_OPTIONS.get(asked["preset"], {}), **options}
    if cls.TRAINS:
        if recipe is not None:
            raise ValueError(
                f"Strategy {name} trains its network in the search, by settings of its own: leave out recipe, and "
                f"set for instance --strategy.lr (see pynas search --strategy.help {cls.__name__})."
            )
        recipe = cls(**settings).recipe()
    _check_branches(asked, options)
    objectives = _objectives(asked)
    budget = objectives.pop("latency_ms", asked["latency_ms"])
    return {key: value for key, value in asked.items() if key not in CALL_ONLY} | {
        "strategy": {"name": name, "settings": settings},
        "latency_ms": budget if budget in (None, "auto") else float(budget),
        "recipe": dataclasses.asdict(recipe or Recipe()),
        "space_options": options,
        "data": _data(asked["data"]),
        "out": str(asked["out"]),
        "threads": _threads(asked, options),
        **objectives,
    }


def _objectives(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Objectives, limits and directions under their full names; a limit on latency is the budget."""
    wanted, evolution = asked["objectives"], asked["evolution"]
    limits, directions = asked["limits"] or {}, asked["directions"] or {}
    if wanted is None:
        for name in ("limits", "directions", "evolution"):
            if asked[name]:
                raise ValueError(f"{name} goes with objectives. Add --objectives accuracy,latency, for instance.")
        return {name: LATER[name] for name in ("objectives", "limits", "directions", "evolution")}
    if not isinstance(limits, Mapping) or not isinstance(directions, Mapping):
        raise ValueError(
            "limits and directions must be dictionaries, for instance {'macs': 4e8} and {'params': 'max'}."
        )
    if evolution is not None and not isinstance(evolution, EvolutionSettings):
        raise ValueError("evolution must be a pynas.EvolutionSettings.")
    for name, limit in limits.items():
        if not _number(limit) or math.isnan(limit):
            raise ValueError(f"The limit of {name} must be a finite number, not {limit!r}.")
    made = goals(wanted, limits, directions)
    _check_goals(made)
    bounds = {goal.name: goal.limit for goal in made if goal.limit is not None}
    if "latency_ms" in bounds and asked["latency_ms"] not in (None, "auto"):
        raise ValueError("Latency is limited twice: give latency_ms or a limit of latency, not both.")
    turned = {goal.name: goal.direction for goal in made if goal.direction != GOALS[goal.name].direction}
    budget = {"latency_ms": float(bounds.pop("latency_ms"))} if "latency_ms" in bounds else {}
    return {
        "objectives": [goal.name for goal in made if goal.pursued],
        "limits": bounds,
        "directions": turned,
        "evolution": None if evolution is None else dataclasses.asdict(evolution),
        **budget,
    }


def _check_goals(made: Iterable[Goal]) -> None:
    """Raises ValueError where accuracy is no goal, or its limit or a direction makes no sense."""
    by_name = {goal.name: goal for goal in made}
    if "accuracy" not in by_name:
        raise ValueError("accuracy must be an objective or have a limit: the rest can be known without any training.")
    least = by_name["accuracy"].limit
    if least is not None and not 0 <= least <= 1:
        raise ValueError(f"The limit of accuracy must lie between 0 and 1, not {least:g}: 0.9 stands for 90 %.")
    for name in ("accuracy", "latency_ms"):
        if name in by_name and by_name[name].direction != GOALS[name].direction:
            raise ValueError(f"The direction of {name} is always {GOALS[name].direction!r}; macs and params have two.")


def complete(config: dict[str, Any], folder: RunFolder, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Settings read from a run. Raises ValueError when some of `parameters` are missing."""
    config = {**LATER, **config}
    missing = sorted(set(parameters) - set(CALL_ONLY) - set(config))
    if missing:
        raise ValueError(f"{folder.path / 'config.yaml'} lacks {', '.join(missing)}. Start the search anew.")
    return config


def use_threads(config: Mapping[str, Any]) -> None:
    """Gives torch the threads of a run."""
    torch.set_num_threads(config["threads"])


def check_place(config: Mapping[str, Any], folder: RunFolder | None = None) -> None:
    """Raises ValueError where a run is to train on a GPU and there is none."""
    without = "use train_on='cpu'"
    if folder is not None:
        without = f"go on on the CPU: change train_on to cpu in {folder.path / 'config.yaml'}"
    check_train_on(config["train_on"], without)


def check_kernels(kernels: object, amp: str, train_on: str = "cpu") -> None:
    """Raises ValueError for a setting of the kernels that cannot work here."""
    setting.check(kernels)
    if kernels == "fused" and train_on != "cpu" and not cuda.built():
        raise ValueError(f"kernels='fused' on a GPU needs the CUDA kernels. Use kernels='auto'. They are {cuda.STATE}")
    if kernels == "fused" and amp != "off":
        raise ValueError("kernels='fused' computes in float32, amp='bf16' does not. Use kernels='auto' or amp='off'.")


def _space_options(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Changes to the space, the host among them."""
    options = dict(asked["space_options"] or {})
    if asked["host"] is None:
        return options
    if options.get("host", asked["host"]) != asked["host"]:
        raise ValueError(f"The host is named twice: {asked['host']!r}, and {options['host']!r} in space_options.")
    return {**options, "host": asked["host"]}


def _check_branches(asked: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raises ValueError for a branch budget that cannot be, or where there are no branches."""
    if not picks_any(make_space(asked["space"], options).choices()):
        if asked["budget"] is not None:
            raise ValueError(f"budget is one of branches, which space {asked['space']!r} has not. Give latency_ms.")
        return
    read_budget(asked["budget"])
    if asked["objectives"] is not None:
        raise ValueError("All networks of a branch search cost the same when folded: it takes no objectives.")


def usual_strategy(space: str, options: Mapping[str, Any]) -> str:
    """The strategy that searches a space where none is named."""
    return "repnas" if picks_any(make_space(space, options).choices()) else "fbnet"


def _strategy(asked: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    changes = {key: asked[key] for key in ("epochs", "batch_size") if asked[key] is not None}
    strategy = asked["strategy"]
    if strategy == "auto":
        strategy = usual_strategy(asked["space"], options)
    if isinstance(strategy, str):
        made = STRATEGIES.get(strategy).preset(asked["preset"] or "quick", **changes)
        return strategy, dataclasses.asdict(made)
    if asked["preset"] is not None:
        raise ValueError("preset goes with a strategy's name. For an object: FBNet.preset('paper', theta_lr=0.02).")
    for name, cls in STRATEGIES.items():
        if type(strategy) is cls:
            return name, dataclasses.asdict(dataclasses.replace(strategy, **changes))
    raise ValueError(f"The strategy {type(strategy).__name__} is not registered. See: pynas list strategies")


def _data(data: object) -> str:
    """A name as it is; a path made absolute, so that a run can be resumed from elsewhere."""
    if not isinstance(data, str | Path):
        raise ValueError(f"data must be a name or a path, not {data!r}.")
    return str(data) if str(data) in NAMES or not Path(data).exists() else str(Path(data).absolute())


def _threads(asked: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    threads = asked["threads"]
    if threads is None:
        small = make_space(asked["space"], options).input_size < 32
        return 1 if small else torch.get_num_threads()
    return int(threads)


def _check_numbers(asked: Mapping[str, Any]) -> None:
    slack, budget = asked["slack"], asked["latency_ms"]
    if not (_number(slack) and 0 < slack <= 1):
        raise ValueError(f"slack must lie in (0, 1], not {slack!r}.")
    if budget not in (None, "auto") and not _number(budget):
        raise ValueError(f"latency_ms must be a number of milliseconds, 'auto' or none, not {budget!r}.")
    for name, least, most in (("baseline", 0, 1000), ("seed", 0, 2**31), ("threads", 1, 4096), ("limit", 1, 10**9)):
        value = asked[name]
        if value is None and name in ("threads", "limit"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{name} must be a whole number from {least} to {most}, not {value!r}.")
    if asked["amp"] not in ("off", "bf16"):
        raise ValueError(f"amp must be 'off' or 'bf16', not {asked['amp']!r}.")
    check_place(asked)
    check_kernels(asked["kernels"], asked["amp"], asked["train_on"])


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isinf(value)
