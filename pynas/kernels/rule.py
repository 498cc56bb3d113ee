"""Which kernel of inverted-bottleneck blocks runs: the fused one or plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from pynas.kernels import setting
from pynas.kernels.native import KERNELS


def worth(in_channels: int, kernel: int, hidden: int) -> int:
    """What the kernel saves in a block beside plain products of matrices, for `pays`.

    Plain PyTorch is good at these and poor at depthwise convolutions of many taps; blocks that do not expand hold
    little else than what it is poor at.
    """
    return 8 if kernel >= 5 or hidden <= in_channels else 1


def pays(in_channels: int, positions: int, worth: int) -> bool:
    """Whether the kernel is faster than plain PyTorch for a layer of this shape.

    What it does with the weights alone grows with the square of the channels; what it saves grows with the positions
    (images x height x width) and with the sum over running blocks of what they are `worth`. `bench/bench_mbconv.py`
    shows the timings behind the rule, which depends on nothing else, so that results repeat.
    """
    return in_channels**2 <= 300 * worth * positions


def runs_fused(x: Tensor, worth: int) -> bool:
    """Whether running blocks of so much `worth` are to run in the kernel, by `pays` or as it was set.

    Raises:
        ValueError: It was set to, and there is no kernel for the device.
    """
    asked = setting.current()
    if asked == "fused" and not x.is_cpu:
        raise ValueError(f"kernels='fused' works on the CPU, but the images are on {x.device}. Use kernels='auto'.")
    images, channels, height, width = x.shape
    return x.is_cpu and would_run(channels, images * height * width, worth)


def would_run(in_channels: int, positions: int, worth: int) -> bool:
    """Whether a layer of this shape runs in the kernel on the CPU, as it is set."""
    asked = setting.current()
    if asked == "reference" or KERNELS is None:
        return False
    return asked == "fused" or pays(in_channels, positions, worth)
