"""Networks judged as paths of a supernet: the same as built ones, in any number of processes, and never twice."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from pynas import SPACES, Architecture, Gates, Supernet
from pynas.training import side_by_side
from pynas.training.data import Data, open_data
from pynas.training.evaluate import accuracy, recalibrate
from pynas.training.feed import batches
from pynas.training.judge import Judging, Score
from pynas.training.submodels import Submodels, read_scores

SMALL = {"input_size": 8, "stem_stride": 1, "stages": [[8, 1, 1], [16, 2, 2]], "head_channels": 32, "classes": 10}
HOW = Judging(calibrate=96, calibrate_batch=32, batch_size=50)


@pytest.fixture(scope="module")
def data() -> Data:
    return open_data("digits", size=8, limit=500)


@pytest.fixture(scope="module")
def net(data: Data) -> Supernet:
    """A supernet whose weights have moved, and whose running statistics mix all paths."""
    torch.manual_seed(0)
    net = Supernet(SPACES.get("fairnas")(**SMALL))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x, y in batches(data.weights, 64, data):
        gates = {}
        for slot in net.slots:
            every = tuple(range(len(slot.choice.options)))
            gates[slot.name] = Gates(torch.full((len(every),), 1 / len(every)), every, every)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x, gates), y).backward()
        optimizer.step()
    return net


def nets(count: int, seed: int = 0) -> list[Architecture]:
    space = SPACES.get("fairnas")(**SMALL)
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        picked = {c.name: (c.options[int(torch.randint(6, (1,), generator=random))],) for c in space.choices()}
        found.append(Architecture("fairnas", picked, space.options()))
    return found


def built(net: Supernet, architecture: Architecture, data: Data, how: Judging) -> float:
    child = net.inherit(architecture)
    if how.calibrate:
        recalibrate(child, data.weights, data, how.calibrate, how.calibrate_batch)
    return accuracy(child, data.arch, data)


@pytest.mark.parametrize("calibrate", [96, 0])
def test_path_equals_the_built_network(calibrate: int, net: Supernet, data: Data) -> None:
    how = Judging(calibrate=calibrate, calibrate_batch=32, batch_size=50)
    found = Submodels(net, data, how=how).scores(nets(6))
    assert [score.accuracy for score in found] == [built(net, a, data, how) for a in nets(6)]
    assert len({score.loss for score in found}) == 6


def test_statistics_of_the_path_matter(net: Supernet, data: Data) -> None:
    """One after the other, in any order, with other networks between: no score depends on what was judged before."""
    some = nets(4)
    forward, backward = Submodels(net, data, how=HOW), Submodels(net, data, how=HOW)
    assert forward.scores(some) == backward.scores(some[::-1])[::-1]
    assert forward.scores(some) != Submodels(net, data, how=Judging(calibrate=0)).scores(some)


def test_nothing_else_moves(net: Supernet, data: Data) -> None:
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    threads, training = torch.get_num_threads(), net.training
    Submodels(net, data, how=HOW).scores(nets(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert (threads, training) == (torch.get_num_threads(), net.training)


def test_later_training_makes_no_difference(net: Supernet, data: Data) -> None:
    changing = copy.deepcopy(net)
    judges = Submodels(changing, data, how=HOW)
    with torch.no_grad():
        for parameter in changing.parameters():
            parameter.zero_()
    assert judges.scores(nets(2)) == Submodels(net, data, how=HOW).scores(nets(2))


def test_limit_and_other_images(net: Supernet, data: Data) -> None:
    few = Submodels(net, data, how=Judging(calibrate=96, calibrate_batch=32, limit=20)).scores(nets(1))[0]
    assert (few.accuracy * 20) == pytest.approx(round(few.accuracy * 20))
    other = Submodels(net, data, images=data.test, how=HOW).scores(nets(1))[0]
    assert (other.accuracy * len(data.test)) == pytest.approx(round(other.accuracy * len(data.test)))


def test_images_that_do_not_fit_are_read_again(net: Supernet, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Submodels(net, data, how=HOW).scores(nets(2))
    monkeypatch.setattr("pynas.training.judge.KEPT_BYTES", 0)
    assert Submodels(net, data, how=HOW).scores(nets(2)) == kept


def test_number_of_processes_makes_no_difference(net: Supernet, data: Data) -> None:
    some = nets(5)
    told: list[str] = []
    side_by_side = Submodels(net, data, how=HOW, processes=2).scores(some, lambda a, score: told.append(a.fingerprint))
    assert side_by_side == Submodels(net, data, how=HOW, processes=1).scores(some)
    assert sorted(told) == sorted(a.fingerprint for a in some)


def test_processes_stay_in_a_with(net: Supernet, data: Data) -> None:
    """One network is worth no process, but the first of many is; processes end with the block."""
    some = nets(4)
    with Submodels(net, data, how=HOW, processes=2, expected=64) as judges:
        first = judges.scores(some[:1])
        assert judges._workers is not None
        workers = [worker._process for worker in judges._workers._workers]
        first += judges.scores(some[1:])
        assert workers[0] is not None
        assert workers[0].poll() is None
    assert judges._workers is None
    assert workers[0].poll() is not None
    assert first == Submodels(net, data, how=HOW, processes=1).scores(some)


def test_what_a_killed_process_left_is_removed(net: Supernet, data: Data, tmp_path: Path) -> None:
    left = tmp_path / ".judging" / "bundle.pt"
    left.parent.mkdir()
    left.write_bytes(b"of a process that was killed")
    Submodels(net, data, how=HOW, processes=2, path=tmp_path / "submodels.jsonl").scores(nets(2))
    assert [path.name for path in tmp_path.iterdir()] == ["submodels.jsonl"]


def test_a_process_that_fails_is_told(net: Supernet, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "WORKER", "no_such_module")
    with pytest.raises(ChildProcessError, match="failed twice.*crashed.*no_such_module.*is kept"):
        Submodels(net, data, how=HOW, processes=2).scores(nets(2))


def test_each_network_is_judged_once(net: Supernet, data: Data, tmp_path: Path) -> None:
    path = tmp_path / "submodels.jsonl"
    some, told = nets(4), []

    def note(architecture: Architecture, score: Score) -> None:
        told.append(architecture.fingerprint)
        assert path.read_text().count("\n") == len(told)  # is kept before anybody hears of it

    judges = Submodels(net, data, how=HOW, path=path)
    first = judges.scores([*some[:2], some[0]], note)
    assert first[0] == first[2]
    assert len(told) == 2
    # Killed in the middle of a line, and begun again: the line is judged anew, the rest is not.
    path.write_text(path.read_text()[:-7])
    told.clear()
    path.write_text(path.read_text().rpartition("\n")[0] + "\n" + '{"context": "ab')
    again = Submodels(net, data, how=HOW, path=path)
    assert again.scores(some, lambda a, score: told.append(a.fingerprint))[:2] == first[:2]
    assert told == [a.fingerprint for a in some[1:]]
    assert path.read_text().count("\n") == 4
    assert read_scores(path, "another") == {}


@pytest.mark.parametrize("change", ["weights", "how", "images"])
def test_scores_of_other_circumstances_are_not_taken(change: str, net: Supernet, data: Data, tmp_path: Path) -> None:
    path, some = tmp_path / "submodels.jsonl", nets(1)
    Submodels(net, data, how=HOW, path=path).scores(some)
    other, told = copy.deepcopy(net), []
    if change == "weights":
        with torch.no_grad():
            next(other.parameters()).add_(1e-3)
    how = Judging(calibrate=64, calibrate_batch=32) if change == "how" else HOW
    images = data.test if change == "images" else None
    judges = Submodels(other, data, how=how, images=images, path=path)
    judges.scores(some, lambda a, score: told.append(a.fingerprint))
    assert len(told) == 1
    assert path.read_text().count("\n") == 2


def test_broken_file_of_scores(net: Supernet, data: Data, tmp_path: Path) -> None:
    path = tmp_path / "submodels.jsonl"
    path.write_text('{"context": 3}\nnonsense\n')
    with pytest.raises(ValueError, match="submodels.jsonl, line 2 is broken"):
        Submodels(net, data, how=HOW, path=path)
    assert path.read_text() == '{"context": 3}\nnonsense\n'


def test_network_of_another_space(net: Supernet, data: Data) -> None:
    space = SPACES.get("fairnas")(**{**SMALL, "width": 2.0})
    strange = Architecture("fairnas", {c.name: ("k3_e3",) for c in space.choices()}, space.options())
    with pytest.raises(ValueError, match="'width': 2.0"):
        Submodels(net, data).scores([strange])


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"calibrate": -1}, "calibrate"), ({"calibrate": 1}, "no statistics"), ({"batch_size": 0}, "batch_size")],
    ids=str,
)
def test_impossible_judging(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Judging(**settings)
