"""Does the modelled Cortex-A72 rank networks as a real Raspberry Pi 4 does, and better than counting MACs?

    python bench/raspi4_rank.py HELP_FBNET_LATENCY.npz --table FOLDER [--core cortex-a72]

The file holds 5,000 networks of FBNet's space for CIFAR-100 (`arch`: an option per layer; `ops`: the options' names)
and `lat_raspi4` and `lat_pixel3` in ms, from HW-NAS-Bench (Li et al., ICLR 2021) by way of HELP (Lee et al., NeurIPS
2021). Both columns are sums of tables of ops, timed one by one on the device: they can judge the order and size of ops,
not additivity. The runtime there is taken to be TensorFlow Lite; the file does not say. FOLDER keeps what the model
says about every op: minutes the first time.

Fixed before looking at any result: the space is that of HW-NAS-Bench's own network definition for CIFAR: input 32
pixels, stem 3x3 of 16 channels and stride 1; stages of 1, 4, 4, 4, 4, 4, 1 layers with 16, 24, 32, 64, 112, 184, 352
channels, whose first layers have stride 1, 1, 2, 2, 1, 2, 1; head 1504. It is the space `fbnet32` here. An option
`skip` where the shape changes is a strided 1x1 convolution with ReLU, as there; elsewhere it costs 0. Frequency,
bandwidth and cache of the core and the memory rule are those of `cost_models/tvm_model`: the longer of computing and
memory counts. Stem and head are the same in all networks and are left out. That is the reading "modelled", and the only
one that may be quoted as a test.

Tried after that result was seen, to learn where it falls short; picked from eight readings, so no test of anything:
- "memory added": computing and memory are summed (`overlap = false` in the core's file).
- "memory added, depthwise in memory": besides, the depthwise layers are costed by the same model for the algorithm that
  TensorFlow Lite publishes. It keeps its sums in memory, one filter tap at a time; ours keeps them in registers and is
  four times faster in the model. This looks at the model apart from the kernels, and is no row of any table.

"Best MACs" is the best Spearman correlation among MACs under every assignment of stride 1 or 2 to the seven stages (at
most five of 2, so that 32 pixels suffice), with skip at a changed shape costing its convolution or nothing: chosen with
the answer in hand, so an upper bound.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

import cost_models
from cost_models import OpSpec
from cost_models.files import write_atomic
from cost_models.tvm_model import TvmModel
from cost_models.tvm_model.blocks import instrument, split
from cost_models.tvm_model.counts import count
from cost_models.tvm_model.mca import Mca
from cost_models.tvm_model.pieces import pieces
from pynas.plan import deployed
from pynas.registry import FAMILIES
from pynas.spaces.fbnet import SMALL_STAGES, FBNetSpace

Numbers = NDArray[np.float64]
RESAMPLES = 1000
SEED = 0
BEST = "best MACs"
MODELLED, ADDED, THEIRS = "modelled", "memory added", "memory added, depthwise in memory"

# The algorithm of TensorFlow Lite's float depthwise convolution (depth multiplier 1), written anew.
DEPTHWISE = """
#define ROOM 4832
static float in[H * H * C], filter[K * K * C], bias[C], out[O * O * C], sums[ROOM];
__attribute__((noinline)) void depthwise(void) {
  const int per = ROOM / C < O ? ROOM / C : O;
  for (int y = 0; y < O; y++)
    for (int first = 0; first < O; first += per) {
      const int end = first + per < O ? first + per : O;
      for (int x = first; x < end; x++)
        for (int c = 0; c < C; c++) sums[(x - first) * C + c] = bias[c];
      for (int ky = 0; ky < K; ky++) {
        const int row = y * S - K / 2 + ky;
        if (row < 0 || row >= H) continue;
        for (int kx = 0; kx < K; kx++)
          for (int x = first; x < end; x++) {
            const int column = x * S - K / 2 + kx;
            if (column < 0 || column >= H) continue;
            const float *restrict pixel = in + (row * H + column) * C, *restrict tap = filter + (ky * K + kx) * C;
            float *restrict sum = sums + (x - first) * C;
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) sum[c] += pixel[c] * tap[c];
          }
      }
      for (int i = 0; i < (end - first) * C; i++) out[(y * O + first) * C + i] = sums[i] < 0 ? 0 : sums[i];
    }
}
"""
CALLER = """
#include <stdio.h>
void depthwise(void);
extern char kernel_counters[], kernel_counters_end[];
int main(int count, char **names) {
  FILE *file = fopen(names[1], "wb");
  depthwise();
  return fwrite(kernel_counters, 1, kernel_counters_end - kernel_counters, file) == 0 || fclose(file);
}
"""


def space(strides: Sequence[int] | None = None) -> FBNetSpace:
    """The assumed space, or the same with other strides per stage."""
    stages = [
        (channels, layers, stride if strides is None else strides[index])
        for index, (channels, layers, stride) in enumerate(SMALL_STAGES)
    ]
    return FBNetSpace("hw_nas_bench", input_size=32, classes=100, stem_stride=1, stages=stages)


def specs(assumed: FBNetSpace, ops: Sequence[str]) -> list[list[OpSpec]]:
    """Layers x options, in the order of the file."""
    return [[FAMILIES.get(slot.family).spec(slot, name) for name in ops] for slot in assumed.slots()]


def costs(table: list[list[OpSpec]], cost: Callable[[OpSpec], float]) -> Numbers:
    return np.array([[cost(spec) for spec in layer] for layer in table])


def sums(arch: NDArray[Any], per_op: Numbers) -> Numbers:
    return per_op[np.arange(arch.shape[1]), arch].sum(axis=1)


def best_macs(arch: NDArray[Any], ops: Sequence[str], truth: Numbers) -> tuple[Numbers, str]:
    """Sums of MACs under the assumption that fits best, and its name."""
    found: tuple[float, Numbers, str] | None = None
    for strides in itertools.product((1, 2), repeat=len(SMALL_STAGES)):
        if math.prod(strides) > 32:
            continue
        table = specs(space(strides), ops)
        for skips in (1, 0):
            per_op = costs(table, lambda spec, skips=skips: spec.macs * (skips if spec.kind == "conv" else 1))
            total = sums(arch, per_op)
            rho = float(spearmanr(total, truth).statistic)
            if found is None or rho > found[0]:
                found = (rho, total, f"strides {strides}, skip {'as conv' if skips else 'free'}")
    assert found is not None
    return found[1], found[2]


def recovered(arch: NDArray[Any], truth: Numbers, options: int) -> tuple[Numbers, float]:
    """The table behind an additive column: each layer's rows minus their mean, and the greatest residual in ms."""
    layers = arch.shape[1]
    hot = np.zeros((len(arch), layers * options))
    for layer in range(layers):
        hot[np.arange(len(arch)), layer * options + arch[:, layer]] = 1
    rows, *_ = np.linalg.lstsq(hot, truth, rcond=None)
    residual = float(np.abs(hot @ rows - truth).max())
    table = rows.reshape(layers, options)
    return table - table.mean(axis=1, keepdims=True), residual


def interval(values: Sequence[float]) -> str:
    low, high = np.quantile(values, [0.025, 0.975])
    return f"[{low:.4f}, {high:.4f}]"


def report_ranks(device: str, predictors: dict[str, Numbers], truth: Numbers) -> None:
    """Spearman and Kendall of each predictor, with bootstrap intervals over networks, and the lead over best MACs."""
    generator = np.random.default_rng(SEED)
    draws = [generator.integers(len(truth), size=len(truth)) for _ in range(RESAMPLES)]
    print(f"\n{device}: {len(truth)} networks, {RESAMPLES} bootstrap resamples, 95 % intervals")
    drawn: dict[str, tuple[list[float], list[float]]] = {}
    for name, values in predictors.items():
        rho, tau = spearmanr(values, truth).statistic, kendalltau(values, truth).statistic
        rhos = [float(spearmanr(values[draw], truth[draw]).statistic) for draw in draws]
        taus = [float(kendalltau(values[draw], truth[draw]).statistic) for draw in draws]
        drawn[name] = rhos, taus
        print(f"{name:42} Spearman {rho:.4f} {interval(rhos)}  Kendall {tau:.4f} {interval(taus)}")
    for name in list(predictors)[:3]:
        leads = [
            [a - b for a, b in zip(mine, best, strict=True)]
            for mine, best in zip(drawn[name], drawn[BEST], strict=True)
        ]
        print(f"lead of {name} over {BEST}: Spearman {interval(leads[0])}, Kendall {interval(leads[1])}")


def report_fit(name: str, modelled: Numbers, truth: Numbers) -> None:
    """How the recovered rows agree with modelled ones. Only differences within a layer can be recovered."""
    centred = modelled - modelled.mean(axis=1, keepdims=True)
    slope = float((centred * truth).sum() / (centred**2).sum())
    pearson, rho = (
        np.corrcoef(centred.ravel(), truth.ravel())[0, 1],
        spearmanr(centred.ravel(), truth.ravel()).statistic,
    )
    print(f"{truth.size} rows, each layer minus its mean, {name}: ", end="")
    print(f"Pearson {pearson:.4f}, Spearman {rho:.4f}, device / model {slope:.2f}")


def report_rows(modelled: Numbers, truth: Numbers, table: list[list[OpSpec]], ops: Sequence[str]) -> None:
    """The recovered rows beside the modelled ones, layer by layer."""
    centred = modelled - modelled.mean(axis=1, keepdims=True)
    seen: dict[str, int] = {}
    for layer, layer_specs in enumerate(table):
        spec = layer_specs[0]
        shape = f"{spec.in_channels}->{spec.out_channels}, {spec.size} pixels, stride {spec.stride}"
        if shape in seen:
            continue
        seen[shape] = layer
        rho = spearmanr(centred[layer], truth[layer]).statistic
        one = float(centred[layer] @ truth[layer] / (centred[layer] @ centred[layer]))
        print(f"layer {layer + 1:2} ({shape:32}): Spearman {rho:.3f}, slope {one:.2f}")
        from_last = truth[layer] - truth[layer][-1], modelled[layer] - modelled[layer][-1]
        print("    board, ms over skip: " + " ".join(f"{value:7.3f}" for value in from_last[0]))
        print("    model, ms over skip: " + " ".join(f"{value:7.3f}" for value in from_last[1]))
    print("    options:             " + " ".join(f"{name[:7]:>7}" for name in ops))
    print("mean over layers, ms over skip (does the order of options in the file make sense?):")
    for option, name in enumerate(ops):
        print(f"    {name:10} board {np.mean(truth[:, option] - truth[:, -1]):.3f}", end="")
        print(f"  model {np.mean(modelled[:, option] - modelled[:, -1]):.3f}")


def modelled(runner: TvmModel, wanted: Sequence[OpSpec], folder: Path) -> dict[str, dict[str, float]]:
    """Latency in ms of each op (by its key) under the three readings; kept in the folder from run to run."""
    file = folder / f"{Path(runner.core).stem}.json"
    about = {"schedule": runner.schedule, **runner.provenance()}
    kept = json.loads(file.read_text()) if file.is_file() else {"about": about, "rows": {}}
    if kept["about"] != about:
        raise SystemExit(f"{file} was made with {kept['about']}, this is {about}. Pass another --table folder.")
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, float]] = kept["rows"]
    lacking = [spec for spec in wanted if spec.key not in rows]
    for number, spec in enumerate(lacking, start=1):
        print(f"\r{number}/{len(lacking)} {spec.key:40}", end="", flush=True)
        kernels = runner.kernels(deployed(spec), (1, spec.in_channels, spec.size, spec.size))
        added = theirs = sum(kernel.compute_ms + kernel.memory_ms for kernel in kernels)
        if spec.kind == "mbconv":
            theirs += depthwise_ms(spec, runner) - kernels[1].compute_ms
        rows[spec.key] = {MODELLED: sum(kernel.latency_ms for kernel in kernels), ADDED: added, THEIRS: theirs}
        write_atomic(file, json.dumps(kept, indent=1))
    return rows


def depthwise_ms(spec: OpSpec, runner: TvmModel) -> float:
    """Computing time in ms of the depthwise layer of an mbconv op by the algorithm of TensorFlow Lite."""
    sizes = {"H": spec.size, "C": spec.expansion * spec.in_channels, "K": spec.kernel, "S": spec.stride}
    sizes["O"] = spec.out_size
    gcc = ["aarch64-linux-gnu-gcc", "-O3", "-ffast-math", f"-mcpu={runner.figures.target}"]
    gcc += [f"-D{name}={value}" for name, value in sizes.items()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "depthwise.c").write_text(DEPTHWISE)
        (folder / "main.c").write_text(CALLER)
        subprocess.run([*gcc, "-S", "depthwise.c"], cwd=folder, check=True)
        text = (folder / "depthwise.s").read_text()
        blocks = split(text)
        (folder / "depthwise.s").write_text(instrument(text, blocks))
        subprocess.run([*gcc, "-static", "main.c", "depthwise.s", "-o", "program"], cwd=folder, check=True)
        run = pieces(blocks, count(folder / "program", len(blocks)))
    cycles = Mca(runner.figures.mca_cpu, runner.figures.mca_model).cycles([piece.code for piece in run])
    return (
        sum(piece.times * each for piece, each in zip(run, cycles, strict=True)) / runner.figures.frequency_ghz * 1e-6
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--core", default="cortex-a72")
    arguments = parser.parse_args()
    with np.load(arguments.file, allow_pickle=False) as data:
        arch, ops = data["arch"].astype(int), [str(name) for name in data["ops"]]
        truths = {name: data[name].astype(float) for name in ("lat_raspi4", "lat_pixel3")}
    table = specs(space(), ops)
    runner = TvmModel(core=arguments.core)
    print(runner.figures.description, runner.schedule, runner.provenance()["software"])
    rows = modelled(runner, sorted({spec for layer in table for spec in layer if spec.kind != "skip"}), arguments.table)
    readings = {
        name: costs(table, lambda spec, name=name: rows[spec.key][name] if spec.kind != "skip" else 0.0)
        for name in (MODELLED, ADDED, THEIRS)
    }
    for device, truth in truths.items():
        best, assumption = best_macs(arch, ops, truth)
        predictors = {name: sums(arch, per_op) for name, per_op in readings.items()}
        predictors |= {"MACs": sums(arch, costs(table, cost_models.Macs().cost)), BEST: best}
        predictors["memory traffic"] = sums(arch, costs(table, cost_models.MemoryTraffic().cost))
        report_ranks(device, predictors, truth)
        print(f"({BEST}: {assumption})")
        behind, residual = recovered(arch, truth, len(ops))
        print(f"{device} is a sum of rows up to {residual:.1e} ms")
        for name, per_op in readings.items():
            report_fit(name, per_op, behind)
        if device == "lat_raspi4":
            report_rows(readings[MODELLED], behind, table, ops)


if __name__ == "__main__":
    main()
