"""From shared weights to a Pareto set: the evolution over networks that are judged with inherited weights."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from cost_models.analytic import Macs, Params
from pynas.architecture import Architecture
from pynas.budget import to_architecture
from pynas.evolution import Costs, Evaluated, Evolution, EvolutionSettings, Generation, cells_of
from pynas.pareto import front
from pynas.strategies.base import Candidate, Problem
from pynas.supernet import cost_table
from pynas.training.judge import Score
from pynas.training.loop import Bar, Bars, Best
from pynas.training.run import RunFolder
from pynas.training.submodels import Submodels

GENERATIONS = 4  # at least so many populations fit into the evaluations, where the population is not given


def settings_of(problem: Problem, evaluations: int) -> EvolutionSettings:
    """The evolution's hyper-parameters: those of the problem, or the usual ones with a population that fits.

    Raises:
        ValueError: If the population is larger than the number of networks that may be judged.
    """
    usual = EvolutionSettings()
    fitting = max(2, min(usual.population, evaluations // GENERATIONS))
    settings = problem.evolution or dataclasses.replace(usual, population=fitting)
    if settings.population > evaluations:
        raise ValueError(
            f"The evolution's population of {settings.population} does not fit into {evaluations} evaluations. Raise "
            "the strategy's evaluations, or lower evolution.population."
        )
    return settings


def evolution_of(problem: Problem, evaluations: int) -> Evolution:
    """The evolution that a problem asks for, before its first generation.

    Args:
        problem: Has goals.
        evaluations: Networks that may be judged.

    Raises:
        ValueError: If a limit that is known before evaluation is met by no network, naming the nearest value; if no
            network meets all of them at once, or evaluations do not suffice for a first population.
    """
    settings = settings_of(problem, evaluations)
    tables = {
        "macs": lambda: cost_table(problem.space, Macs()),
        "params": lambda: cost_table(problem.space, Params()),
        "latency_ms": lambda: problem.table,
    }
    costs = {goal.name: Costs.of(tables[goal.name]()) for goal in problem.goals if goal.name in tables}
    return Evolution(
        problem.space.choices(), problem.goals, settings, seed=problem.seed, costs=costs, cells=cells_of(problem.space)
    )


def evolved(
    problem: Problem, evaluations: int, judges: Submodels, run: RunFolder | None, bars: Bars
) -> list[Candidate]:
    """The Pareto set, most accurate first, then all other networks that were judged.

    Every score is in the file of `judges` before anything else happens, and the evolution's state is in a checkpoint
    after every generation, so that a broken derivation goes on to the same result, bit for bit. Goals and settings are
    part of the checkpoint's name: with others, the evolution begins anew with the scores that there are.

    Raises:
        ValueError: If no network that was judged meets a limit on accuracy, naming the nearest; nothing is lost.
    """
    evolution = evolution_of(problem, evaluations)
    stage = _stage(evolution, judges)
    state = None if run is None else run.load_checkpoint(stage)
    if state is not None:
        evolution.load_state_dict(state["task"])
    with judges, bars("evolution", evaluations) as bar:
        for _ in range(evolution.evaluations):
            bar.advance("resumed")
        while evolution.evaluations < evaluations and (asked := evolution.ask()):
            finished = len(evolution.history)
            nets = [_architecture(problem, genome) for genome in asked[: evaluations - evolution.evaluations]]
            scores = _judged(judges, nets, bar, evolution)
            evolution.tell([{"accuracy": score.accuracy} for score in scores])
            if run is not None:
                for generation in evolution.history[finished:]:
                    run.log("evolution", generation.number, _record(generation, evolution))
                run.save_checkpoint(stage, {"task": evolution.state_dict()})
        if run is not None:
            run.close()
        return _candidates(problem, evolution, judges, run)


def _judged(judges: Submodels, nets: Sequence[Architecture], bar: Bar, evolution: Evolution) -> list[Score]:
    """Scores of a generation; the bar moves with each of them, known ones last."""
    volumes = [generation.hypervolume for generation in evolution.history]
    text = f"generation {len(volumes)}" + (f"  hypervolume {volumes[-1]:.4g}" if volumes else "")
    told: list[str] = []
    best = Best()
    for each in evolution.evaluated:
        best.see(each.values["accuracy"])

    def note(architecture: Architecture, score: Score) -> None:
        told.append(architecture.fingerprint)
        best.see(score.accuracy)
        bar.advance(f"{text}  {best}")

    scores = judges.scores(nets, note)
    for _ in range(len(nets) - len(told)):
        bar.advance(text)
    return scores


def _stage(evolution: Evolution, judges: Submodels) -> str:
    about = repr((evolution.state_dict()["about"], judges.context))
    return f"evolution-{hashlib.sha256(about.encode()).hexdigest()[:12]}"


def _architecture(problem: Problem, genome: Sequence[int]) -> Architecture:
    return to_architecture(problem.space, problem.table.choices, list(genome))


def _record(generation: Generation, evolution: Evolution) -> dict[str, Any]:
    """What is logged of a generation."""
    so_far = evolution.evaluated[: generation.evaluations]
    return {
        "evaluations": generation.evaluations,
        "hypervolume": generation.hypervolume,
        "front": len(front(_values(so_far, evolution), evolution.goals)),
        "best_accuracy": max(each.values["accuracy"] for each in so_far),
    }


def _values(networks: Sequence[Evaluated], evolution: Evolution) -> Any:
    return np.array([[each.values[goal.name] for goal in evolution.goals] for each in networks])


def _candidates(problem: Problem, evolution: Evolution, judges: Submodels, run: RunFolder | None) -> list[Candidate]:
    try:
        found = {each.genome for each in evolution.front()}
    except ValueError as error:
        kept = ""
        if run is not None:
            asked = run.path / "config.yaml"
            kept = f" Supernet and scores are kept: change limits in {asked}, and pynas search --resume {run.path}"
        raise ValueError(f"{error}{kept}") from None
    everyone = [(each, _architecture(problem, each.genome)) for each in evolution.evaluated]
    losses = [score.loss for score in judges.scores([net for _, net in everyone])]
    candidates = [
        Candidate(net, each.values["accuracy"], problem.table.cost(net), each.origin, front=each.genome in found)
        for each, net in everyone
    ]
    order = sorted(range(len(candidates)), key=lambda i: (not candidates[i].front, -candidates[i].accuracy, losses[i]))
    return [candidates[i] for i in order]
