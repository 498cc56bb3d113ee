"""The policy behind reinforced mutation: which choice of a genome to change, and to what."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pynas.evolution.genomes import Genome
from pynas.evolution.settings import EvolutionSettings

Floats = NDArray[np.float64]
MOST_WEIGHT = 2.0  # truncation of importance weights: bounds the variance that mutations of other origin bring


@dataclass(frozen=True)
class Change:
    """One mutated choice, with what the policy must know to learn from it.

    Args:
        genome: Before the change.
        context: What the change was meant for, see `Policy`.
        place: The choice.
        option: What it becomes.
        probability: Of this place and option under whatever drew them.
    """

    genome: Genome
    context: tuple[float, ...]
    place: int
    option: int
    probability: float

    def plain(self) -> list[Any]:
        """As a list of plain values."""
        return [list(self.genome), list(self.context), self.place, self.option, self.probability]

    @staticmethod
    def of(entry: Sequence[Any]) -> Change:
        """What `plain` wrote."""
        genome, context, place, option, probability = entry
        return Change(tuple(genome), tuple(context), place, option, probability)


class Policy:
    """A distribution over the changes of one choice of a genome, trained by REINFORCE with a moving baseline.

    MoreMNAS drives its reinforced mutation by a recurrent controller that writes cells from scratch; its details are
    not public. Ours is a factorised policy of edits: a network with one hidden layer reads the genome (one-hot) and the
    context (where the parents stand between the best and the worst seen in every pursued goal, and which goals lead)
    and gives a logit to every option of every choice; one softmax over all options that the genome does not have yet
    yields choice and option together. It starts uniform, so that it begins as natural mutation. After each generation
    the score-function gradient of the reward minus the baseline is followed over the remembered mutations, those of
    other operators included: their probabilities are known, so truncated importance weights make them count right.

    Args:
        sizes: Number of options of every choice.
        context: Length of the context.
        settings: `hidden` and the `policy_*` hyper-parameters.
        seed: Of the initial weights.
    """

    def __init__(self, sizes: Sequence[int], context: int, settings: EvolutionSettings, seed: int) -> None:
        self._sizes, self._settings = tuple(sizes), settings
        self._width = max(sizes)
        self._exists = torch.zeros(len(sizes), self._width, dtype=torch.bool)
        for row, size in enumerate(sizes):
            self._exists[row, :size] = True
        outputs = len(sizes) * self._width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._net = nn.Sequential(
                nn.Linear(outputs + context, settings.hidden), nn.Tanh(), nn.Linear(settings.hidden, outputs)
            )
        nn.init.zeros_(self._net[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self._net[-1].bias)  # type: ignore[arg-type]
        self._optimizer = torch.optim.Adam(self._net.parameters(), settings.policy_lr)
        self._memory: list[tuple[Change, float]] = []
        self.baseline: float | None = None

    def probabilities(self, genome: Genome, context: Sequence[float]) -> Floats:
        """Of changing choice l to option o, shape (choices, most options); zero for options the genome has."""
        with torch.no_grad():
            logs = self._log_probabilities(*self._encoded([genome], [context]))[0]
        shares = logs.double().exp().numpy().reshape(len(self._sizes), self._width)
        out: Floats = shares / shares.sum()
        return out

    def remember(self, change: Change, reward: float) -> None:
        """Keeps a mutation whose child was evaluated; forgets the oldest."""
        self._memory.append((change, reward))
        del self._memory[: -self._settings.policy_memory]

    def learn(self, rewards: Sequence[float]) -> None:
        """Moves the baseline to the rewards of a generation, and takes the REINFORCE steps."""
        if rewards:
            mean, decay = float(np.mean(rewards)), self._settings.baseline_decay
            self.baseline = mean if self.baseline is None else decay * self.baseline + (1 - decay) * mean
        if self.baseline is None or not self._memory:
            return
        changes = [change for change, _ in self._memory]
        taken = torch.tensor([change.place * self._width + change.option for change in changes])
        drawn = torch.tensor([change.probability for change in changes])
        advantage = torch.tensor([reward for _, reward in self._memory]) - self.baseline
        encoded = self._encoded([change.genome for change in changes], [change.context for change in changes])
        for _ in range(self._settings.policy_steps):
            logs = self._log_probabilities(*encoded)
            log_p = logs.gather(1, taken[:, None])[:, 0]
            weight = (log_p.detach().exp() / drawn).clamp(max=MOST_WEIGHT)
            entropy = -(logs.exp() * logs.clamp_min(-50)).sum(1).mean()  # 0 * -inf of impossible changes is no number
            loss = -(weight * advantage * log_p).mean() - self._settings.policy_entropy * entropy
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()

    def _encoded(self, genomes: Sequence[Genome], contexts: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
        """B genomes -> inputs of the network (B, features), and which changes are possible (B, choices * options)."""
        hot = nn.functional.one_hot(torch.tensor(genomes), self._width).bool()
        told = torch.tensor(contexts, dtype=torch.float32).reshape(len(genomes), -1)
        return torch.cat([hot.flatten(1).float(), told], dim=1), (self._exists & ~hot).flatten(1)

    def _log_probabilities(self, inputs: Tensor, possible: Tensor) -> Tensor:
        logits: Tensor = self._net(inputs)
        return logits.masked_fill(~possible, -torch.inf).log_softmax(1)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "net": copy.deepcopy(self._net.state_dict()),  # the optimiser writes into the tensors themselves
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "baseline": self.baseline,
            "memory": [[*change.plain(), reward] for change, reward in self._memory],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state."""
        self._net.load_state_dict(state["net"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.baseline = state["baseline"]
        self._memory = [(Change.of(entry[:-1]), float(entry[-1])) for entry in state["memory"]]
