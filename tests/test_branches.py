"""Blocks of branches: exact folds, shared kernels, gates, and the exact merge in training."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from pynas import Choice, Gates, fuse
from pynas.kernels import setting
from pynas.kernels.patches import patch_moments_function
from pynas.merge import centre_slice
from pynas.ops import branches
from pynas.ops.branches import BRANCHES, BranchShape
from pynas.ops.fast_merge import merges
from pynas.ops.rep import RepBlock, RepSlot, searched

SIZE = 9


def slot(channels: int = 8, out: int = 8, names: tuple[str, ...] = (), **settings: Any) -> RepSlot:
    stride = settings.pop("stride", 1)
    shape = BranchShape(channels, out, SIZE, settings.get("kernel", 3), stride, settings.get("groups", 1))
    choice = Choice("here", searched(shape, names), "any")
    return RepSlot("here", choice, "rep", channels, out, SIZE, stride, **settings)


def block(channels: int = 8, out: int = 8, names: tuple[str, ...] = (), **settings: Any) -> RepBlock:
    """A block as after some training, in float64."""
    here = slot(channels, out, names, **settings)
    return randomised(RepBlock(here, here.choice.options, choice=bool(settings.get("sharing")))).double()


def randomised(made: RepBlock) -> RepBlock:
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("inner"):
                weight.normal_(0, 0.3)  # begins at zero
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return made


def pictures(made: RepBlock, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, made.slot.in_channels, SIZE, SIZE - 2, dtype=dtype)


def gates(values: Tensor, run: tuple[int, ...]) -> Gates:
    return Gates(values, run, run)


SHAPES = st.sampled_from([(8, 8, 1), (8, 8, 2), (8, 8, 4), (8, 8, 8), (8, 12, 1), (8, 12, 2), (8, 12, 4)])
SUBSETS = st.sets(st.sampled_from(BRANCHES.names()), min_size=1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SHAPES, st.sampled_from([3, 5, 7]), st.sampled_from([1, 2]), SUBSETS, st.booleans(), st.integers(0, 99))
def test_fold_is_exact(
    shape: tuple[int, int, int], kernel: int, stride: int, subset: set[str], sharing: bool, seed: int
) -> None:
    """PAPERS F1: below 1e-10 in float64, 1e-6 of the largest output in float32."""
    torch.manual_seed(seed)
    channels, out, groups = shape
    made = block(channels, out, tuple(sorted(subset)), kernel=kernel, stride=stride, groups=groups, sharing=sharing)
    x = pictures(made)
    with torch.no_grad():
        folded = fuse(made)
        assert [type(module) for module in folded.modules()] == [nn.Conv2d]
        assert float((folded(x) - made.eval()(x)).abs().max()) < 1e-10
        # Single precision: what folding in it gives, and its own rounding, against the branches in double.
        expected = made(x)
        single = fuse(copy.deepcopy(made).float())
        rounded = {name: p.double() for name, p in copy.deepcopy(made).float().state_dict().items()}
        made.load_state_dict(rounded)
        expected = made(x.float().double())
        assert float((single(x.float()) - expected).abs().max() / expected.abs().max()) < 1e-6


def test_every_subset_folds() -> None:
    """All 127 subsets, with gates as well as alone."""
    whole = block(4, 4)
    x = pictures(whole)
    count = 0
    for size in range(1, 8):
        for run in itertools.combinations(range(7), size):
            names = tuple(whole.names[index] for index in run)
            alone = RepBlock(whole.slot, names).double().eval()
            alone.load_state_dict(whole.single_state(names))
            values = torch.zeros(7, dtype=torch.float64)
            values[list(run)] = 1
            with torch.no_grad():
                expected = whole.eval()(x, gates(values, run))
                torch.testing.assert_close(alone(x), expected, rtol=0, atol=1e-12)
                torch.testing.assert_close(fuse(alone)(x), expected, rtol=0, atol=1e-10)
            count += 1
    assert count == 127


@pytest.mark.parametrize("name", ["1x1_kxk", "1x1_avg"])
def test_ordinary_zero_padding_cannot_be_folded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PAPERS C3: with zeros where the border's value belongs, the branch is off by O(1), and folding refuses."""
    made = block(names=(name,)).eval()
    x = pictures(made)
    with torch.no_grad():
        weight, bias = made.convolution()
        monkeypatch.setattr(branches, "bordered", lambda y, value, pad: functional.pad(y, [pad] * 4))
        difference = (functional.conv2d(x, weight, bias, padding=1) - made(x)).abs()
    assert float(difference.max()) > 0.1
    assert float(difference[:, :, 1:-1, 1:-1].max()) < 1e-10  # the inside is right
    with pytest.raises(ValueError, match="differs from its branches"):
        fuse(made)


def test_fold_in_place_and_as_a_copy() -> None:
    net = nn.Sequential(block(), nn.ReLU(), block(names=("1x1",)))
    x = pictures(net[0])  # type: ignore[arg-type]
    expected = net.eval()(x)
    copied = fuse(net, x)
    assert isinstance(net[0], RepBlock)
    assert isinstance(copied[0], nn.Conv2d)  # type: ignore[index]
    assert fuse(net, x, in_place=True) is net
    assert isinstance(net[0], nn.Conv2d)
    torch.testing.assert_close(net(x), expected)
    with pytest.raises(ValueError, match="cannot be replaced in place"):
        fuse(block(), in_place=True)


def test_broken_statistics_are_refused() -> None:
    net = nn.Sequential(block(), block())
    net[1].branches["kxk"].bn.running_var.fill_(torch.nan)  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match="infinity or NaN"):
        fuse(net, in_place=True)
    assert isinstance(net[0], RepBlock)  # nothing was replaced


@pytest.mark.parametrize(("channels", "out", "groups"), [(6, 6, 1), (6, 6, 2), (4, 6, 1)])
@pytest.mark.parametrize("kernel", [3, 5])
def test_gradient_of_a_shared_kernel(channels: int, out: int, groups: int, kernel: int) -> None:
    """PAPERS F2: the sum of the branches' gradients, each in the middle of zeros; the centre gets all of them."""
    made = block(channels, out, kernel=kernel, groups=groups, sharing=True)
    apart = copy.deepcopy(made)
    apart.separate()
    assert apart.kernel is None
    x = pictures(made)
    weights = torch.rand(out, dtype=torch.float64)[:, None, None]
    for each in (made, apart):
        (each.train()(x) * weights * torch.arange(SIZE)[:, None]).sum().backward()
    assert made.kernel is not None
    assert made.kernel.grad is not None
    total = torch.zeros_like(made.kernel)
    taken = 0
    for name, branch in apart.branches.items():
        for key in branch.taken():  # type: ignore[operator]
            gradient = branch.get_parameter(key).grad
            assert gradient is not None, name
            centre_slice(total, *gradient.shape[-2:]).add_(gradient)
            taken += 1
    assert taken == (7 if channels == out else 6)
    torch.testing.assert_close(made.kernel.grad, total, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(made.buffers(), apart.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_slices_are_the_articles() -> None:
    """PAPERS C4: rows [K/2] - [H/2] to [K/2] + [H/2], both included."""
    kernel = torch.arange(49.0).view(1, 1, 7, 7)
    assert centre_slice(kernel, 1, 1).item() == 24
    assert centre_slice(kernel, 1, 7).flatten().tolist() == list(range(21, 28))
    assert centre_slice(kernel, 7, 1).flatten().tolist() == list(range(3, 49, 7))
    assert centre_slice(kernel, 3, 5).flatten().tolist() == [r * 7 + c for r in (2, 3, 4) for c in range(1, 6)]


def test_pointwise_kxk_begins_as_its_kxk() -> None:
    """PAPERS C2: the 1x1 kernel is identity + W with W = 0."""
    made = RepBlock(slot(8, 12, ("1x1_kxk",)), ("1x1_kxk",)).branches["1x1_kxk"]
    weights = made.weights()  # type: ignore[operator]
    assert (weights["inner"] == 0).all()
    x = torch.randn(2, 8, SIZE, SIZE)
    torch.testing.assert_close(functional.conv2d(x, made.first(weights)), x)  # type: ignore[operator]


def test_what_runs_is_what_the_gates_say() -> None:
    """Branches that do not run get no gradient, in weights and in running statistics; they cost nothing."""
    made = block().train()
    before = copy.deepcopy(made.state_dict())
    values = torch.ones(7, dtype=torch.float64, requires_grad=True)
    made(pictures(made), gates(values, (1, 5))).square().sum().backward()
    for name, branch in made.branches.items():
        on = name in (made.names[1], made.names[5])
        assert all((p.grad is not None) == on for p in branch.parameters())
        assert on != torch.equal(before[f"branches.{name}.bn.running_var"], branch.bn.running_var)  # type: ignore[union-attr, arg-type]
    assert values.grad is not None
    assert (values.grad != 0).nonzero().flatten().tolist() == [1, 5]


def test_empty_block_runs_its_kxk() -> None:
    made = RepBlock(slot(), slot().choice.options, choice=True).double().eval()
    x = pictures(made)
    empty = gates(torch.zeros(7, dtype=torch.float64), ())
    torch.testing.assert_close(made(x, empty), made.branches["kxk"](x))
    alone = RepBlock(made.slot, ()).double().eval()
    alone.load_state_dict(made.single_state(()))
    torch.testing.assert_close(alone(x), made(x, empty))


@pytest.mark.parametrize(
    ("channels", "out", "settings"),
    [
        (4, 4, {}),
        (4, 4, {"groups": 2, "sharing": True}),
        (4, 4, {"groups": 4, "kernel": 5, "middle": 2}),
        (4, 6, {"stride": 2, "sharing": True}),
        (4, 6, {"stride": 2, "kernel": 7, "groups": 2}),
    ],
    ids=str,
)
def test_merged_training_equals_the_branches(channels: int, out: int, settings: dict[str, Any]) -> None:
    """One convolution with exact batch statistics: outputs, all gradients, and running statistics, in double."""
    made = block(channels, out, **settings).train()
    merged = copy.deepcopy(made)
    merged.merged = True
    x = pictures(made)
    run = tuple(range(len(made.names)))
    found = []
    for each in (made, merged):
        image, values = x.clone().requires_grad_(), torch.linspace(0.5, 1.5, len(run), dtype=torch.float64)
        values.requires_grad_()
        for _ in range(2):
            y = each(image, gates(values, run))
            (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
        gradients = {name: p.grad for name, p in each.named_parameters()}
        found.append((y, image.grad, values.grad, gradients, dict(each.named_buffers())))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(merged.eval()(x), made.eval()(x))


@pytest.mark.parametrize("names", [(), ("kxk", "1x1_avg"), ("1x1_kxk",), ("1x1", "1xk", "kx1", "skip")], ids=str)
@pytest.mark.parametrize("channels", [3, 17])
def test_the_kernel_equals_the_branches(channels: int, names: tuple[str, ...]) -> None:
    """Outputs, all gradients and running statistics after two steps, in double."""
    made = block(channels, channels, kernel=3).train()
    x = pictures(made)
    run = tuple(made.names.index(name) for name in names or made.names)
    found = []
    for kernels in ("reference", "fused"):
        each, image = copy.deepcopy(made), x.clone().requires_grad_()
        values = torch.linspace(0.5, 1.5, len(made.names), dtype=torch.float64).requires_grad_()
        with setting.using(kernels):  # type: ignore[arg-type]
            running = [(branch, gate) for branch, gate, _ in each._running(gates(values, run))]
            assert merges(x, running) == (kernels == "fused")
            for _ in range(2):
                y = each(image, gates(values, run))
                (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
        gradients = {name: p.grad for name, p in each.named_parameters()}
        found.append((y, image.grad, values.grad, gradients, dict(each.named_buffers())))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)


def test_moments_do_not_depend_on_threads() -> None:
    """Of many images, dealt into several shares."""
    x = torch.randn(9, 20, 12, 11).add(1).requires_grad_()
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        try:
            found = patch_moments_function(x)
            results.append([*found, *torch.autograd.grad(found, x, [part.detach().cos() for part in found])])
        finally:
            torch.set_num_threads(1)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_blocks_that_are_watched_or_unusual_run_branch_by_branch() -> None:
    made = block(4, 4, kernel=3).train()
    x, running = pictures(made), [(branch, None) for branch, _, _ in made._running(None)]
    with setting.using("fused"):
        assert merges(x, running)
        made.branches["kxk"].bn.momentum = None
        assert not merges(x, running)
        made.branches["kxk"].bn.momentum = 0.1
        made.branches["1xk"].bn.eval()
        assert not merges(x, running)
        made.branches["1xk"].bn.train()
        made.branches["skip"].register_forward_hook(lambda *_: None)
        assert not merges(x, running)
    for other in (block(4, 4, kernel=5), block(4, 4, kernel=3, stride=2), block(4, 4, kernel=3, groups=2)):
        with setting.using("fused"):
            assert not merges(pictures(other), [(branch, None) for branch, _, _ in other.train()._running(None)])


def test_merged_training_has_right_gradients() -> None:
    made = block(2, 2).train()
    made.merged = True
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # borders follow running statistics, through which no gradient goes
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    values = torch.rand(7, dtype=torch.float64, requires_grad=True)
    place = "branches.1x1_kxk.weight"
    inner = made.get_parameter(place).detach().clone().requires_grad_()

    def run(image: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        state = {name: buffer.clone() for name, buffer in made.named_buffers()} | {place: weight}
        y: Tensor = torch.func.functional_call(made, state, (image, gates(gate, tuple(range(7)))))
        return y

    assert torch.autograd.gradcheck(run, (x, values, inner), fast_mode=True)


def test_two_passes_before_a_backward() -> None:
    """The border reads running statistics, which the second pass moves."""
    made = block().train()
    (made(pictures(made)).sum() + made(pictures(made)).sum()).backward()


def test_dbb_for_depthwise_has_twice_the_middle() -> None:
    made = block(8, 8, ("1x1_kxk",), groups=8, middle=2)
    assert made.branches["1x1_kxk"].get_parameter("inner").shape == (16, 1, 1, 1)
    assert made.branches["1x1_kxk"].get_parameter("weight").shape == (8, 2, 3, 3)


def test_strided_pointwise_can_be_plain() -> None:
    """PAPERS C2: the released code drops the 1x1 convolution where the stride is 2."""
    assert type(block(8, 8, ("1x1_kxk",), stride=2).branches["1x1_kxk"]) is branches.PointwiseConv
    plain = block(8, 8, ("1x1_kxk",), stride=2, strided_pointwise=False).branches["1x1_kxk"]
    assert type(plain) is branches.ConvBranch
