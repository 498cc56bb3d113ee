"""Images for image classification: found, split without leaks, decoded, and described."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from cost_models.names import unknown
from pynas.training.augment import Augment, Policy, policy_for, stored_shape
from pynas.training.folders import folder
from pynas.training.images import Images, OnCorrupt, Store, Survey
from pynas.training.sources import STORED, Source, digits, stored
from pynas.training.splits import Split, split

NAMES = ("digits", *STORED)


@dataclass(frozen=True, eq=False)
class Data:
    """A data set, split in three.

    Args:
        name: For reports.
        classes: Names of the classes; labels are positions in it.
        size: Height and width of the images in pixels.
        weights: Training images for the weights.
        arch: Training images held out for the architecture.
        test: Touched only by the final evaluation.
        augment: How training images are augmented.
        mean: Of each channel over `weights`, on a scale of 0 to 1.
        std: Likewise, the standard deviation.
        notes: What a report should say: files left out, images converted, identical files.
    """

    name: str
    classes: tuple[str, ...]
    size: int
    weights: Images
    arch: Images
    test: Images
    augment: Policy
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...]

    @property
    def train(self) -> Images:
        """All training images: those for the weights, then those for the architecture."""
        return self.weights.joined(self.arch)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Turns uint8 images of shape (B, 3, S, S) into the float32 that networks are trained on."""
        return normalised(pixels, self.mean, self.std)

    def describe(self) -> str:
        """A few lines for reports: what the data is, how it is split and changed, and the notes."""
        kept = "kept in memory" if self.weights.store.kept is not None else "decoded again for every batch"
        mean, std = (" ".join(f"{value:.4f}" for value in values) for values in (self.mean, self.std))
        weights, arch, test = (f"{len(images):,}" for images in (self.weights, self.arch, self.test))
        lines = [
            f"{self.name}: {len(self.classes)} classes, {self.size}x{self.size} RGB, {kept}",
            f"{weights} images for the weights, {arch} for the architecture, {test} for the test",
            f"augment {self.augment}; mean {mean}, standard deviation {std}",
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 images (B, 3, S, S) as float32, less the mean and over the deviation of each channel (of 0 to 1)."""
    centre, scale = (_of_channels(tuple(x), pixels.device) for x in (mean, std))
    return pixels.to(torch.float32).sub_(centre).div_(scale)


@cache
def _of_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Three numbers of 0 to 1 on the scale of pixels, (3, 1, 1); made once, as the way to a GPU waits for it."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(3, 1, 1) * 255


def open_data(
    data: str | Path,
    *,
    size: int,
    seed: int = 0,
    arch_share: float = 0.2,
    test_share: float = 0.2,
    limit: int | None = None,
    on_corrupt: OnCorrupt = "stop",
    augment: Augment = "auto",
    root: Path | None = None,
    workers: int = 0,
) -> Data:
    """Opens a data set, splits it, and decodes each image once, so that a broken file is found before any work is done.

    Images become RGB of `size` x `size` pixels: shorter side resized, centre cropped. They stay in memory if that takes
    2 GiB or less, and are decoded again for every batch otherwise, with the same result.

    Args:
        data: "digits", a torchvision data set that is on disk ("cifar10", "mnist", ...), or a folder of images:
            PATH/train/<class>/* with PATH/val/<class>/* as the test set, or PATH/<class>/*, which is split three ways.
        size: Height and width that networks get, in pixels; 8 or more.
        seed: Of the split, with the names of the images; 0 or more.
        arch_share: Share of the training images that is held out for the architecture.
        test_share: Share of all images that is held out for the test where the data has no test set.
        limit: At most so many training images, for quick experiments; the test set stays whole.
        on_corrupt: "stop" at an image that cannot be decoded, or "skip" it with a note.
        augment: How training images are augmented; "auto" chooses by data set and size.
        root: Folder of torchvision's data sets; None for $PYNAS_DATA, or else ./data.
        workers: Threads that decode; 0 takes one per CPU, up to 16.

    Raises:
        ValueError: For a wrong argument, a folder of the wrong layout, too few images in a class, or a broken image.
        FileNotFoundError, NotADirectoryError, PermissionError: If the data cannot be reached.

    >>> data = open_data("digits", size=8)
    >>> len(data.weights), len(data.arch), len(data.test)
    (1151, 287, 359)
    """
    for name, value, allowed in (("on_corrupt", on_corrupt, OnCorrupt), ("augment", augment, Augment)):
        if value not in get_args(allowed):
            raise unknown(name, value, get_args(allowed))
    _check_numbers(size, seed, arch_share, test_share, limit, workers)
    source = _find(data, root)
    policy = policy_for(augment, size, source.mirrored)
    parts = split(source, seed=seed, arch_share=arch_share, test_share=test_share, limit=limit)
    side, aspect = stored_shape(policy, size)
    store = Store(source, side=side, aspect=aspect, workers=workers)
    survey = store.survey(parts.weights + parts.arch + parts.test, on_corrupt)
    parts = _without_failed(source, parts, survey)
    weights, arch, test = (Images(store, rows, size) for rows in (parts.weights, parts.arch, parts.test))
    mean, std = _mean_and_std(parts, survey)
    notes = (*source.notes, *_notes(source, parts, survey))
    return Data(source.name, source.classes, size, weights, arch, test, policy, mean, std, notes)


def _check_numbers(size: int, seed: int, arch_share: float, test_share: float, limit: int | None, workers: int) -> None:
    if size < 8:
        raise ValueError(f"size={size} is too small: images need 8 pixels or more, for instance size=32.")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative. Give 0 or more.")
    for name, share in (("arch_share", arch_share), ("test_share", test_share)):
        if not 0 < share < 1:
            raise ValueError(f"{name}={share} is not a share between 0 and 1 (both excluded), for instance {name}=0.2.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no training images. Give the number to use, or None for all.")
    if workers < 0:
        raise ValueError(f"workers={workers} is negative. Give a number of threads, or 0 for one per CPU.")


def _find(data: str | Path, root: Path | None) -> Source:
    """The source that a name or a path means. A name comes first; ./name is the folder."""
    if data == "digits":
        return digits()
    if isinstance(data, str) and data in STORED:
        return stored(data, root)
    path = Path(data).expanduser()
    looks_like_path = isinstance(data, Path) or len(path.parts) != 1 or data.startswith((".", "~"))
    if looks_like_path or path.exists():
        return folder(path)
    hint = "Or give the path of a folder of images: there is none of that name here."
    raise unknown("data set", str(data), NAMES, hint)


def _without_failed(source: Source, parts: Split, survey: Survey) -> Split:
    """Takes the images out that cannot be decoded; every class must keep one in each part."""
    kept = {}
    for part, rows in vars(parts).items():
        kept[part] = tuple(row for row in rows if row not in survey.failed)
        left = {source.labels[row] for row in kept[part]}
        for label, name in enumerate(source.classes):
            if label not in left:
                raise ValueError(
                    f"Class {name!r} of {source.name} has no readable image left for the {part} part: "
                    f"{len(survey.failed)} images cannot be decoded. Repair them, or remove the class."
                )
    return Split(**kept)


def _mean_and_std(parts: Split, survey: Survey) -> tuple[tuple[float, ...], tuple[float, ...]]:
    count, total, squares = np.sum([survey.moments[row] for row in parts.weights], axis=0)
    mean = total / count / 255
    variance = squares / count / 255**2 - mean**2
    constant = variance < 1e-12  # such a channel is centred and not scaled
    std = np.sqrt(np.where(constant, 1.0, variance))
    return tuple(mean.tolist()), tuple(std.tolist())


def _notes(source: Source, parts: Split, survey: Survey) -> list[str]:
    notes = []
    if survey.failed:
        row, reason = min(survey.failed.items())
        notes.append(
            f"{len(survey.failed):,} images could not be decoded and were left out, "
            f"for example {source.names[row]} ({reason})"
        )
    for kind, count in sorted(survey.converted.items()):
        notes.append(f"{count:,} images converted to 8-bit RGB: {kind}")
    train = parts.weights + parts.arch
    for those, these, text in (
        (parts.test, train, "images of the test set are byte for byte among the training images"),
        (parts.arch, parts.weights, "images for the architecture are byte for byte among those for the weights"),
    ):
        seen = {survey.digests[row]: row for row in these}
        same = [row for row in those if survey.digests[row] in seen]
        if same:
            first = min(same)
            example = f"{source.names[first]} = {source.names[seen[survey.digests[first]]]}"
            notes.append(f"{len(same):,} {text}, for example {example}")
    return notes
