"""Folding batch norms must change nothing but the number of layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pynas.fuse import fold_conv_bn, fuse, relative_difference

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3, "padding": 1, "bias": False},
    "pointwise": {"kernel_size": 1},
    "grouped": {"kernel_size": 1, "groups": 2, "bias": False},
    "depthwise": {"kernel_size": 5, "padding": 2, "stride": 2, "groups": 8},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "reflecting": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
}


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Tapped(nn.Sequential):
    """Uses what its first module answers a second time, so folding the second into it is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        y = self[0](x)
        return self[1](y) + y


class Activated(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def randomised(net: nn.Module) -> nn.Module:
    """Batch norms as after a training."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.normal_(0, 0.5)
                    module.running_var.uniform_(0.3, 3)
                if module.affine:
                    module.weight.uniform_(-1.5, 1.5)
                    module.bias.normal_(0, 0.5)
    return net


def pair(channels: int = 8) -> list[nn.Module]:
    return [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]


def norms(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)]


def assert_same(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    reference = copy.deepcopy(net).eval()
    with torch.no_grad():
        assert relative_difference(reference(x.clone()), fused(x.clone())) < 1e-5


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 8, 9, 9)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_every_kind_of_convolution(options: dict[str, Any], affine: bool, x: Tensor) -> None:
    net = randomised(nn.Sequential(nn.Conv2d(8, 8, **options), nn.BatchNorm2d(8, affine=affine), nn.ReLU()))
    fused = fuse(net, x)
    assert norms(fused) == []
    assert_same(net, fused, x)


@settings(deadline=None, max_examples=40)
@given(
    groups=st.integers(1, 3),
    width=st.integers(1, 3),
    kernel=st.sampled_from([1, 2, 3]),
    bias=st.booleans(),
    affine=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3, 0.1]),
    seed=st.integers(0, 2**31),
)
def test_folding_is_exact(
    groups: int, width: int, kernel: int, bias: bool, affine: bool, eps: float, seed: int
) -> None:
    torch.manual_seed(seed)
    channels = groups * width
    conv = nn.Conv2d(channels, channels, kernel, groups=groups, bias=bias).double()
    bn = randomised(nn.BatchNorm2d(channels, eps=eps, affine=affine)).double().eval()
    assert isinstance(bn, nn.BatchNorm2d)
    x = torch.randn(2, channels, 5, 5, dtype=torch.float64)
    weight, shift = fold_conv_bn(conv.weight, conv.bias, bn)
    torch.testing.assert_close(nn.functional.conv2d(x, weight, shift, groups=groups), bn(conv(x)), rtol=0, atol=1e-12)


def test_folding_is_differentiable() -> None:
    torch.manual_seed(0)
    bn = randomised(nn.BatchNorm2d(2)).double()
    assert isinstance(bn, nn.BatchNorm2d)
    weight = torch.randn(2, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: fold_conv_bn(w, None, bn), (weight,))


def test_pairs_at_any_depth_keep_their_names(x: Tensor) -> None:
    inner = nn.Sequential(nn.Sequential(*pair(), nn.ReLU(inplace=True)), nn.ModuleDict({"a": Residual(*pair())})["a"])
    net = randomised(nn.Sequential(nn.ReLU(inplace=True), Residual(*pair(), nn.Sequential(inner))))
    given = x.clone()
    fused = fuse(net, x)
    torch.testing.assert_close(x, given, rtol=0, atol=0)
    assert norms(fused) == []
    assert_same(net, fused, x)
    weights = {name for name, _ in net.named_parameters() if net.get_parameter(name).dim() == 4}
    assert weights == {name for name in fused.state_dict() if name.endswith("weight")}


def test_original_is_untouched(x: Tensor) -> None:
    net = randomised(nn.Sequential(*pair(), nn.ReLU())).train()
    before = copy.deepcopy(net.state_dict())
    fused = fuse(net, x)
    assert all(module.training for module in net.modules())
    assert not any(module.training for module in fused.modules())
    torch.testing.assert_close(dict(net.state_dict()), dict(before), rtol=0, atol=0)
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in fused.parameters()}


def test_what_has_no_partner_stays(x: Tensor) -> None:
    net = randomised(
        nn.Sequential(
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 1),
            nn.ReLU(),
            nn.BatchNorm2d(8, track_running_stats=False),
            nn.Conv2d(8, 8, 1),
            Activated(8),
            nn.Conv2d(8, 8, 1),
        )
    )
    fused = fuse(net, x)
    assert norms(fused) == ["0", "3", "5"]
    torch.testing.assert_close(dict(fused.state_dict()), dict(net.state_dict()), rtol=0, atol=0)


def test_batch_norms_in_a_row_fold_together(x: Tensor) -> None:
    net = randomised(nn.Sequential(*pair(), nn.BatchNorm2d(8)))
    fused = fuse(net, x)
    assert norms(fused) == []
    assert_same(net, fused, x)


def test_shared_convolution_is_folded_once_per_batch_norm(x: Tensor) -> None:
    conv, bn = pair()
    block = nn.Sequential(conv, bn)
    net = randomised(
        nn.Sequential(
            block,
            nn.ReLU(),
            block,
            nn.Sequential(conv, nn.BatchNorm2d(8)),
            nn.Sequential(conv),
            nn.Sequential(conv, bn),
        )
    )
    fused = fuse(net, x)
    assert norms(fused) == []
    assert_same(net, fused, x)
    assert fused.get_submodule("0") is fused.get_submodule("2")
    twice = randomised(nn.Sequential(conv, bn, nn.ReLU(), conv, nn.BatchNorm2d(8)))
    assert norms(fuse(twice, x)) == []
    torch.testing.assert_close(fused.get_parameter("4.0.weight"), conv.get_parameter("weight"), rtol=0, atol=0)


def test_mixed_types_keep_that_of_the_convolution(x: Tensor) -> None:
    conv, bn = pair()
    net = randomised(nn.Sequential(conv.bfloat16(), bn))
    fused = fuse(net, x.bfloat16(), tolerance=2e-2)
    assert {p.dtype for p in fused.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"differs from the original by .*e-03 .*tolerance 1e-06.*tolerance="):
        fuse(net, x.bfloat16(), tolerance=1e-6)


def test_frozen_weights_stay_frozen() -> None:
    net = nn.Sequential(*pair(), *pair())
    net[0].requires_grad_(False)
    fused = fuse(net)
    assert [p.requires_grad for p in fused.parameters()] == [False, False, True, True]


def test_wrong_fold_is_caught(x: Tensor) -> None:
    net = randomised(Tapped(*pair()))
    with pytest.raises(ValueError, match=r"differs from the original by \d\.\de[+-]\d\d of the largest output"):
        fuse(net, x)


def test_unfoldable_batch_norm_is_named() -> None:
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)))
    with pytest.raises(ValueError, match=r"'0\.1'.*no running statistics.*track_running_stats=True"):
        fuse(net)
    with pytest.raises(ValueError, match="has 5 channels, its convolution 4"):
        fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(5)))


def test_errors_of_the_check(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"takes a torch\.nn\.Module, not str"):
        fuse("net")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fails on an input of shape \(3, 8, 9, 9\).*to have 4 channels"):
        fuse(nn.Sequential(*pair(4)), x)
    with pytest.raises(ValueError, match="one tensor, not tuple"):
        fuse(nn.AdaptiveMaxPool2d(1, return_indices=True), x)
    broken = nn.Sequential(*pair())
    broken.get_buffer("1.running_var").fill_(torch.nan)
    with pytest.raises(ValueError, match="infinity or NaN"):
        fuse(broken, x)


def test_relative_difference() -> None:
    assert relative_difference(torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0])) == 0.25
    assert relative_difference(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_difference(torch.ones(2), torch.tensor([1.0, torch.nan])) == float("inf")
    with pytest.raises(ValueError, match=r"\(2,\), its copy in \(3,\)"):
        relative_difference(torch.ones(2), torch.ones(3))
