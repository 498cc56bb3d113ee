"""Checks what a dataclass of settings was given against its own annotations."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cost_models.names import unknown


def check_fields(settings: Any, of: str) -> None:
    """Whole numbers must be whole, numbers finite, and words among those that the annotation lists.

    Args:
        settings: A dataclass whose fields are annotated as int, float, bool, str or a Literal of words.
        of: What they belong to, for the error.

    Raises:
        ValueError: For the first field that does not fit.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                raise unknown(f"{field.name} of {of}", value, get_args(hint))
        elif hint is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{field.name} of {of} must be true or false, not {value!r}.")
        elif hint is str:
            if not isinstance(value, str):
                raise ValueError(f"{field.name} of {of} must be a name, not {value!r}.")
        elif hint is int:
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{field.name} of {of} must be a whole number, not {value!r}.")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{field.name} of {of} must be a finite number, not {value!r}.")
