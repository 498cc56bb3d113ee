"""Accuracy of a network, and the batch-norm statistics that it needs first when its weights are inherited."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pynas.training.data import Data
from pynas.training.feed import batches
from pynas.training.images import Images
from pynas.training.optim import Amp, autocast, fast_layout
from pynas.training.where import device_of

Norm = nn.modules.batchnorm._BatchNorm


def accuracy(net: nn.Module, images: Images, data: Data, batch_size: int = 256, amp: Amp = "off") -> float:
    """Top-1 accuracy between 0 and 1, in eval mode, every image once, where the network is.

    Leaves the training flag as it was.
    """
    training, on = net.training, device_of(net)
    net.eval()
    right = total = 0
    with torch.inference_mode(), autocast(amp, on):
        for x, y in batches(images, batch_size, data, on):
            right += int((net(fast_layout(x)).argmax(1) == y).sum())
            total += len(y)
    net.train(training)
    return right / total


def recalibrate(net: nn.Module, images: Images, data: Data, limit: int = 512, batch_size: int = 128) -> None:
    """Sets batch-norm statistics to the exact mean over some training images.

    A supernet's running statistics mix all sampled paths and fit none of them (SPOS, section 3.4). `submodels` does
    this for many networks of a supernet without building them.

    Args:
        net: Changed in place, and left in eval mode.
        images: Of the weights split.
        data: Whose normalisation applies.
        limit: Number of images, from the start of a fixed permutation.
        batch_size: Larger batches give statistics nearer to those of training.
    """
    norms = [module for module in net.modules() if isinstance(module, Norm)]
    some = itertools.islice(batches(images, batch_size, data, device_of(net)), -(-limit // batch_size))
    parts = (fast_layout(x[: limit - number * batch_size]) for number, (x, _) in enumerate(some))
    net.train()
    with torch.no_grad():
        averaged_statistics(norms, net, parts)
    net.eval()


def averaged_statistics(norms: Sequence[nn.Module], forward: Callable[[Tensor], Any], inputs: Iterable[Tensor]) -> None:
    """Gives batch norms the mean of their batch statistics over some forward passes, weighed by images.

    Args:
        norms: In training mode when `forward` runs.
        forward: Runs them on a batch.
        inputs: Batches; those of one image, which have no variance, are left out.
    """
    layers: list[Any] = list(norms)
    momenta = [norm.momentum for norm in layers]
    for norm in layers:
        norm.reset_running_stats()
    seen = 0
    for x in inputs:
        if len(x) < 2:
            continue
        seen += len(x)
        for norm in layers:
            norm.momentum = len(x) / seen  # a cumulative average, in a way that fused kernels take part in
        forward(x)
    for norm, momentum in zip(layers, momenta, strict=True):
        norm.momentum = momentum
