"""Writing in any format with the checks that make the file worth trusting."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cost_models.names import unknown
from pynas.export.formats import ELSEWHERE, FORMATS, Exporter
from pynas.export.judged import BATCH, calibration_batches, file_accuracy, time_files
from pynas.export.placed import placed
from pynas.export.written import Precision, Report, difference_text
from pynas.fuse import first_line, forward, fuse, relative_difference
from pynas.registry import MissingExtra
from pynas.training.data import Data
from pynas.training.evaluate import accuracy
from pynas.training.feed import batches

EMULATED_IMAGES = 20  # that are run back under an emulator, which takes up to seconds for each


@dataclass(frozen=True)
class Quantising:
    """How a net is brought to 8 bits.

    Args:
        images: Training images to calibrate the ranges of activations by.
        max_drop: Loss of test accuracy, 0 to 1, that a file may have without a warning; 0.01 is a point.
    """

    images: int = 128
    max_drop: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.images, bool) or not isinstance(self.images, int) or self.images < 1:
            raise ValueError(f"Calibration needs a whole number of images of at least 1, not {self.images!r}.")
        if not 0 <= self.max_drop <= 1:
            raise ValueError(f"max_drop must lie between 0 and 1, not {self.max_drop!r}: 0.01 stands for one point.")


def export(
    net: nn.Module,
    path: str | Path,
    *,
    input_size: int | Sequence[int] | None = None,
    format: str | None = None,
    precision: Precision = "float32",
    target: str = "host",
    tolerance: float = 1e-4,
    batch_sizes: Sequence[int] = (1, 3),
    samples: Tensor | None = None,
    labels: Sequence[str] = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    data: Data | None = None,
    net_accuracy: float | None = None,
    quantising: Quantising | None = None,
    repeats: int = 0,
) -> Report:
    """Folds batch norms, writes `net` to `path`, runs the file back and compares it with `net` in eval mode.

    The file takes images (B, C, H, W), normalised as in training, and answers with logits; of any B where the format
    can, of one image a run elsewhere (tvm, pte). It appears under its name, whole and replacing what was there, only
    after the comparison; on any failure nothing is left behind. `net` is untouched. The file stores input size, number
    of classes, and `labels`, `mean` and `std` if given, each as JSON: "metadata.json" inside a .pt2, metadata
    properties in ONNX, the method "metadata" of a .pte, the script beside a library.

    In int8 no tolerance holds: what counts is the accuracy that is lost, which the report tells and warns of. The
    difference is that on real images, where there are some.

    A file for another machine is run back under an emulator, on 20 images; where there is none, the report says so.

    Args:
        net: Takes a batch of images, answers with one tensor (B, classes). In any mode, on any device.
        path: Of the file.
        input_size: Height and width as one number (with 3 channels), (H, W) or (C, H, W); by default that of `samples`.
        format: One of `pynas list formats`; by default told by the suffix of `path`.
        precision: "int8" quantises after training: weights for each output channel, activations by calibration on
            training images of `data`, or on `samples` without.
        target: CPU that the file is for, in formats of machine code: one of `cost_models.tvm_build.TARGETS`.
        tolerance: Largest difference allowed, relative to the largest logit of a batch.
        batch_sizes: Of the random inputs to compare on.
        samples: Real images to compare on as well, (N, C, H, W).
        labels: Names of the classes, in the order of the logits.
        mean: Of the normalisation, one per channel.
        std: Of the normalisation, one per channel.
        data: Images of the net's own data: the first test images are compared on, accuracy is of all of them, and
            `labels`, `mean` and `std` are theirs.
        net_accuracy: Of `net` on the test images of `data`, where it is known.
        quantising: How, in int8.
        repeats: Timings of one image on this machine, each of a few runs; 0 for none. Takes 0.1 s or more each.

    Raises:
        ValueError: an argument is not as above; the net fails on such images or cannot be captured by torch.export;
            or the file does not run, or differs from the net by more than `tolerance`.
        MissingExtra: the format needs a package that is not installed.
        OSError: the folder does not exist or cannot be written (FileNotFoundError, PermissionError, ...).
    """
    where = Path(path).resolve()
    exporter = _exporter(where, format, precision, target)
    if not isinstance(net, nn.Module):
        raise ValueError(f"export takes a torch.nn.Module, not {type(net).__name__}. Build the architecture first.")
    if data is not None:
        samples = next(batches(data.test, BATCH, data))[0] if samples is None else samples
        labels, mean, std = labels or data.classes, mean or data.mean, std or data.std
    shape = _image_shape(input_size, samples)
    how = quantising or Quantising()
    calibration = _calibration(precision, data, samples, how)
    with placed(where, exporter.beside) as temporary:
        original = copy.deepcopy(net).cpu().eval().requires_grad_(False)
        inputs = _batches(original, shape, batch_sizes, samples)
        expected = [forward(original, images) for images in inputs]
        metadata = _metadata(shape, expected[0], labels, mean, std)
        fused = fuse(original, inputs[0], tolerance, restore=False)
        with _stage(f"The net cannot be captured for {exporter.name}"):
            program = _capture(fused, inputs[0])
        with _stage(f"The net cannot be written as {exporter.name}"):
            if precision == "int8":
                assert exporter.quantise is not None
                version = exporter.quantise(program, temporary, metadata, calibration)
            else:
                version = exporter.write(program, temporary, metadata)
        report = Report(where, exporter.name, version, 0, 0, None, None, None, precision, exporter.target)
        report = replace(report, size_bytes=temporary.stat().st_size)
        not_run = exporter.elsewhere() if exporter.elsewhere is not None else ""
        if not_run:
            return replace(report, not_run=not_run)
        report = _run_back(report, exporter, temporary, inputs, expected, tolerance, len(batch_sizes))
        if exporter.elsewhere is not None:
            return report
        with _stage(f"The {exporter.name} file does not run"):
            answer = exporter.open(temporary)
            if data is not None:
                right = accuracy(original, data.test, data) if net_accuracy is None else net_accuracy
                tested = file_accuracy(answer, data)
                report = replace(report, accuracy=tested, net_accuracy=right, test_images=len(data.test))
            if repeats:
                latency = time_files({"": (answer, exporter.version)}, inputs[0][:1], repeats)[""]
                report = replace(report, latency=latency)
    return replace(report, warning=_warning(report, how))


def _calibration(precision: Precision, data: Data | None, samples: Tensor | None, how: Quantising) -> list[Tensor]:
    if precision != "int8":
        return []
    if data is not None:
        return calibration_batches(data, how.images)
    if samples is None:
        raise ValueError("int8 is calibrated on images: give data, or samples of real images.")
    return list(samples.detach().cpu().float()[: how.images].split(BATCH))


def _run_back(
    report: Report,
    exporter: Exporter,
    file: Path,
    inputs: Sequence[Tensor],
    expected: Sequence[Tensor],
    tolerance: float,
    random: int,
) -> Report:
    """The report with what running the file showed; the first `random` inputs are noise. Raises ValueError where a
    float32 file differs too much."""
    if report.precision == "int8" and len(inputs) > random:
        inputs, expected = inputs[random:], expected[random:]  # calibration knows nothing of noise
    if exporter.elsewhere is not None:
        inputs, expected = ([part[-1][:EMULATED_IMAGES]] for part in (inputs, expected))  # real ones, if there are any
    with _stage(f"The {exporter.name} file does not run"):
        actual = exporter.run(file, inputs)
    figures = _compare(expected, actual)
    if figures[1] > (tolerance if report.precision == "float32" else torch.finfo(torch.float32).max):
        raise ValueError(
            f"{report.path.name} was not written: run back, its {difference_text(*figures)}; the tolerance is "
            f"{tolerance:g}."
        )
    largest, relative, same = figures
    images = sum(map(len, inputs))
    return replace(report, images=images, max_abs_diff=largest, relative_diff=relative, argmax_agreement=same)


def _warning(report: Report, how: Quantising) -> str:
    if report.precision == "float32" or report.drop is None or report.drop <= how.max_drop:
        return ""
    figures = f"{report.net_accuracy:.2%} to {report.accuracy:.2%}"
    return (
        f"{report.path.name} in int8 loses {100 * report.drop:.2f} points of test accuracy ({figures}), more than "
        f"{100 * how.max_drop:g}. Do not ship it unseen: calibrate on more images, or ship float32."
    )


def _exporter(path: Path, format: str | None, precision: Precision, target: str) -> Exporter:
    if (asked := format or path.suffix.lower().removeprefix(".")) in ELSEWHERE:
        raise ValueError(f"Format {asked!r} is not written here: {ELSEWHERE[asked]}")
    suffixes = {exporter.suffix: name for name, exporter in FORMATS.items()}
    by_suffix = suffixes.get(path.suffix.lower())
    if format is None and by_suffix is None:
        raise unknown("suffix", path.suffix, suffixes, f"Rename {path.name!r}, or give format=.")
    exporter = FORMATS.get(format or str(by_suffix))
    if by_suffix not in (None, exporter.name):
        raise ValueError(f"{path.name!r} is the name of a file in format {by_suffix!r}, not {exporter.name!r}.")
    if precision not in get_args(Precision):
        raise unknown("precision", str(precision), get_args(Precision))
    if precision == "int8" and exporter.quantise is None:
        able = [name for name, other in FORMATS.items() if other.quantise is not None]
        raise ValueError(f"Format {exporter.name!r} has no int8 here; {' and '.join(able)} have.")
    if missing := exporter.missing():
        raise MissingExtra(f"Format {exporter.name!r}", missing)
    if target == exporter.target:
        return exporter
    if exporter.for_target is None:
        able = [name for name, other in FORMATS.items() if other.for_target is not None]
        raise ValueError(f"Format {exporter.name!r} is the same for all CPUs; target goes with {' and '.join(able)}.")
    return exporter.for_target(target)


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
        batches += torch.split(samples.detach().to("cpu", dtype), BATCH)
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
