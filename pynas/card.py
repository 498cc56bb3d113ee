"""The model card: what a network is, how good, where each number comes from, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pynas.architecture import Architecture

MOST_CLASSES = 20  # that are named


def model_card(
    architecture: Architecture,
    classes: tuple[str, ...],
    facts: Mapping[str, Any],
    figures: Mapping[str, Any],
    asked: Mapping[str, Any],
) -> str:
    """A README.md with the header that hubs of models read.

    Args:
        architecture: What it is.
        classes: Names of the classes.
        facts: test_accuracy, test_images and data, where it was trained.
        figures: Of the run's `result.json`, if they are of this network; else empty.
        asked: The run's settings.
    """
    size = architecture.search_space().input_size
    rows = [
        ("network", f"`{architecture}`"),
        ("test accuracy", f"{facts['test_accuracy']:.2%} of {facts['test_images']:,} images of {facts['data']}"),
        ("input", f"RGB, {size} x {size} pixels, normalised by `mean` and `std` of config.json"),
        ("classes", _classes(classes)),
        *_sizes(figures),
    ]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    return f"""---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- neural-architecture-search
- pynas
---

# {architecture.space}, found by pynas

| what | value |
| --- | --- |
{table}

## How to use it

```python
import pynas

net = pynas.from_pretrained("path/of/this/folder")  # a torch module in eval mode; executes nothing of this folder
logits = net(images)  # (B, 3, {size}, {size}), normalised by net.pretrained_cfg["mean"] and ["std"]
```

```python
import pynas, timm

net = timm.create_model("local-dir:path/of/this/folder", pretrained=True)
```

## How it was made

Searched in space `{architecture.space}` by strategy `{asked["strategy"]["name"]}`, seed {asked["seed"]}, on
`{facts["data"]}`{_budget(asked)}. The accuracy is on images that neither the search nor the training saw. `config.json`
holds the architecture, from which the network is rebuilt; `model.safetensors` its weights.
"""


def _classes(classes: tuple[str, ...]) -> str:
    named = ", ".join(classes[:MOST_CLASSES])
    return f"{len(classes)}: {named}{', ...' if len(classes) > MOST_CLASSES else ''}"


def _sizes(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not figures:
        return []
    rows = [
        ("parameters", f"{figures['params']:,}"),
        ("multiply-adds", f"{figures['macs']:,} for one image"),
        ("predicted latency", f"{figures['predicted_ms']:.3g} ms, sum of rows; {figures['device']}"),
    ]
    if figures["measured_ms"] is not None:
        spread = f"spread {figures['measured_spread_ms']:.2g} ms"
        rows.append(("measured latency", f"{figures['measured_ms']:.3g} ms, {spread}, whole net in torch, 1 thread"))
    return rows


def _budget(asked: Mapping[str, Any]) -> str:
    return f", latency at most {asked['latency_ms']:g} ms" if isinstance(asked["latency_ms"], int | float) else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
