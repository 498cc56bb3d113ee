"""Reasons to trust a table: checks of its rows, its sums against whole networks, and calibration."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy_device import ABOUT, CONV, toy_rows, toy_table

import cost_models
from cost_models import LatencyTable, OpSpec, Row
from cost_models.agreement import agreement, noise_floor
from cost_models.analytic import Roofline
from cost_models.trust import Calibration, additivity, calibrate, findings_text, self_check, with_section
from pynas.plan import deployed, make_space, space_specs
from pynas.tables import AGAIN, check

SPACE = make_space("fbnet_tiny", {})
MBCONV = OpSpec("mbconv", 16, 24, 16, kernel=3, stride=2, expansion=3)


def table_of(rows: dict[OpSpec, Row], **changes: Any) -> LatencyTable:
    return LatencyTable(dataclasses.replace(ABOUT, **changes), rows)


def scaled(spec: OpSpec, factor: float, spread: float = 0.0) -> dict[OpSpec, Row]:
    rows = toy_rows()
    latency_ms = rows[spec].median_ms * factor
    rows[spec] = Row(spec, tuple(latency_ms * f for f in (1 - spread, 1, 1 + spread)))
    return rows


def checks(table: LatencyTable) -> list[str]:
    return [finding.check for finding in self_check(table, toy_rows())]


def test_a_good_table_has_no_findings() -> None:
    assert self_check(toy_table(), [*toy_rows(), OpSpec("skip", 8, 8, 8)]) == []
    assert findings_text([]) == "no findings"


@pytest.mark.parametrize("space", ["fbnet_tiny", "fbnet32", "fbnet"])
def test_modelled_tables_of_whole_spaces_have_no_findings(space: str) -> None:
    model = Roofline(gmacs_per_s=4.0, gbytes_per_s=8.0, overhead_us=5.0)
    specs = [spec for spec in space_specs(make_space(space, {})) if spec.kind != "skip"]
    table = table_of({spec: Row(spec, (model.cost(spec),)) for spec in specs}, source="modelled", repeats=1)
    assert self_check(table, specs) == []


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 0.03))
def test_noise_within_the_spread_is_no_finding(seed: int, noise: float) -> None:
    random = np.random.default_rng(seed)
    rows = {
        spec: Row(spec, tuple(row.median_ms * np.exp(random.normal(0, noise, 15)))) for spec, row in toy_rows().items()
    }
    assert self_check(table_of(rows, repeats=15), toy_rows()) == []


def test_missing_rows_are_found() -> None:
    rows = toy_rows()
    del rows[MBCONV]
    (finding,) = self_check(table_of(rows), toy_rows())
    assert finding.check == "complete"
    assert finding.specs == (MBCONV,)
    assert f"1 of {len(toy_rows())} ops have no row, such as {MBCONV.key}" in str(finding)
    assert "pynas measure --space SPACE --device toy" in str(finding)


def test_a_row_that_is_not_positive_is_found() -> None:
    rows = toy_rows()
    object.__setattr__(rows[CONV], "repeats_ms", (0.0, 0.0, 0.0))
    assert checks(table_of(rows)) == ["positive"]


@pytest.mark.parametrize("field", ["kernel", "expansion"])
def test_a_larger_op_that_is_cheaper_is_found(field: str) -> None:
    larger = dataclasses.replace(MBCONV, kernel=5) if field == "kernel" else MBCONV
    smaller = MBCONV if field == "kernel" else dataclasses.replace(MBCONV, expansion=1)
    rows = toy_rows()
    factor = rows[smaller].median_ms / rows[larger].median_ms
    found = [
        finding for finding in self_check(table_of(scaled(larger, 0.8 * factor)), rows) if finding.check == "order"
    ]
    assert (smaller, larger) in [finding.specs for finding in found]
    assert f"although its {field} is larger" in "".join(map(str, found))
    assert (smaller, larger) not in [f.specs for f in self_check(table_of(scaled(larger, 0.99 * factor)), rows)]
    wide = scaled(larger, 0.8 * factor, spread=0.5)
    assert (smaller, larger) not in [f.specs for f in self_check(table_of(wide), rows)]


@pytest.mark.parametrize(("factor", "words"), [(1000.0, "times what the other"), (1e-3, "th of what the other")])
def test_a_row_in_another_unit_is_found(factor: float, words: str) -> None:
    found = [f for f in self_check(table_of(scaled(MBCONV, factor)), toy_rows()) if f.check == "line"]
    assert [finding.specs for finding in found] == [(MBCONV,)]
    assert words in str(found[0])


def test_spread_and_interruption_are_found() -> None:
    assert checks(table_of(scaled(CONV, 1.0, spread=0.6))) == ["spread"]
    rows = {spec: Row(spec, tuple(row.median_ms * f for f in (0.9, 1, 1.1))) for spec, row in toy_rows().items()}
    (finding,) = self_check(table_of(rows), rows)
    assert "Half of all rows spread by 10.0% or more" in str(finding)
    (finding,) = self_check(table_of(toy_rows(), repeats=5), toy_rows())
    assert finding.check == "repeats"
    assert "Type the same pynas measure command again" in findings_text([finding])


def called(rows: dict[OpSpec, Row], call_ns: int | str) -> LatencyTable:
    return table_of(rows, machine={**ABOUT.machine, "call_ns": call_ns})


def test_rows_shorter_than_the_call_taken_off_them_are_found() -> None:
    by_latency = sorted(toy_rows().values(), key=lambda row: row.median_ms)
    quarter = len(by_latency) // 4
    for shorter, found in ((quarter, []), (quarter + 1, ["call"])):
        call_ns = round(1e6 * (by_latency[shorter - 1].median_ms + by_latency[shorter].median_ms) / 2)
        assert checks(called(toy_rows(), call_ns)) == found
    (finding,) = self_check(called(toy_rows(), call_ns), toy_rows())
    assert set(finding.specs) == {row.spec for row in by_latency[:shorter]}
    assert f"{shorter} of {len(by_latency)} rows" in str(finding)
    assert "given as" not in str(finding)
    none = {**toy_rows(), by_latency[0].spec: Row(by_latency[0].spec, (1e-4,) * 3)}
    text = str(next(f for f in self_check(called(none, call_ns), none) if f.check == "call"))
    assert "1 of them too short to be told from it (they are given as 0.1 us)" in text
    assert checks(called(toy_rows(), "much")) == []


def test_the_spread_of_a_row_is_judged_by_what_was_timed() -> None:
    row = toy_rows()[CONV]
    wide = scaled(CONV, 1.0, spread=0.6)
    assert checks(called(wide, 0)) == ["spread"]
    assert "spread" not in checks(called(wide, round(2e6 * row.median_ms)))


def test_agreement_by_hand() -> None:
    found = agreement([1.1, 1.8, 4.0, 3.0], [1.0, 2.0, 3.2, 4.0])
    assert found.bias == pytest.approx((0.1 - 0.1 + 0.25 - 0.25) / 4, abs=1e-12)
    assert found.error == pytest.approx(0.175)
    assert found.worst == pytest.approx(0.25)
    assert found.spread == pytest.approx(np.std([0.1, -0.1, 0.25, -0.25], ddof=1))
    assert found.kendall == pytest.approx(4 / 6)
    assert found.spearman == pytest.approx(0.8)
    assert agreement([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]).kendall == 0
    for predicted, measured, message in (
        ([1.0, 2.0], [1.0, 2.0], "At least 3 networks"),
        ([1.0, 2.0, 3.0], [1.0, 2.0], "3 predicted and 2 measured"),
        ([1.0, 2.0, -3.0], [1.0, 2.0, 3.0], "A predicted latency is -3.0 ms"),
        ([1.0, 2.0, 3.0], [1.0, float("nan"), 3.0], "A measured latency is nan ms"),
    ):
        with pytest.raises(ValueError, match=message):
            agreement(predicted, measured)


def test_the_noise_floor_tells_what_noise_permits() -> None:
    random = np.random.default_rng(0)
    measured = random.uniform(9, 11, 40)
    quiet, loud = noise_floor([10.0] * 8, measured), noise_floor(random.normal(10, 1, 200).tolist(), measured)
    assert (quiet.error, quiet.spread, quiet.kendall) == (0, 0, 1)
    assert loud.error == pytest.approx(0.08, rel=0.2)
    assert loud.spread == pytest.approx(0.1, rel=0.2)
    noisy = [agreement(measured, measured * random.normal(1, 0.1, 40)).kendall for _ in range(100)]
    assert loud.kendall == pytest.approx(np.mean(noisy), abs=0.05)
    with pytest.raises(ValueError, match="timed at least 3 times; it was 2"):
        noise_floor([1.0, 2.0], measured)


SUMS = np.linspace(8, 14, 24)


def test_calibration_recovers_scale_and_offset() -> None:
    found = calibrate(SUMS, 1.2 * SUMS + 3)
    assert (found.scale, found.offset_ms) == pytest.approx((1.2, 3))
    assert found.error_before > 0.2
    assert found.error_after < 1e-12
    assert found.helps
    assert found.apply(10) == pytest.approx(15)


def test_calibration_never_makes_small_networks_free() -> None:
    found = calibrate(SUMS, 1.2 * SUMS - 0.5 * SUMS.min())
    assert found.offset_ms == 0
    assert 0 < found.scale < 1.2


def test_calibration_is_judged_on_networks_left_out() -> None:
    """With a network in each part, that is a fit on all the others."""
    measured = SUMS * np.random.default_rng(1).normal(1, 0.1, 24) + 5 * SUMS.mean()
    errors = []
    for index in range(24):
        x, y = np.delete(SUMS, index), np.delete(measured, index)
        table = np.stack([x / y, 1 / y], 1)
        scale, offset = np.linalg.solve(table.T @ table, table.sum(0))
        errors.append(abs((scale * SUMS[index] + offset) / measured[index] - 1))
    assert calibrate(SUMS, measured, folds=24).error_after == pytest.approx(np.mean(errors))
    with pytest.raises(ValueError, match="at least 6 networks; there are 5"):
        calibrate(SUMS[:5], measured[:5])


def test_calibration_that_does_not_help_says_so() -> None:
    exact = calibrate(SUMS, SUMS * np.random.default_rng(0).permutation(np.linspace(0.98, 1.02, 24)))
    assert not exact.helps
    falling = calibrate(SUMS, SUMS[::-1].copy())
    assert falling.scale > 0
    assert falling.offset_ms == 0


def test_calibration_lives_in_the_device_toml(tmp_path: Path) -> None:
    folder = toy_table().copy_to(tmp_path / "device")
    before = (folder / "device.toml").read_text()
    assert Calibration.load(folder) is None
    for scale in (1.1, 1.2):
        calibration = calibrate(SUMS, scale * SUMS + 3)
        calibration.save(folder)
        read = Calibration.load(folder)
        assert read is not None
        assert read.apply(10) == pytest.approx(calibration.apply(10), rel=1e-5)
        assert (read.nets, read.date) == (24, calibration.date)
    text = (folder / "device.toml").read_text()
    assert text.startswith(before.rstrip())
    assert text.count("[calibration]") == 1
    assert cost_models.load_folder(folder).hash == toy_table().hash
    (folder / "device.toml").write_text(with_section(text, "calibration", '[calibration]\nscale = "big"\n'))
    with pytest.raises(ValueError, match=r"device\.toml: \[calibration\] needs scale, of another type than 'big'"):
        Calibration.load(folder)
    with pytest.raises(ValueError, match="positive scale and a finite offset_ms, not -1"):
        Calibration(-1, 0, 6, 0.1, 0.1, "2026-01-01")


def test_a_section_in_the_middle_is_replaced() -> None:
    text = "a = 1\n\n[fit]\nb = 2\n# note\n\n[machine]\ncpu = 'x'\n"
    assert with_section(text, "fit", "[fit]\nb = 3\n") == "a = 1\n\n[machine]\ncpu = 'x'\n\n[fit]\nb = 3\n"


def test_additivity_prints_the_noise_floor_beside_the_errors() -> None:
    text = str(additivity(SUMS.tolist(), (1.1 * SUMS).tolist(), [10.0, 10.1, 9.9, 10.0]))
    assert re.search(r"bias \(mean signed error\) +-9\.1%", text)
    assert re.search(r"mean absolute error +9\.1% +noise floor 0\.6%", text)
    assert re.search(r"Kendall tau +1\.000 +noise alone permits", text)
    assert "after calibration (held out)      0.0%   1.1 x sum" in text
    assert additivity([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0] * 3).calibration is None


def module_ms(module: nn.Module) -> float:
    """Latency on an additive machine: each part takes time for its weights and for being started."""
    parts = [part for part in module.modules() if not list(part.children()) and not isinstance(part, nn.Identity)]
    return sum(0.01 + 1e-4 * sum(weights.numel() for weights in part.parameters()) for part in parts)


@dataclasses.dataclass
class Machine:
    """A runner for whole networks: additive, with an offset and noise as told."""

    offset_ms: float = 0.0
    noise: float = 0.0
    stop_after: int = 10**9
    answer_ms: float | None = None
    timed: list[int] = dataclasses.field(default_factory=list)
    opened: int = 0
    name: str = "clockwork"
    source: str = "measured"
    precision: str = "fp32"
    threads: int = 1
    batch: int = 1
    schedule: str = "v1"

    def provenance(self) -> dict[str, dict[str, str | int]]:
        return {"machine": {"cpu": "Z80"}, "software": {"clockwork": "1.0"}}

    def time_ms(self, module: Any, spec: OpSpec, repeats: int) -> list[float]:
        return [module_ms(module)] * repeats

    def net(self, module: Any, input_shape: tuple[int, ...]) -> Callable[[], float]:
        assert input_shape == (1, 3, 16, 16)
        assert not module.training
        number = self.opened = self.opened + 1

        def once_ms() -> float:
            if len(self.timed) >= self.stop_after:
                raise KeyboardInterrupt
            self.timed.append(number)
            factor = np.random.default_rng(len(self.timed)).normal(1, self.noise)
            return (module_ms(module) + self.offset_ms) * factor if self.answer_ms is None else self.answer_ms

        return once_ms


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    specs = [spec for spec in space_specs(SPACE) if spec.kind != "skip"]
    return table_of({spec: Row(spec, (module_ms(deployed(spec)),) * 3) for spec in specs})


def test_sums_of_an_additive_machine_agree(table: LatencyTable) -> None:
    seen: list[tuple[int, int, float]] = []
    runner = Machine()
    found = check(SPACE, table, runner, nets=8, rounds=3, report=lambda *state: seen.append(state))
    assert found.predicted_ms == pytest.approx(found.measured_ms, rel=1e-5)
    assert found.additivity.agreement.kendall == pytest.approx(1)
    assert found.additivity.noise.error == 0
    assert found.differences == ""
    assert [done for done, _, _ in seen] == list(range(1, 3 * (8 + AGAIN) + 1))
    assert {total for _, total, _ in seen} == {3 * (8 + AGAIN)}
    assert runner.opened == len(set(runner.timed)) == 8
    assert str(found).count("\n") > 8


def test_networks_take_turns_with_the_one_for_the_noise_floor(table: LatencyTable) -> None:
    runner = Machine()
    check(SPACE, table, runner, nets=12, rounds=3)
    a_round = runner.timed[: 12 + AGAIN]
    assert runner.timed == a_round * 3
    again = [place for place, module in enumerate(a_round) if module == a_round[0]]
    assert len(again) == AGAIN + 1
    assert max(np.diff(again)) <= 4


def test_an_offset_is_a_bias_that_calibration_removes(table: LatencyTable) -> None:
    found = check(SPACE, table, Machine(offset_ms=0.5), nets=10, rounds=3).additivity
    assert found.agreement.bias < -0.1
    assert found.agreement.kendall == pytest.approx(1)
    assert found.calibration is not None
    assert (found.calibration.scale, found.calibration.offset_ms) == pytest.approx((1, 0.5), rel=1e-3)
    assert found.calibration.error_after < 1e-4


def test_noise_shows_in_the_floor(table: LatencyTable) -> None:
    found = check(SPACE, table, Machine(noise=0.05), nets=30, rounds=3).additivity
    assert found.noise.error == pytest.approx(0.05 * 0.67 * 0.8, rel=0.6)  # the median of three timings
    assert found.agreement.error == pytest.approx(0.05 * 0.67 * 0.8, rel=0.4)
    assert found.noise.kendall < 1


def test_a_check_goes_on_after_a_break(table: LatencyTable, tmp_path: Path) -> None:
    state = tmp_path / "check.json"
    whole = check(SPACE, table, Machine(), nets=6, rounds=3)
    with pytest.raises(KeyboardInterrupt):
        check(SPACE, table, Machine(stop_after=17), nets=6, rounds=3, state=state)
    rest = Machine()
    again = check(SPACE, table, rest, nets=6, rounds=3, state=state)
    assert len(rest.timed) == 3 * (6 + AGAIN) - 17
    assert again == whole
    assert not state.exists()


def test_timings_of_another_check_are_refused(table: LatencyTable, tmp_path: Path) -> None:
    state = tmp_path / "check.json"
    with pytest.raises(KeyboardInterrupt):
        check(SPACE, table, Machine(stop_after=17), nets=6, rounds=3, state=state)
    before = state.read_text()
    for changed, field in (({"seed": 1}, "nets"), ({"runner": Machine(threads=2)}, "runner")):
        call = {"runner": Machine(), "nets": 6, "rounds": 3, "state": state, **changed}
        with pytest.raises(ValueError, match=rf"belongs to another check \(it differs in: {field}\)"):
            check(SPACE, table, call.pop("runner"), **call)
    assert state.read_text() == before
    content = json.loads(before)
    content["taken_ms"][2][0] = -4.0
    for text in (json.dumps(content), "{", "[]", '{"key": 1}', before[:40]):
        state.write_text(text)
        with pytest.raises(ValueError, match=r"The file of timings .*check\.json is damaged .* Delete it"):
            check(SPACE, table, Machine(), nets=6, rounds=3, state=state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"nets": 5}, "at least 6 networks and 3 rounds, not 5 and 3"),
        ({"rounds": 2}, "not 6 and 2"),
        (
            {"runner": Machine(answer_ms=1e10)},
            r"The network fbnet_tiny\[.*could not be timed by 'clockwork'.*1e\+?10|1000",
        ),
        ({"runner": Machine(answer_ms=float("nan"))}, "could not be timed by 'clockwork': ValueError: it is nan ms"),
    ],
)
def test_what_cannot_be_checked_is_said(table: LatencyTable, call: dict[str, Any], message: str) -> None:
    arguments = {"runner": Machine(), "nets": 6, "rounds": 3} | call
    with pytest.raises(ValueError, match=message):
        check(SPACE, table, arguments.pop("runner"), **arguments)


def test_other_conditions_are_told(table: LatencyTable, tmp_path: Path) -> None:
    found = check(SPACE, table, Machine(threads=2), nets=6, rounds=3)
    assert "the rows were made under other conditions: threads 1 against 2" in str(found)
    with pytest.raises(OSError, match="no folder"):
        check(SPACE, table, Machine(), nets=6, rounds=3, state=tmp_path / "gone" / "check.json")
