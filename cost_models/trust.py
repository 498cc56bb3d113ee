"""Reasons to trust a table, or not: checks of its rows, its sums against whole networks, and a calibration."""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .agreement import Agreement, Floats, Noise, agreement, noise_floor
from .files import write_atomic
from .fit import MIN_ROWS, features
from .provenance import FILE
from .rows import Row
from .spec import OpSpec
from .steady import RESOLUTION_MS
from .table import LatencyTable, measure_hint

ORDER_TOLERANCE = 0.02  # a larger op may be this much cheaper: less is no fault that anyone should chase
NOISY_ROW, NOISY_TABLE = 0.25, 0.05  # interquartile range / median
SHORT_ROWS = 0.25  # of all rows, below what a call takes
OUT_OF_LINE = 4.0  # times what the other rows of the kind suggest
MIN_NETS = 6  # to calibrate
SECTION = "calibration"


@dataclass(frozen=True)
class Finding:
    """Something in a table that a user should look at.

    Args:
        check: "complete", "positive", "order", "line", "call", "spread" or "repeats".
        sentence: What was found, in plain words.
        specs: The ops it is about.
    """

    check: str
    sentence: str
    specs: tuple[OpSpec, ...] = ()

    def __str__(self) -> str:
        return self.sentence


def self_check(table: LatencyTable, specs: Iterable[OpSpec]) -> list[Finding]:
    """Looks for faults in a table without any further measurement.

    Complete: each of `specs` has a row. Positive: as it says. Order: of two ops that differ in expansion or kernel size
    only, the larger is not cheaper by more than both rows' spreads and 2 %. In line: no row is four times off what the
    other rows of its kind suggest. Call: at most a quarter of the rows is below what a call of the runtime takes, where
    that was taken off. Spread: of single rows and of the table. Repeats: none was interrupted.

    Args:
        table: To be checked.
        specs: What it should hold; doubles, skip and none are ignored.

    Returns:
        What was found; empty for a table without fault.
    """
    wanted = sorted({spec.deployed for spec in specs if not spec.free})
    found = [*_incomplete(table, wanted), *_not_positive(table)]
    if found and found[-1].check == "positive":
        return found  # the checks below divide by latencies
    checks = (_out_of_order, _out_of_line, _near_the_call, _noisy, _interrupted)
    return [*found, *(finding for check in checks for finding in check(table))]


def findings_text(findings: Sequence[Finding]) -> str:
    """One line for each finding, or "no findings"."""
    return "\n".join(f"- {finding}" for finding in findings) or "no findings"


def _incomplete(table: LatencyTable, wanted: list[OpSpec]) -> list[Finding]:
    lacking = tuple(spec for spec in wanted if spec not in table.rows)
    if not lacking:
        return []
    text = f"{len(lacking)} of {len(wanted)} ops have no row, such as {lacking[0].key}. {measure_hint(table.name)}"
    return [Finding("complete", text, lacking)]


def _not_positive(table: LatencyTable) -> list[Finding]:
    wrong = tuple(spec for spec, row in table.rows.items() if not 0 < row.median_ms < np.inf)
    if not wrong:
        return []
    text = f"{len(wrong)} rows are not positive, such as {wrong[0].key} with {table.rows[wrong[0]].median_ms:g} ms."
    return [Finding("positive", text, wrong)]


def _out_of_order(table: LatencyTable) -> list[Finding]:
    found = []
    for field in ("expansion", "kernel"):
        families: dict[OpSpec, list[Row]] = {}
        for spec, row in table.rows.items():
            if not spec.free and spec.kind not in ("pool", "linear"):
                families.setdefault(OpSpec.from_dict({**spec.to_dict(), field: 1}), []).append(row)
        for family in families.values():
            ordered = sorted(family, key=lambda row: int(getattr(row.spec, field)))
            found += [_order_finding(small, large, field) for small, large in pairwise(ordered) if _wrong(small, large)]
    return found


def _wrong(small: Row, large: Row) -> bool:
    allowed = small.spread_ms + large.spread_ms + ORDER_TOLERANCE * small.median_ms
    return small.median_ms - large.median_ms > allowed


def _order_finding(small: Row, large: Row, field: str) -> Finding:
    text = (
        f"{large.spec.key} takes {large.median_ms:.4g} ms, less than {small.spec.key} with {small.median_ms:.4g} ms, "
        f"although its {field} is larger and all else is equal; the difference is beyond both rows' spread."
    )
    return Finding("order", text, (small.spec, large.spec))


def _out_of_line(table: LatencyTable) -> list[Finding]:
    found = []
    for kind in sorted({spec.kind for spec in table.rows}):
        rows = [row for row in table.rows.values() if row.spec.kind == kind]
        if len(rows) < MIN_ROWS:
            continue
        for row, typical_ms in zip(rows, _typical_ms(rows), strict=True):
            factor = row.median_ms / typical_ms
            if not 1 / OUT_OF_LINE < factor < OUT_OF_LINE:
                words = f"{factor:.3g} times" if factor > 1 else f"a {1 / factor:.3g}th of"
                text = (
                    f"{row.spec.key} takes {row.median_ms:.4g} ms, {words} what the other {kind} rows suggest "
                    f"({typical_ms:.4g} ms)."
                )
                found.append(Finding("line", text, (row.spec,)))
    return found


def _typical_ms(rows: list[Row]) -> Floats:
    """What a smooth function of size gives for each row: a robust power law in what the op computes and moves."""
    latency = np.log([row.median_ms for row in rows])
    sizes = np.log1p(np.asarray([features(row.spec) for row in rows])[:, 2:])
    sizes = np.hstack([np.ones((len(rows), 1)), sizes - sizes.mean(0)])
    weights = np.ones(len(rows))
    ridge = np.diag([1e-9] + [1e-2] * (sizes.shape[1] - 1))
    predicted = latency
    for _ in range(30):  # absolute instead of squared errors, so that wrong rows do not drag the line to themselves
        normal = sizes.T @ (weights[:, None] * sizes) + ridge
        predicted = sizes @ np.linalg.solve(normal, sizes.T @ (weights * latency))
        weights = 1 / np.maximum(np.abs(latency - predicted), 0.05)
    return np.asarray(np.exp(predicted), dtype=np.float64)


def _call_ms(table: LatencyTable) -> float:
    """What the runner has taken off each row; 0 if nothing."""
    call_ns = table.provenance.machine.get("call_ns", 0)
    return 1e-6 * call_ns if isinstance(call_ns, int) else 0.0


def _near_the_call(table: LatencyTable) -> list[Finding]:
    call_ms = _call_ms(table)
    short = tuple(spec for spec, row in table.rows.items() if row.median_ms < call_ms)
    if len(short) <= SHORT_ROWS * len(table.rows):
        return []
    none = sum(table.rows[spec].median_ms <= RESOLUTION_MS for spec in short)
    told = f", {none} of them too short to be told from it (they are given as {RESOLUTION_MS * 1e3:g} us)"
    text = (
        f"{len(short)} of {len(table.rows)} rows, such as {short[0].key}, take less than the call of the runtime that "
        f"was taken off them ({call_ms * 1e3:.2g} us){told if none else ''}. Sums of such rows are rough: compare them "
        "with whole networks (pynas measure ... --check 30), or fit a table from those (pynas table fit)."
    )
    return [Finding("call", text, short)]


def _noisy(table: LatencyTable) -> list[Finding]:
    found = []
    timed_ms = {spec: row.median_ms + _call_ms(table) for spec, row in table.rows.items()}
    noisy = [row for spec, row in table.rows.items() if row.spread_ms > NOISY_ROW * timed_ms[spec]]
    if noisy:
        worst = max(noisy, key=lambda row: row.spread_ms / timed_ms[row.spec])
        text = (
            f"{len(noisy)} rows spread by more than {NOISY_ROW:.0%}, most of all {worst.spec.key} with "
            f"{worst.spread_ms / timed_ms[worst.spec]:.0%}. Delete their lines and measure again on a quiet machine."
        )
        found.append(Finding("spread", text, tuple(row.spec for row in noisy)))
    if table.spread > NOISY_TABLE:
        text = f"Half of all rows spread by {table.spread:.1%} or more; up to {NOISY_TABLE:.0%} is usual."
        found.append(Finding("spread", text))
    return found


def _interrupted(table: LatencyTable) -> list[Finding]:
    wanted = table.provenance.repeats
    short = tuple(spec for spec, row in table.rows.items() if len(row.repeats_ms) < wanted)
    if not short:
        return []
    text = (
        f"{len(short)} rows have fewer than the {wanted} repeats wanted, such as {short[0].key}: the measurement was "
        "interrupted. Type the same pynas measure command again."
    )
    return [Finding("repeats", text, short)]


@dataclass(frozen=True)
class Additivity:
    """The sums of a table against whole networks.

    Args:
        agreement: Of the sums with the timings.
        noise: What the same network, timed again, departs from itself.
        calibration: Scale and offset, judged on networks that they were not fitted on; None for too few networks.
    """

    agreement: Agreement
    noise: Noise
    calibration: Calibration | None

    def __str__(self) -> str:
        """A small table in plain words."""
        found, noise = self.agreement, self.noise
        lines = [
            f"sums of rows against {found.nets} whole networks",
            f"  bias (mean signed error)      {found.bias:+8.1%}",
            f"  mean absolute error           {found.error:8.1%}   noise floor {noise.error:.1%}",
            f"  standard deviation            {found.spread:8.1%}   noise floor {noise.spread:.1%}",
            f"  largest error                 {found.worst:8.1%}",
            f"  Kendall tau                   {found.kendall:8.3f}   noise alone permits {noise.kendall:.3f}",
            f"  Spearman                      {found.spearman:8.3f}",
        ]
        if self.calibration is not None:
            lines.append(f"  after calibration (held out)  {self.calibration.error_after:8.1%}   {self.calibration}")
        lines.append(f"  noise floor: one network timed {noise.timings} times among the others")
        return "\n".join(lines)


def additivity(predicted_ms: Sequence[float], measured_ms: Sequence[float], timings_ms: Sequence[float]) -> Additivity:
    """Compares sums of rows with whole networks, next to the noise floor.

    Args:
        predicted_ms: Sums of rows, one for each network.
        measured_ms: The same networks, timed end to end.
        timings_ms: One network timed several times, each time as the others were: the noise floor.

    Raises:
        ValueError: Fewer than three networks or timings, or a latency that is not positive.
    """
    found = agreement(predicted_ms, measured_ms)
    calibration = calibrate(predicted_ms, measured_ms) if found.nets >= MIN_NETS else None
    return Additivity(found, noise_floor(timings_ms, measured_ms), calibration)


@dataclass(frozen=True)
class Calibration:
    """Whole networks take `scale` times the sum of their rows plus `offset_ms`.

    Args:
        scale: Without unit.
        offset_ms: Of a whole network, not of an op.
        nets: How many networks it was fitted on.
        error_before: Mean absolute error of the plain sums, as a fraction.
        error_after: The same with scale and offset, each network judged by a fit on others.
        date: ISO.
    """

    scale: float
    offset_ms: float
    nets: int
    error_before: float
    error_after: float
    date: str

    def __post_init__(self) -> None:
        if not 0 < self.scale < np.inf or not np.isfinite(self.offset_ms):
            raise ValueError(
                f"A calibration has a positive scale and a finite offset_ms, not {self.scale} and {self.offset_ms}."
            )

    def __str__(self) -> str:
        return f"{self.scale:.4g} x sum {self.offset_ms:+.4g} ms"

    @property
    def helps(self) -> bool:
        """Whether networks that it was not fitted on are predicted better with it."""
        return self.error_after < self.error_before

    def apply(self, sum_ms: float) -> float:
        """Latency in ms of a whole network from the sum of its rows."""
        return self.scale * sum_ms + self.offset_ms

    def to_toml(self) -> str:
        """The section [calibration] of device.toml."""
        lines = [
            f"[{SECTION}]  # of sums of rows to whole networks; errors are means, error_after on held-out networks"
        ]
        for name, value in asdict(self).items():
            text = f'"{value}"' if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else value
            lines.append(f"{name} = {text}")
        return "\n".join(lines) + "\n"

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Calibration:
        """From the fields of the section.

        Raises:
            ValueError: A field is missing or of the wrong type.
        """
        kinds = {"nets": (int,), "date": (str,)}
        for field in fields(cls):
            value = data.get(field.name)
            if isinstance(value, bool) or not isinstance(value, kinds.get(field.name, (int, float))):
                raise ValueError(f"[{SECTION}] needs {field.name}, of another type than {value!r}.")
        return cls(**{field.name: data[field.name] for field in fields(cls)})

    @classmethod
    def load(cls, folder: str | Path) -> Calibration | None:
        """The calibration in a folder's device.toml; None if it has none.

        Raises:
            FileNotFoundError: There is no device.toml.
            ValueError: It is damaged.
        """
        path = Path(folder) / FILE
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8")).get(SECTION)
            return None if data is None else cls.read(data)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Writes the section into a folder's device.toml, in place of an older one; all else stays.

        Raises:
            FileNotFoundError: There is no device.toml.
            OSError: It cannot be written.
        """
        path = Path(folder) / FILE
        write_atomic(path, with_section(path.read_text(encoding="utf-8"), SECTION, self.to_toml()))


def with_section(toml: str, name: str, section: str) -> str:
    """The TOML text with the table `name` replaced, or added at the end."""
    older = re.compile(rf"^\[{re.escape(name)}\][^\n]*\n(?:(?!\[)[^\n]*(?:\n|\Z))*", re.MULTILINE)
    return older.sub("", toml).rstrip("\n") + "\n\n" + section


def calibrate(
    predicted_ms: Sequence[float] | Floats, measured_ms: Sequence[float] | Floats, folds: int = 5, seed: int = 0
) -> Calibration:
    """Fits scale and offset on all networks, and judges such a fit on networks that were left out, in turn.

    Args:
        predicted_ms: Sums of rows.
        measured_ms: Of the same networks.
        folds: Parts that are left out in turn.
        seed: Of the parts.

    Raises:
        ValueError: Fewer than six networks, or a latency that is not positive.
    """
    before = agreement(predicted_ms, measured_ms)
    if before.nets < MIN_NETS:
        raise ValueError(f"A calibration needs at least {MIN_NETS} networks; there are {before.nets}.")
    predicted, measured = np.asarray(predicted_ms, dtype=np.float64), np.asarray(measured_ms, dtype=np.float64)
    part = np.random.default_rng(seed).permutation(before.nets) % min(folds, before.nets)
    errors = np.empty(before.nets)
    for left_out in range(part.max() + 1):
        held = part == left_out
        scale, offset = _line(predicted[~held], measured[~held])
        errors[held] = (scale * predicted[held] + offset) / measured[held] - 1
    scale, offset = _line(predicted, measured)
    after = float(np.abs(errors).mean())
    return Calibration(scale, offset, before.nets, before.error, after, datetime.date.today().isoformat())


def _line(predicted: Floats, measured: Floats) -> tuple[float, float]:
    """Scale and offset >= 0 by least squares on the relative error; networks too much alike to tell both get a scale.

    Random networks are seldom near the cheapest one, which a negative offset would make absurdly cheap.
    """
    table = np.stack([predicted / measured, 1 / measured], axis=1)
    (scale, offset), *_ = np.linalg.lstsq(table, np.ones(len(table)), rcond=None)
    if np.ptp(predicted) < 1e-6 * predicted.mean() or scale <= 0 or offset < 0:
        return float(table[:, 0].sum() / (table[:, 0] ** 2).sum()), 0.0
    return float(scale), float(offset)
