"""Accuracy of a network, and the batch-norm statistics that it needs first when its weights are inherited."""

from __future__ import annotations

import torch
from torch import nn

from pynas.training.data import Data
from pynas.training.feed import batches
from pynas.training.images import Images
from pynas.training.optim import Amp, autocast, fast_layout


def accuracy(net: nn.Module, images: Images, data: Data, batch_size: int = 256, amp: Amp = "off") -> float:
    """Top-1 accuracy between 0 and 1, in eval mode, every image once. Leaves the training flag as it was."""
    training = net.training
    net.eval()
    right = total = 0
    with torch.inference_mode(), autocast(amp):
        for x, y in batches(images, batch_size, data):
            right += int((net(fast_layout(x)).argmax(1) == y).sum())
            total += len(y)
    net.train(training)
    return right / total


def recalibrate(net: nn.Module, images: Images, data: Data, limit: int = 512, batch_size: int = 128) -> None:
    """Sets batch-norm statistics to the exact mean over some training images.

    A supernet's running statistics mix all sampled paths and fit none of them (SPOS, section 3.4).

    Args:
        net: Changed in place, and left in eval mode.
        images: Of the weights split.
        data: Whose normalisation applies.
        limit: Number of images, from the start of a fixed permutation.
        batch_size: Larger batches give statistics nearer to those of training.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    net.train()
    seen = 0
    with torch.no_grad():
        for x, _ in batches(images, batch_size, data):
            if seen >= limit:
                break
            if len(x) > 1:
                net(fast_layout(x))
            seen += len(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.eval()
