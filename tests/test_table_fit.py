"""Per-op tables fitted from whole networks: recovery, verdicts, drift, files of timed networks."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_device import toy_table

import cost_models
from cost_models import OpSpec, load_folder
from cost_models.additive import AdditiveFit, fit_rows, fit_table
from cost_models.analytic import Roofline
from cost_models.drift import drift
from cost_models.plan import save_rows
from cost_models.ridge import Ridge
from pynas.architecture import Architecture
from pynas.plan import make_space
from pynas.registry import SearchSpace
from pynas.tables import fit_csv
from pynas.timed_nets import net_specs, random_nets, read_timed_nets

SPACE = make_space("fbnet_tiny", {})
NETS = random_nets(SPACE, 400, seed=1)
SPECS = [net_specs(SPACE, net) for net in NETS]
ROOFLINE = Roofline(gmacs_per_s=2.0, gbytes_per_s=4.0, overhead_us=10.0)


def _truth() -> dict[OpSpec, float]:
    """Latency of each op: a roofline that is off by a third in either direction, so that no smooth guess fits."""
    random = np.random.default_rng(5)
    specs = sorted({spec for net in SPECS for spec in net if spec.kind != "skip"})
    return {spec: ROOFLINE.cost(spec) * float(np.exp(random.normal(0, 0.3))) for spec in specs}


TRUTH = _truth()
SUMS = np.array([sum(TRUTH.get(spec, 0.0) for spec in net) for net in SPECS])


def noisy(latency: np.ndarray, spread: float, seed: int = 0) -> np.ndarray:
    return latency * np.exp(np.random.default_rng(seed).normal(0, spread, len(latency)))


def fitted(latency: np.ndarray, nets: list[tuple[OpSpec, ...]] = SPECS) -> AdditiveFit:
    return fit_table(nets, latency.tolist())


def test_an_additive_device_is_recovered_exactly() -> None:
    fit = fitted(SUMS[:300], SPECS[:300])
    unseen = [fit.rows.predict_ms(net) for net in SPECS[300:]]
    assert unseen == pytest.approx(SUMS[300:], rel=1e-6)
    sure = [spec for spec in TRUTH if spec not in fit.rows.undetermined]
    assert sure
    for spec in sure:
        assert fit.rows.latency_ms[spec] == pytest.approx(TRUTH[spec], rel=1e-4)
    assert fit.held_out.error < 1e-6
    assert fit.verdict.kind == "additive"
    assert fit.noise is None


def test_what_networks_cannot_tell_is_named() -> None:
    """Every network runs the stem, the head and one option of each layer that changes shape."""
    changing = {
        spec
        for net in SPECS
        for spec in net
        if spec.kind == "mbconv" and (spec.stride, spec.in_channels) != (1, spec.out_channels)
    }
    always = {*SPACE.fixed_specs(), *(spec for net in SPECS for spec in net if spec.kind == "conv")}
    rows = fit_rows(SPECS, SUMS.tolist())
    assert rows.undetermined == changing | always
    groups = 3  # layers that change shape: each gives away one number to the fixed part
    assert rows.unknowns == len(TRUTH) - len(SPACE.fixed_specs()) + 1 - groups


def test_noise_and_the_verdict_next_to_it() -> None:
    timed = [*SPECS, *SPECS[:40], *SPECS[:40]]
    latency = noisy(np.concatenate([SUMS, SUMS[:40], SUMS[:40]]), 0.02)
    fit = fitted(latency, timed)
    assert fit.nets == len(SPECS)
    assert fit.noise == pytest.approx(0.02 * 0.8 * (360 + 40 / 3**0.5) / 400, rel=0.2)
    assert fit.held_out.error == pytest.approx(fit.noise, rel=0.3)
    assert fit.verdict.kind == "additive"
    assert fit.held_out.error < fit.guess.error
    assert fit.held_out.error < fit.macs.error
    assert fit.held_out.kendall > fit.macs.kendall
    assert max(fit.verdict.by_curve, fit.verdict.by_pairs, fit.verdict.by_drift) < 0.1


def alternating(net: tuple[OpSpec, ...]) -> float:
    """Share by which a network gets slower: ops of another kernel size than the op before find nothing in the cache."""
    kernels = [spec.kernel for spec in net if spec.kind == "mbconv"]
    return 0.12 * sum(a != b for a, b in zip(kernels, kernels[1:], strict=False))


@pytest.mark.parametrize(
    ("latency", "explained", "kind"),
    [
        (
            SUMS + 4 * np.maximum(SUMS - np.median(SUMS), 0),
            "by_curve",
            "not additive",
        ),  # throttles under a heavy network
        (np.maximum(SUMS, 1.15 * np.median(SUMS)), "by_curve", "nearly additive"),  # waits for something else
        (SUMS * np.array([1 + alternating(net) for net in SPECS]), "by_pairs", "not additive"),
    ],
    ids=["throttling", "waiting", "interplay"],
)
def test_a_device_that_is_not_additive_is_found_out(latency: np.ndarray, explained: str, kind: str) -> None:
    fit = fitted(latency)
    assert getattr(fit.verdict, explained) > 0.1
    assert fit.verdict.kind == kind
    assert f"The device is {kind}" in str(fit)
    assert "of it." in fit.verdict.sentence


def test_an_error_far_above_the_noise_is_not_additive_even_unexplained() -> None:
    """Each network has a latency of its own that repeats agree on, and that nothing else has to do with."""
    own = noisy(SUMS, 0.08)
    latency = noisy(np.concatenate([own, own[:50]]), 0.002, seed=1)
    fit = fitted(latency, [*SPECS, *SPECS[:50]])
    assert fit.verdict.kind == "not additive"
    assert "Neither" in fit.verdict.sentence
    unknown = fitted(own)
    assert unknown.verdict.kind == "cannot tell"
    assert "time a few networks several times" in unknown.verdict.sentence


def test_few_networks_cannot_tell() -> None:
    fit = fitted(noisy(SUMS[:40], 0.02), SPECS[:40])
    assert fit.verdict.kind == "cannot tell"
    assert "40 networks are few" in fit.verdict.sentence
    with pytest.raises(ValueError, match="At least 20 different networks are needed.* there are 19"):
        fitted(SUMS[:19], SPECS[:19])
    with pytest.raises(ValueError, match="400 networks and 3 latencies"):
        fit_table(SPECS, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="The latency of network 2 is nan"):
        fit_table(SPECS[:3], [1.0, float("nan"), 3.0])


ALIKE = np.full(100, 12.3)
CONSTANT = {
    "equal": (ALIKE, "take 12.3 ms, however"),
    "between two steps": (
        np.round(noisy(ALIKE + 0.05, 0.003), 1),
        r"take 12.3 to 12.4 ms and are given in steps of 0.1 ms",
    ),
    "two wild ones": (np.where(np.arange(100) % 40, ALIKE, 500.0), "take 12.3 ms, however"),
    "two states": (np.where(SUMS[:100] > np.median(SUMS[:100]), 33.3333, 16.6667), "take 16.6667 to 33.3333 ms and"),
    "many digits": (noisy(ALIKE, 1e-3), r"take 12.2\d+ to 12.3\d+ ms, however"),
}


@pytest.mark.parametrize(("latency", "words"), CONSTANT.values(), ids=CONSTANT)
def test_networks_that_all_take_as_long_tell_nothing(tmp_path: Path, latency: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=f"It cannot be told .* nearly all of the 100 networks {words}"):
        fit_csv(SPACE, write_csv(tmp_path / "nets.csv", latency), "my-phone")
    assert not cost_models.device_folder("my-phone").exists()


@pytest.mark.parametrize("repeated", [0, 40])
def test_a_constant_under_noise_is_not_called_additive(repeated: int) -> None:
    nets = [*SPECS[:150], *SPECS[:repeated]]
    fit = fitted(noisy(np.full(len(nets), 12.3), 0.02), nets)
    assert fit.verdict.kind == "cannot tell"
    assert "in no better order than chance" in fit.verdict.sentence


def test_coarse_latencies_are_taken_where_they_tell_something() -> None:
    step = SUMS.std()
    fit = fitted(np.round(SUMS[:150] / step * 2) * step / 2, SPECS[:150])
    assert fit.held_out.kendall > 0.5


def test_disturbed_timings_do_not_spoil_the_rows() -> None:
    latency = noisy(SUMS, 0.003)
    random = np.random.default_rng(3)
    latency[random.permutation(400)[:30]] *= random.uniform(1.5, 4, 30)
    rows = fit_rows(SPECS, latency.tolist())
    errors = np.abs([rows.predict_ms(net) / true - 1 for net, true in zip(SPECS, SUMS, strict=True)])
    assert errors.mean() < 0.005


def test_drift_is_told_from_networks_and_taken_out() -> None:
    heat = np.where(np.arange(400) // 40 % 2, 1.25, 1.0)
    fit = fitted(noisy(SUMS, 0.003) * heat)
    assert fit.verdict.by_drift > 0.5
    assert fit.verdict.kind == "nearly additive"
    assert fit.verdict.lasting < 0.03 < fit.held_out.error
    assert "drifted while it was timed" in fit.verdict.sentence
    ratios = np.array([fit.rows.predict_ms(net) for net in SPECS]) / SUMS
    assert ratios.std() / ratios.mean() < 0.01


def test_a_sorted_file_is_not_taken_for_drift() -> None:
    latency = SUMS + 4 * np.maximum(SUMS - np.median(SUMS), 0)
    order = np.argsort(latency)
    fit = fitted(latency[order], [SPECS[index] for index in order])
    assert fit.verdict.by_drift == 0
    assert fit.verdict.kind == "not additive"


def test_no_drift_in_noise() -> None:
    found = [
        drift(np.random.default_rng(seed).normal(0, 0.02, 300), SUMS[:300], np.random.default_rng(seed))
        for seed in range(40)
    ]
    assert sum(share > 0 for share, _ in found) <= 6
    assert max(share for share, _ in found) < 0.1


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.0, 1.0), st.integers(20, 60))
def test_rows_are_positive_whatever_was_timed(seed: int, spread: float, count: int) -> None:
    rows = fit_rows(SPECS[:count], noisy(SUMS[:count], spread, seed).tolist())
    assert min(rows.latency_ms.values()) > 0
    assert np.isfinite(list(rows.latency_ms.values())).all()


@settings(max_examples=10, deadline=None)
@given(st.floats(1e-3, 1e3))
def test_the_unit_does_not_matter(scale: float) -> None:
    latency = noisy(SUMS[:100], 0.01)
    plain, scaled = fit_rows(SPECS[:100], latency.tolist()), fit_rows(SPECS[:100], (latency * scale).tolist())
    for spec, latency_ms in plain.latency_ms.items():
        assert scaled.latency_ms[spec] == pytest.approx(latency_ms * scale, rel=1e-5)


def test_an_op_that_no_network_had_is_refused() -> None:
    rows = fit_rows(SPECS, SUMS.tolist())
    with pytest.raises(ValueError, match="No network of the fit has the op conv-i3-o99"):
        rows.predict_ms([OpSpec("conv", 3, 99, 16)])


@pytest.mark.parametrize(("rows", "columns"), [(30, 8), (12, 40)])
def test_leave_one_out_equals_fits_without_the_row(rows: int, columns: int) -> None:
    random = np.random.default_rng(0)
    table, target = random.normal(size=(rows, columns)), random.normal(size=rows)
    ridge = Ridge.of(table, np.array([1e-3, 1e-1]))
    errors = ridge.left_out(target)
    for index, strength in enumerate(ridge.strengths):
        for row in range(rows):
            others, wanted = np.delete(table, row, 0), np.delete(target, row)
            weights = np.linalg.solve(others.T @ others + strength * np.eye(columns), others.T @ wanted)
            assert errors[index, row] == pytest.approx(target[row] - table[row] @ weights, rel=1e-8)
        hat = table @ np.linalg.solve(table.T @ table + strength * np.eye(columns), table.T)
        assert ridge.freedom(index) == pytest.approx(np.trace(hat))


def options(net: Architecture) -> list[str]:
    return [name for (name,) in net.choices.values()]


def write_csv(path: Path, latency: np.ndarray = SUMS, spell: Callable[[Architecture], str] | None = None) -> Path:
    spell = spell or (lambda net: " ".join(options(net)))
    lines = [f'"{spell(net)}",{latency_ms:.9g}' for net, latency_ms in zip(NETS, latency, strict=False)]
    path.write_text("\n".join(["architecture,latency_ms", *lines, ""]))
    return path


@pytest.mark.parametrize(
    "spell",
    [
        lambda net: " ".join(options(net)),
        lambda net: ", ".join(options(net)),
        lambda net: "-".join(options(net)),
        lambda net: ";".join(options(net)),
        str,
        lambda net: net.to_json().replace('"', '""'),
    ],
    ids=["spaces", "commas", "dashes", "semicolons", "str", "json"],
)
def test_architectures_may_be_spelt_in_many_ways(tmp_path: Path, spell: Callable[[Architecture], str]) -> None:
    timed = read_timed_nets(SPACE, write_csv(tmp_path / "nets.csv", SUMS[:25], spell))
    assert [net.architecture for net in timed] == NETS[:25]
    assert [net.latency_ms for net in timed] == pytest.approx(SUMS[:25])


def test_architectures_may_be_files_beside_the_csv(tmp_path: Path) -> None:
    (tmp_path / "nets").mkdir()
    NETS[0].save(tmp_path / "nets" / "a.json")
    text = "note,latency_ms,architecture\r\nfirst,1.5,nets/a.json\r\n,,\r\nagain, 1.6 ,nets/a.json\r\n"
    (tmp_path / "nets.csv").write_text("\ufeff" + text, encoding="utf-8")
    timed = read_timed_nets(SPACE, tmp_path / "nets.csv")
    assert [(net.architecture, net.latency_ms) for net in timed] == [(NETS[0], 1.5), (NETS[0], 1.6)]


GOOD = " ".join(options(NETS[0]))
OTHER = json.dumps(random_nets(make_space("fbnet32", {}), 1, 0)[0].to_json())[1:-1].replace('\\"', '""')
RESIZED = random_nets(make_space("fbnet_tiny", {"classes": 7}), 1, 0)[0].to_json().replace('"', '""')


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("", 1, "the header lacks the column 'architecture'"),
        ("architecture,ms\n", 1, "the header lacks the column 'latency_ms'"),
        ("architecture,latency_ms,latency_ms\n", 1, "the header repeats the column 'latency_ms'"),
        (f"architecture,latency_ms\n{GOOD},1\n{GOOD},fast\n", 3, "latency_ms is 'fast'; it must be a number"),
        (f"architecture,latency_ms\n{GOOD},-1\n", 2, "latency_ms is -1.0 ms; a latency must be positive"),
        (f"architecture,latency_ms\n{GOOD},inf\n", 2, "latency_ms is inf ms"),
        (f"architecture,latency_ms\n{GOOD},1e10\n", 2, "latency_ms is 10000000000.0 ms"),
        (f"architecture,latency_ms\n{GOOD},12,5\n", 2, "3 values for 2 columns; .* write decimals with a point"),
        (f"architecture,latency_ms\n{GOOD}\n", 2, "1 values for 2 columns"),
        ("architecture,latency_ms\n,3\n", 2, "the architecture is empty"),
        ("architecture,latency_ms\nk3_e1 k3_e1,3\n", 2, "names 2 options; space 'fbnet_tiny' has 6 choices"),
        (f"architecture,latency_ms\n{GOOD[:-5]}k4_e9,3\n", 2, "Unknown option of 'layer6' .*k4_e9"),
        ("architecture,latency_ms\nnone.json,3\n", 2, "There is no architecture file"),
        ('architecture,latency_ms\n"{""space"": 1}",3\n', 2, "must be a JSON object with exactly the fields"),
        (f'architecture,latency_ms\n"{OTHER}",3\n', 2, "belongs to the space 'fbnet32', not to 'fbnet_tiny'"),
        (f'architecture,latency_ms\n"{RESIZED}",3\n', 2, "with other options than asked for"),
        (f'architecture,latency_ms\n"{GOOD},3\n', 2, "unexpected end of data"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str, line: int, message: str) -> None:
    path = tmp_path / "nets.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"nets\.csv, line {line}: .*{message}"):
        read_timed_nets(SPACE, path)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file .*gone.csv"):
        read_timed_nets(SPACE, tmp_path / "gone.csv")
    (tmp_path / "header.csv").write_text("architecture,latency_ms\n")
    with pytest.raises(ValueError, match="header.csv has no network after its header"):
        read_timed_nets(SPACE, tmp_path / "header.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary.csv is not a text file"):
        read_timed_nets(SPACE, tmp_path / "binary.csv")


def net_cost(space: SearchSpace, table: cost_models.LatencyTable, net: Architecture) -> float:
    return sum(table.cost(spec) for spec in net_specs(space, net))


def test_a_file_becomes_a_device(tmp_path: Path) -> None:
    made = fit_csv(SPACE, write_csv(tmp_path / "nets.csv", SUMS[:300]), "my-phone", precision="int8", threads=4)
    table = cost_models.load("my-phone")
    assert made.folder == cost_models.device_folder("my-phone")
    assert (table.provenance.source, table.provenance.precision, table.provenance.threads) == ("fitted", "int8", 4)
    assert [net_cost(SPACE, table, net) for net in NETS[300:]] == pytest.approx(SUMS[300:], rel=1e-4)
    section = tomllib.loads((made.folder / "device.toml").read_text())["fit"]
    assert section["verdict"] == made.fit.verdict.kind == "additive"
    assert section["nets"] == 300
    assert section["error"] == pytest.approx(made.fit.held_out.error, rel=1e-5)
    assert table.describe().startswith("my-phone: fitted on")
    judged = "fitted from 300 whole networks, mean error 0.00% on networks left out; the device: additive"
    assert judged in table.describe()
    copy = load_folder(table.copy_to(tmp_path / "run" / "device"))  # as into a run folder
    assert (copy.provenance, copy.describe()) == (table.provenance, table.describe())
    save_rows(made.folder, dataclasses.replace(table.provenance, fit={}), dict(table.rows))
    assert cost_models.load("my-phone").provenance.fit == section
    assert "verdict: The device is additive" in str(made)
    with pytest.raises(ValueError, match="holds a table already. Choose another device name"):
        fit_csv(SPACE, tmp_path / "nets.csv", "my-phone")


@pytest.mark.parametrize("section", ["nets = 30", "error = 0.1", 'nets = "30"\nerror = 0.1', "nets = 3\nerror = -0.1"])
def test_a_fit_that_makes_no_sense_is_refused(section: str) -> None:
    folder = toy_table().copy_to(cost_models.device_folder("toy"))
    about = folder / "device.toml"
    about.write_text(about.read_text() + f"\n[fit]\n{section}\n")
    with pytest.raises(ValueError, match=r"device\.toml: \[fit\] has nets .* fit anew: pynas table fit"):
        cost_models.load("toy")


def test_nothing_is_written_when_the_file_will_not_do(tmp_path: Path) -> None:
    write_csv(tmp_path / "nets.csv", SUMS[:10])
    for device, message in (("My Phone", "cannot be a device name"), ("my-phone", "At least 20 different networks")):
        with pytest.raises(ValueError, match=message):
            fit_csv(SPACE, tmp_path / "nets.csv", device)
    assert not cost_models.device_folder("my-phone").exists()
    fit = fitted(SUMS)
    with pytest.raises(ValueError, match="is \"fitted\", not 'measured'"):
        fit.table(cost_models.Provenance.of("x", cost_models.TorchHost(), 3))
