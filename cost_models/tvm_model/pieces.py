"""From counted blocks to pieces of code that llvm-mca can cost: one per loop level.

Blocks of one loop level that run equally often are costed as one piece of straight code, repeated: so the end of a
tile overlaps with the start of the next one, as it does in an out-of-order core, and a chain of additions starts anew
where the code starts it anew. An inner loop that makes the same few turns each time is unrolled into the piece of the
loop around it, so that the wait for its last results is not forgotten; a longer one is a piece of its own, costed as
if it never ended.

Only counts are known, not which turn did what:
- A branch of an if/else that never ran is left out, and the loop unrolled as if the code had no choice.
- Where both ran, their counts differ from the loop's. Then neither this loop nor any around it is unrolled: blocks of
  a level that ran equally often are a piece, so each branch is one of its own (both together are one, as if one
  followed the other, should they have run equally often), and waits between branch and rest are not seen.
- An inner loop whose number of turns varies is taken to make the mean number each time, where that is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .blocks import Block, code_lines
from .loops import Loop, functions

UNROLLED = 2000  # instructions; beyond, what happens at an end of the inner loop is under 1 % of its time


@dataclass(frozen=True)
class Piece:
    """Straight code that runs `times` times."""

    function: str
    code: tuple[str, ...]
    times: int


def pieces(blocks: Sequence[Block], counts: Sequence[int]) -> list[Piece]:
    """Pieces that stand for everything that ran, in the order of the text.

    Args:
        blocks: of one assembly text, in its order.
        counts: how often each ran.
    """
    found: list[Piece] = []
    for root in functions(blocks):
        _pieces_of(root, blocks, counts, found)
    return found


def _pieces_of(loop: Loop, blocks: Sequence[Block], counts: Sequence[int], found: list[Piece]) -> None:
    groups: dict[int, list[int]] = {}
    for index in loop.own:
        if counts[index]:
            groups.setdefault(counts[index], []).append(index)
    if not groups:
        for inner in loop.inner:
            _pieces_of(inner, blocks, counts, found)
        return
    turns = max(groups, key=lambda times: (sum(len(blocks[index].instructions) for index in groups[times]), times))
    flat = _flat(loop, turns, blocks, counts)
    if flat is not None:
        found.append(Piece(blocks[loop.header].function, tuple(flat), turns))
        return
    for times, members in groups.items():
        code = [line for index in members for line in code_lines(blocks[index])]
        found.append(Piece(blocks[loop.header].function, tuple(code), times))
    for inner in loop.inner:
        _pieces_of(inner, blocks, counts, found)


def _flat(loop: Loop, turns: int, blocks: Sequence[Block], counts: Sequence[int]) -> list[str] | None:
    """The code of one turn with its inner loops unrolled; None if it is too long or turns differ."""
    parts: list[tuple[int, list[str]]] = []
    for index in loop.own:
        if counts[index] == turns:
            parts.append((index, code_lines(blocks[index])))
        elif counts[index]:
            return None
    for inner in loop.inner:
        if not any(counts[index] for index in inner.blocks):
            continue
        inner_turns = counts[inner.header]
        if inner_turns % turns:
            return None
        body = _flat(inner, inner_turns, blocks, counts)
        if body is None or len(body) * (inner_turns // turns) > UNROLLED:
            return None
        parts.append((inner.header, body * (inner_turns // turns)))
    flat = [line for _, lines in sorted(parts, key=lambda part: part[0]) for line in lines]
    return flat if len(flat) <= UNROLLED else None
