"""Latency tables for tests: complete for a space, filled from an analytic model, and labelled as modelled."""

from __future__ import annotations

import dataclasses
from typing import Any

import cost_models
from cost_models import rows
from cost_models.analytic import Roofline
from cost_models.files import write_atomic
from cost_models.provenance import Provenance
from pynas.plan import make_space, space_specs

MODEL = Roofline(gmacs_per_s=2.0, gbytes_per_s=4.0, overhead_us=10.0)


def write_table(name: str, space: str = "fbnet_tiny", options: dict[str, Any] | None = None) -> str:
    """Writes the table of device `name` into the user's data folder and returns the name."""
    runner = dataclasses.replace(cost_models.TorchHost(), name="roofline", source="modelled")
    about = Provenance.of(name, runner, 1)
    specs = [spec for spec in space_specs(make_space(space, options or {})) if not spec.free]
    table = {spec: rows.Row(spec, (MODEL.cost(spec),)) for spec in specs}
    folder = cost_models.device_folder(name)
    folder.mkdir(parents=True)
    write_atomic(folder / "device.toml", about.to_toml(rows=len(table), spread=0.0))
    write_atomic(folder / "latency.csv", rows.to_csv(table, about.identity))
    return name
