"""A device that exists for the tests of cost models only: its ops, its latencies, and a runner with a tame clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cost_models import LatencyTable, OpSpec, Provenance, Row

MBCONV = OpSpec("mbconv", 16, 24, 8, kernel=3, stride=2, expansion=6)
CONV = OpSpec("conv", 3, 16, 16, kernel=3)
POOL = OpSpec("pool", 16, 16, 4)
LINEAR = OpSpec("linear", 16, 10, 1)
SKIP = OpSpec("skip", 16, 16, 8)
ABOUT = Provenance(
    "toy", "measured", "clockwork", "fp32", 1, 1, "v1", 3, "2026-01-02", {"cpu": "Z80"}, {"clockwork": "1.0"}
)


def additive_ms(spec: OpSpec) -> float:
    """A machine on which latency is what the fit believes."""
    layers = spec.layers
    shuffles = sum(layer.op == "shuffle" for layer in layers)
    moved = sum(layer.reads + layer.writes for layer in layers)
    return 0.05 + 0.02 * shuffles + spec.macs * 2e-7 + moved * 3e-7 + spec.params * 1e-7


def toy_rows() -> dict[OpSpec, Row]:
    blocks = [
        OpSpec("mbconv", c, out, size, kernel=k, stride=t, groups=g, expansion=e)
        for c, out, size, t in ((16, 16, 16, 1), (16, 24, 16, 2), (24, 24, 8, 1), (24, 32, 8, 2))
        for k, e, g in ((3, 1, 1), (3, 1, 2), (3, 3, 1), (5, 3, 1), (5, 6, 1))
    ]
    return {
        spec: Row(spec, tuple(additive_ms(spec) * f for f in (0.98, 1, 1.03))) for spec in [*blocks, CONV, POOL, LINEAR]
    }


def toy_table(*, strict: bool = False) -> LatencyTable:
    return LatencyTable(ABOUT, toy_rows(), strict=strict)


OPS = sorted(toy_rows())


@dataclass
class Clockwork:
    """A runner whose clock goes as it is told; stops the run after `stop_after` timings."""

    threads: int = 1
    stop_after: int = 10**9
    stop_with: type[BaseException] = KeyboardInterrupt
    factors: tuple[float, ...] = (1.0,)  # of the true latency, in turn
    timed: list[OpSpec] = field(default_factory=list)
    name: str = "clockwork"
    source: str = "measured"
    precision: str = "fp32"
    batch: int = 1
    schedule: str = "v1"
    cpu: str = "Z80"

    def provenance(self) -> dict[str, dict[str, str | int]]:
        return {"machine": {"cpu": self.cpu}, "software": {"clockwork": "1.0"}}

    def time_ms(self, module: Any, spec: OpSpec, repeats: int) -> list[float]:
        if len(self.timed) >= self.stop_after:
            raise self.stop_with
        self.timed.append(spec)
        return [additive_ms(spec) * self.factors[len(self.timed) % len(self.factors)]] * repeats


class Reference(nn.Module):
    """The op of a spec, written out a second time in torch: one activation module, BN not folded."""

    def __init__(self, spec: OpSpec) -> None:
        super().__init__()
        self.spec = spec
        hidden = spec.expansion * spec.in_channels
        self.first = self.conv(spec.in_channels, hidden, groups=spec.groups) if spec.kind == "mbconv" else None
        if spec.kind == "mbconv":
            self.depthwise = self.conv(hidden, hidden, spec.kernel, spec.stride, hidden, spec.dilation)
            self.last = self.conv(hidden, spec.out_channels, groups=spec.groups)
            middle = spec.squeeze
            self.excite = nn.Sequential(nn.Linear(hidden, middle), nn.Linear(middle, hidden)) if middle else None
        elif spec.kind == "sep_conv":
            self.only = nn.Sequential(
                self.separable(spec, spec.in_channels, spec.stride), self.separable(spec, spec.out_channels, 1)
            )
        elif spec.kind == "dil_conv":
            self.only = self.separable(spec, spec.out_channels, spec.stride)
        elif spec.kind == "reduce":
            channels = spec.in_channels, spec.out_channels // 2
            self.halves = nn.ModuleList(nn.Conv2d(*channels, 1, spec.stride, bias=False) for _ in range(2))
            self.only = nn.BatchNorm2d(spec.out_channels, affine=bool(spec.affine))
        elif spec.kind.endswith("_bn"):
            self.only = nn.BatchNorm2d(spec.out_channels, affine=bool(spec.affine))
        elif spec.kind == "relu_conv":
            self.only = self.conv(spec.in_channels, spec.out_channels, spec.kernel, spec.stride)
            self.only[1] = nn.BatchNorm2d(spec.out_channels, affine=bool(spec.affine))
        elif spec.kind == "conv":
            self.only = self.conv(
                spec.in_channels, spec.out_channels, spec.kernel, spec.stride, spec.groups, spec.dilation
            )
        elif spec.kind == "linear":
            self.only = nn.Linear(spec.in_channels, spec.out_channels)
        elif spec.kind == "norm":
            self.only = nn.BatchNorm2d(spec.in_channels)
        elif spec.kind in ("row", "column"):
            shape = (1, spec.kernel) if spec.kind == "row" else (spec.kernel, 1)
            padding = (shape[0] // 2, shape[1] // 2)
            conv = nn.Conv2d(spec.in_channels, spec.out_channels, shape, spec.stride, padding, 1, spec.groups, False)
            self.only = nn.Sequential(conv, nn.BatchNorm2d(spec.out_channels))
        elif spec.kind == "pointwise_conv":
            outer = self.conv(hidden, spec.out_channels, spec.kernel, spec.stride, spec.groups)
            self.only = nn.Sequential(self.conv(spec.in_channels, hidden, groups=spec.groups), outer)
        elif spec.kind == "pointwise_avg":
            pool = nn.AvgPool2d(spec.kernel, spec.stride, spec.kernel // 2)
            first = self.conv(spec.in_channels, spec.out_channels, groups=spec.groups)
            self.only = nn.Sequential(first, pool, nn.BatchNorm2d(spec.out_channels))

    @staticmethod
    def conv(cin: int, cout: int, kernel: int = 1, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Module:
        padding = kernel // 2 * dilation
        return nn.Sequential(
            nn.Conv2d(cin, cout, kernel, stride, padding, dilation, groups, bias=False), nn.BatchNorm2d(cout)
        )

    @staticmethod
    def separable(spec: OpSpec, channels: int, stride: int) -> nn.Module:
        cin, padding = spec.in_channels, spec.kernel // 2 * spec.dilation
        return nn.Sequential(
            nn.Conv2d(cin, cin, spec.kernel, stride, padding, spec.dilation, groups=cin, bias=False),
            nn.Conv2d(cin, channels, 1, bias=False),
            nn.BatchNorm2d(channels, affine=bool(spec.affine)),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.kind == "pool":
            return x.mean((2, 3), keepdim=True)
        if self.spec.kind == "none":
            return 0 * x[:, :, :: self.spec.stride, :: self.spec.stride]
        if self.spec.kind == "reduce":
            return self.only(torch.cat([half(x) for half in self.halves], 1))
        if "_pool" in self.spec.kind:
            y = nn.functional.max_pool2d(x, self.spec.kernel, self.spec.stride, self.spec.kernel // 2)
            return self.only(y) if self.spec.kind.endswith("_bn") else y
        if self.first is not None:
            y: Tensor = self.depthwise(self.first(x))
            y = self.last(y if self.excite is None else y * self.excite(y.mean((2, 3)))[..., None, None])
            return x + y if self.spec.stride == 1 and self.spec.in_channels == self.spec.out_channels else y
        return self.only(x) if self.spec.kind != "skip" else x


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
