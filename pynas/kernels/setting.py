"""Whether layers run in fused kernels: by a fixed rule, always, or never."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from pynas.kernels import cuda
from pynas.kernels.native import KERNELS, STATE

Setting = Literal["auto", "fused", "reference"]

_current: Setting = "auto"


def current() -> Setting:
    """The setting of this process."""
    return _current


@contextmanager
def using(setting: Setting) -> Iterator[None]:
    """Sets whether layers run in fused kernels, for all threads, and sets it back at the end.

    Args:
        setting: "auto" takes a kernel where it is built and faster, a rule by shape alone, so that results repeat (on a
            GPU, where `pynas kernels tune` has timed it to be); "fused" wherever it can do what the modules do;
            "reference" never.

    Raises:
        ValueError: The setting is none of these, or it is "fused" and there are no kernels.
    """
    global _current
    check(setting)
    before, _current = _current, setting
    try:
        yield
    finally:
        _current = before


def check(setting: object) -> None:
    """Raises ValueError for a setting that cannot work here."""
    if setting not in get_args(Setting):
        raise ValueError(f"kernels must be {', '.join(map(repr, get_args(Setting)))}, not {setting!r}.")
    if setting == "fused" and KERNELS is None and not cuda.built():
        raise ValueError(
            f"kernels='fused' needs the C++ kernels, but {STATE}. Install pynas from its source folder with: "
            "pip install . Or use kernels='auto'."
        )
