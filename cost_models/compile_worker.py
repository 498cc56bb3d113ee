"""`python -m cost_models.compile_worker`: compiles one module a line; see `cost_models.compiling`."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

from .compiling import EXPECTED, INPUT, example
from .process import answer_lines


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    """Answer {} or {"error": reason}."""
    import numpy as np
    import torch

    folder, shape = Path(request["folder"]), tuple(request["shape"])
    try:
        module = pickle.loads((folder / "module.pickle").read_bytes())
        if any(part.training for part in module.modules()):
            raise ValueError("it is in training mode, or a part of it; call .eval() first")
        where, _, name = request["entry"].partition(":")
        getattr(importlib.import_module(where), name)(module, shape, folder, **request["settings"])
        x = example(shape)
        with torch.inference_mode():
            np.save(folder / EXPECTED, module(torch.from_numpy(x)).numpy())
        np.save(folder / INPUT, x)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    answer_lines(_compile)
