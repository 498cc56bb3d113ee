"""Training a single network: averaging of weights, recipes, and what the front door does with both."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import pynas
from pynas import Recipe, Run
from pynas.training.train import Training, moving_average


@pytest.fixture
def run(searched: Run) -> Run:
    return searched


def test_average_forgets_its_start() -> None:
    average, update = [torch.full((3,), 100.0), torch.tensor(7)], moving_average(0.99)
    for count in range(1, 61):
        update(average, [torch.ones(3), torch.tensor(count)], count)
    assert average[0].tolist() == pytest.approx([1.0] * 3, abs=0.01)
    assert int(average[1]) == 60


def test_average_of_a_long_training_is_the_plain_one() -> None:
    average = [torch.zeros(1)]
    moving_average(0.9)(average, [torch.ones(1)], 10_000)
    assert average[0].item() == pytest.approx(0.1)


def test_short_training_with_averaging_learns(run: Run) -> None:
    """Some sixty steps: with the default averaging as good as without, up to noise, and far above chance."""
    results = [
        pynas.retrain(run, recipe=Recipe(epochs=12, batch_size=48, ema_decay=decay), quiet=True).accuracy
        for decay in (0.99, 0.0)
    ]
    assert min(results) > 0.5
    assert results[0] > results[1] - 0.1


def test_another_recipe_is_another_training(run: Run) -> None:
    first = pynas.retrain(run, recipe=Recipe(epochs=1, batch_size=48), quiet=True)
    same = pynas.retrain(run, recipe=Recipe(epochs=1, batch_size=48), quiet=True)
    other = pynas.retrain(run, recipe=Recipe(epochs=1, batch_size=48, lr=0.01, ema_decay=0.0), quiet=True)
    weights = [next(iter(trained.model.parameters())) for trained in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_papers_recipes() -> None:
    """PAPERS D3 and D7."""
    fairnas, macro = Recipe.preset("fairnas"), Recipe.preset("nas_bench_macro")
    assert (fairnas.epochs, fairnas.batch_size, fairnas.lr, fairnas.weight_decay) == (150, 256, 0.045, 4e-5)
    assert (macro.epochs, macro.batch_size, macro.lr, macro.weight_decay) == (50, 256, 0.1, 5e-4)
    for recipe in (fairnas, macro):
        assert (recipe.momentum, recipe.label_smoothing, recipe.ema_decay, recipe.warmup_epochs) == (0.9, 0, 0, 0)
        assert (recipe.nesterov, recipe.decay, recipe.clip) == (False, "all", 0)
    assert Recipe.preset("quick", epochs=7) == Recipe(epochs=7)
    with pytest.raises(ValueError, match="Unknown recipe 'fairnaas'. Did you mean 'fairnas'"):
        Recipe.preset("fairnaas")
    with pytest.raises(ValueError, match="nesterov of the recipe must be true or false"):
        Recipe(nesterov=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("decay", ["weights", "all"])
def test_what_decays(decay: Any) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    optimizer = Training(net, Recipe(decay=decay, nesterov=False)).optimizer
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(net[0].weight)] == 1e-4
    assert decays[id(net[1].weight)] == decays[id(net[0].bias)] == (1e-4 if decay == "all" else 0)
    assert not optimizer.param_groups[0]["nesterov"]


def test_retrain_by_a_named_recipe(run: Run) -> None:
    named = pynas.retrain(run, preset="fairnas", epochs=1, quiet=True)
    given = pynas.retrain(run, recipe=Recipe.preset("fairnas", epochs=1), quiet=True)
    assert torch.equal(*(next(iter(trained.model.parameters())) for trained in (named, given)))
    with pytest.raises(ValueError, match="not both"):
        pynas.retrain(run, preset="fairnas", recipe=Recipe(), quiet=True)


def test_export_of_what_was_trained(run: Run, tmp_path: Path) -> None:
    """Not of what the run's folder holds by now."""
    first = pynas.retrain(run, epochs=1, seed=0, quiet=True)
    pynas.retrain(run, epochs=1, seed=1, quiet=True)
    pynas.export(first, str(tmp_path / "first.pt2"), quiet=True)
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        exported = torch.export.load(tmp_path / "first.pt2").module()(x)
        torch.testing.assert_close(exported, first.model(x), atol=1e-4, rtol=1e-4)


def test_retrain_refuses_other_options(run: Run, tmp_path: Path) -> None:
    other = dataclasses.replace(run.best, options={**run.best.options, "classes": 2, "head_channels": 64})
    with pytest.raises(ValueError, match="classes, head_channels"):
        pynas.retrain(run, net=str(other.save(tmp_path / "other.json")), quiet=True)


def test_paths_are_as_good_as_strings(run: Run) -> None:
    pynas.retrain(run.folder, epochs=1, quiet=True)
    assert pynas.evaluate(run.folder, quiet=True) == pynas.evaluate(str(run.folder), quiet=True)


@pytest.mark.parametrize(
    "settings",
    [{"momentum": -1.0}, {"clip": -3.0}, {"weight_decay": -1.0}, {"epochs": 2.5}, {"lr": float("nan")}],
    ids=str,
)
def test_recipes_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Recipe(**settings)


def test_finished_run_is_shown_again(unbroken: Run, capsys: pytest.CaptureFixture[str]) -> None:
    again = pynas.search(resume=str(unbroken.folder))
    assert again.figures == unbroken.figures
    assert "test accuracy" in capsys.readouterr().out
