"""Networks of one's own: converted, trained, searched, folded back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import pynas
from pynas import rep
from pynas.fuse import fuse, relative_difference
from pynas.ops.branches import BRANCHES
from pynas.ops.convert import blocks, places
from pynas.ops.rep import RepBlock


class Small(nn.Module):
    """A user's network: what can be replaced, and what must not be."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=1e-3, momentum=0.2)
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.BatchNorm2d(8))
        self.biased = nn.Conv2d(8, 8, 3, padding=1)
        self.bare = nn.Conv2d(8, 8, 3, padding=1, bias=False)  # nothing could hold a constant
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.tapped = nn.Conv2d(8, 8, 3, padding=1, bias=False)  # read by more than its batch norm
        self.tapped_norm = nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.depthwise(x).relu() + self.biased(x)
        x = self.dilated(self.bare(x)).relu()
        x = self.twice(self.twice(x).relu())
        y = self.tapped(x)
        return self.last((self.tapped_norm(y) + y).mean((2, 3)))  # type: ignore[no-any-return]


class Untraceable(Small):
    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            raise AssertionError
        return super().forward(x)


def trained(net: nn.Module, x: Tensor, steps: int = 3, search: rep.BranchSearch | None = None) -> None:
    """Takes some steps, so that weights and statistics are no longer those of the beginning."""
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9)
    for step in range(steps):
        if search is not None:
            search.draw()
        loss = functional.cross_entropy(net(x + step), torch.arange(len(x)) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if search is not None:
            search.step()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 3, 16, 16)


def test_resnet18_there_and_back() -> None:
    """A torchvision net converted, trained, folded, and loaded back into its plain class."""
    from torchvision.models import resnet18

    net = resnet18(num_classes=10)
    plain = list(net.state_dict())
    x = torch.randn(4, 3, 32, 32)
    before = net.eval()(x)
    assert rep.convert(net) is net
    assert len(list(blocks(net))) == 17  # all but the three 1x1 convolutions
    torch.testing.assert_close(net.eval()(x), before)  # new branches are silent
    trained(net, x, 2)
    folded = fuse(net, x)
    assert list(folded.state_dict()) == plain
    again = resnet18(num_classes=10)
    again.load_state_dict(folded.state_dict(), strict=True)
    with torch.no_grad():
        assert relative_difference(net.eval()(x), again.eval()(x)) < 1e-5
        assert relative_difference(before, again(x)) > 0.01  # it did train


def test_folded_blocks_train_on(x: Tensor) -> None:
    net = rep.convert(Small())
    trained(net, x)
    folded = fuse(net)
    trained(folded, x)
    assert fuse(folded, x).eval()(x).isfinite().all()


@pytest.mark.parametrize("block", [*rep.BLOCKS, ("kxk", "skip")], ids=str)
@pytest.mark.parametrize("sharing", [False, True])
def test_any_block_comes_back(block: Any, sharing: bool, x: Tensor) -> None:
    net = Small()
    names = [(name, tensor.shape) for name, tensor in net.state_dict().items()]
    rep.convert(net, block, sharing=sharing, silent=False, example=x)
    assert [name for name, _ in blocks(net)] == ["stem", "depthwise.0", "biased"]
    for name, made in blocks(net):
        asked = rep.branches_of(block)
        fits = {branch for branch in asked if BRANCHES.get(branch).fits(made.slot.shape)}
        if block == "dbb" and name == "depthwise.0":
            assert made.slot.middle == 2
            fits -= {"1x1"}
        assert set(made.branches) == fits
    trained(net, x)
    again = Small()
    folded = fuse(net, x)
    assert [(name, tensor.shape) for name, tensor in folded.state_dict().items()] == names
    again.load_state_dict(folded.state_dict(), strict=True)
    with torch.no_grad():
        assert relative_difference(net.eval()(x), again.eval()(x)) < 1e-5
    assert again.norm.eps == 1e-3
    assert folded.norm.momentum == 0.2


def test_inside_another_network(x: Tensor) -> None:
    """Names are those from the network that was converted, wherever it stands later."""
    net = nn.ModuleDict({"body": nn.Sequential(rep.convert(Small(), silent=False), nn.ReLU())})
    body = net["body"]
    trained(body, x)
    assert list(fuse(net).state_dict()) == list(nn.ModuleDict({"body": nn.Sequential(Small(), nn.ReLU())}).state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fuse(body, x)(x), body.eval()(x))


def test_network_that_cannot_be_traced(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"cannot be traced.*example=torch.zeros"):
        rep.convert(Untraceable())
    net = Untraceable()
    names = list(net.state_dict())
    with pytest.raises(ValueError, match=r"change the network's answers .* only=lambda"):
        rep.convert(net, example=x)
    assert list(net.state_dict()) == names  # nothing was changed
    assert not list(blocks(net))
    rep.convert(net, example=x, only=lambda name, conv: name != "tapped")
    assert [name for name, _ in blocks(net)] == ["stem", "depthwise.0", "biased"]
    assert [made.slot.size for _, made in blocks(net)] == [16, 8, 8]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda: rep.convert("net"), "takes a torch.nn.Module, not str"),
        (lambda: rep.convert(nn.Linear(2, 2)), "no convolution of 3x3, 5x5, 7x7"),
        (lambda: rep.convert(Small(), "dbd"), "Did you mean 'dbb'"),
        (lambda: rep.convert(Small(), ("kxk", "1x1_avgg")), "Did you mean '1x1_avg'"),
        (lambda: rep.convert(Small(), ("1x1",)), "lack 'kxk'"),
        (lambda: rep.convert(rep.convert(Small())), "has blocks of branches already"),
        (lambda: rep.convert(Small(), example=torch.zeros(1, 4, 8, 8)), "fails on an input of shape"),
        (lambda: rep.BranchSearch(Small(), frozen=1, joint=1), "Convert it first"),
        (lambda: rep.BranchSearch(rep.convert(Small()), "3 ms", frozen=1, joint=1), "counts branches"),
        (lambda: rep.BranchSearch(rep.convert(Small()), 0, frozen=1, joint=1), "budget must be"),
        (lambda: rep.BranchSearch(rep.convert(Small()), 0.01, frozen=1, joint=1), "leaves room for no branch"),
        (lambda: rep.BranchSearch(rep.convert(Small()), 3, frozen=-1, joint=1), "numbers of steps"),
    ],
)
def test_errors_say_what_to_do(change: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        change()


@pytest.mark.parametrize("sharing", [False, True])
def test_search_in_a_loop_of_ones_own(sharing: bool, x: Tensor) -> None:
    net = rep.convert(Small(), sharing=sharing, silent=False)
    names = list(Small().state_dict())
    search = rep.BranchSearch(net, 9, frozen=2, joint=3, lr=0.1)
    drawn = search.draw()
    with pytest.raises(ValueError, match=r"searched still.*search.fix\(\)"):
        fuse(net)
    assert drawn is not None
    assert int(drawn.taken.sum()) == 9
    trained(net, x, 2, search)
    assert search.phase == "joint"
    assert (search.sampler.logits == 0).all()
    state, weights = copy.deepcopy(search.state_dict()), copy.deepcopy(net.state_dict())
    trained(net, x, 3, search)
    assert search.phase == "fixed"
    assert search.kept is not None
    assert sum(len(kept) for kept in search.kept.values()) == 9
    assert search.draw() is None
    assert all(list(made.branches) == list(search.kept[name] or ("kxk",)) for name, made in blocks(net))
    trained(net, x)
    folded = fuse(net, x)
    assert list(folded.state_dict()) == names
    again = rep.convert(Small(), sharing=sharing, silent=False)
    resumed = rep.BranchSearch(again, 9, frozen=2, joint=3, lr=0.1)
    resumed.load_state_dict(state)
    again.load_state_dict(weights)
    trained(again, x, 3, resumed)
    assert resumed.kept is not None
    ended = rep.BranchSearch(rep.convert(Small(), sharing=sharing), 9, frozen=2, joint=3)
    ended.load_state_dict(search.state_dict())
    ended.net.load_state_dict(net.state_dict())


def test_exported_conversion_has_one_convolution_a_layer(tmp_path: Any, x: Tensor) -> None:
    import onnx

    net = rep.convert(Small(), silent=False)
    trained(net, x)
    pynas.export(net, str(tmp_path / "net.onnx"), input_size=16, quiet=True)
    kinds = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert kinds.count("Conv") == 8  # twice runs twice
    assert kinds.count("BatchNormalization") <= 1  # the one that could not be converted
    assert not any(isinstance(module, RepBlock) for module in fuse(net).modules())


def test_places_know_their_norms() -> None:
    assert [(place.name, place.norm) for place in places(Small())] == [
        ("stem", "norm"),
        ("depthwise.0", "depthwise.1"),
        ("biased", ""),
    ]
