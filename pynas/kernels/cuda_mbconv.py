"""Calls the CUDA kernels of inverted-bottleneck blocks in training (csrc/cuda/mbconv.h) for `pynas.kernels.mbconv`."""

from __future__ import annotations

import ctypes
from collections.abc import MutableMapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pynas.kernels import cuda
from pynas.kernels import mbconv_reference as plain
from pynas.kernels.graph import WANTS_GATES, WANTS_WEIGHTS, WANTS_X

MOST_OPTIONS, MOST_CHANNELS = 16, 256  # kMostOptions and kMostChannels of csrc/cuda/mbconv.h
_BUFFERS = 9  # of an option: running mean, variance and number of batches of three norms

_Ints = Sequence[int]
_Saved = tuple[Tensor, ...]


class _Option(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kernel", "hidden", "groups", "gate", "trained", "hidden_before")),
        *((name, ctypes.c_int64) for name in ("expand_before", "taps_before", "project_before")),
        ("tensors", ctypes.c_void_p * plain.TENSORS),
        ("statistics", ctypes.c_void_p),
        ("gradients", ctypes.c_void_p * plain.TENSORS),
    )


_SIZES = ("images", "height", "width", "in_channels", "out_height", "out_width", "out_channels")
_NUMBERS = ("stride", "activation", "options", "hidden", "gates", "identity", "gates_per_image")
_SHARES = ("most_rows", "rows", "chunks", "slices", "bands", "splits")
_FORWARD = ("x", "gate", "y", "mean", "covariance", "products", "statistics")
_SCRATCH = ("moments", "norms", "folded", "depthwise", "partial")
_BACKWARD = ("y_gradient", "products_gradient", "hidden_gradient", "expand_gradient", "sums", "output_sums")
_REST = ("band_sums", "weight_partial", "correction", "input_partial", "x_gradient", "gate_gradient")


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in (*_SIZES, *_NUMBERS, *_SHARES)),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in (*_FORWARD, *_SCRATCH, *_BACKWARD, *_REST)),
        ("option", _Option * MOST_OPTIONS),
    )


class _Update(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("options", "out_channels")),
        *((name, ctypes.c_int64) for name in ("in_positions", "out_positions")),
        ("momentum", ctypes.c_float),
        ("statistics", ctypes.c_void_p),
        *((name, ctypes.c_int32 * MOST_OPTIONS) for name in ("hidden", "groups")),
        ("norms", ctypes.c_void_p * (MOST_OPTIONS * _BUFFERS)),
    )


class _Functions:
    def __init__(self, library: cuda.Library) -> None:
        layer, pointer, text = ctypes.POINTER(_Layer), ctypes.c_void_p, ctypes.c_char_p
        self.workspace = library.function("pynas_mbconv_workspace", ctypes.c_int64, layer, ctypes.c_int32)
        self.forward = library.function("pynas_mbconv_forward", text, layer, pointer, pointer)
        self.backward = library.function("pynas_mbconv_backward", text, layer, pointer, pointer)
        self.update = library.function("pynas_mbconv_update", text, ctypes.POINTER(_Update), pointer)
        size = library.function("pynas_mbconv_layer_bytes", ctypes.c_int64)()
        if size != ctypes.sizeof(_Layer):
            raise ImportError(f"{library.path} was built for another version of pynas. Install pynas again.")


_functions: MutableMapping[cuda.Library, _Functions] = WeakKeyDictionary()


def _functions_of(library: cuda.Library) -> _Functions:
    if library not in _functions:
        _functions[library] = _Functions(library)
    return _functions[library]


# Blocks of threads that share the positions, at most; 0 leaves it to the kernels. Tests set it.
most_rows = 0


def takes(x: Tensor, layer: _Ints, options: _Ints) -> bool:
    """Whether the kernels can take what is sound: float32 on their device, no more channels and options than they have
    room for, more than one value of a channel."""
    if cuda.library(x) is None or x.dtype is not torch.float32 or layer[0] not in (1, 2):
        return False
    images, out, height, width = plain.out_shape(x, layer)
    few = len(options) // plain.NUMBERS <= MOST_OPTIONS and max(x.shape[1], out) <= MOST_CHANNELS
    return few and images * height * width > 1


def _filled(
    x: Tensor, layer: _Ints, options: _Ints, tensors: Sequence[Tensor], gates: Tensor | None, identity: int, eps: float
) -> _Layer:
    images, height, width, channels = x.shape
    filled = _Layer(
        images=images,
        height=height,
        width=width,
        in_channels=channels,
        out_channels=layer[1],
        stride=layer[0],
        activation=layer[2],
        options=len(options) // plain.NUMBERS,
        gates=0 if gates is None else gates.shape[1],
        identity=identity,
        gates_per_image=int(gates is not None and gates.shape[0] > 1),
        most_rows=most_rows,
        eps=eps,
        x=x.data_ptr(),
        gate=None if gates is None else gates.data_ptr(),
    )
    for option, (numbers, parts) in zip(filled.option, plain.split(options, tensors), strict=False):
        option.kernel, option.hidden, option.groups, option.gate, option.trained = numbers
        option.tensors[:] = [part.data_ptr() for part in parts]
    return filled


def _run(x: Tensor, filled: _Layer, backward: bool) -> None:
    library = cuda.library(x)
    assert library is not None
    functions = _functions_of(library)
    count = functions.workspace(ctypes.byref(filled), int(backward))
    workspace = torch.empty(count, dtype=torch.float32, device=x.device)
    run = functions.backward if backward else functions.forward
    with cuda.device_of(x):
        cuda.check(run(ctypes.byref(filled), workspace.data_ptr(), library.stream(x)))


def forward(
    x: Tensor, layer: _Ints, options: _Ints, tensors: Sequence[Tensor], gates: Tensor | None, identity: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y and what backward needs, of sound arguments that `takes`.

    Args:
        x: Dense (B, H, W, C), at an address that is a multiple of 16.
        layer, options, tensors, identity, eps: As `pynas.kernels.mbconv.mixed_mbconv` has them; tensors are dense.
        gates: Dense rows (1 or B, O), or none.

    Returns:
        y (B, H', W', C'), mean (C,) and covariance (C, C) of x, products (options, positions, C'), statistics.
    """
    images, out, height, width = plain.out_shape(x.permute(0, 3, 1, 2), layer)
    channels, count = x.shape[3], len(options) // plain.NUMBERS
    y, mean, covariance = (
        x.new_empty(images, height, width, out),
        x.new_empty(channels),
        x.new_empty(channels, channels),
    )
    products = x.new_empty(count, images * height * width, out)
    statistics = x.new_empty(plain.statistics_size(layer, options))
    filled = _filled(x, layer, options, tensors, gates, identity, eps)
    results = {"y": y, "mean": mean, "covariance": covariance, "products": products, "statistics": statistics}
    for name, tensor in results.items():
        setattr(filled, name, tensor.data_ptr())
    _run(x, filled, backward=False)
    return y, mean, covariance, products, statistics


def backward(
    x: Tensor,
    layer: _Ints,
    options: _Ints,
    tensors: Sequence[Tensor],
    gates: Tensor | None,
    identity: int,
    eps: float,
    grad: Tensor,
    saved: _Saved,
    wanted: int,
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor | None, ...]]:
    """Gradients of x (dense, (B, H, W, C)), gates (rows) and tensors; none where they are not wanted.

    Args:
        x, layer, options, tensors, gates, identity, eps: As in `forward`.
        grad: Of y, dense.
        saved: What `forward` returned after y.
        wanted: See `pynas.kernels.graph.wanted`.
    """
    filled = _filled(x, layer, options, tensors, gates, identity, eps)
    for name, tensor in zip(("mean", "covariance", "products", "statistics"), saved, strict=True):
        setattr(filled, name, tensor.data_ptr())
    x_grad = torch.empty_like(x) if wanted & WANTS_X else None
    gates_grad = torch.empty_like(gates) if wanted & WANTS_GATES and gates is not None else None
    filled.y_gradient = grad.data_ptr()
    filled.x_gradient = None if x_grad is None else x_grad.data_ptr()
    filled.gate_gradient = None if gates_grad is None else gates_grad.data_ptr()
    grads: list[Any] = []
    for option, (numbers, parts) in zip(filled.option, plain.split(options, tensors), strict=False):
        if not wanted & WANTS_WEIGHTS:
            continue
        given = [torch.empty_like(part) if numbers[4] else None for part in parts]
        option.gradients[:] = [0 if part is None else part.data_ptr() for part in given]
        grads += given
    _run(x, filled, backward=True)
    return x_grad, gates_grad, tuple(grads)


def update(
    layer: _Ints,
    options: _Ints,
    statistics: Tensor,
    buffers: Sequence[Tensor],
    momentum: float,
    in_positions: int,
    out_positions: int,
) -> bool:
    """Moves running statistics: see `pynas.kernels.mbconv_update.update_norms`. False where the kernel cannot."""
    library, few = cuda.library(statistics), len(options) // plain.NUMBERS <= MOST_OPTIONS
    if library is None or not few or statistics.dtype is not torch.float32:
        return False
    if not all(_movable(buffer, statistics) for buffer in buffers):
        return False
    filled = _Update(
        len(options) // plain.NUMBERS, layer[1], in_positions, out_positions, momentum, statistics.data_ptr()
    )
    filled.hidden[: filled.options] = options[1 :: plain.NUMBERS]
    filled.groups[: filled.options] = options[2 :: plain.NUMBERS]
    filled.norms[: len(buffers)] = [buffer.data_ptr() for buffer in buffers]
    with cuda.device_of(statistics):
        cuda.check(_functions_of(library).update(ctypes.byref(filled), library.stream(statistics)))
    return True


def _movable(buffer: Tensor, statistics: Tensor) -> bool:
    return (
        buffer.dtype in (torch.float32, torch.int64) and buffer.device == statistics.device and buffer.is_contiguous()
    )
