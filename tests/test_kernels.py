"""Every kernel meets one contract; a new kernel is picked up here by itself. Then what only one kernel promises."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from pynas import kernels
from pynas.kernels import native, noise
from pynas.kernels.gumbel import gumbel_backward_op, gumbel_reference
from pynas.kernels.kernel import Kernel

CPU = torch.device("cpu")
DEVICES = [CPU] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
DIFFERENTIABLE = {name: kernel for name, kernel in kernels.ALL.items() if kernel.differentiable}
# Two libraries' log and exp differ in the last bits of float32, also where float64 takes its noise from float32.
CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-6}

every_kernel = pytest.mark.parametrize("kernel", kernels.ALL.values(), ids=list(kernels.ALL))
every_differentiable = pytest.mark.parametrize("kernel", DIFFERENTIABLE.values(), ids=list(DIFFERENTIABLE))
every_device = pytest.mark.parametrize("device", DEVICES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def floats(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *args: tuple(t for t in outputs(function(*args)) if t.is_floating_point())


def leaves(args: Sequence[Any]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor) and a.requires_grad]


def scattered(arg: Any) -> Any:
    """The same values in memory that is not dense."""
    if not isinstance(arg, Tensor) or arg.dim() == 0:
        return arg
    wide = torch.stack([arg.detach(), arg.detach()], -1)[..., 0]
    assert arg.numel() <= 1 or not wide.is_contiguous()
    return wide.requires_grad_(arg.requires_grad)


# The contract.


def test_kernels_are_built() -> None:
    assert kernels.facts()["kernels"] == "built"


@every_dtype
@every_device
@every_kernel
def test_matches_reference(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> None:
    for args in kernel.samples(device, dtype):
        expected = outputs(kernel.reference(*args))
        for call in (kernel.function, kernel.op):
            for ours, theirs in zip(outputs(call(*args)), expected, strict=True):
                torch.testing.assert_close(ours, theirs, **CLOSE)


@every_device
@every_differentiable
def test_gradients(kernel: Kernel, device: torch.device) -> None:
    for args in kernel.samples(device, torch.float64):
        for call in (kernel.function, kernel.op, kernel.reference):
            assert torch.autograd.gradcheck(floats(call), args, fast_mode=True)


@every_device
@every_differentiable
def test_gradients_of_float32_match_reference(kernel: Kernel, device: torch.device) -> None:
    for args in kernel.samples(device, torch.float32):
        weights = [torch.randn_like(t) for t in floats(kernel.reference)(*args)]
        expected = torch.autograd.grad(floats(kernel.reference)(*args), leaves(args), weights)
        for call in (kernel.function, kernel.op):
            ours = torch.autograd.grad(floats(call)(*args), leaves(args), weights)
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every_device
@every_differentiable
def test_each_output_alone_gives_its_gradient(kernel: Kernel, device: torch.device) -> None:
    args = kernel.samples(device, torch.float64)[0]
    for i in range(len(floats(kernel.reference)(*args))):
        grads = [
            torch.autograd.grad(floats(call)(*args)[i].square().sum(), leaves(args), allow_unused=True)
            for call in (kernel.function, kernel.op, kernel.reference)
        ]
        for ours, op, expected in zip(*grads, strict=True):
            zeros = torch.zeros(()) if expected is None else expected
            for grad in (ours, op):
                torch.testing.assert_close(grad, torch.zeros_like(grad) + zeros, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own
@every_device
@every_kernel
def test_registration(kernel: Kernel, device: torch.device) -> None:
    for args in kernel.samples(device, torch.float32):
        torch.library.opcheck(kernel.op, args)


@every_device
@every_kernel
def test_compiles(kernel: Kernel, device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(kernel.op, fullgraph=True, backend="aot_eager")
    for args in kernel.samples(device, torch.float32):
        for ours, theirs in zip(outputs(compiled(*args)), outputs(kernel.function(*args)), strict=True):
            assert torch.equal(ours, theirs)


@every_device
@every_kernel
def test_scattered_memory(kernel: Kernel, device: torch.device) -> None:
    for args in kernel.samples(device, torch.float32):
        expected = outputs(kernel.function(*args))
        for call in (kernel.function, kernel.op):
            mirrored = [scattered(arg) for arg in args]
            for ours, theirs in zip(outputs(call(*mirrored)), expected, strict=True):
                assert torch.equal(ours, theirs)


@every_device
@every_differentiable
def test_scattered_gradients(kernel: Kernel, device: torch.device) -> None:
    args = kernel.samples(device, torch.float32)[0]
    mirrored = [scattered(arg) for arg in args]
    for call in (kernel.function, kernel.op):
        weights = [torch.randn_like(t) for t in floats(call)(*args)]
        expected = torch.autograd.grad(floats(call)(*args), leaves(args), weights)
        ours = torch.autograd.grad(floats(call)(*mirrored), leaves(mirrored), [scattered(w) for w in weights])
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a, b)


@every_device
@every_differentiable
@pytest.mark.parametrize("other_path", [False, True])
def test_second_derivatives_are_refused(kernel: Kernel, device: torch.device, other_path: bool) -> None:
    """Also where the input is reached on another path, whose share must not pass for the whole."""
    for call in (kernel.function, kernel.op):
        args = kernel.samples(device, torch.float64)[0]
        x = leaves(args)[0]
        loss = sum(t.square().sum() for t in floats(call)(*args)) + other_path * x.square().sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(grad.sum(), x)


@every_kernel
def test_same_bits_on_every_isa(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    for args in kernel.samples(CPU, torch.float32):
        results = [run_on(isa, kernel, args, monkeypatch) for isa in native.MODULE.usable_isas()]
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def run_on(isa: str, kernel: Kernel, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Outputs, then gradients."""
    chosen = native.MODULE.Kernels(isa)
    assert chosen.isa == isa
    module = sys.modules[kernel.function.__module__]
    monkeypatch.setattr(module, "KERNELS", chosen)
    results = list(outputs(kernel.function(*args)))
    if kernel.differentiable:
        differentiable = floats(kernel.function)(*args)
        torch.manual_seed(1)
        results += torch.autograd.grad(differentiable, leaves(args), [torch.randn_like(t) for t in differentiable])
    return results


@every_kernel
def test_threads_do_not_matter(kernel: Kernel) -> None:
    args = kernel.samples(CPU, torch.float32)[0]
    alone = outputs(kernel.function(*args))
    torch.set_num_threads(2)
    try:
        for a, b in zip(outputs(kernel.function(*args)), alone, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(1)


@every_kernel
def test_without_the_module_the_reference_runs(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[kernel.function.__module__], "KERNELS", None)
    for args in kernel.samples(CPU, torch.float64):
        expected = outputs(kernel.reference(*args))
        for call in (kernel.function, kernel.op):
            assert all(torch.equal(a, b) for a, b in zip(outputs(call(*args)), expected, strict=True))
        if kernel.differentiable:
            assert torch.autograd.gradcheck(floats(kernel.op), args, fast_mode=True)


# Random numbers.

# Known answers of the Random123 distribution, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0_A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_known_answers(counter: list[int], key: int, result: list[int]) -> None:
    words = noise.philox([torch.tensor(word) for word in counter], key)
    assert [int(word) for word in words] == result


def test_no_two_words_share_a_block() -> None:
    """Every place in the grid of domains, seeds, steps, indices, items and layers has a word of its own."""
    grid = [
        noise.random_words(domain, seed, step, torch.arange(4), 5, 9)
        for domain in noise.Domain
        for seed in (0, 1, 2**32, 2**63 - 1)
        for step in (0, 1, 2**32, 2**56 - 1)
    ]
    words = torch.stack(grid).flatten()
    # Equal by chance: words^2 / 2^33 = 0.008 pairs are to be expected.
    assert len(words.unique()) == len(words)


def elementwise(isa: str, name: str, x: Tensor) -> Tensor:
    out = torch.empty(len(x), dtype=torch.float32)
    getattr(native.MODULE.Kernels(isa), name)(x.data_ptr(), out.data_ptr(), len(x))
    return out


def ulps(ours: Tensor, exact: Tensor) -> float:
    """Greatest error in units in the last place of float32."""
    unit = torch.ldexp(torch.ones(()).double(), torch.frexp(exact).exponent - 24)
    return float(((ours.double() - exact).abs() / unit).max())


every_isa = pytest.mark.parametrize("isa", native.MODULE.usable_isas())


@every_isa
def test_log_is_accurate(isa: str) -> None:
    mantissas = torch.arange(2**23, dtype=torch.int32)
    for exponent in (-126, -33, -1, 0, 127):
        x = (mantissas + (exponent + 127 << 23)).view(torch.float32)
        exact = x.double().log()
        nonzero = exact != 0
        ours = elementwise(isa, "log", x)
        assert ulps(ours[nonzero], exact[nonzero]) < 1.5
        assert (ours[~nonzero] == 0).all()


@every_isa
def test_exp_is_accurate(isa: str) -> None:
    x = -torch.arange(0, 2**23, dtype=torch.float32) * (87.33 / 2**23)
    assert ulps(elementwise(isa, "exp", x), x.double().exp()) < 1.5
    edges = torch.tensor([0.0, -87.34, -1e30, -torch.inf])
    assert elementwise(isa, "exp", edges).tolist() == [1.0, 0.0, 0.0, 0.0]


@every_isa
def test_gumbel_noise_keeps_its_tails(isa: str) -> None:
    """Also at both ends of u, where a float32 u would be 0 or 1."""
    middle = torch.linspace(0, 2**32 - 1, 2**22, dtype=torch.float64).long()
    ends = torch.arange(4096)
    words = torch.cat([ends, 2**31 + ends - 2048, 2**32 - 1 - ends, middle])
    u_below_one = (words.double() + 0.5) * 2.0**-32
    exact = -torch.log(-torch.log1p(-u_below_one))
    ours = elementwise(isa, "gumbel", words.to(torch.uint32))
    assert (ours.double() - exact).abs().max() < 5e-7 * exact.abs().max()
    assert ulps(ours[exact.abs() > 1], exact[exact.abs() > 1]) < 2.5
    assert ours.max() == pytest.approx(33 * math.log(2), abs=1e-5)
    assert ours.min() == pytest.approx(-math.log(33 * math.log(2)), abs=1e-5)
    torch.testing.assert_close(noise.gumbel(words), ours, rtol=1e-6, atol=3e-7)


# Gumbel gates.


def uneven(layers: int = 6, options: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """theta, mask, cost."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(layers, options, dtype=torch.bool)
    mask[1, 3:] = False
    mask[2, :2] = False
    return (
        torch.randn(layers, options, generator=generator),
        mask,
        torch.rand(layers, options, generator=generator),
    )


def gates(theta: Tensor, mask: Tensor, cost: Tensor, **changes: Any) -> kernels.GumbelGates:
    return kernels.gumbel_gates(theta, mask, cost, **({"tau": 1.0, "seed": 11, "step": 0} | changes))


def chi_square_p(counts: Tensor, p: Tensor) -> float:
    return float(stats.chisquare(counts.double().numpy(), (p * counts.sum() / p.sum()).double().numpy()).pvalue)


def test_choices_follow_softmax_of_theta() -> None:
    theta, mask, cost = uneven()
    drawn = gates(theta, mask, cost, draws=40_000)
    p = theta.double().masked_fill(~mask, -torch.inf).softmax(-1)
    for layer in range(len(theta)):
        counts = drawn.index[:, layer].bincount(minlength=theta.shape[1])
        assert (counts[~mask[layer]] == 0).all()
        assert chi_square_p(counts[mask[layer]], p[layer, mask[layer]]) > 0.01
    expected = p.log().masked_fill(~mask, 0).expand(40_000, -1, -1).gather(-1, drawn.index[..., None])
    torch.testing.assert_close(drawn.log_prob.double(), expected.squeeze(-1), **CLOSE)


def test_index_is_the_greatest_gate() -> None:
    drawn = gates(*uneven(), draws=500, tau=2.0)
    assert torch.equal(drawn.soft.argmax(-1), drawn.index)


def test_gates_sum_to_one_and_cost_is_their_mean() -> None:
    theta, mask, cost = uneven()
    drawn = gates(theta, mask, cost, draws=500)
    torch.testing.assert_close(drawn.soft.sum(-1), torch.ones(500, len(theta)))
    assert (drawn.soft[:, ~mask] == 0).all()
    torch.testing.assert_close(drawn.cost, (drawn.soft * cost).sum((1, 2)))


def test_cost_and_theta_of_masked_options_are_ignored() -> None:
    theta, mask, cost = uneven()
    expected = gates(theta, mask, cost)
    theta, cost = theta.masked_fill(~mask, torch.nan).requires_grad_(), cost.masked_fill(~mask, torch.inf)
    drawn = gates(theta, mask, cost)
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))
    (grad,) = torch.autograd.grad(drawn.cost.sum() + drawn.log_prob.sum() + drawn.soft[0, 0, 0], theta)
    assert grad.isfinite().all()
    assert (grad[~mask] == 0).all()


def test_temperature_moves_gates_from_uniform_to_one_hot() -> None:
    theta, mask, cost = uneven()
    tops = [float(gates(theta, mask, cost, tau=tau, draws=200).soft.amax(-1).mean()) for tau in (10.0, 1.0, 0.1, 0.01)]
    assert tops == sorted(tops)
    cold = gates(theta, mask, cost, tau=1e-30, draws=200)
    assert torch.equal(cold.soft, torch.nn.functional.one_hot(cold.index, 5).float())
    hot = gates(theta, mask, cost, tau=1e30, draws=200)
    torch.testing.assert_close(hot.soft, (mask / mask.sum(-1, keepdim=True)).expand(200, -1, -1))


def test_great_logits_stay_finite() -> None:
    theta = torch.tensor([[3e38, -3e38, 0.0], [1e4, 1e4, -1e4]], requires_grad=True)
    drawn = gates(theta, torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3))
    assert drawn.soft[0, 0].tolist() == [1.0, 0.0, 0.0]
    assert drawn.log_prob.isfinite().all()
    (grad,) = torch.autograd.grad(drawn.log_prob.sum() + drawn.cost.sum(), theta)
    assert grad.isfinite().all()


def test_draws_steps_and_seeds_are_independent() -> None:
    """Soft gates of equal logits are ranks of the noise: any shared stream shows as correlation."""
    theta, mask, cost = torch.zeros(40, 8), torch.ones(40, 8, dtype=torch.bool), torch.zeros(40, 8)
    streams = [
        gates(theta, mask, cost, draws=20, seed=seed, step=step).soft[d, :, :7].flatten()
        for seed in (0, 1, 2**32)
        for step in (0, 1, 2**32)
        for d in (0, 1, 19)
    ]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    # 27 * 26 / 2 pairs of 280 values: the greatest of 351 normal correlations of deviation 0.06 stays below 0.3.
    assert correlation.abs().max() < 0.3


def test_noise_depends_on_the_place_alone() -> None:
    """More draws, layers or options leave the noise of the others as it was."""
    theta, mask, cost = torch.zeros(70, 17), torch.ones(70, 17, dtype=torch.bool), torch.zeros(70, 17)
    large = gates(theta, mask, cost, draws=3).soft
    small = gates(theta[:5, :4], mask[:5, :4], cost[:5, :4]).soft
    expected = large[:1, :5, :4] / large[:1, :5, :4].sum(-1, keepdim=True)
    torch.testing.assert_close(small, expected)


def test_no_layers_and_one_option() -> None:
    empty = gates(torch.zeros(0, 3), torch.ones(0, 3, dtype=torch.bool), torch.zeros(0, 3), draws=2)
    assert [tuple(t.shape) for t in empty] == [(2, 0, 3), (2, 0), (2, 0), (2,)]
    assert empty.cost.tolist() == [0.0, 0.0]
    only = gates(torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool), torch.full((2, 1), 1.5))
    assert only.soft.flatten().tolist() == [1.0, 1.0]
    assert only.cost.tolist() == [3.0]


def test_most_options() -> None:
    theta = torch.linspace(-2, 2, 256).expand(9, 256)
    args = theta, torch.ones(9, 256, dtype=torch.bool), theta.square(), 0.7, 5, 6, 2
    for ours, expected in zip(kernels.ALL["gumbel_gates"].function(*args), gumbel_reference(*args), strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)


def test_gradients_follow_changes_in_place_or_refuse() -> None:
    theta, mask, cost = uneven()
    theta = theta.requires_grad_()
    drawn = gates(theta, mask, cost)
    with torch.no_grad():
        theta += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        drawn.cost.sum().backward()


def test_graphs_are_freed() -> None:
    theta, mask, cost = uneven()
    gc.disable()
    try:
        drawn = gates(theta.requires_grad_(), mask, cost)
        alive = weakref.ref(drawn.soft)
        del drawn
        assert alive() is None
    finally:
        gc.enable()


def test_reference_has_second_derivatives() -> None:
    args = kernels.ALL["gumbel_gates"].samples(CPU, torch.float64)[1]
    assert torch.autograd.gradgradcheck(floats(gumbel_reference), args, fast_mode=True)


def test_new_steps_and_temperatures_do_not_recompile() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(theta: Tensor, mask: Tensor, cost: Tensor, tau: float, step: int) -> Tensor:
        drawn = kernels.gumbel_gates(theta, mask, cost, tau, 7, step)
        return drawn.soft.square().sum() + drawn.log_prob.sum() + drawn.cost.sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    theta, mask, cost = uneven()
    theta = theta.requires_grad_()
    for step in range(8):
        args = theta, mask, cost, 5.0 * 0.9**step, step
        (ours,) = torch.autograd.grad(compiled(*args), theta)
        (expected,) = torch.autograd.grad(loss(*args), theta)
        torch.testing.assert_close(ours, expected)
    assert counter.frame_count <= 3  # as constants, then as symbols; one may be found out before the other


def nan_at(x: Tensor, layer: int) -> Tensor:
    x = x.clone()
    x[layer, 2] = torch.nan
    return x


THETA, MASK, COST = uneven()
CLOSED = MASK.clone()
CLOSED[4] = False
BAD_GATES: list[tuple[dict[str, Any], str]] = [
    ({"theta": THETA[0]}, r"one shape \(layers, options\), got \(5,\)"),
    ({"mask": MASK[:, :3]}, r"got \(6, 5\), \(6, 3\) and \(6, 5\)"),
    ({"cost": COST[:3]}, r"one shape"),
    ({"theta": THETA.half()}, "both be float32 or both float64, got torch.float16"),
    ({"cost": COST.double()}, "both be float32 or both float64"),
    ({"mask": MASK.float()}, "mask must be bool"),
    ({"tau": 0.0}, r"tau is 0.0; it must be a finite number > 0"),
    ({"tau": -1.0}, "tau is -1.0"),
    ({"tau": math.nan}, "tau is nan"),
    ({"tau": math.inf}, "tau is inf"),
    ({"draws": 0}, "draws is 0"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**63}, "seed is 9223372036854775808"),
    ({"step": -1}, "step is -1"),
    ({"step": 2**56}, "step is 72057594037927936"),
    ({"mask": CLOSED}, "mask of layer 4 allows no option"),
    ({"theta": nan_at(THETA, 3)}, "theta of layer 3 is not finite"),
    ({"theta": nan_at(THETA, 3) * torch.inf}, "theta of layer 0 is not finite"),
    ({"cost": nan_at(COST, 5)}, "cost of layer 5 is not finite"),
    (
        {"theta": torch.zeros(2, 257), "mask": torch.ones(2, 257).bool(), "cost": torch.zeros(2, 257)},
        "1 to 256 options",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_GATES)
def test_bad_gates_are_named(changes: dict[str, Any], message: str) -> None:
    args = {"theta": THETA, "mask": MASK, "cost": COST, "tau": 1.0, "seed": 0, "step": 0} | changes
    for call in (kernels.gumbel_gates, gumbel_reference):
        with pytest.raises(ValueError, match=message):
            call(**args)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own
def test_backward_operator_refuses_gradients() -> None:
    args = kernels.ALL["gumbel_gates"].samples(CPU, torch.float64)[0]
    draws, (layers, options) = args[6], args[0].shape
    grads = [
        torch.randn(*shape, dtype=torch.float64) for shape in ((draws, layers, options), (draws, layers), (draws,))
    ]
    torch.library.opcheck(gumbel_backward_op, (*[a.detach() for a in args[:4]], *args[4:6], *grads))


# Paths.


def test_paths_follow_softmax_of_theta() -> None:
    theta, mask, _ = uneven()
    paths = kernels.sample_paths(100_000, theta, mask, seed=1)
    p = theta.double().masked_fill(~mask, -torch.inf).softmax(-1)
    for layer in range(len(theta)):
        counts = paths[:, layer].bincount(minlength=theta.shape[1])
        assert (counts[~mask[layer]] == 0).all()
        assert chi_square_p(counts[mask[layer]], p[layer, mask[layer]]) > 0.01


def test_layers_of_a_path_are_independent() -> None:
    paths = kernels.uniform_paths(50_000, [4] * 9, seed=2).long()
    for a, b in ((0, 1), (0, 4), (3, 4), (7, 8)):
        assert chi_square_p((paths[:, a] * 4 + paths[:, b]).bincount(minlength=16), torch.ones(16)) > 0.01


def test_uniform_paths_are_uniform() -> None:
    options = [1, 2, 3, 7, 9, 256]
    paths = kernels.uniform_paths(200_000, options, seed=4)
    for layer, count in enumerate(options):
        counts = paths[:, layer].bincount(minlength=count)
        assert len(counts) == count
        assert count == 1 or chi_square_p(counts, torch.ones(count)) > 0.01


def test_uniform_paths_by_counts_mask_or_theta_are_the_same() -> None:
    mask = torch.arange(8) < torch.tensor([8, 2, 4])[:, None]
    paths = kernels.uniform_paths(1000, [8, 2, 4], seed=5)
    assert torch.equal(paths, kernels.uniform_paths(1000, mask, seed=5))
    assert torch.equal(paths, kernels.sample_paths(1000, torch.zeros(3, 8), mask, seed=5))


def test_sure_options_are_always_taken() -> None:
    theta = torch.tensor([[0.0, 200.0, 0.0], [50.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [False, False, True], [False, True, False]])
    assert kernels.sample_paths(2000, theta, mask, seed=6).unique(dim=0).tolist() == [[1, 2, 1]]


def test_paths_do_not_depend_on_how_many() -> None:
    many = kernels.uniform_paths(1000, [9] * 22, seed=7)
    assert torch.equal(kernels.uniform_paths(77, [9] * 22, seed=7), many[:77])
    assert torch.equal(kernels.uniform_paths(77, [9] * 5, seed=7), many[:77, :5])
    assert not torch.equal(kernels.uniform_paths(1000, [9] * 22, seed=7, step=1), many)
    assert not torch.equal(kernels.uniform_paths(1000, [9] * 22, seed=8), many)
    assert kernels.uniform_paths(0, [9] * 22, seed=7).shape == (0, 22)


def test_fair_rounds_take_every_option_once() -> None:
    rounds = kernels.fair_paths(300, [6] * 7, seed=1)
    assert rounds.shape == (300, 6, 7)
    assert (rounds.sort(1).values == torch.arange(6)[:, None]).all()


def test_fair_rounds_of_uneven_layers_differ_by_at_most_one() -> None:
    options = [9, 1, 4, 8, 3]
    rounds = kernels.fair_paths(5000, options, seed=2)
    for layer, count in enumerate(options):
        counts = torch.nn.functional.one_hot(rounds[:, :, layer].long(), count).sum(1)
        assert (counts.sum(-1) == 9).all()
        assert ((counts == 9 // count) | (counts == -(-9 // count))).all()
        for start in range(0, 9 - count + 1, count):
            whole = rounds[:, start : start + count, layer].sort(1).values
            assert (whole == torch.arange(count)).all()
        if count not in (1, 3, 9):  # the cut permutation is fair in the mean
            assert chi_square_p(rounds[:, 9 // count * count :, layer].flatten().bincount(), torch.ones(count)) > 0.01


def test_fair_permutations_are_uniform_and_independent() -> None:
    rounds = kernels.fair_paths(24_000, [4] * 5, seed=3).long()
    code = (rounds * 4 ** torch.arange(4)[:, None]).sum(1)  # one number per permutation
    codes = torch.tensor([sum(o * 4**i for i, o in enumerate(p)) for p in permutations(range(4))]).sort().values
    for layer in range(5):
        counts = torch.searchsorted(codes, code[:, layer].contiguous()).bincount(minlength=24)
        assert chi_square_p(counts, torch.ones(24)) > 0.01
    for a, b in ((0, 1), (3, 4)):
        pairs = rounds[:, 0, a] * 4 + rounds[:, 0, b]
        assert chi_square_p(pairs.bincount(minlength=16), torch.ones(16)) > 0.01


BAD_PATHS: list[tuple[Callable[[], Tensor], str]] = [
    (lambda: kernels.sample_paths(-1, THETA, seed=0), "n is -1"),
    (lambda: kernels.sample_paths(1, THETA[0], seed=0), r"shape \(layers, options\)"),
    (lambda: kernels.sample_paths(1, THETA, MASK[:2], seed=0), "mask must be bool of shape"),
    (lambda: kernels.sample_paths(1, THETA, CLOSED, seed=0), "mask of layer 4 allows no option"),
    (lambda: kernels.sample_paths(1, nan_at(THETA, 2), seed=0), "theta must be finite"),
    (lambda: kernels.sample_paths(1, THETA, seed=-1), "seed is -1"),
    (lambda: kernels.sample_paths(1, THETA, seed=0, step=-1), "step is -1"),
    (lambda: kernels.uniform_paths(1, [3, 0], seed=0), r"1 to 256 options, got \[3, 0\]"),
    (lambda: kernels.uniform_paths(1, [257], seed=0), "1 to 256 options"),
    (lambda: kernels.uniform_paths(2**32 + 1, [2], seed=0), r"it must be in 0 .. 2\^32"),
    (lambda: kernels.fair_paths(-1, [3], seed=0), "rounds is -1"),
    (lambda: kernels.fair_paths(1, [0], seed=0), "1 to 256 options"),
    (lambda: kernels.ALL["fair_paths"].op(torch.tensor([5]), 1, 3, 0, 0), "needs 1 to 3 options"),
]


@pytest.mark.parametrize(("call", "message"), BAD_PATHS)
def test_bad_paths_are_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# How the module is found.


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env=os.environ | environment,
        cwd=Path(kernels.__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


WITHOUT_MODULE = "import sys; sys.modules['pynas._C'] = None; from pynas import kernels; print(kernels.facts()['isa'])"


def test_missing_module_warns_once_and_falls_back() -> None:
    done = in_new_process(WITHOUT_MODULE, PYNAS_REQUIRE_KERNELS="")
    assert done.stdout.strip() == "none"
    assert done.stderr.count("The C++ kernels are missing") == 1
    assert "pip install ." in done.stderr


def test_missing_module_is_an_error_where_kernels_are_required() -> None:
    done = in_new_process(WITHOUT_MODULE, PYNAS_REQUIRE_KERNELS="1")
    assert done.returncode != 0
    assert "ImportError: PYNAS_REQUIRE_KERNELS=1, but pynas._C cannot be imported" in done.stderr


def test_isa_is_chosen_by_environment() -> None:
    done = in_new_process("from pynas import kernels; print(kernels.facts()['isa'])", PYNAS_ISA="base")
    assert done.stdout.strip() == "base"


def test_unknown_isa_is_refused() -> None:
    usable = ", ".join(native.MODULE.usable_isas())
    with pytest.raises(ValueError, match=f"Instruction set 'sse9' is not usable here. .* allow: {usable}"):
        native.MODULE.Kernels("sse9")
    assert native.MODULE.Kernels("").isa == native.MODULE.usable_isas()[-1]


def test_facts_are_plain() -> None:
    facts = kernels.facts()
    assert facts["isa"] in str(facts["usable_isas"]).split()
    assert set(str(facts["usable_isas"]).split()) <= set(str(facts["built_isas"]).split())
    assert facts["compiler"]
    assert facts["cuda"] is False
