"""A device that is none: its tensors say that they are elsewhere, and compute on the CPU.

So machines without a GPU find what a GPU refuses: operations on tensors of two devices. Torch calls the device "meta",
because of all but the CPU it is the one whose backward passes run on every machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = "meta"
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}  # may go from one device to another
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Elsewhere(torch.Tensor):
    """A tensor of that device.

    Args:
        held: Its values, on the CPU.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """As every device gives its values."""
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """As no other device does."""
        raise TypeError("A tensor that is elsewhere has no numpy array. Bring it to the CPU first: .cpu()")


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """There is such a device meanwhile.

    Inference mode, whose tensors torch wraps in no other, is one without gradients as long.
    """

    def without(mode: bool = True) -> Any:
        return torch.no_grad() if mode else contextlib.nullcontext()

    with _Made(), _Computed(), mock.patch.object(torch, "inference_mode", without):
        yield


class _Made(TorchFunctionMode):
    """Tensors that are made of numbers, of which torch itself holds none on this device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func is torch.tensor and str(named.get("device")) == DEVICE:
            del named["device"]
            return func(*args, **named).to(DEVICE)
        return func(*args, **named)


class _Computed(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation, its results on the device of its tensors, or on that which is asked for."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    away = [x for x in tensors if isinstance(x, Elsewhere)]
    here = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim() > 0]
    if away and here and func not in COPIES and not (func in INDEXED and isinstance(args[0], Elsewhere)):
        raise RuntimeError(f"{func} has tensors of two devices: {[tuple(x.shape) for x in here]} are on the CPU.")
    asked = kwargs.get("device")
    wraps = bool(away) if asked is None else torch.device(asked).type == DEVICE
    held = tree_map(lambda x: x.held if isinstance(x, Elsewhere) else x, (args, kwargs))
    named = {**held[1], **({} if asked is None else {"device": "cpu"})}
    found = func(*held[0], **named)
    if func._schema.is_mutable and func._schema.name.endswith("_") and isinstance(args[0], Tensor):
        return args[0]
    return tree_map(lambda x: Elsewhere(x) if wraps and isinstance(x, Tensor) else x, found)


def brought(state: Any) -> Any:
    """A state with its tensors on the CPU, as a checkpoint brings them."""
    return tree_map(lambda x: x.held.clone() if isinstance(x, Elsewhere) else x, state)
