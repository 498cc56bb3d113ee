"""A search that takes seconds, for tests: its settings, and copies of what it left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pynas import FBNet, Recipe, Run

SPACE = {"input_size": 8, "stages": [[8, 1, 1], [16, 2, 2]], "head_channels": 32}
QUICK: dict[str, Any] = {
    "strategy": FBNet(epochs=3, warmup_epochs=1, batch_size=48, samples=2, weight_lr=0.05),
    "recipe": Recipe(epochs=3, batch_size=48),
    "space_options": SPACE,
    "limit": 300,
    "baseline": 1,
    "quiet": True,
}


def copied(run: Run, folder: Path) -> Run:
    """A run folder of the test's own, so that several tests share the search and none its traces."""
    return Run.open(shutil.copytree(run.folder, folder / run.folder.name))
