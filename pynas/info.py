"""What is installed, built and known here, and why something is missing."""

from __future__ import annotations

import os
import platform
import shlex

import torch

import cost_models
from pynas import kernels
from pynas.console import Show
from pynas.export import FORMATS
from pynas.plan import kernels_used
from pynas.registry import SPACES, STRATEGIES
from pynas.training.run import environment


def info() -> None:
    """Prints versions, kernels and their instruction set, GPUs, export formats, devices, spaces and strategies."""
    show = Show()
    env = environment()
    rows = [("python", env["python"]), ("system", env["system"]), ("cores", str(os.cpu_count() or "unknown"))]
    rows += [("torch threads", str(torch.get_num_threads()))]
    rows += [(name, version) for name, version in env["packages"].items()]
    rows += [(f"kernels: {name}", str(value)) for name, value in kernels.facts().items()]
    rows += [(f"kernels: space {name}", kernels_used(make())) for name, make in SPACES.items()]
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none (torch sees no CUDA device)"
    rows += [("GPU", gpu), ("machine", platform.machine())]
    for name, exporter in FORMATS.items():
        missing = " ".join(map(shlex.quote, exporter.missing().split()))
        precisions = "float32, int8" if exporter.quantise is not None else "float32"
        rows.append((f"export: {name}", f"needs pip install {missing}" if missing else precisions))
    rows += [(f"device: {device.name}", f"{device.source}, {device.rows} rows") for device in cost_models.devices()]
    rows += [("spaces", ", ".join(SPACES.names())), ("strategies", ", ".join(STRATEGIES.names()))]
    show.table("pynas", ("what", "value"), rows)
