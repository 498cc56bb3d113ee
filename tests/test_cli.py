"""The command line: the same functions, one-sentence errors, exit codes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from tables import write_table

from pynas.cli import main


def config_of(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, object]:
    with pytest.raises(SystemExit) as stop:
        main(["search", *flags, "--print_config"])
    assert stop.value.code == 0
    parsed: dict[str, object] = yaml.safe_load(capsys.readouterr().out)
    return parsed


def test_defaults_come_from_the_signature(capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(capsys)
    assert (config["space"], config["strategy"], config["data"], config["device"]) == (
        "fbnet_tiny",
        "auto",
        "digits",
        "host",
    )


@pytest.mark.parametrize("flags", [["--strategy", "fbnet", "--strategy.tau_start", "4"], ["--strategy.tau_start=4"]])
def test_hyper_parameters_become_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    strategy = config_of(capsys, *flags)["strategy"]
    assert isinstance(strategy, dict)
    assert strategy["class_path"].endswith("FBNet")
    assert strategy["init_args"]["tau_start"] == 4.0
    assert strategy["init_args"]["epochs"] == 16  # of the quick preset


def test_preset_fills_hyper_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    strategy = config_of(capsys, "--preset", "paper", "--strategy", "fbnet", "--strategy.beta", "0.9")["strategy"]
    assert isinstance(strategy, dict)
    assert strategy["init_args"]["epochs"] == 90
    assert strategy["init_args"]["beta"] == 0.9


def test_config_file_round_trip(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = config_of(capsys, "--strategy.beta", "0.7", "--recipe.epochs", "3", "--seed", "5")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    assert config_of(capsys, "--config", str(path)) == config


def test_objectives_become_flags(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--objectives", "accuracy,latency", "--limits.macs", "4e8", "--limits.latency", "20"]
    more = ["--directions.params", "max", "--evolution.population", "12", "--strategy", "spos"]
    config = config_of(capsys, *flags, *more, "--strategy.evaluations", "33")
    asked = (config["objectives"], config["limits"], config["directions"])
    assert asked == ("accuracy,latency", {"macs": 4e8, "latency": 20.0}, {"params": "max"})
    assert isinstance(config["evolution"], dict)
    assert (config["evolution"]["population"], config["evolution"]["entrants"]) == (12, 4)
    assert isinstance(config["strategy"], dict)
    assert config["strategy"]["init_args"]["evaluations"] == 33


def test_epochs_shape_a_strategy_with_other_flags(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--strategy", "random", "--strategy.candidates", "8", "--epochs", "16"]
    strategy = config_of(capsys, *flags)["strategy"]
    assert isinstance(strategy, dict)
    assert (strategy["init_args"]["candidates"], strategy["init_args"]["epochs"]) == (8, 16)


@pytest.mark.parametrize("described", [False, True])
def test_flags_go_on_top_of_a_config_file(described: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = config_of(capsys, *(["--strategy.beta", "0.7"] if described else []))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    strategy = config_of(capsys, "--config", str(path), "--strategy.theta_lr", "0.5")["strategy"]
    assert isinstance(strategy, dict)
    assert strategy["init_args"]["theta_lr"] == 0.5
    assert strategy["init_args"]["beta"] == (0.7 if described else 0.6)


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (["search", "--space", "fbnt"], 1, "Unknown space 'fbnt'. Did you mean 'fbnet'"),
        (["search", "--strategy", "fbnets"], 1, "Did you mean 'fbnet'"),
        (["search", "--strategy.tau", "4"], 1, "Unknown hyper-parameter of strategy FBNet 'tau'"),
        (["search", "--preset", "papre"], 1, "Did you mean 'paper'"),
        (
            ["search", "--latency_ms", "fast"],
            2,
            "--latency_ms cannot be 'fast'; expected float or 'auto' or null. See: pynas search --help",
        ),
        (["search", "--strategy.skip_dropout", "1.5"], 1, "skip_dropout in [0, 1]"),
        (["search", "--recipe.epochs", "0"], 1, "epochs >= 1"),
        (["search", "--recipe.momentum", "-1"], 1, "momentum of the recipe must lie in [0, 1)"),
        (["search", "--strategy.beta", "1", "--strategy"], 2, "--strategy"),
        (["search", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["search", "--sedd", "1"], 2, "--sedd"),
        (["search", "--objectives", "accuracy,latncy"], 1, "Unknown objective 'latncy'. Did you mean 'latency_ms'"),
        (["search", "--limits.macs", "few"], 2, "--limits cannot be 'few'; expected float"),
        (["search", "--limits.macs", "4e8"], 1, "limits goes with objectives"),
        (["search", "--directions.params", "big"], 2, "expected 'max', 'min'"),
        (["search", "--objectives", "accuracy,macs"], 1, "takes no objectives"),
        (["rank", "nowhere"], 1, "There is no run at nowhere"),
        (["search", "--recipe.epochs", "many"], 2, "--recipe.epochs cannot be 'many'; expected int"),
        (["serch"], 2, "search"),
        ([], 2, "search"),
        (["export", "nowhere"], 1, "There is no run at nowhere"),
        (["list", "space"], 2, "--what cannot be 'space'; expected 'spaces', 'strategies'"),
    ],
)
def test_errors_are_one_sentence(args: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == status
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.startswith("pynas: error: ")
    assert len(captured.err.strip().splitlines()) == 1
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("what", ["spaces", "strategies", "formats", "published", "ops", "devices"])
def test_list(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_table("board")
    assert main(["list", what]) == 0
    expected = {
        "spaces": "fbnet32",
        "strategies": "random",
        "formats": "onnx",
        "published": "fbnet_iphonex",
        "ops": "k5_e1_g2",
        "devices": "board",
    }
    assert expected[what] in capsys.readouterr().out


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "isa" in out
    assert "onnxruntime" in out


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYNAS_DEBUG", "1")
    with pytest.raises(ValueError, match="Unknown space"):
        main(["search", "--space", "fbnt"])
    assert os.environ["PYNAS_DEBUG"] == "1"


def test_help_of_commands_on_runs_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("retrain", "evaluate", "export"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said = capsys.readouterr().out
        assert "(required, type:" in said
        assert "torch.nn" not in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["fairness"], "pynas fairness needs: runs. See: pynas fairness --help"),
        (["fairness", "--quiet", "true", "here", "there"], "There is no run at here"),
        (["fairness", "here", "--quiet=true", "there"], "There is no run at here"),
        (["search", "--strategy", "spos", "--strategy.evaluations", "few"], "cannot be 'few'; expected int."),
        (
            ["search", "--strategy", "fairnas", "--strategy.batches", "all"],
            "cannot be 'all'; expected 'shared', 'each'.",
        ),
    ],
)
def test_misuse_is_told(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) in (1, 2)
    assert says in capsys.readouterr().err
