"""Makes a .tflite from a .pt2, in an environment of its own, where pynas need not be installed.

    python3 -m venv lite
    lite/bin/pip install litert-torch ai-edge-litert
    lite/bin/python pt2_to_tflite.py net.pt2 net.tflite

The file takes one image a run, (1, 3, H, W), normalised as in training, and answers with logits. It is run back in
LiteRT's interpreter on random images, compared with the .pt2, and takes its name only if it agrees; what the .pt2 says
about itself (labels, mean, std) goes to `net.tflite.json`.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOLERANCE = 1e-4  # of the largest logit
IMAGES = 8


def main(args: list[str]) -> int:
    """Converts one file. Returns the exit status."""
    if len(args) != 2 or not args[1].endswith(".tflite"):
        sys.stderr.write(f"usage: python3 {Path(__file__).name} net.pt2 net.tflite\n")
        return 2
    source, target = map(Path, args)
    if not source.is_file():
        sys.stderr.write(f"There is no file {source}. Write it with: pynas export RUN --path {source.name}\n")
        return 1
    import torch

    extra = {"metadata.json": ""}
    net = torch.export.load(source, extra_files=extra).module()
    metadata = {name: json.loads(text) for name, text in json.loads(extra["metadata.json"]).items() if name != "torch"}
    images = torch.randn(IMAGES, *metadata["input_size"], generator=torch.Generator().manual_seed(0)).split(1)
    with tempfile.TemporaryDirectory(dir=target.resolve().parent, prefix=".export-") as folder:
        made = Path(folder) / target.name
        convert(net, images[0], made)
        run = opened(made)
        relative = max(difference(net(image).detach(), torch.from_numpy(run(image.numpy()))) for image in images)
        if not relative <= TOLERANCE:
            sys.stderr.write(
                f"{target} was not written: run back, it differs by {relative:.1e} of the largest logit.\n"
            )
            return 1
        latency_ms = statistics.median(timed(run, images[0].numpy()) for _ in range(50))
        target.with_name(f"{target.name}.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        size = made.stat().st_size
        made.replace(target)
    sys.stdout.write(
        f"{target.name}: {size / 1e6:.2f} MB; run back on {IMAGES} images, logits differ by up to {relative:.1e} of "
        f"the largest; {latency_ms:.3g} ms, measured here, LiteRT, 1 thread\n"
    )
    return 0


def convert(net: Any, image: Any, path: Path) -> None:
    """Writes the program for one image a run."""
    import litert_torch
    import torch

    fixed = torch.export.export(net, (image,)).module()
    litert_torch.convert(fixed, (image,)).export(str(path))


def opened(path: Path) -> Any:
    """The file as a function of one image."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    (source,), (answer,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(image: Any) -> Any:
        interpreter.set_tensor(source["index"], image)
        interpreter.invoke()
        return interpreter.get_tensor(answer["index"])

    return run


def difference(expected: Any, found: Any) -> float:
    """The largest difference over the largest expected value."""
    return float((expected - found).abs().max() / expected.abs().max())


def timed(run: Any, image: Any) -> float:
    """One latency in ms."""
    begin = time.perf_counter()
    run(image)
    return 1e3 * (time.perf_counter() - begin)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
