"""Writing in any format with the checks that make the file worth trusting."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cost_models.names import unknown
from pynas.export.formats import FORMATS, Exporter
from pynas.fuse import first_line, forward, fuse, relative_difference
from pynas.registry import MissingExtra


@dataclass(frozen=True)
class Report:
    """What was written, and how well it agrees with the net.

    Args:
        path: The file.
        format: Name of the format.
        version: Of the format, as its exporter states it ("opset 18").
        size_bytes: Of the file.
        images: How many were compared.
        max_abs_diff: Largest difference between a logit of the file and of the net.
        relative_diff: The same over the largest logit of its batch.
        argmax_agreement: Share of the images whose largest logit has the same place, 0 to 1.
    """

    path: Path
    format: str
    version: str
    size_bytes: int
    images: int
    max_abs_diff: float
    relative_diff: float
    argmax_agreement: float

    def __str__(self) -> str:
        return (
            f"{self.path.name}: {self.format} ({self.version}), {self.size_bytes / 1e6:.2f} MB; run back on "
            f"{self.images} images, {_figures(self.max_abs_diff, self.relative_diff, self.argmax_agreement)}"
        )


def export(
    net: nn.Module,
    path: str | Path,
    *,
    input_size: int | Sequence[int] | None = None,
    format: str | None = None,
    tolerance: float = 1e-4,
    batch_sizes: Sequence[int] = (1, 3),
    samples: Tensor | None = None,
    labels: Sequence[str] = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Report:
    """Folds batch norms, writes `net` to `path`, runs the file back and compares it with `net` in eval mode.

    The file takes images (B, C, H, W) of any B, normalised as in training, and answers with logits. It appears under
    its name, whole and replacing what was there, only after the comparison; on any failure nothing is left behind.
    `net` is untouched. The file stores input size, number of classes, and `labels`, `mean` and `std` if given, each as
    JSON: "metadata.json" inside a .pt2, metadata properties in ONNX.

    Args:
        net: Takes a batch of images, answers with one tensor (B, classes). In any mode, on any device.
        path: Of the file.
        input_size: Height and width as one number (with 3 channels), (H, W) or (C, H, W); by default that of `samples`.
        format: One of `pynas list formats`; by default told by the suffix of `path`.
        tolerance: Largest difference allowed, relative to the largest logit of a batch.
        batch_sizes: Of the random inputs to compare on.
        samples: Real images to compare on as well, (N, C, H, W).
        labels: Names of the classes, in the order of the logits.
        mean: Of the normalisation, one per channel.
        std: Of the normalisation, one per channel.

    Raises:
        ValueError: an argument is not as above; the net fails on such images or cannot be captured by torch.export;
            or the file does not run, or differs from the net by more than `tolerance`.
        MissingExtra: the format needs a package that is not installed.
        OSError: the folder does not exist or cannot be written (FileNotFoundError, PermissionError, ...).
    """
    target = Path(path).resolve()
    exporter = _exporter(target, format)
    if not isinstance(net, nn.Module):
        raise ValueError(f"export takes a torch.nn.Module, not {type(net).__name__}. Build the architecture first.")
    shape = _image_shape(input_size, samples)
    with _placed(target) as temporary:
        original = copy.deepcopy(net).cpu().eval().requires_grad_(False)
        batches = _batches(original, shape, batch_sizes, samples)
        expected = [forward(original, images) for images in batches]
        metadata = _metadata(shape, expected[0], labels, mean, std)
        fused = fuse(original, batches[0], tolerance, restore=False)
        with _stage(f"The net cannot be captured for {exporter.name}"):
            program = _capture(fused, batches[0])
        with _stage(f"The net cannot be written as {exporter.name}"):
            version = exporter.write(program, temporary, metadata)
        with _stage(f"The {exporter.name} file does not run"):
            actual = exporter.run(temporary, batches)
        figures = _compare(expected, actual)
        if figures[1] > tolerance:
            raise ValueError(
                f"{target.name} was not written: run back, its {_figures(*figures)}; the tolerance is {tolerance:g}."
            )
        size_bytes = temporary.stat().st_size
    return Report(target, exporter.name, version, size_bytes, sum(map(len, batches)), *figures)


def _exporter(path: Path, format: str | None) -> Exporter:
    suffixes = {exporter.suffix: name for name, exporter in FORMATS.items()}
    by_suffix = suffixes.get(path.suffix.lower())
    if format is None and by_suffix is None:
        raise unknown("suffix", path.suffix, suffixes, f"Rename {path.name!r}, or give format=.")
    exporter = FORMATS.get(format or str(by_suffix))
    if by_suffix not in (None, exporter.name):
        raise ValueError(f"{path.name!r} is the name of a file in format {by_suffix!r}, not {exporter.name!r}.")
    missing = [name for name in exporter.extra.split() if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        raise MissingExtra(f"Format {exporter.name!r}", " ".join(missing))
    return exporter


def _image_shape(input_size: int | Sequence[int] | None, samples: Tensor | None) -> tuple[int, ...]:
    """(C, H, W), checked."""
    given: tuple[int, ...] = ()
    if samples is not None:
        if samples.dim() != 4 or 0 in samples.shape:
            raise ValueError(f"samples must be images (N, C, H, W), not of shape {tuple(samples.shape)}.")
        given = tuple(samples.shape[1:])
    if input_size is None:
        if not given:
            raise ValueError("Give the size of the images that the net takes, for instance input_size=224.")
        return given
    size = tuple(input_size) if isinstance(input_size, Iterable) else (input_size, input_size)
    shape = (3, *size) if len(size) == 2 else size
    if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(f"input_size is a number of pixels, (H, W) or (C, H, W), not {input_size}.")
    if given and shape != given:
        raise ValueError(f"input_size {shape} and samples of shape {given} contradict each other. Leave one out.")
    return shape


def _batches(net: nn.Module, shape: Sequence[int], sizes: Sequence[int], samples: Tensor | None) -> list[Tensor]:
    """Random inputs from a fixed seed, then the samples, of the net's type and on the CPU."""
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"batch_sizes needs at least one number of images, not {sizes}.")
    dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(size, *shape, generator=generator).to(dtype) for size in sizes]
    if samples is not None:
        batches += torch.split(samples.detach().to("cpu", dtype), 64)
    return batches


def _metadata(
    shape: Sequence[int], logits: Tensor, labels: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> dict[str, str]:
    if logits.dim() != 2:
        raise ValueError(f"The net must answer with logits (B, classes), not in shape {tuple(logits.shape)}.")
    classes = logits.shape[1]
    if labels and len(labels) != classes:
        raise ValueError(f"{len(labels)} labels were given for a net with {classes} classes.")
    if (mean or std) and not (len(mean) == len(std) == shape[0]):
        raise ValueError(f"mean and std need one value per channel ({shape[0]}), not {len(mean)} and {len(std)}.")
    facts = {
        "input_size": list(shape),
        "classes": classes,
        "labels": list(labels),
        "mean": list(mean),
        "std": list(std),
    }
    return {"torch": torch.__version__} | {key: json.dumps(fact) for key, fact in facts.items() if fact}


def _capture(net: nn.Module, images: Tensor) -> ExportedProgram:
    """The net as a graph with a dynamic batch, from an example of two images: torch.export would fix a batch of one."""
    example = images[:1].repeat(2, 1, 1, 1)
    program = torch.export.export(net, (example,), dynamic_shapes=({0: Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths and source lines of this machine: they would end up in the file
    return program


def _compare(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> tuple[float, float, float]:
    """Largest absolute and relative difference, and the share of images with the same arg-max."""
    relative = max(relative_difference(*pair) for pair in zip(expected, actual, strict=True))
    wanted, found = torch.cat(list(expected)), torch.cat(list(actual))
    same = wanted.argmax(1) == found.argmax(1)
    return float((wanted - found).abs().max()), relative, float(same.double().mean())


def _figures(max_abs_diff: float, relative_diff: float, argmax_agreement: float) -> str:
    return (
        f"logits differ by up to {max_abs_diff:.1e} ({relative_diff:.1e} of the largest) "
        f"and arg-max agrees on {argmax_agreement:.1%}"
    )


@contextmanager
def _placed(target: Path) -> Iterator[Path]:
    """Gives a path in a temporary folder beside `target`; moves the file there if the block succeeds.

    A folder, because an exporter may put a second file beside the first: that is refused, and cleaned up.
    """
    folder = target.parent
    if target.is_dir():
        raise IsADirectoryError(f"Cannot write {target}: it is a folder. Add a file name.")
    if not folder.is_dir():
        raise FileNotFoundError(f"Cannot write {target}: there is no folder {folder}. Create it first.")
    try:
        scratch = tempfile.TemporaryDirectory(dir=folder, prefix=".export-")
    except OSError as error:
        raise type(error)(f"Cannot write {target}: {error.strerror} in {folder}. Choose another folder.") from error
    with scratch as name:
        temporary = Path(name) / target.name
        yield temporary
        others = sorted(file.name for file in temporary.parent.iterdir() if file != temporary)
        if others:
            raise ValueError(f"{target.name} was not written: it would need {', '.join(others)} beside it.")
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)


@contextmanager
def _stage(failure: str) -> Iterator[None]:
    """Silences exporters, which print and warn, and turns what they raise into one sentence that starts so."""
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"{failure}: {first_line(error)}") from error
