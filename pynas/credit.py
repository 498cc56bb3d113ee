"""Which edges a loss gives credit to (SNAS, arXiv 1812.09926, section 2.2, eq. 17)."""

from __future__ import annotations

from types import TracebackType

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pynas.supernet import GatedSlot, Supernet


class Credit:
    """Assigns credit to the slots that run while it is entered, once the loss has been differentiated.

    The search gradient equals in expectation a policy gradient in which edge (i, j) gets R_ij = -dL/dx_j . O~_ij(x_i),
    where O~_ij is what the edge brings to node x_j: a first-order share of what the loss falls by. Over the edges into
    a node the credits add up to -dL/dx_j . x_j.

        with Credit(net) as credit:
            loss = cross_entropy(net(x, gates), y)
        loss.backward()
        credit.slots()

    Args:
        net: Whose slots are watched.
    """

    def __init__(self, net: Supernet) -> None:
        self._net = net
        self._hooks: list[RemovableHandle] = []
        self._brought: dict[str, Tensor] = {}

    def __enter__(self) -> Credit:
        self._hooks = [module.register_forward_hook(self._keep) for module in self._net.gated().values()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None) -> Tensor | None:
        assert isinstance(module, GatedSlot)
        if output is None or not output.requires_grad:
            return output
        brought = output.view_as(output)  # a lone identity gives back its input, which other edges read as well
        brought.retain_grad()
        self._brought[module.slot.name] = brought
        return brought

    def slots(self) -> dict[str, float]:
        """Credit of every slot that brought something, by name, in units of the loss."""
        return {
            name: -float((output.grad * output.detach()).sum())
            for name, output in self._brought.items()
            if output.grad is not None
        }

    def choices(self) -> dict[str, float]:
        """Credit of every choice: the sum over its slots."""
        found = {choice.name: 0.0 for choice in self._net.choices}
        of = {slot.name: slot.choice.name for slot in self._net.slots}
        for name, credit in self.slots().items():
            found[of[name]] += credit
        return found
