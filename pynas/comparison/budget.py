"""Equal computation: strategies lengthened to the same number of gradient computations.

A gradient computation is an image through a backward pass. It counts once whatever part of a supernet runs (all
operations of an edge, or one path) and whoever descends it (weights or architecture). So a step of SNAS or of DARTS in
one level is one batch, of DARTS in two levels two, and in second order five; of FairNAS one for each of its networks;
of random search one of whichever network it trains alone. Forward passes without a backward pass, such as those that
reward ENAS's controller, or judge networks, do not count; where a strategy tells them they stand in the table.
"""

from __future__ import annotations

import dataclasses
import math

from pynas.registry import SearchSpace
from pynas.strategies import Strategy
from pynas.training.feed import Feed

SHORT_OF = 0.1  # share of the computation that a strategy may leave unused because it only ends after whole epochs


def computed(strategy: Strategy, feed: Feed) -> int:
    """Gradient computations of a whole search; `strategy.suit` was called with its space.

    Batches are taken to be full, though one of a part of the data that is smaller is not.
    """
    passes = sum(strategy.gradient_passes(feed, epoch) for epoch in range(strategy.epochs))
    return passes * strategy.batch_size


def matched(name: str, strategy: Strategy, space: SearchSpace, feed: Feed, images: int) -> Strategy:
    """The strategy, as long as so many gradient computations allow.

    One with `path_gradients` takes as many steps as fit, divided into its epochs; random search as many epochs as fit,
    shared among about as many networks as it was to try; another as many epochs as fit.

    Args:
        name: For messages.
        strategy: With its batch size.
        space: That it is to search.
        feed: Of its batch size.
        images: Gradient computations.

    Raises:
        ValueError: If it cannot search the space, or the computation is too little for it; says what is needed.
    """
    passes = images // strategy.batch_size
    fields = {field.name for field in dataclasses.fields(strategy)}
    found: Strategy | None
    if "path_gradients" in fields:
        found = _stepped(name, strategy, space, feed, passes)
    elif "candidates" in fields:
        found = _tried(strategy, passes // feed.steps_weights)
    else:
        found = _in_epochs(strategy, space, feed, passes)
    if found is not None:
        found.suit(space)
    used = 0 if found is None else computed(found, feed)
    if found is None or used < (1 - SHORT_OF) * images:
        raise ValueError(
            f"{images:,} gradient computations do not suit {name}: it ends after whole passes over the images, with "
            f"{used:,}. Give more epochs, or other ones."
        )
    return found


def _stepped(name: str, strategy: Strategy, space: SearchSpace, feed: Feed, passes: int) -> Strategy:
    probe = dataclasses.replace(strategy, epochs=1, path_gradients=0)  # type: ignore[call-arg]
    probe.suit(space)
    gradients: float = probe.length.gradients  # type: ignore[attr-defined]
    single = dataclasses.replace(probe, path_gradients=math.ceil(gradients))  # type: ignore[call-arg]
    single.suit(space)
    steps = passes // single.gradient_passes(feed, 0)
    if steps < 1:
        raise ValueError(f"{passes * strategy.batch_size:,} gradient computations are less than a step of {name}.")
    paths = math.ceil(steps * gradients - 1e-6)
    return dataclasses.replace(  # type: ignore[call-arg]
        strategy, epochs=min(strategy.epochs, steps), path_gradients=paths
    )


def _tried(strategy: Strategy, epochs: int) -> Strategy | None:
    wanted: int = strategy.candidates  # type: ignore[attr-defined]
    able = range(max(1, wanted // 2), min(2 * wanted, epochs) + 1)
    if not able:
        return None
    best = min(able, key=lambda candidates: (epochs % candidates, abs(candidates - wanted)))
    return dataclasses.replace(strategy, epochs=epochs - epochs % best, candidates=best)  # type: ignore[call-arg]


def _in_epochs(strategy: Strategy, space: SearchSpace, feed: Feed, passes: int) -> Strategy | None:
    for epochs in range(passes // feed.steps_weights, 0, -1):
        changes: dict[str, int] = {"epochs": epochs}
        if hasattr(strategy, "warmup_epochs"):  # as large a share as it was
            changes["warmup_epochs"] = min(epochs - 1, round(epochs * strategy.warmup_epochs / strategy.epochs))
        found = dataclasses.replace(strategy, **changes)
        found.suit(space)
        if computed(found, feed) <= passes * strategy.batch_size:
            return found
    return None
