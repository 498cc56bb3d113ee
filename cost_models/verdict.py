"""Whether a device is additive: what is left when sums of ops predict whole networks, and what explains it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from .agreement import Agreement, Floats, agreement
from .drift import SHUFFLES, clipped, drift
from .ridge import Ridge
from .spec import OpSpec

EXACT = 0.005  # mean error that no user of a table would notice
USEFUL = 0.03
NOISE_FACTOR = 1.5  # times the noise, up to which an error is put down to noise
STRUCTURE = 0.1  # share of the squared error that must be explained to be called structure
STRENGTHS = np.logspace(-6, 3, 37)
FEW = 1.5  # networks for each unknown number, below which the fit is judged no further
MAX_PAIRS = 1500  # neighbouring pairs looked at, the most frequent ones


@dataclass(frozen=True)
class Verdict:
    """An answer to "can this device be described by a table of ops?".

    Args:
        kind: "additive": yes, to within 0.5 % or noise. "nearly additive": to within 3 %. "not additive": no.
            "cannot tell": more networks or repeats are needed.
        sentence: The same in words, with figures.
        lasting: The error that would be left with any number of networks on a device that does not drift, as a
            fraction.
        by_drift: Share of the squared error that follows the order in which networks were timed. Together with the
            two below 0 where it is no more than chance.
        by_curve: Share of the rest that a curve in the networks' totals (sum of ops, MACs, number of ops) explains.
        by_pairs: Share of the rest that pairs of neighbouring ops explain.
    """

    kind: Literal["additive", "nearly additive", "not additive", "cannot tell"]
    sentence: str
    lasting: float
    by_drift: float
    by_curve: float
    by_pairs: float


@dataclass(frozen=True)
class Evidence:
    """What `judge` weighs. `unknowns` is how many numbers the networks could tell; shares as in `Verdict`."""

    held_out: Agreement
    lasting: float
    unknowns: int
    noise: float | None
    by_drift: float
    by_curve: float
    by_pairs: float

    @property
    def few(self) -> bool:
        """Whether there are too few networks to look behind the error."""
        return self.held_out.nets < FEW * self.unknowns

    @property
    def ordered(self) -> bool:
        """Whether sums of ops put networks in their order more often than chance would, as far as three deviations."""
        nets = self.held_out.nets
        by_chance = math.sqrt(2 * (2 * nets + 5) / (9 * nets * (nets - 1)))  # of Kendall's tau
        return self.held_out.kendall > 3 * by_chance


def judge(
    nets: Sequence[Sequence[OpSpec]],
    predicted: Floats,
    measured: Floats,
    macs: Floats,
    fitted: tuple[int, float],
    noise: float | None,
    seed: int,
) -> Verdict:
    """Judges sums of ops by the networks that they were not fitted on.

    Args:
        nets: Ops in the order in which they run; the networks in the order in which they were timed.
        predicted: Sums of ops in ms, each from a fit without that network.
        measured: In ms.
        macs: Of whole networks.
        fitted: Numbers that the networks could tell, and how many of them the fit took.
        noise: Mean relative error of a timing, or None if unknown.
        seed: Of the shuffles that tell structure from chance.
    """
    random = np.random.default_rng(seed)
    held_out = agreement(predicted, measured)
    errors = np.log(measured / predicted)
    by_drift, drifted = drift(errors, predicted, random)
    steady = errors - drifted
    error = float(np.abs(np.expm1(steady)).mean()) if by_drift else held_out.error
    lasting = error * float(np.sqrt(max(1 - fitted[1] / len(nets), 0.1)))
    totals = _totals(nets, predicted, macs)
    steady = clipped(steady)
    by_curve = _explained(_quadratic(totals), _without(steady, totals), random)
    by_pairs = _explained(_pairs(nets), steady, random)
    found = Evidence(held_out, lasting, fitted[0], noise, by_drift, by_curve, by_pairs)
    kind = _kind(found)
    return Verdict(kind, " ".join([_opening(kind, held_out), *_reasons(found)]), lasting, by_drift, by_curve, by_pairs)


def _kind(found: Evidence) -> Literal["additive", "nearly additive", "not additive", "cannot tell"]:
    unseen = max(EXACT, NOISE_FACTOR * (found.noise or 0.0))
    if not found.ordered and found.lasting <= max(unseen, USEFUL):
        return "cannot tell"  # a constant would do as well
    if found.held_out.error <= unseen:
        return "additive"
    if found.few:
        return "cannot tell"
    if found.lasting <= unseen:
        return "additive"
    if found.lasting <= USEFUL:
        return "nearly additive"
    if max(found.by_curve, found.by_pairs) >= STRUCTURE or found.noise is not None:
        return "not additive"
    return "cannot tell"


def _opening(kind: str, held_out: Agreement) -> str:
    about = f"sums of ops miss networks left out by {held_out.error:.2%} on average (tau {held_out.kendall:.3f})"
    return {
        "additive": f"The device is additive: {about}.",
        "nearly additive": f"The device is nearly additive: {about}. Choose networks by the table.",
        "not additive": f"The device is not additive: {about}. Time the networks that you choose.",
        "cannot tell": f"It cannot be told yet whether the device is additive: {about}.",
    }[kind]


def _reasons(found: Evidence) -> list[str]:
    parts = []
    if not found.ordered:
        parts.append("They put networks in no better order than chance would, as a constant latency could too.")
    if found.few:
        parts.append(
            f"{found.held_out.nets} networks are few for {found.unknowns} unknown numbers: time {3 * found.unknowns}."
        )
    if found.by_drift >= STRUCTURE:
        parts.append(
            f"{found.by_drift:.0%} of the squared error follows the order of the timings: the device drifted while it "
            "was timed, which says nothing about networks."
        )
    if not found.few and max(found.lasting / EXACT, found.by_drift / STRUCTURE) > 1:
        parts.append(f"About {found.lasting:.2%} would remain with any number of networks and without drift.")
    if not found.few and found.lasting > EXACT:
        parts.append(_structure(found))
    if found.noise is not None:
        parts.append(f"Timings of one network differ by {found.noise:.2%} on average.")
    elif found.lasting > EXACT:
        parts.append("How much of that is noise is not known: time a few networks several times.")
    return parts


def _structure(found: Evidence) -> str:
    named = ((found.by_curve, "a curve in the network's totals"), (found.by_pairs, "the interplay of neighbouring ops"))
    explained = [f"{what} explains {share:.0%} of it" for share, what in named if share >= STRUCTURE]
    if explained:
        return f"{' and '.join(explained).capitalize()}."
    return "Neither a curve in the networks' totals nor the interplay of neighbouring ops explains it."


def _totals(nets: Sequence[Sequence[OpSpec]], predicted: Floats, macs: Floats) -> Floats:
    """Standardised totals of each network with a leading 1, shape (nets, 4)."""
    ops = [float(sum(not spec.free for spec in net)) for net in nets]
    totals = np.stack([predicted, macs, np.asarray(ops)], axis=1)
    spread = totals.std(0)
    return np.hstack([np.ones((len(nets), 1)), (totals - totals.mean(0)) / np.where(spread > 0, spread, 1.0)])


def _quadratic(totals: Floats) -> Floats:
    """What squares and products of the totals add to the totals."""
    rows, columns = np.triu_indices(totals.shape[1] - 1)
    products = totals[:, 1 + rows] * totals[:, 1 + columns]
    added = np.stack([_without(product, totals) for product in products.T], axis=1)
    return np.asarray(added / (added.std(0) + 1e-9), dtype=np.float64)


def _without(values: Floats, totals: Floats) -> Floats:
    """What is left of `values` after a linear function of the totals, which single ops could have expressed."""
    weights, *_ = np.linalg.lstsq(totals, values, rcond=None)
    return np.asarray(values - totals @ weights, dtype=np.float64)


def _pairs(nets: Sequence[Sequence[OpSpec]]) -> Floats:
    """How often each pair of ops follow each other in a network, shape (nets, pairs).

    Not centred: with more pairs than networks, what the others sum to would give away the network that is left out.
    """
    column: dict[tuple[OpSpec, OpSpec], int] = {}
    places = [[column.setdefault(pair, len(column)) for pair in pairwise(net)] for net in nets]
    counts = np.zeros((len(nets), len(column)))
    for row, found in enumerate(places):
        np.add.at(counts[row], found, 1)
    frequent = np.argsort(-counts.var(0), kind="stable")[:MAX_PAIRS]
    return counts[:, frequent]


def _explained(table: Floats, errors: Floats, random: np.random.Generator) -> float:
    """Share of the squared errors that a ridge regression explains, by leave-one-out; 0 unless shuffling ruins it."""
    ridge = Ridge.of(table, STRENGTHS)

    def gain(values: Floats) -> float:
        left_out = ridge.left_out(values)
        return float(max(0.0, 1 - (left_out**2).sum(1).min() / max((values**2).sum(), 1e-300)))

    found = gain(errors)
    by_chance = max(gain(random.permutation(errors)) for _ in range(SHUFFLES))
    return found if found > by_chance else 0.0
