"""Every kernel meets one contract; a new kernel is picked up here by itself. Then what only one kernel promises."""

from __future__ import annotations

import copy
import io
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pynas import kernels
from pynas.kernels import gumbel, native, noise
from pynas.kernels.kernel import Kernel

CPU = torch.device("cpu")
DEVICES = [CPU] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
DIFFERENTIABLE = {name: kernel for name, kernel in kernels.ALL.items() if kernel.differentiable}
every_kernel = pytest.mark.parametrize("kernel", kernels.ALL.values(), ids=list(kernels.ALL))
every_differentiable = pytest.mark.parametrize("kernel", DIFFERENTIABLE.values(), ids=list(DIFFERENTIABLE))
every_device = pytest.mark.parametrize("device", DEVICES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def floats(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """Those outputs alone that a gradient can come from."""
    return lambda *args: tuple(t for t in outputs(function(*args)) if t.requires_grad)


def leaves(args: Sequence[Any]) -> list[Tensor]:
    """Also those in lists."""
    tensors = [a for arg in args for a in (arg if isinstance(arg, list) else [arg])]
    return [a for a in tensors if isinstance(a, Tensor) and a.requires_grad]


def of_leaves(call: Callable[..., Any], args: Sequence[Any]) -> Callable[..., tuple[Tensor, ...]]:
    """The call as a function of its leaves, which gradcheck does not find in lists."""

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        new = {id(old): tensor for old, tensor in zip(leaves(args), given, strict=True)}
        filled = [[new.get(id(a), a) for a in arg] if isinstance(arg, list) else new.get(id(arg), arg) for arg in args]
        return floats(call)(*filled)

    return function


def close(kernel: Kernel, ours: Tensor, expected: Tensor) -> None:
    """Two libraries' functions and sums differ in the last bits; noise is float32 in float64 too."""
    rtol, atol = kernel.tolerance
    torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)


def scattered(arg: Any) -> Any:
    """The same values in memory that is not dense."""
    if isinstance(arg, list):
        return [scattered(a) for a in arg]
    if not isinstance(arg, Tensor) or arg.dim() == 0:
        return arg
    wide = torch.stack([arg.detach(), arg.detach()], -1)[..., 0]
    assert arg.numel() <= 1 or not wide.is_contiguous()
    return wide.requires_grad_(arg.requires_grad)


# The contract.


def test_kernels_are_built() -> None:
    assert kernels.facts()["kernels"] == "built"


@every_dtype
@every_device
@every_kernel
def test_matches_reference(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> None:
    for args in kernel.samples(device, dtype):
        expected = outputs(kernel.reference(*args))
        for call in (kernel.function, kernel.op):
            for ours, theirs in zip(outputs(call(*args))[: kernel.results], expected, strict=True):
                close(kernel, ours, theirs)


@every_device
@every_differentiable
def test_gradients(kernel: Kernel, device: torch.device) -> None:
    for args in kernel.samples(device, torch.float64):
        for call in (kernel.function, kernel.op, kernel.reference):
            assert torch.autograd.gradcheck(of_leaves(call, args), leaves(args), fast_mode=True)


@every_device
@every_differentiable
def test_gradients_of_float32_match_reference(kernel: Kernel, device: torch.device) -> None:
    for args in kernel.samples(device, torch.float32):
        weights = [torch.randn_like(t) for t in floats(kernel.reference)(*args)]
        expected = torch.autograd.grad(floats(kernel.reference)(*args), leaves(args), weights)
        for call in (kernel.function, kernel.op):
            ours = torch.autograd.grad(floats(call)(*args), leaves(args), weights)
            for a, b in zip(ours, expected, strict=True):
                rtol, atol = kernel.tolerance
                torch.testing.assert_close(a, b, rtol=10 * rtol, atol=10 * atol)


@every_device
@every_differentiable
def test_each_output_alone_gives_its_gradient(kernel: Kernel, device: torch.device) -> None:
    args = kernel.samples(device, torch.float64)[0]
    for i in range(len(floats(kernel.reference)(*args))):
        grads = [
            torch.autograd.grad(floats(call)(*args)[i].square().sum(), leaves(args), allow_unused=True)
            for call in (kernel.function, kernel.op, kernel.reference)
        ]
        for ours, op, expected in zip(*grads, strict=True):
            zeros = torch.zeros(()) if expected is None else expected
            for grad in (ours, op):
                torch.testing.assert_close(grad, torch.zeros_like(grad) + zeros, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own
@every_device
@every_kernel
def test_registration(kernel: Kernel, device: torch.device) -> None:
    for args in kernel.samples(device, torch.float32):
        torch.library.opcheck(kernel.op, args)


@every_device
@every_kernel
def test_compiles(kernel: Kernel, device: torch.device) -> None:
    for args in kernel.samples(device, torch.float32):
        torch._dynamo.reset()
        compiled = torch.compile(kernel.op, fullgraph=True, backend="aot_eager")
        ours_all = outputs(compiled(*args))[: kernel.results]
        for ours, theirs in zip(ours_all, outputs(kernel.function(*args)), strict=True):
            assert torch.equal(ours, theirs)


@every_device
@every_kernel
def test_scattered_memory(kernel: Kernel, device: torch.device) -> None:
    for args in kernel.samples(device, torch.float32):
        expected = outputs(kernel.function(*args))
        for call in (kernel.function, kernel.op):
            mirrored = [scattered(arg) for arg in args]
            for ours, theirs in zip(outputs(call(*mirrored))[: kernel.results], expected, strict=True):
                assert torch.equal(ours, theirs)


@every_device
@every_differentiable
def test_scattered_gradients(kernel: Kernel, device: torch.device) -> None:
    args = kernel.samples(device, torch.float32)[0]
    mirrored = [scattered(arg) for arg in args]
    for call in (kernel.function, kernel.op):
        weights = [torch.randn_like(t) for t in floats(call)(*args)]
        expected = torch.autograd.grad(floats(call)(*args), leaves(args), weights)
        ours = torch.autograd.grad(floats(call)(*mirrored), leaves(mirrored), [scattered(w) for w in weights])
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a, b)


@every_device
@every_differentiable
@pytest.mark.parametrize("other_path", [False, True])
def test_second_derivatives_are_refused(kernel: Kernel, device: torch.device, other_path: bool) -> None:
    """Also where the input is reached on another path, whose share must not pass for the whole."""
    for call in (kernel.function, kernel.op):
        args = kernel.samples(device, torch.float64)[0]
        x = leaves(args)[0]
        loss = sum(t.square().sum() for t in floats(call)(*args)) + other_path * x.square().sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(grad.sum(), x)


@every_kernel
def test_every_isa(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits where that is promised."""
    for args in kernel.samples(CPU, torch.float32 if kernel.same_bits else torch.float64):
        results = [run_on(isa, kernel, args, monkeypatch) for isa in native.MODULE.usable_isas()]
        for result in results[1:]:
            for a, b in zip(result, results[0], strict=True):
                torch.testing.assert_close(
                    a, b, rtol=0 if kernel.same_bits else 1e-9, atol=0 if kernel.same_bits else 1e-9
                )


def run_on(isa: str, kernel: Kernel, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Outputs, then gradients."""
    chosen = native.MODULE.Kernels(isa)
    assert chosen.isa == isa
    module = sys.modules[kernel.function.__module__]
    monkeypatch.setattr(module, "KERNELS", chosen)
    results = list(outputs(kernel.function(*args)))
    if kernel.differentiable:
        differentiable = floats(kernel.function)(*args)
        torch.manual_seed(1)
        results += torch.autograd.grad(differentiable, leaves(args), [torch.randn_like(t) for t in differentiable])
    return results


@every_kernel
def test_threads_do_not_matter(kernel: Kernel) -> None:
    args = kernel.samples(CPU, torch.float32)[0]
    alone = outputs(kernel.function(*args))
    torch.set_num_threads(2)
    try:
        for a, b in zip(outputs(kernel.function(*args)), alone, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(1)


@every_kernel
def test_torch_without_the_exchange_api(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch < 2.10 has no C functions for tensors; the module then goes through Python for them."""
    for args in kernel.samples(CPU, torch.float32):
        expected = run_on("base", kernel, args, monkeypatch)
        native.MODULE.connect(torch, None)
        try:
            results = [
                run_on("base", kernel, inputs, monkeypatch) for inputs in (args, [scattered(arg) for arg in args])
            ]
        finally:
            native.MODULE.connect(torch, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected, strict=True))


@every_kernel
def test_results_are_ordinary_tensors(kernel: Kernel) -> None:
    """Also where C++ made them: they outlive the call, and can be copied, saved, shared and written to."""
    for result in outputs(kernel.function(*kernel.samples(CPU, torch.float32)[0])):
        ours = result.detach()
        expected = ours.tolist()
        assert ours.is_contiguous()
        assert ours.data_ptr() % 64 == 0
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        assert torch.load(file).tolist() == copy.deepcopy(ours).tolist() == expected
        assert ours.share_memory_().tolist() == expected
        assert (ours.zero_() == 0).all()


@every_kernel
def test_without_the_module_the_reference_runs(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[kernel.function.__module__], "KERNELS", None)
    for args in kernel.samples(CPU, torch.float64):
        expected = outputs(kernel.reference(*args))
        for call in (kernel.function, kernel.op):
            ours = outputs(call(*args))[: kernel.results]
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        if kernel.differentiable:
            assert torch.autograd.gradcheck(of_leaves(kernel.op, args), leaves(args), fast_mode=True)


# Random numbers.

# Known answers of the Random123 distribution, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0_A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_known_answers(counter: list[int], key: int, result: list[int]) -> None:
    words = noise.philox([torch.tensor(word) for word in counter], key)
    assert [int(word) for word in words] == result
    for isa in native.MODULE.usable_isas():
        counters, out = torch.tensor([counter] * 70).to(torch.uint32), torch.zeros(70, 4, dtype=torch.uint32)
        native.MODULE.Kernels(isa).philox(counters.data_ptr(), key, out.data_ptr(), 70)
        assert out.tolist() == [result] * 70


def test_no_two_words_share_a_block() -> None:
    """Every place in the grid of domains, seeds, steps, indices, items and layers has a word of its own."""
    grid = [
        noise.random_words(domain, seed, step, torch.arange(4), 5, 9)
        for domain in noise.Domain
        for seed in (0, 1, 2**32, 2**63 - 1)
        for step in (0, 1, 2**32, 2**56 - 1)
    ]
    words = torch.stack(grid).flatten()
    # Equal by chance: words^2 / 2^33 = 0.008 pairs are to be expected.
    assert len(words.unique()) == len(words)


def elementwise(name: str, x: Tensor) -> Tensor:
    """A function of csrc/shared/float_math.h, after a check that all instruction sets agree on it."""
    results = [torch.empty(len(x), dtype=torch.float32) for _ in native.MODULE.usable_isas()]
    for isa, out in zip(native.MODULE.usable_isas(), results, strict=True):
        getattr(native.MODULE.Kernels(isa), name)(x.data_ptr(), out.data_ptr(), len(x))
    assert all(torch.equal(out, results[0]) for out in results)
    return results[0]


def ulps(ours: Tensor, exact: Tensor) -> float:
    """Greatest error in units in the last place of float32."""
    unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24)
    return float(((ours.double() - exact).abs() / unit).max())


def test_log_is_accurate() -> None:
    everywhere = torch.arange(0x00800000, 0x7F800000, 997, dtype=torch.int32)
    around_one = torch.arange(0x3F000000, 0x40000000, 11, dtype=torch.int32)
    x = torch.cat([everywhere, around_one]).view(torch.float32)
    assert ulps(elementwise("log", x), x.double().log()) < 1.2
    assert elementwise("log", torch.ones(1)).tolist() == [0.0]


def test_exp_is_accurate() -> None:
    x = -torch.arange(0, 2**21, dtype=torch.float32) * (87.33 / 2**21)
    assert ulps(elementwise("exp", x), x.double().exp()) < 1.2
    edges = torch.tensor([0.0, -87.34, -1e30, -torch.inf])
    assert elementwise("exp", edges).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_gumbel_noise_keeps_its_tails() -> None:
    """Also at both ends of u, where a float32 u would be 0 or 1."""
    middle = torch.linspace(0, 2**32 - 1, 2**20, dtype=torch.float64).long()
    ends = torch.arange(4096)
    words = torch.cat([ends, 2**31 + ends - 2048, 2**32 - 1 - ends, middle])
    exact = -torch.log(-torch.log1p(-(words.double() + 0.5) * 2.0**-32))
    ours = elementwise("gumbel", words.to(torch.uint32))
    assert (ours.double() - exact).abs().max() < 1.5e-6
    assert ulps(ours[exact.abs() > 1], exact[exact.abs() > 1]) < 2
    assert ours.max() == pytest.approx(33 * math.log(2), abs=1e-5)
    assert ours.min() == pytest.approx(-math.log(33 * math.log(2)), abs=1e-5)
    torch.testing.assert_close(noise.gumbel(words), ours, rtol=1e-6, atol=3e-7)


# How the module is found.


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env=os.environ | environment,
        cwd=Path(kernels.__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


WITHOUT_MODULE = "import sys; sys.modules['pynas._C'] = None; from pynas import kernels; print(kernels.facts()['isa'])"


def test_missing_module_warns_once_and_falls_back() -> None:
    done = in_new_process(WITHOUT_MODULE, PYNAS_REQUIRE_KERNELS="")
    assert done.stdout.strip() == "none"
    assert done.stderr.count("The C++ kernels are missing") == 1
    assert "pip install ." in done.stderr


def test_missing_module_is_an_error_where_kernels_are_required() -> None:
    done = in_new_process(WITHOUT_MODULE, PYNAS_REQUIRE_KERNELS="1")
    assert done.returncode != 0
    assert "ImportError: PYNAS_REQUIRE_KERNELS=1, but pynas._C cannot be imported" in done.stderr


def test_isa_is_chosen_by_environment() -> None:
    done = in_new_process("from pynas import kernels; print(kernels.facts()['isa'])", PYNAS_ISA="base")
    assert done.stdout.strip() == "base"


def test_unknown_isa_is_refused() -> None:
    usable = ", ".join(native.MODULE.usable_isas())
    with pytest.raises(ValueError, match=f"Instruction set 'sse9' is not usable here. .* allow: {usable}"):
        native.MODULE.Kernels("sse9")
    assert native.MODULE.Kernels("").isa == native.MODULE.usable_isas()[-1]


def test_facts_are_plain() -> None:
    facts = kernels.facts()
    assert facts["isa"] in str(facts["usable_isas"]).split()
    assert set(str(facts["usable_isas"]).split()) <= set(str(facts["built_isas"]).split())
    assert facts["compiler"]
    assert "built" in str(facts["cuda"])


def test_both_languages_know_the_same_limit() -> None:
    assert native.MODULE.MOST_OPTIONS == gumbel.MOST_OPTIONS
