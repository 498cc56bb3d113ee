"""Augmentation, from random numbers that the caller draws: one row per image, so that neither batch nor order matters.

Shifts and flips are one gather for the whole batch: 3 us per 32x32 image, against 10 us with torchvision's functions
for each image and 220 us with its transforms under a new seed for each. Cropping with a resize is torchvision's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pynas.training.images import Images

Augment = Literal["auto", "none", "crop", "crop_flip", "imagenet"]
Policy = Literal["none", "crop", "crop_flip", "imagenet"]

ATTEMPTS = 10  # of finding a crop that fits, as in torchvision
COLUMNS: dict[Policy, int] = {"none": 0, "crop": 2, "crop_flip": 3, "imagenet": 2 * ATTEMPTS + 3}
LARGE = 96  # pixels


def policy_for(augment: Augment, size: int, mirrored: bool) -> Policy:
    """What "auto" means: shifts for characters, shifts and flips below 96 pixels, ImageNet's crops from there on.

    Args:
        augment: What the user asked for.
        size: Of the images, in pixels.
        mirrored: Whether the classes survive a mirror.
    """
    if augment != "auto":
        return augment
    if not mirrored:
        return "crop"
    return "imagenet" if size >= LARGE else "crop_flip"


def stored_shape(policy: Policy, size: int) -> tuple[int, float]:
    """Shorter side, and largest ratio of the sides, of the images that a policy starts from.

    ImageNet's crops need more than the central square, and more pixels than come out: 8/7 as usual (256 for 224).
    Beyond 3:1 the ends are cut off, so that a panorama does not fill the memory.
    """
    return (math.ceil(size * 8 / 7), 3.0) if policy == "imagenet" else (size, 1.0)


def pad_for(size: int) -> int:
    """By how many pixels an image is shifted at most: an eighth of its size."""
    return size // 8


def augmented(images: Images, indices: Sequence[int], policy: Policy, numbers: NDArray[np.float64]) -> Tensor:
    """Augmented images, shape (len(indices), 3, size, size), uint8.

    Args:
        images: Where they come from.
        indices: Which ones.
        policy: How to augment.
        numbers: In [0, 1), shape (len(indices), COLUMNS[policy]).
    """
    if policy == "none":
        return images.pixels(indices)
    if policy == "imagenet":
        return images.each(indices, lambda image, row: crop_resize(image, numbers[row], images.size))
    return shift(images.pixels(indices), numbers, pad_for(images.size))


def shift(images: Tensor, numbers: NDArray[np.float64], pad: int) -> Tensor:
    """Moves each image by up to `pad` pixels in both directions, over black, and mirrors it in half of the cases.

    The same as `RandomCrop(size, padding=pad)` and `RandomHorizontalFlip()`.

    Args:
        images: Shape (B, C, S, S).
        numbers: Shape (B, 2) for shifts alone, or (B, 3) for shifts and mirroring.
        pad: Pixels.
    """
    count, channels, size, _ = images.shape
    moves = torch.from_numpy((numbers[:, :2] * (2 * pad + 1)).astype(np.int64))
    steps = torch.arange(size)
    rows = moves[:, :1] + steps
    columns = moves[:, 1:] + steps
    if numbers.shape[1] == 3:
        mirrored = torch.from_numpy(numbers[:, 2:] < 0.5)
        columns = torch.where(mirrored, columns.flip(1), columns)
    width = size + 2 * pad
    places = (rows[:, :, None] * width + columns[:, None, :]).view(count, 1, size * size)
    padded = torch.nn.functional.pad(images, [pad] * 4).view(count, channels, width * width)
    return padded.gather(2, places.expand(count, channels, -1)).view(images.shape)


def crop_resize(image: Tensor, numbers: NDArray[np.float64], size: int) -> Tensor:
    """ImageNet's crop of 8 to 100 % of the area at 3:4 to 4:3, resized to a square, mirrored in half of the cases.

    Args:
        image: Shape (3, height, width), uint8.
        numbers: Shape (COLUMNS["imagenet"],).
        size: Of the result.
    """
    from torchvision.transforms.v2.functional import (
        resized_crop,
    )  # takes a second to import, and shifts need none of it

    height, width = image.shape[1:]
    *shapes, down, right, mirror = numbers.tolist()
    box_height, box_width = _box(height, width, shapes)
    top = int(down * (height - box_height + 1))
    left = int(right * (width - box_width + 1))
    result: Tensor = resized_crop(image, top, left, box_height, box_width, [size, size], antialias=True)
    return result.flip(2) if mirror < 0.5 else result


def _box(height: int, width: int, numbers: Sequence[float]) -> tuple[int, int]:
    """Height and width of the first crop that fits, from pairs of numbers, or of the largest of an allowed ratio."""
    for area, ratio in zip(numbers[::2], numbers[1::2], strict=True):
        pixels = height * width * (0.08 + area * 0.92)
        aspect = (4 / 3) ** (2 * ratio - 1)
        box_width, box_height = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            return box_height, box_width
    return min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
