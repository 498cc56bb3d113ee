"""ENAS's controller: an LSTM that writes a network down, decision by decision (Pham et al., arXiv 1802.03268)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pynas.registry import SearchSpace
from pynas.strategies.children import NONE, nodes_of

State = tuple[Tensor, Tensor]  # of the LSTM, (1, hidden) each


class ControllerSettings(Protocol):
    """Hyper-parameters of a controller."""

    hidden: int
    temperature: float
    tanh_constant: float
    op_tanh_reduce: float
    op_bias: float


@dataclass(frozen=True)
class Rollout:
    """A network that the controller wrote.

    Args:
        path: Option of every choice, in their order.
        log_probability: Of all decisions together, a scalar; differentiable.
        entropy: Sum over the decisions of their entropies, in nats; differentiable.
        decisions: How many there were.
    """

    path: tuple[int, ...]
    log_probability: Tensor
    entropy: Tensor
    decisions: int


class _Writing:
    """Decisions so far, drawn one after the other."""

    def __init__(self, greedy: bool) -> None:
        self.greedy = greedy
        self.log_probabilities: list[Tensor] = []
        self.entropies: list[Tensor] = []

    def decide(self, logits: Tensor) -> int:
        """Draws from a vector of logits, in which minus infinity forbids."""
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        chosen = int(log_p.argmax()) if self.greedy else int(torch.multinomial(p.detach(), 1))
        self.log_probabilities.append(log_p[chosen])
        self.entropies.append(-(p * log_p.clamp_min(-1e4)).sum())
        return chosen

    def done(self, path: list[int]) -> Rollout:
        total, entropy = torch.stack(self.log_probabilities).sum(), torch.stack(self.entropies).sum()
        return Rollout(tuple(path), total, entropy, len(self.entropies))


class Controller(nn.Module):
    """Samples networks.

    In a space of cells it decides, node by node, on two inputs, by attention over the states in which it wrote the
    nodes before, and then on their operations; the normal cell first, the reduction in the same breath. Edges that it
    does not use take `none`. In any other space it decides on one choice after the other.

    Ours: the two inputs of a node differ, because an edge has one operation here.

    Args:
        space: Of the networks.
        settings: Sizes and constants.
    """

    def __init__(self, space: SearchSpace, settings: ControllerSettings) -> None:
        super().__init__()
        self.settings, self.choices, self.nodes = settings, space.choices(), nodes_of(space)
        self._rows = {choice.name: row for row, choice in enumerate(self.choices)}
        width, hidden = max(len(choice.options) for choice in self.choices), settings.hidden
        self.lstm = nn.LSTMCell(hidden, hidden)
        self.begin = nn.Parameter(torch.empty(1, hidden))
        self.embedding = nn.Embedding(width, hidden)
        self.score = nn.Linear(hidden, width)
        self.attend_then = nn.Linear(hidden, hidden, bias=False)
        self.attend_now = nn.Linear(hidden, hidden, bias=False)
        self.attend = nn.Linear(hidden, 1, bias=False)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)
        favoured = torch.zeros(width)
        if self.nodes:
            names = self.choices[0].options
            favoured = torch.tensor([float(name.startswith("sep_conv")) for name in names])
            nn.init.zeros_(self.score.bias)
            with torch.no_grad():
                self.score.bias.add_(settings.op_bias * favoured)
        self.constant: Tensor
        self.register_buffer("constant", (0.5 * favoured - 0.25) if self.nodes else favoured)

    def sample(self, greedy: bool = False) -> Rollout:
        """A network; with `greedy` the most probable decision each time, otherwise by torch's generator."""
        zeros = torch.zeros(1, self.settings.hidden)
        writing = _Writing(greedy)
        path = self._write_cells(writing, (zeros, zeros)) if self.nodes else self._write(writing, (zeros, zeros))
        return writing.done(path)

    def _write(self, writing: _Writing, state: State) -> list[int]:
        path: list[int] = []
        x: Tensor = self.begin
        for choice in self.choices:
            state = self.lstm(x, state)
            allowed = torch.arange(self.score.out_features) < len(choice.options)
            path.append(writing.decide(self._op_logits(state, allowed)))
            x = self.embedding.weight[path[-1]][None]
        return path

    def _write_cells(self, writing: _Writing, state: State) -> list[int]:
        path = [choice.options.index(NONE) for choice in self.choices]
        x: Tensor = self.begin
        for _, cell in itertools.groupby(self.nodes, key=lambda node: node.cell):
            states, keys = [], []
            for _ in range(2):  # the inputs of the cell, which have no decisions
                state = self.lstm(self.begin, state)
                states.append(torch.zeros_like(state[0]))
                keys.append(self.attend_then(state[0]))
            for node in cell:
                sources: list[int] = []
                for _ in range(2):
                    state = self.lstm(x, state)
                    logits = self._squash(self.attend(torch.tanh(torch.cat(keys) + self.attend_now(state[0])))[:, 0])
                    taken = torch.tensor([source in sources for source in range(len(keys))])
                    sources.append(writing.decide(logits.masked_fill(taken, -torch.inf)))
                    x = states[sources[-1]]
                for source in sources:
                    row = self._rows[node.choices[source]]
                    options = self.choices[row].options
                    state = self.lstm(x, state)
                    allowed = torch.tensor([name != NONE for name in options])
                    path[row] = writing.decide(self._op_logits(state, allowed))
                    x = self.embedding.weight[path[row]][None]
                state = self.lstm(x, state)
                states.append(state[0])
                keys.append(self.attend_then(state[0]))
                x = self.begin
        return path

    def _squash(self, logits: Tensor, reduce: float = 1.0) -> Tensor:
        heated = logits / self.settings.temperature
        return self.settings.tanh_constant / reduce * torch.tanh(heated)

    def _op_logits(self, state: State, allowed: Tensor) -> Tensor:
        logits = self._squash(self.score(state[0])[0], self.settings.op_tanh_reduce) + self.constant
        return logits.masked_fill(~allowed, -torch.inf)
