"""Where device folders lie: the user's own, those shipped with the package, and the automatic `host` in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import provenance
from .folders import xdg
from .names import unknown
from .provenance import Provenance, check_name
from .runners import Runner, TorchHost
from .table import LatencyTable, load_folder, measure_hint

SHIPPED = Path(__file__).parent / "devices"
HOST = "host"


@dataclass(frozen=True)
class Device:
    """A line of `pynas list devices`."""

    name: str
    source: str  # "measured", "modelled"; "broken" for a folder that cannot be read; "not measured yet"
    rows: int
    description: str
    folder: Path


def device_folder(name: str) -> Path:
    """Where `pynas measure --device NAME` writes: $XDG_DATA_HOME/pynas/devices/NAME.

    Raises:
        ValueError: a name that could not be a folder.
    """
    check_name(name)
    return _user_devices() / name


def host_folder(runner: Runner | None = None) -> Path:
    """The folder of this machine's own table under the runner's conditions (default: torch, one thread).

    $XDG_DATA_HOME/pynas/devices/host if the user measured one, else $XDG_CACHE_HOME/pynas/host/<fingerprint>, which
    another CPU, torch version or number of threads changes, so that a shared home folder is no trap.

    Raises:
        ValueError: the user's `host` was made under other conditions.
    """
    here = Provenance.of(HOST, runner or TorchHost(), repeats=1)
    own = device_folder(HOST)
    if not (own / provenance.FILE).is_file():
        return xdg("XDG_CACHE_HOME", ".cache") / "pynas" / "host" / here.fingerprint
    differences = Provenance.read(own).differences(here)
    if differences:
        raise ValueError(
            f"The table 'host' in {own} does not fit this machine as it is now: {differences}. "
            "Rename or delete that folder, and the host is measured anew when it is needed."
        )
    return own


def training_folder(runner: Runner) -> Path:
    """The folder of what training steps take on this machine: $XDG_CACHE_HOME/pynas/host-train/<fingerprint>."""
    here = Provenance.of("host-train", runner, repeats=1)
    return xdg("XDG_CACHE_HOME", ".cache") / "pynas" / "host-train" / here.fingerprint


def load(name: str, *, strict: bool = False) -> LatencyTable:
    """Load a device's latency table by name.

    Args:
        name: a device of `devices()`; "host" is this machine.
        strict: refuse ops that have no row instead of fitting them.

    Raises:
        ValueError: an unknown device, a host that was not measured yet, or a damaged table.
        FileNotFoundError: half of the device folder is missing.
    """
    folder = _folders().get(name)
    if name == HOST:
        folder = host_folder()
        if not folder.is_dir():
            raise ValueError(f"This machine was not measured yet. {measure_hint(HOST)}")
    if folder is None:
        hint = "Measure a new one: pynas measure --space SPACE --device NAME"
        raise unknown("device", name, [HOST, *_folders()], hint)
    table = load_folder(folder, strict=strict)
    if table.name != name:
        raise ValueError(
            f"The folder {folder} holds the table of {table.name!r}. Rename the folder to {table.name!r}, "
            f"or measure {name!r} itself."
        )
    return table


def find(name: str) -> LatencyTable | None:
    """The table that `load` would give for a device other than the host; None if there is no such device.

    Raises:
        ValueError: the table is damaged.
        FileNotFoundError: half of the device folder is missing.
    """
    return load(name) if name in _folders() else None


def devices() -> list[Device]:
    """All devices that `load` knows, by name; a damaged folder is listed with its error."""
    found = [_listed(name, folder) for name, folder in _folders().items() if name != HOST]
    return sorted([*found, _host_listed()], key=lambda device: device.name)


def _host_listed() -> Device:
    try:
        folder = host_folder()
    except (ValueError, OSError) as error:
        return Device(HOST, "broken", 0, str(error), device_folder(HOST))
    if folder.is_dir():
        return _listed(HOST, folder)
    return Device(HOST, "not measured yet", 0, "this machine; measured when it is first needed", folder)


def _listed(name: str, folder: Path) -> Device:
    try:
        table = load_folder(folder)
    except (ValueError, OSError) as error:
        return Device(name, "broken", 0, str(error), folder)
    return Device(name, table.provenance.source, len(table.rows), table.describe(), folder)


def _folders() -> dict[str, Path]:
    """Device folders by name; the user's own hide shipped ones."""
    found: dict[str, Path] = {}
    for parent in (SHIPPED, _user_devices()):
        if parent.is_dir():
            found |= {folder.name: folder for folder in sorted(parent.iterdir()) if folder.is_dir()}
    return found


def _user_devices() -> Path:
    return xdg("XDG_DATA_HOME", ".local/share") / "pynas" / "devices"
