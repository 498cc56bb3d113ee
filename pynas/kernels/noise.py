"""The random numbers of all samplers, stated in plain PyTorch.

A draw is a pure function of (domain, seed, step, index, item, layer), so it depends neither on threads nor on the order
of work. `csrc/shared/philox.h` says the same in C++.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

SEEDS = 2**63  # a seed must fit the int64 of an operator's schema
STEPS = 2**56  # a step shares 64 bits with the domain
INDICES = 2**32
LAYERS = 2**18

_MASK = 2**32 - 1


class Domain(IntEnum):
    """Each sampler has a domain of its own, so that two samplers with one seed never share a stream."""

    GUMBEL = 1
    PATHS = 2
    FAIR = 3


def check_stream(seed: int, step: int) -> None:
    """Raises ValueError unless seed and step can be counted with."""
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed is {seed}; it must be in 0 .. 2^63 - 1.")
    if not 0 <= step < STEPS:
        raise ValueError(f"step is {step}; it must be in 0 .. 2^56 - 1.")


def philox(counter: list[Tensor], key: int) -> list[Tensor]:
    """Philox4x32-10: four words of 32 random bits for four words of counter.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Args:
        counter: Four int64 tensors that broadcast, values in 0 .. 2^32 - 1.
        key: 64 bits.

    Returns:
        Four int64 tensors of the same kind.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, key >> 32
    for _ in range(10):
        # int64 products wrap around, but all 64 bits are right: the upper half is masked after the shift.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return [c0, c1, c2, c3]


def random_words(domain: Domain, seed: int, step: int, index: Tensor, items: int, layers: int) -> Tensor:
    """Uniform 32-bit words, int64 of shape (N, items, layers).

    Args:
        domain: Which sampler draws.
        seed: Of the run.
        step: Of the search, or any other count of calls.
        index: Draws, paths or rounds, int64 (N,).
        items: Words per index and layer.
        layers: Number of layers.
    """
    groups = -(-layers // 4)  # one block of four words serves four neighbouring layers
    group = torch.arange(groups, device=index.device)
    item = torch.arange(items, device=index.device)[:, None]
    place = group << 16 | item
    low, high = torch.tensor([step & _MASK, domain << 24 | step >> 32], device=index.device)
    words = philox([index[:, None, None].expand(-1, items, groups), place, low, high], seed)
    return torch.stack(words, -1).flatten(-2)[..., :layers]


def gumbel(words: Tensor) -> Tensor:
    """Gumbel(0, 1) noise -log(-log u) with u = 1 - (word + 1/2) / 2^32, float32 of the same shape.

    Near u = 1, where the noise is large, -log u is computed from 1 - u: a float32 u could not tell it from 0. So all
    32 bits count at both ends, u is never 0 or 1, and the noise lies between -3.13 and 22.87.
    """
    near_one = words < 2**31
    distance = (torch.where(near_one, words, _MASK - words).float() + 0.5) * 2**-32
    return -torch.log(-torch.where(near_one, torch.log1p(-distance), torch.log(distance)))
