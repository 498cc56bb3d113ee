"""How good a file is in use: its accuracy, and what an image takes on this machine."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from cost_models.machine import cpu_model
from cost_models.steady import in_rounds, settled
from cost_models.timing import clock, no_gc, repeats_ms, sweep
from pynas.export.formats import Answer
from pynas.export.written import HostLatency
from pynas.training.data import Data
from pynas.training.feed import batches

BATCH = 64


def file_accuracy(answer: Answer, data: Data) -> float:
    """Top-1 accuracy of an opened file on all test images, 0 to 1."""
    right = 0
    for images, labels in batches(data.test, BATCH, data):
        right += int((answer(images).argmax(1) == labels).sum())
    return right / len(data.test)


def calibration_batches(data: Data, number: int) -> list[Tensor]:
    """The first training images that weights were trained on, as they are (no augmentation), in batches."""
    parts = itertools.islice(batches(data.weights, BATCH, data), -(-number // BATCH))
    return [images[: number - place * BATCH] for place, (images, _) in enumerate(parts)]


def time_files(answers: Mapping[str, tuple[Answer, str]], image: Tensor, repeats: int) -> dict[str, HostLatency]:
    """What one image takes in each of several opened files, timed in turns as the rows of a table are.

    The way from a tensor into the runtime and back counts, for it is what a program pays.

    Args:
        answers: By any name, each with its runtime in words.
        image: (1, C, H, W).
        repeats: Of each.
    """
    between, timer = sweep(), clock(1)
    take: dict[str, Callable[[], float]] = {
        name: partial(_once_ms, partial(answer, image), between, timer) for name, (answer, _) in answers.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in take}
    with torch.inference_mode():
        for _ in in_rounds(take, taken, repeats):
            pass
    return {name: _latency(settled(taken[name], repeats), runtime) for name, (_, runtime) in answers.items()}


def _once_ms(run: Callable[[], Tensor], between: Callable[[], object], timer: Callable[[], int]) -> float:
    with no_gc():
        return repeats_ms(run, between, 1, timer)[0]


def _latency(times: tuple[float, ...], runtime: str) -> HostLatency:
    quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return HostLatency(statistics.median(times), quarters[2] - quarters[0], len(times), cpu_model(), runtime)
