"""How good a network is with the weights of a supernet: its path is run where it is, with statistics of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cost_models.torch_threads import torch_threads
from pynas.architecture import Architecture
from pynas.supernet import Supernet
from pynas.training.evaluate import Norm, averaged_statistics
from pynas.training.feed import moved
from pynas.training.optim import Amp, autocast, fast_layout
from pynas.training.where import device_of

KEPT_BYTES = 512 * 1024**2  # of normalised images


@dataclass(frozen=True)
class Score:
    """How a network does with inherited weights.

    Args:
        accuracy: Top-1, between 0 and 1.
        loss: Mean cross-entropy, in nats.
    """

    accuracy: float
    loss: float


@dataclass(frozen=True)
class Judging:
    """How networks are judged.

    Args:
        calibrate: Training images whose statistics the batch norms of a network take before it is judged; 0 leaves the
            running statistics of the supernet, which mix all paths (SPOS, section 3.4).
        calibrate_batch: Images that make one batch of statistics.
        limit: At most so many images to judge on; 0 takes all.
        batch_size: Images a forward pass.
        amp: Mixed precision of forward passes.

    Raises:
        ValueError: A number is out of range.
    """

    calibrate: int = 512
    calibrate_batch: int = 128
    limit: int = 0
    batch_size: int = 256
    amp: Amp = "off"

    def __post_init__(self) -> None:
        for name, least in (("calibrate", 0), ("calibrate_batch", 2), ("limit", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}.")
        if self.calibrate == 1:
            raise ValueError("calibrate=1 gives no statistics. Give 2 images or more, or 0 to leave them as they are.")


class Pixels:
    """Images of an evaluation, as batches; normalised once where they fit into memory.

    Args:
        read: Gives the uint8 pixels (B, 3, S, S) of a range of images.
        labels: (N,).
        normalise: Turns pixels into what networks are trained on.
        batch_size: Images per batch.
        size: Height and width of an image, in pixels.
        device: Where batches are put.
    """

    def __init__(
        self,
        read: Callable[[range], Tensor],
        labels: Tensor,
        normalise: Callable[[Tensor], Tensor],
        batch_size: int,
        size: int,
        device: str | torch.device = "cpu",
    ) -> None:
        self._device = torch.device(device)
        self._read, self.labels, self._normalise, self.batch_size = read, labels, normalise, batch_size
        fits = 12 * size**2 * len(labels) <= KEPT_BYTES
        self._kept = list(self._batches()) if fits else None

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.labels), self.batch_size):
            some = range(start, min(start + self.batch_size, len(self.labels)))
            pixels, labels = moved(self._read(some), self._device), self.labels[some.start : some.stop]
            yield fast_layout(self._normalise(pixels)), moved(labels, self._device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._kept) if self._kept is not None else self._batches()


class Judge:
    """Judges one network after the other, on the thread that calls it; on a GPU where the supernet is there.

    Args:
        net: The supernet; changed in place.
        calibration: Images for the statistics, where the supernet is; not read where `how.calibrate` is 0.
        images: Images to judge on, likewise.
        how: How.
    """

    def __init__(self, net: Supernet, calibration: Pixels, images: Pixels, how: Judging) -> None:
        self.net, self.calibration, self.images, self.how = net, calibration, images, how
        self._dropouts = [module for module in net.modules() if isinstance(module, nn.Dropout)]
        inside = {id(part) for gated in net.gated().values() for part in gated.modules()}
        self._fixed = [part for part in net.modules() if isinstance(part, Norm) and id(part) not in inside]

    def __call__(self, architecture: Architecture) -> Score:
        gates, on = self.net.one_hot(architecture), device_of(self.net)
        threads = torch_threads(1) if on.type == "cpu" else contextlib.nullcontext()
        with threads, torch.inference_mode(), autocast(self.how.amp, on):
            if self.how.calibrate:
                self.net.train()
                for dropout in self._dropouts:  # is behind all batch norms, and would move torch's generator
                    dropout.eval()
                batches = (x for x, _ in self.calibration)
                averaged_statistics(self._norms(architecture), lambda x: self.net(x, gates), batches)
            self.net.eval()
            right, losses, total = [], [], 0
            for x, y in self.images:
                logits = self.net(x, gates).float()
                right.append((logits.argmax(1) == y).sum())
                losses.append(functional.cross_entropy(logits, y, reduction="sum"))
                total += len(y)
            return Score(sum(torch.stack(right).tolist()) / total, sum(torch.stack(losses).tolist()) / total)

    def _norms(self, architecture: Architecture) -> list[nn.Module]:
        """Batch norms on the path of a network."""
        found: list[nn.Module] = list(self._fixed)
        for gated in self.net.gated().values():
            options: Any = getattr(gated.mixed, "options", None)  # a family may share modules among its options
            chosen = architecture.choices[gated.slot.choice.name]
            for module in [gated.mixed] if options is None else [options[name] for name in chosen]:
                found += [part for part in module.modules() if isinstance(part, Norm)]
        return found
