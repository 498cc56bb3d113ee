"""The one loop: searches and trainings alike are tasks that it steps, logs, checkpoints, and resumes."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

from torch import Tensor

from pynas.training.feed import Feed
from pynas.training.metrics import Metric, as_floats
from pynas.training.run import RunFolder

READ_EVERY = 25  # steps on a GPU


@dataclass(frozen=True)
class Progress:
    """Where a task stands.

    Args:
        epoch: From 0.
        step: Within the epoch, from 0.
    """

    epoch: int
    step: int


class Task(Protocol):
    """Something that is trained in epochs of steps."""

    epochs: int

    def steps(self, feed: Feed, epoch: int) -> int:
        """Number of steps of an epoch."""

    def step(self, feed: Feed, progress: Progress) -> Mapping[str, Metric]:
        """One update; "loss" must be among what it returns, and "lr" if there is one."""

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """What is worth logging of a finished epoch."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Bar(Protocol):
    """Shows progress; `pynas.console` has the real one."""

    def advance(self, text: str) -> None: ...


class Unseen:
    """A bar that nobody sees."""

    def advance(self, text: str) -> None:
        pass


@contextlib.contextmanager
def unseen(title: str, total: int) -> Iterator[Bar]:
    """What stands for a maker of bars where nobody looks."""
    yield Unseen()


Bars = Callable[[str, int], contextlib.AbstractContextManager[Bar]]  # makes one of a title and a number of steps


# Accuracies that epochs log, the first of them that is there counts; a list has those of networks tried so far.
ACCURACIES = ("search_accuracy", "theta_accuracy", "alpha_accuracy", "weight_accuracy", "train_accuracy", "accuracies")


class Best:
    """The best accuracy so far, as a bar shows it."""

    def __init__(self) -> None:
        self.accuracy: float | None = None

    def see(self, accuracy: float) -> str:
        """Takes note of a network's accuracy, and says it beside the best."""
        self.accuracy = accuracy if self.accuracy is None else max(self.accuracy, accuracy)
        return f"accuracy {accuracy:.2%}  {self}"

    def see_epoch(self, record: Mapping[str, Any]) -> None:
        """Takes note of an epoch that was logged."""
        found = next((record[name] for name in ACCURACIES if record.get(name)), None)
        if found is not None:
            self.see(max(found) if isinstance(found, list) else found)

    def __str__(self) -> str:
        return "" if self.accuracy is None else f"best {self.accuracy:.2%}"


class Diverged(ValueError):
    """The loss is no longer a number."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came, and the state is saved."""


def train(task: Task, feed: Feed, run: RunFolder, stage: str, bar: Bar, go_on: str) -> None:
    """Runs a task to its end, from wherever the run folder's checkpoint of this stage left it.

    A checkpoint is written after every epoch and on Ctrl-C. All randomness is a function of the seed and the position,
    or part of the checkpoint, so that a broken and resumed run ends as an unbroken one, bit for bit on one thread of
    the CPU. On a GPU, whose sums have no fixed order, it sees the same images in the same order, and no more is
    promised. What is logged of steps is read from there `READ_EVERY` steps at a time.

    Args:
        task: What to train.
        feed: Where its batches come from; its position is part of the checkpoint.
        run: Where logs and checkpoints go.
        stage: Name of the checkpoint: "search", "retrain", ...
        bar: Told about every step.
        go_on: What to type after Ctrl-C.

    Raises:
        Diverged: If the loss is not finite; the message names step and learning rate, the last checkpoint stays. On a
            GPU that may show some steps later.
        Interrupted: After Ctrl-C, when the state is saved.
    """
    start = run.load_checkpoint(stage)
    first_epoch, first_step = 0, 0
    totals: dict[str, list[float]] = {}
    best = Best()
    if start is not None:
        task.load_state_dict(start["task"])
        feed.load_state_dict(start["feed"])
        first_epoch, first_step, totals = start["epoch"], start["step"], start["totals"]
        for record in run.metrics(stage)[:first_epoch]:
            best.see_epoch(record)
        for _ in range(sum(task.steps(feed, epoch) for epoch in range(first_epoch)) + first_step):
            bar.advance("resumed")

    pending: list[Mapping[str, Metric]] = []  # what the last steps told, of which some is still on a GPU
    shown = math.nan

    def read(epoch: int, steps: int) -> None:
        """Takes in what is pending, the last of it from the step before `steps`."""
        nonlocal shown
        for place, metrics in enumerate(as_floats(pending), steps - len(pending)):
            _check_finite(metrics, stage, epoch, place, run)
            for name, value in metrics.items():
                totals.setdefault(name, []).append(value)
            shown = metrics["loss"]
        pending.clear()

    def save(epoch: int, step: int) -> None:
        state = {"task": task.state_dict(), "feed": feed.state_dict(), "epoch": epoch, "step": step, "totals": totals}
        run.save_checkpoint(stage, state)

    with contextlib.closing(run), _interruptible() as interrupted:
        for epoch in range(first_epoch, task.epochs):
            began = time.monotonic()
            steps = task.steps(feed, epoch)
            for step in range(first_step, steps):
                pending.append(task.step(feed, Progress(epoch, step)))
                if len(pending) >= READ_EVERY or not any(isinstance(x, Tensor) for x in pending[-1].values()):
                    read(epoch, step + 1)
                bar.advance(f"epoch {epoch + 1}/{task.epochs}  loss {shown:.3f}  {best}".rstrip())
                if interrupted.is_set() and step < steps - 1:
                    read(epoch, step + 1)
                    save(epoch, step + 1)
                    raise Interrupted(f"Stopped. Go on with: {go_on}")
            read(epoch, steps)
            means = {name: math.fsum(values) / len(values) for name, values in totals.items()}
            record = means | task.end_epoch(epoch) | {"seconds": round(time.monotonic() - began, 2)}
            totals, first_step = {}, 0
            best.see_epoch(record)
            run.log(stage, epoch, record)
            save(epoch + 1, 0)
            if interrupted.is_set():
                raise Interrupted(f"Stopped. Go on with: {go_on}")


def _check_finite(metrics: dict[str, float], stage: str, epoch: int, step: int, run: RunFolder) -> None:
    if math.isfinite(metrics["loss"]):
        return
    lr = f" at learning rate {metrics['lr']:.4g}" if "lr" in metrics else ""
    kept = run.checkpoint_path(stage)
    where = f"The last good checkpoint is {kept}. " if kept.exists() else ""
    raise Diverged(
        f"The loss of {stage} is {metrics['loss']} in epoch {epoch + 1}, step {step + 1}{lr}. {where}"
        "Try a lower learning rate, or amp='off' if it was on."
    )


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into a flag that is read between steps; a second one interrupts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        flag.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)
