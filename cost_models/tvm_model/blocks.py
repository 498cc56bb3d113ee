"""AArch64 assembly as basic blocks: splitting, and a counter at the start of each.

A counter needs two scratch registers and no flags. The stack pointer is moved before they are stored, because the
procedure call standard gives no red zone: a signal may overwrite what lies below it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

COUNTERS = "kernel_counters"  # `cost_models.tvm_build.program` writes what lies from here to `kernel_counters_end`

_LABEL = re.compile(r"\s*([A-Za-z_.$][\w.$]*):")
_NAME = re.compile(r"(?<![\w.$])[A-Za-z_.$][\w.$]*")
_IF = "eq|ne|cs|hs|cc|lo|mi|pl|vs|vc|hi|ls|ge|lt|gt|le"
_BRANCH = re.compile(rf"b|bc?\.(?:{_IF}|al)|b(?:{_IF})|cbn?z|tbn?z|br|ret|braaz?|brabz?|reta[ab]|brk|udf|hlt")
_ALWAYS = re.compile(r"b|br|ret|braaz?|brabz?|reta[ab]|brk|udf|hlt")
_CALL = re.compile(r"bl|blr|blraaz?|blrabz?")
_TABLE = re.compile(r"\s*\.(?:byte|hword|word|xword|2byte|4byte|8byte)\s+(.*)")


@dataclass(frozen=True)
class Block:
    """Instructions that run together: entered at the first only, left after the last only.

    A call does not end a block, because it comes back.
    """

    function: str
    labels: tuple[str, ...]
    instructions: tuple[str, ...]  # one blank between mnemonic and operands, no comments
    targets: tuple[str, ...]  # labels that its last instruction may branch to
    falls_through: bool  # to the next block of the same function
    line: int  # of its first instruction, from 0

    @property
    def calls(self) -> tuple[str, ...]:
        """The names of the functions it calls or jumps to; "" for a call through a register."""
        found = []
        for instruction in self.instructions:
            mnemonic, _, operand = instruction.partition(" ")
            if _CALL.fullmatch(mnemonic):
                found.append(operand if mnemonic == "bl" else "")
            elif mnemonic == "b" and not operand.startswith(".L"):
                found.append(operand)
        return tuple(found)


@dataclass
class _Line:
    labels: tuple[str, ...]
    instruction: str
    number: int


def split(assembly: str) -> list[Block]:
    """Basic blocks in the order of the text.

    Labels count only where a branch, a jump table or a symbol can lead to them; labels of debug information do not.

    Raises:
        ValueError: there is no instruction.
    """
    entries = _reachable(assembly)
    blocks: list[Block] = []
    function, tables = "", _tables(assembly)
    pending: list[_Line] = []
    for line in _instructions(assembly):
        symbols = [label for label in line.labels if not label.startswith(".L")]
        if pending and (symbols or entries.intersection(line.labels)):
            blocks.append(_block(function, pending, tables, falls=not symbols))
            pending = []
        function = symbols[-1] if symbols else function
        pending.append(line)
        if _BRANCH.fullmatch(_mnemonic(line.instruction)):
            blocks.append(_block(function, pending, tables, falls=True))
            pending = []
    if pending:
        blocks.append(_block(function, pending, tables, falls=False))
    if not blocks:
        raise ValueError("The assembly text holds no instruction; it was cut off, or it is not assembly.")
    return blocks


def instrument(assembly: str, blocks: Iterable[Block]) -> str:
    """The same program with a 64-bit counter per block, in their order, from the symbol `kernel_counters` on.

    Results, flags and registers stay as they were.

    Args:
        assembly: GNU syntax, AArch64 Linux, as LLVM writes it.
        blocks: of `split(assembly)`.
    """
    lines = assembly.splitlines()
    count = 0
    for index, block in enumerate(blocks):
        lines[block.line] = f"{_increment(8 * index)}\n{lines[block.line]}"
        count += 1
    return "\n".join([*lines, _COUNTERS.format(bytes=8 * count, start=COUNTERS)])


def code_lines(block: Block) -> list[str]:
    """What llvm-mca is asked about: no calls (their code is counted where it lies), no returns, labels made alike."""
    kept = []
    for instruction in block.instructions:
        mnemonic = _mnemonic(instruction)
        if _CALL.fullmatch(mnemonic) or mnemonic.startswith("ret"):
            continue
        kept.append(re.sub(r"(?<![\w.$])\.L[\w.$]*", ".Lx", instruction))
    return kept


def _increment(offset: int) -> str:
    at = f"{COUNTERS}+{offset}"
    return (
        f"\tstp x16, x17, [sp, #-16]!\n\tadrp x16, {at}\n\tldr x17, [x16, :lo12:{at}]\n\tadd x17, x17, #1\n"
        f"\tstr x17, [x16, :lo12:{at}]\n\tldp x16, x17, [sp], #16"
    )


_COUNTERS = """
	.bss
	.p2align 4
	.globl {start}
{start}:
	.zero {bytes}
	.globl {start}_end
{start}_end:
"""


def _mnemonic(instruction: str) -> str:
    return instruction.partition(" ")[0]


def _instructions(assembly: str) -> Iterable[_Line]:
    """Every instruction with the labels before it."""
    labels: list[str] = []
    for number, text in enumerate(assembly.splitlines()):
        rest = text
        while match := _LABEL.match(rest):
            labels.append(match.group(1))
            rest = rest[match.end() :]
        rest = " ".join(rest.split("//")[0].split())
        if not rest or rest.startswith((".", "#")):
            continue
        yield _Line(tuple(labels), rest, number)
        labels = []


def _reachable(assembly: str) -> set[str]:
    """Local labels that branches or jump tables name, and all that LLVM calls a block."""
    named: set[str] = set(re.findall(r"^\s*(\.LBB[\w.$]*):", assembly, re.MULTILINE))
    for line in _instructions(assembly):
        if _BRANCH.fullmatch(_mnemonic(line.instruction)):
            named.update(_NAME.findall(line.instruction))
    return {name for name in named if name.startswith(".L")}


def _tables(assembly: str) -> tuple[str, ...]:
    """Block labels that data name: what a branch through a register may lead to."""
    found: dict[str, None] = {}
    for text in assembly.splitlines():
        if match := _TABLE.match(text):
            found.update(dict.fromkeys(re.findall(r"\.LBB[\w.$]*", match.group(1))))
    return tuple(found)


def _block(function: str, lines: list[_Line], tables: tuple[str, ...], falls: bool) -> Block:
    last = lines[-1].instruction
    mnemonic = _mnemonic(last)
    targets: tuple[str, ...] = ()
    if _BRANCH.fullmatch(mnemonic):
        falls = falls and not _ALWAYS.fullmatch(mnemonic)
        through_register = mnemonic.startswith("br") and mnemonic != "brk"
        targets = tables if through_register else tuple(_NAME.findall(last.partition(" ")[2])[-1:])
    labels = tuple(label for line in lines for label in line.labels)
    return Block(function, labels, tuple(line.instruction for line in lines), targets, falls, lines[0].number)
