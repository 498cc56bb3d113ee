"""The model of ARM cores: assembly into counted blocks and loops, llvm-mca's cycles, the memory rule, whole ops."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

import cost_models
from cost_models import OpSpec, places
from cost_models.tvm_model import blocks, core, cores, counts, mca, names
from cost_models.tvm_model.loops import functions
from cost_models.tvm_model.mca import Mca
from cost_models.tvm_model.memory import bytes_moved
from cost_models.tvm_model.pieces import pieces

GCC = "aarch64-linux-gnu-gcc"
BOARD = counts.platform.machine().lower() in ("aarch64", "arm64")
needs_mca = pytest.mark.skipif(
    not any(shutil.which(f"llvm-mca-{number}") for number in range(mca.NEWEST, mca.NEWEST + 21)),
    reason=f"llvm-mca of LLVM {mca.NEWEST} or newer is not installed (apt-get install llvm-{mca.NEWEST})",
)
needs_arm = pytest.mark.skipif(
    not shutil.which(GCC) or not (BOARD or shutil.which("qemu-aarch64")),
    reason="running ARM code needs gcc-aarch64-linux-gnu and qemu-user",
)

# 5 turns of an outer loop, 3 of an inner one in each; a branch past a call in the first turn. The flags and the two
# registers that counters borrow are in use where blocks start.
NEST = """
	.text
	.globl	nest
	.type	nest,@function
nest:
.Lfunc_begin0:
	stp	x30, x16, [sp, #-16]!
	mov	x17, x0
	mov	x16, #0
	mov	x9, #5
.LBB0_1:                                // outer
	mov	x10, #3
.Ltmp1:
	cmp	x9, #1
.LBB0_2:
	cset	x11, eq
	add	x16, x16, x10
	add	x16, x16, x11, lsl #8
	sub	x10, x10, #1
	cbnz	x10, .LBB0_2
	cmp	x9, #5
	b.eq	.LBB0_4
	bl	twice
.LBB0_4:
	subs	x9, x9, #1
	b.ne	.LBB0_1
	add	x0, x16, x17
	ldp	x30, x16, [sp], #16
	ret
.Lfunc_end0:
twice:
	lsl	x16, x16, #1
	ret
	.section	.rodata
.Ldata:
	.asciz	"b .LBB0_1 // no code"
"""
MAIN = r"""
#include <stdio.h>
long nest(long);
extern char kernel_counters[] __attribute__((weak)), kernel_counters_end[] __attribute__((weak));
int main(int count, char **names) {
    printf("%ld\n", nest(7));
    FILE *file = count > 1 ? fopen(names[1], "wb") : 0;
    if (!file) return 0;
    fwrite(kernel_counters, 1, kernel_counters_end - kernel_counters, file);
    return fclose(file);
}
"""


def linked(folder: Path, assembly: str) -> Path:
    folder.mkdir()
    (folder / "nest.s").write_text(assembly)
    (folder / "main.c").write_text(MAIN)
    subprocess.run([GCC, "-static", "main.c", "nest.s", "-o", "program"], cwd=folder, check=True)
    return folder / "program"


def said(program: Path) -> str:
    return subprocess.run(
        [*counts.emulator(), str(program)], cwd=program.parent, check=True, capture_output=True, text=True
    ).stdout


def test_blocks_start_at_labels_and_end_at_branches() -> None:
    found = blocks.split(NEST)
    assert [(block.function, len(block.instructions), block.falls_through) for block in found] == [
        ("nest", 4, True),
        ("nest", 2, True),  # the label of debug information splits nothing
        ("nest", 5, True),
        ("nest", 2, True),
        ("nest", 1, True),  # a call comes back
        ("nest", 2, True),
        ("nest", 3, False),
        ("twice", 2, False),
    ]
    assert [block.targets for block in found] == [(), (), (".LBB0_2",), (".LBB0_4",), (), (".LBB0_1",), (), ()]
    assert found[4].calls == ("twice",)
    lines = NEST.splitlines()
    assert all(" ".join(lines[block.line].split()) == block.instructions[0] for block in found)


def test_blocks_of_tail_calls_and_jump_tables() -> None:
    text = """
f:
	adr	x9, .LBB0_1
	br	x9
.LBB0_1:
	tbz	w0, #3, .LBB0_2
	b	elsewhere
.LBB0_2:
	bl	memset
	blr	x8
	ret
	.section	.rodata
.LJTI0_0:
	.hword	(.LBB0_1-.LBB0_1)>>2
	.hword	(.LBB0_2-.LBB0_1)>>2
"""
    found = blocks.split(text)
    assert [block.targets for block in found] == [(".LBB0_1", ".LBB0_2"), (".LBB0_2",), ("elsewhere",), ()]
    assert [block.calls for block in found] == [(), (), ("elsewhere",), ("memset", "")]
    assert [block.falls_through for block in found] == [False, True, False, False]


def test_text_without_code_is_refused() -> None:
    with pytest.raises(ValueError, match="no instruction"):
        blocks.split("\t.text\n# nothing\n")


def test_loops_nest() -> None:
    nest, twice = functions(blocks.split(NEST))
    (outer,) = nest.inner
    (inner,) = outer.inner
    assert (nest.own, outer.own, inner.own) == ([0, 6], [1, 3, 4, 5], [2])
    assert twice.inner == []


@needs_arm
def test_counters_are_exact_and_change_no_result(tmp_path: Path) -> None:
    found = blocks.split(NEST)
    plain = linked(tmp_path / "plain", NEST)
    counted = linked(tmp_path / "counted", blocks.instrument(NEST, found))
    assert said(plain) == said(counted)
    assert counts.count(counted, len(found)) == [1, 5, 15, 5, 4, 5, 1, 4]


@needs_arm
def test_a_program_that_fails_is_an_error(tmp_path: Path) -> None:
    found = blocks.split(NEST)
    with pytest.raises(RuntimeError, match="left 0 bytes of counters; 64 were expected"):
        counts.count(linked(tmp_path / "plain", NEST), len(found))
    broken = blocks.instrument(NEST.replace("mov\tx16, #0", "brk\t#1"), found)
    with pytest.raises(RuntimeError, match="failed with exit code"):
        counts.count(linked(tmp_path / "broken", broken), len(found))


def test_short_inner_loops_are_unrolled_into_their_level() -> None:
    found = blocks.split(NEST.replace("b.eq\t.LBB0_4", "nop"))
    run = pieces(found, [1, 5, 15, 5, 5, 1, 5])
    sizes = {(piece.function, piece.times): len(piece.code) for piece in run}
    assert sizes == {("nest", 1): 6 + 5 * (2 + 3 * 5 + 2 + 2), ("twice", 5): 1}  # calls and returns left out


def test_uneven_or_long_inner_loops_are_pieces_of_their_own() -> None:
    found = blocks.split(NEST)
    uneven = {(piece.function, piece.times): len(piece.code) for piece in pieces(found, [1, 5, 15, 5, 4, 5, 1, 4])}
    assert uneven == {("nest", 1): 6, ("nest", 5): 6, ("nest", 4): 0, ("nest", 15): 5, ("twice", 4): 1}
    long = {piece.times: len(piece.code) for piece in pieces(found, [1, 5, 5000, 5, 0, 5, 1, 0])}
    assert long == {1: 6, 5: 6, 5000: 5}


CHOICE = """
choose:
.LBB0_1:
	mov	x1, #4
.LBB0_2:
	add	x3, x3, #1
	tbz	x3, #0, .LBB0_4
	fadd	s0, s0, s1
	b	.LBB0_5
.LBB0_4:
	fmul	s0, s0, s1
.LBB0_5:
	subs	x1, x1, #1
	b.ne	.LBB0_2
	subs	x0, x0, #1
	b.ne	.LBB0_1
	ret
"""


@pytest.mark.parametrize(
    ("branches", "expected"),
    [
        ((20, 0), [(1, 5 * (1 + 4 * 6 + 2))]),  # no choice: all in one piece
        ((8, 12), [(5, 3), (20, 4), (8, 2), (12, 1)]),
        ((10, 10), [(5, 3), (20, 4), (10, 3)]),
    ],
    ids=["never", "uneven", "even"],
)
def test_an_if_in_an_inner_loop(branches: tuple[int, int], expected: list[tuple[int, int]]) -> None:
    run = pieces(blocks.split(CHOICE), [5, 20, branches[0], branches[1], 20, 5, 1])
    assert [(piece.times, len(piece.code)) for piece in run if piece.code] == expected


@needs_mca
def test_cycles_of_known_code_and_again() -> None:
    chain, empty = ["fadd s0, s0, s1"], []
    apart = [f"fmla v{index}.4s, v30.4s, v31.4s" for index in range(16)]
    for cpu, model, chain_cycles, apart_cycles in (("cortex-a72", "A57Unit", 5, 16), ("neoverse-n1", "N1Unit", 2, 8)):
        one = Mca(cpu, model)
        first = one.cycles([chain, apart, empty, chain])
        assert first[0] == pytest.approx(chain_cycles, rel=0.05)
        assert first[1] == pytest.approx(apart_cycles, rel=0.05)
        assert first[2:] == [1.0, first[0]]
        assert one.cycles([apart]) == Mca(cpu, model).cycles([apart]) == first[1:2]


@needs_mca
def test_llvm_mca_that_does_not_fit_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"does not know the core 'cortex-a7200'.*apt-get install llvm-"):
        Mca("cortex-a7200", "A57Unit")
    with pytest.raises(RuntimeError, match=r"costs 'cortex-a76' by another core's model.*A57Unit.*not N1Unit"):
        Mca("cortex-a76", "N1Unit")
    with pytest.raises(RuntimeError, match="invalid instruction|unrecognized instruction"):
        Mca("cortex-a72", "A57Unit").cycles([["vfmadd231ps x0, x1"]])


def test_missing_tools_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(counts.platform, "machine", lambda: "x86_64")
    with pytest.raises(RuntimeError, match=r"llvm-mca is not installed.*apt-get install llvm-22"):
        mca.find()
    with pytest.raises(RuntimeError, match=r"qemu-aarch64 is not installed.*apt-get install qemu-user"):
        counts.emulator()
    monkeypatch.setattr(counts.platform, "machine", lambda: "aarch64")
    assert counts.emulator() == []


def test_the_newest_llvm_mca_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"llvm-mca", "llvm-mca-14", "llvm-mca-22"}
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in there else None)
    assert mca.find() == Path("/bin/llvm-mca-22")
    there -= {"llvm-mca-14", "llvm-mca-22"}
    assert mca.find() == Path("/bin/llvm-mca")


def test_memory_rule() -> None:
    assert bytes_moved(activations=256 * 1024, weight_bytes=100, l2_kb=1024) == 100  # fits exactly
    assert bytes_moved(activations=256 * 1024 + 1, weight_bytes=100, l2_kb=1024) == 100 + 1024 * 1024 + 4


@pytest.mark.parametrize("name", names())
def test_cores_that_come_with_the_package(name: str) -> None:
    found = core(name)
    assert found.target in ("cortex-a53", "cortex-a55", "cortex-a72", "cortex-a76", "neoverse-n1")
    assert "modelled" in found.description
    assert "measured" not in found.description


def test_a_core_of_ones_own(tmp_path: Path) -> None:
    text = (cores.FOLDER / "cortex-a72.toml").read_text()
    mine = tmp_path / "mine.toml"
    mine.write_text(text.replace("frequency_ghz = 1.5", "frequency_ghz = 1.8"))
    assert core(mine).frequency_ghz == 1.8
    for old, new, message in (
        ("frequency_ghz", "frequency", "Unknown field of .*frequency_ghz"),
        ("frequency_ghz = 1.5", "frequency_ghz = 0", "positive number"),
        ("l2_kb = 1024", "", "lacks l2_kb"),
        ("overlap = true", "overlap = 1", "true or false"),
        ('title = "Cortex-A72', "title = 3 # ", "line of text"),
        ("=", "", "not a TOML file"),
    ):
        mine.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=message):
            core(mine)
    with pytest.raises(ValueError, match="Did you mean 'neoverse-n1'"):
        core("neoverse-m1")
    with pytest.raises(FileNotFoundError, match="no file"):
        core(tmp_path / "other.toml")


@pytest.fixture
def tvm() -> Any:
    return pytest.importorskip("tvm", reason="TVM is not installed (pip install 'pynas[tvm]')")


MBCONV = OpSpec("mbconv", 16, 16, 8, kernel=3, expansion=3)


@pytest.mark.tvm
@needs_arm
@needs_mca
def test_an_op_from_torch_to_milliseconds(tvm: Any, tmp_path: Path) -> None:
    from cost_models.tvm_model import TvmModel
    from pynas.plan import deployed

    runner = TvmModel(core="cortex-a72")
    kernels = runner.kernels(deployed(MBCONV), (1, 16, 8, 8))
    assert len(kernels) == 3
    cycles = sum(kernel.cycles for kernel in kernels)
    assert MBCONV.macs / 4 < cycles < MBCONV.macs  # a 128-bit FMLA per cycle is the most that an A72 does
    assert sum(kernel.bytes_moved for kernel in kernels) >= 4 * (2 * 16 * 48 + 9 * 48)
    table = cost_models.measure(
        [MBCONV], build=deployed, runner=runner, folder=tmp_path / "a72", name="cortex-a72", repeats=3
    )
    assert table.source(MBCONV) == "modelled"
    assert table.spread == 0
    assert "modelled" in table.describe()
    assert "measured" not in table.describe()
    again = TvmModel(core="cortex-a72").time_ms(deployed(MBCONV), MBCONV, 2)
    assert again == pytest.approx([table.cost(MBCONV)] * 2, rel=1e-5)
    assert table.cost(MBCONV) == pytest.approx(sum(kernel.latency_ms for kernel in kernels), rel=1e-5)


@pytest.mark.tvm
@needs_arm
@needs_mca
def test_memory_bounds_what_does_not_fit(tvm: Any, tmp_path: Path) -> None:
    from cost_models.tvm_model import TvmModel
    from pynas.plan import deployed

    slow = tmp_path / "slow.toml"
    text = (cores.FOLDER / "cortex-a72.toml").read_text()
    slow.write_text(text.replace("bandwidth_gb_s = 4.8", "bandwidth_gb_s = 0.001").replace("l2_kb = 1024", "l2_kb = 1"))
    spec = OpSpec("conv", 8, 8, 8)
    (kernel,) = TvmModel(core=str(slow)).kernels(deployed(spec), (1, 8, 8, 8))
    moved = 4 * (8 * 8 * 8 * 2 + 8 * 8 + 8)
    assert kernel.bytes_moved == moved
    assert kernel.memory_ms == pytest.approx(moved / 0.001 * 1e-6)
    assert kernel.latency_ms == kernel.memory_ms
    slow.write_text(slow.read_text().replace("overlap = true", "overlap = false"))
    (after,) = TvmModel(core=str(slow)).kernels(deployed(spec), (1, 8, 8, 8))
    assert after.latency_ms == after.compute_ms + after.memory_ms == kernel.compute_ms + kernel.memory_ms


@pytest.mark.tvm
def test_more_than_one_thread_is_refused(tvm: Any) -> None:
    from cost_models.tvm_model import TvmModel

    with pytest.raises(ValueError, match="one thread only"):
        TvmModel(threads=4)


def shipped() -> list[Path]:
    """Device folders of the package that this model made."""
    found = []
    for file in sorted(places.SHIPPED.glob("*/device.toml")):
        if tomllib.loads(file.read_text())["runner"] == "tvm-model":
            found.append(file.parent)
    return found


@pytest.mark.tvm
@needs_arm
@needs_mca
@pytest.mark.parametrize("folder", shipped(), ids=lambda folder: folder.name)
def test_shipped_rows_are_reproducible(tvm: Any, folder: Path) -> None:
    from cost_models.tvm_model import TvmModel
    from pynas.plan import deployed

    table = cost_models.load_folder(folder)
    runner = TvmModel(core=folder.name)
    here, there = runner.provenance()["software"], table.provenance.software
    if here != there:
        pytest.skip(f"the table was made with {dict(there)}, here is {here}")
    assert runner.schedule == table.provenance.schedule
    assert runner.provenance()["machine"] == table.provenance.machine
    cheap = sorted(table.rows, key=lambda spec: spec.macs)
    for spec in (cheap[0], cheap[len(cheap) // 4], cheap[len(cheap) // 2]):
        assert runner.time_ms(deployed(spec), spec, 1) == [pytest.approx(table.cost(spec), rel=1e-5)], spec.key
