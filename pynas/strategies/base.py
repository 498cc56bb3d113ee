"""What a search strategy is: a dataclass whose fields are its hyper-parameters, with an update and a way to derive."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from torch import nn

from cost_models.names import unknown
from pynas.architecture import Architecture
from pynas.evolution.settings import EvolutionSettings
from pynas.pareto import Goal
from pynas.registry import STRATEGIES, SearchSpace
from pynas.subsets import picks_any
from pynas.supernet import CostTable
from pynas.training.feed import Feed
from pynas.training.loop import Bars, Progress, unseen
from pynas.training.metrics import Metric
from pynas.training.run import RunFolder
from pynas.training.where import TrainOn

S = TypeVar("S", bound="Strategy")


@dataclass(frozen=True)
class Problem:
    """What a strategy is asked to solve.

    Args:
        space: Where to search.
        table: Cost of every option.
        budget: Upper bound of the predicted cost in the table's unit, or None to trade off freely.
        slack: Share of the budget that a returned network may leave unused. Where subsets are chosen, the table may
            price branches instead, and the budget is in its unit.
        seed: Of all random numbers.
        amp: Mixed precision of forward passes.
        goals: What to pursue and to limit, where a set of networks is wanted that none dominates; the budget is among
            them then. Without goals the most accurate networks within the budget are wanted.
        evolution: How such a set is looked for; none suits it to the number of evaluations.
        train_on: Where networks and what is trained beside them live and train; the feed must bring images there. Costs
            stay on the CPU.
    """

    space: SearchSpace
    table: CostTable
    budget: float | None
    slack: float
    seed: int
    amp: Literal["off", "bf16"] = "off"
    goals: tuple[Goal, ...] = ()
    evolution: EvolutionSettings | None = None
    train_on: TrainOn = "cpu"


@dataclass(frozen=True)
class Candidate:
    """A derived network with what is known of it before it is trained alone.

    Args:
        architecture: What it is.
        accuracy: On the images held out for the architecture, between 0 and 1.
        cost: Predicted, in the table's unit.
        origin: How it was derived.
        macs: Multiply-adds for one image; none where nobody counted.
        params: Likewise.
        front: Whether it is among the networks found; false for those that were judged on the way to a Pareto set.
    """

    architecture: Architecture
    accuracy: float
    cost: float
    origin: str
    macs: int | None = None
    params: int | None = None
    front: bool = True


@dataclass
class Strategy(ABC):
    """A search strategy.

    Args:
        epochs: Passes over the training images.
        batch_size: Images per step.
    """

    epochs: int
    batch_size: int

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}}
    COST: ClassVar[str] = ""
    # Expectation and strict fairness, in the words of FairNAS's table (from memory of the paper, unverified).
    FAIR: ClassVar[tuple[str, str]] = ("-", "-")
    PURSUES: ClassVar[bool] = False  # whether it takes goals
    PICKS: ClassVar[tuple[str, ...]] = ("one",)  # kinds of choices that it decides: `Choice.pick`
    # Whether its search trains the found network to the end; then `result` gives it, `recipe` says how others are
    # trained likewise, and weights see all training images.
    TRAINS: ClassVar[bool] = False
    SPACE_OPTIONS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # what a preset changes of the space

    @classmethod
    def preset(cls: type[S], name: str, **changes: Any) -> S:
        """The strategy with a named set of hyper-parameters, some of them changed.

        Raises:
            ValueError: If there is no such preset or no such hyper-parameter.
        """
        return cls(**{**cls.preset_values(name, changes), **changes})

    @classmethod
    def preset_values(cls, name: str, changed: Iterable[str] = ()) -> Mapping[str, Any]:
        """What a preset sets, after a check that it and all hyper-parameters to be `changed` exist."""
        if name not in cls.PRESETS:
            raise unknown("preset", name, cls.PRESETS)
        fields = {field.name for field in dataclasses.fields(cls)}
        for key in changed:
            if key not in fields:
                raise unknown(f"hyper-parameter of strategy {cls.__name__}", key, fields)
        return cls.PRESETS[name]

    def suit(self, space: SearchSpace) -> None:  # noqa: B027  most strategies need nothing
        """Takes from the space what the number of steps depends on. Comes before `steps`; `prepare` does it too.

        Raises:
            ValueError: For hyper-parameters that do not fit the space.
        """

    @classmethod
    def check_space(cls, space: SearchSpace) -> None:
        """Raises ValueError, naming the strategies that can search a space, unless this one can."""
        pick = "any" if picks_any(space.choices()) else "one"
        if pick not in cls.PICKS:
            able = ", ".join(name for name, other in STRATEGIES.items() if pick in other.PICKS)
            what = "any subset of options" if pick == "any" else "one option"
            raise ValueError(
                f"Strategy {cls.__name__} cannot search space {space.name!r}, whose choices take {what} each. Those "
                f"that can: {able}."
            )

    def result(self) -> nn.Module:
        """The found network as the search trained it, where it does; in eval mode, on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} trains no network to the end")

    @classmethod
    def check_pursues(cls) -> None:
        """Raises ValueError, naming the strategies that take goals, unless this one does."""
        if not cls.PURSUES:
            able = ", ".join(name for name, other in STRATEGIES.items() if other.PURSUES)
            raise ValueError(
                f"Strategy {cls.__name__} takes no objectives: it looks for one network within latency_ms. Those that "
                f"look for a Pareto set: {able}."
            )

    def check(self, problem: Problem) -> None:
        """Refuses a problem that it cannot solve. Comes before anything is written.

        Raises:
            ValueError: For goals, unless the strategy pursues them; for those that no network of the space meets, as
                far as that can be known.
        """
        if problem.goals:
            self.check_pursues()

    @abstractmethod
    def macs_per_image(self, space: SearchSpace) -> float:
        """Multiply-adds of a step over the images of a batch: three times the forward passes, on average."""

    @abstractmethod
    def prepare(self, problem: Problem) -> None:
        """Makes supernet, sampler and optimisers. Raises ValueError for hyper-parameters that cannot work."""

    @abstractmethod
    def steps(self, feed: Feed, epoch: int) -> int:
        """Number of steps of an epoch."""

    def gradient_passes(self, feed: Feed, epoch: int) -> int:
        """Batches that go through a backward pass of a network in an epoch; what comparisons count. One a step here.

        A batch counts once whatever part of a supernet it runs through, and whether weights or architecture descend.
        """
        return self.steps(feed, epoch)

    @abstractmethod
    def step(self, feed: Feed, progress: Progress) -> Mapping[str, Metric]:
        """One update. Returns what is worth logging; "loss" always. What is on a GPU may stay there."""

    @abstractmethod
    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """What is worth logging of a finished epoch; the report of `pynas.updates.UpdateCounts` always."""

    @abstractmethod
    def derive(self, feed: Feed, run: RunFolder | None = None, bars: Bars = unseen) -> list[Candidate]:
        """The found networks, best first; after them what was judged on the way, where goals were pursued.

        Args:
            feed: Has the images.
            run: Where what was judged may be kept, so that an interrupted derivation goes on.
            bars: Show progress.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where another search stood, wherever that one was and the state is."""
