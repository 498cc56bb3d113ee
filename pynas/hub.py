"""A trained network as a folder that others can use: weights, JSON, model card. Nothing in it is ever executed.

`config.json` is read by timm as well, which finds the entry "pynas" in its registry once `pynas` is imported.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from cost_models.files import write_atomic
from cost_models.names import unknown
from pynas.architecture import Architecture
from pynas.fuse import first_line

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
ENTRY = "pynas"  # of timm's registry
KEYS = ("architecture", "model_args", "num_classes", "pretrained_cfg", "pynas")
NET = ("space", "choices", "options", "version")

MOST_BYTES = 8 << 20  # of config.json; 100,000 classes take 3 MB
MOST_DEPTH = 16
MOST_IN_ALL = 200_000  # sum of all numbers in a space's options, which bounds how large a network they make

# What code that takes options on trust raises where they make no sense.
STRANGE = (KeyError, TypeError, AttributeError, IndexError, ArithmeticError, AssertionError, RuntimeError)


@dataclass(frozen=True)
class Pretrained:
    """What lies in such a folder.

    Args:
        net: With its weights, in eval mode.
        architecture: What it is.
        classes: Names, in the order of the logits.
        mean: Of each channel, as images were normalised, on a scale of 0 to 1.
        std: Likewise, the standard deviation.
        facts: What was noted about it: accuracy, data.
    """

    net: nn.Module
    architecture: Architecture
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    facts: Mapping[str, Any]

    @property
    def input_size(self) -> int:
        """Height and width of the image, in pixels."""
        return self.architecture.search_space().input_size


def write_pretrained(folder: str | Path, saved: Pretrained, card: str) -> Path:
    """Writes the folder; each file is all old or all new, `config.json`, which names the weights' digest, the last.

    Raises:
        ValueError: The network is a user's own and cannot be rebuilt from data; or the folder holds something else.
        OSError: The folder cannot be written.
    """
    where = Path(folder)
    _check_portable(saved.architecture)
    if where.exists() and not where.is_dir():
        raise NotADirectoryError(f"Cannot write a network to {where}: it is a file. Give a folder.")
    if where.is_dir() and any(where.iterdir()) and not (where / CONFIG).is_file():
        raise ValueError(f"{where} holds other files. Give a new folder, or one that a network was saved to before.")
    where.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in saved.net.state_dict().items()}
    weights = save_tensors(state, metadata={"format": "pt"})
    config = timm_config(saved)
    config["pynas"] = {**saved.facts, "sha256": hashlib.sha256(weights).hexdigest()}
    write_atomic(where / WEIGHTS, weights)
    write_atomic(where / CARD, card)
    write_atomic(where / CONFIG, json.dumps(config, indent=2, allow_nan=False) + "\n")
    return where


def timm_config(saved: Pretrained) -> dict[str, Any]:
    """`config.json` without what only pynas reads."""
    size = saved.input_size
    return {
        "architecture": ENTRY,
        "num_classes": len(saved.classes),
        "model_args": {"net": json.loads(saved.architecture.to_json())},
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "num_classes": len(saved.classes),
            "label_names": list(saved.classes),
            "mean": [float(value) for value in saved.mean],
            "std": [float(value) for value in saved.std],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "fixed_input_size": False,
        },
    }


def read_pretrained(folder: str | Path) -> Pretrained:
    """Reads a folder that `write_pretrained` wrote, whoever sent it: what does not fit is an error before it costs.

    Only JSON and safetensors are read, from files with fixed names in this folder; names inside are names of spaces,
    options and tensors, and never those of files or modules.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: Anything else that is wrong, in one sentence.
    """
    where = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (where / name).is_file():
            raise FileNotFoundError(f"There is no {name} in {where}. Give a folder that run.save_pretrained wrote.")
    try:
        config = _read_json(where / CONFIG)
        architecture, classes = _architecture(config), _classes(config)
        cfg = config["pretrained_cfg"]
        mean, std = (_channels(cfg, name) for name in ("mean", "std"))
        facts = config.get("pynas", {})
        if not isinstance(facts, dict):
            raise ValueError("'pynas' must be an object")
        if architecture.search_space().classes != len(classes):
            raise ValueError(f"it names {len(classes)} classes, the network has {architecture.search_space().classes}")
    except (ValueError, OSError) as error:
        raise ValueError(f"{where / CONFIG} cannot be used: {first_line(error)}") from None
    net = load_weights(where / WEIGHTS, architecture)
    return Pretrained(net, architecture, classes, mean, std, facts)


def from_pretrained(folder: str | Path) -> nn.Module:
    """A trained network from a folder that `run.save_pretrained` wrote; nothing in the folder is executed.

    >>> import pynas
    >>> pynas.from_pretrained("nowhere")
    Traceback (most recent call last):
    ...
    FileNotFoundError: There is no config.json in nowhere. Give a folder that run.save_pretrained wrote.

    Args:
        folder: On disk.

    Returns:
        A plain module in eval mode: images (B, 3, H, W), normalised, to logits (B, classes). Its `architecture` is the
        `pynas.Architecture`, its `pretrained_cfg` says, by timm's names, what images it takes and what classes mean.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or says what cannot be.
    """
    found = read_pretrained(folder)
    return dressed(found.net, found)


def dressed(net: nn.Module, found: Pretrained) -> nn.Module:
    """The network with what users and timm look for on it."""
    named: Any = net
    named.architecture = found.architecture
    cfg: dict[str, Any] = timm_config(found)["pretrained_cfg"]
    tuples = {name: tuple(cfg[name]) for name in ("input_size", "mean", "std")}  # as timm's own have them
    named.pretrained_cfg = {**cfg, **tuples, "architecture": ENTRY}
    named.num_classes = len(found.classes)
    return net


def _read_json(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"it has {size:,} bytes, more than {MOST_BYTES:,}")
    try:
        content = json.loads(path.read_bytes(), parse_constant=_not_finite)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"it is no JSON ({error})") from None
    if _depth(content) > MOST_DEPTH:
        raise ValueError("its JSON is nested too deeply")
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    for name in content:
        if name not in KEYS:
            raise unknown("key", name, KEYS)
    for name in KEYS[:-1]:
        if name not in content:
            raise ValueError(f"it lacks {name!r}")
    return content


def _not_finite(text: str) -> None:
    raise ValueError(f"it holds {text}, which is no number")


def _depth(content: Any) -> int:
    deepest, stack = 0, [(content, 1)]
    while stack:
        part, depth = stack.pop()
        deepest = max(deepest, depth)
        if depth <= MOST_DEPTH and isinstance(part, dict | list):
            stack += [(inner, depth + 1) for inner in (part.values() if isinstance(part, dict) else part)]
    return deepest


def _architecture(config: Mapping[str, Any]) -> Architecture:
    if config["architecture"] != ENTRY:
        raise ValueError(f"it is of architecture {config['architecture']!r}, not {ENTRY!r}")
    given = config["model_args"]
    if not isinstance(given, dict) or set(given) != {"net"}:
        raise ValueError("'model_args' must be an object with exactly the field 'net'")
    return checked_architecture(given["net"])


def checked_architecture(net: Any) -> Architecture:
    """An architecture from a stranger. Raises ValueError, before it is built, where it is none or far too large."""
    if not isinstance(net, dict) or not isinstance(net.get("options"), dict):
        raise ValueError(f"'net' must be an object with exactly the fields {', '.join(NET)}")
    host = net["options"].get("host")
    if host is not None and (not isinstance(host, str) or ":" in host):
        raise ValueError(f"the network's host {host!r} would have to be imported, which loading never does")
    try:
        total = sum(_sizes(net["options"]))
        if total > MOST_IN_ALL:
            raise ValueError(f"the network's options are too large: their numbers add up to {total:,}")
        return Architecture.from_json(json.dumps(net))
    except STRANGE as error:
        raise ValueError(f"the network's options cannot be ({type(error).__name__}: {first_line(error)})") from None


def _sizes(content: Any) -> Iterator[int]:
    """All numbers of some JSON, without their signs."""
    if isinstance(content, dict | list):
        for part in content.values() if isinstance(content, dict) else content:
            yield from _sizes(part)
    elif isinstance(content, int | float):
        yield math.ceil(abs(content))


def _check_portable(architecture: Architecture) -> None:
    if ":" in str(architecture.options.get("host", "")):
        raise ValueError(
            f"The host {architecture.options['host']!r} is a function of yours, which a folder of data cannot rebuild. "
            "Save the folded network instead: pynas export RUN --path net.pt2"
        )


def _classes(config: Mapping[str, Any]) -> tuple[str, ...]:
    cfg = config["pretrained_cfg"]
    if not isinstance(cfg, dict):
        raise ValueError("'pretrained_cfg' must be an object")
    names = cfg.get("label_names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("'label_names' must be a list of names of classes")
    if config["num_classes"] != len(names):
        raise ValueError(f"'num_classes' is {config['num_classes']!r}, but {len(names)} classes are named")
    return tuple(names)


def _channels(cfg: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = cfg.get(name)
    numbers = isinstance(values, list) and len(values) == 3
    if not numbers or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values or []):
        raise ValueError(f"{name!r} must be three numbers, one for each channel")
    found = tuple(float(value) for value in values or [])
    if name == "std" and min(found) <= 0:
        raise ValueError("'std' must be three numbers above 0")
    return found


def load_weights(path: Path, architecture: Architecture, *, but: tuple[str, ...] = ()) -> nn.Module:
    """A network with the weights of a safetensors file, in eval mode.

    Names, shapes and types are compared with the network's before memory is taken for either.

    Args:
        path: Of the file.
        architecture: Of the network.
        but: Beginnings of the names of tensors that stay as they are when fresh.

    Raises:
        ValueError: The file is damaged, or of another network.
    """
    try:
        with torch.device("meta"):
            wanted = architecture.build().state_dict()
    except STRANGE as error:
        raise ValueError(f"The network beside {path} cannot be built: {first_line(error)}") from None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_tensors(path, file, wanted, but)
            state = {name: file.get_tensor(name) for name in wanted if not name.startswith(but)}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {first_line(error)} Get it again.") from None
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, and thrown away
        net = architecture.build()
    net.load_state_dict({**net.state_dict(), **state})
    return net.eval()


def _check_tensors(path: Path, file: Any, wanted: Mapping[str, Tensor], but: tuple[str, ...]) -> None:
    there = set(file.keys())
    missing, extra = sorted(set(wanted) - there), sorted(there - set(wanted))
    for what, names in (("lacks", missing), ("has besides what the network has", extra)):
        if names:
            more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
            raise ValueError(f"{path} is of another network: it {what} {names[0]!r}{more}.")
    for name, tensor in wanted.items():
        if name.startswith(but):
            continue
        part = file.get_slice(name)
        shape, kind = tuple(part.get_shape()), part.get_dtype()
        if shape != tuple(tensor.shape):
            raise ValueError(
                f"{path} is of another network: {name!r} has shape {shape} there, and {tuple(tensor.shape)} here."
            )
        if kind != TYPES.get(tensor.dtype):
            raise ValueError(f"{path} holds {name!r} as {kind}, the network as {TYPES.get(tensor.dtype)}.")


TYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.bool: "BOOL"}
