"""Decoded images: in memory if they fit, else decoded again for every batch."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import UnidentifiedImageError
from torch import Tensor

from pynas.training.decode import decode
from pynas.training.sources import Source

RAM_BYTES = 2 * 1024**3
CHUNK = 32  # images per task of a thread: enough to hide the cost of handing it over

OnCorrupt = Literal["stop", "skip"]


@dataclass(frozen=True, eq=False)
class Survey:
    """What one pass over all images found.

    Args:
        failed: Reasons of the images that cannot be decoded, by position.
        digests: Hashes of the files (or pixels), by position.
        moments: Number, sum and sum of squares of the pixels of each channel, by position, each of shape (3, 3).
        converted: How many images needed which conversion to RGB.
    """

    failed: dict[int, str]
    digests: dict[int, bytes]
    moments: dict[int, NDArray[np.int64]]
    converted: Counter[str]


@dataclass(frozen=True, eq=False)
class _Decoded:
    pixels: Tensor  # (3, height, width), uint8
    digest: bytes
    converted: tuple[str, ...]


class Store:
    """All decoded images of a source.

    A stored image has a shorter side of `side` pixels, and is a square if `aspect` is 1. Whether it is kept in memory
    (up to `RAM_BYTES` for all together) or decoded again on every use makes no difference to its pixels.

    Args:
        source: Opens the pictures.
        side: Shorter side of a stored image.
        aspect: Largest ratio of the longer side to the shorter.
        workers: Number of threads; 0 takes one per CPU, up to 16.
    """

    def __init__(self, source: Source, *, side: int, aspect: float, workers: int = 0) -> None:
        self.source = source
        self.side = side
        self.aspect = aspect
        self.workers = workers or min(16, os.cpu_count() or 1)
        self.kept: dict[int, Tensor] | None = None

    def survey(self, rows: Sequence[int], on_corrupt: OnCorrupt) -> Survey:
        """Decodes each image once, keeps them if they fit into memory, and finds the broken ones before work is done.

        Raises:
            ValueError: For an image that cannot be decoded, unless `on_corrupt` is "skip".
            PermissionError: For a file that must not be read.
        """
        survey = Survey({}, {}, {}, Counter())
        self.kept = {} if 3 * self.side**2 * len(rows) <= RAM_BYTES else None
        size = 0
        with _quiet(), ThreadPoolExecutor(self.workers) as pool:
            for row, decoded in self._decode_all(rows, pool):
                if isinstance(decoded, Exception):
                    if on_corrupt == "stop":
                        raise self._broken(row, decoded) from decoded
                    survey.failed[row] = _reason(decoded)
                    continue
                survey.digests[row] = decoded.digest
                survey.moments[row] = _moments(decoded.pixels, self.side)
                survey.converted.update(decoded.converted)
                size += decoded.pixels.nbytes
                if size > RAM_BYTES:
                    self.kept = None
                if self.kept is not None:
                    self.kept[row] = decoded.pixels
        return survey

    def each(self, rows: Sequence[int], change: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Stacks `change(stored image, place in rows)` of each row; the results must have one shape.

        Raises:
            ValueError: If a file cannot be decoded any more.
        """
        if self.kept is not None:
            return torch.stack([change(self.kept[row], place) for place, row in enumerate(rows)])

        def work(place: int) -> Tensor:
            decoded = self._try(rows[place])
            if isinstance(decoded, Exception):
                raise self._broken(rows[place], decoded) from decoded
            return change(decoded.pixels, place)

        with _quiet(), ThreadPoolExecutor(self.workers) as pool:
            return torch.stack(list(pool.map(work, range(len(rows)))))

    def _decode_all(self, rows: Sequence[int], pool: ThreadPoolExecutor) -> Iterator[tuple[int, _Decoded | Exception]]:
        block = CHUNK * self.workers  # bounds what waits in memory when images are not kept
        for start in range(0, len(rows), block):
            some = rows[start : start + block]
            chunks = [some[i : i + CHUNK] for i in range(0, len(some), CHUNK)]
            results = pool.map(lambda chunk: [self._try(row) for row in chunk], chunks)
            yield from zip(some, chain.from_iterable(results), strict=True)

    def _try(self, row: int) -> _Decoded | Exception:
        try:
            image, content = self.source.open(row)
            pixels, converted = decode(image, self.side, self.aspect)
        except PermissionError as error:
            raise PermissionError(
                f"Cannot read {error.filename}: permission denied. Try: chmod u+r {error.filename}"
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise a dozen kinds for broken files
            return error
        digest = hashlib.blake2b(content, digest_size=16).digest()
        return _Decoded(torch.from_numpy(pixels), digest, converted)

    def _broken(self, row: int, error: Exception) -> ValueError:
        return ValueError(
            f"Cannot decode image {self.source.names[row]} of {self.source.name}: {_reason(error)}. "
            "Replace or remove it, or leave such files out with on_corrupt='skip'."
        )


class Images:
    """Some images of a store in a fixed order, with their labels.

    Args:
        store: Where the pixels are.
        rows: Positions in the store.
        size: Height and width of the images that are handed out, in pixels.
    """

    def __init__(self, store: Store, rows: Sequence[int], size: int) -> None:
        self.store = store
        self.rows = tuple(rows)
        self.size = size
        self.labels = torch.tensor([store.source.labels[row] for row in self.rows], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> tuple[str, ...]:
        """File names (or numbers) of the images."""
        return tuple(self.store.source.names[row] for row in self.rows)

    def joined(self, other: Images) -> Images:
        """These images followed by the others of the same store."""
        return Images(self.store, self.rows + other.rows, self.size)

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """Images as an evaluation sees them, without augmentation: shape (len(indices), 3, size, size), uint8."""
        return self.each(indices, lambda image, place: centre(image, self.size))

    def each(self, indices: Sequence[int], change: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Stacks `change(stored image of shape (3, height, width), place in indices)`."""
        return self.store.each([self.rows[index] for index in indices], change)


def centre(image: Tensor, size: int) -> Tensor:
    """The central square of an image of shape (3, height, width)."""
    height, width = image.shape[1:]
    if height == width == size:
        return image
    top, left = (height - size) // 2, (width - size) // 2
    return image[:, top : top + size, left : left + size]


def _moments(image: Tensor, side: int) -> NDArray[np.int64]:
    """Number, sum and sum of squares of each channel over the central square; integers, so that sums are exact."""
    pixels = centre(image, side).flatten(1).numpy().astype(np.int64)
    return np.stack([np.full(3, pixels.shape[1], dtype=np.int64), pixels.sum(1), (pixels**2).sum(1)])


def _reason(error: Exception) -> str:
    """Why an image cannot be decoded, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "the file is no known kind of image"  # Pillow's own words name a buffer in memory
    return str(error).partition("\n")[0] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Pillow's warnings: about metadata that is not used, and about sizes that are reduced at once.

    Python's filters belong to the process, so this is set here, around the threads, and not inside them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
