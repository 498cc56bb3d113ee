"""A network of a run, or a module, as a file: the front door to `pynas.export`'s formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import nn

from pynas import settings
from pynas.api import images_of, weighted
from pynas.console import Show
from pynas.export import FORMATS, Quantising, Report
from pynas.export import export as export_net
from pynas.results import Run, SavedModel, Trained


def export(
    run: nn.Module | str | Path | Run | Trained,
    path: str | None = None,
    *,
    net: int | None = None,
    weights: Literal["trained", "inherited"] = "trained",
    input_size: int | None = None,
    format: str | None = None,
    precision: Literal["float32", "int8"] = "float32",
    target: str = "host",
    calibration: int = 128,
    max_drop: float = 0.01,
    repeats: int = 15,
    quiet: bool = False,
) -> Report:
    """Writes a trained network for deployment, runs the file back, compares, and tells its accuracy and latency here.

    Args:
        run: A run's folder, a run, what `retrain` returned, or any module that takes (B, 3, S, S).
        path: File to write, for instance "net.onnx"; by default `export/net.onnx` in the run, or in `nets/<number>`
            there.
        net: Instead of the run's best network another that it found, by its number in the table.
        weights: Those of its own training, or inherited from the run's supernet.
        input_size: Height and width of the image in pixels; needed for a module, known for a run.
        format: By default from the suffix; see `pynas list formats`.
        precision: "int8" quantises after training, calibrated on training images of the run.
        target: Of format tvm: CPU that the library is for, such as "cortex-a72".
        calibration: Number of these images.
        max_drop: Loss of test accuracy, 0 to 1, beyond which an int8 file is warned of.
        repeats: Timings of one image on this machine; 0 for none.
        quiet: Prints nothing.

    Returns:
        What was written, by how much its outputs differ, its accuracy on the test images and its latency here. A module
        has no images, nor has a run whose data is gone: random images are compared then.

    Raises:
        ValueError: If the file's outputs differ from the network's; nothing is left behind.
        FileNotFoundError: If the network was not trained; names the command.
        MissingExtra: If the format needs a package that is not installed.
    """
    show, data = Show(quiet), None
    about: dict[str, Any] = {}
    if isinstance(run, nn.Module):
        if net is not None or weights != "trained":
            raise ValueError("A module is exported as it is: net and weights go with a run.")
        if path is None:
            raise ValueError("Say where to write the module: export(net, 'net.onnx', input_size=224).")
        if input_size is None:
            input_size = getattr(run, "input_size", None)
        if input_size is None:
            raise ValueError("Say the module's input size in pixels: export(net, 'net.onnx', input_size=224).")
        module, where = run, Path(path)
    else:
        saved, config = weighted(run, net, weights)
        settings.use_threads(config)
        module, input_size = saved.net, saved.input_size
        where = Path(path) if path is not None else default_file(saved, format or "onnx", precision, target)
        about = {"labels": saved.classes, "mean": saved.mean, "std": saved.std}
        try:
            data = images_of(saved, config)
        except (ValueError, OSError) as error:  # a file can be written all the same
            show.line(f"not compared on images of the run: {error}")
    quantising = Quantising(calibration, max_drop)
    report = export_net(
        module,
        where,
        input_size=input_size,
        format=format,
        precision=precision,
        target=target,
        data=data,
        quantising=quantising,
        repeats=repeats,
        **about,
    )
    show.line(str(report))
    if report.warning:
        show.warn(report.warning)
    return report


def default_file(saved: SavedModel, format: str, precision: str, target: str) -> Path:
    """Where a network of a run is exported: `net.onnx`, `net.int8.onnx`, `net.cortex-a72.so`. Makes the folder."""
    marks = [mark for mark, usual in ((precision, "float32"), (target, "host")) if mark != usual]
    name = ".".join(["net", *marks]) + FORMATS.get(format).suffix
    folder = saved.folder / "export"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name
