"""LatencyTable: a device's latencies. Exact rows first, then a fit that says so, never a silent guess."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from . import provenance, rows
from .files import write_atomic
from .fit import Fit, fit, rows_needed
from .provenance import Provenance
from .rows import Row
from .spec import OpSpec


class LatencyTable:
    """Latency in ms per op shape on one device, read from a folder of device.toml and latency.csv.

    Skip and none cost 0. An op without a row is fitted from the rows of its kind, unless `strict`. A calibration in
    device.toml scales all costs and sets `net_cost`, so that sums meet whole networks
    (`cost_models.trust.Calibration`).

    Args:
        provenance: what was measured, where and how.
        rows: one row per op.
        strict: refuse fitted values.
    """

    unit = "ms"

    def __init__(self, provenance: Provenance, rows: Mapping[OpSpec, Row], *, strict: bool = False) -> None:
        if not rows:
            raise ValueError(f"The table {provenance.name!r} is empty. {measure_hint(provenance.name)}")
        self.name = provenance.name
        self.provenance = provenance
        self.rows = {spec.deployed: row for spec, row in rows.items()}
        self.strict = strict
        self.scale = float(provenance.calibration.get("scale", 1.0))
        self.net_cost = float(provenance.calibration.get("offset_ms", 0.0))
        self._fits: dict[str, Fit] = {}

    def cost(self, spec: OpSpec) -> float:
        """Latency in ms of one run (one batch).

        Raises:
            ValueError: there is no row, and it cannot be fitted or `strict` refuses that; names the measuring command.
        """
        if spec.free:
            return 0.0
        spec = spec.deployed
        if spec in self.rows:
            return self.scale * self.rows[spec].median_ms
        return self.scale * self._fitted_ms(spec)

    def source(self, spec: OpSpec) -> str:
        """ "measured" or "modelled" for a row, else "fitted". Raises what `cost` raises."""
        spec = spec.deployed
        if spec.free or spec in self.rows:
            return self.provenance.source
        self._fitted_ms(spec)
        return "fitted"

    def uncalibrated(self) -> LatencyTable:
        """The same rows without scale and offset."""
        return LatencyTable(replace(self.provenance, calibration={}), self.rows, strict=self.strict)

    def covers(self, specs: Iterable[OpSpec]) -> bool:
        """Whether `cost` answers for all of them."""
        try:
            for spec in specs:
                self.cost(spec)
        except ValueError:
            return False
        return True

    def fit_error(self, kind: str) -> float | None:
        """Mean relative leave-one-out error of fitted ops of this kind; None where nothing is fitted."""
        if kind not in self._fits:
            known = self._of_kind(kind)
            if self.strict or len(known) < rows_needed([row.spec for row in known]):
                return None
            self._fits[kind] = fit([row.spec for row in known], [row.median_ms for row in known])
        return self._fits[kind].error

    def _of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows.values() if row.spec.kind == kind]

    def _fitted_ms(self, spec: OpSpec) -> float:
        if self.fit_error(spec.kind) is not None:
            latency_ms = self._fits[spec.kind].latency_ms(spec)
            if latency_ms > 0:
                return latency_ms
            reason = "its rows are too much alike to fit one"
        elif self.strict:
            reason = "a strict table refuses fitted values"
        else:
            known = [row.spec for row in self._of_kind(spec.kind)]
            needed, kind = rows_needed(known), spec.kind
            reason = f"to fit one, at least {needed} rows of kind {kind!r} are needed; there are {len(known)}"
        raise ValueError(f"The table {self.name!r} has no row for {spec.key}, and {reason}. {measure_hint(self.name)}")

    @cached_property
    def spread(self) -> float:
        """Relative spread: the median over rows of interquartile range / median."""
        return rows.spread(self.rows.values())

    @cached_property
    def hash(self) -> str:
        """Twelve hex digits of the content: rows and identity."""
        return hashlib.sha256(rows.to_csv(self.rows, self.provenance.identity).encode()).hexdigest()[:12]

    def describe(self) -> str:
        """Device, source, conditions, date, spread and the error of fits, in one line."""
        about = self.provenance
        cpu = about.machine.get("cpu", "unknown hardware")
        versions = [f"{package} {version}" for package, version in about.software.items()]
        threads = "1 thread" if about.threads == 1 else f"{about.threads} threads"
        runner = [] if about.runner in about.software else [about.runner]
        target = [f"for {about.build['target']}"] if "target" in about.build else []
        conditions = ", ".join([*runner, *versions, *target, threads, about.precision, f"batch {about.batch}"])
        size = f"{len(self.rows)} rows"
        if about.source == "measured":  # a model says the same every time
            size += f", spread {self.spread:.1%}"
        parts = [f"{self.name}: {about.source} on {cpu} ({conditions}), {about.date}, {size}"]
        unfinished = sum(len(row.repeats_ms) < about.repeats for row in self.rows.values())
        if unfinished:
            parts.append(f"{unfinished} rows have fewer than {about.repeats} repeats")
        kinds = sorted({spec.kind for spec in self.rows})
        errors = [f"{kind} {error:.0%}" for kind in kinds if (error := self.fit_error(kind)) is not None]
        if about.fit:
            parts.append(
                f"fitted from {about.fit['nets']} whole networks, mean error {about.fit['error']:.2%} on networks left "
                f"out; the device: {about.fit.get('verdict', 'not judged')}"
            )
        if about.calibration:
            nets = about.calibration.get("nets", "?")
            parts.append(f"calibrated on {nets} whole networks: {self.scale:.4g} x sum {self.net_cost:+.3g} ms")
        if self.strict:
            parts.append("ops without a row are refused")
        elif errors:
            parts.append(f"ops without a row are fitted, leave-one-out error {', '.join(errors)}")
        return "; ".join(parts)

    def copy_to(self, folder: str | Path) -> Path:
        """Write the table to a folder (made where missing), such as a run folder; returns it."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        toml = self.provenance.to_toml(rows=len(self.rows), spread=self.spread)
        write_atomic(target / provenance.FILE, toml)
        write_atomic(target / rows.FILE, rows.to_csv(self.rows, self.provenance.identity))
        return target


def load_folder(folder: str | Path, *, strict: bool = False) -> LatencyTable:
    """Read and check a device folder.

    Raises:
        FileNotFoundError: no folder, or one of its two files is missing.
        ValueError: a damaged or empty file; the message names file and line.
    """
    where = Path(folder)
    about = Provenance.read(where)
    table = rows.read_csv(where / rows.FILE, about.identity)
    if not table:
        raise ValueError(f"{where / rows.FILE} is empty: it has no row after its header. {measure_hint(about.name)}")
    return LatencyTable(about, table, strict=strict)


def measure_hint(name: str) -> str:
    """What to type to get rows for a device."""
    return f"Measure it: pynas measure --space SPACE --device {name}"
