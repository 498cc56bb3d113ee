"""Edges of cells: where their options run in one kernel, and that it is the modules' mathematics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from blocks import OwnConv, everything, randomised, same
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pynas import FAMILIES, Choice, Gates, Slot
from pynas.kernels import edge, native, setting
from pynas.kernels.edge_reference import edge_reference, samples
from pynas.ops.cell import OPTIONS

NAMES = tuple(OPTIONS.names())
EVERY = tuple(range(len(NAMES)))


@pytest.fixture(autouse=True)
def _always_fused() -> Iterator[None]:
    with setting.using("fused"):
        yield


def mixed(channels: int = 6, size: int = 7, stride: int = 1, affine: bool = True, pool_norm: bool = True) -> Any:
    slot = Slot(
        "here", Choice("here", NAMES), "cell", channels, channels, size, stride, affine=affine, pool_norm=pool_norm
    )
    net = FAMILIES.get("cell").mixed(slot)
    if affine:
        randomised(net)
    return net.double().train()


def gates(run: tuple[int, ...] = EVERY, train: tuple[int, ...] | None = None) -> Gates:
    values = torch.rand(len(NAMES), dtype=torch.float64).requires_grad_()
    return Gates(values, run, run if train is None else train)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Options in each call of the kernel from now on."""
    seen: list[int] = []
    forward = edge._forward

    def counted(x: Tensor, values: Tensor | None, tensors: Any, call: Any) -> Any:
        seen.append(len(call[1]) // 5 + (call[2] >= 0))
        return forward(x, values, tensors, call)

    monkeypatch.setattr(edge, "_forward", counted)
    return seen


def compare(net: Any, chosen: Gates, x: Tensor) -> None:
    """The kernel's step against the modules'."""
    found = []
    for kernels in ("fused", "reference"):
        with setting.using(kernels):  # type: ignore[arg-type]
            other, image = copy.deepcopy(net), x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            torch.manual_seed(1)
            grad = torch.randn_like(other(image, chosen).detach())
            found.append(everything(other, lambda: other(image, chosen), [image, chosen.values], grad))  # noqa: B023
    same(*found)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("channels", "size", "stride"), [(6, 7, 1), (6, 8, 2), (18, 5, 2), (33, 4, 1), (16, 2, 2)])
@pytest.mark.parametrize("affine", [False, True])
def test_an_edge_is_its_modules(
    channels: int, size: int, stride: int, affine: bool, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, seen = mixed(channels, size, stride, affine), calls(monkeypatch)
    x = torch.randn(3, channels, size, size + 1, dtype=torch.float64).contiguous(memory_format=layout)
    compare(net, gates(), x)
    assert set(seen) == {7 if stride == 1 else 6}  # at stride 2 the skip is two convolutions, and runs by itself
    assert net(x, gates()).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("run", [(1,), (0, 3, 4), (2, 6), (5, 7, 1), (3, 7)], ids=str)
def test_only_what_runs_is_computed(run: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    compare(mixed(), gates(run), torch.randn(2, 6, 7, 7, dtype=torch.float64))
    assert set(seen) == {len([index for index in run if NAMES[index] != "none"])}


def test_statistics_after_three_steps() -> None:
    nets = [mixed(affine=False)]
    nets.append(copy.deepcopy(nets[0]))
    for step in range(3):
        torch.manual_seed(step)
        x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
        for net, kernels in zip(nets, ("fused", "reference"), strict=True):
            with setting.using(kernels):  # type: ignore[arg-type]
                net(x, Gates(torch.ones(8, dtype=torch.float64), EVERY, EVERY))
    states = [dict(net.named_buffers()) for net in nets]
    assert any(name.endswith("num_batches_tracked") and int(value) == 3 for name, value in states[0].items())
    same(*states)


def test_options_without_gradients_run_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = mixed(), calls(monkeypatch)
    compare(net, gates((1, 4, 5), train=(4,)), torch.randn(2, 6, 7, 7, dtype=torch.float64))
    assert set(seen) == {1}


def test_draws_per_image_run_option_by_option(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = mixed(), calls(monkeypatch)
    compare(net, Gates(torch.rand(2, 8, dtype=torch.float64), EVERY, EVERY), torch.randn(2, 6, 7, 7).double())
    assert seen == [1] * 8  # convolutions, twice


def test_evaluation_runs_in_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = mixed(), calls(monkeypatch)
    net.eval()(torch.randn(2, 6, 7, 7, dtype=torch.float64), gates())
    assert seen == []


@pytest.mark.parametrize("name", ["sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"])
@pytest.mark.parametrize("stride", [1, 2])
def test_an_option_alone_is_its_modules(name: str, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As networks without choices have it, in training and in evaluation."""
    net, seen = mixed(stride=stride).options[name], calls(monkeypatch)
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for kernels in ("fused", "reference"):
        with setting.using(kernels):  # type: ignore[arg-type]
            other = copy.deepcopy(net)
            grad = torch.ones_like(other(x).detach()).cumsum(-1)
            found.append(everything(other, lambda: other(x), [x], grad))  # noqa: B023
            found[-1]["evaluated"] = other.eval()(x).detach()
    same(*found)
    assert seen == [1, 1]


# Where the modules do something else, they run themselves.


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def own_conv(net: Any) -> None:
    net.options["dil_conv_3x3"].pointwise = OwnConv(6, 6, 1, bias=False).double()


def with_bias(net: Any) -> None:
    net.options["sep_conv_3x3"].first.pointwise.bias = nn.Parameter(torch.ones(6, dtype=torch.float64))


def parametrised(net: Any) -> None:
    parametrize.register_parametrization(net.options["dil_conv_5x5"].depthwise, "weight", Doubled())


def other_momentum(net: Any) -> None:
    net.options["max_pool_3x3"].bn.momentum = 0.5


def frozen_norm(net: Any) -> None:
    net.options["avg_pool_3x3"].bn.eval()


def counts_padding(net: Any) -> None:
    net.options["avg_pool_3x3"].pool.count_include_pad = True


def larger_pool(net: Any) -> None:
    net.options["max_pool_3x3"].pool = nn.MaxPool2d(5, 1, 2)


def other_activation(net: Any) -> None:
    net.options["sep_conv_5x5"].second.relu = nn.Tanh()


def own_forward(net: Any) -> None:
    net.options["dil_conv_3x3"].forward = lambda x: -x


def hooked(net: Any) -> None:
    net.options["sep_conv_5x5"].second.bn.register_forward_hook(lambda module, args, out: 2 * out)


CHANGES = [
    *(own_conv, with_bias, parametrised, other_momentum, frozen_norm),
    *(counts_padding, larger_pool, other_activation, own_forward, hooked),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_modules_are_what_runs(change: Callable[[Any], None], when: str) -> None:
    """Also where the change comes after a step in which the kernel stood for them."""
    net, x = mixed(), torch.randn(2, 6, 7, 7, dtype=torch.float64)
    plain = copy.deepcopy(net)
    chosen = gates()
    if when == "after":
        with setting.using("fused"):
            net(x, chosen)
        with setting.using("reference"):
            plain(x, chosen)
    for one in (net, plain):
        torch.manual_seed(2)
        change(one)
    ours = net(x, chosen)
    with setting.using("reference"):
        torch.testing.assert_close(ours, plain(x, chosen), rtol=1e-9, atol=1e-9)


def test_a_pool_that_sees_no_number_passes_it_on() -> None:
    (x, *rest) = samples(torch.device("cpu"), torch.float64)[0]
    with torch.no_grad():
        x[0, 0, 2, 2] = torch.nan
    assert edge.edge_function(x, *rest)[0].isnan().all() == edge_reference(x, *rest)[0].isnan().all()
    assert edge.edge_function(x, *rest)[0].isnan().any()


@pytest.mark.parametrize("stride", [1, 2])
def test_the_first_of_equal_values_gets_the_gradient(stride: int) -> None:
    """As torch has it, also at the border and between infinities."""
    x = torch.randint(0, 3, (2, 3, 6, 7), dtype=torch.float64)
    x[0, 0] = -torch.inf
    x[0, 0, 3, 3] = 1.0
    x.requires_grad_()
    one = torch.ones(1, dtype=torch.float64)
    grads = []
    for function in (edge.edge_function, edge_reference):
        y, statistics = function(x, one, [], [stride, 0], [1, 3, 1, 1, 0], -1, 1e-5)
        grad = torch.arange(y.numel(), dtype=torch.float64).view(y.shape) / y.numel()
        grads.append(torch.autograd.grad((y[:, 1:] * grad[:, 1:]).sum(), x)[0][:, 1:])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_threads_and_shares_do_not_matter() -> None:
    """Of many images, dealt into several shares."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 20, 12, 11, generator=generator, requires_grad=True)
    _, values, _, _, options, _, eps = samples(torch.device("cpu"), torch.float32)[0]
    tensors = []
    for kernel, stages in ((3, 2), (5, 2), (3, 1), (5, 1)):
        for _ in range(stages):
            tensors += [torch.randn(20, 1, kernel, kernel, generator=generator, requires_grad=True)]
            tensors += [torch.randn(20, 20, 1, 1, generator=generator, requires_grad=True)]
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        try:
            y, statistics = edge.edge_function(x, values, tensors, [1, 0], options, 6, eps)
            grads = torch.autograd.grad(y, [x, values, *tensors], y.detach().cos())
        finally:
            torch.set_num_threads(1)
        results.append([y, statistics, *grads])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_only_what_is_wanted_is_given() -> None:
    args = samples(torch.device("cpu"), torch.float64)[1]
    x, values, tensors = args[:3]
    y, _ = edge.edge_function(*args)
    y.sum().backward(inputs=[values])
    assert x.grad is None
    assert all(tensor.grad is None for tensor in tensors)
    expected = torch.autograd.grad(edge_reference(*args)[0].sum(), values)[0]
    torch.testing.assert_close(values.grad, expected, rtol=1e-9, atol=1e-9)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(2, 4, 5)}, "x must be floating point"),
    ({"layer": [3, 0]}, "stride \\(1 or 2\\)"),
    ({"options": [0, 3, 1]}, "Every option needs 5 numbers"),
    ({"options": [1, 3, 1, 1, 0, 0, 3, 1, 1, 1]}, "Convolutions must come before pools"),
    ({"options": [0, 4, 1, 1, 0]}, "kernels are 3, 5, 7"),
    ({"options": [3, 3, 1, 1, 0]}, "kinds are 0 to 2"),
    ({"gates": torch.ones(2, 7)}, "gates must have shape"),
    ({"gates": torch.ones(7, dtype=torch.float64)}, "one is needed"),
    ({"tensors": []}, "These options have 12 tensors; 0 came"),
    ({"eps": 0.0}, "must be positive"),
]


@pytest.mark.parametrize(("change", "says"), WRONG, ids=[says for _, says in WRONG])
def test_arguments_that_make_no_sense_are_told(change: dict[str, Any], says: str) -> None:
    names = ("x", "gates", "tensors", "layer", "options", "identity", "eps")
    args = dict(zip(names, samples(torch.device("cpu"), torch.float32)[0], strict=True)) | change
    for function in (edge.edge_function, edge.mixed_edge, edge_reference):
        with pytest.raises(ValueError, match=says):
            function(*args.values())


def test_without_the_module_edges_are_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from pynas.ops import fused_edge

    net, x, chosen = mixed(), torch.randn(2, 6, 7, 7, dtype=torch.float64), gates()
    with setting.using("reference"):
        expected = copy.deepcopy(net)(x, chosen)
    for module in (fused_edge, edge):
        monkeypatch.setattr(module, "KERNELS", None)
    with setting.using("auto"):
        assert torch.equal(net(x, chosen), expected)
    assert native.KERNELS is not None
