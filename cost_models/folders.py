"""Folders of the user."""

from __future__ import annotations

import os
from pathlib import Path


def xdg(variable: str, default: str) -> Path:
    """A folder of the XDG base directory specification, which tells us to ignore relative paths."""
    value = Path(os.environ.get(variable, ""))
    return value if value.is_absolute() else Path.home() / default
