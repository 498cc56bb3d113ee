"""How long an export of FBNet-A takes, how large the file is, and how fast it runs against eager torch.

pytest bench/bench_export.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from pynas.export import FORMATS, Exporter, export
from pynas.fuse import fuse
from pynas.published import published

SIZE = 224
IMAGE = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return published("fbnet_a").build().eval()


@pytest.mark.benchmark(group="export, checks included")
@pytest.mark.parametrize("name", FORMATS.names())
def test_export(benchmark: BenchmarkFixture, net: nn.Module, name: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{installed(name).suffix}"
    report = benchmark.pedantic(export, (net, path), {"input_size": SIZE}, rounds=3, warmup_rounds=1)
    benchmark.extra_info["size_mb"] = report.size_bytes / 1e6
    benchmark.extra_info["max_abs_diff"] = report.max_abs_diff


def installed(name: str) -> Exporter:
    """The exporter of that name; skips where its packages are missing."""
    exporter = FORMATS.get(name)
    if missing := exporter.missing():
        pytest.skip(f"needs pip install {missing}")
    return exporter


def runner(kind: str, net: nn.Module, folder: Path) -> Callable[[Tensor], object]:
    """What answers one image."""
    if kind == "torch":
        return net
    if kind == "torch, folded":
        return fuse(net)
    name, _, precision = kind.partition(" ")
    exporter = installed(name)
    asked = {"precision": "int8", "samples": IMAGE} if precision else {"input_size": SIZE}
    return exporter.open(export(net, folder / f"net{exporter.suffix}", **asked).path)


KINDS = [*FORMATS.names(), *(f"{name} int8" for name, exporter in FORMATS.items() if exporter.quantise is not None)]


@pytest.mark.benchmark(group="one image, one thread")
@pytest.mark.parametrize("kind", ["torch", "torch, folded", *KINDS])
def test_latency(benchmark: BenchmarkFixture, net: nn.Module, kind: str, tmp_path: Path) -> None:
    benchmark.pedantic(runner(kind, net, tmp_path), (IMAGE,), rounds=50, warmup_rounds=5)
