"""Whether modules are still what a kernel was told about them, and nobody watches what it would skip."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(torch_module, f"_global{name}", {}) for name in HOOKS]
ORDINARY = {Tensor, nn.Parameter}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def own(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what its class says: no subclass, no other `forward` on the object."""
    return type(module) is kind and "forward" not in module.__dict__


def ordinary(x: Tensor, gates: Tensor | None) -> bool:
    """Whether nobody watches single operations, and the kernels take such tensors."""
    if type(x) not in ORDINARY or x.dim() != 4 or x.dtype not in (torch.float32, torch.float64):
        return False
    if gates is not None and (gates.dtype != x.dtype or gates.device != x.device):
        return False
    return not (
        torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def common(norms: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    """eps and momentum of all norms; None where they differ, or a norm is in eval mode or averages otherwise."""
    first = norms[0]
    eps, momentum = first["eps"], first["momentum"]
    for norm in norms:
        if not norm["training"] or norm["eps"] != eps or norm["momentum"] != momentum:
            return None, None
    return eps, momentum


class Watch:
    """Modules that a kernel stands for, as they were.

    Args:
        modules: All of them, with their children.
        called: Those that are called as modules, so that their own hooks have run.
        around: Modules that must keep their children, too.
        silent: Children of those that the kernel stands for as well.
        facts: Attributes that the kernel has been told once.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        called: Sequence[nn.Module],
        around: Sequence[nn.Module],
        silent: Sequence[nn.Module],
        facts: Sequence[str],
    ) -> None:
        self._children = [module._modules for module in (*modules, *around) if module._modules]
        self._now = [child for children in self._children for child in children.values()]
        quiet = [module for module in modules if not any(module is other for other in called)] + list(silent)
        self._facts = [(module.__dict__, name) for module in modules for name in facts if name in module.__dict__]
        self._facts += [(module._parameters, "bias") for module in modules if isinstance(module, nn.Conv2d)]
        self._seen = [holder[name] for holder, name in self._facts]
        self._all = [*modules, *quiet]
        self._kinds = [type(module) for module in self._all]
        self._hooks: list[Any] = [module.__dict__[name] for module in quiet for name in HOOKS] + _GLOBAL_HOOKS

    def unchanged(self) -> bool:
        """Whether all modules are those that were there, and are as they were."""
        return (
            list(chain.from_iterable(map(dict.values, self._children))) == self._now
            and list(map(type, self._all)) == self._kinds
            and all(
                holder.get(name, self) is seen for (holder, name), seen in zip(self._facts, self._seen, strict=True)
            )
            and not any("forward" in module.__dict__ for module in self._all)
        )

    def hooked(self) -> bool:
        """Whether someone waits for a call of one of them."""
        return any(self._hooks)


class Shapes:
    """Whether weights have the shapes that their modules tell; parts that were cut out have not.

    Args:
        shapes: One of each weight.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._checked: tuple[Any, ...] = ()

    def fit(self, tensors: tuple[Any, ...]) -> bool:
        """Whether all are there and have their shapes; those of the call before are not looked at again."""
        if len(tensors) == len(self._checked) and all(map(is_, tensors, self._checked)):
            return True
        pairs = zip(tensors, self._shapes, strict=True)
        if any(tensor is None or tensor.shape != shape for tensor, shape in pairs):
            return False
        self._checked = tensors
        return True


class Wiring(dict[Any, Any]):
    """What has been worked out about a module and its children; a copy of the module begins with nothing."""

    def __deepcopy__(self, memo: object) -> Wiring:
        return Wiring()

    def __reduce__(self) -> tuple[type[Wiring], tuple[()]]:
        return Wiring, ()
