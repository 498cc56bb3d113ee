"""A found network's library for a 64-bit ARM core, run on an emulated one, against torch.

    python bench/emulated_net.py [RUN] [--target cortex-a72] [--images 20] [--folder DIR]

Exports the network of a finished run (without one, of a short search on digits) by format tvm, cross-linked, and runs
it twice on test images: its kernels in a static program under qemu-user, as `pynas.export` checks them; then the very
library, by the very script that lies beside it, with TVM's runtime in a small emulated Debian, the one of
`bench/emulated_board.py`. Both must give torch's logits within 1e-4 of the largest, and torch's classes.

Needs what `emulated_board.py` needs; takes a minute, and the first time one more for the system. Exits with 77 and the
reason where a tool is missing, and with 1 where the answers differ. The times are an emulator's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import emulated_board
import numpy as np
import torch

import pynas
from cost_models.folders import xdg
from pynas.api import images_of, weighted
from pynas.fuse import relative_difference
from pynas.training.feed import batches

TOLERANCE = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cached = xdg("XDG_CACHE_HOME", ".cache") / "pynas" / "emulated-aarch64"
    parser.add_argument("run", nargs="?", help="folder of a finished run; by default a short search")
    parser.add_argument("--target", default="cortex-a72", help="a 64-bit ARM core")
    parser.add_argument("--images", type=int, default=20, help="how many test images")
    parser.add_argument("--folder", type=Path, default=cached, help=f"keeps the emulated system; default {cached}")
    asked = parser.parse_args()
    if reason := emulated_board.why_not():
        print(f"skipped: {reason}")
        return emulated_board.SKIPPED
    with tempfile.TemporaryDirectory() as name:
        run = asked.run or str(pynas.search(out=name, baseline=0, quiet=True).folder)
        return check(run, Path(name), asked)


def check(run: str, scratch: Path, asked: argparse.Namespace) -> int:
    """Export, run twice, compare. Returns the exit status."""
    library = scratch / "net.so"
    report = pynas.export(run, str(library), target=asked.target, quiet=True)
    print(report)
    saved, config = weighted(run, None, "trained")
    data = images_of(saved, config)
    images, labels = next(batches(data.test, asked.images, data))
    with torch.no_grad():
        expected = saved.net(images)
    np.save(scratch / "images.npy", images.numpy())
    launcher = emulated_board.prepare(asked.folder.absolute())
    script = library.with_name(f"{library.name}.py")
    begin = time.monotonic()
    command = [str(launcher), str(script), str(scratch / "images.npy"), str(scratch / "logits.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"The script failed with status {done.returncode}:\n{done.stderr.strip()}")
        return 1
    print(done.stdout.splitlines()[-1], f"under emulation; {time.monotonic() - begin:.0f} s in all")
    found = torch.from_numpy(np.load(scratch / "logits.npy"))
    relative = relative_difference(expected, found)
    same = int((expected.argmax(1) == found.argmax(1)).sum())
    right = int((found.argmax(1) == labels).sum())
    print(
        f"{saved.architecture} for {asked.target}, {len(images)} test images: logits differ from torch's by "
        f"{relative:.1e} of the largest; {same} of the same class; {right} right"
    )
    return 0 if relative <= TOLERANCE and same == len(images) else 1


if __name__ == "__main__":
    sys.exit(main())
