"""TVM code against torch: every op and whole networks, natively and under emulation."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tvm_nets import SPECS, deployed, random_network, randomised

import pynas
from cost_models.spec import OpSpec
from cost_models.tvm_build.layers import Concat, Conv, GlobalPool, Linear, Pool, Shuffle, Sum
from pynas.fuse import fuse
from pynas.ops import build as make_op
from pynas.ops.mbconv import OPTIONS, ChannelShuffle
from pynas.registry import SPACES

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'pynas[tvm]'")

from cost_models.tvm_build import TARGETS, Built, build, can_check, check, read_graph, target, why_not
from cost_models.tvm_build.build import shapes
from cost_models.tvm_build.check import compare

pytestmark = pytest.mark.tvm


def on_host(module: nn.Module, shape: tuple[int, ...]) -> Built:
    """Built for this machine and checked."""
    built = build(module, shape, target("host"))
    assert check(built, module, shape) < 1e-5
    return built


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.key)
def test_every_kind_of_op_equals_torch(spec: OpSpec) -> None:
    on_host(*deployed(spec))


@pytest.mark.parametrize("name", list(OPTIONS))
def test_every_fbnet_option_equals_torch(name: str) -> None:
    slot = SPACES.get("fbnet_tiny")().slots()[0]
    spec = OPTIONS.get(name).spec(slot)
    if spec.kind == "skip":
        with pytest.raises(ValueError, match="costs nothing and needs no code"):
            build(*deployed(spec), target("host"))
    else:
        on_host(*deployed(spec))


def test_an_op_is_as_few_kernels_as_it_has_convolutions() -> None:
    spec = OpSpec("mbconv", 16, 16, 8, kernel=3, expansion=2, groups=2, activation="hardswish")
    graph = read_graph(*deployed(spec))
    first, depthwise, last = (step.layer for step in graph.steps)
    assert isinstance(first, Conv)
    assert first.activation == "hardswish"
    assert first.shuffle == 1
    assert isinstance(depthwise, Conv)
    assert depthwise.depthwise
    assert depthwise.shuffle == 1
    assert isinstance(last, Conv)
    assert last.shuffle == 2
    assert last.residual
    assert last.activation == "none"
    assert graph.steps[2].inputs == (2, 0)


def test_batch_norm_that_was_not_folded_costs_no_kernel() -> None:
    spec = OpSpec("mbconv", 8, 8, 8, kernel=3, expansion=2, groups=2)
    module = randomised(make_op(spec))
    built = on_host(module, (1, 8, 8, 8))
    assert len(built.steps) == 3


class Cell(nn.Module):
    """As in DARTS: sums of separable and dilated convolutions and pools, side by side at the end."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        norm = lambda: nn.BatchNorm2d(channels, affine=False)  # noqa: E731
        self.first = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 1, bias=False), norm())
        self.separable = nn.Sequential(
            *self._depthwise(channels, 3, 1), norm(), *self._depthwise(channels, 3, 1), norm()
        )
        self.dilated = nn.Sequential(*self._depthwise(channels, 5, 2), norm())
        self.highest = nn.Sequential(nn.MaxPool2d(3, 1, 1), norm())
        self.average = nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), norm())
        self.reduce = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(4 * channels))

    @staticmethod
    def _depthwise(channels: int, kernel: int, dilation: int) -> list[nn.Module]:
        padding = kernel // 2 * dilation
        depthwise = nn.Conv2d(channels, channels, kernel, 1, padding, dilation, channels, bias=False)
        return [nn.ReLU(), depthwise, nn.Conv2d(channels, channels, 1, bias=False)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        one = self.separable(x) + self.dilated(x)
        two = self.highest(x) + self.average(one) + x
        three = self.separable(one) + two
        four = self.highest(three) + three
        answer: Tensor = self.reduce(torch.cat([one, two, three, four], 1))
        return answer


class TwoReaders(nn.Module):
    """A convolution read both as it is and shuffled: nothing after the shuffle may change it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last = nn.Conv2d(8, 8, 1, groups=2)
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        shuffled = self.shuffle(y).relu()
        answer: Tensor = self.last(self.depthwise(shuffled)) + y + self.depthwise(self.shuffle(y))
        return answer


class HalfHead(nn.Module):
    """Two views of the pooled image, and a sum that starts from 0."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(x, 1)
        answer: Tensor = sum([self.one(pooled.flatten(1)), self.two(pooled).flatten(1)])
        return answer


SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[type] | None]] = {
    "cell": (Cell, (1, 8, 8, 8), None),
    "two readers": (TwoReaders, (2, 8, 6, 6), None),
    "half head": (HalfHead, (3, 6, 4, 4), None),
    "shuffle alone": (lambda: nn.Sequential(ChannelShuffle(4), nn.ReLU6()), (1, 8, 5, 5), [Shuffle, Sum]),
    "pools": (
        lambda: nn.Sequential(
            nn.MaxPool2d(3, 2, 1),
            nn.AvgPool2d(3, 1, 1, count_include_pad=False),
            nn.AvgPool2d(2),
            nn.AvgPool2d(3, 1, 1),
            nn.AdaptiveAvgPool2d((7, 7)),
        ),
        (1, 8, 28, 28),
        [Pool] * 4,
    ),
    "flattened image": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(288, 5), nn.ReLU()),
        (2, 3, 8, 8),
        [Conv, Linear],
    ),
    "linear and norm": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Hardswish()),
        (4, 6),
        [Linear],
    ),
    "head": (
        lambda: nn.Sequential(nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 10)),
        (1, 8, 5, 5),
        [Sum, GlobalPool, Linear],
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_equal_torch(name: str) -> None:
    make, shape, expected = SMALL[name]
    built = on_host(randomised(make()), shape)
    assert expected is None or [type(step.layer) for step in built.steps] == expected
    assert len(built.kernels) == len({step.layer for step in built.steps})


class Tangle(nn.Module):
    """A random network of everything that is supported, with many values that are read more than once."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.parts = nn.ModuleList(self._part() for _ in range(12))
        self.sources = [self.random.randrange(max(0, place - 3), place + 1) for place in range(12)]
        self.partners = [self.random.choice([None, self.random.randrange(place + 1)]) for place in range(12)]

    def _part(self) -> nn.Module:
        channels, groups = 8, self.random.choice([1, 2, 4])
        return self.random.choice(
            [
                lambda: nn.Conv2d(channels, channels, 1, groups=groups),
                lambda: nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
                lambda: nn.Conv2d(channels, channels, 3, padding=2, dilation=2, groups=groups),
                lambda: ChannelShuffle(groups * 2 if groups < 4 else 4),
                lambda: nn.BatchNorm2d(channels),
                nn.ReLU,
                nn.ReLU6,
                nn.Hardswish,
                lambda: nn.MaxPool2d(3, 1, 1),
                lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
                nn.Identity,
            ]
        )()

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for part, source, partner in zip(self.parts, self.sources, self.partners, strict=True):
            made = part(values[source])
            values.append(made if partner is None else made + values[partner])
        return torch.cat(values[-3:], 1)


@pytest.mark.parametrize("seed", range(4))
def test_tangled_networks_equal_torch(seed: int) -> None:
    on_host(randomised(Tangle(seed)), (1, 8, 6, 6))


@pytest.mark.parametrize("folded", [True, False])
def test_a_random_network_of_a_space_equals_torch(folded: bool) -> None:
    module, shape = random_network(seed=3)
    on_host(fuse(module) if folded else module, shape)


def test_torchvision_network_equals_torch() -> None:
    from torchvision.models import mobilenet_v2

    blocks = [[1, 16, 1, 1], [6, 24, 2, 2]]
    module = mobilenet_v2(width_mult=0.5, num_classes=10, inverted_residual_setting=blocks)
    built = on_host(randomised(module), (1, 3, 32, 32))
    assert {type(layer) for layer in built.kernels.values()} == {Conv, GlobalPool, Linear}
    assert len(built.calls) == 1 + 2 + 2 * 3 + 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "vgg16", "fbnet_a"])
def test_large_networks_equal_torch(name: str) -> None:
    from torchvision import models

    size = 224 if name == "vgg16" else 64
    module = pynas.published(name).build() if name == "fbnet_a" else getattr(models, name)()
    on_host(randomised(module), (1, 3, size, size))


REFUSED: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "sigmoid": (nn.Sequential(nn.Conv2d(4, 4, 1), nn.SiLU()), (1, 4, 5, 5), "The operator 'sigmoid' has no kernel"),
    "prelu": (nn.Sequential(nn.Conv2d(4, 4, 1), nn.PReLU()), (1, 4, 5, 5), "The operator .* has no kernel. Supported:"),
    "transposed": (nn.ConvTranspose2d(4, 4, 2), (1, 4, 5, 5), "The operator 'conv2d_transpose' has no kernel"),
    "kernel": (nn.Conv2d(4, 4, (1, 3)), (1, 4, 5, 5), r"'conv2d' has kernel \(1, 3\).* equal in both directions"),
    "ceil_mode": (nn.MaxPool2d(2, ceil_mode=True), (1, 4, 5, 5), "ceil_mode must be False"),
    "adaptive": (nn.AdaptiveAvgPool2d(2), (1, 4, 5, 5), "one must divide the other"),
    "flatten": (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten()), (1, 4, 5, 5), "must be followed by a linear"),
    "identity": (nn.Sequential(nn.Identity(), nn.Dropout()), (1, 4, 5, 5), "costs nothing and needs no code"),
    "channels": (nn.Conv2d(4, 4, 1), (1, 5, 5, 5), "torch.export fails on an input of shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_kernel_is_named(name: str) -> None:
    module, shape, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        build(module.eval(), shape, target("host"))


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training mode.*call \.eval\(\)"):
        build(nn.BatchNorm2d(4), (1, 4, 5, 5), target("host"))


def test_a_wrong_answer_is_an_error() -> None:
    spec = OpSpec("conv", 8, 8, 6, kernel=3)
    module, shape = deployed(spec)
    built = build(module, shape, target("host"))
    with torch.no_grad():
        next(module.parameters())[0] *= 1.01
    with pytest.raises(ValueError, match="The code of thing for host is wrong: it differs from torch by"):
        check(built, module, shape, name="thing")


@pytest.mark.parametrize(
    ("answer", "expected", "message"),
    [
        (np.ones((1, 2)), np.ones((1, 3)), "has shape"),
        (np.ones((2, 3)), np.ones((3, 2)), "has shape"),
        (np.full((1, 2), np.nan), np.ones((1, 2)), "is wrong"),
        (np.zeros((1, 2)), np.zeros((1, 2)), "all zero"),
        (np.ones((1, 2)), np.full((1, 2), np.inf), "not finite"),
    ],
)
def test_answers_that_prove_nothing_are_errors(answer: Any, expected: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(answer, expected, "op")


def test_the_same_numbers_in_another_view_are_no_error() -> None:
    answer = np.arange(3, dtype=np.float32).reshape(1, 1, 1, 3)
    assert compare(answer, answer.reshape(1, 3), "op") == 0
    assert compare(answer + 2e-5, answer.reshape(1, 3), "op") == pytest.approx(1e-5, rel=0.01)
    with pytest.raises(ValueError, match=r"differs from torch by 1\.0e-03 of the largest"):
        compare(answer + 2e-3, answer.reshape(1, 3), "op")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TARGETS if name != "host"])
def test_everything_equals_torch_under_emulation(name: str) -> None:
    chosen = target(name)
    if not can_check(chosen):
        pytest.skip(why_not(chosen))
    for spec in SPECS:
        module, shape = deployed(spec)
        assert check(build(module, shape, chosen), module, shape) < 1e-5
    for make, shape, _ in SMALL.values():
        module = randomised(make())
        assert check(build(module, shape, chosen), module, shape) < 1e-5


def test_missing_tvm_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(ImportError, match=r"TVM is not installed. Install it with: pip install 'pynas\[tvm\]'"):
        build(nn.Conv2d(3, 3, 1).eval(), (1, 3, 4, 4), target("cortex-a72"))


def test_other_layers_have_shapes_too() -> None:
    assert shapes(Concat(1, 2, 2, (3, 5))) == ([(1, 2, 2, 3), (1, 2, 2, 5)], (1, 2, 2, 8))
    assert shapes(Shuffle(1, 2, 2, 4, 2)) == ([(1, 2, 2, 4)], (1, 2, 2, 4))
