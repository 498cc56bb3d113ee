"""Paths in bulk, without gradient: one option of every layer per path, as uint8.

Path i is a function of (seed, step, i) alone, so a longer call begins with the paths of a shorter one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pynas.kernels import cuda, cuda_sampling, noise
from pynas.kernels.kernel import Kernel
from pynas.kernels.native import KERNELS

MOST_OPTIONS = 256  # of a layer: a path holds uint8
_NEVER = 2**32  # a threshold that no 32-bit word reaches
_CHUNK = 2**15  # paths that a reference draws at a time, to bound its memory


def sample_paths(n: int, theta: Tensor, mask: Tensor | None = None, *, seed: int, step: int = 0) -> Tensor:
    """Draws n paths from softmax(theta), uint8 of shape (n, L), on theta's device.

    Each option's probability is rounded to a multiple of 2^-32: one rarer than 2^-33 is never drawn.

    Args:
        n: Number of paths, 0 .. 2^32.
        theta: (L, O) logits.
        mask: (L, O) bool, True where the layer has the option; None where it has all.
        seed: 0 .. 2^63 - 1.
        step: 0 .. 2^56 - 1; another step gives fresh paths.

    Raises:
        ValueError: A number or shape is out of range, a layer has no allowed option, or an allowed theta is not finite.
    """
    mask = torch.ones_like(theta, dtype=torch.bool) if mask is None else mask
    _check_table(theta, mask)
    logits = theta.detach().double().masked_fill(~mask, -torch.inf)
    if not logits.masked_fill(~mask, 0).isfinite().all():
        raise ValueError("theta must be finite where an option is allowed. Has the search diverged?")
    share = torch.softmax(logits, -1).cumsum(-1)
    # Where no allowed option follows, rounding must not leave a share to a masked one.
    last = mask.flip(-1).cumsum(-1).flip(-1) - mask.long() == 0
    cuts = (share * 2.0**32).round().long().clamp_(max=_NEVER).masked_fill_(last, _NEVER)
    return _sample(cuts[:, :-1], n, seed, step)


def uniform_paths(n: int, options: Sequence[int] | Tensor, *, seed: int, step: int = 0) -> Tensor:
    """Draws n paths with every allowed option of a layer equally likely, uint8 of shape (n, L).

    Args:
        n: Number of paths, 0 .. 2^32.
        options: Number of options of each layer, or a mask (L, O), True where the layer has the option.
        seed: 0 .. 2^63 - 1.
        step: 0 .. 2^56 - 1; another step gives fresh paths.

    Raises:
        ValueError: A number is out of range, or a layer has no option.
    """
    if not isinstance(options, Tensor):
        counts = _counts(options)
        options = torch.arange(max(options, default=1)) < counts[:, None]
    _check_table(options, options)
    rank = options.cumsum(-1)
    k = rank[:, -1:]
    return _sample(((rank * _NEVER + k - 1) // k)[:, :-1], n, seed, step)


def fair_paths(rounds: int, options: Sequence[int], *, seed: int, step: int = 0) -> Tensor:
    """Draws strictly fair rounds of m paths, uint8 of shape (rounds, m, L) with m the greatest number of options.

    Within a round, each layer runs through an independent, uniformly random permutation of its m options, so every
    option is trained exactly once. A layer with k < m options runs through fresh permutations of its k, one after
    another, and the last one is cut off at m: within a round, the counts of its options differ by at most 1, and all
    have the same expectation.

    Permutations are the ranks of random 32-bit words; two equal words keep their order, which favours no option by more
    than 2^-32.

    Source: FairNAS, arXiv 1907.01845, section 3.2, strict fairness.

    Args:
        rounds: Number of rounds, 0 .. 2^32.
        options: Number of options of each layer, 1 .. 256.
        seed: 0 .. 2^63 - 1.
        step: 0 .. 2^56 - 1; another step gives fresh rounds.

    Raises:
        ValueError: A number is out of range.
    """
    return _fair(_counts(options), rounds, max(options, default=1), seed, step)


def _counts(options: Sequence[int]) -> Tensor:
    if not all(1 <= count <= MOST_OPTIONS for count in options):
        raise ValueError(f"Each layer needs 1 to {MOST_OPTIONS} options, got {list(options)}.")
    return torch.tensor(options, dtype=torch.int64)


def _check_table(theta: Tensor, mask: Tensor) -> None:
    if theta.dim() != 2 or not 1 <= theta.shape[1] <= MOST_OPTIONS:
        raise ValueError(f"theta must have shape (layers, options) with 1 to 256 options, got {tuple(theta.shape)}.")
    if mask.shape != theta.shape or mask.dtype is not torch.bool:
        raise ValueError(f"mask must be bool of shape {tuple(theta.shape)}, got {mask.dtype} {tuple(mask.shape)}.")
    closed = ~mask.any(-1)
    if closed.any():
        raise ValueError(f"mask of layer {int(closed.int().argmax())} allows no option. Allow at least one.")


def _check(name: str, count: int, layers: int, seed: int, step: int) -> None:
    if not 0 <= count <= noise.INDICES:
        raise ValueError(f"{name} is {count}; it must be in 0 .. 2^32.")
    if layers >= noise.LAYERS:
        raise ValueError(f"There are {layers} layers; fewer than 2^18 are possible.")
    noise.check_stream(seed, step)


def _sample(cuts: Tensor, n: int, seed: int, step: int) -> Tensor:
    """Draws n paths: a layer takes option k when k of its cuts are <= the word drawn for it.

    Args:
        cuts: (L, O - 1) int64, rising, 0 .. 2^32.
        n: Number of paths.
        seed: Of the run.
        step: Of the search.
    """
    layers, width = cuts.shape
    _check("n", n, layers, seed, step)
    if cuda.library(cuts) is not None:
        return cuda_sampling.sample(cuts, n, seed, step)
    if KERNELS is None:
        return _sample_reference(cuts, n, seed, step)
    device, cuts = cuts.device, cuts.cpu().contiguous()
    out = cuts.new_empty(n, layers, dtype=torch.uint8)
    KERNELS.sample_paths(n, layers, width, cuts.data_ptr(), seed, step, out.data_ptr())
    return out.to(device)


def _sample_reference(cuts: Tensor, n: int, seed: int, step: int) -> Tensor:
    _check("n", n, len(cuts), seed, step)
    device, cuts = cuts.device, cuts.cpu().contiguous()
    out = cuts.new_empty(n, len(cuts), dtype=torch.uint8)
    for start in range(0, n, _CHUNK):
        index = torch.arange(start, min(start + _CHUNK, n), device="cpu")
        words = noise.random_words(noise.Domain.PATHS, seed, step, index, 1, len(cuts)).squeeze(1)
        out[index] = torch.searchsorted(cuts, words.T.contiguous(), right=True).T.to(torch.uint8)
    return out.to(device)


def _fair(counts: Tensor, rounds: int, most: int, seed: int, step: int) -> Tensor:
    """Draws fair rounds.

    Args:
        counts: (L,) int64, options of each layer, 1 .. most.
        rounds: Number of rounds.
        most: Paths of a round.
        seed: Of the run.
        step: Of the search.
    """
    _check_fair(counts, rounds, most, seed, step)
    if cuda.library(counts) is not None:
        return cuda_sampling.fair(counts, rounds, most, seed, step)
    if KERNELS is None:
        return _fair_reference(counts, rounds, most, seed, step)
    device, counts = counts.device, counts.cpu().contiguous()
    out = counts.new_empty(rounds, most, len(counts), dtype=torch.uint8)
    KERNELS.fair_paths(rounds, len(counts), most, counts.data_ptr(), seed, step, out.data_ptr())
    return out.to(device)


def _check_fair(counts: Tensor, rounds: int, most: int, seed: int, step: int) -> None:
    _check("rounds", rounds, len(counts), seed, step)
    if not 1 <= most <= MOST_OPTIONS or ((counts < 1) | (counts > most)).any():
        raise ValueError(f"Each layer needs 1 to {most} options, at most {MOST_OPTIONS}, got {counts.tolist()}.")


def _fair_reference(counts: Tensor, rounds: int, most: int, seed: int, step: int) -> Tensor:
    _check_fair(counts, rounds, most, seed, step)
    device, counts = counts.device, counts.cpu()
    out = counts.new_empty(rounds, most, len(counts), dtype=torch.uint8)
    for start in range(0, rounds, _CHUNK // most):
        index = torch.arange(start, min(start + _CHUNK // most, rounds), device="cpu")
        words = noise.random_words(noise.Domain.FAIR, seed, step, index, 2 * most, len(counts))
        for layer, k in enumerate(counts.tolist()):
            permutations = -(-most // k)
            keys = words[:, : permutations * k, layer].reshape(-1, permutations, k)
            ranks = keys.argsort(dim=-1, stable=True).argsort(dim=-1).flatten(1)
            out[index, :, layer] = ranks[:, :most].to(torch.uint8)
    return out.to(device)


@torch.library.custom_op("pynas::sample_paths", mutates_args=())
def sample_op(cuts: Tensor, n: int, seed: int, step: int) -> Tensor:
    """`sample_paths` from cuts as a registered operator."""
    return _sample(cuts, n, seed, step)


@sample_op.register_fake
def _(cuts: Tensor, n: int, seed: int, step: int) -> Tensor:
    return cuts.new_empty(n, cuts.shape[0], dtype=torch.uint8)


@torch.library.custom_op("pynas::fair_paths", mutates_args=())
def fair_op(counts: Tensor, rounds: int, most: int, seed: int, step: int) -> Tensor:
    """`fair_paths` as a registered operator."""
    return _fair(counts, rounds, most, seed, step)


@fair_op.register_fake
def _(counts: Tensor, rounds: int, most: int, seed: int, step: int) -> Tensor:
    return counts.new_empty(rounds, most, counts.shape[0], dtype=torch.uint8)


def _path_samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    cuts = (torch.rand(22, 8, generator=generator) * 2.0**32).long().sort(-1).values
    cuts[3, 4:] = _NEVER
    cuts = cuts.to(device)
    return [(cuts, 100, 2026, 1), (cuts[:5, ::2], 65, 2026, 2), (cuts[:1, :0], 3, 2026, 3)]


def _fair_samples(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    counts = torch.tensor([9, 1, 4, 8, 3, 9, 9], device=device)
    return [(counts, 100, 9, 2026, 1), (counts[::3], 65, 9, 2026, 2), (counts[1:2], 3, 1, 2026, 3)]


SAMPLE_PATHS = Kernel("sample_paths", sample_op, _sample, _sample_reference, _path_samples, differentiable=False)
FAIR_PATHS = Kernel("fair_paths", fair_op, _fair, _fair_reference, _fair_samples, differentiable=False)
