"""Where inverted-bottleneck modules run in their kernel, where they run themselves, and how one says so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from blocks import EVERY, OwnConv, block, calls, choice, everything, same
from torch import Tensor, nn
from torch.nn.utils import parametrize

import pynas
from pynas import Gates, Run
from pynas.kernels import cuda, mbconv, native, rule, setting
from pynas.kernels.mbconv_reference import ACTIVATIONS
from pynas.ops import fused
from pynas.ops.layers import ConvBN
from pynas.plan import kernels_used, make_space


@pytest.fixture(autouse=True)
def _always_fused() -> Iterator[None]:
    with setting.using("fused"):
        yield


# Where the modules do something else, they run themselves.


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def own_conv(net: Any) -> None:
    net.expand.conv = OwnConv(8, 24, 1, bias=False)


def bias(net: Any) -> None:
    net.project.conv.bias = nn.Parameter(torch.ones(8))


def parametrised(net: Any) -> None:
    parametrize.register_parametrization(net.depthwise.conv, "weight", Doubled())


def parametrised_later(net: Any) -> None:
    net(torch.randn(2, 8, 6, 6))
    parametrised(net)


def replaced_later(net: Any) -> None:
    net(torch.randn(2, 8, 6, 6))
    net.depthwise.activation = nn.Tanh()


def own_forward(net: Any) -> None:
    conv = net.expand.conv
    conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)


def hook(net: Any) -> None:
    net.depthwise.register_forward_hook(lambda module, args, y: y + 1)


def pre_hook(net: Any) -> None:
    net.project.bn.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def backward_hook(net: Any) -> None:
    net.project.register_full_backward_hook(lambda module, into, out: (2 * into[0],))


def norms(**changes: Any) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for name, value in changes.items():
                    setattr(module, name, value)

    return change


def no_affine(net: Any) -> None:
    net.expand.bn = nn.BatchNorm2d(24, affine=False)


def no_statistics(net: Any) -> None:
    net.expand.bn = nn.BatchNorm2d(24, track_running_stats=False)


def other_eps(net: Any) -> None:
    net.expand.bn.eps = 0.5


def other_momentum(net: Any) -> None:
    net.expand.bn.momentum = 0.5


def one_frozen(net: Any) -> None:
    net.depthwise.bn.eval()


def tanh(net: Any) -> None:
    net.depthwise.activation = nn.Tanh()


CHANGES = [
    own_conv,
    bias,
    parametrised,
    parametrised_later,
    replaced_later,
    own_forward,
    hook,
    pre_hook,
    backward_hook,
    no_affine,
    no_statistics,
    other_eps,
    other_momentum,
    one_frozen,
    tanh,
]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_other_modules_run_themselves(
    change: Callable[[Any], None], mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = choice((8, 8, 6, 1), options=("k3_e3", "skip")).double()
    net = layer if mixed else layer.options["k3_e3"]
    second = copy.deepcopy(layer)
    for each in (layer, second):
        change(each.options["k3_e3"].float())
    second.load_state_dict(layer.state_dict())
    twin = second.double() if mixed else second.double().options["k3_e3"]
    layer.double()
    count = calls(monkeypatch)
    x, grad = torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True), torch.rand(2, 8, 6, 6).double()
    args = [Gates(torch.rand(2).double(), (0, 1), (0, 1))] if mixed else []
    ours = everything(net, lambda: net(x, *args), [x], grad)
    with setting.using("reference"):
        expected = everything(twin, lambda: twin(x, *args), [x], grad)
    assert count["forward"] == 0
    same(ours, expected)


def test_cumulative_averages_run_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As recalibration wants them."""
    net, count = block(), calls(monkeypatch)
    norms(momentum=None)(net)
    for _ in range(2):
        net(torch.randn(4, 8, 6, 6))
    assert count["forward"] == 0
    assert int(net.expand.bn.num_batches_tracked) == 2


def test_same_changes_of_all_norms_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    net, count = block().double(), calls(monkeypatch)
    norms(momentum=0.3, eps=0.1)(net)
    twin = copy.deepcopy(net)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    ours = everything(net, lambda: net(x), [x], torch.ones_like(x))
    same(ours, everything(twin, lambda: twin.plain(x), [x], torch.ones_like(x)))
    assert count["forward"] == 1


def test_own_hooks_of_a_called_block_run(monkeypatch: pytest.MonkeyPatch) -> None:
    net, count, seen = block(), calls(monkeypatch), []
    net.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    net(torch.randn(2, 8, 6, 6))
    assert (count["forward"], len(seen)) == (1, 1)


def test_awkward_inputs_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    net, count = block(), calls(monkeypatch)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        net(torch.randn(1, 8, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert net.project(net.depthwise(net.expand(torch.randn(2, 8, 6, 6)))).dtype == torch.bfloat16
        x = torch.randn(2, 8, 6, 6)
        assert torch.equal(net(x), net.plain(x))
    assert net(torch.randn(0, 8, 6, 6)).shape == (0, 8, 6, 6)
    with pytest.raises(RuntimeError, match="expected input"):
        net(torch.randn(2, 4, 6, 6))
    assert copy.deepcopy(net).bfloat16()(torch.randn(2, 8, 6, 6).bfloat16()).dtype == torch.bfloat16
    assert count["forward"] == 0


def test_no_image_size_but_one_value_is_too_small() -> None:
    net = block((8, 8, 6, 1))
    x = torch.randn(1, 8, 1, 2)
    with setting.using("reference"):
        expected = net(x)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


def test_copies_and_saved_modules_have_their_own_weights(tmp_path: Path) -> None:
    net, x = choice((4, 4, 5, 1)), torch.randn(2, 4, 5, 5)
    gates = Gates(torch.rand(9), EVERY, EVERY)
    before = net(x, gates)
    torch.save(net, tmp_path / "net.pt")
    twins = [copy.deepcopy(net), torch.load(tmp_path / "net.pt", weights_only=False)]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    assert not torch.equal(net(x, gates), before)
    for twin in twins:
        assert torch.equal(twin(x, gates), before)
    assert not [name for name in net.state_dict() if "wiring" in name]


def test_assigned_weights_are_used() -> None:
    net, other, x = block(), block(), torch.randn(2, 8, 6, 6)
    net(x)
    net.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert torch.equal(net(x), other(x))
    given = {name: parameter * 2 for name, parameter in other.named_parameters()}
    assert not torch.equal(torch.func.functional_call(net, given, (x,)), net(x))


def test_compiled_layer_updates_its_statistics() -> None:
    torch._dynamo.reset()
    layer = choice((4, 4, 5, 1), options=("k3_e1_g2", "k3_e3", "skip")).double()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, values = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True), torch.rand(3, dtype=torch.float64)
    gates = Gates(values.requires_grad_(), (0, 1, 2), (0, 1, 2))
    for _ in range(3):
        ours = everything(layer, lambda: compiled(x, gates), [x, values], torch.ones_like(x))
        same(ours, everything(twin, lambda: twin(x, gates), [x, values], torch.ones_like(x)))


def test_export_is_plain_torch() -> None:
    net = nn.Sequential(block(), block((8, 12, 6, 2), groups=2)).eval()
    exported = torch.export.export(net, (torch.randn(2, 8, 6, 6),))
    assert "pynas" not in str(exported.graph)
    trained = torch.export.export(net.train(), (torch.randn(2, 8, 6, 6),))
    assert "pynas" not in str(trained.graph)


# The rule and the setting.


def test_rule_and_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    small, wide = block((8, 8, 6, 1)), block((184, 184, 2, 1), expansion=1)
    x, y = torch.randn(2, 8, 6, 6), torch.randn(2, 184, 2, 2)
    for asked, expected in (("auto", 1), ("fused", 2), ("reference", 0)):
        with monkeypatch.context() as patch:
            count = calls(patch)
            with setting.using(asked):  # type: ignore[arg-type]
                small(x)
                wide(y)
            assert count["forward"] == expected


def test_fused_without_kernels_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setting, "KERNELS", None)
    monkeypatch.setattr(cuda, "_library", None)
    with pytest.raises(ValueError, match="kernels='fused' needs the C\\+\\+ kernels"), setting.using("fused"):
        pass
    with pytest.raises(ValueError, match="kernels must be 'auto', 'fused', 'reference', not 'fast'"):
        setting.check("fast")
    with pytest.raises(ValueError, match="needs CUDA kernels .* but the images are .* on meta"):
        block().to("meta")(torch.empty(2, 8, 6, 6, device="meta"))


def test_without_the_module_auto_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = block(), torch.randn(2, 8, 6, 6)
    expected = net.plain(x)
    for module in (rule, mbconv):
        monkeypatch.setattr(module, "KERNELS", None)
    with setting.using("auto"):
        assert torch.equal(net(x), expected)


def test_names_of_activations_are_those_of_the_modules() -> None:
    assert set(fused._CODES.values()) == set(range(1, len(ACTIVATIONS)))
    assert fused.facts(block(activation="none")) is not None


def test_search_says_what_it_uses(unbroken: Run) -> None:
    assert yaml.safe_load((unbroken.folder / "config.yaml").read_text())["kernels"] == "auto"
    assert unbroken.figures["kernels"] == f"fused C++ ({native.KERNELS.isa}) in 3 of 3 layers"


def test_what_is_used_depends_on_setting_space_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    space = make_space("fbnet32", {})
    assert kernels_used(space).endswith("in 22 of 22 layers (kernels='fused')")
    assert kernels_used(space, "bf16") == "plain PyTorch in all 22 layers (mixed precision)"
    with setting.using("reference"):
        assert kernels_used(space) == "plain PyTorch in all 22 layers (kernels='reference')"
    with setting.using("auto"):
        wide = make_space("fbnet32", {"width": 8.0})
        fused_slots = [s for s in wide.slots() if rule.pays(s.in_channels, 2 * s.size**2, 50)]
        assert 0 < len(fused_slots) < 22
        assert f"in {len(fused_slots)} of 22 layers" in kernels_used(wide, images=2)
        monkeypatch.setattr(native, "MODULE", None)
        assert "the C++ kernels are missing" in kernels_used(space)


def test_kernels_that_cannot_work_are_refused_before_anything_runs(searched: Run, tmp_path: Path) -> None:
    for settings, says in (
        ({"kernels": "fast"}, "kernels must be 'auto', 'fused', 'reference', not 'fast'"),
        ({"kernels": "fused", "amp": "bf16"}, "kernels='fused' computes in float32"),
    ):
        with pytest.raises(ValueError, match=says):
            pynas.search(**settings, out=str(tmp_path / "out"))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="kernels must be"):
        pynas.retrain(searched, kernels="fast")  # type: ignore[arg-type]


def test_retrain_takes_the_runs_kernels_or_others(searched: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(home))
    count, used = calls(monkeypatch), []
    options: tuple[setting.Setting | None, ...] = (None, "reference", "fused")
    for asked in options:
        before = count["backward"]
        pynas.retrain(searched, epochs=1, kernels=asked, quiet=True)
        used.append(count["backward"] > before)
    assert used == [True, False, True]


def test_plain_modules_are_what_is_expected() -> None:
    """The structure that `facts` reads, so that a change there does not turn the kernel off unseen."""
    net = block(groups=2, kernel=5)
    assert isinstance(net.expand, ConvBN)
    assert fused.facts(net) == ((8, 8, 1, 1), (5, 24, 2))


# Evaluation.


@pytest.fixture
def inferences(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what the kernel for inference was called with."""
    shapes: list[tuple[int, ...]] = []
    function = fused.inference_function

    def counted(x: Tensor, *args: Any) -> Tensor:
        shapes.append(tuple(x.shape))
        return function(x, *args)

    monkeypatch.setattr(fused, "inference_function", counted)
    return shapes


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("spec", [{}, {"groups": 2, "kernel": 5}, {"activation": "hardswish"}], ids=str)
def test_evaluation_runs_in_its_kernel_and_follows_the_weights(
    inferences: list[tuple[int, ...]], spec: dict[str, Any], layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    net = block((16, 16, 32, 1), **spec)
    x = torch.randn(3, 16, 32, 32).to(memory_format=layout)
    for count in (1, 2):
        net.train()(x)  # moves running statistics
        net.project.conv.weight.data[0, 0] += 1
        with torch.no_grad():
            y = net.eval()(x)
            torch.testing.assert_close(y, net.plain(x), rtol=1e-4, atol=1e-4)
        assert len(inferences) == count
        assert y.is_contiguous(memory_format=layout)


def test_evaluation_leaves_to_the_modules_what_is_theirs(inferences: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    net, x = block((16, 16, 32, 1)).eval(), torch.randn(3, 16, 32, 32)
    assert net(x).requires_grad
    with torch.no_grad():
        net(x[:1])  # too small to be worth it
        with setting.using("reference"):
            net(x)
        with torch.autocast("cpu", torch.bfloat16):
            net(x)
        net.depthwise.bn.train()
        net(x)
        net.depthwise.bn.eval()
        net.depthwise.register_forward_hook(lambda module, args, y: 2 * y)
        torch.testing.assert_close(net(x), net.plain(x))
    assert not inferences
