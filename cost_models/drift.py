"""Drift: errors that follow the order of the timings, because a device heated up, throttled or had other work to do."""

from __future__ import annotations

import numpy as np

from .agreement import Floats

REACH = 3  # timings before and after that tell the drift
SHUFFLES = 19  # one in twenty would beat them all by chance
CLIP = 4.0  # robust standard deviations


def drift(errors: Floats, predicted_ms: Floats, random: np.random.Generator) -> tuple[float, Floats]:
    """What neighbours in time have in common.

    Args:
        errors: Logarithms of measured over predicted latency, in the order of the timings.
        predicted_ms: Of the same networks. Where these follow the order as well (a sorted file), it is not random, and
            nothing can be said.
        random: For the shuffles that tell drift from chance.

    Returns:
        The share of the squared errors, tails clipped, and the drift of each timing as a logarithm; zeros where it is
        no more than chance.
    """
    found = _beyond_chance(clipped(errors), random)
    if not found or _beyond_chance(np.log(predicted_ms / np.median(predicted_ms)), random) > 0.1:
        return 0.0, np.zeros_like(errors)
    around = _around(errors)
    return found, around - around.mean()  # the mean, because the median of two states jumps between them


def clipped(errors: Floats) -> Floats:
    """Errors around their median, without the tails: a few wild timings must not decide."""
    centred = errors - np.median(errors)
    limit = CLIP * 1.4826 * float(np.median(np.abs(centred))) + 1e-12
    return np.asarray(np.clip(centred, -limit, limit), dtype=np.float64)


def _around(values: Floats) -> Floats:
    """Median of the values before and after each, itself left out."""
    padded = np.pad(values, REACH, mode="reflect")
    window = np.lib.stride_tricks.sliding_window_view(padded, 2 * REACH + 1)
    return np.asarray(np.median(np.delete(window, REACH, axis=1), axis=1), dtype=np.float64)


def _share(values: Floats) -> float:
    return float(1 - ((values - _around(values)) ** 2).sum() / max((values**2).sum(), 1e-300))


def _beyond_chance(values: Floats, random: np.random.Generator) -> float:
    found = _share(values)
    return found if found > max(0.0, *(_share(random.permutation(values)) for _ in range(SHUFFLES))) else 0.0
