"""The one sentence a user reads after a mistyped name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: str, allowed: Iterable[str], hint: str = "") -> ValueError:
    """Build (not raise) the error for a name that is not in a closed set.

    Args:
        kind: what is named, in the singular: "device", "op kind".
        name: what came.
        allowed: every name that would have been accepted.
        hint: a last sentence: what to type next.

    Returns:
        `Unknown device 'cortex-a27'. Did you mean 'cortex-a72'? Allowed: cortex-a72, rpi4. <hint>`
    """
    names = sorted(set(allowed))
    parts = [f"Unknown {kind} {name!r}."]
    close = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.6)
    if close:
        parts.append(f"Did you mean {close[0]!r}?")
    parts.append(f"Allowed: {', '.join(names)}." if names else "Allowed: none so far.")
    if hint:
        parts.append(hint)
    return ValueError(" ".join(parts))
