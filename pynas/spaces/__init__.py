"""Search spaces: what a network looks like around the places where something can be chosen.

To add a space: one file here with a class that has the members of `pynas.registry.SearchSpace` (lay the network out
once, in `build(pick)`, around named slots), registered in `SPACES`, and its import line below. One of stem, stages and
head derives from `layerwise.Layerwise` and says only what is its own. The contract tests in `tests/test_spaces.py` pick
it up by its registration.

Named so far:

- `fbnet`: the paper's space; 224 pixels, 22 layers, 9^22 networks.
- `fbnet32`: the same layers and widths for 32-pixel images: stem and the 24-channel stage keep the resolution, so the
  stages see 32, 32, 32, 16, 8, 8, 4 pixels and end at 4. The paper defines no such space; these strides are ours.
- `fbnet_tiny`: six layers for 16-pixel images (stem 8; 8 | 16 x2 | 24 x2 | 48; head 128), small enough to search on one
  core in a minute.
- `fairnas`: FairNAS's; 224 pixels, 19 layers, 6^19 networks.
- `fairnas_v1`: the same with 16 layers, after the first version of its paper.
- `cell`: DARTS's and SNAS's; 32 pixels, two cells of 14 edges with 8 operations each, stacked to a network.
- `macro`: NAS-Bench-Macro's; 32 pixels, 8 layers, 3^8 networks, whose accuracies are known.
- `repnas`: RepNAS's; any subset of seven branches for each convolution of a host network. Hosts: see `hosts.py`.
"""

from pynas.registry import SPACES
from pynas.spaces import cell, fairnas, fbnet, hosts, repnas

__all__ = ["SPACES", "cell", "fairnas", "fbnet", "hosts", "repnas"]
