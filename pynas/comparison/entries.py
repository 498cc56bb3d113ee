"""What a comparison is asked for: strategies, seeds, settings of every run; checked before any work."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cost_models.names import unknown
from pynas import settings
from pynas.comparison.budget import computed, matched
from pynas.console import Show
from pynas.plan import Plan, check_writable, make_plan, make_strategy
from pynas.registry import STRATEGIES
from pynas.strategies import Strategy
from pynas.training.feed import Feed

FILE = "asked.json"


@dataclass(frozen=True)
class Entry:
    """One run of a comparison.

    Args:
        label: Of the strategy with its settings.
        seed: Of the run.
        config: As `pynas.search` would resolve it.
        gradients: Gradient computations that the search takes.
    """

    label: str
    seed: int
    config: Mapping[str, Any]
    gradients: int

    @property
    def name(self) -> str:
        """Of the run's folder in that of the comparison."""
        return f"{self.label}-{self.seed}"


def listed(strategies: str | Sequence[str], changes: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """The strategy and changed hyper-parameters of every label, in order.

    Raises:
        ValueError: If there are none, one is named twice, unknown, or changed without being named.
    """
    names = strategies.split(",") if isinstance(strategies, str) else list(strategies)
    labels = [str(name).strip() for name in names]
    if not labels or not all(labels):
        raise ValueError("Name the strategies to compare: --strategies snas,darts,random. See: pynas list strategies")
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(
            f"Strategy {twice[0]!r} is named twice. For two settings of it invent a name: --strategies darts,single "
            '--changes \'{"single": {"strategy": "darts", "order": "single"}}\'.'
        )
    found = {}
    for label in labels:
        given = changes.get(label, {})
        if not isinstance(given, Mapping):
            raise ValueError(f"The changes of {label!r} must be a dictionary of hyper-parameters, not {given!r}.")
        changed = dict(given)
        name = changed.pop("strategy", label)
        if name not in STRATEGIES:
            raise unknown("strategy", name, STRATEGIES, "See: pynas list strategies")
        if not all(character.isalnum() or character in "._-" for character in label) or label.startswith("."):
            raise ValueError(f"The name {label!r} stands in file names: letters, digits, '_', '-' and '.' only.")
        for key in ("epochs", "batch_size", "path_gradients"):
            if key in changed:
                raise ValueError(
                    f"{key} of {label!r} follows from the comparison's epochs and batch_size; leave it out."
                )
        found[label] = (name, changed)
    for label in changes:
        if label not in labels:
            raise unknown("label in changes", label, labels)
    return found


def seeds_of(seeds: str | int | Sequence[int]) -> list[int]:
    """Seeds as numbers. Raises ValueError for none, for one that is no whole number from 0 on, or comes twice."""
    parts: list[Any] = (
        seeds.split(",") if isinstance(seeds, str) else [seeds] if isinstance(seeds, int) else list(seeds)
    )
    found = []
    for part in parts:
        text = str(part).strip()
        if isinstance(part, bool) or not text.isdigit() or int(text) > 2**31:
            raise ValueError(f"seeds must be whole numbers from 0 on, such as 0,1,2, not {text!r}.")
        found.append(int(text))
    if not found or len(set(found)) < len(found):
        raise ValueError(f"seeds must be one or more different numbers, such as 0,1,2, not {seeds!r}.")
    return found


def entries(asked: Mapping[str, Any], show: Show) -> list[Entry]:
    """Every run, seed by seed, checked: space and data open, strategies fit, budgets are equal.

    Args:
        asked: Parameters of `pynas.compare` by name.
        show: Where the host's measuring is shown.

    Raises:
        ValueError: For whatever cannot work, in one sentence.
        OSError: For files that cannot be read or written.
    """
    named, seeds = listed(asked["strategies"], asked["changes"] or {}), seeds_of(asked["seeds"])
    epochs, batch_size, watch = (asked[name] for name in ("epochs", "batch_size", "watch"))
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 2), ("watch", watch, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number, {least} or more, not {value!r}.")
    target = asked["target_accuracy"]
    if target is not None and not 0 < target < 1:
        raise ValueError(f"target_accuracy must lie between 0 and 1, for instance 0.7, not {target!r}.")
    check_writable(Path(asked["out"]))
    plan: Plan | None = None
    lengthened: dict[str, tuple[Strategy, int]] = {}
    for label, (name, changed) in named.items():
        preset = STRATEGIES.get(name).preset(asked["preset"] or "quick", **changed, batch_size=batch_size)
        if "watch_images" in changed or not hasattr(preset, "watch_images"):
            strategy = preset
        else:
            strategy = dataclasses.replace(preset, watch_images=watch)
        if plan is None:
            plan = make_plan(_config(asked, name, strategy, seeds[0]), show)
        feed = Feed(plan.data, batch_size=batch_size, seed=seeds[0])
        images = epochs * feed.steps_weights * batch_size
        lengthened[label] = _fitting(label, strategy, plan, feed, images)
    return [
        Entry(label, seed, _config(asked, named[label][0], strategy, seed), gradients)
        for seed in seeds
        for label, (strategy, gradients) in lengthened.items()
    ]


def _fitting(label: str, strategy: Strategy, plan: Plan, feed: Feed, images: int) -> tuple[Strategy, int]:
    """The strategy at equal computation, once it has shown that it can be made ready for the space."""
    space = plan.space
    found = matched(label, strategy, space, feed, images)
    probe = make_strategy({"name": _registered(strategy), "settings": dataclasses.asdict(found)})
    problem = dataclasses.replace(dataclasses.replace(plan, strategy=probe).problem(), train_on="cpu")
    try:
        with torch.random.fork_rng(devices=[]):
            probe.check(problem)
            probe.prepare(problem)
    except ValueError as error:
        raise ValueError(f"{label} cannot search space {space.name!r}: {error}") from None
    return found, computed(found, feed)


def _registered(strategy: Strategy) -> str:
    return next(name for name, cls in STRATEGIES.items() if cls is type(strategy))


def _config(asked: Mapping[str, Any], name: str, strategy: Strategy, seed: int) -> dict[str, Any]:
    """Settings of an ordinary run."""
    passed = ("space", "data", "device", "latency_ms", "slack", "amp", "kernels", "threads", "limit", "augment")
    rest = ("train_on", "on_corrupt", "space_options", "strict_table", "recipe", "retrain", "out")
    unasked = ("objectives", "limits", "directions", "evolution", "preset", "epochs", "batch_size", "host", "budget")
    found = settings.resolve(
        {
            **{key: asked[key] for key in (*passed, *rest)},
            **dict.fromkeys(unasked),
            "strategy": strategy,
            "baseline": 0,
            "seed": seed,
            "resume": None,
            "quiet": True,
        }
    )
    return {**found, "strategy": {"name": name, "settings": dataclasses.asdict(strategy)}}


def check_same(folder: Path, found: Sequence[Entry]) -> None:
    """Raises ValueError when a folder holds another comparison, or something else than one."""
    wanted = _told(found)
    if (folder / FILE).is_file():
        try:
            before = json.loads((folder / FILE).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{folder / FILE} is broken: {error}. Choose another folder with --out.") from None
        before = {name: {**settings.LATER, **config} for name, config in before.items()}  # of an older version
        if before == wanted:
            return
        differ = sorted(key for key in {*before, *wanted} if before.get(key) != wanted.get(key))
        raise ValueError(
            f"{folder} holds another comparison, with other settings of {', '.join(differ)}. Give the same settings to "
            "go on with it, or choose another folder with --out."
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no comparison. Choose another folder with --out.")


def _told(found: Sequence[Entry]) -> dict[str, Any]:
    """The settings of every run, as they are kept."""
    told: dict[str, Any] = {entry.name: dict(entry.config) for entry in found}
    settled: dict[str, Any] = json.loads(json.dumps(told))
    for config in settled.values():
        config.pop("out")  # the folder may be moved
    return settled


def asked_text(found: Sequence[Entry]) -> str:
    """What `check_same` reads."""
    return json.dumps(_told(found), indent=1) + "\n"
