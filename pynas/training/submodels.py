"""Accuracy of many networks with the weights of one supernet: each judged once, in several processes, and kept.

A network is always judged on one thread, so that the number of processes changes nothing. Where the supernet is on a
GPU, networks are judged there, in this process alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from cost_models.files import write_atomic
from pynas.architecture import Architecture
from pynas.kernels import setting
from pynas.supernet import Supernet
from pynas.training.data import Data
from pynas.training.images import Images
from pynas.training.judge import Judge, Judging, Pixels, Score
from pynas.training.optim import fast_layout
from pynas.training.side_by_side import SideBySide
from pynas.training.where import device_of

WORTH_A_PROCESS = 8  # networks for each process, below which starting it takes longer than it saves


class Submodels:
    """Networks of a supernet as it is now, judged with its weights; every network once.

    In a `with`, processes stay from one call to the next.

    Args:
        net: A trained supernet. It is copied, and later changes to it make no difference.
        data: Whose weights' images give the statistics.
        images: To judge on; those held out for the architecture by default.
        how: How.
        processes: How many judge side by side; 0 takes one for each thread of torch, where there is enough to do. A
            space that is defined in the running script is judged in this process alone, and so is a supernet on a GPU.
        path: A file of JSON lines that every score is added to. What it holds of the same weights, images and settings
            is not judged again, so that an interrupted evaluation goes on.
        expected: Networks that will be judged in all, where several calls bring them; whether processes are worth it
            goes by this, not by what one call brings.

    Raises:
        ValueError: `processes` is negative, or a line of the file is broken.
    """

    def __init__(
        self,
        net: Supernet,
        data: Data,
        *,
        images: Images | None = None,
        how: Judging | None = None,
        processes: int = 0,
        path: Path | None = None,
        expected: int = 0,
    ) -> None:
        if isinstance(processes, bool) or processes < 0:
            raise ValueError(f"processes must be a number of processes, or 0 for one per thread, not {processes!r}.")
        self.how = how or Judging()
        self.space = net.space
        self._processes, self._expected = processes, expected
        self._workers: SideBySide | None = None
        self._stay = False
        self._data, self._images = data, data.arch if images is None else images
        self._net = fast_layout(copy.deepcopy(net).requires_grad_(False))
        self._judge: Judge | None = None
        self._path = path
        self._scores: dict[str, Score] = {}
        self.context = self._context() if path is not None else ""
        if path is not None:
            self._scores = read_scores(path, self.context)

    def __enter__(self) -> Submodels:
        self._stay = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stay = False
        self._end_processes()

    def _end_processes(self) -> None:
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def _context(self) -> str:
        """Twelve hex digits that stand for weights, images and settings."""
        told = hashlib.sha256()
        for name, tensor in sorted(self._net.state_dict().items()):
            told.update(name.encode())
            told.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        for images in (self._images, self._data.weights):
            told.update("\n".join(images.names).encode("utf-8", "surrogateescape"))
        about = (asdict(self.how), self.space.name, dict(self.space.options()), setting.current(), self._data.mean)
        told.update(repr(about).encode())
        return told.hexdigest()[:12]

    def scores(
        self, architectures: Sequence[Architecture], judged: Callable[[Architecture, Score], None] | None = None
    ) -> list[Score]:
        """The score of each network, in their order.

        Args:
            architectures: Of the supernet's space; the same one may come several times.
            judged: Told about each network that had not been judged before, as soon as it is.

        Raises:
            ValueError: A network is of another space.
            ChildProcessError: A process failed twice at the same network.
        """
        options = dict(self.space.options())
        for architecture in architectures:
            if architecture.space != self.space.name or dict(architecture.options) != options:
                raise ValueError(
                    f"The network {architecture} is of space {architecture.space!r} with {dict(architecture.options)}, "
                    f"the supernet of {self.space.name!r} with {options}."
                )
        pending = {a.fingerprint: a for a in architectures if a.fingerprint not in self._scores}
        for fingerprint, score in self._judged(list(pending.values())):
            self._scores[fingerprint] = score
            if self._path is not None:
                append_score(self._path, self.context, pending[fingerprint], score)
            if judged is not None:
                judged(pending[fingerprint], score)
        return [self._scores[architecture.fingerprint] for architecture in architectures]

    def _judged(self, architectures: list[Architecture]) -> Iterator[tuple[str, Score]]:
        processes = self._many(len(architectures))
        if processes > 1 and architectures:
            if self._workers is None:
                place = None if self._path is None else self._path.parent / ".judging"
                self._workers = SideBySide(self._bundle(), processes, place)
            whole = False
            try:
                yield from self._workers.judge(architectures)
                whole = True
            finally:
                if not (whole and self._stay):
                    self._end_processes()
            return
        if self._judge is None and architectures:
            self._judge = Judge(self._net, *self._pixels(), self.how)
        for architecture in architectures:
            assert self._judge is not None
            yield architecture.fingerprint, self._judge(architecture)

    def _many(self, networks: int) -> int:
        """How many processes judge so many networks."""
        if type(self.space).__module__ == "__main__" or device_of(self._net).type != "cpu":
            return 1
        if self._processes:
            return min(self._processes, max(networks, self._expected))
        return min(torch.get_num_threads(), max(networks, self._expected) // WORTH_A_PROCESS)

    def _parts(self) -> tuple[tuple[Images, int, int], tuple[Images, int, int]]:
        """Images, how many of them and the batch size: for the statistics, and to judge on."""
        weights, images = self._data.weights, self._images
        limit = self.how.limit or len(images)
        return (
            (weights, min(self.how.calibrate, len(weights)), self.how.calibrate_batch),
            (images, min(limit, len(images)), self.how.batch_size),
        )

    def _pixels(self) -> tuple[Pixels, Pixels]:
        on = device_of(self._net)
        first, second = (
            Pixels(images.pixels, images.labels[:count], self._data.normalise, batch_size, images.size, on)
            for images, count, batch_size in self._parts()
        )
        return first, second

    def _bundle(self) -> dict[str, Any]:
        """Everything that a process needs, as tensors and plain values."""
        parts = {}
        for name, (images, count, batch_size) in zip(("calibration", "images"), self._parts(), strict=True):
            pixels = images.pixels(range(count)) if count else torch.zeros(0, 3, images.size, images.size)
            parts[name] = {"pixels": pixels, "labels": images.labels[:count], "batch_size": batch_size}
        return parts | {
            "module": type(self.space).__module__,  # has registered it
            "space": self.space.name,
            "options": json.dumps(dict(self.space.options())),
            "state": self._net.state_dict(),
            "mean": list(self._data.mean),
            "std": list(self._data.std),
            "how": asdict(self.how),
            "kernels": setting.current(),
        }


def append_score(path: Path, context: str, architecture: Architecture, score: Score) -> None:
    """Adds a line to a file of scores."""
    options = " ".join("+".join(names) for names in architecture.choices.values())
    record = {"context": context, "net": architecture.fingerprint, **asdict(score), "options": options}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_scores(path: Path, context: str) -> dict[str, Score]:
    """Scores of one context by fingerprint. A last line that was cut off is taken away from the file.

    Raises:
        ValueError: Another line is broken; names file and line.
    """
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_atomic(path, whole)
    found: dict[str, Score] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record: Mapping[str, Any] = json.loads(line)
            if record["context"] == context:
                found[record["net"]] = Score(float(record["accuracy"]), float(record["loss"]))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{path}, line {number} is broken. Remove the line and resume.") from None
    return found
