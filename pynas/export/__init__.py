"""Deployment files: written, run back and compared before they take their name.

To add a format, say TFLite, write `pynas/export/tflite.py` with

    def write(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> str: ...
    def run(path: Path, batches: Sequence[Tensor]) -> list[Tensor]: ...
    FORMATS.add("tflite", Exporter("tflite", ".tflite", write, run, extra="litert-torch ai-edge-litert"))

and its import line below. Import the format's packages inside the two functions, never at the top. `write` gets a
program of the folded net; `export` sees to the rest: checks, quiet, comparison, atomic placement, and the error for a
package that is missing. `tests/test_exporters.py` tests it because it is registered.
"""

from __future__ import annotations

from pynas.export import onnx, pt2
from pynas.export.checked import Report, export
from pynas.export.formats import FORMATS, Exporter

__all__ = ["FORMATS", "Exporter", "Report", "export", "onnx", "pt2"]
