"""Numbers of a step for logs: floats, or on a GPU tensors that are read for many steps at once.

Reading one makes the CPU wait for all that the GPU has still to do, when it could hand it more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Metric = float | Tensor


def told(value: Tensor) -> Metric:
    """A scalar as a float; one that is not on the CPU stays there, without its graph."""
    return float(value.detach()) if value.is_cpu else value.detach()


def mean_of(values: Sequence[Metric]) -> Metric:
    """Mean of several."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if tensors:
        return torch.stack(tensors).mean()
    return math.fsum(values) / len(values)


def range_of(values: Sequence[Metric]) -> Metric:
    """The largest less the smallest."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if tensors:
        return torch.stack(tensors).max() - torch.stack(tensors).min()
    return max(values) - min(values)


def as_floats(records: Sequence[Mapping[str, Metric]]) -> list[dict[str, float]]:
    """Metrics of several steps as numbers, with one transfer for all that are on a GPU."""
    tensors = [value for record in records for value in record.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    return [
        {name: next(numbers) if isinstance(value, Tensor) else value for name, value in record.items()}
        for record in records
    ]
