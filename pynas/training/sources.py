"""Data sets by name: scikit-learn's digits, and torchvision's where they lie on disk."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# name: torchvision's class, the argument that picks the part, its values for training and test
STORED: dict[str, tuple[str, str, Any, Any]] = {
    "cifar10": ("CIFAR10", "train", True, False),
    "cifar100": ("CIFAR100", "train", True, False),
    "mnist": ("MNIST", "train", True, False),
    "fashionmnist": ("FashionMNIST", "train", True, False),
    "kmnist": ("KMNIST", "train", True, False),
    "svhn": ("SVHN", "split", "train", "test"),
    "stl10": ("STL10", "split", "train", "test"),
}
CHARACTERS = ("mnist", "kmnist", "svhn")


@dataclass(frozen=True, eq=False)
class Source:
    """Where images come from, before they are split and decoded.

    Args:
        name: For reports.
        classes: Names of the classes; labels are positions in it.
        names: One per image, unique.
        labels: One per image.
        tests: Positions of the images of the source's own test set; empty if it has none.
        open: Gives the picture at a position and the bytes that tell whether two are identical.
        mirrored: Whether the classes survive a mirror; characters do not.
        notes: What a report should say about it.
    """

    name: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]
    tests: range
    open: Callable[[int], tuple[Image.Image, bytes]]
    mirrored: bool = True
    notes: tuple[str, ...] = ()


def digits() -> Source:
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn (UCI "optdigits")."""
    from sklearn.datasets import load_digits  # slow to import

    bundle = load_digits()
    pixels = np.rint(bundle.images * (255 / 16)).astype(np.uint8)

    def open_digit(row: int) -> tuple[Image.Image, bytes]:
        return Image.fromarray(pixels[row]), pixels[row].tobytes()

    names = tuple(f"digits/{row:04d}" for row in range(len(pixels)))
    classes = tuple(str(digit) for digit in bundle.target_names)
    return Source("digits", classes, names, tuple(bundle.target.tolist()), range(0), open_digit, mirrored=False)


def stored(name: str, root: Path | None) -> Source:
    """A torchvision data set that is on disk already. Never downloads.

    Args:
        name: A key of `STORED`.
        root: Folder that torchvision was given when it wrote the data; None for $PYNAS_DATA, or else ./data.

    Raises:
        FileNotFoundError: If the data is not there; says where it was looked for.
    """
    from torchvision import datasets  # slow to import

    kind, argument, train_value, test_value = STORED[name]
    where, why = _root(root)
    try:
        # Old pickles make numpy warn about how they were written; the user cannot help that.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train, test = (
                getattr(datasets, kind)(str(where), download=False, **{argument: value})
                for value in (train_value, test_value)
            )
    except PermissionError as error:
        raise PermissionError(
            f"Cannot read {error.filename}: permission denied. Give yourself the right to read it."
        ) from error
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"Data set {name!r} is not under {where.absolute()} ({why}), and nothing is downloaded. "
            f"Put torchvision's files for {kind} there, or give their folder as root or PYNAS_DATA. "
            f"For a folder of images of that name write ./{name}."
        ) from error

    def open_stored(row: int) -> tuple[Image.Image, bytes]:
        image: Image.Image = train[row][0] if row < len(train) else test[row - len(train)][0]
        return image, image.tobytes()

    labels = [
        int(label) for part in (train, test) for label in (part.targets if hasattr(part, "targets") else part.labels)
    ]
    classes = getattr(train, "classes", None) or [str(label) for label in range(max(labels) + 1)]
    names = [f"{part}/{row:06d}" for part, images in (("train", train), ("test", test)) for row in range(len(images))]
    tests = range(len(train), len(train) + len(test))
    return Source(name, tuple(classes), tuple(names), tuple(labels), tests, open_stored, name not in CHARACTERS)


def _root(root: Path | None) -> tuple[Path, str]:
    """The folder of stored data sets, and why it is that one."""
    if root is not None:
        return Path(root), "given as root"
    if "PYNAS_DATA" in os.environ:
        return Path(os.environ["PYNAS_DATA"]), "from PYNAS_DATA"
    return Path("data"), "the default, as neither root nor PYNAS_DATA is given"
