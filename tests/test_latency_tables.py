"""Latency tables: exact rows, labelled fits, damaged files, and where tables live."""

from __future__ import annotations

import dataclasses
import os
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from toy_device import ABOUT, CONV, MBCONV, Clockwork, additive_ms, contents, toy_rows, toy_table

import cost_models
from cost_models import LatencyTable, OpSpec, Row, TorchHost, load_folder, measure
from cost_models.rows import COLUMNS


def test_rows_come_back_exactly(tmp_path: Path) -> None:
    table = load_folder(toy_table().copy_to(tmp_path / "run" / "device"))
    for spec, row in toy_rows().items():
        assert table.cost(spec) == row.median_ms == statistics.median(row.repeats_ms)
        assert table.source(spec) == "measured"
    assert table.hash == toy_table().hash
    assert table.describe() == toy_table().describe()
    assert table.spread == pytest.approx(0.025, abs=1e-4)


def test_the_hash_follows_the_content() -> None:
    rows = toy_rows()
    rows[CONV] = Row(CONV, (9.0, 9.0, 9.0))
    assert LatencyTable(ABOUT, rows).hash != toy_table().hash
    assert LatencyTable(replace(ABOUT, threads=2), toy_rows()).hash != toy_table().hash


def test_missing_ops_are_fitted_and_labelled() -> None:
    table = toy_table()
    unseen = OpSpec("mbconv", 24, 24, 12, kernel=5, groups=2, expansion=3)
    assert unseen not in table.rows
    assert table.source(unseen) == "fitted"
    assert table.cost(unseen) == pytest.approx(additive_ms(unseen), rel=1e-3)
    error = table.fit_error("mbconv")
    assert error is not None
    assert error < 1e-3
    assert "ops without a row are fitted, leave-one-out error mbconv 0%" in table.describe()


def test_an_op_that_only_moves_values_is_fitted_from_three_rows() -> None:
    pools = [OpSpec("pool", c, c, size) for c, size in ((16, 4), (64, 4), (64, 7))]
    rows = {spec: Row(spec, (additive_ms(spec),)) for spec in pools}
    unseen = OpSpec("pool", 48, 48, 7)
    assert LatencyTable(ABOUT, rows).cost(unseen) == pytest.approx(additive_ms(unseen), rel=1e-3)
    with pytest.raises(ValueError, match="at least 3 rows of kind 'pool' are needed; there are 2"):
        LatencyTable(ABOUT, {spec: rows[spec] for spec in pools[:2]}).cost(unseen)


def test_tables_from_before_squeeze_and_excitation(tmp_path: Path) -> None:
    folder = toy_table().copy_to(tmp_path)
    path, place = folder / "latency.csv", COLUMNS.index("squeeze")
    lines = [line.split(",") for line in path.read_text().splitlines()]
    path.write_text("".join(",".join(line[:place] + line[place + 1 :]) + "\n" for line in lines))
    assert load_folder(folder).hash == toy_table().hash


def test_the_fit_error_tells_when_a_fit_is_bad() -> None:
    rows = {
        spec: Row(spec, (row.median_ms * (1 if i % 2 else 2),))
        for i, (spec, row) in enumerate(sorted(toy_rows().items()))
    }
    error = LatencyTable(ABOUT, rows).fit_error("mbconv")
    assert error is not None
    assert error > 0.2


@pytest.mark.parametrize(
    ("table", "spec", "reason"),
    [
        (toy_table(), replace(CONV, out_channels=17), "at least 6 rows of kind 'conv' are needed; there are 1"),
        (toy_table(strict=True), replace(MBCONV, size=9), "strict table refuses"),
    ],
    ids=["too few rows", "strict"],
)
def test_what_cannot_be_priced_names_the_command(table: LatencyTable, spec: OpSpec, reason: str) -> None:
    for ask in (table.cost, table.source):
        with pytest.raises(ValueError, match=re.escape(spec.key)) as caught:
            ask(spec)
        assert reason in str(caught.value)
        assert "pynas measure --space SPACE --device toy" in str(caught.value)


# --- damaged tables -------------------------------------------------------------------------------------------------

Damage = Callable[[str], str]


def line(number: int, change: Damage) -> Damage:
    def apply(text: str) -> str:
        lines = text.split("\n")
        lines[number] = change(lines[number])
        return "\n".join(lines)

    return apply


def latency(value: str) -> Damage:
    return line(3, lambda row: ",".join([*row.split(",")[:-3], value, "0.1", value]))


CSV_DAMAGE: dict[str, tuple[Damage, str]] = {
    "no header": (lambda text: text.partition("\n")[2], r"line 1: the header is broken"),
    "missing column": (lambda text: text.replace(",median_ms", "", 1), r"line 1: .*missing: median_ms"),
    "strange column": (lambda text: text.replace("median_ms", "median_ms,mood", 1), r"line 1: .*not expected: mood"),
    "empty file": (lambda text: "", r"line 1: the header is broken"),
    "no rows": (lambda text: text.partition("\n")[0] + "\n", r"is empty.*pynas measure"),
    "not a number": (latency("fast"), r"line 4: repeats_ms is 'fast'; it must be a number"),
    "negative": (latency("-1.5"), r"line 4: a repeat is -1.5 ms"),
    "zero": (latency("0"), r"line 4: a repeat is 0.0 ms"),
    "nan": (latency("nan"), r"line 4: a repeat is nan ms"),
    "infinite": (latency("inf"), r"line 4: a repeat is inf ms"),
    "absurd": (latency("1e9"), r"line 4: a repeat is 1000000000.0 ms"),
    "no repeats": (line(3, lambda row: row.rpartition(",")[0] + ","), r"line 4: repeats_ms is ''"),
    "edited median": (line(3, lambda row: re.sub(r",[^,]*(,[^,]*,[^,]*)$", r",7\1", row)), r"line 4: median_ms is 7"),
    "negative spread": (line(3, lambda row: re.sub(r",[^,]*(,[^,]*)$", r",-1\1", row)), r"line 4: spread_ms is -1"),
    "twice": (lambda text: text + text.splitlines()[-1] + "\n", r"line 25: .* has a row already"),
    "cut off": (lambda text: text[:-40], r"the file is cut off in line 24"),
    "short row": (line(3, lambda row: row.rpartition(",")[0]), r"line 4: there are 14 values for 15 columns"),
    "unknown kind": (lambda text: text.replace(",pool,", ",pol,"), r"line \d+: Unknown op kind 'pol'.*'pool'"),
    "bad channels": (line(3, lambda row: row.replace(",16,", ",16.5,", 1)), r"line 4: in_channels is '16.5'"),
    "skip row": (lambda text: text.replace(",pool,", ",skip,"), r"line \d+: a skip op costs 0"),
    "other device": (lambda text: text.replace("toy-", "tot-"), r"line 2: the row belongs to the table 'tot-"),
}
TOML_DAMAGE: dict[str, tuple[Damage, str]] = {
    "no toml": (lambda text: text + "=", r"device.toml is not a TOML file"),
    "missing field": (lambda text: text.replace('runner = "clockwork"\n', ""), r"device.toml has no field 'runner'"),
    "wrong type": (lambda text: text.replace("threads = 1", 'threads = "1"'), r"threads is '1'; .* type int"),
    "strange source": (lambda text: text.replace("measured", "guessed"), r"source is 'guessed'"),
    "zero batch": (lambda text: text.replace("batch = 1", "batch = 0"), r"batch is 0; it must be at least 1"),
    "date as cpu": (lambda text: text.replace('"Z80"', "2026-01-02"), r"cpu in \[machine\] is"),
    "other conditions": (lambda text: text.replace("threads = 1", "threads = 4"), r"line 2: the row belongs to"),
}
ZOO = {name: ("latency.csv", *damage) for name, damage in CSV_DAMAGE.items()} | {
    name: ("device.toml", *damage) for name, damage in TOML_DAMAGE.items()
}


@pytest.mark.parametrize(("file", "damage", "message"), ZOO.values(), ids=ZOO)
def test_damaged_tables_are_refused_and_left_alone(file: str, damage: Damage, message: str) -> None:
    folder = toy_table().copy_to(cost_models.device_folder("toy"))
    before = (folder / file).read_text()
    (folder / file).write_text(damage(before))
    assert (folder / file).read_text() != before
    damaged = contents(folder)

    with pytest.raises(ValueError, match=message) as caught:
        cost_models.load("toy")
    assert str(folder / file) in str(caught.value) or str(folder / "latency.csv") in str(caught.value)
    assert "\n" not in str(caught.value)
    if "is empty" not in message:  # measuring goes on after an early break
        with pytest.raises(ValueError, match=message + "|other conditions"):
            measure([CONV], build=str, runner=Clockwork(), folder=folder, name="toy", repeats=3)
    assert contents(folder) == damaged
    assert [device.source for device in cost_models.devices() if device.name == "toy"] == ["broken"]


@pytest.mark.parametrize("file", ["device.toml", "latency.csv"])
def test_half_a_device_folder_is_refused(tmp_path: Path, file: str) -> None:
    folder = toy_table().copy_to(tmp_path / "toy")
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"There is no {file} in "):
        load_folder(folder)


def test_binary_files_are_refused(tmp_path: Path) -> None:
    for file, message in (("latency.csv", "is not a text file"), ("device.toml", "is not a TOML file")):
        folder = toy_table().copy_to(tmp_path / "toy")
        (folder / file).write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match=message):
            load_folder(folder)


# --- where tables live ----------------------------------------------------------------------------------------------


def test_devices_are_found_listed_and_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_models.places, "SHIPPED", tmp_path / "nothing")
    assert [device.name for device in cost_models.devices()] == ["host"]
    toy_table().copy_to(cost_models.device_folder("toy"))
    assert [(device.name, device.source, device.rows) for device in cost_models.devices()] == [
        ("host", "not measured yet", 0),
        ("toy", "measured", len(toy_rows())),
    ]
    assert cost_models.load("toy").cost(CONV) == toy_table().cost(CONV)
    assert cost_models.load("toy", strict=True).strict
    with pytest.raises(
        ValueError, match="Unknown device 'tyo'. Did you mean 'toy'.* Allowed: host, toy.*pynas measure"
    ):
        cost_models.load("tyo")


def test_the_users_table_hides_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_models.places, "SHIPPED", tmp_path / "shipped")
    LatencyTable(ABOUT, {CONV: Row(CONV, (1.0,))}).copy_to(tmp_path / "shipped" / "toy")
    assert cost_models.load("toy").cost(CONV) == 1
    LatencyTable(ABOUT, {CONV: Row(CONV, (2.0,))}).copy_to(cost_models.device_folder("toy"))
    assert cost_models.load("toy").cost(CONV) == 2


@pytest.mark.parametrize(
    "section",
    [
        "scale = -1.0\noffset_ms = 0.0",
        "scale = 0.0\noffset_ms = 0.0",
        'scale = "abc"\noffset_ms = 0.0',
        "scale = 1.1",
        "scale = 1.0\noffset_ms = -100.0",
    ],
)
def test_a_calibration_that_makes_no_sense_is_refused(section: str) -> None:
    folder = toy_table().copy_to(cost_models.device_folder("toy"))
    about = folder / "device.toml"
    about.write_text(about.read_text() + f"\n[calibration]\n{section}\n")
    with pytest.raises(ValueError, match=r"device\.toml: \[calibration\] has scale .* --calibrate true"):
        cost_models.load("toy")


def test_a_calibration_scales_rows_and_is_added_once() -> None:
    plain = toy_table()
    about = dataclasses.replace(plain.provenance, calibration={"scale": 1.5, "offset_ms": 0.25, "nets": 30})
    plain.copy_to(cost_models.device_folder("toy"))
    LatencyTable(about, plain.rows).copy_to(cost_models.device_folder("toy"))
    table = cost_models.load("toy")
    assert table.cost(CONV) == pytest.approx(1.5 * plain.cost(CONV))
    assert (table.net_cost, plain.net_cost) == (0.25, 0)
    assert "calibrated on 30 whole networks: 1.5 x sum +0.25 ms" in table.describe()
    assert table.uncalibrated().cost(CONV) == plain.cost(CONV)


def test_a_renamed_folder_is_refused() -> None:
    toy_table().copy_to(cost_models.device_folder("cortex-a72"))
    with pytest.raises(ValueError, match="holds the table of 'toy'"):
        cost_models.load("cortex-a72")


@pytest.mark.parametrize("name", ["", "../x", "A72", "a b", ".hidden", "x/y"])
def test_device_names_that_are_no_folder_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a device name"):
        cost_models.device_folder(name)
    with pytest.raises(ValueError, match="Unknown device"):
        cost_models.load(name)


def test_the_host_folder_follows_machine_and_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    places, runners = cost_models.places, cost_models.runners
    folders = {places.host_folder(), places.host_folder(TorchHost(threads=2))}
    monkeypatch.setattr(runners, "cpu_model", lambda: "another CPU")
    folders.add(places.host_folder())
    monkeypatch.setattr(runners, "_torch_version", lambda: "99.0")
    folders.add(places.host_folder())
    assert len(folders) == 4
    assert {folder.parent for folder in folders} == {Path(os.environ["XDG_CACHE_HOME"], "pynas", "host")}


def test_a_host_that_was_not_measured_says_so() -> None:
    with pytest.raises(ValueError, match="not measured yet.*pynas measure --space SPACE --device host"):
        cost_models.load("host")
