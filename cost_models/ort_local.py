"""Runner `ort-local`: ops exported to ONNX, timed in onnxruntime on this machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .compiling import Compiler, Job, compile_all, example, read_example
from .machine import cpu_model, host
from .spec import OpSpec
from .timing import CallTimer, check_threads

SCHEDULE = "onnx-1"
OPSET = 18  # newer ones add nothing that these ops use
EXPORTERS = ("torch", "onnxscript")  # other versions may write other graphs
MODEL = "op.onnx"
INPUT, OUTPUT = "input", "output"


@dataclass
class OrtLocal:
    """Times ops in onnxruntime on this machine's CPU: fp32, batch 1, all of its graph optimisations.

    Each op is exported to ONNX once and kept in the user's cache. Input and output are bound beforehand, and memory is
    read between runs; one thread is timed by its CPU time, several by the wall clock. What it takes to call onnxruntime
    is taken off rows and networks alike (`timing.CallTimer`), and noted in the table as call_ns.
    """

    threads: int = 1
    name: str = field(default="ort-local", kw_only=True)
    source: str = field(default="measured", kw_only=True)
    precision: str = field(default="fp32", kw_only=True)
    batch: int = field(default=1, kw_only=True)
    schedule: str = field(default=f"{SCHEDULE}, call-1", kw_only=True)

    def __post_init__(self) -> None:
        check_threads(self.threads)

    def provenance(self) -> dict[str, dict[str, str | int]]:
        calls = self.__dict__.get("_calls")  # known when something was timed
        return {
            "machine": {"cpu": cpu_model(), **host(), **(calls.note() if calls else {})},
            "software": {name: _version(name) for name in ("onnxruntime", *EXPORTERS)},
        }

    @property
    def compiler(self) -> Compiler:
        versions = {name: _version(name) for name in EXPORTERS}
        return Compiler("cost_models.ort_local:export_op", {"opset": OPSET}, {**versions, "schedule": SCHEDULE})

    def open(self, folder: Path) -> Callable[[], Any]:
        """What runs the op once, after it gave torch's outputs.

        Raises:
            ValueError: it did not.
        """
        from .tvm_build.check import compare

        x, expected = read_example(folder)
        session = _session(folder / MODEL, self.threads)
        binding = session.io_binding()
        binding.bind_cpu_input(INPUT, x)
        binding.bind_output(OUTPUT, "cpu")
        session.run_with_iobinding(binding)
        compare(binding.copy_outputs_to_cpu()[0], expected, f"the op in {folder}")
        return lambda: session.run_with_iobinding(binding)

    def time_ms(self, module: Callable[[], Any], spec: OpSpec, repeats: int) -> list[float]:
        return self._calls.runs_ms(module, repeats)

    def net(self, module: Any, input_shape: tuple[int, ...]) -> Callable[[], float]:
        """See `Runner.net`. Exports the network unless the cache has it."""
        run = self.open(compile_all({0: Job("net", module, input_shape)}, self.compiler)[0])
        return lambda: self._calls.runs_ms(run, 1)[0]

    @cached_property
    def _calls(self) -> CallTimer:
        return CallTimer.of(self.compiler, self.open, self.threads)


def export_op(module: Any, shape: tuple[int, ...], folder: Path, opset: int) -> None:
    """Write a module as ONNX to `folder`, and check it; called in another process by `compile_all`.

    Raises:
        ValueError: onnxruntime's outputs differ from torch's.
    """
    import onnx
    import torch

    from .tvm_build.check import compare

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
    compare(found, expected, "the exported graph")


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _version(package: str) -> str:
    """Of a package, without importing it. Raises ImportError when it is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{package} is not installed. Install it with: pip install {package}")
    return importlib.metadata.version(package)
