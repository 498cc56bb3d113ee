"""Loops of a function: which blocks belong to which loop, so that each level is costed as one piece of code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .blocks import Block


@dataclass
class Loop:
    """A natural loop, or a whole function's outermost level.

    Numbers are indices into the list of blocks that it was found in.
    """

    header: int
    blocks: frozenset[int]  # with those of inner loops
    inner: list[Loop] = field(default_factory=list)

    @property
    def own(self) -> list[int]:
        """Blocks at this level only, in the order of the text."""
        return sorted(self.blocks.difference(*(loop.blocks for loop in self.inner)))


def functions(blocks: Sequence[Block]) -> list[Loop]:
    """The loops of each function, as trees: the outermost level of a function holds its outer loops.

    Args:
        blocks: of one assembly text, in its order.
    """
    groups: dict[str, list[int]] = {}
    for index, block in enumerate(blocks):
        groups.setdefault(block.function, []).append(index)
    edges = _successors(blocks)
    return [_tree(indices, edges) for indices in groups.values()]


def _successors(blocks: Sequence[Block]) -> list[list[int]]:
    """For each block, the blocks of the same function that may follow it."""
    place = {label: index for index, block in enumerate(blocks) for label in block.labels}
    found: list[list[int]] = []
    for index, block in enumerate(blocks):
        after = [place[target] for target in block.targets if target in place]
        if block.falls_through and index + 1 < len(blocks):
            after.append(index + 1)
        found.append([other for other in after if blocks[other].function == block.function])
    return found


def _tree(indices: list[int], edges: list[list[int]]) -> Loop:
    members: dict[int, set[int]] = {}
    dominators = _dominators(indices, edges)
    before: dict[int, list[int]] = {index: [] for index in indices}
    for index in indices:
        for other in edges[index]:
            before[other].append(index)
    for tail in dominators:
        for head in edges[tail]:
            if dominators[tail] >> (head - indices[0]) & 1:
                members.setdefault(head, {head}).update(_body(head, tail, before, dominators))
    root = Loop(indices[0], frozenset(indices))
    for header, body in sorted(members.items(), key=lambda item: (-len(item[1]), item[0])):
        _insert(root, Loop(header, frozenset(body)))
    return root


def _dominators(indices: list[int], edges: list[list[int]]) -> dict[int, int]:
    """For each reachable block, the set (bits, counted from the first block) of blocks that every path to it meets."""
    first = indices[0]
    order = _reverse_postorder(first, edges)
    before: dict[int, list[int]] = {index: [] for index in order}
    for index in order:
        for other in edges[index]:
            before[other].append(index)
    everything = (1 << len(indices)) - 1
    found = dict.fromkeys(order, everything)
    found[first] = 1
    changed = True
    while changed:
        changed = False
        for index in order[1:]:
            common = everything
            for other in before[index]:
                common &= found[other]
            common |= 1 << (index - first)
            changed |= common != found[index]
            found[index] = common
    return found


def _reverse_postorder(first: int, edges: list[list[int]]) -> list[int]:
    seen, order = {first}, []
    stack = [(first, iter(edges[first]))]
    while stack:
        index, after = stack[-1]
        other = next((each for each in after if each not in seen), None)
        if other is None:
            order.append(index)
            stack.pop()
        else:
            seen.add(other)
            stack.append((other, iter(edges[other])))
    return order[::-1]


def _body(head: int, tail: int, before: dict[int, list[int]], reachable: dict[int, int]) -> set[int]:
    """All blocks from which `tail` is reached without passing `head`, both included."""
    body, waiting = {head, tail}, [tail] if tail != head else []
    while waiting:
        for other in before[waiting.pop()]:
            if other not in body and other in reachable:
                body.add(other)
                waiting.append(other)
    return body


def _insert(outer: Loop, loop: Loop) -> None:
    """Hang a loop into the smallest loop that holds it; larger ones were hung before."""
    for inner in outer.inner:
        if loop.blocks <= inner.blocks:
            return _insert(inner, loop)
    outer.inner.append(loop)
    return None
