"""Mean and covariance of the 3x3 patches of a batch of images, without the patches.

The outputs of any 3x3 convolution have their mean and variance from these: of a kernel k as a vector, k . mean and
k' C k. So the batch norms of linear branches (RepNAS, arXiv 2109.03508) are exact without computing the branches.
`csrc/cpu/patches.h` says what makes it fast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pynas.kernels import formats, graph, once
from pynas.kernels.kernel import Kernel
from pynas.kernels.native import KERNELS

_TOLD = once.told("patch_moments", "pynas.kernels.patches.patch_moments_reference")
PLACES = 9  # of a patch


def patch_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of all 3x3 patches of images with zeros around them, stride 1. Can be differentiated once.

    Args:
        x: (B, C, H, W), float32 or float64 for the kernel; the reference takes any floating point type.

    Returns:
        mean (9 C,), biased covariance (9 C, 9 C), and the mean of the images, (H, W, C). A patch is its nine places row
        by row, all channels of one after those of another.

    Raises:
        ValueError: x is no batch of images, or has no values.
    """
    if torch.compiler.is_compiling():
        found: tuple[Tensor, Tensor, Tensor] = patch_moments_op(x)
        return found
    return patch_moments_function(x)


def patch_moments_reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States `patch_moments` in plain PyTorch, for any device, type and order of derivative."""
    _check(x)
    images, channels, height, width = x.shape
    patches = functional.unfold(x, 3, padding=1).view(images, channels, PLACES, height * width)
    rows = patches.permute(0, 3, 2, 1).reshape(-1, PLACES * channels)
    mean = rows.mean(0)
    centred = rows - mean
    return mean, centred.t() @ centred / len(rows), x.mean(0).permute(1, 2, 0).contiguous()


def _check(x: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating point (images, channels, height, width), not {x.dtype} {tuple(x.shape)}.")
    if not x.numel():
        raise ValueError(f"x has no values: {tuple(x.shape)}. Moments need at least one image, channel and pixel.")


def _takes(x: Tensor) -> bool:
    return KERNELS is not None and x.is_cpu and x.dtype in (torch.float32, torch.float64)


def _forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] | None = KERNELS.patches_forward(formats.last(x), torch.get_num_threads())
    if found is None:
        raise ValueError("patch_moments takes no conjugate, negated or sparse tensors. Call .resolve_neg() first.")
    return found


def _backward(x: Tensor, mean: Tensor, grads: tuple[Tensor | None, ...]) -> Tensor:
    channels = x.shape[1]
    shapes = (PLACES * channels,), (PLACES * channels, PLACES * channels), (*x.shape[2:], channels)
    given = [
        x.new_zeros(shape) if grad is None else grad.contiguous() for grad, shape in zip(grads, shapes, strict=True)
    ]
    found = KERNELS.patches_backward(formats.last(x), mean, *given, torch.get_num_threads())
    if found is None:
        raise ValueError(f"Gradients must be CPU tensors of {x.dtype} in the shapes of the moments.")
    return formats.first(found, formats.is_channels_last(x))


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, covariance, image = _forward(x)
        ctx.save_for_backward(x, mean)
        ctx.set_materialize_grads(False)
        return mean, covariance, image

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        given = [grad for grad in grads if grad is not None]
        if not given:
            return None
        for grad in given:
            graph.refuse_batched(grad)
        x, mean = ctx.saved_tensors
        return once.last(_TOLD, [_backward(x, mean, grads)], [x, *given])[0]


def patch_moments_function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The hot path of `patch_moments`; the reference where there is no kernel for the device or type."""
    _check(x)
    if not _takes(x):
        return patch_moments_reference(x)
    result: tuple[Tensor, Tensor, Tensor] = _Moments.apply(x)
    return result


@torch.library.custom_op("pynas::patch_moments", mutates_args=())
def patch_moments_op(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`patch_moments` as a registered operator."""
    _check(x)
    return _forward(x) if _takes(x) else patch_moments_reference(x)


@patch_moments_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = PLACES * x.shape[1]
    return x.new_empty(wide), x.new_empty(wide, wide), x.new_empty(x.shape[2], x.shape[3], x.shape[1])


@torch.library.custom_op("pynas::patch_moments_backward", mutates_args=())
def patch_moments_backward_op(
    x: Tensor, mean: Tensor, of_mean: Tensor, of_covariance: Tensor, of_image: Tensor
) -> Tensor:
    """The gradient of x as a registered operator."""
    if _takes(x):
        return _backward(x, mean, (of_mean, of_covariance, of_image))
    pulled: Any = torch.func.vjp(patch_moments_reference, x)
    return formats.like(pulled[1]((of_mean, of_covariance, of_image))[0].clone(), x)


@patch_moments_backward_op.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return formats.empty_like(x, x.shape)


patch_moments_backward_op.register_autograd(once.refusal(_TOLD))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[0])


def _op_backward(ctx: Any, *grads: Tensor) -> Tensor:
    found: Tensor = patch_moments_backward_op(*ctx.saved_tensors, *grads)
    return found


patch_moments_op.register_autograd(_op_backward, setup_context=_setup_context)

# Arguments to try it with: images, channels, height, width.
_SAMPLES = ((2, 3, 5, 6), (3, 17, 4, 4), (1, 5, 1, 4), (2, 2, 2, 2), (2, 20, 3, 1), (1, 4, 1, 1))


def samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Images of `_SAMPLES`, their means away from zero."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1 for shape in _SAMPLES]
    return [(x.to(device, dtype).requires_grad_(),) for x in made]


PATCH_MOMENTS = Kernel(
    "patch_moments",
    patch_moments_op,
    patch_moments_function,
    patch_moments_reference,
    samples,
    same_bits=False,
    tolerance=(1e-4, 1e-5),
)
