"""Where networks train, the CPU or a CUDA GPU, and the state of torch's random numbers there.

Nothing here touches CUDA before it is asked for.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cost_models.names import unknown

TrainOn = Literal["cpu", "cuda"]
RandomState = Tensor | dict[str, Tensor]


def check_train_on(train_on: object, on_the_cpu: str = "use train_on='cpu'") -> None:
    """Raises ValueError for a place that is none, or is not there: says what torch sees and what to do.

    Args:
        train_on: What was asked for.
        on_the_cpu: How to do without a GPU.
    """
    if train_on not in get_args(TrainOn):
        raise unknown("train_on", str(train_on), get_args(TrainOn))
    if train_on != "cuda" or torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        seen = f"torch {torch.__version__} is built without CUDA. Install a build that has it (see pytorch.org)"
    else:
        seen = (
            f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, sees no CUDA device. See what nvidia-smi "
            "and CUDA_VISIBLE_DEVICES say"
        )
    raise ValueError(f"train_on='cuda' needs a GPU, but {seen}, or {on_the_cpu}.")


def available(train_on: TrainOn) -> TrainOn:
    """The same where it is there, else the CPU: for what is only read and judged of a run from elsewhere."""
    return train_on if train_on == "cpu" or torch.cuda.is_available() else "cpu"


def describe(train_on: TrainOn) -> str:
    """For reports: "cpu", or "cuda" with the name of the GPU."""
    return train_on if train_on == "cpu" else f"{train_on} ({torch.cuda.get_device_name()})"


def device_of(net: nn.Module) -> torch.device:
    """Where the parameters of a network are; the CPU for one without any."""
    first = next(net.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def random_state(on: str | torch.device) -> RandomState:
    """State of torch's generator; with that of the GPU, which draws what dropout on it drops, where one is used."""
    device = torch.device(on)
    if device.type != "cuda":
        return torch.get_rng_state()
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device)}


def set_random_state(state: RandomState, on: str | torch.device) -> None:
    """Sets what `random_state` gave, as far as it is used here: a state of a GPU's search goes on without one."""
    told: dict[str, Any] = {"cpu": state} if isinstance(state, Tensor) else state
    torch.set_rng_state(told["cpu"])
    device = torch.device(on)
    if device.type == "cuda" and "cuda" in told:
        torch.cuda.set_rng_state(told["cuda"], device)
