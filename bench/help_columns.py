"""Per-op tables fitted from whole networks of six devices: how many networks it takes, and how well it goes.

python bench/help_columns.py fbnet_latency.npz

The file holds latencies of 5,000 networks of FBNet's 32-pixel space, as published with HELP (Lee et al. 2021). raspi4,
pixel3 and eyeriss are sums of a per-op table, so they can only show that the fit recovers one. The columns of the two
Xeons and of the GPU are timings of whole networks: they can judge whether a device is additive.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from cost_models import OpSpec
from cost_models.additive import fit_rows, fit_table
from cost_models.agreement import Agreement, agreement
from pynas.plan import make_space
from pynas.registry import FAMILIES

SIZES = (50, 100, 200, 500, 1000, 4000)
TEST = 1000  # the last ones: never fitted on
DRAWS = 3  # different training networks for each size

Nets = list[tuple[OpSpec, ...]]


def networks(arch: np.ndarray, options: list[str]) -> Nets:
    """Ops of each network; the space is the 32-pixel one with CIFAR-100's classes."""
    space = make_space("fbnet32", {"classes": 100})
    specs = [[FAMILIES.get(slot.family).spec(slot, name) for name in options] for slot in space.slots()]
    fixed = space.fixed_specs()
    return [(*(specs[layer][option] for layer, option in enumerate(net)), *fixed) for net in arch]


def line_in_macs(train: Nets, latency: np.ndarray, test: Nets) -> np.ndarray:
    """The regression that needs no table: latency = a + b * MACs."""
    macs = [np.array([sum(spec.macs for spec in net) for net in nets]) for nets in (train, test)]
    slope, start = np.polyfit(macs[0], latency, 1)
    return np.asarray(start + slope * macs[1])


def judged(nets: Nets, latency: np.ndarray, size: int) -> tuple[Agreement, Agreement]:
    """Sums of fitted ops and the line in MACs on the test networks: the draw with the median error."""
    pool = len(nets) - TEST
    found = []
    for draw in range(DRAWS):
        start = draw * (pool - size) // max(DRAWS - 1, 1)  # runs of neighbours, as a user would time them
        train, timings = nets[start : start + size], latency[start : start + size]
        rows = fit_rows(train, timings.tolist())
        seen = [
            index for index in range(pool, len(nets)) if set(nets[index]) - skips(nets[index]) <= set(rows.latency_ms)
        ]
        test, truth = [nets[index] for index in seen], latency[seen]
        sums = [rows.predict_ms(net) for net in test]
        found.append((agreement(sums, truth), agreement(line_in_macs(train, timings, test), truth)))
    return sorted(found, key=lambda pair: pair[0].error)[DRAWS // 2]


def skips(net: tuple[OpSpec, ...]) -> set[OpSpec]:
    return {spec for spec in net if spec.kind == "skip"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--columns", nargs="+", default=None, help="such as raspi4 2080ti_1; all by default")
    arguments = parser.parse_args()
    data = np.load(arguments.file)
    nets = networks(data["arch"], [str(name) for name in data["ops"]])
    columns = arguments.columns or [name.removeprefix("lat_") for name in data.files if name.startswith("lat_")]
    for column in columns:
        latency = data[f"lat_{column}"].astype(np.float64)
        print(f"\n{column}: {latency.min():.4g} to {latency.max():.4g} ms; judged on {TEST} networks left out")
        print(f"{'nets':>6}{'error':>10}{'tau':>8}{'R2':>8}   MACs only:{'error':>8}{'tau':>8}{'R2':>8}")
        for size in SIZES:
            sums, line = judged(nets, latency, size)
            print(
                f"{size:6}{sums.error:10.4%}{sums.kendall:8.3f}{sums.r2:8.3f}{'':14}"
                f"{line.error:8.2%}{line.kendall:8.3f}{line.r2:8.3f}"
            )
        print(fit_table(nets, latency.tolist()))


if __name__ == "__main__":
    main()
