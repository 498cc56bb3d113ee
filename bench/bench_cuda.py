"""Times the CUDA kernels on a GPU: gates, paths, choice layers and blocks of FBNet, and folded blocks.

    python bench/bench_cuda.py               all tables
    python bench/bench_cuda.py mixed 64      one of mixed, blocks, folded, sampling; at these batch sizes
    python bench/bench_cuda.py predict 64    what is possible, on paper; needs no GPU

Rivals: plain PyTorch in contiguous and in channels_last layout, as users have it (cuDNN may take TF32), each also
captured in a CUDA graph, which leaves no launch overhead; for one layer torch.compile as well. All take turns in one
process; the GPU's own clock, medians of 9 rounds of at least 2 ms. "bytes" are those that the kernels move by design
(csrc/cuda/mbconv.h), per second of the fused graph, over those of a copy of 1 GB on the same card in the same run.
"""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from bench_mbconv import LAYERS, OPTIONS
from torch import Tensor

from pynas import kernels
from pynas.choices import Choice, Slot
from pynas.kernels import cuda, gumbel, paths
from pynas.registry import FAMILIES
from pynas.tuning import LAYOUTS, Call, evaluation, times, training_step, under

BLOCKS = ("k3_e1", "k3_e1_g2", "k3_e6", "k5_e6")
COMPILED = (32, 32, 16, 1)  # the layer that torch.compile is tried on: it takes half a minute
DEVICE = torch.device("cuda")


def graphed(call: Call) -> Call:
    """The call's work, captured once and played again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def calls_of(slot: Slot, batch: int, training: bool, compiled: bool) -> dict[str, Call]:
    """All ways to compute a layer, by name."""
    calls: dict[str, Call] = {}
    for layout, memory_format in LAYOUTS.items():
        torch.manual_seed(0)
        module: Any = FAMILIES.get(slot.family).mixed(slot).to(DEVICE).to(memory_format=memory_format)
        x = torch.randn(batch, slot.in_channels, slot.size, slot.size, device=DEVICE)
        x = x.to(memory_format=memory_format).requires_grad_(training)
        step = training_step(module.train(), slot, x) if training else evaluation(module.eval(), x)
        for ours in ("fused", "reference"):
            name = f"{'fused' if ours == 'fused' else 'plain'}, {layout}"
            calls[name] = under(ours, step)
            calls[f"{name}, graph"] = graphed(calls[name])
        if compiled and layout == "channels_last":
            torch._dynamo.reset()
            fast = torch.compile(module)
            step = training_step(fast, slot, x) if training else evaluation(fast, x)
            calls["plain, compiled"] = under("reference", step)
            calls["plain, compiled"]()
    return calls


@dataclass(frozen=True)
class Work:
    """What forward and backward of a layer cost by design.

    Args:
        fused_bytes: Moved by the kernels, each array of a launch read or written once (csrc/cuda/mbconv.h).
        plain_bytes: Moved by plain PyTorch, which writes every intermediate: a batch norm reads twice and writes once
            forward, and reads four times and writes once backward.
        macs: Multiply-adds of forward, of it once more where the kernels repeat it, and of both gradients.
    """

    fused_bytes: float
    plain_bytes: float
    macs: float


def work_of(slot: Slot, batch: int) -> Work:
    """Adds up a layer's options."""
    inside, outside = batch * slot.size**2, batch * slot.out_size**2
    fused = plain = macs = 0.0
    for name in slot.choice.options:
        spec: Any = FAMILIES.get(slot.family).spec(slot, name)
        if spec.kind != "mbconv":
            continue
        hidden, ins, outs = spec.expansion * slot.in_channels, slot.in_channels, slot.out_channels
        fused += 4.0 * (hidden * (3 * inside + 8 * outside) + outs * 6 * outside + ins * 5 * inside)
        plain += 4.0 * (hidden * 19 * (inside + outside) + outs * 20 * outside + ins * 4 * inside)
        taps = spec.kernel**2
        macs += hidden * ins / spec.groups * inside * 5 + hidden * (4 * taps + 3 * outs / spec.groups) * outside
    return Work(fused, plain, macs)


def predict(batches: set[int]) -> None:
    """Prints floors and gains on paper, for a GPU of 3.0 TB/s and 67 TFLOP/s in float32 (H100), without launches."""
    print("predicted, not measured: 3.0 TB/s (a measured copy), 67 TFLOP/s float32; us")
    print(f"{'layer':<28}{'bytes/floor':>14}{'arithmetic':>12}{'plain bytes':>13}{'gain at most':>14}")
    for ins, outs, size, stride, _ in LAYERS:
        for batch in sorted(batches):
            options = tuple(o for o in OPTIONS if o != "skip")
            slot = Slot("layer", Choice("layer", options), "mbconv", ins, outs, size, stride)
            work = work_of(slot, batch)
            fused, plain, arithmetic = work.fused_bytes / 3e6, work.plain_bytes / 3e6, 2 * work.macs / 67e6
            title = f"{ins}->{outs} {size}x{size}/{stride} n={batch}"
            gain = plain / max(fused, arithmetic)
            print(f"{title:<28}{fused:>14.0f}{arithmetic:>12.0f}{plain:>13.0f}{gain:>14.1f}")


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 1 GB."""
    a, b = (torch.empty(2**28, device=DEVICE) for _ in range(2))
    a.normal_()
    found = times({"copy": lambda: b.copy_(a)})
    return 8.0 * a.numel() / (found.median_ms["copy"] / 1e3)


def row(title: str, slot: Slot, batch: int, training: bool, copy: float, compiled: bool = False) -> dict[str, float]:
    """Prints a line of the table; the ratios of the better plain path over fused, without and with graphs."""
    calls = calls_of(slot, batch, training, compiled)
    found = times(calls)
    best = {
        kind: min(value for name, value in found.median_ms.items() if name.startswith(kind[0]) and _has(name, kind[1]))
        for kind in (("fused", False), ("plain", False), ("fused", True), ("plain", True))
    }
    fused, plain, fused_graph, plain_graph = best.values()
    share = work_of(slot, batch).fused_bytes / (fused_graph / 1e3) / copy if training else math.nan
    spread = max(found.spread.values())
    compiled_ms = found.median_ms.get("plain, compiled")
    extra = f"  torch.compile {compiled_ms:.3f}" if compiled_ms is not None else ""
    print(
        f"{title:<34}{fused:>9.3f}{plain:>9.3f}{plain / fused:>7.2f} |{fused_graph:>9.3f}{plain_graph:>9.3f}"
        f"{plain_graph / fused_graph:>7.2f}{share:>8.0%}{spread:>8.0%}{extra}",
        flush=True,
    )
    return {"eager": plain / fused, "graph": plain_graph / fused_graph}


def _has(name: str, graph: bool) -> bool:
    return name.endswith("graph") == graph and "compiled" not in name


def head(title: str) -> None:
    print(f"\n{title}\n{'':<34}{'fused':>9}{'plain':>9}{'ratio':>7} |{'graph:':>9}{'plain':>9}{'ratio':>7}"
          f"{'bytes':>8}{'spread':>8}")  # fmt: skip


def table(kind: str, batches: set[int], copy: float) -> None:
    """Mixed layers, single blocks in training, or folded blocks."""
    head({"mixed": "whole layers, ms", "blocks": "blocks in training, ms", "folded": "blocks in evaluation, ms"}[kind])
    ratios: list[dict[str, float]] = []
    for ins, outs, size, stride, _ in LAYERS:
        for batch in sorted(batches):
            options = tuple(o for o in OPTIONS if o != "skip" or (stride == 1 and ins == outs))
            for names in [options] if kind == "mixed" else [(name,) for name in BLOCKS]:
                slot = Slot("layer", Choice("layer", names), "mbconv", ins, outs, size, stride)
                title = f"{names[0] if len(names) == 1 else kind} {ins}->{outs} {size}x{size}/{stride} n={batch}"
                compiled = kind == "mixed" and (ins, outs, size, stride) == COMPILED
                try:
                    ratios.append(row(title, slot, batch, kind != "folded", copy, compiled))
                except ValueError as error:
                    print(f"{title:<34} {str(error)[:80]}")
    for way in ("eager", "graph"):
        found = [ratio[way] for ratio in ratios]
        mean = math.exp(sum(map(math.log, found)) / len(found))
        print(f"{kind}, {way}: geometric mean {mean:.2f}, least {min(found):.2f}, of {len(found)}")


def sampling() -> None:
    """Gates of a step and paths in bulk, against the references on the GPU."""
    theta = torch.randn(22, 9, device=DEVICE).requires_grad_()
    mask, cost = torch.ones(22, 9, dtype=torch.bool, device=DEVICE), torch.rand(22, 9, device=DEVICE)

    def gates(function: Any) -> Call:
        def go() -> None:
            theta.grad = None
            soft, _, log_prob, total = function(theta, mask, cost, 5.0, 1, 2, 1)
            (soft.sum() + log_prob.sum() + total.sum()).backward()

        return go

    def loop() -> None:
        theta.grad = None
        rows = [torch.nn.functional.gumbel_softmax(row, 5.0) for row in theta]
        gates = torch.stack(rows)
        (gates.sum() + (gates * cost).sum()).backward()

    found = times({"fused": gates(gumbel.gumbel_function), "reference": gates(gumbel.gumbel_reference), "loop": loop})
    print("\ngates of 22 layers, forward and backward, ms:", {k: round(v, 3) for k, v in found.median_ms.items()})
    logits: Tensor = theta.detach()
    cuts = (torch.softmax(logits.double(), -1).cumsum(-1) * 2.0**32).round().long()[:, :-1]
    probabilities = torch.softmax(logits, -1)
    found = times({
        "fused": lambda: paths._sample(cuts, 1_000_000, 1, 2),
        "torch.multinomial": lambda: torch.multinomial(probabilities, 1_000_000, replacement=True),
    })  # fmt: skip
    print("1,000,000 paths of 22 layers, ms:", {k: round(v, 3) for k, v in found.median_ms.items()})
    counts = torch.full((22,), 9, device=DEVICE)
    found = times({
        "fused": lambda: paths._fair(counts, 100_000, 9, 1, 2),
        "rand, argsort": lambda: torch.rand(100_000, 22, 9, device=DEVICE).argsort(-1).to(torch.uint8),
    })  # fmt: skip
    print("100,000 fair rounds of 22 x 9, ms:", {k: round(v, 3) for k, v in found.median_ms.items()})


def main() -> None:
    wanted = [word for word in sys.argv[1:] if not word.isdigit()] or ["sampling", "mixed", "blocks", "folded"]
    batches = {int(word) for word in sys.argv[1:] if word.isdigit()} or {16, 64}
    if wanted == ["predict"]:
        predict(batches)
        return
    if not torch.cuda.is_available() or not cuda.built():
        sys.exit(f"This needs a GPU and the CUDA kernels ({cuda.state()}); torch sees: {torch.cuda.is_available()}.")
    warnings.simplefilter("ignore")
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, pynas kernels: "
          f"{kernels.facts()['kernels']}; a copy moves {copy / 1e9:.0f} GB/s; convolutions may take TF32: "
          f"{torch.backends.cudnn.allow_tf32}")  # fmt: skip
    for kind in wanted:
        if kind == "sampling":
            sampling()
        else:
            table(kind, batches, copy)


if __name__ == "__main__":
    main()
