"""Latency of ops that have no row, fitted from the rows of their kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .spec import OpSpec

MIN_ROWS = 6
FEW = 2  # features, with which one row more than features is enough: a pool has but its start and what it moves


@dataclass(frozen=True)
class Fit:
    """latency_ms = weights @ features, all weights >= 0: an op is never fitted as cheaper for being larger.

    `error` is the mean relative error when each row is predicted from all others (leave-one-out); it speaks for ops
    within the range of the rows.
    """

    weights: tuple[float, ...]
    error: float

    def latency_ms(self, spec: OpSpec) -> float:
        return float(np.dot(self.weights, features(spec)))


def features(spec: OpSpec) -> list[float]:
    """What an op spends time on: starting, shuffling, dense MACs, depthwise MACs, activations and weights moved.

    Shuffles are counted, not weighed: on 48 to 96 blocks of three FBNet spaces (torch on x86) that alone brought the
    leave-one-out error from 9-10 % to 2-5 %, while channel counts did not help.
    """
    layers = spec.layers
    return [
        1.0,
        float(sum(layer.op == "shuffle" for layer in layers)),
        float(sum(layer.macs for layer in layers if layer.op != "depthwise")),
        float(sum(layer.macs for layer in layers if layer.op == "depthwise")),
        float(sum(layer.reads + layer.writes for layer in layers)),
        float(sum(layer.params for layer in layers)),
    ]


def rows_needed(specs: Sequence[OpSpec]) -> int:
    """How many rows of a kind a fit takes, judged by the features that they have."""
    used = sum(map(any, zip(*map(features, specs), strict=True)))
    return used + 1 if specs and used <= FEW else MIN_ROWS


def fit(specs: Sequence[OpSpec], latency_ms: Sequence[float]) -> Fit:
    """Non-negative least squares on the relative error, with its leave-one-out error.

    Raises:
        ValueError: fewer than `rows_needed`.
    """
    if len(specs) < rows_needed(specs):
        raise ValueError(f"A fit needs at least {rows_needed(specs)} rows; there are {len(specs)}.")
    target = np.asarray(latency_ms, dtype=np.float64)
    table = np.asarray([features(spec) for spec in specs], dtype=np.float64) / target[:, None]  # relative: target is 1
    errors = [abs(table[i] @ _solve(np.delete(table, i, axis=0)) - 1) for i in range(len(table))]
    return Fit(tuple(_solve(table).tolist()), float(np.mean(errors)))


def _solve(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights w >= 0 that bring table @ w closest to 1."""
    from scipy.optimize import nnls

    scale = table.max(axis=0)
    scale[scale == 0] = 1  # a feature that no row has
    weights, _ = nnls(table / scale, np.ones(len(table)))
    return np.asarray(weights / scale, dtype=np.float64)
