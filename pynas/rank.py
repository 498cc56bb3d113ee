"""How well predicted accuracies order networks: rank correlations and top-k regret against a truth, with intervals.

The truth is a table of networks trained alone by others (`read_truth`), or networks that this package trained alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pynas.architecture import Architecture
from pynas.truth import Truth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
FEWEST = 3  # networks; with two, every order is perfect or reversed


class Scored(Protocol):
    """An architecture with an accuracy: a candidate of a run, or a network trained alone."""

    @property
    def architecture(self) -> Architecture: ...

    @property
    def accuracy(self) -> float: ...


class HasCandidates(Protocol):
    """A finished run. Where it has judged more networks than its candidates, `judged` holds all of them."""

    @property
    def candidates(self) -> Sequence[Scored]: ...


Scores = Mapping[str, float] | Mapping[Architecture, float] | Iterable[Scored] | HasCandidates


@dataclass(frozen=True)
class Estimate:
    """A statistic of the networks at hand, with a bootstrap interval over networks.

    Args:
        value: None where it is not defined: all predictions equal, or all truths.
        low: Lower end of the interval, None where the value is.
        high: Upper end.
    """

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None or self.low is None or self.high is None:
            return "not defined"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Ranking:
    """How predictions order networks whose true accuracy is known.

    Args:
        keys: Of the networks: fingerprints, or keys of a table.
        predicted: By network, in the order of `keys`.
        true: The same.
        kendall: Tau-b, which corrects for ties.
        spearman: Correlation of mean ranks, ties sharing theirs.
        regret: For each k the accuracy lost by picking the best of the k networks predicted best instead of the truly
            best of all; where predictions tie at place k, the mean over the ways to break the tie.
        level: Coverage of the intervals.
        truth: What was compared with, in words.
    """

    keys: tuple[str, ...]
    predicted: Floats = field(repr=False)
    true: Floats = field(repr=False)
    kendall: Estimate
    spearman: Estimate
    regret: Mapping[int, Estimate]
    level: float
    truth: str

    @property
    def verdict(self) -> str:
        """One sentence: whether the predictions rank at all."""
        count = len(self.keys)
        for name, values in (("predictions", self.predicted), ("true accuracies", self.true)):
            if len(np.unique(values)) == 1:
                return f"All {count} {name} are {values[0]:.4g}: they order nothing."
        low, high = self.kendall.low, self.kendall.high
        assert low is not None
        assert high is not None
        chance = _chance(self.predicted, self.true)
        if (low > 0 or high < 0) and chance > 1 - self.level:  # of few networks the bootstrap knows too little
            return f"Not resolved with {count} networks: chance alone orders so few like this with p = {chance:.2g}."
        if low > 0:
            return f"Predictions order these {count} networks better than chance."
        if high < 0:
            return f"Predictions order these {count} networks worse than chance."
        return f"Not resolved with {count} networks: the interval of Kendall's tau holds 0."

    def __str__(self) -> str:
        parts = [f"Kendall's tau {self.kendall}", f"Spearman {self.spearman}"]
        parts += [f"top-{k} regret {estimate}" for k, estimate in self.regret.items()]
        return f"{len(self.keys)} networks against {self.truth}: {', '.join(parts)}. {self.verdict}"


def rank(
    predicted: Scores,
    truth: Truth | Scores,
    *,
    k: Sequence[int] = (1, 5, 10),
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Ranking:
    """Compares predicted accuracies with true ones.

    Kendall's tau-b and Spearman's coefficient come from scipy. Intervals are percentiles of a bootstrap over networks;
    resamples in which all predictions or all truths are equal say nothing about order and are left out of the
    correlations.

    Args:
        predicted: By key or by architecture; or things with `architecture` and `accuracy`; or a run, which judged such
            things.
        truth: A table, or the same for networks trained alone (`run.trained` has those of a run). Networks of the truth
            that were not predicted are left out; regret counts from the best of those that were. So are networks of a
            run that were not trained alone.
        k: Sizes of the picks of the regret; those above the number of networks are left out.
        resamples: Of the bootstrap.
        level: Coverage of the intervals.
        seed: Of the bootstrap.

    Raises:
        ValueError: If a predicted network is not in the truth, or the truth is of another space; if there are fewer
            than 3 networks, or a value that is no finite number; if k, resamples or level cannot be.
    """
    _check(k, resamples, level)
    key = truth.key if isinstance(truth, Truth) else _fingerprint
    known = truth.accuracy if isinstance(truth, Truth) else _by_key(truth, _fingerprint)
    name = truth.name if isinstance(truth, Truth) else f"{len(known)} networks trained alone"
    guessed = _by_key(predicted, key)
    some = hasattr(predicted, "candidates") and not isinstance(truth, Truth)
    if some:
        guessed = {word: value for word, value in guessed.items() if word in known}
    missing = [word for word in guessed if word not in known]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(guessed)} predicted networks are not in the truth ({name}), the first is "
            f"{missing[0]!r}. Its keys look like {next(iter(known), 'none at all')!r}: is it of the same space?"
        )
    if len(guessed) < FEWEST:
        folder = getattr(predicted, "folder", "RUN")
        more = f" Train more of the run's networks alone: pynas retrain {folder} --net NUMBER" if some else ""
        raise ValueError(f"Ranking needs at least {FEWEST} networks, not {len(guessed)}.{more}")
    keys = tuple(guessed)
    a, b = np.array([guessed[word] for word in keys]), np.array([known[word] for word in keys])
    for word, left, right in zip(keys, a, b, strict=True):
        if not (math.isfinite(left) and math.isfinite(right)):
            raise ValueError(f"Network {word!r} has the predicted value {left} and the true one {right}.")
    random = np.random.default_rng(seed)
    draws = [random.integers(len(keys), size=len(keys)) for _ in range(resamples)]
    return Ranking(
        keys,
        a,
        b,
        _estimate(_kendall, a, b, draws, level),
        _estimate(_spearman, a, b, draws, level),
        {size: _estimate(_Regret(size), a, b, draws, level) for size in k if size <= len(keys)},
        level,
        name,
    )


def _check(k: Sequence[int], resamples: int, level: float) -> None:
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in k):
        raise ValueError(f"Each k must be a whole number of at least 1, not {list(k)!r}.")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples must be at least 1 and level between 0 and 1, not {resamples!r} and {level!r}.")


def _fingerprint(architecture: Architecture) -> str:
    return architecture.fingerprint


def _by_key(scores: Scores, key: Any) -> dict[str, float]:
    """Scores by key. Raises ValueError when a network comes twice with different scores."""
    if isinstance(scores, Mapping):
        pairs: Iterable[tuple[Any, float]] = scores.items()
    else:
        things: Iterable[Scored] = getattr(scores, "judged", ()) or getattr(scores, "candidates", scores)
        pairs = [(thing.architecture, thing.accuracy) for thing in things]
    found: dict[str, float] = {}
    for what, value in pairs:
        word = key(what) if isinstance(what, Architecture) else str(what)
        if word in found and found[word] != float(value):
            raise ValueError(f"Network {word!r} comes twice, with {found[word]:g} and with {float(value):g}.")
        found[word] = float(value)
    return found


def _kendall(a: Floats, b: Floats) -> float | None:
    from scipy.stats import kendalltau

    return None if _constant(a) or _constant(b) else float(kendalltau(a, b, variant="b").statistic)


def _chance(a: Floats, b: Floats) -> float:
    """Probability that a random order has a Kendall's tau as far from 0 (exact where there are no ties)."""
    from scipy.stats import kendalltau

    return float(kendalltau(a, b, variant="b").pvalue)


def _spearman(a: Floats, b: Floats) -> float | None:
    from scipy.stats import spearmanr

    return None if _constant(a) or _constant(b) else float(spearmanr(a, b).statistic)


def _constant(values: Floats) -> bool:
    return bool((values == values[0]).all())


@dataclass(frozen=True)
class _Regret:
    size: int

    def __call__(self, a: Floats, b: Floats) -> float:
        """Best of all minus the mean, over ways to break ties, of the best of the `size` predicted best."""
        last = np.sort(a)[-self.size]
        sure, tied = b[a > last], np.sort(b[a == last])
        best = sure.max() if len(sure) else -np.inf
        open_places = self.size - len(sure)
        # The best of `open_places` drawn from t tied networks is the j-th smallest in C(j - 1, places - 1) of the
        # C(t, places) ways to draw.
        ways = np.array([math.comb(below, open_places - 1) for below in range(len(tied))], dtype=np.float64)
        lost = b.max() - (np.maximum(tied, best) * (ways / ways.sum())).sum()
        return max(0.0, float(lost))  # a mean of equal numbers may round above them


def _estimate(statistic: Any, a: Floats, b: Floats, draws: Sequence[NDArray[Any]], level: float) -> Estimate:
    value = statistic(a, b)
    if value is None:
        return Estimate(None)
    drawn = [found for draw in draws if (found := statistic(a[draw], b[draw])) is not None]
    if not drawn:
        return Estimate(value, value, value)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def scatter(ranking: Ranking, *, colours: Mapping[str, float] | None = None, colour_name: str = "") -> Figure:
    """Predicted against true accuracy, a point a network, as a matplotlib figure.

    Args:
        ranking: What `rank` found.
        colours: A number for every network by key, for instance its MACs; shown as colour.
        colour_name: What the numbers are.

    Raises:
        ValueError: If `colours` leaves a network out.
    """
    from matplotlib.figure import Figure

    numbers = None
    if colours is not None:
        missing = [word for word in ranking.keys if word not in colours]
        if missing:
            raise ValueError(f"colours lacks {len(missing)} networks, the first is {missing[0]!r}.")
        numbers = [colours[word] for word in ranking.keys]
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    points = axes.scatter(ranking.predicted, ranking.true, s=14, c=numbers, alpha=0.8, linewidths=0)
    if numbers is not None:
        figure.colorbar(points, ax=axes, label=colour_name)
    axes.set_xlabel("predicted accuracy")
    axes.set_ylabel("true accuracy")
    axes.set_title(f"{len(ranking.keys)} networks\nKendall's tau {ranking.kendall}", fontsize=10)
    axes.grid(alpha=0.3)
    return figure


def check_png(path: str | Path) -> None:
    """Raises ValueError for the name of a picture that does not end in ".png"."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"Pictures are written as PNG, not as {Path(path).name!r}. Give a name that ends in .png.")


def write_png(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Writes a figure atomically and returns the path.

    Raises:
        ValueError: If the name ends otherwise than in ".png".
        OSError: Where it cannot be written.
    """
    import io

    from cost_models.files import write_atomic

    check_png(path)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
    return Path(path)
