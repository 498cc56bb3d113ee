"""How well predicted latencies of whole networks agree with measured ones, and what noise alone would permit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .rows import check_ms

Floats = NDArray[np.float64]
DRAWS = 200  # of noise, to learn what it permits


@dataclass(frozen=True)
class Agreement:
    """Errors of predictions, relative to what was measured, as fractions (0.01 is 1 %).

    Args:
        nets: How many networks were compared.
        bias: Mean signed error; positive where the prediction is too high.
        error: Mean absolute error.
        spread: Standard deviation of the signed error.
        worst: The largest absolute error.
        kendall: Kendall's tau-b of the two orders.
        spearman: Spearman's rank correlation.
        r2: Share of the variance of the measured latencies that the predictions explain; can be negative.
    """

    nets: int
    bias: float
    error: float
    spread: float
    worst: float
    kendall: float
    spearman: float
    r2: float


@dataclass(frozen=True)
class Noise:
    """The noise floor: how far one network, timed again, departs from itself.

    Args:
        timings: How many independent timings of one network it rests on.
        error: Mean absolute departure from the true value that one timing has, as a fraction.
        spread: Standard deviation of the timings, as a fraction.
        kendall: The tau to expect between true latencies and timings of these networks with this noise and no other
            error: no table can be relied on to reach more.
    """

    timings: int
    error: float
    spread: float
    kendall: float


def agreement(predicted_ms: Sequence[float] | Floats, measured_ms: Sequence[float] | Floats) -> Agreement:
    """Compares predictions with measurements of the same networks.

    Raises:
        ValueError: Fewer than three networks, sequences of different lengths, or a latency that is not positive.
    """
    predicted, measured = _checked(predicted_ms, measured_ms)
    errors = predicted / measured - 1
    variance = float(((measured - measured.mean()) ** 2).sum())
    unexplained = float(((measured - predicted) ** 2).sum())
    return Agreement(
        nets=len(measured),
        bias=float(errors.mean()),
        error=float(np.abs(errors).mean()),
        spread=float(errors.std(ddof=1)),
        worst=float(np.abs(errors).max()),
        kendall=kendall(predicted, measured),
        spearman=spearman(predicted, measured),
        r2=1 - unexplained / variance if variance else 0.0,
    )


def noise_floor(timings_ms: Sequence[float], measured_ms: Sequence[float] | Floats, seed: int = 0) -> Noise:
    """The noise floor from several timings of one network, and the tau that it permits for the networks measured.

    Args:
        timings_ms: One network timed several times, each time as every other network was.
        measured_ms: The networks to be ranked.
        seed: Of the simulated noise.

    Raises:
        ValueError: Fewer than three timings, or a latency that is not positive.
    """
    if len(timings_ms) < 3:
        raise ValueError(f"The noise floor needs one network timed at least 3 times; it was {len(timings_ms)}.")
    for value in timings_ms:
        check_ms("A timing of the network that was timed again", value)
    timings = np.asarray(timings_ms, dtype=np.float64)
    departures = np.log(timings / np.median(timings))
    # The departures from a centre that was estimated from the same timings are too small by this factor.
    departures *= np.sqrt(len(timings) / (len(timings) - 1))
    true = np.asarray(measured_ms, dtype=np.float64)
    random = np.random.default_rng(seed)
    taus = [kendall(true, true * np.exp(random.choice(departures, len(true)))) for _ in range(DRAWS)]
    error = float(np.abs(departures).mean())
    return Noise(len(timings), error, float(timings.std(ddof=1) / timings.mean()), float(np.mean(taus)))


def kendall(first: Sequence[float] | Floats, second: Sequence[float] | Floats) -> float:
    """Kendall's tau-b; 0 where one of the two does not vary."""
    from scipy.stats import kendalltau

    return 0.0 if _constant(first) or _constant(second) else float(kendalltau(first, second).statistic)


def spearman(first: Sequence[float] | Floats, second: Sequence[float] | Floats) -> float:
    """Spearman's rank correlation; 0 where one of the two does not vary."""
    from scipy.stats import spearmanr

    return 0.0 if _constant(first) or _constant(second) else float(spearmanr(first, second).statistic)


def _constant(values: Sequence[float] | Floats) -> bool:
    return bool(np.ptp(np.asarray(values)) == 0)


def _checked(predicted_ms: Sequence[float] | Floats, measured_ms: Sequence[float] | Floats) -> tuple[Floats, Floats]:
    predicted, measured = np.asarray(predicted_ms, dtype=np.float64), np.asarray(measured_ms, dtype=np.float64)
    if predicted.shape != measured.shape or predicted.ndim != 1:
        raise ValueError(
            f"{len(predicted)} predicted and {len(measured)} measured latencies do not belong to the same networks."
        )
    if len(measured) < 3:
        raise ValueError(f"At least 3 networks are needed to compare predictions; there are {len(measured)}.")
    for what, values in (("A predicted latency", predicted), ("A measured latency", measured)):
        for value in values:
            check_ms(what, float(value))
    return predicted, measured
