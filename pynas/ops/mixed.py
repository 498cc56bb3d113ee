"""All options of a slot side by side, weighted by gates: the plain PyTorch statement of a choice layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pynas.choices import Gates


class Mixed(nn.Module):
    """Sum of the running options' outputs, each times its gate.

    Looks at `gates.run`, `gates.train` and `gates.single` only, never at gate values: a gate that happens to be zero
    still wants its gradient, and which options run must be known without reading a tensor.

    Args:
        options: Module of each option, in the order of the choice.
    """

    def __init__(self, options: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.options = nn.ModuleDict(options)

    def forward(self, x: Tensor, gates: Gates) -> Tensor | None:
        """(B, C, S, S) and gates -> (B, C', S', S'); None from a family with an option that there is nothing."""
        if gates.single:
            return self.alone(x, gates)
        return self.add(None, x, gates, gates.run)

    def alone(self, x: Tensor, gates: Gates) -> Tensor:
        """What the one running option gives out."""
        (index,) = gates.run
        y: Tensor = list(self.options.values())[index](x)
        return y

    def add(self, total: Tensor | None, x: Tensor, gates: Gates, run: tuple[int, ...]) -> Tensor:
        """Adds the gated outputs of some options to a sum."""
        modules = list(self.options.values())
        for index in run:
            with torch.set_grad_enabled(torch.is_grad_enabled() and index in gates.train):
                y = modules[index](x)
            gate = gates.values[..., index]
            if gate.dim() == 1:
                gate = gate[:, None, None, None]
            total = y * gate if total is None else total + y * gate
        if total is None:
            raise ValueError("Gates must run at least one option.")
        return total

    def single_state(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """State of the chosen option, by the names that it has in the found net."""
        (name,) = names
        return dict(self.options[name].state_dict())
