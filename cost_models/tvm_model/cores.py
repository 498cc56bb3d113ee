"""What is assumed about a modelled core: one TOML file each, in `cores/` or the user's own."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from cost_models.names import unknown

FOLDER = Path(__file__).parent / "cores"


@dataclass(frozen=True)
class Core:
    """A core and its memory. All figures are assumptions from data sheets, not measurements."""

    title: str  # for readers, such as "Cortex-A72 of a Raspberry Pi 4B"
    frequency_ghz: float
    bandwidth_gb_s: float  # of one core from memory; 1 GB = 1e9 bytes
    l2_kb: int  # second level cache; 1 KB = 1024 bytes
    overlap: bool  # whether a kernel computes while it waits for memory: the longer of both counts, else their sum
    target: str  # of cost_models.tvm_build
    mca_cpu: str  # for llvm-mca -mcpu; a twin where LLVM has no model of the core itself
    mca_model: str  # how the names of that model's resources start
    wide_per_cycle: int  # 128-bit floating-point instructions that start in a cycle at most; 0: no limit

    def __post_init__(self) -> None:
        for name in ("frequency_ghz", "bandwidth_gb_s", "l2_kb"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} of a core is {value!r}; it must be a positive number.")
        wide = self.wide_per_cycle
        if isinstance(wide, bool) or not isinstance(wide, int) or wide < 0:
            raise ValueError(f"wide_per_cycle of a core is {wide!r}; it must be a whole number, 0 for no limit.")
        if not isinstance(self.overlap, bool):
            raise ValueError(f"overlap of a core is {self.overlap!r}; it must be true or false.")
        for name in ("title", "target", "mca_cpu", "mca_model"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip() or not value.isprintable():
                raise ValueError(f"{name} of a core is {value!r}; it must be a line of text.")

    @property
    def description(self) -> str:
        """Everything that rows depend on, in one line: rows of other figures must not share a table."""
        limit = f", at most {self.wide_per_cycle} 128-bit operation per cycle" if self.wide_per_cycle else ""
        return (
            f"{self.title}, modelled: {self.frequency_ghz:g} GHz, {self.bandwidth_gb_s:g} GB/s "
            f"{'beside' if self.overlap else 'after'} computing, L2 {self.l2_kb:g} KB, "
            f"code for {self.target}, llvm-mca {self.mca_cpu}{limit}"
        )


def core(name: str | Path) -> Core:
    """A core by name (see `names()`), or from the user's own TOML file by its path, which ends in ".toml".

    Raises:
        ValueError: an unknown name, or a file with a missing, strange or wrong field.
        FileNotFoundError: there is no such file.
    """
    if not str(name).endswith(".toml"):
        if str(name) not in names():
            hint = f"For another core, copy a file of {FOLDER}, change its figures and pass its path."
            raise unknown("core", str(name), names(), hint)
        return _read(FOLDER / f"{name}.toml")
    return _read(Path(name))


def names() -> list[str]:
    """The cores that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def _read(path: Path) -> Core:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} that would describe a core.")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}.") from error
    wanted = [field.name for field in fields(Core)]
    for name in data:
        if name not in wanted:
            raise unknown(f"field of {path}:", name, wanted)
    missing = [name for name in wanted if name not in data]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; a core needs {', '.join(wanted)}.")
    try:
        return Core(**data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
