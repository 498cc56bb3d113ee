"""Latency of ops on ARM cores that are not at hand, from their real code.

`TvmModel(core="cortex-a72")` is a runner like those that measure: `cost_models.measure` fills a table with it, labelled
"modelled". It needs TVM, a cross compiler, qemu-user (or an ARM machine) and llvm-mca.

- blocks.py, loops.py, pieces.py: assembly as counted basic blocks, loops, and code to be costed
- counts.py: running it once
- mca.py: cycles by llvm-mca
- memory.py: the memory rule
- cores.py, cores/*.toml: what is assumed about each core; a new core is one more file
- model.py: the runner, and what it can and cannot know
"""

from .cores import Core, core, names
from .model import KernelCost, TvmModel

__all__ = ["Core", "KernelCost", "TvmModel", "core", "names"]
