"""Blocks of branches in the place of the K x K convolutions of any network, and back.

`pynas.fuse` undoes what is done here: see `RepBlock.folded_modules`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pynas.choices import Choice
from pynas.fuse import first_line
from pynas.ops.rep import Origin, RepBlock, RepSlot, searched

KERNELS = (3, 5, 7)
UNKNOWN_SIZE = 32  # pixels, of a block in a network that was never run: only costs ask


@dataclass(frozen=True)
class Place:
    """A convolution that a block can stand for.

    Args:
        name: Full name of the convolution.
        conv: K x K with K odd, no dilation, zero padding of K // 2.
        norm: Full name of the batch norm that alone reads it; empty if there is none.
        bn: That batch norm.
        size: Height and width that come in, in pixels.
    """

    name: str
    conv: nn.Conv2d
    norm: str
    bn: nn.BatchNorm2d | None
    size: int = UNKNOWN_SIZE

    def slot(self, options: Sequence[str] = (), **settings: Any) -> RepSlot:
        """The slot of a block here, whose options are those of some branches (all by default) that fit."""
        conv = self.conv
        channels, stride = (conv.in_channels, conv.out_channels), int(conv.stride[0])
        shape = {"kernel": int(conv.kernel_size[0]), "groups": conv.groups, **settings}
        here = RepSlot("", Choice("", (), "any"), "rep", *channels, self.size, stride, **shape)
        name = self.name.replace(".", "_")
        names = searched(here.shape, options, here.always)
        return RepSlot(name, Choice(name, names, "any"), "rep", *channels, self.size, stride, **shape)


def places(net: nn.Module, kernels: Sequence[int] = KERNELS, example: Tensor | None = None) -> list[Place]:
    """Convolutions of a network that blocks can stand for, in the order in which they run.

    Left out are those with dilation, other padding, an even or oblong kernel or a stride that differs between the axes;
    those that run several times; those whose result nothing could add a constant to in the network as it is (neither
    a bias nor an affine batch norm that alone reads them); and subclasses of `nn.Conv2d`, which may do more.

    Args:
        net: Traced by `torch.fx`; if it cannot be, run on the example.
        kernels: Sizes to take.
        example: An input of `net`, (B, ...). Gives the sizes of the images, too.

    Raises:
        ValueError: The network cannot be traced, and there is no example or it fails on it.
    """
    modules = dict(net.named_modules())
    readers = _readers(net, example)
    sizes = {} if example is None else input_sizes(net, example)
    found = []
    for name, reader in readers:
        conv = modules[name]
        if type(conv) is not nn.Conv2d or not _takes(conv, kernels) or [n for n, _ in readers].count(name) > 1:
            continue
        bn = modules.get(reader)
        plain = type(bn) is nn.BatchNorm2d and bn.affine and bn.running_mean is not None
        if plain and [r for _, r in readers].count(reader) == 1:
            assert isinstance(bn, nn.BatchNorm2d)
            found.append(Place(name, conv, reader, bn, sizes.get(name, UNKNOWN_SIZE)))
        elif conv.bias is not None:
            found.append(Place(name, conv, "", None, sizes.get(name, UNKNOWN_SIZE)))
    return found


def _takes(conv: nn.Conv2d, kernels: Sequence[int]) -> bool:
    size, stride = conv.kernel_size[0], conv.stride[0]
    return (
        size in kernels
        and size % 2 == 1
        and tuple(conv.kernel_size) == (size, size)
        and tuple(conv.stride) == (stride, stride)
        and tuple(conv.dilation) == (1, 1)
        and conv.padding in ((size // 2, size // 2), size // 2, *(["same"] if stride == 1 else []))
        and conv.padding_mode == "zeros"
    )


def _readers(net: nn.Module, example: Tensor | None) -> list[tuple[str, str]]:
    """Every run of a convolution by its name, with the name of the module that alone reads its result, or nothing."""
    from torch import fx

    try:
        graph = fx.Tracer().trace(net)
    except Exception as error:  # whatever the network's own code raises on a proxy
        if example is None:
            raise ValueError(
                f"The network cannot be traced ({first_line(error)}) Give an input, for instance "
                "example=torch.zeros(1, 3, 224, 224), and it is run instead."
            ) from error
        return _readers_by_running(net, example)
    modules = dict(net.named_modules())
    found = []
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.Conv2d):
            readers = list(node.users)
            alone = len(readers) == 1 and readers[0].op == "call_module"
            found.append((str(node.target), str(readers[0].target) if alone else ""))
    return found


def _readers_by_running(net: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """The same for a network that cannot be traced: a batch norm reads the very tensor that a convolution gave.

    That nothing else reads it cannot be seen; `replace` finds out by comparing.
    """
    given: list[tuple[str, Tensor]] = []
    read: dict[int, str] = {}

    def convolved(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: given.append((name, output))

    def normed(name: str) -> Callable[..., None]:
        return lambda module, inputs: read.update({id(inputs[0]): name})

    with ExitStack() as hooks:
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d):
                hooks.callback(module.register_forward_hook(convolved(name)).remove)
            elif isinstance(module, nn.BatchNorm2d):
                hooks.callback(module.register_forward_pre_hook(normed(name)).remove)
        run(net, example)
    return [(name, read.get(id(output), "")) for name, output in given]


def input_sizes(net: nn.Module, example: Tensor) -> dict[str, int]:
    """Height that comes into every convolution and linear layer that runs, in pixels; 1 for a linear one."""
    found: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, inputs: found.update({name: 1 if inputs[0].dim() < 4 else int(inputs[0].shape[-2])})

    with ExitStack() as hooks:
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                hooks.callback(module.register_forward_pre_hook(note(name)).remove)
        run(net, example)
    return found


def run(net: nn.Module, example: Tensor) -> Tensor:
    """What a network answers in eval mode, without gradients; it comes back as it was.

    Raises:
        ValueError: It fails on the example.
    """
    training = {module: module.training for module in net.modules()}
    try:
        with torch.no_grad():
            answer: Tensor = net.eval()(example.clone())
    except Exception as error:
        raise ValueError(
            f"The network fails on an input of shape {tuple(example.shape)}: {first_line(error)}"
        ) from error
    finally:
        for module, flag in training.items():
            module.training = flag
    return answer


def replace(net: nn.Module, place: Place, module: nn.Module, block: RepBlock) -> None:
    """Puts a module in the place of a convolution, and the identity in that of its batch norm.

    Args:
        net: Changed in place.
        place: Of `net`.
        module: What stands there afterwards: the block, or what holds it.
        block: Takes over the weights, and remembers what was there.
    """
    conv, bn = place.conv, place.bn
    block.to(conv.weight.device, conv.weight.dtype)
    if "kxk" in block.branches:
        block.adopt(conv, bn)
    block.origin = Origin(place.name, place.norm, conv.bias is not None)
    if bn is not None:
        block.origin = dataclasses.replace(block.origin, eps=bn.eps, momentum=bn.momentum)
    module.train(conv.training)
    _put(net, place.name, module)
    if place.norm:
        _put(net, place.norm, nn.Identity())


def _put(net: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    net.get_submodule(parent)._modules[child] = module


def blocks(net: nn.Module) -> Iterator[tuple[str, RepBlock]]:
    """All blocks of a network by their full names, each once."""
    for name, module in net.named_modules():
        if isinstance(module, RepBlock):
            yield name, module
