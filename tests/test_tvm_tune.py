"""Tiles chosen by timing: what replaces the default, what does not, and what a tuned table is called."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from tvm_nets import deployed

import cost_models
from cost_models.compiling import Job, compile_all, folder_of
from cost_models.provenance import Provenance
from cost_models.runners import make_runner, options_of
from cost_models.spec import OpSpec
from cost_models.tvm_build.layers import Concat, Conv, GlobalPool, Linear, Pool, Shuffle, Sum

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'pynas[tvm]'")

from cost_models.tvm_build import Graph, Step, compile_graph, kernels, read_graph, target, tune
from cost_models.tvm_build.build import shapes
from cost_models.tvm_build.check import check
from cost_models.tvm_build.kernels import Tile, tiles
from cost_models.tvm_build.tune import choose, timers, tune_graph
from cost_models.tvm_local import tiles_memory

pytestmark = pytest.mark.tvm

SPEC = OpSpec("mbconv", 16, 16, 7, kernel=3, expansion=4)
A, B, C = Tile(1, 1, 4), Tile(2, 1, 4), Tile(4, 1, 4)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_models.steady, "ROUND_SECONDS", 0.0)


def clock(*latencies: float) -> Callable[[], float]:
    """Latencies in ms that come again and again."""
    told: Iterator[float] = cycle(latencies)
    return lambda: next(told)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[list[Tile]]:
    """The tiles of each layer that is timed, on a clock on which the last is the fastest."""
    seen: list[list[Tile]] = []

    def pretended(step: Step, cpu: Any, tried: list[Tile]) -> dict[Tile, Callable[[], float]]:
        seen.append(tried)
        return {tile: clock(10.0 - index) for index, tile in enumerate(tried)}

    monkeypatch.setattr(tune, "timers", pretended)
    return seen


# --- the choice -------------------------------------------------------------------------------------------------------


def test_a_slow_default_is_replaced_by_the_fastest() -> None:
    chosen, speedup = choose({A: clock(2.0, 2.01, 1.99), B: clock(1.5), C: clock(1.0, 1.01, 0.99)})
    assert chosen == C
    assert speedup == pytest.approx(2.0)


@pytest.mark.parametrize("other", [2.0, 1.0, 0.98])
def test_a_tie_and_what_is_within_noise_keep_the_default(other: float) -> None:
    assert choose({A: clock(1.0), B: clock(other)}) == (A, 1.0)


def test_three_per_cent_replace_the_default() -> None:
    assert choose({A: clock(1.0), B: clock(0.969)})[0] == B


def test_one_that_was_only_lucky_is_found_out() -> None:
    lucky = iter([0.5] * tune.SEARCH_ROUNDS + [1.0] * 100)
    assert choose({A: clock(1.0), B: lambda: next(lucky)}) == (A, 1.0)


def test_the_candidates_take_turns() -> None:
    turns: list[Tile] = []

    def noted(tile: Tile) -> Callable[[], float]:
        return lambda: turns.append(tile) or 1.0  # type: ignore[func-returns-value]

    choose({tile: noted(tile) for tile in (A, B, C)})
    assert turns == [A, B, C] * tune.SEARCH_ROUNDS


# --- kernels ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_layer_can_be_timed() -> None:
    cpu = target("host")
    layers = [
        Conv(1, 6, 6, 8, 8, residual=True, activation="relu"),
        Conv(1, 6, 6, 8, 8, kernel=3, padding=1, groups=8),
        Conv(1, 6, 6, 8, 16, kernel=3, groups=2),
        Pool(1, 6, 6, 8, "max", 2, 2),
        GlobalPool(1, 6, 6, 8),
        Linear(1, 8, 12),
        Sum((1, 6, 6, 8), 2),
        Concat(1, 6, 6, (8, 4)),
        Shuffle(1, 6, 6, 8, 2),
    ]
    for layer in layers:
        params: tuple[Any, ...] = ()
        if isinstance(layer, Conv):
            weight = torch.randn(layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel)
            params = (weight.numpy(), torch.randn(layer.out_channels).numpy())
        elif isinstance(layer, Linear):
            params = (torch.randn(12, 8).numpy(), torch.randn(12).numpy())
        step = Step(layer, tuple(range(len(shapes(layer)[0]))), params, 9)
        ready = timers(step, cpu, tiles(layer, cpu)[:2])
        assert len(ready) == min(2, len(tiles(layer, cpu)))
        assert all(take() > 0 for take in ready.values())


@pytest.mark.slow
def test_a_planted_slow_tile_is_replaced_on_the_real_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = target("host")
    graph = read_graph(*deployed(OpSpec("conv", 64, 128, 14)))
    (step,) = graph.steps
    good, slow = tiles(step.layer, cpu)[0], Tile(1, 1, 1, "channels")
    monkeypatch.setattr(kernels, "tiles", lambda layer, cpu: [slow, good])
    (choice,) = tune_graph(graph, cpu, 2)
    assert (choice.tile, choice.default) == (good, slow)
    assert choice.speedup > 2


# --- ops --------------------------------------------------------------------------------------------------------------


def test_only_so_many_tiles_are_tried_and_the_best_one_is_compiled(timed: list[list[Tile]]) -> None:
    cpu = target("host")
    module, shape = deployed(SPEC)
    graph = read_graph(module, shape)
    choices = tune_graph(graph, cpu, 3)
    assert [choice.layer for choice in choices] == [step.layer for step in graph.steps]
    assert timed == [tiles(choice.layer, cpu)[:3] for choice in choices]
    assert all(choice.tile == tried[-1] != choice.default for choice, tried in zip(choices, timed, strict=True))
    tuned = compile_graph(graph, cpu, {choice.layer: choice.tile for choice in choices})
    assert check(tuned, module, shape) < 1e-5
    assert tuned.assembly() != compile_graph(graph, cpu).assembly()


def test_one_tile_is_the_default_and_is_not_timed(timed: list[list[Tile]]) -> None:
    choices = tune_graph(read_graph(*deployed(SPEC)), target("host"), 1)
    assert all(choice.tile == choice.default for choice in choices)
    assert not timed


def test_a_layer_is_timed_once_for_all_ops(timed: list[list[Tile]], tmp_path: Path) -> None:
    cpu, memory = target("host"), tmp_path / "a" / "b"
    graph: Graph = read_graph(*deployed(SPEC))
    first = tune_graph(graph, cpu, 3, memory)
    assert tune_graph(graph, cpu, 3, memory) == first
    assert len(timed) == len(first)
    tune_graph(graph, cpu, 2, memory)
    assert len(timed) == 2 * len(first)


def test_another_machine_is_not_tuned_for() -> None:
    with pytest.raises(ValueError, match="cortex-a72 cannot be timed on this machine; leave out --tune"):
        tune_graph(read_graph(*deployed(SPEC)), target("cortex-a72"), 2)


def test_a_tuned_op_equals_torch_and_its_tiles_lie_beside_it() -> None:
    runner: Any = make_runner("tvm-local", tune=2)
    module, shape = deployed(OpSpec("conv", 8, 16, 7))
    folder = compile_all({0: Job("op", module, shape)}, runner.compiler)[0]
    (told,) = json.loads((folder / "tiles.json").read_text())
    (layer,) = (step.layer for step in read_graph(module, shape).steps)
    assert told["layer"]["kind"] == "Conv"
    assert Tile(**told["tile"]) in tiles(layer, target("host"))[:2]
    assert told["tried"] == 2
    assert len(list(tiles_memory(runner.compiler).iterdir())) == 1
    assert callable(runner.open(folder))  # which compares with torch


# --- identity ---------------------------------------------------------------------------------------------------------


def test_tuned_and_untuned_rows_never_share_a_table_or_a_cache() -> None:
    plain, zero, two, four = (make_runner("tvm-local", tune=number) for number in (None, 0, 2, 4))
    about = [Provenance.of("toy", runner, 5) for runner in (plain, zero, two, four)]
    assert about[0] == about[1]
    assert about[0].build == {"target": "host"}
    assert len({one.fingerprint for one in about}) == 3
    assert about[0].differences(about[3]) == "tune 'none' against 4"
    job = Job("op", *deployed(SPEC))
    compilers: list[Any] = [getattr(runner, "compiler") for runner in (plain, zero, two, four)]  # noqa: B009
    assert compilers[0] == compilers[1]
    assert compilers[0].settings == {"target": "host"}
    assert len({folder_of(job, compiler) for compiler in compilers}) == 3
    assert len({tiles_memory(compiler) for compiler in compilers[2:]}) == 2


@pytest.mark.parametrize("value", [-1, 1.5, "4", True])
def test_wrong_numbers_of_tiles_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"tune is .*; it must be a whole number: how many tiles to try per layer"):
        make_runner("tvm-local", tune=value)


def test_other_runners_do_not_take_it() -> None:
    assert "tune" in options_of("tvm-local")
    with pytest.raises(ValueError, match="'tvm-rpc' takes no tune; .* The runner 'tvm-local' does"):
        make_runner("tvm-rpc", target="cortex-a72", address="a:1", tune=4)
