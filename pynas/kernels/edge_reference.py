"""What the kernel `mixed_edge` computes, in plain PyTorch; what it can be asked; arguments to try it with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pynas.kernels import formats

KINDS = ("conv", "max_pool", "average_pool")  # Kind of csrc/edge_binding.cpp, in order
KERNELS_ALLOWED = (3, 5, 7)
NUMBERS = 5  # of an option: kind, kernel, dilation, stages, gate


def split(options: Sequence[int]) -> list[tuple[int, int, int, int, int]]:
    """The numbers of each option."""
    return [tuple(options[at : at + NUMBERS]) for at in range(0, len(options), NUMBERS)]  # type: ignore[misc]


def tensors_of(options: Sequence[int], affine: bool) -> int:
    """How many tensors options have."""
    each = 2 * affine
    return sum(stages * (2 + each) if kind == 0 else each for kind, _, _, stages, _ in split(options))


def norms_of(options: Sequence[int]) -> int:
    """How many batch norms options have."""
    return sum(stages if kind == 0 else 1 for kind, _, _, stages, _ in split(options))


def out_shape(x: Tensor, layer: Sequence[int]) -> tuple[int, int, int, int]:
    """Shape of the edge's output."""
    images, channels, height, width = x.shape
    return images, channels, -(-height // layer[0]), -(-width // layer[0])


def edge_reference(
    x: Tensor,
    gates: Tensor | None,
    tensors: Sequence[Tensor],
    layer: Sequence[int],
    options: Sequence[int],
    identity: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """States `mixed_edge` in plain PyTorch, for any device, dtype and order of derivative."""
    check(x, gates, tensors, layer, options, identity, eps)
    (stride, affine), given = layer, iter(tensors)
    statistics: list[Tensor] = []

    def norm(u: Tensor) -> Tensor:
        variance, mean = torch.var_mean(u.detach(), (0, 2, 3), correction=0)
        statistics.extend((mean, variance))
        scale, shift = (next(given), next(given)) if affine else (None, None)
        return functional.batch_norm(u, None, None, scale, shift, True, 0.0, eps)

    total: Tensor | None = None
    for kind, kernel, dilation, stages, gate in split(options):
        y = x
        if KINDS[kind] == "max_pool":
            y = norm(functional.max_pool2d(x, 3, stride, 1))
        elif KINDS[kind] == "average_pool":
            y = norm(functional.avg_pool2d(x, 3, stride, 1, count_include_pad=False))
        for stage in range(stages if kind == 0 else 0):
            step, apart = (1, 1) if stage else (stride, dilation)
            depthwise, pointwise = next(given), next(given)
            y = functional.conv2d(
                y.relu(), depthwise, stride=step, padding=kernel // 2 * apart, dilation=apart, groups=len(depthwise)
            )
            y = norm(functional.conv2d(y, pointwise))
        y = y if gates is None else y * gates[gate]
        total = y if total is None else total + y
    assert total is not None
    if identity >= 0:
        total = total + (x if gates is None else x * gates[identity])
    return formats.like(total, x), torch.cat(statistics)


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
    if len(layer) != 2 or layer[0] not in (1, 2) or layer[1] not in (0, 1):
        raise ValueError(f"layer is {list(layer)}; it must be stride (1 or 2) and affine (0 or 1).")
    if not options or len(options) % NUMBERS:
        raise ValueError(
            f"Every option needs {NUMBERS} numbers (kind, kernel, dilation, stages, gate); {len(options)} came."
        )
    if not eps > 0:
        raise ValueError(f"eps is {eps}; it must be positive.")
    if identity >= 0 and layer[0] != 1:
        raise ValueError("An identity needs stride 1, not 2.")
    _check_options(options)
    highest = max(identity, *options[4::NUMBERS])
    if gates is not None and (gates.dim() != 1 or highest >= len(gates)):
        raise ValueError(f"gates must have shape (options,), more than {highest} of them, not {tuple(gates.shape)}.")
    if gates is not None and (gates.dtype != x.dtype or gates.device != x.device):
        raise ValueError(f"gates are {gates.dtype} on {gates.device}, x is {x.dtype} on {x.device}; one is needed.")
    _check_tensors(x, tensors, layer, options)


def _check_options(options: Sequence[int]) -> None:
    kinds = options[::NUMBERS]
    if list(kinds) != sorted(kinds, key=bool):
        raise ValueError("Convolutions must come before pools.")
    for index, (kind, kernel, dilation, stages, gate) in enumerate(split(options)):
        if kind not in range(len(KINDS)) or gate < 0:
            raise ValueError(
                f"Option {index} has kind {kind} and gate {gate}; kinds are 0 to {len(KINDS) - 1} for "
                f"{', '.join(KINDS)}, gates at least 0."
            )
        if kind == 0 and (kernel not in KERNELS_ALLOWED or dilation not in (1, 2) or stages not in (1, 2)):
            raise ValueError(
                f"Option {index} has kernel {kernel}, dilation {dilation} and {stages} stages; kernels are "
                f"{', '.join(map(str, KERNELS_ALLOWED))}, dilation and stages 1 or 2."
            )


def _check_tensors(x: Tensor, tensors: Sequence[Tensor], layer: Sequence[int], options: Sequence[int]) -> None:
    channels, norm = x.shape[1], [(x.shape[1],), (x.shape[1],)] if layer[1] else []
    wanted: list[tuple[int, ...]] = []
    for kind, kernel, _, stages, _ in split(options):
        if kind:
            wanted += norm
        else:
            wanted += [(channels, 1, kernel, kernel), (channels, channels, 1, 1), *norm] * stages
    if len(tensors) != len(wanted):
        raise ValueError(f"These options have {len(wanted)} tensors; {len(tensors)} came.")
    for index, (tensor, shape) in enumerate(zip(tensors, wanted, strict=True)):
        if tuple(tensor.shape) != shape or tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"Tensor {index} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; "
                f"{x.dtype} {shape} on {x.device} is needed."
            )


# Arguments to try it with: batch, channels, size, stride, affine, with identity, options without their gates.
_Kinds = tuple[tuple[int, int, int, int], ...]
_CONVS: _Kinds = ((0, 3, 1, 2), (0, 5, 1, 2), (0, 3, 2, 1), (0, 5, 2, 1))
_POOLS: _Kinds = ((1, 3, 1, 1), (2, 3, 1, 1))
_SAMPLES: tuple[tuple[int, int, int, int, bool, bool, _Kinds], ...] = (
    (2, 4, 5, 1, False, True, _CONVS + _POOLS),  # all options of DARTS
    (2, 6, 6, 2, True, False, _CONVS + _POOLS),
    (3, 5, 7, 2, False, False, _CONVS + _POOLS),
    (1, 20, 4, 1, True, False, ((0, 7, 2, 2), (2, 3, 1, 1))),
    (5, 3, 1, 1, True, True, ((0, 3, 1, 1),)),  # one position
    (2, 2, 9, 2, True, False, ((0, 7, 1, 1), (0, 3, 2, 2))),
    (3, 1, 2, 2, False, False, ((1, 3, 1, 1),)),
)


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Edges of `_SAMPLES`, and one without gates."""
    found = [_sample(device, dtype, number, *shape) for number, shape in enumerate(_SAMPLES)]
    x, _, tensors, layer, options, _, eps = _sample(device, dtype, 9, 2, 3, 4, 1, True, False, ((0, 5, 1, 2),))
    found.append((x, None, tensors, layer, options, -1, eps))
    return found


def _sample(
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    images: int,
    channels: int,
    size: int,
    stride: int,
    affine: bool,
    identity: bool,
    kinds: _Kinds,
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean
        return values.to(device, dtype).requires_grad_()

    tensors: list[Tensor] = []
    options: list[int] = []
    for gate, (kind, kernel, dilation, stages) in enumerate(kinds):
        for _ in range(stages if kind == 0 else 1):
            if kind == 0:
                tensors += [made(channels, 1, kernel, kernel, std=0.5), made(channels, channels, 1, 1, std=0.5)]
            if affine:
                tensors += [made(channels, mean=1.0, std=0.2), made(channels, std=0.3)]
        options += [kind, kernel, dilation, stages, gate]
    gates = made(len(kinds) + 1, mean=0.3, std=0.2)
    x = made(images, channels, size, size + seed % 2, mean=0.2)
    return x, gates, tensors, [stride, int(affine)], options, len(kinds) if identity else -1, 1e-5
