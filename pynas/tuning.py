"""Times CUDA kernels against plain PyTorch on this very GPU, so that from then on the faster one runs."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pynas.choices import Choice, Gates, Slot
from pynas.console import Show
from pynas.kernels import cuda, cuda_verdicts, setting
from pynas.kernels.cuda_verdicts import Kind, Verdict
from pynas.registry import FAMILIES, SPACES

ROUNDS, LEAST_MS = 9, 2.0
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """What calls took: medians in milliseconds, and each one's interquartile range over its median."""

    median_ms: dict[str, float]
    spread: dict[str, float]


def times(calls: dict[str, Call], rounds: int = ROUNDS) -> Times:
    """Times calls on the GPU by its own clock, taking turns; each round is as many calls as take 2 ms.

    Args:
        calls: What to time, by name.
        rounds: How often each has its turn.
    """
    count = {name: max(1, round(LEAST_MS / max(_elapsed_ms(call, 2), 1e-3))) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(_elapsed_ms(call, count[name]))
    quartiles = {name: np.percentile(values, (25, 50, 75)) for name, values in found.items()}
    return Times(
        {name: float(middle) for name, (_, middle, _) in quartiles.items()},
        {name: float((high - low) / middle) for name, (low, middle, high) in quartiles.items()},
    )


def _elapsed_ms(call: Call, count: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / count


def layers_of(space: str, space_options: dict[str, Any] | None) -> list[Slot]:
    """Choice layers of inverted bottlenecks of a space, one of each kind.

    Raises:
        ValueError: There is no such space, or it has none.
    """
    slots: dict[tuple[object, ...], Slot] = {}
    for slot in SPACES.get(space)(**(space_options or {})).slots():
        if slot.family == "mbconv":
            kind = slot.in_channels, slot.out_channels, slot.size, slot.stride, slot.activation, slot.choice.options
            slots.setdefault(kind, slot)
    if not slots:
        raise ValueError(f"Space {space!r} has no inverted bottlenecks, which the CUDA kernels are for. Try fbnet.")
    return list(slots.values())


def training_step(module: nn.Module, slot: Slot, x: Tensor) -> Call:
    """Forward and backward of a choice layer, through gates where it has several options."""
    options = len(slot.choice.options)
    run = tuple(range(options))
    values = torch.full((options,), 1 / options, device=x.device, requires_grad=options > 1)
    gates = Gates(values, run, run, single=options == 1)
    leaves = [x, *module.parameters(), *([values] if options > 1 else [])]
    weight: list[Tensor] = []

    def go() -> None:
        for leaf in leaves:
            leaf.grad = None
        y = module(x, gates)
        if not weight:
            weight.append(torch.randn_like(y))
        y.backward(weight[0])

    return go


def evaluation(module: nn.Module, x: Tensor) -> Call:
    """A forward pass of a single option in eval mode."""
    gates = Gates(torch.ones(1, device=x.device), (0,), (0,), single=True)

    def go() -> None:
        with torch.no_grad():
            module(x, gates)

    return go


def under(kernels: setting.Setting, call: Call) -> Call:
    """The call with kernels set."""

    def go() -> None:
        with setting.using(kernels):
            call()

    return go


def cases(slot: Slot) -> Iterator[tuple[Kind, Slot]]:
    """The whole layer in training, and each option alone in training and in evaluation."""
    options = [name for name in slot.choice.options if _is_block(slot, name)]
    if len(options) > 1:
        yield "training", slot
    for name in options:
        alone = dataclasses.replace(slot, choice=Choice(slot.choice.name, (name,)))
        yield "training", alone
        yield "inference", alone


def _is_block(slot: Slot, name: str) -> bool:
    return FAMILIES.get(slot.family).spec(slot, name).kind == "mbconv"


def verdict_of(kind: Kind, slot: Slot, batch_size: int, device: torch.device) -> tuple[str, Verdict, Times] | None:
    """Times one case. The key of its verdict, the verdict, and all times; None where the kernels cannot take it."""
    calls: dict[str, Call] = {}
    keys: list[str] = []
    for layout, memory_format in LAYOUTS.items():
        torch.manual_seed(0)
        module: Any = FAMILIES.get(slot.family).mixed(slot).to(device).to(memory_format=memory_format)
        x = torch.randn(batch_size, slot.in_channels, slot.size, slot.size, device=device)
        x = x.to(memory_format=memory_format).requires_grad_(kind == "training")
        training = kind == "training"
        call = training_step(module.train(), slot, x) if training else evaluation(module.eval(), x)
        calls[layout] = under("reference", call)
        with cuda_verdicts.asked_for() as asked:
            try:
                under("fused", call)()
            except ValueError:
                return None
        keys = asked
        calls[f"fused, {layout}"] = under("fused", call)
    if len(set(keys)) != 1:
        return None
    for call in calls.values():
        call()
    found = times(calls)
    fused, plain = (
        min((name for name in calls if name.startswith("fused") == ours), key=lambda name: found.median_ms[name])
        for ours in (True, False)
    )
    spread = max(found.spread[fused], found.spread[plain])
    return keys[0], Verdict(found.median_ms[fused], found.median_ms[plain], spread), found


def tune(space: str = "fbnet", space_options: dict[str, Any] | None = None, batch_size: int = 64) -> None:
    """Times the CUDA kernels against plain PyTorch for all layers of a space, and keeps the verdicts.

    From then on layers of these shapes run, on this GPU, whichever was faster by more than the spread. Takes some
    seconds a layer; other programs should leave the GPU alone.

    Args:
        space: Whose layers of inverted bottlenecks.
        space_options: As for `pynas search`.
        batch_size: Images per step of the search; verdicts hold for it alone.

    Raises:
        ValueError: There is no GPU or there are no CUDA kernels, or nothing in the space is for them.
    """
    if not torch.cuda.is_available():
        raise ValueError("pynas kernels tune times on a GPU, but torch sees no CUDA device here.")
    if not cuda.built():
        raise ValueError(f"There are no CUDA kernels to time: {cuda.STATE}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is too small. Give the batch size of the search.")
    device, show = torch.device("cuda", torch.cuda.current_device()), Show()
    verdicts: dict[str, Verdict] = {}
    rows = []
    for slot in layers_of(space, space_options):
        for kind, case in cases(slot):
            found = verdict_of(kind, case, batch_size, device)
            if found is None:
                continue
            key, verdict, _ = found
            verdicts[key] = verdict
            what = case.choice.options[0] if len(case.choice.options) == 1 else f"{len(case.choice.options)} options"
            shape = f"{slot.in_channels} to {slot.out_channels}, {slot.size}x{slot.size}, stride {slot.stride}"
            times_ms = f"{verdict.fused_ms:.3f}", f"{verdict.reference_ms:.3f}", f"{verdict.spread:.0%}"
            rows.append((kind, shape, what, *times_ms, "fused" if verdict.fused else "plain"))
            gc.collect()
        cuda_verdicts.write(device, verdicts)
    head = ("pass", "layer", "runs", "fused ms", "plain ms", "spread", "verdict")
    show.table(f"{cuda_verdicts.gpu_name(device)}, batch {batch_size}", head, rows)
    show.line(f"Kept in {cuda_verdicts.path_of(device)}")
