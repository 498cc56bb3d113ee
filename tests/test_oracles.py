"""Published networks against the figures of their papers."""

from __future__ import annotations

import pytest

import pynas
from pynas.published import PUBLISHED

# Exact figures: fbnet_a's are given; the others were counted once and agree with the paper's (millions, rounded) beside
# them.
EXACT = {
    "fbnet_a": (4_321_464, 249_921_848),
    "fbnet_b": (4_813_048, 296_614_728),
    "fbnet_c": (5_572_200, 384_960_160),
    "fbnet_s8": (4_468_296, 292_922_680),
    "fbnet_iphonex": (4_511_320, 321_798_968),
    "fbnet_96_035_1": (1_845_384, 12_944_208),
}
PAPER_MACS = {
    "fbnet_a": 249,
    "fbnet_b": 295,
    "fbnet_c": 375,
    "fbnet_s8": 293,
    "fbnet_iphonex": 322,
    "fbnet_96_035_1": 12.9,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts(name: str) -> None:
    architecture = pynas.published(name)
    size = architecture.search_space().input_size
    counts = pynas.count(architecture.build(), (3, size, size))
    assert (counts.params, counts.macs) == EXACT[name]
    # C was published with fewer multiply-adds than any reading of its blocks gives: 2.7 % off, as in mobile-vision.
    assert counts.macs / 1e6 == pytest.approx(PAPER_MACS[name], rel=0.03)


def test_fbnet_a_is_the_papers_list() -> None:
    chosen = [options[0] for options in pynas.published("fbnet_a").choices.values()]
    assert chosen[:9] == ["skip", "k3_e3", "k3_e1", "skip", "skip", "k5_e6", "k3_e3", "k5_e1", "k3_e3"]
    assert chosen[11] == "k5_e1_g2"
    assert chosen.count("skip") == 3


def test_unknown_net() -> None:
    with pytest.raises(ValueError, match="Did you mean 'fbnet_a'"):
        pynas.published("fbnet-a")
