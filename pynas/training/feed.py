"""Batches: an endless, resumable stream for training, and one pass in order for evaluation."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from cost_models.names import unknown
from pynas.training.augment import COLUMNS, Policy, augmented
from pynas.training.data import Data
from pynas.training.draws import permutation, uniform
from pynas.training.images import Images

Pool = Literal["split", "train"]
ORDER, AUGMENT = 0, 1  # what a key's random numbers are for


class Feed:
    """Training batches as a strategy sees them.

    Each of the two streams walks a random permutation of its images, which depends on seed, stream and epoch only, and
    goes on to its next epoch by itself. How an image is augmented depends on seed, stream, epoch and image only. So a
    resumed run sees the batches of an unbroken one, and torch's global generator is left alone.

    Args:
        data: Where the images come from.
        batch_size: Images per batch. The last, incomplete batch of an epoch is dropped; a part that is smaller than a
            batch is one batch.
        seed: 0 or more.
        pool: "split": the weights stream has the weights' images; "train": it has the architecture's as well, for
            training a found network. The architecture stream is the same either way.
        device: Where batches are put. Images are drawn and augmented on the CPU, so that they are the same anywhere.

    Raises:
        ValueError: If batch_size < 1, seed < 0, or for an unknown pool.
    """

    def __init__(
        self,
        data: Data,
        *,
        batch_size: int,
        seed: int,
        pool: Pool = "split",
        device: str | torch.device = "cpu",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is too small. Give 1 or more, for instance batch_size=64.")
        if seed < 0:
            raise ValueError(f"seed={seed} is negative. Give 0 or more.")
        if pool not in get_args(Pool):
            raise unknown("pool", pool, get_args(Pool))
        self.data = data
        self.device = torch.device(device)
        images = data.train if pool == "train" else data.weights
        self._weights = _Stream(images, data.augment, batch_size, (seed, 0))
        self._arch = _Stream(data.arch, data.augment, batch_size, (seed, 1))

    @property
    def steps_weights(self) -> int:
        """Batches of the weights stream in an epoch."""
        return self._weights.steps

    @property
    def steps_arch(self) -> int:
        """Batches of the architecture stream in an epoch."""
        return self._arch.steps

    def weights(self) -> tuple[Tensor, Tensor]:
        """The next batch for the weights: augmented and normalised float32 images (B, 3, S, S), int64 labels (B,)."""
        return self._ready(*self._weights.draw())

    def arch(self) -> tuple[Tensor, Tensor]:
        """The next batch for the architecture, of the same kind."""
        return self._ready(*self._arch.draw())

    def state_dict(self) -> dict[str, int]:
        """Where both streams stand, and what they walk over, to recognise it again."""
        return {
            f"{name}_{key}": value
            for name, stream in (("weights", self._weights), ("arch", self._arch))
            for key, value in stream.state().items()
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to where another feed stood.

        Raises:
            ValueError: If that feed had other images, another batch size or another seed, or if the state is damaged.
        """
        here = self.state_dict()
        if set(state) != set(here):
            raise ValueError(f"This is not the state of a feed: it has {sorted(state)}, expected {sorted(here)}.")
        for key, value in here.items():
            if not key.endswith(("_epoch", "_step")) and state[key] != value:
                raise ValueError(
                    f"The checkpoint's data does not fit: {key} was {state[key]} and is {value} now. "
                    "Resume with the data, limit, batch size and seed that the run was started with."
                )
        streams = (("weights", self._weights), ("arch", self._arch))
        for name, stream in streams:
            epoch, step = state[f"{name}_epoch"], state[f"{name}_step"]
            if epoch < 0 or not 0 <= step < stream.steps:
                raise ValueError(f"The checkpoint is damaged: epoch {epoch}, step {step} of {stream.steps} for {name}.")
        for name, stream in streams:
            stream.epoch, stream.step = state[f"{name}_epoch"], state[f"{name}_step"]

    def _ready(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.data.normalise(moved(pixels, self.device)), moved(labels, self.device)


class _Stream:
    """An endless walk over some images, in a new order every epoch."""

    def __init__(self, images: Images, policy: Policy, batch_size: int, key: tuple[int, int]) -> None:
        self.images = images
        self.policy = policy
        self.batch_size = min(batch_size, len(images))
        self.steps = len(images) // self.batch_size
        self.key = key
        self.names_crc32 = zlib.crc32(os.fsencode("\n".join(images.names)))
        self.epoch = 0
        self.step = 0
        self._order: tuple[int, list[int]] = (-1, [])  # epoch and its permutation

    def draw(self) -> tuple[Tensor, Tensor]:
        """The next batch: images (B, 3, S, S), uint8, and labels (B,)."""
        if self._order[0] != self.epoch:
            order = permutation((*self.key, ORDER, self.epoch), len(self.images))
            self._order = (self.epoch, order.tolist())
        start = self.step * self.batch_size
        indices = self._order[1][start : start + self.batch_size]
        numbers = uniform((*self.key, AUGMENT, self.epoch), indices, COLUMNS[self.policy])
        batch = augmented(self.images, indices, self.policy, numbers), self.images.labels[indices]
        self.step += 1
        if self.step == self.steps:
            self.epoch, self.step = self.epoch + 1, 0
        return batch

    def state(self) -> dict[str, int]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "images": len(self.images),
            "names_crc32": self.names_crc32,
            "batch_size": self.batch_size,
            "seed": self.key[0],
        }


def moved(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device. A GPU takes it when it is ready for it, and nobody waits for that."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def batches(
    images: Images, batch_size: int, data: Data, device: str | torch.device = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once, in their order, normalised and without augmentation; the last batch may be smaller.

    The order is random with regard to the classes, so that the first batches are a fair sample.

    Args:
        images: A part of `data`.
        batch_size: Images per batch.
        data: Whose normalisation applies.
        device: Where batches are put.

    Raises:
        ValueError: If batch_size < 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is too small. Give 1 or more, for instance batch_size=256.")
    where = torch.device(device)
    for start in range(0, len(images), batch_size):
        indices = range(start, min(start + batch_size, len(images)))
        labels = images.labels[start : start + batch_size]
        yield data.normalise(moved(images.pixels(indices), where)), moved(labels, where)
