"""The parameters of a search as plain values: checked, complete, and fit for `config.yaml`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pynas.kernels import setting
from pynas.pipeline import make_space
from pynas.registry import STRATEGIES
from pynas.training.data import NAMES
from pynas.training.run import RunFolder
from pynas.training.train import Recipe

CALL_ONLY = ("resume", "quiet", "preset", "epochs", "batch_size")  # not settings of a run, or resolved into others


def resolve(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from the arguments of `pynas.search`, with the strategy as its name and hyper-parameters.

    Raises:
        ValueError: For a value that cannot work whatever space, data and device say.
    """
    _check_numbers(asked)
    recipe, options = asked["recipe"] or Recipe(), asked["space_options"] or {}
    if not isinstance(recipe, Recipe) or not isinstance(options, Mapping):
        raise ValueError("recipe must be a pynas.Recipe and space_options a dictionary.")
    name, settings = _strategy(asked)
    budget = asked["latency_ms"]
    return {key: value for key, value in asked.items() if key not in CALL_ONLY} | {
        "strategy": {"name": name, "settings": settings},
        "latency_ms": budget if budget in (None, "auto") else float(budget),
        "recipe": dataclasses.asdict(recipe),
        "space_options": dict(options),
        "data": _data(asked["data"]),
        "out": str(asked["out"]),
        "threads": _threads(asked),
    }


def complete(config: dict[str, Any], folder: RunFolder, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Settings read from a run. Raises ValueError when some of `parameters` are missing."""
    missing = sorted(set(parameters) - set(CALL_ONLY) - set(config))
    if missing:
        raise ValueError(f"{folder.path / 'config.yaml'} lacks {', '.join(missing)}. Start the search anew.")
    return config


def use_threads(config: Mapping[str, Any]) -> None:
    """Gives torch the threads of a run."""
    torch.set_num_threads(config["threads"])


def check_kernels(kernels: object, amp: str) -> None:
    """Raises ValueError for a setting of the kernels that cannot work here."""
    setting.check(kernels)
    if kernels == "fused" and amp != "off":
        raise ValueError("kernels='fused' computes in float32, amp='bf16' does not. Use kernels='auto' or amp='off'.")


def _strategy(asked: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    changes = {key: asked[key] for key in ("epochs", "batch_size") if asked[key] is not None}
    strategy = asked["strategy"]
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


def _threads(asked: Mapping[str, Any]) -> int:
    threads = asked["threads"]
    if threads is None:
        small = make_space(asked["space"], asked["space_options"] or {}).input_size < 32
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
    check_kernels(asked["kernels"], asked["amp"])


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isinf(value)
