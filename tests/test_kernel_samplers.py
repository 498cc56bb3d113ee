"""What the samplers promise beyond the contract of test_kernels.py: distributions, independence, errors."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from pynas import kernels
from pynas.kernels.gumbel import gumbel_backward_op, gumbel_reference

CPU = torch.device("cpu")
CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-6}


def floats(*args: Any) -> tuple[Tensor, ...]:
    """The differentiable results of the reference."""
    soft, _, log_prob, cost = gumbel_reference(*args)
    return soft, log_prob, cost


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
    expected = p.double() / p.double().sum() * counts.sum()
    return float(stats.chisquare(counts.double().numpy(), expected.numpy()).pvalue)


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


def test_greatest_seed_and_step() -> None:
    args = *uneven(), 1.0, 2**63 - 1, 2**56 - 1, 1
    for ours, expected in zip(kernels.ALL["gumbel_gates"].function(*args), gumbel_reference(*args), strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)


def test_gradients_of_other_shapes_are_refused() -> None:
    gradients = torch.zeros(1, 6, 5), torch.zeros(1, 5), torch.zeros(1)
    with pytest.raises(ValueError, match="must be torch.float32 of shapes"):
        gumbel_backward_op(*uneven(), torch.tensor(1.0), 0, 0, *gradients)


def test_changes_in_place_before_backward_are_refused() -> None:
    theta, mask, cost = uneven()
    theta = theta.requires_grad_()
    drawn = gates(theta, mask, cost)
    with torch.no_grad():
        theta += 1
    with pytest.raises(RuntimeError, match="changed in place"):
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
    assert torch.autograd.gradgradcheck(floats, args, fast_mode=True)


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
    ({"tau": 9e-31}, "tau is 9e-31"),
    ({"tau": 1.1e30}, "tau is 1.1e[+]30"),
    ({"draws": 0}, "draws is 0"),
    ({"draws": 2**32 + 1}, "draws is 4294967297"),
    ({"draws": 2**64 + 1}, "draws is 18446744073709551617"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**63}, "seed is 9223372036854775808"),
    ({"step": -1}, "step is -1"),
    ({"step": 2**56}, "step is 72057594037927936"),
    ({"mask": MASK.to("meta")}, "on cpu, meta and cpu"),
    ({"mask": CLOSED}, "mask of layer 4 allows no option"),
    ({"theta": nan_at(THETA, 3)}, "theta of layer 3 is not finite"),
    ({"theta": nan_at(THETA, 3) * torch.inf}, "theta of layer 0 is not finite"),
    ({"cost": nan_at(COST, 5)}, "cost of layer 5 is not finite"),
    (
        {"theta": torch.zeros(2, 257), "mask": torch.ones(2, 257).bool(), "cost": torch.zeros(2, 257)},
        "1 to 256 options",
    ),
    (
        {"theta": torch.zeros(2**18, 1), "mask": torch.ones(2**18, 1).bool(), "cost": torch.zeros(2**18, 1)},
        "< 2\\^18 layers",
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
