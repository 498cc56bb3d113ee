"""Starting populations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from pynas.evolution.genomes import Costs, Floats, Genome, Genomes

Allowed = Callable[[Genome], bool]
Windows = Mapping[str, tuple[float, float]]  # by known goal, least and greatest cost that the limits leave
TRIES = 1000  # uniform draws for each genome wanted
DRAWS = 16  # at a wanted cost, the nearest of which is taken
ROUNDS = 4  # sweeps over the costs
STEEPEST = 1e4  # tilt at which only the cheapest or the dearest options are left
FEW = 100_000  # genomes that can be listed rather than drawn


def random_start(
    genomes: Genomes,
    count: int,
    costs: Mapping[str, Costs],
    windows: Windows,
    allowed: Allowed,
    random: np.random.Generator,
) -> list[Genome]:
    """Different genomes within the known limits, all options equally probable.

    Where the limits leave too little for that, `spread_start` fills up.
    """
    found: dict[Genome, None] = {}
    for attempt in range(TRIES):
        for _ in range(count):
            genome = genomes.draw(random)
            if len(found) < count and allowed(genome):
                found.setdefault(genome)
        if len(found) == count or (attempt > TRIES // 100 and not found):
            break
    if costs and len(found) < count:
        more = spread_start(genomes, count, costs, windows, lambda g: allowed(g) and g not in found, random)
        found |= dict.fromkeys(more[: count - len(found)])
    return list(found)


def spread_start(
    genomes: Genomes,
    count: int,
    costs: Mapping[str, Costs],
    windows: Windows,
    allowed: Allowed,
    random: np.random.Generator,
) -> list[Genome]:
    """Different genomes within the known limits whose known costs lie evenly from the cheapest to the dearest.

    Uniform genomes crowd around the middle of every cost that is a sum; a front needs its ends as well. Several costs
    take turns. Without known costs this is `random_start`.
    """
    if not costs:
        return random_start(genomes, count, costs, windows, allowed, random)
    found: dict[Genome, None] = {}
    tilts = [(_Tilt(genomes, known), windows[name]) for name, known in costs.items()]
    for turn in range(ROUNDS * count):
        if len(found) == count:
            break
        tilt, (low, high) = tilts[turn % len(tilts)]
        # The first round sweeps evenly; later ones fill places that found no new genome at random costs.
        place = turn / max(1, count - 1) if turn < count else random.random()
        genome = tilt.near(low + place * (high - low), lambda g: allowed(g) and g not in found, random)
        if genome is not None:
            found.setdefault(genome)
    return list(found)


STARTS = {"random": random_start, "spread": spread_start}


class _Tilt:
    """Random genomes of a wanted cost: every option drawn with a probability proportional to exp(tilt * cost)."""

    def __init__(self, genomes: Genomes, known: Costs) -> None:
        self._genomes, self._known = genomes, known
        self._mask = genomes.mask()
        cheapest = np.where(self._mask, known.values, np.inf).min(1, keepdims=True)
        self._excess = np.where(self._mask, known.values - cheapest, 0.0)
        self._low, high = known.range(genomes)
        self._room = max(high - self._low, 1e-300)

    def _probabilities(self, tilt: float) -> Floats:
        score = np.where(self._mask, tilt * self._excess / self._room, -np.inf)
        weights = np.exp(score - score.max(1, keepdims=True))
        out: Floats = weights / weights.sum(1, keepdims=True)
        return out

    def near(self, cost: float, allowed: Allowed, random: np.random.Generator) -> Genome | None:
        """Of some draws with that mean cost the allowed genome nearest to it."""
        low, high = -STEEPEST, STEEPEST
        for _ in range(60):
            tilt = (low + high) / 2
            mean = float((self._probabilities(tilt) * self._excess).sum()) + self._low
            low, high = (tilt, high) if mean < cost else (low, tilt)
        cumulative = self._probabilities((low + high) / 2).cumsum(1)
        last = np.array(self._genomes.sizes) - 1  # rounding may leave the sum below 1
        best: tuple[float, Genome] | None = None
        for _ in range(DRAWS):
            drawn = (random.random((len(cumulative), 1)) > cumulative).sum(1)
            genome = self._genomes.canonical(np.minimum(drawn, last).tolist())
            error = abs(self._known.cost(genome) - cost)
            if (best is None or error < best[0]) and allowed(genome):
                best = error, genome
        return None if best is None else best[1]


def remaining(genomes: Genomes, taken: Mapping[Genome, int], allowed: Allowed) -> list[Genome]:
    """Genomes of a small space that are allowed and not taken; none of a large one."""
    if genomes.count > FEW:
        return []
    left = dict.fromkeys(genomes.canonical(genome) for genome in genomes.all())
    return [genome for genome in left if genome not in taken and allowed(genome)]
