"""The concrete distribution over options: soft one-hot vectors that turn hard as the temperature falls.

Maddison, Mnih and Teh, "The Concrete Distribution", ICLR 2017, arXiv 1611.00712; SNAS (arXiv 1812.09926), eq. 13.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pynas.kernels.gumbel import gumbel_gates


class Concrete(NamedTuple):
    """Draws for C choices of O options.

    Args:
        z: (D, C, O), soft one-hot vectors; differentiable.
        log_z: Their logarithms, exact where z itself is too small for its type; minus infinity where no option is.
        index: (D, C) int64, the largest entry of each: a draw from the categorical distribution.
    """

    z: Tensor
    log_z: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index


def draw(log_alpha: Tensor, mask: Tensor, temperature: float, seed: int, step: int, draws: int = 1) -> Concrete:
    """Z^k = exp((log alpha^k + G^k) / lambda) / sum_l exp((log alpha^l + G^l) / lambda), G from Gumbel(0, 1).

    The noise is that of `pynas.kernels.gumbel`: a function of seed, step, draw, choice and option alone.

    Args:
        log_alpha: (C, O), need not be normalised.
        mask: (C, O) bool, which options there are.
        temperature: lambda.
        seed: Of the run.
        step: Another one gives fresh noise.
        draws: How many independent draws.
    """
    nothing = torch.zeros_like(log_alpha)
    with torch.no_grad():
        # Uniform gates at temperature 1 are the noise but for a constant of each choice, which makes no difference.
        noise = gumbel_gates(nothing, mask, nothing, 1.0, seed, step, draws).soft.log()
    noisy = log_alpha.masked_fill(~mask, -torch.inf) + noise
    log_z = (noisy / temperature).log_softmax(-1)
    return Concrete(log_z.exp(), log_z, noisy.argmax(-1))


def log_density(log_alpha: Tensor, log_z: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Logarithm of the density of draws, with respect to the n - 1 free entries of a vector of n options.

    ln((n-1)!) + (n-1) ln lambda + sum_k (log alpha_k - (lambda+1) ln z_k) - n ln sum_k alpha_k z_k^-lambda (Maddison et
    al., eq. 10). SNAS's code clamps z at 1e-4, which falsifies it at low temperature; logarithms need no clamp.

    Args:
        log_alpha: (C, O), need not be normalised; differentiable.
        log_z: (..., C, O), of `draw`.
        mask: (C, O) bool.
        temperature: lambda.

    Returns:
        (..., C).
    """
    n = mask.sum(-1)
    # What there is no option for must be finite in the sums before it is left out, for the sake of gradients.
    log_z = log_z.masked_fill(~mask, 0.0)
    log_alpha = log_alpha.masked_fill(~mask, 0.0)
    terms = (log_alpha - (temperature + 1) * log_z).masked_fill(~mask, 0.0).sum(-1)
    together = (log_alpha - temperature * log_z).masked_fill(~mask, -torch.inf).logsumexp(-1)
    constant = torch.lgamma(n.to(log_z.dtype)) + (n - 1) * math.log(temperature)
    return constant + terms - n * together
