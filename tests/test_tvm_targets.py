"""Targets, and code as it leaves the house: assembly, libraries, stand-alone programs, under emulation too."""

from __future__ import annotations

import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from tvm_nets import deployed, random_network

from cost_models.spec import OpSpec

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'pynas[tvm]'")

from cost_models.tvm_build import TARGETS, Built, build, can_check, check, target, why_not
from cost_models.tvm_build.build import find_compiler
from cost_models.tvm_build.check import EMULATORS, emulate, execute, to_channels_last
from cost_models.tvm_build.program import _Arena, without_debug

pytestmark = pytest.mark.tvm


def test_the_same_network_gives_the_same_code() -> None:
    spec = OpSpec("mbconv", 8, 8, 8, kernel=3, expansion=2, groups=2)
    texts = {build(*deployed(spec), target(name)).assembly() for name in ("cortex-a72", "cortex-a72")}
    assert len(texts) == 1
    (text,) = texts
    assert all(f"__tvm_ffi_conv_{place}:" in text for place in range(3))
    assert ".debug" not in text
    assert ".loc" not in text


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_compiles_and_links(name: str, tmp_path: Path) -> None:
    chosen = target(name)
    if shutil.which(chosen.compiler) is None:
        pytest.skip(f"{chosen.compiler} is not installed")
    module, shape = deployed(OpSpec("mbconv", 4, 4, 6, kernel=3, expansion=2))
    built = build(module, shape, chosen)
    library = built.library(tmp_path / "op.so")
    machine = int.from_bytes(library.read_bytes()[18:20], "little")  # ELF's e_machine
    assert chosen.native or machine == {"aarch64": 183, "armv7": 40}[chosen.family]
    if chosen.native:
        import tvm

        loaded = tvm.relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
        x = np.random.default_rng(0).standard_normal(built.input_shape, np.float32)
        assert np.array_equal(loaded["main"](tvm.runtime.tensor(x)).numpy(), built.run(x))


def test_a_library_that_cannot_be_linked_leaves_nothing(tmp_path: Path) -> None:
    built = build(*deployed(OpSpec("linear", 4, 4, 1)), target("host"))
    with pytest.raises(FileNotFoundError, match="Create it first"):
        built.library(tmp_path / "no" / "op.so")
    refusing = tmp_path / "cc"
    refusing.write_text("#!/bin/sh\necho 'error: no space' >&2\nexit 1\n")
    refusing.chmod(0o755)
    built.target = replace(built.target, compiler=str(refusing))
    (tmp_path / "op.so").write_text("old")
    with pytest.raises(ValueError, match="cannot link for host: error: no space"):
        built.library(tmp_path / "op.so")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cc", "op.so"]
    assert (tmp_path / "op.so").read_text() == "old"


@pytest.mark.parametrize("name", ["cortex-a72", "armv7"])
def test_arm_code_equals_torch_under_emulation(name: str) -> None:
    chosen = target(name)
    if not can_check(chosen):
        pytest.skip(why_not(chosen))
    module, shape = random_network(seed=7)
    assert check(build(module, shape, chosen), module, shape) < 1e-5


@pytest.fixture(scope="module")
def tiny() -> tuple[nn.Module, Built, np.ndarray]:
    """A whole network for this machine, and an input."""
    torch.manual_seed(0)
    module, shape = random_network(seed=5)
    built = build(module, shape, target("host"))
    return module, built, to_channels_last(torch.randn(shape).numpy())


def needs_gcc() -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")


def test_program_gives_the_very_same_numbers_however_often_it_runs(tiny: tuple[nn.Module, Built, np.ndarray]) -> None:
    needs_gcc()
    _, built, x = tiny
    expected = built.run(x)
    assert np.array_equal(emulate(built, x), expected)
    assert np.array_equal(emulate(built, x, repeats=3), expected)


def test_program_takes_other_assembly_and_writes_its_counters(
    tiny: tuple[nn.Module, Built, np.ndarray], tmp_path: Path
) -> None:
    needs_gcc()
    _, built, x = tiny
    counters = "\t.data\n\t.globl kernel_counters, kernel_counters_end\nkernel_counters:\n\t.byte 1, 2, 3\n"
    program = built.program(tmp_path, built.assembly() + counters + "kernel_counters_end:\n")
    assert np.array_equal(execute(built, program, x), built.run(x))
    subprocess.run([program, "input.bin", "output.bin", "1", "counters.bin"], cwd=tmp_path, check=True)
    assert (tmp_path / "counters.bin").read_bytes() == bytes([1, 2, 3])
    with pytest.raises(ValueError, match="gcc cannot link the kernels in"):
        built.program(tmp_path, "\tno such instruction\n")
    with pytest.raises(ValueError, match=r"fails \(exit status 1\): wrong size"):
        execute(built, program, x[:, 1:])


def test_run_says_which_shape_it_wants(tiny: tuple[nn.Module, Built, np.ndarray]) -> None:
    _, built, x = tiny
    with pytest.raises(ValueError, match=r"shape \(1, 3, .*channels last"):
        built.run(x.transpose(0, 3, 1, 2))


def test_memory_is_never_shared_by_living_tensors() -> None:
    rng = random.Random(0)
    for _ in range(50):
        arena, living = _Arena(), dict[int, int]()
        for _ in range(40):
            if living and rng.random() < 0.45:
                start = rng.choice(sorted(living))
                arena.give(start, living.pop(start))
            else:
                size = rng.randrange(1, 1000)
                start = arena.take(size)
                assert start % 64 == 0
                assert start + size <= arena.size
                assert all(start >= other + bytes_ or other >= start + size for other, bytes_ in living.items())
                living[start] = size
        for start, size in living.items():
            arena.give(start, size)
        assert arena.free == [(0, arena.size)]


def test_debug_information_goes_and_code_stays() -> None:
    text = '\t.text\n\t.file\t1 "a"\nf:\n.Ltmp0:\n\t.loc\t1 0 0\n\tadd\tx0, x0, #1\n.Ltmp1:\n\tb\t.Ltmp1\n'
    debug = '\t.section\t.debug_loc,"",@progbits\n\t.quad\t.Ltmp0\n\t.section\t".note.GNU-stack","",@progbits\n'
    kept = '\t.text\nf:\n\tadd\tx0, x0, #1\n.Ltmp1:\n\tb\t.Ltmp1\n\t.section\t".note.GNU-stack","",@progbits\n'
    assert without_debug(text + debug) == kept
    assert without_debug(kept) == kept


def test_unknown_target_is_answered_with_the_names() -> None:
    with pytest.raises(ValueError, match="Unknown target 'cortex-72'. Did you mean 'cortex-a72'.*neoverse-n1"):
        target("cortex-72")


def test_targets_say_what_their_vectors_are() -> None:
    found = {name: target(name) for name in TARGETS}
    assert all(name == made.name for name, made in found.items())
    assert {(made.lanes, made.registers) for made in found.values() if made.family == "aarch64"} <= {(4, 32)}
    assert (found["armv7"].lanes, found["armv7"].registers) == (4, 16)
    assert found["host"].native
    assert (found["host"].lanes, found["host"].registers) in {
        (16, 32),
        (8, 16),
        (4, 16),
        (4, 32),
    }
    assert str(found["cortex-a72"].tvm().attrs["mcpu"]) == "cortex-a72"


def test_missing_tools_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    chosen = target("cortex-a72")
    with pytest.raises(ValueError, match="needs aarch64-linux-gnu-gcc.*apt-get install gcc-aarch64-linux-gnu"):
        find_compiler(chosen)
    assert not can_check(chosen)
    assert why_not(chosen).endswith("apt-get install qemu-user gcc-aarch64-linux-gnu")
    assert why_not(target("armv7")).endswith("apt-get install qemu-user gcc-arm-linux-gnueabihf")
    assert can_check(target("host"))
    assert set(EMULATORS) == {"aarch64", "armv7"}
