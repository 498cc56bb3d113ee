"""OpSpec: the shape of one op, and what it is made of.

To add a kind of op, add one entry to `KINDS`: which fields it uses and how it decomposes into primitive layers.
Parameters, multiply-adds, memory traffic and the output size all follow from that decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .names import unknown

ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "swish")


@dataclass(frozen=True, slots=True)
class Layer:
    """One primitive layer, for one image. A BN is folded into its conv, but its scale and shift count as parameters.

    `reads` and `writes` are activations in elements; `params` are weights in elements, of which `norm` are a BN's;
    `macs` are the multiply-adds of convolutions and linear layers (all other layers have none); `window` is the number
    of pixels that a pool looks at for each of its outputs.
    """

    # "conv", "depthwise" (one channel per group), "linear", "pool", "add", "scale", "shuffle", "activation", "norm"
    op: str
    reads: int
    writes: int
    size: int  # output height = width
    params: int = 0
    macs: int = 0
    norm: int = 0
    window: int = 0


@dataclass(frozen=True, slots=True, order=True)
class OpSpec:
    """All that is needed to rebuild one op and its input; the key of every cost.

    Kinds: "skip" (identity), "conv" (KxK conv, BN, activation), "mbconv" (1x1 conv, BN, activation, [shuffle],
    depthwise KxK, BN, activation, [squeeze-and-excitation], 1x1 conv, BN, and the input added where the shapes agree),
    "pool" (global average), "linear" (with bias). Those of cells (DARTS, SNAS): "none" (zeros), "relu_conv" (ReLU, KxK
    conv, BN), "reduce" (ReLU, two strided 1x1 convs of half the channels each, the second one pixel further, BN),
    "sep_conv" (ReLU, depthwise KxK, 1x1 conv, BN, twice), "dil_conv" (the same once, with dilation), "max_pool",
    "avg_pool" (KxK, padding not counted), and both with a BN: "max_pool_bn", "avg_pool_bn". Branches of a
    re-parameterisable block beside "conv", each with a BN and without activation: "row" (1xK conv), "column" (Kx1
    conv), "pointwise_conv" (1x1 conv to expansion * in_channels, BN, KxK conv), "pointwise_avg" (1x1 conv, BN, KxK
    average), "norm" (BN alone). Padding is kernel // 2 (times dilation), so the output size is ceil(size / stride).

    A kind without activation field always has `activation == "none"`, whatever was passed, so that equal ops have equal
    specs.

    Raises:
        ValueError: an unknown kind or activation, a number that is not a positive integer, channels that `groups` does
            not divide, an even kernel, or a field the kind has no use for.
    """

    kind: str
    in_channels: int
    out_channels: int
    size: int  # input height = width in pixels; 1 for linear
    kernel: int = 1
    stride: int = 1
    groups: int = 1  # conv: its groups; mbconv: of the two 1x1 convs, with a channel shuffle after the first if > 1
    expansion: int = 1  # mbconv, pointwise_conv: hidden channels = expansion * in_channels
    dilation: int = 1
    squeeze: int = 0  # mbconv: channels in the middle of its squeeze-and-excitation; 0 for none
    affine: int = 1  # ops of cells: 0 where their BNs have no scale and shift
    activation: str = "relu"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("op kind", self.kind, KINDS)
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        _check_numbers(self)
        if "activation" not in KINDS[self.kind].uses:
            object.__setattr__(self, "activation", "none")

    @property
    def key(self) -> str:
        """A short name, different for different specs: `mbconv-i16-o24-s112-k3-t2-g1-e6-relu`."""
        dilation = f"-d{self.dilation}" if self.dilation > 1 else ""
        squeeze = f"-q{self.squeeze}" if self.squeeze else ""
        affine = "" if self.affine else "-a0"
        return (
            f"{self.kind}-i{self.in_channels}-o{self.out_channels}-s{self.size}-k{self.kernel}-t{self.stride}"
            f"-g{self.groups}-e{self.expansion}{dilation}{squeeze}{affine}-{self.activation}"
        )

    @property
    def free(self) -> bool:
        """Whether it costs nothing on any device, by definition: an identity, or no edge at all."""
        return self.kind in FREE

    @property
    def deployed(self) -> OpSpec:
        """The spec that stands for this op on a device, where every BN is scale and shift, learnt or not."""
        return self if self.affine else replace(self, affine=1)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The primitive layers in order; empty for skip and none."""
        return tuple(KINDS[self.kind].layers(self))

    @property
    def out_size(self) -> int:
        """Height = width of the output in pixels."""
        layers = self.layers
        return layers[-1].size if layers else -(-self.size // self.stride)

    @property
    def params(self) -> int:
        """Convolution weights, BN scale and shift, linear weights and bias."""
        return sum(layer.params for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-adds of convolutions and linear layers for one image."""
        return sum(layer.macs for layer in self.layers)

    def to_dict(self) -> dict[str, str | int]:
        """All fields, for JSON."""
        return {name: getattr(self, name) for name in FIELDS}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OpSpec:
        """Rebuild a spec from `to_dict`; fields with a default may be absent.

        Raises:
            ValueError: an unknown or missing field, or a value the spec refuses.
        """
        for name in data:
            if name not in FIELDS:
                raise unknown("OpSpec field", name, FIELDS)
        missing = [name for name in FIELDS[:4] if name not in data]
        if missing:
            raise ValueError(
                f"An OpSpec needs {', '.join(FIELDS[:4])}; {', '.join(missing)} is missing in {dict(data)}."
            )
        return cls(**data)

    def to_row(self) -> dict[str, str]:
        """The fields of `deployed` that tell devices' ops apart, as text, for CSV."""
        return {name: str(getattr(self, name)) for name in ROW_FIELDS}

    @classmethod
    def from_row(cls, row: Mapping[str, str]) -> OpSpec:
        """Rebuild a deployed spec from the texts of `to_row`; all its fields must be there.

        Raises:
            ValueError: a missing field, a text that is not a whole number, or a value the spec refuses.
        """
        data: dict[str, Any] = {}
        for name in ROW_FIELDS:
            if name not in row:
                raise ValueError(f"The field {name!r} is missing.")
            text = row[name]
            if name in ("kind", "activation"):
                data[name] = text
            elif text.isascii() and text.isdigit():
                data[name] = int(text)
            else:
                raise ValueError(f"{name} is {text!r}; it must be a whole number of at least {_least(name)}.")
        return cls(**data)


FIELDS = tuple(field.name for field in fields(OpSpec))
ROW_FIELDS = tuple(name for name in FIELDS if name != "affine")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of op: its decomposition, and the fields it uses beside channels and size."""

    layers: Callable[[OpSpec], Iterator[Layer]]
    uses: frozenset[str] = frozenset()
    keeps_channels: bool = False


def _least(name: str) -> int:
    """The smallest value of a number of a spec."""
    return 0 if name in ("squeeze", "affine") else 1


def _check_numbers(spec: OpSpec) -> None:
    kind = KINDS[spec.kind]
    for name in FIELDS[1:-1]:
        value, least = getattr(spec, name), _least(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{name} of a {spec.kind!r} op is {value!r}; it must be a whole number of at least {least}."
            )
        usual = 0 if name == "squeeze" else 1
        if name not in FIELDS[:4] and name not in kind.uses and value != usual:
            raise ValueError(f"A {spec.kind!r} op has no {name}; it came as {value} and must be left at {usual}.")
    if spec.affine > 1:
        raise ValueError(f"affine of a {spec.kind!r} op is {spec.affine}; it must be 0 or 1.")
    if spec.kernel % 2 == 0:
        raise ValueError(f"kernel is {spec.kernel}; only odd kernels are allowed (1, 3, 5, 7, ...).")
    if kind.keeps_channels and spec.in_channels != spec.out_channels:
        raise ValueError(
            f"A {spec.kind!r} op cannot change the channels from {spec.in_channels} to {spec.out_channels}; "
            "use kind 'conv' for that."
        )
    if spec.in_channels % spec.groups or spec.out_channels % spec.groups:
        raise ValueError(
            f"groups is {spec.groups}; it must divide the input channels ({spec.in_channels}) "
            f"and the output channels ({spec.out_channels})."
        )
    if spec.kind == "reduce" and spec.out_channels % 2:
        raise ValueError(f"A 'reduce' op makes its output in two halves; {spec.out_channels} channels are not even.")
    if spec.kind == "linear" and spec.size != 1:
        raise ValueError(f"size of a 'linear' op is {spec.size}; it must be 1.")


def _conv(cin: int, cout: int, size: int, kernel: int = 1, stride: int = 1, groups: int = 1, norm: int = 2) -> Layer:
    """A convolution whose BN has so many learnt values for each channel."""
    out = -(-size // stride)
    weights, norm = cout * (cin // groups) * kernel * kernel, norm * cout
    op = "depthwise" if 1 < groups == cin else "conv"
    return Layer(op, cin * size * size, cout * out * out, out, weights + norm, weights * out * out, norm)


def _activation(name: str, channels: int, size: int) -> Iterator[Layer]:
    if name != "none":
        yield Layer("activation", channels * size * size, channels * size * size, size)


def _skip_layers(spec: OpSpec) -> Iterator[Layer]:
    yield from ()


def _conv_layers(spec: OpSpec) -> Iterator[Layer]:
    conv = _conv(spec.in_channels, spec.out_channels, spec.size, spec.kernel, spec.stride, spec.groups)
    yield conv
    yield from _activation(spec.activation, spec.out_channels, conv.size)


def _mbconv_layers(spec: OpSpec) -> Iterator[Layer]:
    """FBNet's block (Wu et al. 2019, figure 3 and table 2); the first 1x1 conv stays even for expansion 1."""
    size, hidden = spec.size, spec.expansion * spec.in_channels
    yield _conv(spec.in_channels, hidden, size, groups=spec.groups)
    yield from _activation(spec.activation, hidden, size)
    if spec.groups > 1:
        yield Layer("shuffle", hidden * size * size, hidden * size * size, size)
    depthwise = _conv(hidden, hidden, size, spec.kernel, spec.stride, groups=hidden)
    yield depthwise
    yield from _activation(spec.activation, hidden, depthwise.size)
    if spec.squeeze:
        yield from _squeeze_layers(hidden, spec.squeeze, depthwise.size, spec.activation)
    last = _conv(hidden, spec.out_channels, depthwise.size, groups=spec.groups)
    yield last
    if spec.stride == 1 and spec.in_channels == spec.out_channels:
        yield Layer("add", 2 * last.writes, last.writes, last.size)


def _stripe_layers(spec: OpSpec) -> Iterator[Layer]:
    """1xK and Kx1: K weights for each pair of channels."""
    square = _conv(spec.in_channels, spec.out_channels, spec.size, spec.kernel, spec.stride, spec.groups)
    weights = (square.params - 2 * spec.out_channels) // spec.kernel
    out = square.size
    yield replace(square, params=weights + 2 * spec.out_channels, macs=weights * out * out)


def _pointwise_conv_layers(spec: OpSpec) -> Iterator[Layer]:
    hidden = spec.expansion * spec.in_channels
    yield _conv(spec.in_channels, hidden, spec.size, groups=spec.groups)
    yield _conv(hidden, spec.out_channels, spec.size, spec.kernel, spec.stride, spec.groups)


def _pointwise_avg_layers(spec: OpSpec) -> Iterator[Layer]:
    first = _conv(spec.in_channels, spec.out_channels, spec.size, groups=spec.groups)
    yield first
    out = -(-spec.size // spec.stride)
    yield Layer("pool", first.writes, spec.out_channels * out * out, out, 2 * spec.out_channels)


def _norm_layers(spec: OpSpec) -> Iterator[Layer]:
    values = spec.in_channels * spec.size * spec.size
    yield Layer("norm", values, values, spec.size, 2 * spec.in_channels)


def _squeeze_layers(channels: int, middle: int, size: int, activation: str) -> Iterator[Layer]:
    """Squeeze-and-excitation (Hu et al. 2018): mean, 1x1 conv, activation, 1x1 conv, sigmoid, and a product."""
    yield Layer("pool", channels * size * size, channels, 1)
    yield Layer("linear", channels, middle, 1, channels * middle + middle, channels * middle)
    yield from _activation(activation, middle, 1)
    yield Layer("linear", middle, channels, 1, channels * middle + channels, channels * middle)
    yield from _activation("sigmoid", channels, 1)
    yield Layer("scale", channels * size * size + channels, channels * size * size, size)


def _pool_layers(spec: OpSpec) -> Iterator[Layer]:
    yield Layer("pool", spec.in_channels * spec.size * spec.size, spec.in_channels, 1, window=spec.size**2)


def _linear_layers(spec: OpSpec) -> Iterator[Layer]:
    weights = spec.in_channels * spec.out_channels
    yield Layer("linear", spec.in_channels, spec.out_channels, 1, weights + spec.out_channels, weights)


def _relu_conv_layers(spec: OpSpec) -> Iterator[Layer]:
    yield from _activation("relu", spec.in_channels, spec.size)
    cin, cout, size = spec.in_channels, spec.out_channels, spec.size
    yield _conv(cin, cout, size, spec.kernel, spec.stride, norm=2 * spec.affine)


def _reduce_layers(spec: OpSpec) -> Iterator[Layer]:
    """Two convolutions of half the channels; the BN behind both counts half with each."""
    yield from _activation("relu", spec.in_channels, spec.size)
    for _ in range(2):
        yield _conv(spec.in_channels, spec.out_channels // 2, spec.size, 1, spec.stride, norm=2 * spec.affine)


def _separable(spec: OpSpec, channels: int, size: int, stride: int) -> Iterator[Layer]:
    """ReLU, depthwise convolution without BN, 1x1 convolution with BN."""
    cin = spec.in_channels
    yield from _activation("relu", cin, size)
    depthwise = _conv(cin, cin, size, spec.kernel, stride, groups=cin, norm=0)
    yield depthwise
    yield _conv(cin, channels, depthwise.size, norm=2 * spec.affine)


def _sep_conv_layers(spec: OpSpec) -> Iterator[Layer]:
    yield from _separable(spec, spec.in_channels, spec.size, spec.stride)
    yield from _separable(spec, spec.out_channels, -(-spec.size // spec.stride), 1)


def _dil_conv_layers(spec: OpSpec) -> Iterator[Layer]:
    yield from _separable(spec, spec.out_channels, spec.size, spec.stride)


def _window_layers(spec: OpSpec) -> Iterator[Layer]:
    """A pool over KxK pixels."""
    out = -(-spec.size // spec.stride)
    reads, writes = spec.in_channels * spec.size**2, spec.in_channels * out * out
    yield Layer("pool", reads, writes, out, window=spec.kernel**2)


def _window_bn_layers(spec: OpSpec) -> Iterator[Layer]:
    for pool in _window_layers(spec):
        yield pool
        norm = 2 * spec.affine * spec.in_channels
        yield Layer("scale", pool.writes, pool.writes, pool.size, norm, norm=norm)


FREE = frozenset({"skip", "none"})
_BRANCH = frozenset({"kernel", "stride", "groups"})

KINDS: dict[str, Kind] = {
    "skip": Kind(_skip_layers, keeps_channels=True),
    "none": Kind(_skip_layers, frozenset({"stride"}), keeps_channels=True),
    "conv": Kind(_conv_layers, frozenset({"kernel", "stride", "groups", "dilation", "activation"})),
    "mbconv": Kind(
        _mbconv_layers, frozenset({"kernel", "stride", "groups", "expansion", "dilation", "squeeze", "activation"})
    ),
    "row": Kind(_stripe_layers, _BRANCH),
    "column": Kind(_stripe_layers, _BRANCH),
    "pointwise_conv": Kind(_pointwise_conv_layers, _BRANCH | {"expansion"}),
    "pointwise_avg": Kind(_pointwise_avg_layers, _BRANCH),
    "norm": Kind(_norm_layers, keeps_channels=True),
    "pool": Kind(_pool_layers, keeps_channels=True),
    "linear": Kind(_linear_layers),
    "relu_conv": Kind(_relu_conv_layers, frozenset({"kernel", "stride", "affine"})),
    "reduce": Kind(_reduce_layers, frozenset({"stride", "affine"})),
    "sep_conv": Kind(_sep_conv_layers, frozenset({"kernel", "stride", "affine"})),
    "dil_conv": Kind(_dil_conv_layers, frozenset({"kernel", "stride", "dilation", "affine"})),
    "max_pool": Kind(_window_layers, frozenset({"kernel", "stride"}), keeps_channels=True),
    "avg_pool": Kind(_window_layers, frozenset({"kernel", "stride"}), keeps_channels=True),
    "max_pool_bn": Kind(_window_bn_layers, frozenset({"kernel", "stride", "affine"}), keeps_channels=True),
    "avg_pool_bn": Kind(_window_bn_layers, frozenset({"kernel", "stride", "affine"}), keeps_channels=True),
}
