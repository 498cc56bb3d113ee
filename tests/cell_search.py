"""A search of cells that takes seconds: space, images, steps."""

from __future__ import annotations

from typing import Any

import torch

from cost_models.analytic import Roofline
from pynas.budget import cost_range
from pynas.spaces.cell import CellSpace
from pynas.strategies import Problem, Strategy
from pynas.supernet import cost_table
from pynas.training.data import Data, open_data
from pynas.training.feed import Feed
from pynas.training.loop import Progress

SPACE: dict[str, Any] = {"input_size": 8, "cells": 3, "channels": 2, "nodes": 2}
ROOFLINE = Roofline(gmacs_per_s=2.0, gbytes_per_s=4.0, overhead_us=10.0)


def digits() -> Data:
    return open_data("digits", size=8, limit=96)


def problem(share: float | None = None, **options: Any) -> Problem:
    """A small space of cells; with a budget at this share of the way from its cheapest to its dearest network."""
    space = CellSpace(**{**SPACE, **options})
    table = cost_table(space, ROOFLINE)
    bounds = cost_range(table)
    budget = None if share is None else bounds.low + share * (bounds.high - bounds.low)
    return Problem(space, table, budget, 0.1, 0)


def begun(strategy: Strategy, data: Data, given: Problem) -> Feed:
    torch.manual_seed(0)
    strategy.prepare(given)
    return Feed(data, batch_size=strategy.batch_size, seed=0)


def stepped(strategy: Strategy, feed: Feed, steps: range) -> dict[str, float]:
    """Steps of the whole search, from the first; what the last one logged."""
    per_epoch, logged = strategy.steps(feed, 0), {}
    for number in steps:
        logged = strategy.step(feed, Progress(*divmod(number, per_epoch)))
    return logged
