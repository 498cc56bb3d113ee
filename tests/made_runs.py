"""A search of cells that was made up, for what needs its traces and not its accuracy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pynas import Architecture
from pynas.ops.cell import NONE
from pynas.results import Run, write_candidates
from pynas.spaces.cell import CellSpace
from pynas.strategies import Candidate
from pynas.training.run import RunFolder

SPACE = CellSpace(input_size=8, cells=3, channels=2, nodes=3)
NOTHING = {choice.name: (NONE,) for choice in SPACE.choices()}


def cell_run(folder: Path) -> Run:
    """Three epochs in which edges die, without a table and untrained."""
    config = {
        "space": "cell",
        "space_options": SPACE.options(),
        "strategy": {"name": "snas", "settings": {"epochs": 3}},
        "data": "digits",
        "device": "board",
        "latency_ms": None,
        "objectives": None,
        "seed": 0,
    }
    run = RunFolder.create(folder, config)
    chosen = NOTHING | {
        "normal_0_2": ("sep_conv_5x5",),
        "normal_1_3": ("skip_connect",),
        "reduce_0_2": ("max_pool_3x3",),
    }
    write_candidates(run, [Candidate(Architecture("cell", chosen, SPACE.options()), 0.5, 1.0, "argmax", 10, 20)])
    history = np.zeros((3, len(NOTHING), 8), dtype=np.float32)
    history[0, :, 4] = 1.0
    history[1, :, 0] = history[2, :, 0] = 1.0
    history[1, :2, 3] = history[2, 0, 3] = 2.0
    run.write_array("theta.npy", history)
    for epoch in range(3):
        entropy = [1.0 / (epoch + 1)] * len(NOTHING)
        told = {"temperature": 1 - 0.3 * epoch, "expected_cost": 1.0, "entropy": entropy, "train_accuracy": 0.4}
        run.log("search", epoch, {"loss": 2.0 - epoch / 2, **told, "credit": dict.fromkeys(NOTHING, 0.1 * epoch)})
    return Run.open(run.path)
