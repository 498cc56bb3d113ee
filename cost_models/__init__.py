"""What an op costs on a device. Knows op shapes, never networks; imports nothing of pynas.

    >>> from cost_models import Macs, OpSpec
    >>> Macs().cost(OpSpec("conv", in_channels=3, out_channels=16, size=32, kernel=3))
    442368.0

What lies where
- ops and prices: spec, base, analytic; table, rows, provenance, fit; places (where tables lie).
- filling a table: plan, measure, steady; runners, with timing, machine, compiling and compile_worker shared by
  ort_local, tvm_local and tvm_rpc (boards, alike, rpc_address, board_session, process; board.py runs on the board);
  torch_training times training steps.
- code for a CPU: tvm_build. Its cost without a board: tvm_model.
- trusting a table: trust, agreement; fitting one from whole networks: additive, verdict, drift, ridge.

To add
- a device: `pynas measure --space SPACE --device NAME` writes the folder NAME (device.toml, latency.csv) to the user's
  data directory; copying it to `cost_models/devices/` ships it.
- rows from elsewhere: build a `LatencyTable` of `Provenance` and `Row`s and call its `copy_to(folder)`.
- a model: one class with the members of `CostModel` (base.py) in its own file beside table.py. One that needs no
  numbers from the user goes into `analytic.COUNTS`; the contract tests take it from there.
- a runner (another runtime or board): one class with the members of `Runner` in `runners.RUNNERS`.
- a target, or code for another kind of layer: see `tvm_build`. A modelled core: a TOML file in `tvm_model/cores/`.
- a kind of op: one entry in `spec.KINDS`.
"""

from .analytic import COUNTS, Macs, MemoryTraffic, Params, Roofline, TrainingMemory
from .base import CostModel
from .measure import host_table, measure, training_table
from .places import Device, device_folder, devices, find, load
from .provenance import Provenance
from .rows import Row
from .runners import RUNNERS, Runner, TorchHost, make_runner, options_of
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
    "TrainingMemory",
    "device_folder",
    "devices",
    "find",
    "host_table",
    "load",
    "load_folder",
    "make_runner",
    "measure",
    "options_of",
    "training_table",
]
