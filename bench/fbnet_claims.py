"""Two claims of FBNet's article, from latency tables: MACs are no latency, and the best network depends on the device.

python bench/fbnet_claims.py --space fbnet --devices cortex-a55 neoverse-n1 host
"""

from __future__ import annotations

import argparse

import cost_models
from pynas.device_claims import NETS, devices_claim, macs_claim
from pynas.plan import make_space


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="fbnet")
    parser.add_argument("--devices", nargs="+", default=["cortex-a55", "neoverse-n1", "host"])
    parser.add_argument("--nets", type=int, default=NETS, help="random networks of the space")
    arguments = parser.parse_args()
    space = make_space(arguments.space, {})
    tables = {name: cost_models.load(name) for name in arguments.devices}
    for table in tables.values():
        print(table.describe())
    print("\nFewer MACs is not faster")
    for name, table in tables.items():
        print(macs_claim(space, name, table, nets=arguments.nets))
    print("\nThe best network for one device is not the best for another")
    print(devices_claim(space, tables, nets=arguments.nets))


if __name__ == "__main__":
    main()
