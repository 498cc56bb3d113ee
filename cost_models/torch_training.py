"""Times a training step of one op in torch on this machine: forward and backward, with all gradients."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .runners import TorchHost
from .spec import OpSpec
from .timing import SWEEP_BYTES, check_threads, clock, input_shape, no_gc
from .torch_threads import torch_threads

LONG_MS = 20.0


@dataclass
class TorchTraining:
    """Times modules in training mode: fp32, eager, one step of `batch` images, with the caches swept before."""

    threads: int = 1
    batch: int = field(default=64, kw_only=True)
    name: str = field(default="torch-train", kw_only=True)
    source: str = field(default="measured", kw_only=True)
    precision: str = field(default="fp32", kw_only=True)
    schedule: str = field(default="eager-1", kw_only=True)

    def __post_init__(self) -> None:
        check_threads(self.threads)

    def provenance(self) -> dict[str, dict[str, str | int]]:
        return TorchHost(self.threads).provenance()

    def time_ms(self, module: Any, spec: OpSpec, repeats: int) -> list[float]:
        return self._time(module, input_shape(spec, self.batch), repeats)

    def net(self, module: Any, input_shape: tuple[int, ...]) -> Callable[[], float]:
        return lambda: self._time(module, input_shape, 1)[0]

    def _time(self, module: Any, shape: tuple[int, ...], repeats: int) -> list[float]:
        import torch

        random = torch.Generator().manual_seed(0)
        fast = {"memory_format": torch.channels_last} if len(shape) == 4 else {}  # as in training
        x = torch.randn(shape, generator=random).contiguous(**fast).requires_grad_()
        module = module.to(**fast)
        with torch_threads(self.threads), no_gc():
            gradient = torch.randn(module(x).shape, generator=random)

            def step() -> None:
                x.grad = None
                module.zero_grad(set_to_none=True)
                module(x).backward(gradient)

            step()  # the first allocates and chooses algorithms
            sweep, now = torch.ones(SWEEP_BYTES // 4).sum, clock(self.threads)

            def once_ms() -> float:
                sweep()
                begin = now()
                step()
                return (now() - begin) * 1e-6

            found = []
            for _ in range(repeats):
                first = once_ms()  # a step of a large op takes long: only short ones are taken several times
                found.append(first if first > LONG_MS else statistics.median([first, once_ms(), once_ms()]))
            return found
