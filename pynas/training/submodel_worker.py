"""A process that judges networks of a supernet for `submodels`: one JSON line a network, one line back."""

from __future__ import annotations

import importlib
import json
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from cost_models.process import answer_lines
from pynas.architecture import Architecture
from pynas.kernels import setting
from pynas.registry import SPACES
from pynas.supernet import Supernet
from pynas.training.data import normalised
from pynas.training.judge import Judge, Judging, Pixels
from pynas.training.optim import fast_layout


def judge(request: dict[str, Any]) -> dict[str, float]:
    """Answers a request that names a file of `Submodels` and a network."""
    judging, kernels = _opened(request["bundle"])
    with setting.using(kernels):
        return vars(judging(Architecture.from_json(request["net"])))


@cache
def _opened(bundle: str) -> tuple[Judge, Any]:
    content = torch.load(bundle, weights_only=True, mmap=True)
    importlib.import_module(content["module"])
    net = fast_layout(Supernet(SPACES.get(content["space"])(**json.loads(content["options"]))))
    net.load_state_dict(content["state"])
    net.requires_grad_(False)
    normalise = partial(normalised, mean=content["mean"], std=content["std"])
    calibration, images = (_pixels(content[name], normalise) for name in ("calibration", "images"))
    return Judge(net, calibration, images, Judging(**content["how"])), content["kernels"]


def _pixels(part: dict[str, Any], normalise: Any) -> Pixels:
    pixels: Tensor = part["pixels"]

    def read(some: range) -> Tensor:
        return pixels[some.start : some.stop]

    return Pixels(read, part["labels"], normalise, part["batch_size"], pixels.shape[-1])


if __name__ == "__main__":
    answer_lines(judge)
