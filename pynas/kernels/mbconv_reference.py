"""What the kernel `mixed_mbconv` computes, in plain PyTorch; what it can be asked; arguments to try it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pynas.kernels import formats

ACTIVATIONS = ("none", "relu", "relu6", "hardswish")  # Activation of csrc/cpu/mbconv.h, in order
KERNELS_ALLOWED = (3, 5, 7)
TENSORS = 9  # of an option: weight, scale and shift of three convolutions
NUMBERS = 5  # of an option: kernel, hidden, groups, gate, trained


def split(options: Sequence[int], tensors: Sequence[Any]) -> list[tuple[Sequence[int], Sequence[Any]]]:
    """Pairs each option's numbers with its tensors."""
    each = len(tensors) // max(1, len(options) // NUMBERS)
    return [
        (options[NUMBERS * i : NUMBERS * (i + 1)], tensors[each * i : each * (i + 1)])
        for i in range(len(options) // NUMBERS)
    ]


def mbconv_reference(
    x: Tensor,
    gates: Tensor | None,
    tensors: Sequence[Tensor],
    layer: Sequence[int],
    options: Sequence[int],
    identity: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """States `mixed_mbconv` in plain PyTorch, for any device, dtype and order of derivative."""
    check(x, gates, tensors, layer, options, identity, eps)
    total: Tensor | None = None
    statistics: list[Tensor] = []
    for (kernel, _, groups, gate, trained), parts in split(options, tensors):
        inputs = [x, *parts] if trained else [x.detach(), *(part.detach() for part in parts)]
        y = _block(inputs, layer, kernel, groups, eps, statistics)
        y = y if gates is None else y * _column(gates, gate)
        total = y if total is None else total + y
    assert total is not None
    if gates is not None and identity >= 0:
        total = total + x * _column(gates, identity)
    return formats.like(total, x), torch.cat(statistics)


def _block(
    inputs: Sequence[Tensor], layer: Sequence[int], kernel: int, groups: int, eps: float, statistics: list[Tensor]
) -> Tensor:
    """One block; appends mean and biased variance of its norms to `statistics`."""
    x, w1, scale1, shift1, w2, scale2, shift2, w3, scale3, shift3 = inputs
    stride, out_channels, code = layer

    def norm(u: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        variance, mean = torch.var_mean(u.detach(), (0, 2, 3), correction=0)
        statistics.extend((mean, variance))
        return functional.batch_norm(u, None, None, scale, shift, True, 0.0, eps)

    def shuffle(u: Tensor) -> Tensor:
        shuffled: Tensor = u.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
        return shuffled

    # The norm goes channel by channel, so it may as well come after the shuffle: in the order of its statistics.
    scale1, shift1 = (shuffle(part[None, :, None, None]).flatten() for part in (scale1, shift1))
    h = activate(norm(shuffle(functional.conv2d(x, w1, groups=groups)), scale1, shift1), code)
    h = functional.conv2d(h, w2, stride=stride, padding=kernel // 2, groups=len(w2))
    h = activate(norm(h, scale2, shift2), code)
    y = norm(functional.conv2d(h, w3, groups=groups), scale3, shift3)
    return x + y if stride == 1 and x.shape[1] == out_channels else y


def activate(x: Tensor, code: int) -> Tensor:
    """The activation of a number in `ACTIVATIONS`."""
    if code == 0:
        return x
    function: Callable[[Tensor], Tensor] = (functional.relu, functional.relu6, functional.hardswish)[code - 1]
    return function(x)


def _column(gates: Tensor, index: int) -> Tensor:
    column = gates[..., index]
    return column if gates.dim() == 1 else column[:, None, None, None]


def out_shape(x: Tensor, layer: Sequence[int]) -> tuple[int, int, int, int]:
    """Shape of the layer's output."""
    images, _, height, width = x.shape
    return images, layer[1], -(-height // layer[0]), -(-width // layer[0])


def statistics_size(layer: Sequence[int], options: Sequence[int]) -> int:
    """Number of means and variances."""
    return sum(4 * hidden + 2 * layer[1] for hidden in options[1::NUMBERS])


def check(
    x: Tensor,
    gates: Tensor | None,
    tensors: Sequence[Tensor],
    layer: Sequence[int],
    options: Sequence[int],
    identity: int,
    eps: float,
) -> None:
    """Raises ValueError, with what came and what is allowed, for arguments that make no sense."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating point (images, channels, height, width), not {x.dtype} {tuple(x.shape)}.")
    if len(layer) != 3 or layer[0] not in (1, 2) or layer[1] < 1 or not 0 <= layer[2] < len(ACTIVATIONS):
        raise ValueError(
            f"layer is {list(layer)}; it must be stride (1 or 2), out channels and activation (0 to "
            f"{len(ACTIVATIONS) - 1} for {', '.join(ACTIVATIONS)})."
        )
    count = len(options) // NUMBERS
    if not count or len(options) % NUMBERS or len(tensors) != TENSORS * count:
        raise ValueError(
            f"Every option needs {NUMBERS} numbers (kernel, hidden, groups, gate, trained) and {TENSORS} tensors; "
            f"{len(options)} and {len(tensors)} came."
        )
    if not eps > 0:
        raise ValueError(f"eps is {eps}; it must be positive.")
    _check_gates(x, gates, layer, options, identity)
    for index, (numbers, parts) in enumerate(split(options, tensors)):
        _check_option(index, x, layer, numbers, parts)


def _check_gates(x: Tensor, gates: Tensor | None, layer: Sequence[int], options: Sequence[int], identity: int) -> None:
    if gates is None:
        if identity >= 0:
            raise ValueError(f"identity is {identity}, but there are no gates; give -1.")
        return
    rows = 1 if gates.dim() == 1 else gates.shape[0]
    if gates.dim() not in (1, 2) or rows not in (1, x.shape[0]):
        raise ValueError(f"gates must have shape (options,) or ({x.shape[0]}, options), not {tuple(gates.shape)}.")
    if gates.dtype != x.dtype or gates.device != x.device:
        raise ValueError(f"gates are {gates.dtype} on {gates.device}, x is {x.dtype} on {x.device}; one is needed.")
    highest = max(identity, *options[3::NUMBERS])
    if highest >= gates.shape[-1]:
        raise ValueError(f"Column {highest} of the gates is asked for, but they have {gates.shape[-1]}.")
    if identity >= 0 and (layer[0] != 1 or layer[1] != x.shape[1]):
        raise ValueError(
            f"An identity needs stride 1 and equal channels, not stride {layer[0]} and {x.shape[1]} to {layer[1]}."
        )


def _check_option(index: int, x: Tensor, layer: Sequence[int], numbers: Sequence[int], parts: Sequence[Tensor]) -> None:
    kernel, hidden, groups, gate, _ = numbers
    channels, out = x.shape[1], layer[1]
    if kernel not in KERNELS_ALLOWED or hidden < 1 or groups < 1 or gate < 0:
        raise ValueError(
            f"Option {index} has kernel {kernel}, {hidden} hidden channels, {groups} groups and gate {gate}; kernels "
            f"are {', '.join(map(str, KERNELS_ALLOWED))}, channels and groups at least 1, gates at least 0."
        )
    if channels % groups or hidden % groups or out % groups:
        raise ValueError(
            f"The channels {channels}, {hidden} and {out} of option {index} must divide by its {groups} groups."
        )
    shapes = [(hidden, channels // groups, 1, 1), (hidden, 1, kernel, kernel), (out, hidden // groups, 1, 1)]
    norms = [(hidden,), (hidden,), (out,)]
    wanted = [shape for weight, norm in zip(shapes, norms, strict=True) for shape in (weight, norm, norm)]
    for part, shape in zip(parts, wanted, strict=True):
        if tuple(part.shape) != shape or part.dtype != x.dtype or part.device != x.device:
            raise ValueError(
                f"A tensor of option {index} is {part.dtype} {tuple(part.shape)} on {part.device}; "
                f"{x.dtype} {shape} on {x.device} is needed."
            )


# Arguments to try it with. Batch and gates per image, shape, stride, activation, (kernel, hidden, groups) of options.
_FBNET = tuple((kernel, 4 * e, g) for kernel in (3, 5) for e, g in ((1, 1), (1, 2), (3, 1), (6, 1)))
_SAMPLES: tuple[tuple[int, bool, tuple[int, int], int, int, str, tuple[tuple[int, int, int], ...]], ...] = (
    (2, False, (4, 4), 5, 1, "relu", _FBNET),  # all options of FBNet, with skip
    (3, False, (6, 10), 4, 2, "relu6", ((7, 18, 2), (3, 6, 1))),
    (2, True, (6, 6), 3, 1, "hardswish", ((3, 12, 2), (5, 6, 3))),  # a draw per image
    (1, False, (3, 5), 2, 1, "none", ((5, 5, 1),)),
    (5, False, (9, 9), 1, 1, "relu", ((3, 9, 3),)),
    # More channels than positions, where the kernel takes the first norm's statistics from its own input.
    (2, True, (20, 20), 3, 1, "relu6", ((3, 24, 2), (7, 10, 1))),
    (2, False, (24, 16), 4, 2, "hardswish", ((5, 24, 4), (3, 20, 1))),
)


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Layers of `_SAMPLES`; a block without gates; a layer with an option that is not trained."""
    found = [_sample(device, dtype, number, *shape) for number, shape in enumerate(_SAMPLES)]
    x, _, tensors, layer, options, _, eps = _sample(device, dtype, 7, 2, False, (4, 6), 4, 2, "relu", ((3, 8, 2),))
    found.append((x, None, tensors, layer, options, -1, eps))
    # What is not trained would fail a check against differences: of it, only the gate is an input.
    x, gates, tensors, layer, options, _, eps = _sample(
        device, dtype, 8, 2, False, (4, 4), 4, 1, "relu", ((3, 8, 2), (5, 4, 1))
    )
    options[-1] = 0
    fixed = [part.detach() for part in tensors[TENSORS:]]
    found.append((x.detach(), gates, tensors[:TENSORS] + fixed, layer, options, -1, eps))
    return found


def _sample(
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    images: int,
    per_image: bool,
    channels: tuple[int, int],
    size: int,
    stride: int,
    activation: str,
    blocks: Sequence[tuple[int, int, int]],
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean
        return values.to(device, dtype).requires_grad_()

    inside, outside = channels
    tensors: list[Tensor] = []
    options: list[int] = []
    for gate, (kernel, hidden, groups) in enumerate(blocks):
        shapes = (hidden, inside // groups, 1, 1), (hidden, 1, kernel, kernel), (outside, hidden // groups, 1, 1)
        for weight in shapes:
            tensors += [made(*weight, std=0.5), made(weight[0], mean=1.0, std=0.2), made(weight[0], std=0.3)]
        options += [kernel, hidden, groups, gate, 1]
    identity = len(blocks) if stride == 1 and inside == outside else -1
    gates = made(*([images] if per_image else []), len(blocks) + 1, mean=0.3, std=0.2)
    x = made(images, inside, size, size + seed % 2, mean=0.2)
    return x, gates, tensors, [stride, outside, ACTIVATIONS.index(activation)], options, identity, 1e-5
