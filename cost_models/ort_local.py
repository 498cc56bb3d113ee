"""Runner `ort-local`: ops exported to ONNX, timed in onnxruntime on this machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .compiling import Compiler, Job, check_output, compile_all, example, read_example
from .machine import cpu_model, host
from .spec import OpSpec
from .timing import check_threads, net_repeats_ms, runs_ms

SCHEDULE = "onnx-1"
OPSET = 18  # newer ones add nothing that these ops use
MODEL = "op.onnx"
INPUT, OUTPUT = "input", "output"


@dataclass
class OrtLocal:
    """Times ops in onnxruntime on this machine's CPU: fp32, batch 1, all of its graph optimisations.

    Each op is exported to ONNX once and kept in the user's cache. It is timed the way `TorchHost` times, with input and
    output bound beforehand; one thread by its CPU time, several by the wall clock.
    """

    threads: int = 1
    name: str = field(default="ort-local", kw_only=True)
    source: str = field(default="measured", kw_only=True)
    precision: str = field(default="fp32", kw_only=True)
    batch: int = field(default=1, kw_only=True)
    schedule: str = field(default=SCHEDULE, kw_only=True)

    def __post_init__(self) -> None:
        check_threads(self.threads)

    def provenance(self) -> dict[str, dict[str, str | int]]:
        return {"machine": {"cpu": cpu_model(), **host()}, "software": {"onnxruntime": _version()}}

    @property
    def compiler(self) -> Compiler:
        torch = importlib.metadata.version("torch")
        return Compiler("cost_models.ort_local:export_op", {"opset": OPSET}, {"torch": torch, "schedule": SCHEDULE})

    def open(self, folder: Path) -> Callable[[], Any]:
        """What runs the op once, after it gave torch's outputs.

        Raises:
            ValueError: it did not.
        """
        x, expected = read_example(folder)
        session = _session(folder / MODEL, self.threads)
        binding = session.io_binding()
        binding.bind_cpu_input(INPUT, x)
        binding.bind_output(OUTPUT, "cpu")
        session.run_with_iobinding(binding)
        check_output(f"The exported op in {folder}", binding.copy_outputs_to_cpu()[0], expected)
        return lambda: session.run_with_iobinding(binding)

    def time_ms(self, module: Callable[[], Any], spec: OpSpec, repeats: int) -> list[float]:
        return runs_ms(module, self.threads, repeats)

    def net(self, module: Any, input_shape: tuple[int, ...]) -> Callable[[], float]:
        """See `Runner.net`. Exports the network unless the cache has it."""
        run = self.open(compile_all({0: Job("net", module, input_shape)}, self.compiler)[0])
        return lambda: runs_ms(run, self.threads, 1)[0]

    def time_net_ms(self, module: Any, input_shape: tuple[int, ...], repeats: int = 15) -> list[float]:
        """A whole network, timed as the rows of a table are; see `TorchHost.time_net_ms`."""
        return net_repeats_ms(self.net(module, input_shape), repeats)


def export_op(module: Any, shape: tuple[int, ...], folder: Path, opset: int) -> None:
    """Write a module as ONNX to `folder`, and check it; called in another process by `compile_all`.

    Raises:
        ValueError: onnxruntime's outputs differ from torch's.
    """
    import onnx
    import torch

    x = torch.from_numpy(example(shape))
    with torch.inference_mode():
        expected = module(x).numpy()
    with torch.no_grad():
        program = torch.export.export(module, (x,))
    exported = torch.onnx.export(
        program, dynamo=True, verbose=False, opset_version=opset, input_names=[INPUT], output_names=[OUTPUT]
    )
    assert exported is not None  # None only comes from the old, tracing exporter
    onnx.save(exported.model_proto, folder / MODEL)
    found = _session(folder / MODEL, 1).run([OUTPUT], {INPUT: x.numpy()})[0]
    check_output("onnxruntime", found, expected)


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _version() -> str:
    """Of onnxruntime, without importing it. Raises ImportError when it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise ImportError("onnxruntime is not installed. Install it with: pip install onnxruntime")
    return importlib.metadata.version("onnxruntime")
