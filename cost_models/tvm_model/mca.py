"""Cycles of straight code on a core, by llvm-mca."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NEWEST = 22
ITERATIONS = 100
TIMEOUT_S = 300
INSTALL = (
    f"Install one with: apt-get install llvm-{NEWEST} (or newer; packages for older systems: https://apt.llvm.org)"
)


@dataclass
class Mca:
    """llvm-mca for one core. Equal code is asked about once.

    Args:
        cpu: as `llvm-mca -mcpu` names it.
        model: how the names of the core's resources start in LLVM's scheduling model, such as "A57Unit". Other names
            mean that this LLVM costs the core by the figures of another one.

    Raises:
        RuntimeError: there is no llvm-mca, or it has no such model of the core.
    """

    cpu: str
    model: str
    path: Path = field(init=False)
    version: str = field(init=False)
    _known: dict[str, float] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.path = find()
        self.version = version(self.path)
        report = self._run("# LLVM-MCA-BEGIN 0\nadd x0, x0, #1\n# LLVM-MCA-END\n")
        resources = report["TargetInfo"]["Resources"]
        if not all(name.startswith(self.model) for name in resources):
            raise RuntimeError(
                f"{self.path} (LLVM {self.version}) costs {self.cpu!r} by another core's model: its resources are "
                f"{resources[0].split('.')[0]}, ..., not {self.model}... . {INSTALL}."
            )

    def cycles(self, regions: Sequence[Sequence[str]]) -> list[float]:
        """Cycles of each piece of code, when it runs again and again.

        Args:
            regions: instructions, GNU syntax. A piece without any costs one cycle, that of the branch left out.

        Raises:
            RuntimeError: llvm-mca refused the code; the message is its own.
        """
        texts = ["\n".join(region) for region in regions]
        new = [text for text in dict.fromkeys(texts) if text and text not in self._known]
        if new:
            body = "".join(f"# LLVM-MCA-BEGIN {index}\n{text}\n# LLVM-MCA-END\n" for index, text in enumerate(new))
            report = self._run(body)
            found = {region["Name"]: region["SummaryView"]["TotalCycles"] for region in report["CodeRegions"]}
            self._known |= {text: found[str(index)] / ITERATIONS for index, text in enumerate(new)}
        return [self._known[text] if text else 1.0 for text in texts]

    def _run(self, text: str) -> dict[str, Any]:
        command = [
            str(self.path),
            "-mtriple=aarch64-linux-gnu",
            f"-mcpu={self.cpu}",
            f"-iterations={ITERATIONS}",
            "--instruction-info=0",
            "--resource-pressure=0",
            "--json",
        ]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if "not a recognized processor" in done.stderr:
            raise RuntimeError(f"{self.path} (LLVM {self.version}) does not know the core {self.cpu!r}. {INSTALL}.")
        if done.returncode or not done.stdout:
            raise RuntimeError(f"{self.path} failed: {done.stderr.strip()[-500:] or f'exit code {done.returncode}'}")
        report: dict[str, Any] = json.loads(done.stdout)
        return report


def find() -> Path:
    """The newest llvm-mca on the path: `llvm-mca-NN` by number, then plain `llvm-mca`.

    Raises:
        RuntimeError: there is none; says what to install.
    """
    for number in range(NEWEST + 20, 10, -1):
        if path := shutil.which(f"llvm-mca-{number}"):
            return Path(path)
    if path := shutil.which("llvm-mca"):
        return Path(path)
    raise RuntimeError(f"llvm-mca is not installed; it knows how many cycles ARM code takes. {INSTALL}.")


def version(path: Path) -> str:
    """The version that a tool of LLVM reports, such as "22.1.8".

    Raises:
        RuntimeError: it reports none.
    """
    done = subprocess.run([str(path), "--version"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    match = re.search(r"LLVM version (\d+(?:\.\d+)*)", done.stdout)
    if match is None:
        raise RuntimeError(f"{path} does not say which LLVM it is of: {(done.stdout + done.stderr).strip()[:200]}")
    return match.group(1)
