"""device.toml: what a latency table was made on, with what, when and how."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .runners import Runner

FILE = "device.toml"
SOURCES = ("measured", "modelled", "fitted")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
KEY = re.compile(r"[A-Za-z0-9_-]+")
TYPES = {
    "name": str,
    "source": str,
    "runner": str,
    "precision": str,
    "threads": int,
    "batch": int,
    "schedule": str,
    "repeats": int,
    "date": str,
    "machine": dict,
    "software": dict,
}
LATER = ("calibration", "fit")  # sections that say how good a table is; no conditions of its rows
SECTIONS = ("machine", "software", "build", *LATER)
NOTES = {"fit": "  # of rows to whole networks; errors are fractions, on networks left out of the fit"}


@dataclass(frozen=True)
class Provenance:
    """Everything a reader must know to trust a table, and everything that must agree before rows may share one."""

    name: str
    source: str  # "measured" on the device itself, "modelled", or "fitted" from whole networks
    runner: str
    precision: str
    threads: int
    batch: int
    schedule: str  # version of the way an op becomes code
    repeats: int  # wanted per row; a row with fewer was interrupted
    date: str  # last change, ISO
    machine: Mapping[str, str | int] = field(default_factory=dict)  # "cpu" must agree, the rest is for readers
    software: Mapping[str, str | int] = field(default_factory=dict)  # versions; all must agree
    build: Mapping[str, str | int] = field(default_factory=dict)  # how ops became code, as "target"; all must agree
    calibration: Mapping[str, str | int | float] = field(default_factory=dict)  # found later; no condition
    fit: Mapping[str, str | int | float] = field(default_factory=dict)  # of a "fitted" table; no condition

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.source not in SOURCES:
            raise ValueError(f"source is {self.source!r}; it must be one of {', '.join(SOURCES)}.")
        for field_name in ("threads", "batch", "repeats"):
            if getattr(self, field_name) < 1:
                raise ValueError(f"{field_name} is {getattr(self, field_name)}; it must be at least 1.")
        for title in SECTIONS:
            for key, value in getattr(self, title).items():
                if not KEY.fullmatch(key):
                    raise ValueError(f"{key!r} in [{title}] is no bare TOML key; use letters, digits, '_' and '-'.")
                number = isinstance(value, float) and title in LATER and math.isfinite(value)
                if not number and (not isinstance(value, str | int) or not str(value).isprintable()):
                    raise ValueError(f"{key} in [{title}] is {value!r}; it must be a line of text or a whole number.")
        self._check_calibration()
        self._check_fit()

    def _check_calibration(self) -> None:
        if not self.calibration:
            return
        values = [self.calibration.get("scale"), self.calibration.get("offset_ms")]
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(numbers) < 2 or not (0 < numbers[0] < math.inf and 0 <= numbers[1] < math.inf):
            raise ValueError(
                f"[calibration] has scale {values[0]!r} and offset_ms {values[1]!r}; the first must be a positive "
                "number, the second 0 or more. Delete the section, or make it anew: pynas measure ... --check 30 "
                "--calibrate true"
            )

    def _check_fit(self) -> None:
        nets, error = self.fit.get("nets", 0), self.fit.get("error", -1)
        if self.fit and (isinstance(nets, str) or isinstance(error, str) or nets < 1 or error < 0):
            raise ValueError(
                f"[fit] has nets {self.fit.get('nets')!r} and error {self.fit.get('error')!r}; both must be numbers, "
                "the first positive, the second 0 or more. Delete the section, or fit anew: pynas table fit"
            )

    @classmethod
    def of(cls, name: str, runner: Runner, repeats: int) -> Provenance:
        """The provenance of rows that `runner` makes today."""
        about = runner.provenance()
        return cls(
            name=name,
            source=runner.source,
            runner=runner.name,
            precision=runner.precision,
            threads=runner.threads,
            batch=runner.batch,
            schedule=runner.schedule,
            repeats=repeats,
            date=datetime.date.today().isoformat(),
            machine=about.get("machine", {}),
            software=about.get("software", {}),
            build=about.get("build", {}),
        )

    @property
    def conditions(self) -> dict[str, str | int]:
        """What must agree, beside the device's name, before two latencies may be compared."""
        return {
            "source": self.source,
            "runner": self.runner,
            "precision": self.precision,
            "threads": self.threads,
            "batch": self.batch,
            "schedule": self.schedule,
            "cpu": self.machine.get("cpu", "unknown"),
            **dict(sorted(self.build.items())),
            **{f"{package} version": version for package, version in sorted(self.software.items())},
        }

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that change with any of the conditions."""
        return hashlib.sha256(json.dumps(self.conditions, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def identity(self) -> str:
        """Device and fingerprint: the tag that each row of the table carries."""
        return f"{self.name}-{self.fingerprint}"

    def differences(self, other: Provenance) -> str:
        """Where `other` departs from this one, in words; empty if rows of both may share a table."""
        mine, theirs = {"device": self.name, **self.conditions}, {"device": other.name, **other.conditions}
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        return ", ".join(f"{name} {mine.get(name, 'none')!r} against {theirs.get(name, 'none')!r}" for name in names)

    def to_toml(self, *, rows: int, spread: float) -> str:
        """The content of device.toml. `rows` and `spread` are notes for the reader, never read back."""
        lines = [f"{key} = {_toml(getattr(self, key))}" for key, kind in TYPES.items() if kind is not dict]
        for title in SECTIONS:
            section = getattr(self, title)
            if section or title in TYPES:
                lines += [
                    "",
                    f"[{title}]{NOTES.get(title, '')}",
                    *(f"{key} = {_toml(value)}" for key, value in section.items()),
                ]
        lines += ["", "[summary]  # of latency.csv, when it was last written", f"rows = {rows}"]
        lines += [f"spread = {spread:.4f}  # median over rows of interquartile range / median"]
        return "\n".join(lines) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Provenance:
        """Read and check a folder's device.toml.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not TOML, or a field is missing or of the wrong type.
        """
        path = folder / FILE
        if not path.is_file():
            raise FileNotFoundError(f"There is no {FILE} in {folder}; a device folder holds {FILE} and latency.csv.")
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a TOML file: {error}.") from error
        for key, kind in TYPES.items():
            if key not in data:
                raise ValueError(f"{path} has no field {key!r}; it needs {', '.join(TYPES)}.")
            if not isinstance(data[key], kind) or isinstance(data[key], bool):
                raise ValueError(f"{path}: {key} is {data[key]!r}; it must be of type {kind.__name__}.")
        sections = {title: data.get(title, {}) for title in SECTIONS if title not in TYPES}
        for title, section in sections.items():
            if not isinstance(section, dict):
                raise ValueError(f"{path}: {title} is {section!r}; it must be a section, [{title}].")
        try:
            return cls(**{key: data[key] for key in TYPES}, **sections)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def check_name(name: str) -> None:
    """Refuse a device name that could not be a folder.

    Raises:
        ValueError: it has other than lower-case letters, digits, '.', '_' and '-', or starts with a sign.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot be a device name; use lower-case letters, digits, '.', '_' and '-', such as 'cortex-a72'."
        )


def _toml(value: str | int | float) -> str:
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)  # for printable text, a JSON string is a TOML string
