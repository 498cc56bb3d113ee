"""CUDA kernels, their own source run on the CPU by threads that are played there; on a GPU where there is one.

`tests/test_kernels.py` has the contract, which covers GPUs as well. Here are the float32 kernels under the shim of
csrc/cuda/on_cpu.h, which checks every access, and faults that it must find.
"""

from __future__ import annotations

import copy
import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cuda_on_cpu
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pynas import kernels
from pynas.choices import Choice, Gates, Slot
from pynas.kernels import (
    cuda,
    cuda_infer,
    cuda_mbconv,
    cuda_verdicts,
    gumbel,
    mbconv_infer,
    mbconv_reference,
    mbconv_update,
    paths,
    setting,
)
from pynas.kernels.kernel import Kernel
from pynas.kernels.rule import runs_fused
from pynas.registry import FAMILIES
from pynas.tuning import tune

pytestmark = pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="no C++ compiler to build CUDA kernels with")

CPU = torch.device("cpu")
ON_GPU = [
    kernels.ALL[name] for name in ("gumbel_gates", "sample_paths", "fair_paths", "mixed_mbconv", "mbconv_inference")
]
every_kernel = pytest.mark.parametrize("kernel", ON_GPU, ids=[kernel.name for kernel in ON_GPU])
ORDERS = (0, 1, 2026)  # of threads: their own, and two at random
every_order = pytest.mark.parametrize("order", ORDERS)
every_share = pytest.mark.parametrize("rows", [0, 1, 3])  # blocks of threads that share the positions


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> cuda.Library:
    return cuda_on_cpu.build(tmp_path_factory.mktemp("cuda") / "whole")


@pytest.fixture
def played(library: cuda.Library) -> Iterator[cuda.Library]:
    """CUDA kernels take tensors on the CPU."""
    with cuda.using(library):
        yield library
    set_order(library, 0)


def set_order(library: cuda.Library, seed: int) -> None:
    library.function("pynas_cuda_order", None, ctypes.c_uint64)(seed)


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def leaves(args: Any) -> list[Tensor]:
    flat = [a for arg in args for a in (arg if isinstance(arg, list) else [arg])]
    return [a for a in flat if isinstance(a, Tensor) and a.requires_grad]


def results(call: Callable[..., Any], args: Any) -> list[Tensor]:
    """What a call returns, and the gradients of all of it."""
    torch.manual_seed(0)
    found = outputs(call(*args))
    rising = [t for t in found if t.requires_grad]
    grads = torch.autograd.grad(rising, leaves(args), [torch.randn_like(t) for t in rising]) if rising else ()
    return [t.detach() for t in (*found, *grads)]


def agree(kernel: Kernel, ours: list[Tensor], theirs: list[Tensor]) -> bool:
    rtol, atol = 10 * kernel.tolerance[0], 10 * kernel.tolerance[1]
    return all(torch.allclose(a, b, rtol=rtol, atol=atol) for a, b in zip(ours, theirs, strict=True))


@every_order
@every_share
@every_kernel
def test_equals_the_reference(
    kernel: Kernel, rows: int, order: int, played: cuda.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_mbconv, "most_rows", rows)
    set_order(played, order)
    for args in kernel.samples(CPU, torch.float32):
        ours = results(kernel.function, args)
        with cuda.using(None):
            theirs = results(kernel.reference, args)
        assert agree(kernel, ours, theirs)


@every_kernel
def test_runs_at_all(kernel: Kernel, played: cuda.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would pass with no kernel, too."""
    called = []
    find = cuda.Library.function
    monkeypatch.setattr(cuda_mbconv, "_functions", {})
    monkeypatch.setattr(
        cuda.Library, "function", lambda self, name, *rest: called.append(name) or find(self, name, *rest)
    )
    for args in kernel.samples(CPU, torch.float32)[:1]:
        kernel.function(*args)
    assert any(name.startswith("pynas_") for name in called)


def test_results_do_not_depend_on_the_order_of_threads(played: cuda.Library) -> None:
    for args in mbconv_reference.samples(CPU, torch.float32):
        found = []
        for order in ORDERS:
            set_order(played, order)
            found.append(results(kernels.mixed_mbconv, args))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_same_bits_as_the_cpu_kernel(played: cuda.Library) -> None:
    for function, samples in (
        (gumbel.gumbel_function, gumbel._samples),
        (paths._sample, paths._path_samples),
        (paths._fair, paths._fair_samples),
    ):
        for args in samples(CPU, torch.float32):
            ours = results(function, args)
            with cuda.using(None):
                theirs = results(function, args)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_running_averages(played: cuda.Library) -> None:
    """Modules of a layer after three steps are as plain PyTorch leaves them."""
    slot = Slot("layer", Choice("layer", ("k3_e1", "k3_e1_g2", "k5_e3", "skip")), "mbconv", 8, 8, 6)
    torch.manual_seed(0)
    fused: Any = FAMILIES.get("mbconv").mixed(slot).train()
    plain = copy.deepcopy(fused)
    gates = Gates(torch.tensor([0.1, 0.2, 0.3, 0.4]), (0, 1, 2, 3), (0, 1, 2, 3))
    for _ in range(3):
        x = torch.randn(4, 8, 6, 6)
        with setting.using("fused"):
            fused(x, gates)
        with setting.using("reference"):
            plain(x, gates)
    expected = dict(plain.named_buffers())
    for name, buffer in fused.named_buffers():
        torch.testing.assert_close(buffer, expected[name], rtol=1e-5, atol=1e-6)
    assert any(int(buffer) == 3 for name, buffer in expected.items() if name.endswith("num_batches_tracked"))


def test_nan_stays(played: cuda.Library) -> None:
    x, gates, tensors, *rest = mbconv_reference.samples(CPU, torch.float32)[0]
    broken = x.detach().clone()
    broken[0, 0, 0, 0] = torch.nan
    y, statistics = kernels.mixed_mbconv(broken, gates, tensors, *rest)
    assert y.isnan().all()
    assert statistics.isnan().any()


def test_layers_without_sense_give_nan(played: cuda.Library) -> None:
    theta, mask, cost = torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool), torch.ones(3, 2)
    mask[1] = False
    soft, _, log_prob, total = gumbel.gumbel_function(theta, mask, cost, 1.0, 0, 0, 1)
    for found in (soft[0, 1], log_prob[0, 1], total):
        assert found.isnan().all()
    assert soft[0, [0, 2]].isfinite().all()


def test_large_means_cost_no_digits(played: cuda.Library) -> None:
    """Statistics are taken about the mean, so that a mean of a thousand deviations leaves them right."""
    x, gates, tensors, *rest = mbconv_reference.samples(CPU, torch.float32)[4]
    shifted = (x.detach() + 300.0).requires_grad_()
    exact = [a.detach().double().requires_grad_() for a in (shifted, gates, *tensors)]
    expected = results(mbconv_reference.mbconv_reference, (exact[0], exact[1], exact[2:], *rest))
    ours = results(kernels.mixed_mbconv, (shifted, gates, tensors, *rest))
    plain = results(mbconv_reference.mbconv_reference, (shifted, gates, tensors, *rest))
    for a, b, c in zip(ours, plain, expected, strict=True):
        scale = c.abs().max() + 1e-3
        assert (a - c).abs().max() / scale <= 10 * (b - c).abs().max() / scale + 1e-3


@given(data=st.data())
@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_odd_shapes(data: st.DataObject, library: cuda.Library) -> None:
    draw = data.draw
    groups = draw(st.sampled_from([1, 2, 3]))
    channels, out = (groups * draw(st.integers(1, 40 // groups)) for _ in range(2))
    stride = draw(st.sampled_from([1, 2]))
    blocks = [
        (draw(st.sampled_from([3, 5, 7])), g * draw(st.integers(1, 70 // g)), g)
        for g in draw(st.lists(st.sampled_from([1, groups]), min_size=1, max_size=3))
    ]
    images, size, per_image = draw(st.integers(1, 3)), draw(st.integers(2, 11)), draw(st.booleans())
    assume(images * -(-size // stride) > 1)  # a norm needs two values
    activation = draw(st.sampled_from(["none", "relu6", "hardswish"]))
    args = mbconv_reference._sample(
        CPU,
        torch.float32,
        draw(st.integers(0, 99)),
        images,
        per_image,
        (channels, out),
        size,
        stride,
        activation,
        blocks,
    )
    x, gates, tensors, layer, options, identity, eps = args
    set_order(library, draw(st.integers(0, 3)))
    exact = [part.detach().double().requires_grad_() for part in (x, gates, *tensors)]
    with cuda.using(library):
        ours = results(kernels.mixed_mbconv, args)
    set_order(library, 0)
    plain = results(mbconv_reference.mbconv_reference, args)
    right = results(mbconv_reference.mbconv_reference, (exact[0], exact[1], exact[2:], layer, options, identity, eps))
    for a, b, c in zip(ours, plain, right, strict=True):
        assert (a - c).norm() <= 20 * (b - c).norm() + 1e-5 * c.norm() + 1e-4


def wide(stride: int, blocks: Sequence[tuple[int, int, int]]) -> Any:
    """A layer that needs several chunks of 32 channels in every product."""
    return mbconv_reference._sample(CPU, torch.float32, 3, 2, True, (68, 68), 9, stride, "hardswish", blocks)


@pytest.mark.parametrize("stride", [1, 2])
def test_products_of_several_steps(stride: int, played: cuda.Library) -> None:
    """The second step must not overwrite what others still read of the first."""
    set_order(played, 1)
    args = wide(stride, ((3, 70, 1), (5, 72, 2)))
    ours = results(kernels.mixed_mbconv, args)
    theirs = results(mbconv_reference.mbconv_reference, args)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-4


@pytest.mark.parametrize(("groups", "out"), [(1, 40), (1, 72), (2, 136)])
def test_folded_blocks_of_many_channels(groups: int, out: int, played: cuda.Library) -> None:
    set_order(played, 1)
    torch.manual_seed(0)
    shapes = (70, 40 // groups, 1, 1), (70,), (70, 1, 3, 3), (70,), (out, 70 // groups, 1, 1), (out,)
    weights = [torch.randn(shape) / 4 for shape in shapes]
    x = torch.randn(2, 9, 10, 40)
    rest = 1, groups, "relu6", out == 40
    y = mbconv_infer.inference_function(x, *weights, *rest)
    torch.testing.assert_close(y, mbconv_infer.inference_reference(x, *weights, *rest), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("identity", [False, True])
def test_what_is_not_trained_gives_x_no_gradient(identity: bool, played: cuda.Library) -> None:
    """Not by its residual either."""
    x, gates, tensors, layer, options, column, eps = mbconv_reference._sample(
        CPU, torch.float32, 0, 2, False, (6, 6), 5, 1, "relu", ((3, 8, 2), (5, 6, 1), (3, 6, 3))
    )
    assert column >= 0
    for untrained in ((1,), (0, 2), (0, 1, 2)):
        numbers = list(options)
        for index in untrained:
            numbers[mbconv_reference.NUMBERS * index + 4] = 0
        call = x, gates, tensors, layer, numbers, column if identity else -1, eps
        found = []
        for function in (kernels.mixed_mbconv, mbconv_reference.mbconv_reference):
            y, _ = function(*call)
            grads = torch.autograd.grad(y.square().sum(), [x, gates], allow_unused=True)
            found.append([torch.zeros(()) if grad is None else grad for grad in grads])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b.expand_as(a), rtol=1e-4, atol=1e-4)


def test_gradients_alone_and_again(played: cuda.Library) -> None:
    """Any part of the gradients is as in all of them, and the same a second time; a second derivative is refused."""
    x, gates, tensors, *rest = mbconv_reference.samples(CPU, torch.float32)[2]
    y, _ = kernels.mixed_mbconv(x, gates, tensors, *rest)
    inputs, weight = [x, gates, *tensors], torch.randn(y.shape[:2])[..., None, None].expand_as(y)
    whole = torch.autograd.grad(y, inputs, weight, retain_graph=True)
    for chosen in ([0], [1], [2], [8, 3], [0, 1], list(range(2, len(inputs)))):
        part = torch.autograd.grad(y, [inputs[i] for i in chosen], weight, retain_graph=True)
        assert all(torch.equal(a, whole[i]) for a, i in zip(part, chosen, strict=True))
    (again,) = torch.autograd.grad(y, x, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="mixed_mbconv"):
        torch.autograd.grad(again.sum(), gates)


def test_parts_of_other_tensors(played: cuda.Library) -> None:
    """Images and weights that begin at an odd address, or do not lie side by side."""
    x, gates, tensors, layer, options, identity, eps = mbconv_reference.samples(CPU, torch.float32)[0]

    def odd(t: Tensor) -> Tensor:
        last = t.dim() == 4 and t is x
        values = t.detach().contiguous(memory_format=torch.channels_last) if last else t.detach()
        room = values.new_empty(2 * values.numel() + 1)
        if last:
            return room[1 : 1 + t.numel()].as_strided(t.shape, values.stride(), 1).copy_(values).requires_grad_()
        return room[1::2].view_as(t).copy_(values).requires_grad_()

    moved = odd(x), odd(gates), [odd(t) for t in tensors], layer, options, identity, eps
    assert moved[0].data_ptr() % 16
    # Dense weights: torch's own batch norm reads scales that do not lie side by side as if they did.
    expected = results(mbconv_reference.mbconv_reference, (*moved[:1], gates, tensors, *moved[3:]))
    assert agree(kernels.ALL["mixed_mbconv"], results(kernels.mixed_mbconv, moved), expected)
    weights = [torch.randn(s) for s in ((8, 4, 1, 1), (8,), (8, 1, 3, 3), (8,), (4, 8, 1, 1), (4,))]
    images = torch.randn(2 * 3 * 3 * 4 + 1)[1:].view(2, 3, 3, 4)
    y = mbconv_infer.inference_function(images, *weights, 1, 1, "relu", True)
    torch.testing.assert_close(y, mbconv_infer.inference_reference(images, *weights, 1, 1, "relu", True))


def test_senseless_arguments_are_told(played: cuda.Library) -> None:
    x, gates, tensors, _, options, identity, eps = mbconv_reference.samples(CPU, torch.float32)[0]
    for found in (played, None):
        with cuda.using(found), pytest.raises(ValueError, match="layer is"):
            kernels.mixed_mbconv(x, gates, tensors, [0, 4, 1], options, identity, eps)
    assert not cuda_mbconv.takes(x, [0, 4, 1], options)


def test_averages_of_more_options_than_there_is_room_for(played: cuda.Library) -> None:
    options = (3, 4, 1, 0, 1) * (cuda_mbconv.MOST_OPTIONS + 1)
    statistics = torch.rand(mbconv_reference.statistics_size((1, 4, 0), options))
    norms = 3 * len(options) // mbconv_reference.NUMBERS
    buffers = tuple(t for _ in range(norms) for t in (torch.zeros(4), torch.ones(4), torch.tensor(0)))
    mbconv_update.update_norms((1, 4, 0), options, statistics, buffers, 0.5, 8, 8)
    torch.testing.assert_close(buffers[-3], statistics[-8:-4] / 2)


def test_folded_blocks_know_how_much_room_there_is(played: cuda.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 2, 2, 193)
    assert cuda_infer.takes(x, 193)
    monkeypatch.setattr(played, "shared_bytes", lambda x: 99 * 1024)
    assert cuda_infer.takes(x, 192)
    assert not cuda_infer.takes(x, 193)


def test_functions_of_a_library_go_with_it(played: cuda.Library) -> None:
    """Another one may come to lie at its address."""
    before = len(cuda_mbconv._functions)
    other = cuda.Library(played.path, "cpu")
    cuda_mbconv._functions_of(other)
    assert len(cuda_mbconv._functions) == before + 1
    del other
    gc.collect()
    assert len(cuda_mbconv._functions) == before


def test_the_widest_layers_fit_into_shared_memory(played: cuda.Library) -> None:
    """Under the shim a block with more than a GPU has fails."""
    widest = cuda_mbconv.MOST_CHANNELS, 4
    args = mbconv_reference._sample(CPU, torch.float32, 0, 1, False, widest, 3, 2, "relu6", ((7, 8, 1),))
    ours = results(kernels.mixed_mbconv, args)
    assert agree(kernels.ALL["mixed_mbconv"], ours, results(mbconv_reference.mbconv_reference, args))


def test_verdicts_decide(played: cuda.Library) -> None:
    x, _, _, layer, options, *_ = mbconv_reference.samples(CPU, torch.float32)[0]
    with cuda_verdicts.asked_for() as keys:
        assert not runs_fused(x, 1, layer, options)
    for fused_ms, reference_ms, expected in ((1.0, 2.0, True), (1.95, 2.0, False), (2.0, 1.0, False)):
        cuda_verdicts.write(CPU, {keys[0]: cuda_verdicts.Verdict(fused_ms, reference_ms, spread=0.1)})
        assert runs_fused(x, 1, layer, options) == expected
        assert not runs_fused(x[:1], 1, layer, options)  # another batch size
        with setting.using("reference"):
            assert not runs_fused(x, 1, layer, options)
    path = cuda_verdicts.path_of(CPU)
    path.write_text('{"broken": ', encoding="utf-8")
    cuda_verdicts._known.cache_clear()
    with pytest.raises(ValueError, match="is damaged. Delete it and run: pynas kernels tune"):
        runs_fused(x, 1, layer, options)


def test_tuning_says_what_it_lacks() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU to tune")
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        tune()


def test_forced_kernels_say_why_they_cannot(played: cuda.Library) -> None:
    x, _, _, layer, options, *_ = mbconv_reference.samples(CPU, torch.float32)[0]
    with setting.using("fused"):
        assert runs_fused(x, 1, layer, options)
        with pytest.raises(ValueError, match="float32"):
            runs_fused(x.double(), 1, layer, options)
    assert not runs_fused(x, 1, layer, options)  # nobody has timed it


def test_the_built_library_loads_without_a_gpu() -> None:
    if cuda._library is None:
        pytest.skip(f"CUDA kernels: {cuda.STATE}")
    assert cuda_mbconv._functions_of(cuda._library) is not None
    assert "built" in cuda.state()
