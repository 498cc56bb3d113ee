"""The inference block against plain PyTorch: shapes, values, threads, memory, and weights that change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cost_models.spec import OpSpec
from pynas.kernels import mbconv_infer, native
from pynas.kernels.mbconv_infer import ACTIVATIONS, Folded, inference_function, inference_reference
from pynas.ops import prepared as prepared_blocks
from pynas.ops.mbconv import MBConv
from pynas.ops.prepared import prepare

CLOSE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
}

Numbers = tuple[int, int, str, bool]  # stride, groups, activation, residual


def weights(ins: int, hidden: int, outs: int, kernel: int, groups: int, dtype: torch.dtype) -> Folded:
    generator = torch.Generator().manual_seed(hidden)

    def of(*shape: int) -> Tensor:
        fan = int(torch.Size(shape[1:]).numel())
        scale: float = fan**-0.5
        return torch.randn(shape, generator=generator, dtype=dtype) * scale

    return Folded(
        *(of(hidden, ins // groups, 1, 1), of(hidden), of(hidden, 1, kernel, kernel), of(hidden)),
        *(of(outs, hidden // groups, 1, 1), of(outs)),
    )


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Folded, Numbers]:
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    ins, outs = (groups * draw(st.integers(1, 40 // groups)) for _ in range(2))
    hidden = groups * draw(st.integers(1, 120 // groups))
    stride = draw(st.sampled_from([1, 2]))
    if draw(st.booleans()):
        outs = ins
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    w = weights(ins, hidden, outs, draw(st.sampled_from([3, 5, 7])), groups, dtype)
    size = draw(st.integers(0, 5)), draw(st.integers(1, 17)), draw(st.integers(1, 17)), ins
    x = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=dtype)
    residual = stride == 1 and ins == outs and draw(st.booleans())
    return x, w, (stride, groups, draw(st.sampled_from(ACTIVATIONS)), residual)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(calls())
def test_equals_the_reference(call: tuple[Tensor, Folded, Numbers]) -> None:
    x, w, numbers = call
    expected = inference_reference(x, *w, *numbers)
    torch.testing.assert_close(inference_function(x, *w, *numbers), expected, **CLOSE[x.dtype])


# in, hidden, out, kernel, stride, groups, height, width, batch: wide images in several chunks; rows in rings; slices
# one after another in bands; several images at once; groups cut by inputs, by outputs and by both.
BIG = [
    (16, 96, 16, 5, 1, 1, 20, 130, 1),
    (24, 24, 24, 3, 1, 1, 56, 56, 2),
    (24, 144, 40, 3, 2, 1, 40, 38, 2),
    (112, 672, 184, 3, 1, 1, 7, 7, 6),
    (96, 192, 96, 3, 1, 1, 75, 75, 1),
    (64, 64, 64, 3, 1, 2, 14, 14, 2),
    (32, 64, 48, 7, 2, 2, 33, 65, 1),
    (32, 32, 32, 3, 1, 2, 28, 28, 1),
    (128, 256, 64, 5, 1, 4, 8, 8, 9),
    (24, 24, 24, 3, 1, 12, 9, 9, 3),
]


def big(case: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Folded, Numbers]:
    ins, hidden, outs, kernel, stride, groups, height, width, batch = case
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, height, width, ins, generator=generator, dtype=dtype)
    w = weights(ins, hidden, outs, kernel, groups, dtype)
    return x, w, (stride, groups, "relu", stride == 1 and ins == outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", BIG, ids=str)
def test_larger_blocks(case: tuple[int, ...], dtype: torch.dtype) -> None:
    x, w, numbers = big(case, dtype)
    found = inference_function(x, *w, *numbers)
    torch.testing.assert_close(found, inference_reference(x, *w, *numbers), **CLOSE[dtype])


@pytest.mark.parametrize("case", BIG, ids=str)
def test_threads_and_batch_do_not_matter(case: tuple[int, ...]) -> None:
    """The same bits from any number of threads, and for an image whether it comes alone or with others."""
    x, w, numbers = big(case, torch.float32)
    alone = inference_function(x, *w, *numbers)
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(inference_function(x, *w, *numbers), alone)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(inference_function(x[-1:].clone(), *w, *numbers), alone[-1:])


@pytest.mark.parametrize("isa", native.MODULE.usable_isas() if native.MODULE else [])
def test_every_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mbconv_infer, "KERNELS", native.MODULE.Kernels(isa))
    for case in BIG:
        for dtype, close in CLOSE.items():
            x, w, numbers = big(case, dtype)
            torch.testing.assert_close(
                inference_function(x, *w, *numbers), inference_reference(x, *w, *numbers), **close
            )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("groups", [1, 2])
def test_what_is_not_finite_goes_where_torch_lets_it(groups: int, activation: str, bad: float) -> None:
    """Also between channels that fill no vector, and between groups where zeros stand for missing weights."""
    for channels in (10, 16, 64):
        w = weights(channels, channels, channels, 3, groups, torch.float64)
        x = torch.randn(2, 9, 9, channels, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        x[1, 4, 4, 1] = bad
        numbers = 1, groups, activation, True
        found, expected = inference_function(x, *w, *numbers), inference_reference(x, *w, *numbers)
        assert not expected.isfinite().all()
        torch.testing.assert_close(found, expected, equal_nan=True, **CLOSE[torch.float64])


@pytest.mark.parametrize("view", [lambda t: t.flip(0), lambda t: t[..., ::2], lambda t: t.transpose(0, 1)])
def test_any_memory(view: Any) -> None:
    """Of x and of every weight."""
    w = weights(12, 24, 12, 3, 2, torch.float64)
    x = view(torch.randn(4, 4, 8, 24, dtype=torch.float64))
    x = x[..., :12] if x.shape[-1] > 12 else x
    assert not x.is_contiguous()
    strided: Any = [torch.stack([t, t], -1)[..., 0] for t in w]
    numbers: Numbers = (1, 2, "relu", True)
    found = inference_function(x, *Folded(*strided), *numbers)
    torch.testing.assert_close(found, inference_reference(x, *w, *numbers), **CLOSE[torch.float64])


def test_a_gradient_comes_from_the_reference() -> None:
    w = Folded(*(t.requires_grad_() for t in weights(4, 8, 4, 3, 1, torch.float64)))
    x = torch.randn(1, 5, 5, 4, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *t: Tensor) -> Tensor:
        return inference_function(x, *Folded(*t), 1, 1, "hardswish", True)

    assert torch.autograd.gradcheck(call, (x, *w), fast_mode=True)
    with torch.no_grad():
        assert not inference_function(x, *w, 1, 1, "relu", True).requires_grad


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(1, 4, 4)}, r"x must have the shape \(batch, height, width, channels\), got \(1, 4, 4\)"),
    ({"x": torch.zeros(1, 4, 4, 5)}, r"x has 5 channels.*the weights want 4.*x.permute\(0, 2, 3, 1\)"),
    ({"x": torch.zeros(1, 4, 4, 4).half()}, "must be float32, or all float64; got torch.float16, torch.float32"),
    ({"stride": 3}, "stride is 3; 1 and 2 are possible"),
    ({"activation": "gelu"}, "activation is 'gelu'; possible are none, relu, relu6, hardswish"),
    ({"groups": 3}, "groups is 3; it must divide the 8 hidden and 4 output channels"),
    ({"groups": 2}, r"project has shape \(4, 8, 1, 1\); with groups=2 it must be \(4, 4, 1, 1\)"),
    ({"depthwise": torch.zeros(8, 1, 4, 4)}, r"depthwise has shape.*kernel sizes \(3, 5, 7\) are possible"),
    ({"expand_bias": torch.zeros(7)}, r"expand_bias has shape \(7,\); with groups=1 it must be \(8,\)"),
    ({"stride": 2, "residual": True}, "residual=True needs stride 1"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:20] for _, message in WRONG])
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good = {"x": torch.zeros(1, 4, 4, 4), **weights(4, 8, 4, 3, 1, torch.float32)._asdict()}
    good |= {"stride": 1, "groups": 1, "activation": "relu", "residual": False}
    assert inference_function(**good).shape == (1, 4, 4, 4)
    for call in (inference_function, inference_reference):
        with pytest.raises(ValueError, match=message):
            call(**(good | change))


# Prepared blocks.


def block_of(groups: int = 1, stride: int = 1, activation: str = "relu", dtype: torch.dtype = torch.float64) -> MBConv:
    torch.manual_seed(5)
    spec = OpSpec("mbconv", 12, 12, 9, kernel=3, stride=stride, groups=groups, expansion=2, activation=activation)
    block = MBConv(spec).to(dtype)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return block.eval()


IMAGES = torch.randn(2, 12, 9, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def check(prepared: Any, block: nn.Module) -> None:
    with torch.no_grad():
        for x in (IMAGES, IMAGES.to(memory_format=torch.channels_last)):
            y = prepared(x)
            assert y.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(y, block.eval()(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "hardswish"])
@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_prepared_answers_as_the_block(groups: int, stride: int, activation: str) -> None:
    block = block_of(groups, stride, activation)
    check(prepare(block), block)


def train(block: Any) -> None:
    block.train()
    with torch.no_grad():
        block(IMAGES + 1)


def step(block: Any, **options: Any) -> None:
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1, **options)
    block(IMAGES).square().sum().backward()
    optimizer.step()


def write_data(block: Any) -> None:
    block.project.conv.weight.data.mul_(2)


def write_one(block: Any) -> None:
    with torch.no_grad():
        block.depthwise.conv.weight[5, 0, 1, 2] = 3


def assign(block: Any) -> None:
    block.expand.conv.weight.data = torch.randn_like(block.expand.conv.weight)


def replace_parameter(block: Any) -> None:
    block.expand.bn.bias = nn.Parameter(torch.randn_like(block.expand.bn.bias))


def replace_module(block: Any) -> None:
    block.depthwise = block_of().depthwise
    nn.init.normal_(block.depthwise.conv.weight)


def change_eps(block: Any) -> None:
    block.project.bn.eps = 0.5


def replace_activations(block: Any) -> None:
    for part in (block.expand, block.depthwise):
        part.activation = nn.Hardswish()


def change_residual(block: Any) -> None:
    block.residual = False


CHANGES = [train, step, lambda block: step(block, fused=True), write_data, write_one, assign]
CHANGES += [replace_parameter, replace_module, change_eps, replace_activations, change_residual]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(change: Any) -> None:
    block = block_of()
    prepared = prepare(block)
    check(prepared, block)
    before = prepared(IMAGES).detach()
    change(block)
    check(prepared, block)
    assert not torch.allclose(prepared(IMAGES), before)


def test_what_has_become_another_block_is_refused() -> None:
    block: Any = block_of()
    prepared = prepare(block)
    nn.utils.parametrize.register_parametrization(block.expand.conv, "weight", nn.Identity())
    with torch.no_grad(), pytest.raises(ValueError, match="Parametrised convolutions have to be merged first"):
        prepared(IMAGES)


def test_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packs: list[Folded] = []
    pack = prepared_blocks.pack

    def counted(w: Folded, *numbers: Any) -> Any:
        packs.append(w)
        return pack(w, *numbers)

    monkeypatch.setattr(prepared_blocks, "pack", counted)
    block = block_of()
    prepared = prepare(block)
    for _ in range(3):
        check(prepared, block)
    assert len(packs) == 1
    step(block)
    check(prepared, block)
    assert len(packs) == 2


def test_weights_without_versions_are_never_kept() -> None:
    with torch.inference_mode():
        block: Any = block_of()
        prepared = prepare(block)
        check(prepared, block)
        block.expand.conv.weight[0, 3] = 7
        check(prepared, block)


def test_prepared_gradient() -> None:
    block = block_of(groups=2)
    x = IMAGES.clone().requires_grad_()
    found = torch.autograd.grad(prepare(block)(x).square().sum(), [x, *block.parameters()])
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_prepared_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mbconv_infer, "KERNELS", None)
    monkeypatch.setattr(prepared_blocks, "KERNELS", None)
    block = block_of()
    prepared = prepare(block)
    with torch.no_grad():
        torch.testing.assert_close(prepared(IMAGES), block(IMAGES))
        write_one(block)
        torch.testing.assert_close(prepared(IMAGES), block(IMAGES))


def test_prepared_refuses_what_it_cannot_compute() -> None:
    prepared = prepare(block_of())
    with torch.no_grad():
        for x, message in (
            (IMAGES[0], r"x must have the shape \(batch, channels, height, width\)"),
            (IMAGES[:, :5], "x has 5 channels"),
            (IMAGES.float(), "must be float32, or all float64"),
        ):
            with pytest.raises(ValueError, match=message):
                prepared(x)
    with pytest.raises(ValueError, match="prepare needs a block whose 'expand' has an nn.Conv2d 'conv'"):
        prepare(nn.Linear(2, 2))
    block = block_of()
    block.depthwise.activation = nn.ReLU6()
    with pytest.raises(ValueError, match="activations relu and relu6; they must be the same"):
        prepare(block)
    block = block_of(groups=2)
    block.shuffle = None
    with pytest.raises(ValueError, match="A block of 2 groups must have a channel shuffle"):
        prepare(block)
