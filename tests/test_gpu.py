"""Training on a GPU: everything follows where there is one, and what a machine without one can check of it."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cell_search import problem as cell_problem
from elsewhere import DEVICE, Elsewhere, brought, pretending
from runs import QUICK, copied
from test_strategies import SHORT, Silent, folder, given_to, make, start

import pynas
from pynas import STRATEGIES, Run, settings
from pynas.kernels import cuda, setting
from pynas.strategies import Candidate, Problem, Strategy
from pynas.strategies.random import random_architectures
from pynas.training.data import Data, open_data
from pynas.training.evaluate import accuracy
from pynas.training.feed import Feed, batches
from pynas.training.loop import READ_EVERY, Diverged, Interrupted, Progress, train
from pynas.training.metrics import as_floats
from pynas.training.optim import autocast
from pynas.training.where import random_state, set_random_state

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
# Further ways of strategies, which take other paths through the code.
WAYS: list[tuple[str, dict[str, Any]]] = [
    ("fbnet", {"sampling": "hard"}),
    ("fbnet", {"sampling": "hard", "hard_gradient": "score", "draw": "image"}),
    ("fbnet", {"skip_dropout": 0.9, "entropy_weight": 0.1}),
    ("fairnas", {"batches": "each"}),
    ("ef", {"batches": "shared"}),
    ("snas", {"estimator": "policy_gradient", "objective": "eta", "measure": "latency"}),
    ("snas", {"estimator": "discrete", "objective": "eta", "resample": "cell", "watch_images": 16}),
    ("darts", {"order": "second"}),
    ("darts", {"order": "single", "watch_images": 16}),
    ("uniform", {"relaxation": "concrete"}),
    ("repnas", {"at_fix": "separate"}),
]
EVERY = [(name, {}) for name in STRATEGIES] + WAYS
# Of the space of cells, where whole edges and nodes may bring nothing.
CELLS: list[tuple[str, dict[str, Any]]] = [
    ("snas", {"drop_path": 0.3, "resample": "cell"}),
    ("darts", {"order": "second"}),
    ("enas", {}),
    ("spos", {}),
]
ASKED = [(name, way, False) for name, way in EVERY] + [(name, way, True) for name, way in CELLS]
# Ways cost as much as strategies, and cells more than layers.
SLOWER = [(*one, pytest.mark.slow if one[1] or one[2] or one[0] == "enas" else ()) for one in ASKED]


@pytest.fixture(scope="module")
def data() -> Data:
    return open_data("digits", size=8, limit=120)


@dataclasses.dataclass(frozen=True)
class Told:
    """What a few steps of a search gave."""

    metrics: list[dict[str, float]]
    epochs: list[dict[str, Any]]
    found: list[Candidate]
    state: dict[str, Any]


def few_steps(strategy: Strategy, given: Problem, data: Data) -> Told:
    """The first and the last step of every epoch."""
    torch.manual_seed(0)
    strategy.prepare(given)
    feed = Feed(data, batch_size=strategy.batch_size, seed=0, device=given.train_on)
    metrics, epochs = [], []
    for epoch in range(strategy.epochs):
        for step in sorted({0, strategy.steps(feed, epoch) - 1}):
            metrics.append(strategy.step(feed, Progress(epoch, step)))
        epochs.append(strategy.end_epoch(epoch))
    return Told(as_floats(metrics), epochs, strategy.derive(feed), strategy.state_dict())


def flat(told: Any) -> list[float]:
    if isinstance(told, Mapping):
        return [x for value in told.values() for x in flat(value)]
    if isinstance(told, list | tuple):
        return [x for value in told for x in flat(value)]
    return [float(told)] if isinstance(told, int | float) else []


def asked(name: str, way: dict[str, Any], cells: bool) -> tuple[Problem, dict[str, Any]]:
    """A problem and hyper-parameters."""
    given = cell_problem(0.5) if cells else given_to(name)
    if "objective" in way:
        given = dataclasses.replace(given, budget=None)
    return given, {**SHORT[name], **way}


@pytest.mark.parametrize(("name", "way", "cells"), [pytest.param(*one, marks=marks) for *one, marks in SLOWER], ids=str)
def test_everything_is_where_the_network_is(name: str, way: dict[str, Any], cells: bool, data: Data) -> None:
    """On a device that refuses tensors of the CPU, as a GPU does, a search is the same; its state comes back."""
    given, changed = asked(name, way, cells)
    make_one = STRATEGIES.get(name)
    with setting.using("reference"):
        here = few_steps(make_one(**changed), given, data)
        with pretending():
            away = few_steps(make_one(**changed), dataclasses.replace(given, train_on=DEVICE), data)  # type: ignore[arg-type]
        assert [record.keys() for record in away.metrics] == [record.keys() for record in here.metrics]
        assert flat(away.metrics) == pytest.approx(flat(here.metrics), rel=1e-3, abs=1e-4)
        assert flat(away.epochs) == pytest.approx(flat(here.epochs), rel=1e-3, abs=1e-4)
        assert [net.architecture for net in away.found] == [net.architecture for net in here.found]
        trained = away.state["net"] if "net" in away.state else away.state["training"]["net"]
        assert all(isinstance(tensor, Elsewhere) for tensor in trained.values())
        back = make_one(**changed)
        feed = start(back, data, given)
        back.load_state_dict(brought(away.state))
        again = back.derive(feed)
        assert [net.architecture for net in again] == [net.architecture for net in away.found]
        assert [net.accuracy for net in again] == pytest.approx([net.accuracy for net in away.found], abs=0.05)


def test_two_devices_are_refused_here() -> None:
    """The device that is none is as strict as it must be."""
    with pretending():
        x = torch.ones(3, device=DEVICE)
        assert x.device.type == DEVICE
        assert float((x * torch.tensor(2.0)).sum()) == 6.0
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="two devices"):
            torch.stack([x, torch.ones(3)])


# What a machine without a GPU says


@no_gpu
def test_no_gpu_is_said_before_anything_is_written(unbroken: Run, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    with pytest.raises(ValueError, match=r"train_on='cuda' needs a GPU, but torch .*, or use train_on='cpu'"):
        pynas.search(train_on="cuda", out=str(out), **QUICK)
    with pytest.raises(ValueError, match="train_on='cuda' needs a GPU"):
        pynas.compare("random", train_on="cuda", out=str(out), quiet=True)
    assert not out.exists()
    run = copied(unbroken, tmp_path)
    before = sorted(run.folder.rglob("*"))
    with pytest.raises(ValueError, match="train_on='cuda' needs a GPU"):
        pynas.retrain(run, train_on="cuda", quiet=True)
    assert sorted(run.folder.rglob("*")) == before


@no_gpu
def test_a_run_of_a_gpu_goes_on_only_if_asked_to(searched: Run) -> None:
    rewrite(searched, "cuda")
    with pytest.raises(ValueError, match=r"change train_on to cpu in .*config\.yaml"):
        pynas.search(resume=str(searched.folder), quiet=True)


def rewrite(run: Run, train_on: str | None) -> None:
    path = run.folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    assert config.pop("train_on") == "cpu"
    path.write_text(yaml.safe_dump(config if train_on is None else {**config, "train_on": train_on}))


@no_gpu
def test_a_run_of_a_gpu_is_read_and_exported_without_one(unbroken: Run, tmp_path: Path) -> None:
    run = copied(unbroken, tmp_path)
    rewrite(run, "cuda")
    assert Run.open(run.folder).best == run.best
    assert pynas.evaluate(run, quiet=True) == pytest.approx(run.figures["test_accuracy"])
    for weights in ("trained", "inherited"):
        path = tmp_path / f"{weights}.onnx"
        assert pynas.export(run, str(path), weights=weights, quiet=True).argmax_agreement == 1.0
    trained = pynas.retrain(run, train_on="cpu", epochs=1, quiet=True)
    assert trained.accuracy > 0


def test_a_run_from_before_there_was_a_choice(unbroken: Run, tmp_path: Path) -> None:
    run = copied(unbroken, tmp_path)
    rewrite(run, None)
    assert pynas.evaluate(run, quiet=True) == pytest.approx(run.figures["test_accuracy"])


def test_words_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="train_on 'gpu'"):
        pynas.search(train_on="gpu", quiet=True)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings.check_kernels("auto", "off", "cuda")
    with cuda.using(None), pytest.raises(ValueError, match="needs the CUDA kernels"):
        settings.check_kernels("fused", "off", "cuda")


def test_import_leaves_cuda_alone(tmp_path: Path) -> None:
    code = "import torch, pynas, pynas.cli; assert not torch.cuda.is_initialized()"
    # Elsewhere than in the source folder, which has no compiled kernels.
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)


# Metrics that are read many steps at a time


class Lazy:
    """A task whose metrics are tensors."""

    epochs = 2
    broken_at = -1

    def __init__(self) -> None:
        self.done = 0

    def steps(self, feed: Feed, epoch: int) -> int:
        return READ_EVERY + 3

    def step(self, feed: Feed, progress: Progress) -> dict[str, Any]:
        self.done += 1
        loss = torch.tensor(float("nan") if self.done - 1 == self.broken_at else float(self.done))
        return {"loss": loss, "lr": 0.5}

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


def test_metrics_are_read_some_steps_later(data: Data, tmp_path: Path) -> None:
    """None is lost at the end of an epoch, in a break, or where the loss is no number."""
    feed, steps, run = Feed(data, batch_size=48, seed=0), READ_EVERY + 3, folder(tmp_path)

    class Breaks(Silent):
        left = 5

        def advance(self, text: str) -> None:
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        train(Lazy(), feed, run, "search", Breaks(), "--resume")
    train(Lazy(), feed, run, "search", Silent(), "--resume")
    means = [record["loss"] for record in run.metrics("search")]
    assert means == [(steps + 1) / 2, steps + (steps + 1) / 2]
    broken = Lazy()
    broken.broken_at = steps + 2
    with pytest.raises(Diverged, match="epoch 2, step 3 at learning rate 0.5"):
        train(broken, feed, folder(tmp_path / "broken"), "search", Silent(), "--resume")


def test_state_of_a_gpus_random_numbers_goes_on_without_one() -> None:
    state = torch.get_rng_state()
    numbers = torch.rand(3)
    set_random_state({"cpu": state, "cuda": torch.zeros(16, dtype=torch.uint8)}, "cpu")
    assert torch.equal(torch.rand(3), numbers)
    assert torch.equal(random_state("cpu"), torch.get_rng_state())


# On a GPU


@pytest.fixture(params=[pytest.param("cuda", marks=GPU)])
def gpu(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(("name", "way", "cells"), ASKED, ids=str)
def test_searches_and_resumes_on_a_gpu(
    name: str, way: dict[str, Any], cells: bool, gpu: str, data: Data, tmp_path: Path
) -> None:
    """A broken search goes on, there and on the CPU; its networks come back to the CPU."""
    given, changed = asked(name, way, cells)
    given = dataclasses.replace(given, train_on=gpu)  # type: ignore[arg-type]

    class Breaks(Silent):
        left = 3

        def advance(self, text: str) -> None:
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)

    def begun(where: Problem) -> tuple[Strategy, Feed]:
        torch.manual_seed(0)
        strategy = STRATEGIES.get(name)(**changed)
        strategy.prepare(where)
        return strategy, Feed(data, batch_size=strategy.batch_size, seed=0, device=where.train_on)

    run = folder(tmp_path)
    with pytest.raises(Interrupted):
        train(*begun(given), run, "search", Breaks(), "--resume")
    strategy, feed = begun(given)
    train(strategy, feed, run, "search", Silent(), "--resume")
    found = strategy.derive(feed)
    assert found
    if hasattr(strategy, "theta_history"):
        assert len(strategy.theta_history()) == strategy.epochs
    state = run.load_checkpoint("search")
    assert state is not None
    here, _ = begun(dataclasses.replace(given, train_on="cpu"))
    here.load_state_dict(state["task"])
    if isinstance(getattr(here, "net", None), pynas.Supernet) and not here.TRAINS:
        inherited = here.net.inherit(found[0].architecture)
        assert {tensor.device.type for tensor in inherited.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("name", ["fbnet", "fairnas", "repnas", "random"])
def test_a_gpus_run_is_used_without_it(
    name: str, gpu: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way on a GPU; then everything that is read, judged and exported where there is none."""
    monkeypatch.setenv("XDG_DATA_HOME", str(home))
    changes: dict[str, Any] = {"strategy": make(name), "train_on": gpu, "out": str(tmp_path), "device": "board"}
    if name == "repnas":
        changes |= {"space": "repnas", "recipe": None, "space_options": {"host": "repvgg_tiny", "input_size": 8}}
        changes |= {"device": "host", "baseline": 0}
    run = pynas.search(**{**QUICK, **changes})
    assert run.figures["trained_on"].startswith("cuda (")
    again = pynas.retrain(run, epochs=2, quiet=True) if name != "repnas" else None
    assert again is None or next(again.model.parameters()).is_cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kept = Run.open(run.folder)
    assert pynas.evaluate(kept, quiet=True) > 0
    assert pynas.export(kept, str(tmp_path / "net.onnx"), quiet=True).argmax_agreement == 1.0
    if name != "random":
        assert pynas.export(kept, str(tmp_path / "inherited.onnx"), weights="inherited", quiet=True)


@pytest.mark.parametrize(("amp", "tolerance"), [("off", 1e-2), ("bf16", 5e-2)])
def test_a_network_answers_alike_on_a_gpu(amp: Any, tolerance: float, gpu: str, data: Data) -> None:
    """Up to what TF32, torch's default for convolutions there, and bfloat16 leave of it."""
    given = given_to("fbnet")
    (architecture,) = random_architectures(given.space, given.table, 1, None, 0.1, 0)
    net, (x, _) = architecture.build().eval(), next(batches(data.test, 64, data))
    answers = []
    for where in ("cpu", gpu):
        with torch.inference_mode(), autocast(amp, where):
            answers.append(net.to(where)(x.to(where)).float().cpu())
    assert (answers[0] - answers[1]).abs().max() <= tolerance * answers[0].abs().max()
    assert accuracy(net, data.test, data, amp=amp) == accuracy(net, data.test, data, amp=amp)
