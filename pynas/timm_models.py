"""Networks of this package by timm's name for them: `timm.create_model("local-dir:my_net", pretrained=True)`.

timm finds a model by the name of a function in its registry, and asks for none from elsewhere; so somebody has to
put "pynas" there. `import pynas` does, at once if timm was imported before, and else as soon as it is: until then, a
finder in `sys.meta_path` waits for the name "timm". Neither imports timm.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from pynas.hub import ENTRY, WEIGHTS, Pretrained, checked_architecture, dressed, load_weights, read_pretrained

IGNORED = ("cache_dir", "pretrained_model_args")  # of downloads, and a second copy of what config.json says
SOURCES = "Save it with run.save_pretrained, and give timm 'local-dir:' and the folder."


def announce() -> None:
    """Makes timm know networks of this package, now or as soon as it is imported."""
    if "timm.models" in sys.modules:
        register()
    elif not any(isinstance(finder, Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, Waiting())


def register() -> None:
    """Puts the entry into timm's registry, under the name that `config.json` calls it by."""
    from timm.models import is_model, register_model

    if not is_model(ENTRY):
        entry.__name__ = ENTRY
        register_model(entry)


def entry(
    pretrained: bool = False, pretrained_cfg: Any = None, net: Any = None, num_classes: int | None = None, **others: Any
) -> nn.Module:
    """What `timm.create_model` calls for a folder of `run.save_pretrained`; the folder is trusted no more than there.

    Args:
        pretrained: Load the weights; without, they are fresh.
        pretrained_cfg: What timm read from the folder's `config.json`, and where it lies.
        net: From there too: the architecture as plain values.
        num_classes: Another number of classes than the file's; the classifier is fresh then.
        others: What timm passes to all models; what is not empty is refused.

    Raises:
        ValueError: timm was not given such a folder, or asks for what these networks have not.
    """
    asked = sorted(name for name, value in others.items() if name not in IGNORED and value)
    if asked:
        raise ValueError(f"Networks of pynas take no {', '.join(asked)}.")
    if net is None:
        raise ValueError(f"timm was given no network of pynas, but its name alone. {SOURCES}")
    cfg = pretrained_cfg if isinstance(pretrained_cfg, dict) else vars(pretrained_cfg or object)
    architecture = checked_architecture(net)
    labels = cfg.get("label_names") or ()
    if num_classes is not None and num_classes != architecture.search_space().classes:
        architecture, labels = architecture.with_options(classes=num_classes), ()
    if not pretrained:
        module = architecture.build()
    elif cfg.get("source") != "local-dir" or not cfg.get("file"):
        raise ValueError(f"Weights are loaded from folders alone. {SOURCES}")
    else:
        folder = Path(cfg["file"])
        if labels:
            found = read_pretrained(folder if folder.is_dir() else folder.parent)
            return dressed(found.net, found)
        module = load_weights(folder / WEIGHTS, architecture, but=_classifiers(architecture.build()))
    names = tuple(labels) or tuple(f"class {number}" for number in range(architecture.search_space().classes))
    mean, std = tuple(cfg.get("mean") or (0.0,) * 3), tuple(cfg.get("std") or (1.0,) * 3)
    return dressed(module, Pretrained(module, architecture, names, mean, std, {}))


def _classifiers(net: nn.Module) -> tuple[str, ...]:
    """Names of the layers that give logits: the linear ones, of which these networks have no others."""
    return tuple(f"{name}." for name, module in net.named_modules() if isinstance(module, nn.Linear))


class Waiting(importlib.abc.MetaPathFinder):
    """Waits for timm to be imported: finds it as the other finders do, and registers once it is loaded."""

    _asking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """timm's spec, with a loader that registers; nothing for other names."""
        if name != "timm" or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(importlib.abc.Loader):
    """Another loader that registers after it has loaded the module."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # nobody else needs to know
        self._loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Waiting)]
        register()
