"""What the kernel `mixed_mbconv` promises beyond the contract: as modules use it, it is what they are in torch."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import EVERY, OPTIONS, block, calls, choice, everything, same
from torch import Tensor

from pynas import Gates
from pynas.kernels import graph, mbconv, native, setting
from pynas.kernels.mbconv_reference import mbconv_reference


@pytest.fixture(autouse=True)
def _always_fused() -> Iterator[None]:
    with setting.using("fused"):
        yield


SHAPES = [(8, 8, 6, 1, "relu"), (6, 10, 7, 2, "relu6"), (4, 6, 5, 1, "hardswish"), (4, 4, 1, 1, "relu")]


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_is_the_modules(
    shape: tuple[int, int, int, int, str], per_image: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps in float64: outputs, all gradients, running statistics and counts."""
    *sizes, activation = shape
    net = choice((sizes[0], sizes[1], sizes[2], sizes[3]), activation).double()
    twin = copy.deepcopy(net)
    count = calls(monkeypatch)
    for step in range(3):
        x = torch.randn(3, sizes[0], sizes[2], sizes[2], dtype=torch.float64).requires_grad_()
        values = torch.rand(*([3] if per_image else []), 9, dtype=torch.float64).requires_grad_()
        run, train = [(EVERY, EVERY), ((1, 3, 8), (3, 8)), ((2, 5, 7), (5,))][step]
        gates = Gates(values, run, train)
        grad = torch.randn_like(net(x, gates).detach())
        with setting.using("reference"):
            twin(x, gates)
            expected = everything(twin, lambda: twin(x, gates), [x, values], grad)  # noqa: B023
        same(everything(net, lambda: net(x, gates), [x, values], grad), expected)  # noqa: B023
        assert {name for name in expected if name.startswith("grad")}.issuperset(
            f"grad options.{OPTIONS[i]}.expand.conv.weight" for i in train if i < 8
        )
    assert (count["forward"], count["backward"]) == (6, 3)


@pytest.mark.parametrize("spec", [{"groups": 2}, {"kernel": 7, "activation": "relu6"}, {"activation": "hardswish"}])
def test_block_is_the_modules(spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((8, 8, 6, 1), (8, 12, 7, 2)):
        net, count = block(shape, **spec).double(), calls(monkeypatch)
        twin = copy.deepcopy(net)
        for _ in range(3):
            x = torch.randn(2, 8, shape[2], shape[2], dtype=torch.float64).requires_grad_()
            grad = torch.randn_like(twin.plain(x).detach())
            net(x)
            expected = everything(twin, lambda: twin.plain(x), [x], grad)  # noqa: B023
            same(everything(net, lambda: net(x), [x], grad), expected)  # noqa: B023
        assert (count["forward"], count["backward"]) == (6, 3)
        net.eval()
        twin.eval()
        torch.testing.assert_close(net(x), twin(x))
        assert count["forward"] == 6
        net.train()
        net(x)
        assert count["forward"] == 7


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
def test_nan_and_infinity_come_out_as_in_torch(bad: float, activation: str) -> None:
    net = choice((4, 4, 5, 1), activation)
    x = torch.randn(2, 4, 5, 5)
    x[0, 1, 2, 3] = bad
    x.requires_grad_()
    gates = Gates(torch.rand(9).requires_grad_(), EVERY, EVERY)
    ours = everything(net, lambda: net(x, gates), [x, gates.values], torch.ones(2, 4, 5, 5))
    with setting.using("reference"):
        theirs = everything(net, lambda: net(x, gates), [x, gates.values], torch.ones(2, 4, 5, 5))
    for name, value in theirs.items():
        if activation == "relu6" and "grad" in name:  # torch's backward loses a NaN in whole vectors, not in the rest
            assert (ours[name].isnan() | ~value.isnan()).all(), name
        else:
            assert torch.equal(ours[name].isnan(), value.isnan()), name


def test_one_bad_weight_spoils_what_it_spoils_in_torch() -> None:
    net = block((4, 6, 5, 1))
    with torch.no_grad():
        net.depthwise.bn.weight[1] = float("nan")
    x = torch.randn(2, 4, 5, 5)
    with setting.using("reference"):
        expected = net(x)
    assert torch.equal(net(x).isnan(), expected.isnan())


def test_large_means_lose_few_digits() -> None:
    """Of inputs whose mean is a thousand times their deviation, not more than torch loses, give or take."""
    net = block((8, 8, 8, 1)).double()
    x = torch.randn(8, 8, 8, 8, dtype=torch.float64) + 1e3
    exact = net.plain(x) - x
    single = copy.deepcopy(net).float()
    ours = single(x.float()) - x.float()
    theirs = single.plain(x.float()) - x.float()
    errors = [float(((y.double() - exact).norm() / exact.norm()).detach()) for y in (ours, theirs)]
    assert errors[0] < max(4 * errors[1], 1e-3)


def step(net: Any, x: Tensor, gates: Gates, grad: Tensor) -> list[Tensor]:
    return list(everything(net, lambda: net(x, gates), [x, gates.values], grad).values())


def test_bits_do_not_depend_on_threads_or_repetition() -> None:
    fresh = choice((8, 8, 9, 1))
    x, grad = torch.randn(24, 8, 9, 9, requires_grad=True), torch.randn(24, 8, 9, 9)
    gates = Gates(torch.rand(24, 9, requires_grad=True), EVERY, EVERY)
    results = []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        results.append(step(copy.deepcopy(fresh), x, gates, grad))
    torch.set_num_threads(1)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "neither": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "neither"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_memory_formats(layout: str, grad_layout: str) -> None:
    net = choice((4, 4, 5, 1)).double()
    x = LAYOUTS[layout](torch.randn(2, 4, 5, 5, dtype=torch.float64)).detach().requires_grad_()
    grad = LAYOUTS[grad_layout](torch.randn(2, 4, 5, 5, dtype=torch.float64))
    gates = Gates(torch.rand(9, dtype=torch.float64).requires_grad_(), EVERY, EVERY)
    twin = copy.deepcopy(net)
    ours = everything(net, lambda: net(x, gates), [x, gates.values], grad)
    with setting.using("reference"):
        expected = everything(twin, lambda: twin(x, gates), [x, gates.values], grad)
    same(ours, expected)
    last = layout == "channels_last"
    assert ours["y"].is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_only_what_is_wanted_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = choice((4, 4, 5, 1)), choice((4, 4, 5, 1))
    theta, x, count = torch.randn(9, requires_grad=True), torch.randn(2, 4, 5, 5), calls(monkeypatch)

    def loss() -> Tensor:
        gates = Gates(theta.softmax(0), EVERY, EVERY)
        y: Tensor = second(first(x, gates), gates)
        return y.square().sum()

    loss().backward()
    assert theta.grad is not None
    expected, theta.grad = theta.grad, None
    assert count["wanted"] == graph.WANTS_GATES | graph.WANTS_WEIGHTS  # of the first layer: x needs none
    for net in (first, second):
        net.zero_grad()
    loss().backward(inputs=[theta])
    assert count["wanted"] == graph.WANTS_GATES
    assert theta.grad is not None
    torch.testing.assert_close(theta.grad, expected, rtol=1e-4, atol=1e-4)  # without weights, other sums are taken
    assert all(p.grad is None for net in (first, second) for p in net.parameters())
    weight = second.options["k3_e1"].project.bn.bias
    loss().backward(inputs=[weight])
    assert count["wanted"] == graph.WANTS_WEIGHTS
    (grad,) = torch.autograd.grad(loss(), [weight])
    torch.testing.assert_close(grad, weight.grad)


def test_frozen_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    net, count = block(), calls(monkeypatch)
    net.requires_grad_(False)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    net(x).sum().backward()
    assert count["wanted"] == graph.WANTS_X
    assert not net(x.detach()).requires_grad


def test_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    count, x = calls(monkeypatch), torch.randn(2, 8, 6, 6)
    for context in (torch.no_grad, torch.inference_mode):
        net = block()
        twin = copy.deepcopy(net)
        with context():
            y = net(x)
            expected = twin.plain(x)
        assert not y.requires_grad
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dict(net.named_buffers()), dict(twin.named_buffers()), rtol=1e-4, atol=1e-5)
    assert count["forward"] == 2


@pytest.mark.parametrize("what", ["x", "weight", "gate"])
def test_changes_in_place_are_detected(what: str) -> None:
    net = choice((4, 4, 5, 1))
    source, values = torch.randn(2, 4, 5, 5, requires_grad=True), torch.rand(9, requires_grad=True)
    for layout in ("contiguous", "channels_last"):
        x, gate = LAYOUTS[layout](source * 1), values * 1
        y = net(x, Gates(gate, EVERY, EVERY))
        with torch.no_grad():
            {"x": x, "weight": net.options["k5_e6"].depthwise.conv.weight, "gate": gate}[what].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_output_may_be_changed_in_place() -> None:
    """As that of any module, before and after which others work in place."""
    net = block()
    for layout in ("contiguous", "channels_last"):
        x = LAYOUTS[layout](torch.randn(2, 8, 6, 6)).requires_grad_()
        net(x).mul_(2).relu_().sum().backward()
        assert x.grad is not None


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_second_derivatives_are_refused(layout: str) -> None:
    net = block()
    x = LAYOUTS[layout](torch.randn(2, 8, 6, 6)).requires_grad_()
    (grad,) = torch.autograd.grad(net(x)[0, 0, 0, 0], x, create_graph=True)
    with pytest.raises(RuntimeError, match="mixed_mbconv cannot be differentiated twice"):
        grad.sum().backward()


def test_backward_twice_needs_the_graph() -> None:
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    y = block()(x).sum()
    y.backward(retain_graph=True)
    assert x.grad is not None
    first = x.grad.clone()
    y.backward()
    assert torch.equal(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def arguments() -> list[Any]:
    return list(mbconv.MIXED_MBCONV.samples(torch.device("cpu"), torch.float32)[1])


BAD: list[tuple[int, Callable[[Any], Any], str]] = [
    (0, lambda x: x[0], "x must be floating point"),
    (0, lambda x: x.long(), "x must be floating point"),
    (1, lambda gates: gates[:1], "Column 1 of the gates is asked for, but they have 1"),
    (1, lambda gates: gates.double(), "one is needed"),
    (1, lambda gates: gates[None].expand(2, -1), r"gates must have shape \(options,\) or \(3, options\)"),
    (2, lambda tensors: tensors[:-1], "Every option needs 5 numbers"),
    (2, lambda tensors: [tensors[0].double(), *tensors[1:]], "A tensor of option 0 is torch.float64"),
    (2, lambda tensors: [tensors[0][:-1], *tensors[1:]], "A tensor of option 0"),
    (3, lambda layer: [3, *layer[1:]], "layer is"),
    (3, lambda layer: [*layer[:2], 4], "layer is"),
    (4, lambda options: [4, *options[1:]], "Option 0 has kernel 4"),
    (4, lambda options: [*options[:2], 5, *options[3:]], "must divide by its 5 groups"),
    (5, lambda identity: 0, "An identity needs stride 1"),
    (6, lambda eps: 0.0, "eps is 0.0"),
]


@pytest.mark.parametrize(("place", "change", "says"), BAD)
@pytest.mark.parametrize("call", [mbconv.mixed_mbconv, mbconv.mbconv_op, mbconv_reference])
def test_senseless_arguments(call: Callable[..., Any], place: int, change: Callable[[Any], Any], says: str) -> None:
    args = arguments()
    args[place] = change(args[place])
    with pytest.raises(ValueError, match=says):
        call(*args)


# Memory.


def test_saved_activations_are_nine_times_smaller() -> None:
    """Bytes that forward keeps for backward, weights left out, of a whole layer of FBNet."""
    net = choice((16, 16, 16, 1))
    x = torch.randn(8, 16, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    gates = Gates(torch.rand(9, requires_grad=True), EVERY, EVERY)
    weights = {parameter.data_ptr() for parameter in net.parameters()}

    def kept() -> int:
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = net(x, gates)
            total = sum(found.values())
            del y
        return total

    ours = kept()
    with setting.using("reference"):
        theirs = kept()
    assert theirs > 9 * ours


# Every instruction set, chosen as a user chooses it.


@pytest.mark.parametrize("isa", native.MODULE.usable_isas())
def test_contract_on_every_isa(isa: str) -> None:
    if isa == native.KERNELS.isa:
        pytest.skip("this process has run it")
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), *[entry for entry in sys.path if entry]])
    wanted = "mixed_mbconv and (matches or gradients or each_output or scattered or threads)"
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", wanted]
    command += ["-c", str(here.parent / "pyproject.toml"), "--rootdir", str(here.parent), str(here / "test_kernels.py")]
    environment = {**os.environ, "PYTHONPATH": path, "PYNAS_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("shape", [(2, 32, 16), (96, 32, 16), (1, 200, 4), (1, 5, 70), (2, 1, 9), (2, 9, 1)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_images_that_are_not_square(shape: tuple[int, int, int], stride: int) -> None:
    images, height, width = shape
    torch.manual_seed(0)
    net = choice((16, 16, max(height, width), stride), options=("k3_e1", "k5_e1_g2"))
    x = torch.randn(images, 16, height, width, requires_grad=True)
    twin, gates = copy.deepcopy(net).double(), torch.rand(2)
    exact = x.detach().double().requires_grad_()
    y = net(x, Gates(gates, (0, 1), (0, 1)))
    with setting.using("reference"):
        expected = twin(exact, Gates(gates.double(), (0, 1), (0, 1)))
    weight = torch.randn_like(y)
    y.backward(weight)
    expected.backward(weight.double())
    pairs = [(y, expected), (x.grad, exact.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(net.parameters(), twin.parameters(), strict=True)]
    for ours, theirs in pairs:  # masks may differ in single elements, so norms are compared
        assert (ours.double() - theirs).norm() <= 2e-2 * theirs.norm() + 1e-4


# Images, channels, height and width of the input, and hidden channels: with more of these than are computed together,
# where what lies between two passes is kept, where it is computed again, and where there are fewer positions than
# channels.
SIZES = [(6, 24, 17, 16, 500), (1, 4, 131, 133, 100), (6, 72, 10, 9, 330)]


@pytest.mark.parametrize("activation", ["relu", "hardswish"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (7, 1), (5, 2)])
def test_all_ways_of_cutting_a_layer(
    size: tuple[int, int, int, int, int], kernel: int, stride: int, activation: str
) -> None:
    """In float64, against the reference; and on two threads, bit for bit."""
    images, channels, height, width, hidden = size
    shapes = [(hidden, channels, 1, 1), (hidden, 1, kernel, kernel), (channels, hidden, 1, 1)]
    tensors = []
    for shape in shapes:
        tensors += [torch.randn(shape) * 0.5, 1 + 0.2 * torch.randn(shape[0]), 0.3 * torch.randn(shape[0])]
    layer = [stride, channels, ["none", "relu", "relu6", "hardswish"].index(activation)]
    call = ([*layer], [kernel, hidden, 1, 0, 1], -1, 1e-5)
    inputs = [torch.randn(images, channels, height, width), *tensors]

    def done(function: Callable[..., Any], threads: int = 1) -> list[Tensor]:
        torch.set_num_threads(threads)
        x, *parts = [part.double().requires_grad_() for part in inputs]
        y, statistics = function(x, None, parts, *call)
        y.backward(weight)
        torch.set_num_threads(1)
        return [y.detach(), statistics.detach(), *(part.grad for part in (x, *parts))]

    out = -(-height // stride), -(-width // stride)
    weight = torch.randn(images, channels, *out, dtype=torch.float64)
    ours, expected = done(mbconv.mbconv_function), done(mbconv_reference)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7 * float(other.abs().max()))
    assert all(map(torch.equal, done(mbconv.mbconv_function, 2), ours))


def test_threads_that_come_late() -> None:
    """Of more threads than cores, some find their first work in the middle of an option of several groups."""
    images, channels, size, hidden, kernels = 16, 8, (32, 33), 100, (7, 3, 5)
    inputs = [torch.randn(images, channels, *size), torch.randn(len(kernels))]
    options: list[int] = []
    for gate, kernel in enumerate(kernels):
        for shape in ((hidden, channels, 1, 1), (hidden, 1, kernel, kernel), (channels, hidden, 1, 1)):
            inputs += [torch.randn(shape) * 0.5, 1 + 0.2 * torch.randn(shape[0]), 0.3 * torch.randn(shape[0])]
        options += [kernel, hidden, 1, gate, 1]
    weight = torch.randn(images, channels, *size, dtype=torch.float64)

    def done(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        x, gates, *tensors = [part.double().requires_grad_() for part in inputs]
        y, _ = mbconv.mbconv_function(x, gates, tensors, [1, channels, 1], options, -1, 1e-5)
        y.backward(weight)
        torch.set_num_threads(1)
        return [y.detach(), *(part.grad for part in (x, gates, *tensors) if part.grad is not None)]

    alone = done(1)
    for _ in range(2):
        assert all(map(torch.equal, done(8), alone))
