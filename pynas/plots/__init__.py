"""Pictures of searches, for notebooks and for `pynas report`. matplotlib loads when one is drawn, not before.

Every `plot_x(run)` takes a run or its folder and returns a matplotlib figure of the width that is asked for, in pixels;
beside it stands a `read_x(run)` that gives the numbers. To add a picture: a file here (or functions in one of these)
with both, drawn by `style` alone (its colours have counterparts on dark pages), its line below and in `pynas.__all__`;
then a section that shows it, see `pynas.report`.
"""

from pynas.plots.curves import plot_curves
from pynas.plots.history import plot_entropy, plot_theta
from pynas.plots.latency import plot_latency, plot_layers, plot_trained
from pynas.plots.network import plot_network
from pynas.plots.pareto import plot_pareto

__all__ = [
    "plot_curves",
    "plot_entropy",
    "plot_latency",
    "plot_layers",
    "plot_network",
    "plot_pareto",
    "plot_trained",
    "plot_theta",
]
