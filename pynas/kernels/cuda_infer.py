"""Calls the CUDA kernel of folded inverted bottlenecks (csrc/cuda/mbconv_infer.cu) for `pynas.kernels.mbconv_infer`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from pynas.kernels import cuda

# Channels of the input, per group, whose weights a block of threads has room for: where it can have so much shared
# memory, and elsewhere.
MOST_CHANNELS, ROOM = 512, 160 * 1024
MOST_WITH_LITTLE_ROOM = 192

_SIZES = ("images", "height", "width", "in_channels", "out_height", "out_width", "out_channels")
_NUMBERS = ("kernel", "hidden", "stride", "groups", "activation", "residual")
_TENSORS = ("x", "expand", "expand_bias", "depthwise", "depthwise_bias", "project", "project_bias", "y")


class _Folded(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in (*_SIZES, *_NUMBERS)),
        *((name, ctypes.c_void_p) for name in _TENSORS),
    )


def takes(x: Tensor, channels: int) -> bool:
    """Whether the kernel takes images that are sound: float32 on its device, so many channels of a group."""
    library = cuda.library(x)
    if library is None or x.dtype is not torch.float32 or channels > MOST_CHANNELS or x.numel() == 0:
        return False
    return channels <= MOST_WITH_LITTLE_ROOM or library.shared_bytes(x) >= ROOM


def run(x: Tensor, weights: Sequence[Tensor], stride: int, groups: int, activation: int, residual: bool) -> Tensor:
    """As `pynas.kernels.mbconv_infer.inference_reference`, of sound arguments; activation by its place."""
    dense = [cuda.aligned(cuda.dense(x)), *map(cuda.dense, weights)]
    images, height, width, channels = x.shape
    hidden, out, kernel = len(weights[2]), len(weights[4]), weights[2].shape[-1]
    sizes = images, height, width, channels, -(-height // stride), -(-width // stride), out
    y = x.new_empty(images, sizes[4], sizes[5], out)
    addresses = [tensor.data_ptr() for tensor in (*dense, y)]
    given = _Folded(*sizes, kernel, hidden, stride, groups, activation, int(residual), *addresses)
    library = cuda.library(x)
    assert library is not None
    function = library.function("pynas_mbconv_infer", ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p)
    with cuda.device_of(x):
        cuda.check(function(ctypes.addressof(given), library.stream(x)))
    return y
