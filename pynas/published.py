"""The papers' own architectures, as data."""

from __future__ import annotations

import re
from typing import Any

from pynas.architecture import Architecture
from pynas.registry import Registry
from pynas.spaces import SPACES

# FBNet, one line a net, stages separated by |; "-" is skip. A, B and C stand in mobile-vision's lists and AA-FBNet's;
# S8, iPhoneX and 96-0.35-1 in the latter only, read there from the paper's figure.
# B: layer 11 is k5_e1, which alone gives the paper's 295M; mobile-vision has k5_e6.
_FBNET = {
    "fbnet_a": "- | k3e3 k3e1 - - | k5e6 k3e3 k5e1 k3e3 | k5e6 k5e3 k5e1g2 k5e6 | k3e6 k5e1g2 k5e3 k3e1g2 "
    "| k5e6 k5e6 k5e3 k5e6 | k5e6",
    "fbnet_b": "k3e1 | k3e6 k5e1 k3e1 k3e1 | k5e6 k5e3 k3e6 k5e6 | k5e6 k5e1 - k5e3 | k5e6 k3e1 k5e1 k5e3 "
    "| k5e6 k5e1 k5e6 k5e6 | k3e6",
    "fbnet_c": "k3e1 | k3e6 - k3e1 k3e1 | k5e6 k5e3 k5e6 k3e6 | k5e6 k5e3 k5e6 k5e6 | k5e6 k5e6 k5e6 k5e3 "
    "| k5e6 k5e6 k5e6 k5e6 | k3e6",
    "fbnet_s8": "k3e1 | k3e3 k3e1 - - | k5e6 k3e3 k3e3 k3e6 | k5e6 k5e3 k5e3 k5e3 | k3e6 k5e3 k5e3 k5e3 "
    "| k5e6 k5e6 k5e3 k5e6 | k5e6",
    "fbnet_iphonex": "- | k3e6 k3e1 k3e1 k3e1 | k3e6 k3e6 k3e6 k3e6 | k3e6 k3e6 k3e3 k3e6 | k3e6 k3e3 k3e3 k3e3 "
    "| k5e6 k5e6 k5e6 k5e3 | k5e6",
    "fbnet_96_035_1": "k3e1 | k3e6 k3e6 - - | k5e6 k5e6 - - | k5e6 - - - | k3e6 - - - | k5e6 k5e6 - - | k5e6",
}
_FBNET_OPTIONS: dict[str, dict[str, Any]] = {
    "fbnet_b": {"head_channels": 1984},
    "fbnet_c": {"head_channels": 1984},
    "fbnet_96_035_1": {"input_size": 96, "width": 0.35, "head_channels": 1416},
}

# FairNAS, read from the released code: "e,K" a layer, stages separated by |.
_FAIRNAS = {
    "fairnas_a": "3,7 3,3 | 3,7 6,3 6,7 3,3 | 3,3 6,7 6,7 3,5 | 6,3 3,5 3,5 6,3 | 6,3 6,7 6,3 6,7 | 6,5",
    "fairnas_b": "3,5 3,3 | 3,5 3,3 6,3 3,5 | 3,7 3,3 6,3 3,5 | 3,3 6,3 3,7 3,3 | 6,7 6,5 6,7 6,3 | 6,5",
    "fairnas_c": "3,5 3,3 | 3,7 3,3 3,3 3,3 | 3,3 3,3 3,3 6,3 | 3,3 3,3 3,3 3,3 | 6,7 6,7 6,3 6,3 | 6,5",
}
_FAIRNAS_SE = {"squeeze": 0.5, "activation": "swish"}

# Cells, read from the released code of SNAS and DARTS: for every node its edges, "operation(source)", nodes separated
# by ";", the normal cell and then the reduction. 0 and 1 are the inputs, 2 the first node.
_CELLS = {
    "snas_mild": (
        "sep3(0) sep3(1); skip(0) dil3(1); skip(0) skip(1); skip(0) sep3(1)",
        "max(0) max(1); max(1) skip(2); max(1) skip(2); max(0) dil5(2)",
    ),
    "snas_moderate": (
        "dil5(0) skip(1); sep3(0) skip(1); skip(0) skip(1); sep3(0) dil5(1)",
        "max(0) max(1); sep5(0) dil5(1); sep5(0) sep5(1); sep5(0) sep5(1)",
    ),
    "snas_aggressive": (
        "sep5(0) skip(1); skip(0) skip(1); skip(0) dil5(1); skip(0) dil5(1)",
        "sep5(0); sep5(0); ;",
    ),
    "darts_v1": (
        "sep3(1) sep3(0); skip(0) sep3(1); skip(0) sep3(1); sep3(0) skip(2)",
        "max(0) max(1); skip(2) max(0); max(0) skip(2); skip(2) avg(0)",
    ),
    "darts_v2": (
        "sep3(0) sep3(1); sep3(0) sep3(1); sep3(1) skip(0); skip(0) dil3(2)",
        "max(0) max(1); skip(2) max(1); max(0) skip(2); skip(2) max(1)",
    ),
}
_CELL_OPERATIONS = {
    "max": "max_pool_3x3",
    "avg": "avg_pool_3x3",
    "skip": "skip_connect",
    "sep3": "sep_conv_3x3",
    "sep5": "sep_conv_5x5",
    "dil3": "dil_conv_3x3",
    "dil5": "dil_conv_5x5",
}
_CIFAR = {"cells": 20, "channels": 36, "affine": True}
_IMAGENET = {"cells": 14, "channels": 48, "affine": True, "stem": "imagenet", "input_size": 224, "classes": 1000}

PUBLISHED: Registry[Architecture] = Registry("published net")


def _fbnet(line: str, options: dict[str, Any]) -> Architecture:
    names = line.replace("|", " ").split()
    return _member("fbnet", options, ["skip" if n == "-" else n[:2] + "_" + n[2:].replace("g", "_g") for n in names])


def _fairnas(line: str, options: dict[str, Any]) -> Architecture:
    layers = [layer.split(",") for layer in line.replace("|", " ").split()]
    return _member("fairnas", options, [f"k{kernel}_e{expansion}" for expansion, kernel in layers])


def _cells(name: str, options: dict[str, Any]) -> Architecture:
    space = SPACES.get("cell")(**options, pool_norm=not name.startswith("darts"))
    chosen = {choice.name: ("none",) for choice in space.choices()}
    for cell, nodes in zip(("normal", "reduce"), _CELLS[name], strict=True):
        for node, edges in enumerate(nodes.split(";"), 2):
            for operation, source in re.findall(r"(\w+)\((\d)\)", edges):
                chosen[f"{cell}_{source}_{node}"] = (_CELL_OPERATIONS[operation],)
    return Architecture("cell", chosen, space.options())


def _member(name: str, options: dict[str, Any], layers: list[str]) -> Architecture:
    space = SPACES.get(name)(**options)
    choices = {choice.name: (layer,) for choice, layer in zip(space.choices(), layers, strict=True)}
    return Architecture(name, choices, space.options())


def published(name: str) -> Architecture:
    """An architecture printed in a paper.

    FBNet (arXiv 1812.03443): `fbnet_a`, `fbnet_b`, `fbnet_c`, `fbnet_s8` (found for the Samsung Galaxy S8),
    `fbnet_iphonex`, `fbnet_96_035_1` (96-pixel input, width 0.35). The head of S8 and iPhoneX, 1504 channels, is an
    assumption; parameters come out somewhat above the paper's for B and C while the MACs agree.

    FairNAS (arXiv 1907.01845): `fairnas_a`, `fairnas_b`, `fairnas_c`, and `fairnas_a_se`, `fairnas_b_se`,
    `fairnas_c_se` with squeeze-and-excitation and swish, whose parameters are those of the released nets while their
    multiply-adds, and that their activation is swish throughout, are unverified.

    SNAS (arXiv 1812.09926) and DARTS (arXiv 1806.09055): `snas_mild`, `snas_moderate`, `snas_aggressive`, `darts_v1`,
    `darts_v2` for CIFAR-10 (20 cells, 36 channels), and the same with `_imagenet` (14 cells, 48 channels). Without the
    auxiliary head, which `with_options(auxiliary=True)` adds. The released cells of SNAS have fewer parameters than its
    article says (2.9M, 2.8M and 2.3M).

    Raises:
        ValueError: If there is no such net; the message lists them.

    >>> published("fbnet_a").choices["layer2"]
    ('k3_e3',)
    """
    return PUBLISHED.get(name)


for _name, _line in _FBNET.items():
    PUBLISHED.add(_name, _fbnet(_line, _FBNET_OPTIONS.get(_name, {})))
for _name, _line in _FAIRNAS.items():
    PUBLISHED.add(_name, _fairnas(_line, {}))
for _name, _line in _FAIRNAS.items():
    PUBLISHED.add(f"{_name}_se", _fairnas(_line, _FAIRNAS_SE))
for _name in _CELLS:
    PUBLISHED.add(_name, _cells(_name, _CIFAR))
for _name in _CELLS:
    PUBLISHED.add(f"{_name}_imagenet", _cells(_name, _IMAGENET))
