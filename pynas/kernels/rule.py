"""Which kernel of inverted-bottleneck blocks runs: the fused one or plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pynas.kernels import cuda, cuda_infer, cuda_mbconv, cuda_verdicts, setting
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


def runs_fused(x: Tensor, worth: int, layer: Sequence[int], options: Sequence[int]) -> bool:
    """Whether running blocks of so much `worth` are to run in the kernel, by `pays` or as it was set.

    On a GPU a rule by shape cannot know what pays: plain PyTorch runs until `pynas kernels tune` has timed both, and
    for layers that the kernel has no room for (`pynas.kernels.cuda_mbconv.takes`).

    Args:
        x: (B, C, H, W).
        worth: On a CPU.
        layer, options: As in `pynas.kernels.mbconv.mixed_mbconv`.

    Raises:
        ValueError: It was set to, and there is no kernel for the device or the type.
    """
    asked = setting.current()
    if not x.is_cpu or cuda.library(x) is not None:
        return _runs_on_gpu(x, layer, options, asked)
    images, channels, height, width = x.shape
    return would_run(channels, images * height * width, worth)


def _runs_on_gpu(x: Tensor, layer: Sequence[int], options: Sequence[int], asked: setting.Setting) -> bool:
    if asked == "reference":
        return False
    if asked == "fused" and (cuda.library(x) is None or x.dtype is not torch.float32):
        raise ValueError(
            f"kernels='fused' needs CUDA kernels ({cuda.state()}) and float32, but the images are {x.dtype} on "
            f"{x.device}. Use kernels='auto'."
        )
    return cuda_mbconv.takes(x, layer, options) and cuda_verdicts.runs("training", x, layer, options, asked == "fused")


def infers_on_gpu(x: Tensor, layer: Sequence[int], options: Sequence[int]) -> bool:
    """Whether one block in evaluation runs in the CUDA kernel: where `pynas kernels tune` found it faster, or set."""
    takes = cuda_infer.takes(x, x.shape[1] // options[2])
    return takes and cuda_verdicts.runs("inference", x, layer, options, setting.current() == "fused")


def would_run(in_channels: int, positions: int, worth: int) -> bool:
    """Whether a layer of this shape runs in the kernel on the CPU, as it is set."""
    asked = setting.current()
    if asked == "reference" or KERNELS is None:
        return False
    return asked == "fused" or pays(in_channels, positions, worth)
