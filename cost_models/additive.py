"""A per-op table from whole networks: for devices that can time nothing smaller, such as a phone app or a vendor tool.

The latency of a network is taken to be the sum over its ops, with one unknown for each distinct op. The ops are drawn
towards a smooth guess (few positive weights on what ops compute and move, fitted on the same networks), as strongly as
predicts networks best that were left out. Where a guess is all there is, the fit says so: every network passes through
the stem and through some option of a layer that changes shape, so the networks cannot tell how those share their time.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .agreement import Agreement, Floats, agreement
from .drift import drift
from .fit import features
from .provenance import Provenance
from .ridge import Ridge
from .rows import Row, check_ms
from .spec import OpSpec
from .table import LatencyTable
from .verdict import EXACT, Verdict, judge

Net = tuple[OpSpec, ...]

MIN_NETS = 20
STRENGTHS = np.logspace(-12, 2, 57)  # of the pull towards the guess, relative to the best determined direction
LEAST = 0.01  # of its guess, below which no op may fall
OUTLIER = 2.5  # standard deviations of an error from which a network counts for less (Huber 1964)
PASSES = 4  # of fitting and of weighing down outliers
DETERMINED = 1e-6  # largest part of an op that may lie outside of what the networks span


@dataclass(frozen=True)
class Rows:
    """Latencies of ops, as fitted.

    Args:
        latency_ms: Of each op, positive; skip ops are absent and cost 0.
        undetermined: Ops whose own latency leans on the guess, however many such networks are timed. Sums over whole
            networks do not.
        strength: Of the pull towards the guess that was chosen.
        freedom: How many numbers the fit took from the networks: fewer than ops where the pull is strong.
        unknowns: How many numbers the networks could tell with no pull and no noise.
    """

    latency_ms: Mapping[OpSpec, float]
    undetermined: frozenset[OpSpec]
    strength: float
    freedom: float
    unknowns: int

    def predict_ms(self, net: Sequence[OpSpec]) -> float:
        """Sum of a network's ops.

        Raises:
            ValueError: It has an op that no network of the fit had.
        """
        lacking = [spec.key for spec in net if not spec.free and spec not in self.latency_ms]
        if lacking:
            raise ValueError(f"No network of the fit has the op {lacking[0]}. Time some networks that do.")
        return sum(self.latency_ms[spec] for spec in net if not spec.free)


@dataclass(frozen=True)
class AdditiveFit:
    """A per-op table fitted from whole networks, and how far it can be trusted.

    Args:
        rows: Fitted on all networks.
        nets: How many different networks that were.
        folds: Into which they were split to be predicted by fits on the others.
        held_out: How well such predictions agree with the timings.
        guess: The same for the smooth guess alone.
        macs: The same for a straight line in the multiply-adds.
        noise: Mean relative error of the timing of a network, from those timed more than once; None without.
        verdict: Whether the device is additive.
    """

    rows: Rows
    nets: int
    folds: int
    held_out: Agreement
    guess: Agreement
    macs: Agreement
    noise: float | None
    verdict: Verdict

    def table(self, provenance: Provenance) -> LatencyTable:
        """The rows as a latency table.

        Raises:
            ValueError: The provenance does not call the table fitted.
        """
        if provenance.source != "fitted":
            raise ValueError(
                f'The source of a table fitted from whole networks is "fitted", not {provenance.source!r}.'
            )
        return LatencyTable(provenance, {spec: Row(spec, (ms,)) for spec, ms in self.rows.latency_ms.items()})

    def __str__(self) -> str:
        """A small table in plain words."""
        noise = "unknown; time some networks several times" if self.noise is None else f"{self.noise:.2%}"
        judged = f"judged on networks left out ({self.folds} folds)"
        lines = [
            f"{len(self.rows.latency_ms)} ops fitted from {self.nets} whole networks, {judged}",
            f"{'':34}{'error':>9}{'bias':>9}{'worst':>9}{'tau':>8}{'R2':>8}",
        ]
        for name, found in (("sum of fitted ops", self.held_out), ("guess", self.guess), ("MACs only", self.macs)):
            lines.append(
                f"{name:34}{found.error:9.2%}{found.bias:+9.2%}{found.worst:9.1%}{found.kendall:8.3f}{found.r2:8.3f}"
            )
        lines.append(f"noise of a timing: {noise}")
        if self.rows.undetermined:
            lines.append(
                f"{len(self.rows.undetermined)} ops share their time with others in every network: their own rows are "
                "partly a guess, sums over whole networks are not"
            )
        return "\n".join([*lines, f"verdict: {self.verdict.sentence}"])


def fit_table(
    nets: Sequence[Sequence[OpSpec]], latencies_ms: Sequence[float], *, folds: int = 10, seed: int = 0
) -> AdditiveFit:
    """Fits the latency of each op from timings of whole networks, and judges whether that is a good description.

    Args:
        nets: Ops of each network in the order in which they run, skip ops included; the networks in the order in which
            they were timed, which tells drift. The same network may come several times: its median counts, and the
            differences tell the noise.
        latencies_ms: One timing for each of `nets`.
        folds: Parts that are left out in turn to judge the fit.
        seed: Of the parts.

    Raises:
        ValueError: Fewer than 20 different networks, lengths that differ, a latency that is not positive, or networks
            that all take as long, to within half a percent or the steps in which their latencies are given.
    """
    distinct, repeats = _grouped(nets, latencies_ms)
    measured = np.array([statistics.median(timings) for timings in repeats])
    _check_varied(measured, np.array(latencies_ms, dtype=np.float64))
    part = np.random.default_rng(seed).permutation(len(distinct)) % folds
    specs = _specs(distinct)
    counts, about = _counts(distinct, specs), np.array([features(spec) for spec in specs])
    macs = counts @ np.array([float(spec.macs) for spec in specs])
    predicted, guessed, lined = np.empty(len(distinct)), np.empty(len(distinct)), np.empty(len(distinct))
    for left_out in range(folds):
        held, kept = part == left_out, part != left_out
        guess = _guess(counts[kept], about, measured[kept])
        latency, *_ = _fit(counts[kept], measured[kept], guess)
        predicted[held], guessed[held] = counts[held] @ latency, counts[held] @ guess
        lined[held] = _line(macs[kept], measured[kept], macs[held])
    rows = fit_rows(distinct, measured.tolist())
    noise = _noise(repeats)
    held_out = agreement(predicted, measured)
    verdict = judge(distinct, predicted, measured, macs, (rows.unknowns, rows.freedom), noise, seed)
    guess_agreement, macs_agreement = agreement(guessed, measured), agreement(lined, measured)
    return AdditiveFit(rows, len(distinct), folds, held_out, guess_agreement, macs_agreement, noise, verdict)


def fit_rows(nets: Sequence[Sequence[OpSpec]], latencies_ms: Sequence[float]) -> Rows:
    """Only the latencies of the ops, without judging them. Arguments and errors as for `fit_table`."""
    distinct, repeats = _grouped(nets, latencies_ms)
    measured = np.array([statistics.median(timings) for timings in repeats])
    specs = _specs(distinct)
    counts = _counts(distinct, specs)
    guess = _guess(counts, np.array([features(spec) for spec in specs]), measured)
    latency, strength, freedom = _fit(counts, measured, guess)
    known, unknowns = _determined(counts)
    undetermined = frozenset(spec for spec, sure in zip(specs, known, strict=True) if not sure)
    return Rows(dict(zip(specs, latency.tolist(), strict=True)), undetermined, strength, freedom, unknowns)


def _grouped(nets: Sequence[Sequence[OpSpec]], latencies_ms: Sequence[float]) -> tuple[list[Net], list[list[float]]]:
    """Different networks with all their timings, in the order in which they came."""
    if len(nets) != len(latencies_ms):
        raise ValueError(f"There are {len(nets)} networks and {len(latencies_ms)} latencies.")
    timings: dict[Net, list[float]] = {}
    for number, (net, latency_ms) in enumerate(zip(nets, latencies_ms, strict=True), start=1):
        check_ms(f"The latency of network {number}", float(latency_ms))
        timings.setdefault(tuple(net), []).append(float(latency_ms))
    if len(timings) < MIN_NETS:
        raise ValueError(
            f"At least {MIN_NETS} different networks are needed to fit a table, better a few hundred; "
            f"there are {len(timings)}."
        )
    return list(timings), list(timings.values())


def _check_varied(measured: Floats, timings: Floats) -> None:
    """Refuse networks that all take as long: one op that all have would explain that, whatever the others cost."""
    low, high = np.quantile(measured, [0.05, 0.95])  # a few wild timings must not hide it
    middle = float(np.median(measured))
    values = np.unique(np.round(timings / middle, 9)) * middle
    step = float(np.diff(values).min()) if len(values) > 1 else 0.0
    if np.clip(measured, low, high).std() > max(step, EXACT * middle):
        return
    about = f"{low:.6g} ms" if low == high else f"{low:.6g} to {high:.6g} ms"
    coarse = f" and are given in steps of {step:.3g} ms" if low < high and step > EXACT * middle else ""
    raise ValueError(
        f"It cannot be told whether the device is additive, nor what an op costs: nearly all of the {len(measured)} "
        f"networks take {about}{coarse}, however different they are. See whether the latencies belong to these "
        "networks; if so, time them with more digits, or many runs in one timing."
    )


def _specs(nets: Sequence[Net]) -> list[OpSpec]:
    return sorted({spec for net in nets for spec in net if not spec.free})


def _counts(nets: Sequence[Net], specs: Sequence[OpSpec]) -> Floats:
    """How often each network runs each op, shape (nets, ops)."""
    column = {spec: index for index, spec in enumerate(specs)}
    counts = np.zeros((len(nets), len(specs)))
    for row, net in enumerate(nets):
        for spec in net:
            if not spec.free:
                counts[row, column[spec]] += 1
    return counts


def _guess(counts: Floats, about: Floats, measured: Floats) -> Floats:
    """Latency of each op as a positive combination of its features, fitted on sums over networks; positive."""
    from scipy.optimize import nnls

    table = counts @ about / measured[:, None]
    scale = np.where(table.max(0) > 0, table.max(0), 1.0)
    weights, _ = nnls(table / scale, np.ones(len(table)))
    guess = about @ (weights / scale)
    return np.asarray(np.maximum(guess, 0.05 * guess.mean()), dtype=np.float64)


def _fit(counts: Floats, measured: Floats, guess: Floats) -> tuple[Floats, float, float]:
    """Latency of each op, the chosen pull towards the guess, and the freedom that it leaves.

    Minimises the squared relative errors plus the pull times the squared relative departures from the guess. The pull
    is the one with the smallest exact leave-one-out error. Networks that even then stand out count for less, and
    drift is taken out of the timings: with a few hundred networks of a server under load that brought the error of
    further networks from 3.5 to 2.9 %.
    """
    steady, weight = measured, np.ones(len(measured))
    for step in range(PASSES):
        table = np.sqrt(weight)[:, None] * counts * guess / steady[:, None]  # times departures, as parts of the guess
        target = np.sqrt(weight) * (1 - counts @ guess / steady)
        ridge = Ridge.of(table, STRENGTHS)
        left_out = ridge.left_out(target)
        best = int((left_out**2).sum(1).argmin())
        if step < PASSES - 1:
            errors = left_out[best] / np.sqrt(weight)
            predicted = steady * np.maximum(1 - errors, LEAST)
            _, drifted = drift(np.log(measured / predicted), predicted, np.random.default_rng(step))
            steady = measured / np.exp(drifted)
            errors = np.abs(1 - predicted / steady)
            weight = np.minimum(1.0, OUTLIER * max(1.4826 * float(np.median(errors)), 1e-6) / np.maximum(errors, 1e-12))
    departures = _bounded(table, target, float(ridge.strengths[best]))
    return guess * (1 + departures), float(STRENGTHS[best]), ridge.freedom(best)


def _bounded(table: Floats, target: Floats, strength: float) -> Floats:
    """Ridge regression with no departure below LEAST - 1: no op becomes free or cheaper than free."""
    from scipy.optimize import nnls

    width = table.shape[1]
    stacked = np.vstack([table, np.sqrt(strength) * np.eye(width)])
    wanted = np.concatenate([target, np.zeros(width)])
    free, *_ = np.linalg.lstsq(stacked, wanted, rcond=None)
    if (free >= LEAST - 1).all():
        return np.asarray(free, dtype=np.float64)
    q, r = np.linalg.qr(stacked)
    above, _ = nnls(r, q.T @ (wanted - stacked.sum(1) * (LEAST - 1)), maxiter=30 * width)
    return np.asarray(above + (LEAST - 1), dtype=np.float64)


def _determined(counts: Floats) -> tuple[list[bool], int]:
    """Which ops the networks determine (those in the space that the rows of `counts` span), and its dimension."""
    _, size, v = np.linalg.svd(counts, full_matrices=False)
    spanned = v[size > 1e-9 * size[0]]
    return [bool(part > 1 - DETERMINED) for part in (spanned**2).sum(0)], len(spanned)


def _line(macs: Floats, measured: Floats, asked: Floats) -> Floats:
    """A straight line in the multiply-adds by least squares on the relative error."""
    table = np.stack([np.ones(len(macs)), macs], axis=1) / measured[:, None]
    weights, *_ = np.linalg.lstsq(table, np.ones(len(macs)), rcond=None)
    line = weights[0] + weights[1] * asked
    return np.asarray(np.maximum(line, 1e-3 * measured.min()), dtype=np.float64)


def _noise(repeats: Sequence[Sequence[float]]) -> float | None:
    """Mean relative error of a network's median, from how much its timings differ from each other."""
    single = [
        statistics.fmean(abs(a - b) for a, b in combinations(timings, 2)) / statistics.median(timings) / 2**0.5
        for timings in repeats
        if len(timings) > 1
    ]
    if not single:
        return None
    return statistics.fmean(single) * statistics.fmean(len(timings) ** -0.5 for timings in repeats)
