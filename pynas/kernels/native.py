"""Finds the compiled kernels, or says why there are none.

Environment:
    PYNAS_REQUIRE_KERNELS=1 makes missing kernels an ImportError instead of a warning; CI sets it.
    PYNAS_ISA=base|avx2|avx512 forces an instruction set; a ValueError names those that this CPU runs.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

import torch  # before _C, so that both use one OpenMP runtime


def _load() -> tuple[Any, str]:
    try:
        module = importlib.import_module("pynas._C")
    except ImportError as error:
        reason = f"pynas._C cannot be imported ({error})"
        remedy = "Install pynas from its source folder with: pip install ."
        if os.environ.get("PYNAS_REQUIRE_KERNELS") == "1":
            raise ImportError(f"PYNAS_REQUIRE_KERNELS=1, but {reason}. {remedy}") from error
        warnings.warn(
            f"The C++ kernels are missing: {reason}. pynas runs on the slower PyTorch references. {remedy}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, reason
    module.connect(torch, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
    return module, "built"


MODULE, STATE = _load()

# All kernels of one instruction set, or None where the references stand in for them.
KERNELS: Any = MODULE.Kernels(os.environ.get("PYNAS_ISA", "")) if MODULE else None


def facts() -> dict[str, str | bool]:
    """Whether the C++ kernels are built, how, and for what."""
    if MODULE is None:
        return {"kernels": STATE, "isa": "none"}
    return {
        "kernels": STATE,
        "isa": KERNELS.isa,
        "usable_isas": " ".join(MODULE.usable_isas()),
        "built_isas": MODULE.BUILT_ISAS,
        "compiler": MODULE.COMPILER,
    }
