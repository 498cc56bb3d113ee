"""Where every number of a report comes from, how far it may be off, and how to get it again."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import shlex
import statistics
from collections.abc import Mapping
from typing import Any

import cost_models
from pynas import settings
from pynas.api import search
from pynas.evolution import EvolutionSettings
from pynas.plan import make_space
from pynas.registry import STRATEGIES
from pynas.report.found import finished
from pynas.report.head import against_random
from pynas.report.parts import Absent, Code, Listing, Part, Table, number, percent
from pynas.report.told import Told
from pynas.subsets import picks_any
from pynas.training.run import environment
from pynas.training.train import Recipe

Row = tuple[str, str, str, str]
# Settings that are said in a way of their own, or say where a run lies and not what it is.
APART = ("space", "strategy", "recipe", "space_options", "objectives", "limits", "directions", "evolution", "out")


def numbers(told: Told) -> Part:
    """Every number with its source and its spread."""
    run, figures = finished(told), told.figures
    rows = _trained(told, figures) if figures else []
    best = run.candidates[0]
    if figures.get("held_out_accuracy_inherited", best.accuracy) is not None:
        what = "held-out images, weights inherited from the search, batch norms recalibrated"
        rows.append(("accuracy held out", percent(best.accuracy), what, "not known: one search"))
    device = device_of(told)
    if device is not None and not figures and not picks_any(told.space.choices()):
        rows.append(("predicted latency", f"{best.cost:.4g} ms", device.describe(), "see the table's spread"))
    rows.append(
        ("MACs, parameters", f"{number(best.macs, ',')}, {number(best.params, ',')}", _counted(figures), "exact")
    )
    seconds = f"{told.seconds:,.0f} s"
    rows.append(("time of the search", seconds, f"by the clock, {_machine(told)}", "not repeated"))
    return Listing("", Table(("number", "value", "source", "spread"), rows, prose=True))


def _counted(figures: Mapping[str, Any]) -> str:
    folded = ", of the folded network" if "branches" in figures else ""
    return f"counted: multiply-adds of convolutions and classifier for one image{folded}"


def _trained(told: Told, figures: Mapping[str, Any]) -> list[Row]:
    accuracy, images = figures["test_accuracy"], figures["test_images"]
    error = 100 * math.sqrt(accuracy * (1 - accuracy) / images)
    test = f"{images:,} test images, read once, after everything was decided"
    rows = [("test accuracy", percent(accuracy), test, f"standard error {error:.2f} points by images; one seed")]
    fitted = figures.get("fitted") or 0
    told_by = f"sum of rows of {figures['device']}" + (f"; {fitted} ops fitted" if fitted else "")
    about = device_of(told)
    spread = (
        f"rows: {about.spread:.1%} (IQR / median)" if about and about.provenance.source == "measured" else "a model"
    )
    rows.append(("predicted latency", f"{figures['predicted_ms']:.4g} ms", told_by, spread))
    if figures.get("measured_ms") is not None:
        how = "whole network on this host, batch norm folded, 1 thread, batch 1, median of repeats"
        width = f"{figures['measured_spread_ms']:.2g} ms (IQR)"
        rows.append(("measured latency", f"{figures['measured_ms']:.4g} ms", how, width))
    for price in figures.get("elsewhere", []):
        how = f"sum of rows, {price['source']} by {price['runner']}"
        how += f", {price['fitted']} ops fitted" if price["fitted"] else ""
        rows.append((f"latency on {price['device']}", f"{price['predicted_ms']:.4g} ms", how, "a model"))
    others = [net["accuracy"] for net in figures["baseline"]]
    if others:
        spread = f"deviation {100 * statistics.stdev(others):.2f} points" if len(others) > 1 else "one network"
        how = f"mean of {len(others)} random networks of the same budget, same recipe, same test images"
        rows.append(("random search", percent(statistics.fmean(others)), how, spread))
        ahead = against_random(figures)
        rows.append(("found less random", f"{ahead:+.2f} points", "the two above", "see the verdict at the head"))
    export = figures.get("export")
    if export:
        rows.append(("difference of the exported file", f"{export['difference']:.2g}", export["check"], "exact"))
    rows.append(("kernels", figures["kernels"], "a rule by shape", "exact"))
    return rows


def device_of(told: Told) -> cost_models.LatencyTable | None:
    """The run's table, where it can be read; what reads it for more says why it cannot."""
    try:
        return told.device
    except (ValueError, OSError):
        return None


def _machine(told: Told) -> str:
    env = told.environment
    return f"{env.get('cores', '?')} cores, {env.get('threads', '?')} threads of torch, {env.get('machine', '?')}"


def command(config: Mapping[str, Any]) -> str:
    """The command that asks for the same search: only what differs from the defaults is named.

    Raises:
        Absent: If the settings are not those of a search of this version.
    """
    defaults = {name: p.default for name, p in inspect.signature(search).parameters.items()}
    words = ["pynas", "search"]
    try:
        chosen = config["strategy"]["name"]
        usual_name = settings.usual_strategy(config["space"], {})
        usual = STRATEGIES.get(chosen).preset_values("quick")
        made = dataclasses.asdict(STRATEGIES.get(chosen)(**{**usual, **config["strategy"]["settings"]}))
        plain = dataclasses.asdict(STRATEGIES.get(chosen)(**usual))
        words += _flag("space", config["space"], defaults["space"])
        words += _flag("strategy", chosen, usual_name)
        words += [word for name, value in made.items() for word in _flag(f"strategy.{name}", value, plain[name])]
        for name in (name for name in defaults if name in config and name not in APART):
            words += _flag(name, config[name], defaults[name])
        words += _objectives(config)
        words += _space_options(config)
        if not STRATEGIES.get(chosen).TRAINS:
            words += _nested("recipe", config["recipe"], dataclasses.asdict(Recipe()))
    except (KeyError, TypeError, ValueError) as error:
        raise Absent(f"config.yaml is not of this version ({error})") from None
    return shlex.join(words)


def _flag(name: str, value: Any, default: Any) -> list[str]:
    if value == default:
        return []
    plain = isinstance(value, str)
    return [f"--{name}", value if plain else json.dumps(value)]


def _nested(name: str, values: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
    return [word for key, value in values.items() for word in _flag(f"{name}.{key}", value, usual.get(key))]


def _objectives(config: Mapping[str, Any]) -> list[str]:
    if not config["objectives"]:
        return []
    words = ["--objectives", ",".join(config["objectives"])]
    words += _nested("limits", config["limits"] or {}, {}) + _nested("directions", config["directions"] or {}, {})
    if config["evolution"] is not None:
        words += _nested("evolution", config["evolution"], dataclasses.asdict(EvolutionSettings()))
        if words[-1] == words[1]:  # all as usual, but said
            words += ["--evolution.population", str(config["evolution"]["population"])]
    return words


def _space_options(config: Mapping[str, Any]) -> list[str]:
    options = dict(config["space_options"] or {})
    usual = make_space(config["space"], {}).options()
    changed = {
        name: value for name, value in options.items() if name not in usual or _plain(usual[name]) != _plain(value)
    }
    return ["--space_options", json.dumps(changed)] if changed else []


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def again(told: Told) -> Part:
    """The exact command."""
    return Code("The command", in_lines(command(told.config)))


def in_lines(words: str) -> str:
    """A command with a line for each of its flags, as shells read it."""
    lines: list[list[str]] = [[]]
    for word in shlex.split(words):
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(shlex.join(line) for line in lines)


def versions(told: Told) -> Part:
    """Versions then and now."""
    env = told.environment
    if not env:
        raise Absent("the run's folder has no env.json")
    here = environment()
    then = {"python": env.get("python", "?"), **env.get("packages", {})}
    now = {"python": here["python"], **here["packages"]}
    rows = [(name, str(version), str(now.get(name, "–"))) for name, version in then.items()]
    rows += [("system", str(env.get("system", "?")), str(here["system"])), ("begun", str(env.get("date", "?")), "–")]
    seed = told.config.get("seed")
    note = (
        f"Seed {seed}. The same seed gives the same result, bit for bit on one thread with the same versions and the "
        "same latency table, which lies in the run's folder (device/)."
    )
    return Listing("Versions", Table(("what", "in the run", "when this page was made"), rows, note))
