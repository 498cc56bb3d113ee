"""Trains one network: SGD with a cosine schedule, label smoothing, and an average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from cost_models.names import unknown
from pynas.fields import check_fields
from pynas.ops.cell import set_drop_path
from pynas.training.feed import Feed, moved
from pynas.training.loop import Progress
from pynas.training.metrics import Metric, told
from pynas.training.optim import Amp, autocast, cosine, fast_layout, set_lr
from pynas.training.where import device_of, random_state, set_random_state

# Plain SGD with momentum and a cosine: what is not in a paper's recipe.
_PLAIN: dict[str, Any] = {
    "warmup_epochs": 0.0,
    "label_smoothing": 0.0,
    "ema_decay": 0.0,
    "clip": 0.0,
    "nesterov": False,
    "decay": "all",
}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained alone.

    FBNet's paper trains for 360 epochs at batch 256 with steps at 90, 180 and 270 (from memory, unverified); a cosine
    and fewer epochs are what small data sets want. Presets: "fairnas" is the schedule that FairNAS's paper gives for
    its supernet (that A, B and C were trained by it alone is unverified); "nas_bench_macro" is how the networks of
    NAS-Bench-Macro's table were trained, but for keeping the best epoch on the test images, which we do not do; "darts"
    is how DARTS and SNAS train their final networks for CIFAR-10, from their released code.

    Args:
        epochs: Passes over the training images.
        batch_size: Images per step.
        lr: Peak learning rate of SGD.
        warmup_epochs: Of linear warm-up.
        momentum: Of SGD.
        nesterov: Whether it is Nesterov's.
        weight_decay: Of SGD.
        decay: On "weights" of convolutions and classifier alone, or on "all" parameters, batch norm and biases too.
        auxiliary: Weight of the loss of the auxiliary head, in networks that have one.
        drop_path: Probability at the end of a linear rise that an edge is left out for an image, in networks of cells.
        cutout: Side of a square, in pixels, that is blanked at a random place of every image, as far as it lies in it
            (DeVries and Taylor, arXiv 1708.04552); 0 for none.
        label_smoothing: Of the cross-entropy.
        ema_decay: Of the moving average of the weights, which is what is kept; 0 for none.
        clip: Largest norm of the gradient; 0 for none.
    """

    epochs: int = 30
    batch_size: int = 64
    lr: float = 0.1
    warmup_epochs: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    ema_decay: float = 0.99
    clip: float = 5.0
    nesterov: bool = True
    decay: Literal["weights", "all"] = "weights"
    auxiliary: float = 0.0
    drop_path: float = 0.0
    cutout: int = 0

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quick": {},
        "fairnas": {"epochs": 150, "batch_size": 256, "lr": 0.045, "weight_decay": 4e-5, **_PLAIN},
        "nas_bench_macro": {"epochs": 50, "batch_size": 256, "lr": 0.1, "weight_decay": 5e-4, **_PLAIN},
        "darts": {
            "epochs": 600,
            "batch_size": 96,
            "lr": 0.025,
            "weight_decay": 3e-4,
            **_PLAIN,
            "clip": 5.0,
            "auxiliary": 0.4,
            "drop_path": 0.2,
            "cutout": 16,
        },
    }

    @staticmethod
    def preset(name: str, **changes: Any) -> Recipe:
        """The recipe of that name, some of it changed. Raises ValueError if there is none."""
        if name not in Recipe.PRESETS:
            raise unknown("recipe", name, Recipe.PRESETS)
        return Recipe(**{**Recipe.PRESETS[name], **changes})

    def __post_init__(self) -> None:
        check_fields(self, "the recipe")
        if self.epochs < 1 or self.batch_size < 2 or not self.lr > 0:
            raise ValueError(
                f"Training needs epochs >= 1, batch_size >= 2 and lr > 0, not {self.epochs}, {self.batch_size} and "
                f"{self.lr}."
            )
        for name in ("momentum", "label_smoothing", "ema_decay", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} of the recipe must lie in [0, 1), not {getattr(self, name)}.")
        for name in ("warmup_epochs", "weight_decay", "clip", "auxiliary", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} of the recipe must not be negative, but is {getattr(self, name)}.")


def moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """In-place moving average for AveragedModel, of decay min(decay, (1 + n) / (10 + n)) after n updates.

    With a constant decay, a short training would return little more than its random start.
    """

    def update(average: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
        count = int(updates)
        weight = 1 - min(decay, (1 + count) / (10 + count))
        pairs = list(zip(average, current, strict=True))
        means = [(kept, new) for kept, new in pairs if kept.is_floating_point()]
        if means:  # all at once: on a GPU each call of its own would cost more than what it computes
            torch._foreach_lerp_([kept for kept, _ in means], [new for _, new in means], weight)
        for kept, new in pairs:
            if not kept.is_floating_point():
                kept.copy_(new)

    return update


def cut_out(images: Tensor, side: int) -> Tensor:
    """Blanks a square of each image, (B, C, S, S), around a random pixel, by torch's generator. None if side is 0."""
    if not side:
        return images
    size = images.shape[-1]
    first = torch.randint(size, (len(images), 2)) - side // 2  # on the CPU, so that they are the same on a GPU
    places = torch.arange(size)
    inside = (places >= first[..., None]) & (places < first[..., None] + side)  # (B, 2, S)
    blanked = (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]
    return images.masked_fill(moved(blanked, images.device), 0.0)


class Training:
    """The task of training one network by a recipe.

    Args:
        net: Trained in place, and where it is; batches must come there.
        recipe: How.
        amp: Mixed precision of the forward pass.
    """

    def __init__(self, net: nn.Module, recipe: Recipe, amp: Amp = "off") -> None:
        self.net = fast_layout(net)
        self.on = device_of(net)
        self.recipe = recipe
        self.amp = amp
        self.epochs = recipe.epochs
        decayed = [p for p in net.parameters() if p.dim() > 1 or recipe.decay == "all"]
        free = [p for p in net.parameters() if p.dim() <= 1 and recipe.decay == "weights"]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(
            groups, recipe.lr, recipe.momentum, nesterov=recipe.nesterov and recipe.momentum > 0
        )
        self.average: AveragedModel | None = None
        if recipe.ema_decay:
            average = moving_average(recipe.ema_decay)
            self.average = AveragedModel(net, multi_avg_fn=average, use_buffers=True)

    def steps(self, feed: Feed, epoch: int) -> int:
        return feed.steps_weights

    def step(self, feed: Feed, progress: Progress) -> dict[str, Metric]:
        per_epoch = feed.steps_weights
        done, total = progress.epoch * per_epoch + progress.step, self.epochs * per_epoch
        lr = cosine(self.recipe.lr, done, total, round(self.recipe.warmup_epochs * per_epoch))
        set_lr(self.optimizer, lr)
        x, y = feed.weights()
        set_drop_path(self.net, self.recipe.drop_path * done / total)
        self.net.train()
        with autocast(self.amp, self.on):
            logits, loss = self._forward(fast_layout(cut_out(x, self.recipe.cutout)), y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.net)
        right = (logits.detach().argmax(1) == y).float().mean()
        return {"loss": told(loss), "train_accuracy": told(right), "lr": lr}

    def _forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and loss, that of an auxiliary head included."""
        smoothing, side = self.recipe.label_smoothing, None
        if self.recipe.auxiliary and hasattr(self.net, "with_auxiliary"):
            logits, side = self.net.with_auxiliary(x)  # type: ignore[operator]
        else:
            logits = self.net(x)
        loss = functional.cross_entropy(logits, y, label_smoothing=smoothing)
        if side is not None:
            loss = loss + self.recipe.auxiliary * functional.cross_entropy(side, y, label_smoothing=smoothing)
        return logits, loss

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        return {}

    def result(self) -> nn.Module:
        """The network to keep: the average of the weights if there is one. In eval mode."""
        kept: nn.Module = self.net if self.average is None else self.average.module
        return kept.eval()

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "rng": random_state(self.on),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        set_random_state(state["rng"], self.on)
