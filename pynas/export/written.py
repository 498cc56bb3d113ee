"""What an export tells about the file that it wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Precision = Literal["float32", "int8"]


@dataclass(frozen=True)
class HostLatency:
    """What one image takes on this machine.

    Args:
        median_ms: Of the repeats.
        spread_ms: Their interquartile range.
        repeats: How many.
        device: This machine's CPU.
        runtime: What ran the file, with its version.
        threads: That it ran in.
        source: "measured": nothing else is called a host latency.
    """

    median_ms: float
    spread_ms: float
    repeats: int
    device: str
    runtime: str
    threads: int = 1
    source: str = "measured"

    def __str__(self) -> str:
        return (
            f"{self.median_ms:.3g} ms, spread {self.spread_ms:.2g} ms, {self.source} on {self.device} ({self.runtime}, "
            f"{self.threads} thread, batch 1)"
        )


@dataclass(frozen=True)
class Report:
    """What was written, and how well it agrees with the net.

    Args:
        path: The file.
        format: Name of the format.
        version: Of the format, as its exporter states it ("opset 18").
        size_bytes: Of the file.
        images: How many were compared.
        max_abs_diff: Largest difference between a logit of the file and of the net; none where it was not run.
        relative_diff: The same over the largest logit of its batch.
        argmax_agreement: Share of the images whose largest logit has the same place, 0 to 1.
        precision: "float32" or "int8".
        target: CPU that the file is for.
        accuracy: Of the file on the test images, 0 to 1; none without test images, or where they were not run.
        net_accuracy: Of the net on the same.
        test_images: How many.
        latency: Of one image on this machine; none where it was not asked for, or the file is for another.
        not_run: Why the file was not run back: it is for another machine, and there is no emulator.
        warning: What a user must not miss; "" for nothing.
    """

    path: Path
    format: str
    version: str
    size_bytes: int
    images: int
    max_abs_diff: float | None
    relative_diff: float | None
    argmax_agreement: float | None
    precision: Precision = "float32"
    target: str = "host"
    accuracy: float | None = None
    net_accuracy: float | None = None
    test_images: int = 0
    latency: HostLatency | None = None
    not_run: str = ""
    warning: str = ""

    @property
    def drop(self) -> float | None:
        """Accuracy that the file lost against the net, 0 to 1; negative where it won."""
        return None if self.accuracy is None or self.net_accuracy is None else self.net_accuracy - self.accuracy

    def __str__(self) -> str:
        kind = self.format + (" int8" if self.precision == "int8" else "")
        what = f"{self.path.name}: {kind} ({self.version}), {self.size_bytes / 1e6:.2f} MB"
        if self.not_run:
            return f"{what}; not run back: {self.not_run}"
        assert self.max_abs_diff is not None
        assert self.relative_diff is not None
        assert self.argmax_agreement is not None
        figures = difference_text(self.max_abs_diff, self.relative_diff, self.argmax_agreement)
        parts = [f"{what}; run back on {self.images} images, {figures}"]
        if self.accuracy is not None and self.net_accuracy is not None:
            parts.append(
                f"test accuracy {self.accuracy:.2%} of {self.test_images} images, the net's {self.net_accuracy:.2%}"
            )
        if self.latency is not None:
            parts.append(str(self.latency))
        return "; ".join(parts)

    def note(self) -> dict[str, Any]:
        """As plain JSON values."""
        latency = None if self.latency is None else dict(vars(self.latency))
        return {**vars(self), "path": self.path.name, "latency": latency, "drop": self.drop}


def difference_text(max_abs_diff: float, relative_diff: float, argmax_agreement: float) -> str:
    """Three figures of a comparison in words."""
    return (
        f"logits differ by up to {max_abs_diff:.1e} ({relative_diff:.1e} of the largest) "
        f"and arg-max agrees on {argmax_agreement:.1%}"
    )
