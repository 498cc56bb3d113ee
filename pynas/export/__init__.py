"""Deployment files: written, run back and compared before they take their name.

To add a format, say MNN, write `pynas/export/mnn.py` with

    def write(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> str: ...
    def open(path: Path) -> Callable[[Tensor], Tensor]: ...
    FORMATS.add("mnn", Exporter("mnn", ".mnn", write, open, extra="MNN", runtime="MNN"))

and its import line below. Import the format's packages inside the two functions, never at the top. `write` gets a
program of the folded net; `export` sees to the rest: checks, quiet, comparison, accuracy, latency, atomic placement,
and the error for a package that is missing. A format that can be quantised after training has `quantise` too.
`tests/test_exporters.py` tests it because it is registered, and `pynas deploy` has its row.
"""

from __future__ import annotations

from pynas.export import onnx, pt2, pte, tvm
from pynas.export.checked import Quantising, export
from pynas.export.formats import ELSEWHERE, FORMATS, Exporter
from pynas.export.written import HostLatency, Precision, Report

__all__ = [
    "ELSEWHERE",
    "FORMATS",
    "Exporter",
    "HostLatency",
    "Precision",
    "Quantising",
    "Report",
    "export",
    "onnx",
    "pt2",
    "pte",
    "tvm",
]
