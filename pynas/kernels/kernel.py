"""The record that describes a kernel to the tests, the benchmark and the reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Kernel:
    """One kernel: three ways to call the same mathematics, and arguments to try them with.

    Args:
        name: Unique; the key in `pynas.kernels.ALL`.
        op: The operator registered with torch.library, for torch.compile and torch.export.
        function: The hot path: the same arguments and results, with less overhead.
        reference: What the kernel must compute, in plain PyTorch.
        samples: Argument tuples on a device, floating point ones of a dtype; tensors that take a gradient require it.
        differentiable: Whether any argument takes a gradient.
        results: How many outputs there are; what `op` returns beyond them is for its backward pass. None: all.
        same_bits: Whether every instruction set gives the same bits.
        tolerance: Relative and absolute, within which `function` and `op` meet the reference in float32.
    """

    name: str
    op: Callable[..., Any]
    function: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[torch.device, torch.dtype], list[tuple[Any, ...]]]
    differentiable: bool = True
    results: int | None = None
    same_bits: bool = True
    tolerance: tuple[float, float] = (1e-5, 1e-6)
