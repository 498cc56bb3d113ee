"""Which tile of a layer is fastest on this machine: the first few of `kernels.tiles`, compiled and timed.

This takes the place of TVM's MetaSchedule, whose builders take minutes to import, and whose search space, that of
scheduled loops, these kernels do not have: they are written by hand, and only their tiles are open.

Two workers of `compiling` may time at once. That is tolerable: each is timed by the CPU time of its own thread, all
candidates of a layer take turns, and what the other worker does to the memory they share hits all of them alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import write_atomic
from ..steady import in_rounds, settled
from ..timing import runs_ms
from .build import shapes
from .graph import Graph, Step
from .layers import Layer
from .targets import Target, import_tvm

if TYPE_CHECKING:
    from .kernels import Tile

SEARCH_ROUNDS, FINAL_ROUNDS = 5, 9
MARGIN = 0.03  # by which a tile must beat the default, so that noise chooses nothing

Timers = Mapping["Tile", Callable[[], float]]


@dataclass(frozen=True)
class Choice:
    """The tile that a layer gets.

    Args:
        layer: What it computes.
        tile: The fastest, or the default.
        default: The best guess, without tuning.
        tried: How many were timed.
        speedup: Time of the default over that of `tile`; 1 for the default.
    """

    layer: Layer
    tile: Tile
    default: Tile
    tried: int
    speedup: float

    def note(self) -> dict[str, Any]:
        """For readers, in JSON."""
        tiles = {"tile": self.tile._asdict(), "default": self.default._asdict()}
        kind = type(self.layer).__name__
        return {"layer": {"kind": kind, **asdict(self.layer)}, **tiles, "tried": self.tried, "speedup": self.speedup}


def check_tune(tune: int) -> None:
    """Raise ValueError unless a number of tiles is a whole number of at least 0."""
    if isinstance(tune, bool) or not isinstance(tune, int) or tune < 0:
        raise ValueError(
            f"tune is {tune!r}; it must be a whole number: how many tiles to try per layer, such as 4, or 0 for none."
        )


def tune_graph(graph: Graph, target: Target, tune: int, memory: Path | None = None) -> list[Choice]:
    """Finds the tile of each distinct layer; takes one to three seconds per layer for four tiles.

    Args:
        graph: From `graph.read_graph`.
        target: This machine.
        tune: How many tiles of a layer to try; fewer where it has fewer.
        memory: Folder of earlier choices under the same conditions, so that a layer has one tile in all ops and
            networks, and is timed once. Made if it does not exist.

    Raises:
        ValueError: `tune` is negative, or the target is another machine.
        ImportError: TVM is not installed.
        OSError: the memory cannot be written.
    """
    check_tune(tune)
    if not target.native:
        raise ValueError(f"Tiles for {target.name} cannot be timed on this machine; leave out --tune.")
    steps: dict[Layer, Step] = {}
    for step in graph.steps:
        steps.setdefault(step.layer, step)
    return [_tune_layer(step, target, tune, memory) for step in steps.values()]


def _tune_layer(step: Step, target: Target, tune: int, memory: Path | None) -> Choice:
    from .kernels import Tile, tiles

    default, *others = tiles(step.layer, target)
    tried = [default, *others[: max(0, tune - 1)]]
    if len(tried) == 1:
        return Choice(step.layer, default, default, 1, 1.0)
    if memory is None:
        return Choice(step.layer, *_chosen(step, target, tried))
    told = json.dumps([repr(step.layer), [list(tile) for tile in tried]])
    known = memory / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(FileNotFoundError):
        tile, speedup = json.loads(known.read_text())
        return Choice(step.layer, Tile(*tile), default, len(tried), speedup)
    choice = Choice(step.layer, *_chosen(step, target, tried))
    memory.mkdir(parents=True, exist_ok=True)
    write_atomic(known, json.dumps([choice.tile, choice.speedup]))
    return choice


def _chosen(step: Step, target: Target, tried: Sequence[Tile]) -> tuple[Tile, Tile, int, float]:
    tile, speedup = choose(timers(step, target, tried))
    return tile, tried[0], len(tried), speedup


def choose(take: Timers) -> tuple[Tile, float]:
    """The fastest of several tiles, and the time of the default over its time.

    The fastest is timed once more against the default, so that it is not the luckiest: it must be 3 % faster.

    Args:
        take: Takes one latency of a tile in ms; the default first.
    """
    default = next(iter(take))
    found = _medians(take, SEARCH_ROUNDS)
    best = min(found, key=found.__getitem__)
    if best == default:
        return default, 1.0
    again = _medians({tile: take[tile] for tile in (default, best)}, FINAL_ROUNDS)
    if again[best] > (1 - MARGIN) * again[default]:
        return default, 1.0
    return best, again[default] / again[best]


def _medians(take: Timers, rounds: int) -> dict[Tile, float]:
    """Latencies in ms, taken in turns like the rows of a table."""
    taken: dict[Tile, list[float]] = {tile: [] for tile in take}
    for _ in in_rounds(take, taken, rounds):
        pass
    return {tile: statistics.median(settled(latencies, rounds)) for tile, latencies in taken.items()}


def timers(step: Step, target: Target, tiles: Sequence[Tile]) -> dict[Tile, Callable[[], float]]:
    """Compiles a layer with several tiles; each function takes one latency in ms, as the rows of a table are taken.

    All tiles read the same random inputs and write the same output; their packed parameters are their own.
    """
    from .kernels import kernel

    tvm = import_tvm()
    made = {tile: kernel(step.layer, target, tile) for tile in tiles}
    names = {tile: f"tile_{index}" for index, tile in enumerate(made)}
    functions = {names[tile]: written.func.with_attr("global_symbol", names[tile]) for tile, written in made.items()}
    with tvm.transform.PassContext(opt_level=3):
        code = tvm.compile(tvm.IRModule(functions), target=target.tvm())
    random = np.random.default_rng(0)
    wanted, shape = shapes(step.layer)
    inputs = [tvm.runtime.tensor(random.standard_normal(size, dtype=np.float32)) for size in wanted]
    output = tvm.runtime.tensor(np.zeros(shape, np.float32))
    ready: dict[Tile, Callable[[], float]] = {}
    for tile, written in made.items():
        packed = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in written.pack(list(step.params))]
        ready[tile] = partial(_time_ms, partial(code[names[tile]], *inputs, *packed, output))
    return ready


def _time_ms(run: Callable[[], Any]) -> float:
    return runs_ms(run, 1, 1)[0]
