"""The papers' own architectures, as data."""

from __future__ import annotations

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

PUBLISHED: Registry[Architecture] = Registry("published net")


def _fbnet(line: str, options: dict[str, Any]) -> Architecture:
    names = line.replace("|", " ").split()
    layers = [("skip",) if n == "-" else (n[:2] + "_" + n[2:].replace("g", "_g"),) for n in names]
    space = SPACES.get("fbnet")(**options)
    choices = {choice.name: layer for choice, layer in zip(space.choices(), layers, strict=True)}
    return Architecture("fbnet", choices, space.options())


def published(name: str) -> Architecture:
    """An architecture printed in a paper.

    FBNet (arXiv 1812.03443): `fbnet_a`, `fbnet_b`, `fbnet_c`, `fbnet_s8` (found for the Samsung Galaxy S8),
    `fbnet_iphonex`, `fbnet_96_035_1` (96-pixel input, width 0.35). The head of S8 and iPhoneX, 1504 channels, is an
    assumption; parameters come out somewhat above the paper's for B and C while the MACs agree.

    Raises:
        ValueError: If there is no such net; the message lists them.

    >>> published("fbnet_a").choices["layer2"]
    ('k3_e3',)
    """
    return PUBLISHED.get(name)


for _name, _line in _FBNET.items():
    PUBLISHED.add(_name, _fbnet(_line, _FBNET_OPTIONS.get(_name, {})))
