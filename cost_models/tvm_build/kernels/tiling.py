"""How much of the output is computed at a time: channels in vectors, vectors in blocks, pixels in strips."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..layers import Conv

if TYPE_CHECKING:
    from ..targets import Target

Order = Literal["channels", "pixels"]

# Sums that are formed at the same time. More of them save loads, which machines that run ahead do not need; fewer let
# the last stores of one tile overlap with the first products of the next.
_SUMS = {"x86": 16, "aarch64": 32, "armv7": 16}


class Tile(NamedTuple):
    """What one pass of an inner loop computes.

    Args:
        pixels: Output pixels.
        vectors: Vectors of output channels for each of them.
        lanes: Channels in a vector.
        order: What the outer loops run over first. "channels": the weights of some channels stay in the cache while
            all pixels pass; "pixels": the pixels stay while all weights pass.
    """

    pixels: int
    vectors: int
    lanes: int
    order: Order = "pixels"


@dataclass(frozen=True)
class Block:
    """`count` neighbouring groups of channels that are treated alike, each as vectors of the given widths."""

    start: int
    count: int
    widths: tuple[int, ...]

    @property
    def channels(self) -> int:
        return sum(self.widths)


@dataclass(frozen=True)
class Strip:
    """`count` neighbouring runs of `size` output columns that see the same border.

    `taps[column][t]` says whether the kernel's column t falls inside the image for the run's given column.
    """

    start: int
    count: int
    size: int
    taps: tuple[tuple[bool, ...], ...]


@dataclass(frozen=True)
class Share:
    """`count` neighbouring parts of `size` each."""

    start: int
    count: int
    size: int


def shares(total: int, most: int) -> list[Share]:
    """`total` in as few parts of at most `most` as possible, of sizes that differ by at most one."""
    parts = -(-total // most)
    size, larger = divmod(total, parts)
    found = [Share(0, larger, size + 1), Share(larger * (size + 1), parts - larger, size)]
    return [share for share in found if share.count]


def widths(channels: int, lanes: int) -> list[int]:
    """Vectors that cover the channels exactly: full ones, then ever narrower powers of two."""
    found = [lanes] * (channels // lanes)
    rest, width = channels % lanes, lanes // 2
    while rest:
        if rest >= width:
            found.append(width)
            rest -= width
        width //= 2
    return found


def blocks(channels: int, lanes: int, vectors: int) -> list[Block]:
    """The channels as groups of at most `vectors` vectors, of even size; neighbours that are alike go together."""
    vector = widths(channels, lanes)
    groups: list[tuple[int, ...]] = []
    for share in shares(len(vector), vectors):
        for index in range(share.count):
            first = share.start + index * share.size
            groups.append(tuple(vector[first : first + share.size]))
    found: list[Block] = []
    start = 0
    for alike, members in groupby(groups):
        count = len(list(members))
        found.append(Block(start, count, alike))
        start += count * sum(alike)
    return found


def strips(layer: Conv, most: int) -> list[Strip]:
    """The output's columns in runs of at most `most`; those that see the same part of the border go together."""
    runs: list[tuple[int, int, tuple[tuple[bool, ...], ...]]] = []
    for share in shares(layer.out_width, most):
        for index in range(share.count):
            first = share.start + index * share.size
            taps = tuple(
                tuple(_inside(layer, first + column, tap) for tap in range(layer.kernel))
                for column in range(share.size)
            )
            runs.append((first, share.size, taps))
    found = []
    for (size, taps), members in groupby(runs, key=lambda run: run[1:]):
        starts = [member[0] for member in members]
        found.append(Strip(starts[0], len(starts), size, taps))
    return found


def _inside(layer: Conv, column: int, tap: int) -> bool:
    return 0 <= column * layer.stride - layer.padding + tap * layer.dilation < layer.width


def by_lane(target: Target) -> int:
    """How many neighbouring inputs are loaded at once to be multiplied lane by lane; 1 where the machine broadcasts."""
    return 4 if target.family == "aarch64" else 1


def product_tiles(
    target: Target, pixels: int, channels: int, depth: int, most_vectors: int = 4
) -> list[tuple[int, int]]:
    """Pairs (pixels, vectors) for a matrix product whose sums fit the registers, the one with least waste first.

    Args:
        target: For its registers and lanes.
        pixels: How many of them lie next to each other.
        channels: Of the output, in one group.
        depth: Products in each sum.
        most_vectors: Bound on the second of the pair.
    """
    lanes, held = target.lanes, by_lane(target) > 1
    reserve = 4 if target.family == "armv7" else 2
    found: dict[tuple[int, int], float] = {}
    for vectors in range(1, min(most_vectors, len(widths(channels, lanes))) + 1):
        spare = target.registers - reserve - vectors
        rows = max(1, min(8, _SUMS[target.family] // vectors, spare // (vectors + 1) if held else spare // vectors))
        for size in range(1, rows + 1):
            found[size, vectors] = _cost(size, pixels, channels, lanes, vectors, depth, held)
    return sorted(found, key=lambda pair: (found[pair], -pair[0] * pair[1]))


def _cost(rows: int, pixels: int, channels: int, lanes: int, vectors: int, depth: int, held: bool) -> float:
    """Rough cycles: multiplications, loads beside them, the latency of a sum, and what a tile costs besides."""
    total = 0.0
    for block in blocks(channels, lanes, vectors):
        work = sum(max(width / lanes, 0.5) for width in block.widths)
        for share in shares(pixels, rows):
            loads = 0.5 * (len(block.widths) + share.size * (0.25 if held else 1.0))
            inner = max(share.size * work + 0.15 * loads, loads, 4.0)
            total += block.count * share.count * (inner * depth + 2.0 * share.size * len(block.widths) + 6.0)
    return total
