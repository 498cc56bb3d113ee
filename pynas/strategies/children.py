"""From a trained distribution to child networks: rules of derivation, and children judged without retraining."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from pynas.architecture import Architecture
from pynas.budget import cost_range, to_architecture
from pynas.choices import Choice, Gates, Node
from pynas.registry import SearchSpace
from pynas.strategies.base import Candidate, Problem
from pynas.strategies.derive import sampled, submodels
from pynas.supernet import Supernet
from pynas.training.feed import Feed, batches
from pynas.training.judge import Judging, Score
from pynas.training.loop import Bars, Best, unseen
from pynas.training.optim import autocast, fast_layout
from pynas.training.run import RunFolder
from pynas.training.submodels import Submodels

Floats = np.ndarray[Any, np.dtype[np.float64]]
Found = list[tuple[str, Architecture]]  # networks with their origin
Rule = Literal["argmax", "top2"]
NONE = "none"
FILE = "children.json"


def nodes_of(space: SearchSpace) -> tuple[Node, ...]:
    """Nodes of the cells of a space; none in a space that has no cells."""
    wiring = getattr(space, "wiring", tuple)
    return tuple(wiring())


def arg_max(space: SearchSpace, log_p: Floats) -> Architecture:
    """The most probable option of every choice, `none` included: edges and nodes vanish (SNAS).

    Where so much vanishes that the network no longer depends on its image, a cell without edges gets back the edge from
    an input that loses least probability, until it does.

    Args:
        space: That the choices belong to.
        log_p: Log-probability of every option, (choices, options), minus infinity where a choice has none.
    """
    choices = space.choices()
    path = [int(row.argmax()) for row in log_p]
    network = to_architecture(space, choices, path)
    while not getattr(space, "reads_image", lambda chosen: True)(network.choices):
        least = min(_dead_inputs(space, path), key=lambda row: log_p[row].max() - _best(choices[row], log_p[row])[1])
        path[least] = _best(choices[least], log_p[least])[0]
        network = to_architecture(space, choices, path)
    return network


def _dead_inputs(space: SearchSpace, path: Sequence[int]) -> list[int]:
    """Choices of the edges from inputs in cells where all of these are `none`, so that no node is reached."""
    choices, found = space.choices(), []
    rows = {choice.name: row for row, choice in enumerate(choices)}
    for _, cell in itertools.groupby(nodes_of(space), key=lambda node: node.cell):
        inputs = [rows[name] for node in cell for name in node.choices[:2]]
        if all(choices[row].options[path[row]] == NONE for row in inputs):
            found += inputs
    return found


def top_two(space: SearchSpace, log_p: Floats) -> Architecture:
    """The two strongest edges of every node, each with its best operation but `none` (DARTS, section 2.4).

    Edges are ranked by the probability of that operation. In a space without cells it is the most probable network.

    Args:
        space: That the choices belong to.
        log_p: As for `arg_max`.
    """
    nodes, choices = nodes_of(space), space.choices()
    if not nodes:
        return arg_max(space, log_p)
    rows = {choice.name: row for row, choice in enumerate(choices)}
    path = [choice.options.index(NONE) for choice in choices]
    for node in nodes:
        best = {rows[name]: _best(choices[rows[name]], log_p[rows[name]]) for name in node.choices}
        for row in sorted(best, key=lambda row: -best[row][1])[:2]:
            path[row] = best[row][0]
    return to_architecture(space, choices, path)


RULES = {"argmax": arg_max, "top2": top_two}


def _best(choice: Choice, log_p: Floats) -> tuple[int, float]:
    """The most probable option but `none`, and its log-probability."""
    option = max((i for i, name in enumerate(choice.options) if name != NONE), key=lambda i: log_p[i])
    return option, float(log_p[option])


def derived(problem: Problem, log_p: Floats, rule: Rule, samples: int) -> Found:
    """The child of the rule, and draws from the distribution; all within the budget, where there is one.

    Where the rule's child does not lie in the budget's window, the most probable network there takes its place. Draws
    go by sums of costs; of those in which more vanishes, which are cheaper than the window, one is kept only where
    nothing else is found.

    Args:
        problem: Space, costs, budget and seed.
        log_p: Log-probability of every option, (choices, options).
        rule: Of derivation.
        samples: Draws; the same network may come several times, so fewer may be found.
    """
    child = RULES[rule](problem.space, log_p)
    if fits(problem, child):
        found: Found = [(rule, child)]
        drawn = sampled(problem, log_p, samples)[1:] if samples else []
    else:
        found, drawn = [], sampled(problem, log_p, samples)
    seen = {child.fingerprint} if found else set()
    found += [entry for entry in drawn if entry[1].fingerprint not in seen]
    return [entry for entry in found if fits(problem, entry[1])] or found[:1]


def fits(problem: Problem, architecture: Architecture) -> bool:
    """Whether a network lies in the budget's window; all do where there is no budget, or none that binds."""
    budget = problem.budget
    if budget is None or budget >= cost_range(problem.table).high:
        return True
    return (1 - problem.slack) * budget <= problem.table.cost(architecture) <= budget


def log_probabilities(theta: Any) -> Floats:
    """Of a `Theta`, as derivation takes them."""
    values: Floats = theta.log_probabilities().detach().double().cpu().numpy()
    return values


def judged(
    net: Supernet,
    problem: Problem,
    feed: Feed,
    found: Found,
    calibrate: int,
    run: RunFolder | None,
    bars: Bars = unseen,
    search: Mapping[str, Gates] | None = None,
) -> list[Candidate]:
    """Children as candidates, best first, by their accuracy on the images held out for the architecture.

    They have the weights that they inherited, and no more. `accuracy` is that after a recalibration of batch norms
    (where `calibrate` is not 0); the run's `children.json` holds that with the search's own running statistics as well,
    and the accuracy of the whole supernet under its gates, which the children are to keep.

    Args:
        net: The trained supernet.
        problem: That was searched.
        feed: Has the images.
        found: Children with their origin.
        calibrate: Images for the batch norms.
        run: Where scores are kept, so that an interrupted derivation goes on.
        bars: Show progress.
        search: Gates of the whole supernet at the end of the search.
    """
    architectures = [architecture for _, architecture in found]
    ways = (0, calibrate) if calibrate else (0,)
    with bars("judging", len(ways) * len(found)) as bar:

        def scored(images: int) -> list[Score]:
            judges, best = submodels(net, problem, feed, images, run), Best()
            return judges.scores(architectures, lambda _, score: bar.advance(best.see(score.accuracy)))

        bare, *recalibrated = map(scored, ways)
    scores = recalibrated[0] if recalibrated else bare
    order = sorted(range(len(found)), key=lambda i: (-scores[i].accuracy, scores[i].loss))
    candidates = [
        Candidate(found[i][1], scores[i].accuracy, problem.table.cost(found[i][1]), found[i][0]) for i in order
    ]
    if run is not None:
        whole = None if search is None else supernet_accuracy(net, search, feed, amp=problem.amp)
        children = [_child(found[i], scores[i], bare[i]) for i in order]
        run.write_json(FILE, {"search_accuracy": whole, "calibrate": calibrate, "children": children})
    return candidates


def read_child(run: RunFolder, architecture: Architecture) -> dict[str, Any]:
    """What `judged` kept of a network, with the accuracy of the whole supernet; empty where it kept nothing."""
    kept = run.read_json(FILE) or {"children": []}
    found = [child for child in kept["children"] if child["net"] == architecture.fingerprint]
    return {**found[0], **{name: kept[name] for name in ("search_accuracy", "calibrate")}} if found else {}


def _child(found: tuple[str, Architecture], score: Score, bare: Score) -> dict[str, Any]:
    origin, architecture = found
    edges = sum(options != (NONE,) for options in architecture.choices.values())
    return {
        "net": architecture.fingerprint,
        "origin": origin,
        "accuracy": score.accuracy,
        "accuracy_without_recalibration": bare.accuracy,
        "choices_not_none": edges,
    }


def supernet_accuracy(
    net: Supernet, gates: Mapping[str, Gates], feed: Feed, limit: int = 0, amp: Literal["off", "bf16"] = "off"
) -> float:
    """Top-1 accuracy of a supernet under given gates on the images held out for the architecture, in eval mode.

    Args:
        net: The supernet; its training flag stays as it was.
        gates: Of every slot.
        feed: Has the images.
        limit: At most so many images; 0 for all.
        amp: Mixed precision.
    """
    training, images = net.training, feed.data.arch
    net.eval()
    correct = total = 0
    with torch.inference_mode(), autocast(amp, net.device):
        for x, y in batches(images, 256, feed.data, net.device):
            correct += int((net(fast_layout(x), gates).argmax(1) == y).sum())
            total += len(y)
            if limit and total >= limit:
                break
    net.train(training)
    return correct / total


def watched(
    net: Supernet, gates: Mapping[str, Gates], child: Architecture, feed: Feed, limit: int, problem: Problem
) -> dict[str, float]:
    """How the supernet and its child do in the midst of a search, on so many held-out images; for curves over time."""
    how: Sequence[tuple[str, int]] = (("child_accuracy_without_recalibration", 0), ("child_accuracy", 512))
    found = {"search_accuracy": supernet_accuracy(net, gates, feed, limit, problem.amp)}
    for name, calibrate in how:
        judging = Judging(calibrate=calibrate, limit=limit, amp=problem.amp)
        (score,) = Submodels(net, feed.data, how=judging, processes=1).scores([child])
        found[name] = score.accuracy
    return found
