"""Whether a CUDA kernel is faster than plain PyTorch on this very GPU: as it was timed here, layer by layer.

`pynas kernels tune` times; until it has, plain PyTorch runs. Verdicts lie in
$XDG_CACHE_HOME/pynas/cuda/<GPU>-<torch version>.json.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cost_models.files import write_atomic
from cost_models.folders import xdg
from pynas.kernels.mbconv_reference import NUMBERS

Kind = Literal["training", "inference"]


@dataclass(frozen=True)
class Verdict:
    """What a layer took on a GPU, medians in milliseconds.

    Args:
        fused_ms: The CUDA kernels.
        reference_ms: Plain PyTorch in the better memory layout.
        spread: The greater of both interquartile ranges over its median.
    """

    fused_ms: float
    reference_ms: float
    spread: float

    @property
    def fused(self) -> bool:
        """Whether the kernels are faster by more than the spread."""
        return self.fused_ms * (1.0 + self.spread) < self.reference_ms


def gpu_name(device: torch.device) -> str:
    """Of the GPU, as torch has it; that of the processor where a test plays one there."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "played on the CPU"


def path_of(device: torch.device) -> Path:
    """The file of a GPU's verdicts."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{gpu_name(device)}-{torch.__version__}")
    return xdg("XDG_CACHE_HOME", ".cache") / "pynas" / "cuda" / f"{name}.json"


def key_of(kind: Kind, x: Tensor, layer: Sequence[int], options: Sequence[int]) -> str:
    """What a verdict depends on: shape of x (B, C, H, W), the layer's numbers and the running options', as in
    `pynas.kernels.mbconv.mixed_mbconv`; which column of the gates an option has makes no difference."""
    parts = [options[i : i + NUMBERS] for i in range(0, len(options), NUMBERS)]
    blocks = " ".join(f"k{k}-m{hidden}-g{groups}-t{trained}" for k, hidden, groups, _, trained in parts)
    return f"{kind} {'x'.join(map(str, x.shape))} s{layer[0]}-o{layer[1]}-a{layer[2]} {blocks}"


@functools.lru_cache(maxsize=8)
def _read(path: Path, changed_ns: int) -> dict[str, Verdict]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: Verdict(**values) for key, values in content.items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged. Delete it and run: pynas kernels tune") from None


def read(device: torch.device) -> dict[str, Verdict]:
    """All verdicts of a GPU by key; none where it was never tuned.

    Raises:
        ValueError: The file is damaged.
    """
    path = path_of(device)
    return _read(path, path.stat().st_mtime_ns) if path.exists() else {}


def write(device: torch.device, verdicts: dict[str, Verdict]) -> Path:
    """Adds verdicts to those of a GPU. Returns the file."""
    path = path_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    together = read(device) | verdicts
    write_atomic(path, json.dumps({key: asdict(verdict) for key, verdict in sorted(together.items())}, indent=1))
    _known.cache_clear()
    return path


@functools.lru_cache(maxsize=16)
def _known(device: torch.device, cache: Path) -> dict[str, Verdict]:
    return read(device)


_asked: list[str] | None = None


@contextmanager
def asked_for() -> Iterator[list[str]]:
    """Collects the keys of the layers that ask whether kernels run."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


def runs(kind: Kind, x: Tensor, layer: Sequence[int], options: Sequence[int], forced: bool) -> bool:
    """Whether the kernels run for a layer that they can take: where they are forced to, or have been faster."""
    if _asked is not None:
        _asked.append(key_of(kind, x, layer, options))
    return forced or fused(kind, x, layer, options)


def fused(kind: Kind, x: Tensor, layer: Sequence[int], options: Sequence[int]) -> bool:
    """Whether the kernels have been timed on x's GPU for this layer, and were faster."""
    known = _known(x.device, xdg("XDG_CACHE_HOME", ".cache"))
    verdict = known.get(key_of(kind, x, layer, options)) if known else None
    return verdict is not None and verdict.fused
