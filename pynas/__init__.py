"""Hardware-aware neural architecture search.

>>> import pynas
>>> net = pynas.published("fbnet_a").build()
>>> pynas.count(net, (3, 224, 224))
Counts(params=4321464, macs=249921848)

The front door is `search`; `retrain`, `evaluate`, `export` and `measure` do its parts alone, `deploy` writes every
format, and `from_pretrained` reads what `run.save_pretrained` wrote. `check_table` and `fit_table` look after latency
tables, `fairness` says whether the options of a search had equal chances, `rank` how well it orders networks, `report`
writes one page of everything, `runs` lists what there is, and the `plot_` functions draw what was found and how. `rep`
gives networks of your own branches to train with. Everything with a name (spaces, strategies, formats, devices) is
listed by `pynas list`.
"""

import cost_models
import pynas.export
import pynas.report  # noqa: F401  loads the packages before their names become the functions'
from pynas import compare as _compare
from pynas import deploy as _deploy
from pynas import fuse as _fuse
from pynas import published as _published
from pynas import rank as _rank
from pynas import rep, timm_models
from pynas.architecture import Architecture
from pynas.choices import Choice, Gates, Slot
from pynas.counting import Counts, count
from pynas.evolution import EvolutionSettings
from pynas.hub import from_pretrained
from pynas.registry import FAMILIES, SPACES, STRATEGIES, MissingExtra
from pynas.results import Run, Trained
from pynas.strategies.darts import DARTS
from pynas.strategies.ef import EF
from pynas.strategies.enas import ENAS
from pynas.strategies.fairnas import FairNAS
from pynas.strategies.fbnet import FBNet
from pynas.strategies.one_shot import OneShot
from pynas.strategies.random import RandomSearch
from pynas.strategies.repnas import RepNAS
from pynas.strategies.snas import SNAS
from pynas.strategies.spos import SPOS
from pynas.strategies.uniform import Uniform
from pynas.supernet import Supernet
from pynas.training.train import Recipe
from pynas.truth import Truth, read_truth

from pynas.api import evaluate, retrain, search  # isort: skip
from pynas.exporting import export  # isort: skip
from pynas.measuring import check_table, fit_table, measure  # isort: skip
from pynas.draw import draw_cells, draw_credit, draw_strip  # isort: skip
from pynas.plots import (  # isort: skip
    plot_curves,
    plot_entropy,
    plot_latency,
    plot_layers,
    plot_network,
    plot_pareto,
    plot_theta,
    plot_trained,
)
from pynas.report.listing import runs  # isort: skip
from pynas.report.page import report  # isort: skip
from pynas.reports import fairness  # isort: skip

compare = _compare.compare
deploy = _deploy.deploy
fuse = _fuse.fuse
published = _published.published
rank = _rank.rank

timm_models.announce()

__all__ = [
    "DARTS",
    "EF",
    "ENAS",
    "FAMILIES",
    "SNAS",
    "SPACES",
    "SPOS",
    "STRATEGIES",
    "Architecture",
    "Choice",
    "Counts",
    "EvolutionSettings",
    "FBNet",
    "FairNAS",
    "Gates",
    "MissingExtra",
    "OneShot",
    "RandomSearch",
    "Recipe",
    "RepNAS",
    "Run",
    "Slot",
    "Supernet",
    "Trained",
    "Truth",
    "Uniform",
    "check_table",
    "compare",
    "cost_models",
    "count",
    "deploy",
    "draw_cells",
    "draw_credit",
    "draw_strip",
    "evaluate",
    "export",
    "fairness",
    "fit_table",
    "from_pretrained",
    "fuse",
    "measure",
    "plot_curves",
    "plot_entropy",
    "plot_latency",
    "plot_layers",
    "plot_network",
    "plot_pareto",
    "plot_theta",
    "plot_trained",
    "published",
    "rank",
    "read_truth",
    "rep",
    "report",
    "retrain",
    "runs",
    "search",
]
