"""Every kind of layer's code against torch, on the vectors of every family of targets."""

from __future__ import annotations

import dataclasses
import functools
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

tvm = pytest.importorskip("tvm", reason="TVM is not installed")

from cost_models.tvm_build.kernels import kernel, tiles  # noqa: E402
from cost_models.tvm_build.kernels.tiling import blocks, product_tiles, shares, strips, widths  # noqa: E402
from cost_models.tvm_build.layers import (  # noqa: E402
    Concat,
    Conv,
    GlobalPool,
    Layer,
    Linear,
    Pool,
    Shuffle,
    Sum,
)
from cost_models.tvm_build.targets import Target, target  # noqa: E402

pytestmark = pytest.mark.tvm

TOLERANCE = 1e-5


@functools.cache
def shaped(shape: str) -> Target:
    """This machine, with code in the shape that another family gets: what differs between them runs here too."""
    host = target("host")
    if shape == "wide":
        return host
    if shape == "avx2":
        return dataclasses.replace(host, lanes=min(host.lanes, 8), registers=16)
    return dataclasses.replace(host, family=shape, lanes=4, registers=32 if shape == "aarch64" else 16)


SHAPES = ["wide", "avx2", "aarch64", "armv7"]


def depthwise(channels: int, height: int, width: int, kernel: int, stride: int = 1, **more: object) -> Conv:
    settings = {"batch": 1, "padding": kernel // 2, "activation": "relu"} | more
    return Conv(
        height=height,
        width=width,
        in_channels=channels,
        out_channels=channels,
        groups=channels,
        kernel=kernel,
        stride=stride,
        **settings,
    )


POINTWISE = [
    Conv(1, 7, 7, 32, 64),
    Conv(2, 5, 7, 12, 20, activation="relu"),
    Conv(1, 1, 1, 16, 10),
    Conv(1, 3, 1, 7, 3, activation="hardswish"),
    Conv(1, 28, 28, 24, 24, residual=True),
    Conv(1, 40, 40, 100, 200),
    Conv(2, 9, 7, 24, 48, stride=2, residual=True, activation="relu6"),
    Conv(1, 14, 14, 48, 24, groups=2, shuffle=2, residual=True),
    Conv(1, 6, 6, 24, 24, groups=4, shuffle=2, activation="hardswish"),
    Conv(1, 6, 6, 12, 24, shuffle=3),
    Conv(1, 4, 4, 20, 12, groups=4, shuffle=10),
]
DEPTHWISE = [
    depthwise(32, 14, 14, 3),
    depthwise(12, 7, 5, 5, 2, batch=2, activation="relu6"),
    depthwise(20, 1, 1, 3),
    depthwise(20, 12, 11, 3, padding=2, dilation=2, residual=True),
    depthwise(24, 9, 9, 7),
    depthwise(8, 5, 5, 5, padding=4, dilation=2),
    depthwise(8, 10, 10, 3, padding=0, activation="none"),
    depthwise(7, 3, 3, 7, 2),
    depthwise(16, 70, 70, 3, 2),
]
DENSE = [
    Conv(1, 32, 32, 3, 16, 3, 2, 1, activation="relu"),
    Conv(2, 9, 7, 12, 20, 3, 1, 1, residual=True, activation="relu"),
    Conv(1, 8, 8, 16, 32, 3, 1, 1, groups=4),
    Conv(1, 8, 8, 12, 24, 3, 1, 2, 2, 2),
    Conv(1, 8, 8, 12, 12, 1, 1, 1),
    Conv(1, 11, 11, 3, 8, 7, 2, 3),
    Conv(1, 5, 5, 12, 12, 3, 1, 1, 1, 2, shuffle=4),
    Conv(1, 6, 6, 8, 16, 3, 1, 1, 1, 8),
]
OTHERS = [
    Pool(1, 9, 7, 20, "max", 3, 2, 1),
    Pool(2, 8, 8, 12, "avg", 2, 2),
    Pool(1, 8, 8, 12, "avg", 3, 1, 1),
    Pool(1, 8, 8, 12, "avg", 3, 1, 1, True),
    GlobalPool(2, 7, 5, 100),
    GlobalPool(1, 1, 1, 10),
    Linear(1, 100, 10),
    Linear(2, 300, 200),
    Linear(5, 37, 13, "relu"),
    Sum((1, 7, 7, 12), 2, "relu"),
    Sum((2, 10), 1, "hardswish"),
    Sum((1, 3, 3, 5), 3),
    Concat(2, 3, 5, (12, 3, 20)),
    Shuffle(1, 5, 5, 24, 3),
]
# What each family does in its own way: lanes, tails, borders, and products lane by lane.
TELLING = [*POINTWISE[1:4], POINTWISE[6], POINTWISE[7], *DEPTHWISE[1:4], DENSE[0], DENSE[1], DENSE[6], OTHERS[8]]


def activated(value: torch.Tensor, activation: str) -> torch.Tensor:
    found = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish}
    return found[activation](value)


def arguments(layer: Layer, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Inputs and parameters."""
    generator = np.random.default_rng(seed)

    def some(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    if isinstance(layer, Conv):
        inputs = [some(layer.batch, layer.height, layer.width, layer.in_channels)]
        if layer.residual:
            inputs.append(some(layer.batch, layer.out_height, layer.out_width, layer.out_channels))
        weight = some(layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel)
        return inputs, [weight, some(layer.out_channels)]
    if isinstance(layer, Linear):
        parameters = [some(layer.out_features, layer.in_features), some(layer.out_features)]
        return [some(layer.batch, layer.in_features)], parameters
    if isinstance(layer, Sum):
        return [some(*layer.shape) for _ in range(layer.terms)], []
    channels = layer.channels if isinstance(layer, Concat) else (layer.channels,)
    return [some(layer.batch, layer.height, layer.width, count) for count in channels], []


def expected(layer: Layer, inputs: list[np.ndarray], parameters: list[np.ndarray]) -> np.ndarray:
    """torch's answer, in double precision."""
    first = torch.from_numpy(inputs[0]).double()
    planes = first.permute(0, 3, 1, 2).contiguous() if first.ndim == 4 else first
    weights = [torch.from_numpy(parameter).double() for parameter in parameters]
    if isinstance(layer, Conv):
        if layer.shuffle > 1:
            planes = torch.nn.ChannelShuffle(layer.shuffle)(planes)
        found = F.conv2d(planes, *weights, layer.stride, layer.padding, layer.dilation, layer.groups)
        found = found.permute(0, 2, 3, 1)
        found = found + torch.from_numpy(inputs[1]) if layer.residual else found
        return activated(found, layer.activation).numpy()
    if isinstance(layer, Linear):
        return activated(F.linear(first, *weights), layer.activation).numpy()
    if isinstance(layer, Sum):
        return activated(sum(map(torch.from_numpy, inputs[1:]), first), layer.activation).numpy()
    if isinstance(layer, Concat):
        return np.concatenate(inputs, axis=-1)
    if isinstance(layer, GlobalPool):
        found = planes.mean((2, 3), keepdim=True)
    elif isinstance(layer, Shuffle):
        found = torch.nn.ChannelShuffle(layer.groups)(planes)
    elif layer.kind == "max":
        found = F.max_pool2d(planes, layer.kernel, layer.stride, layer.padding)
    else:
        found = F.avg_pool2d(planes, layer.kernel, layer.stride, layer.padding, count_include_pad=layer.count_padding)
    return found.permute(0, 2, 3, 1).numpy()


def computed(layer: Layer, on: Target, inputs: list[np.ndarray], parameters: list[np.ndarray], **more) -> np.ndarray:
    """What the code gives. The output is full of numbers that must all be written over."""
    written = kernel(layer, on, **more)
    library = tvm.compile(written.func.with_attr("global_symbol", "main"), target=on.tvm())
    shape = [int(extent) for extent in written.func.params[-1].shape]
    output = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
    library["main"](*(tvm.runtime.tensor(array) for array in [*inputs, *written.pack(parameters)]), output)
    return output.numpy()


def error(layer: Layer, on: Target, seed: int = 0, **more: object) -> float:
    inputs, parameters = arguments(layer, seed)
    wanted = expected(layer, inputs, parameters)
    found = computed(layer, on, inputs, parameters, **more)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def random_layer(generator: np.random.Generator) -> Conv:
    def one_of(*values: int) -> int:
        return int(generator.choice(values))

    kernel_size, dilation = one_of(1, 1, 3, 5, 7), one_of(1, 1, 1, 2)
    groups = one_of(1, 1, 2, 3)
    sized = {"batch": one_of(1, 1, 2), "height": one_of(1, 4, 7, 13), "width": one_of(1, 5, 7, 14, 17)}
    span = dilation * (kernel_size - 1)
    padding = max(one_of(0, span // 2, span // 2), -(-(span + 1 - min(sized["height"], sized["width"])) // 2))
    inputs, outputs = groups * one_of(1, 4, 10, 24), groups * one_of(3, 8, 20, 36)
    if one_of(0, 0, 1):
        groups = inputs = outputs = max(2, inputs)
    shuffle = 1 if groups == inputs else one_of(*[parts for parts in (1, 1, 2, 3) if inputs % parts == 0])
    return Conv(
        in_channels=inputs,
        out_channels=outputs,
        kernel=kernel_size,
        stride=one_of(1, 1, 2, 3),
        padding=padding,
        dilation=dilation,
        groups=groups,
        activation=["none", "relu", "relu6", "hardswish"][one_of(0, 1, 2, 3)],
        residual=bool(one_of(0, 1)),
        shuffle=shuffle,
        **sized,
    )


@pytest.mark.parametrize("layer", [*POINTWISE, *DEPTHWISE, *DENSE, *OTHERS], ids=str)
def test_a_layer_is_what_torch_computes(layer: Layer) -> None:
    assert error(layer, shaped("wide")) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("layer", TELLING, ids=str)
def test_a_layer_is_the_same_in_the_shape_of_every_family(layer: Layer, shape: str) -> None:
    assert error(layer, shaped(shape)) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_random_convolutions(seed: int, shape: str) -> None:
    layer = random_layer(np.random.default_rng(100 * SHAPES.index(shape) + seed))
    assert error(layer, shaped(shape), seed) < TOLERANCE, layer


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_many_random_convolutions(shape: str) -> None:
    for seed in range(1000, 1100):
        layer = random_layer(np.random.default_rng(seed))
        assert error(layer, shaped(shape), seed) < TOLERANCE, layer


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layer", [*POINTWISE, *DEPTHWISE, *DENSE, *OTHERS], ids=str)
def test_every_layer_in_every_shape_with_every_tile(layer: Layer, shape: str) -> None:
    on = shaped(shape)
    for tile in tiles(layer, on)[:12]:
        assert error(layer, on, tile=tile) < TOLERANCE, tile


@pytest.mark.parametrize("layer", [POINTWISE[1], DEPTHWISE[1], DENSE[1], Linear(5, 37, 13)], ids=str)
def test_tiles_change_the_code_and_not_the_answer(layer: Layer) -> None:
    on = shaped("wide")
    found = tiles(layer, on)
    assert len(set(found)) == len(found) >= 3
    for tile in (found[1], found[-1]):
        assert error(layer, on, tile=tile) < TOLERANCE, tile


def test_the_same_layer_gives_the_same_code() -> None:
    for layer in (POINTWISE[7], DEPTHWISE[3], DENSE[1]):
        first, second = (kernel(layer, shaped("aarch64")).func for _ in range(2))
        assert first.script() == second.script()


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
def test_what_is_not_a_number_stays_so(activation: str) -> None:
    layer = Sum((1, 1, 1, 20), 1, activation)
    values = np.linspace(-9, 9, 20, dtype=np.float32).reshape(1, 1, 1, 20)
    values[..., [3, 17]] = np.nan
    found = computed(layer, shaped("wide"), [values], [])
    assert np.array_equal(np.isnan(found), np.isnan(values))
    np.testing.assert_allclose(found, activated(torch.from_numpy(values), activation), rtol=1e-5, atol=1e-6)


def test_the_largest_of_very_small_numbers() -> None:
    layer = Pool(1, 4, 4, 5, "max", 3, 2, 1)
    found = computed(layer, shaped("wide"), [np.full((1, 4, 4, 5), -np.inf, np.float32)], [])
    assert np.all(np.isneginf(found))


def test_a_depthwise_convolution_does_not_read_shuffled_channels() -> None:
    with pytest.raises(ValueError, match="Permute its weights"):
        kernel(depthwise(8, 4, 4, 3, shuffle=2), shaped("wide"))


def assembly(layer: Layer, name: str) -> str:
    on = target(name)
    func = kernel(layer, on).func.with_attr("global_symbol", "main")
    return tvm.compile(func, target=on.tvm()).mod.inspect_source("asm")


def test_products_on_64_bit_arm_are_lane_by_lane() -> None:
    lines = assembly(Conv(1, 14, 14, 112, 672, activation="relu"), "cortex-a72").splitlines()
    products = [line for line in lines if line.startswith("\tfmla")]
    assert len(products) > 100
    assert all(line.rstrip().endswith(("s[0]", "s[1]", "s[2]", "s[3]")) for line in products)
    assert not any(line.startswith(("\tdup", "\tld1r", "\tfmul")) for line in lines)


@pytest.mark.parametrize("name", ["host", "cortex-a53", "armv7"])
@pytest.mark.parametrize("layer", [POINTWISE[5], DENSE[1], OTHERS[7]], ids=str)
def test_sums_stay_off_the_heap(layer: Layer, name: str) -> None:
    on = target(name)
    func = kernel(layer, on).func.with_attr("global_symbol", "main")
    assert "AllocWorkspace" not in tvm.compile(func, target=on.tvm()).mod.inspect_source("ll")


@pytest.mark.parametrize("layer", [POINTWISE[1], DEPTHWISE[0], DENSE[0], OTHERS[0], OTHERS[6]], ids=str)
@pytest.mark.parametrize("name", ["cortex-a53", "armv7"])
def test_arm_gets_vector_code(layer: Layer, name: str) -> None:
    expected_instruction = {"cortex-a53": ("fmla", "fcmgt", "fmax"), "armv7": ("vfma.f32", "vcgt.f32", "vmax.f32")}[
        name
    ]
    assert any(f"\t{mnemonic}" in assembly(layer, name) for mnemonic in expected_instruction)


@given(st.integers(1, 3000), st.integers(1, 64))
def test_shares_are_few_and_even(total: int, most: int) -> None:
    found = shares(total, most)
    assert [share.start for share in found] == [0, *(share.start + share.count * share.size for share in found)][:-1]
    assert sum(share.count * share.size for share in found) == total
    assert sum(share.count for share in found) == -(-total // most)
    assert max(share.size for share in found) - min(share.size for share in found) <= 1


@given(st.integers(1, 600), st.sampled_from([4, 8, 16]), st.integers(1, 8))
def test_blocks_cover_the_channels_exactly(channels: int, lanes: int, vectors: int) -> None:
    found = blocks(channels, lanes, vectors)
    assert found[0].start == 0
    assert all(before.start + before.count * before.channels == after.start for before, after in pairwise(found))
    assert found[-1].start + found[-1].count * found[-1].channels == channels
    assert all(len(block.widths) <= vectors for block in found)
    assert all(width <= lanes and lanes % width == 0 for width in widths(channels, lanes))


@given(
    st.integers(1, 40),
    st.sampled_from([1, 3, 5, 7]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 6),
    st.integers(1, 14),
)
@settings(deadline=None)
def test_strips_know_which_taps_are_inside(
    width: int, kernel_size: int, stride: int, dilation: int, padding: int, most: int
) -> None:
    layer = Conv(1, width, width, 4, 4, kernel_size, stride, padding, dilation, 4)
    if layer.out_width < 1:
        return
    seen = []
    for strip in strips(layer, most):
        for index in range(strip.count):
            for column in range(strip.size):
                at = strip.start + index * strip.size + column
                seen.append(at)
                places = [at * stride - padding + tap * dilation for tap in range(kernel_size)]
                assert strip.taps[column] == tuple(0 <= place < width for place in places)
    assert seen == list(range(layer.out_width))


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_fit_the_registers(shape: str) -> None:
    on = shaped(shape)
    for channels in (3, 10, 24, 96, 352):
        for pixels, vectors in product_tiles(on, 196, channels, 64):
            held = pixels if shape == "aarch64" else 1
            assert pixels * vectors + vectors + held <= on.registers
