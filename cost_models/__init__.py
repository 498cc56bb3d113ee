"""What an op costs on a device. Knows op shapes, never networks; imports nothing of pynas.

    >>> from cost_models import Macs, OpSpec
    >>> Macs().cost(OpSpec("conv", in_channels=3, out_channels=16, size=32, kernel=3))
    442368.0

To add
- a device: `pynas measure --space SPACE --device NAME` writes the folder NAME (device.toml, latency.csv) to the user's
  data directory; copying it to `cost_models/devices/` ships it.
- rows from elsewhere: build a `LatencyTable` of `Provenance` and `Row`s and call its `copy_to(folder)`.
- a model: one class with the members of `CostModel` (base.py) in its own file beside table.py. One that needs no
  numbers from the user goes into `analytic.COUNTS`; the contract tests take it from there.
- a runner (another runtime or board): one class with the members of `Runner` in `runners.RUNNERS`.
- a kind of op: one entry in `spec.KINDS`.
"""

from .analytic import COUNTS, Macs, MemoryTraffic, Params, Roofline
from .base import CostModel
from .measure import host_table, measure
from .places import Device, device_folder, devices, load
from .provenance import Provenance
from .rows import Row
from .runners import RUNNERS, Runner, TorchHost
from .spec import OpSpec
from .table import LatencyTable, load_folder

__all__ = [
    "COUNTS",
    "RUNNERS",
    "CostModel",
    "Device",
    "LatencyTable",
    "Macs",
    "MemoryTraffic",
    "OpSpec",
    "Params",
    "Provenance",
    "Roofline",
    "Row",
    "Runner",
    "TorchHost",
    "device_folder",
    "devices",
    "host_table",
    "load",
    "load_folder",
    "measure",
]
