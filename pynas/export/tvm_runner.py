"""Runs the network in the library beside this script, on the machine that it was made for.

    pip install numpy apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post1
    python3 net.so.py IMAGES.npy [LOGITS.npy]

IMAGES.npy holds images of the network's size: uint8 (N, H, W, 3) as they are, or float32 (N, 3, H, W) as the network
was trained on, normalised. Prints the class of each and the median time of one; writes the logits, float32 (N,
classes), if a second file is named. Needs Python 3.9, numpy and TVM, and nothing else.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {}
SHOWN = 20  # classes that are printed


def main(args: list[str]) -> int:
    """Runs all images of a file."""
    import numpy as np

    if len(args) not in (1, 2):
        sys.stderr.write(f"usage: python3 {Path(__file__).name} IMAGES.npy [LOGITS.npy]\n")
        return 2
    images = prepared(np.load(args[0], allow_pickle=False))
    run = opened(Path(__file__).with_name(SETTINGS["library"]))
    logits, times = [], []
    for image in images:
        begin = time.perf_counter()
        logits.append(run(image[None]))
        times.append(1e3 * (time.perf_counter() - begin))
    labels = SETTINGS.get("labels") or range(SETTINGS["classes"])
    for number, found in enumerate(logits[:SHOWN]):
        sys.stdout.write(f"image {number}: {labels[int(found.argmax())]}\n")
    sys.stdout.write(f"{len(images)} images, median {statistics.median(times):.3g} ms each\n")
    if len(args) == 2:
        np.save(args[1], np.concatenate(logits))
    return 0


def prepared(images: Any) -> Any:
    """Images as the library takes them: float32, channels last, normalised."""
    import numpy as np

    channels, height, width = SETTINGS["input_size"]
    if images.dtype == np.uint8 and images.shape[1:] == (height, width, channels):
        mean, std = (np.array(SETTINGS[name], np.float32) * 255 for name in ("mean", "std"))
        return np.ascontiguousarray((images.astype(np.float32) - mean) / std)
    if images.dtype == np.float32 and images.shape[1:] == (channels, height, width):
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    raise SystemExit(
        f"Images must be uint8 (N, {height}, {width}, {channels}) or float32 (N, {channels}, {height}, {width}), not "
        f"{images.dtype} {images.shape}."
    )


def opened(library: Path) -> Any:
    """The library as a function of one image (1, H, W, 3) that answers with logits (1, classes)."""
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")  # the compiler takes long to load, and is not needed
    import tvm
    from tvm.runtime.vm import VirtualMachine

    device = tvm.runtime.device("cpu", 0)
    run = VirtualMachine(tvm.runtime.load_module(str(library)), device)["main"]
    return lambda image: run(tvm.runtime.tensor(image, device)).numpy().reshape(1, -1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
