"""Calls the CUDA kernels of gates and paths (csrc/cuda/sampling.cu) for `pynas.kernels.gumbel` and `.paths`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pynas.kernels import cuda

_Fields = tuple[tuple[str, Any], ...]


_I, _P, _F, _U = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float, ctypes.c_uint64


def _fields(*groups: tuple[Any, str]) -> _Fields:
    """Fields of a struct: a type, and names separated by spaces."""
    return tuple((name, kind) for kind, names in groups for name in names.split())


class _Gates(ctypes.Structure):
    _fields_ = _fields((_I, "draws layers options"), (_P, "theta mask cost"), (_F, "tau"), (_U, "seed step"))


class _Results(ctypes.Structure):
    _fields_ = _fields((_P, "soft index log_prob layer_cost cost"))


class _Gradients(ctypes.Structure):
    _fields_ = _fields((_P, "soft log_prob cost scratch theta_out cost_out"))


class _Paths(ctypes.Structure):
    _fields_ = _fields((_I, "paths layers cuts"), (_P, "threshold"), (_U, "seed step"), (_P, "out"))


class _Rounds(ctypes.Structure):
    _fields_ = _fields((_I, "rounds layers most"), (_P, "options"), (_U, "seed step"), (_P, "out"))


def _run(name: str, x: Tensor, *structs: ctypes.Structure) -> None:
    library = cuda.library(x)
    assert library is not None
    function = library.function(name, ctypes.c_char_p, *(ctypes.c_void_p for _ in structs), ctypes.c_void_p)
    addresses = [ctypes.addressof(struct) for struct in structs]
    with cuda.device_of(x):
        cuda.check(function(*addresses, library.stream(x)))


def takes_gates(theta: Tensor) -> bool:
    """Whether the kernel takes logits that are sound: float32 on its device."""
    return cuda.library(theta) is not None and theta.dtype is torch.float32 and theta.numel() > 0


def _gates(
    theta: Tensor, mask: Tensor, cost: Tensor, tau: float, seed: int, step: int, draws: int
) -> tuple[_Gates, tuple[Tensor, ...]]:
    """The struct, and the dense tensors that must outlive the call."""
    dense = cuda.dense(theta), mask.contiguous(), cuda.dense(cost)
    layers, options = theta.shape
    addresses = [tensor.data_ptr() for tensor in dense]
    return _Gates(draws, layers, options, *addresses, tau, seed, step), dense


def gumbel_forward(
    theta: Tensor, mask: Tensor, cost: Tensor, tau: float, seed: int, step: int, draws: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `pynas.kernels.gumbel.gumbel_gates`, of sound arguments. Values are not looked at, which would wait for the
    GPU: a layer without an option, or with a logit or cost that is not finite, gives NaN."""
    gates, dense = _gates(theta, mask, cost, tau, seed, step, draws)
    layers, options = theta.shape
    soft, index = theta.new_empty(draws, layers, options), theta.new_empty(draws, layers, dtype=torch.int64)
    log_prob, layer_cost, total = theta.new_empty(draws, layers), theta.new_empty(draws, layers), theta.new_empty(draws)
    results = [tensor.data_ptr() for tensor in (soft, index, log_prob, layer_cost, total)]
    _run("pynas_gumbel_forward", dense[0], gates, _Results(*results))
    return soft, index, log_prob, total


def gumbel_backward(
    theta: Tensor,
    mask: Tensor,
    cost: Tensor,
    tau: float,
    seed: int,
    step: int,
    draws: int,
    grads: Sequence[Tensor | None],
    wants_cost: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of theta and, where it is wanted, cost, given those of soft, log_prob and the expected cost."""
    gates, dense = _gates(theta, mask, cost, tau, seed, step, draws)
    given = [None if grad is None else cuda.dense(grad) for grad in grads]
    scratch, theta_out = torch.empty_like(dense[0]), torch.empty_like(dense[0])
    cost_out = torch.empty_like(dense[2]) if wants_cost else None
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in (*given, scratch, theta_out, cost_out)]
    _run("pynas_gumbel_backward", dense[0], gates, _Gradients(*addresses))
    return theta_out, cost_out


def sample(cuts: Tensor, n: int, seed: int, step: int) -> Tensor:
    """Paths from sound cuts: see `pynas.kernels.paths`."""
    layers, width = cuts.shape
    cuts, out = cuts.contiguous(), cuts.new_empty(n, layers, dtype=torch.uint8)
    if out.numel():
        _run("pynas_sample_paths", cuts, _Paths(n, layers, width, cuts.data_ptr(), seed, step, out.data_ptr()))
    return out


def fair(counts: Tensor, rounds: int, most: int, seed: int, step: int) -> Tensor:
    """Fair rounds of sound counts: see `pynas.kernels.paths`."""
    counts, out = counts.contiguous(), counts.new_empty(rounds, most, len(counts), dtype=torch.uint8)
    if out.numel():
        given = _Rounds(rounds, len(counts), most, counts.data_ptr(), seed, step, out.data_ptr())
        _run("pynas_fair_paths", counts, given)
    return out
