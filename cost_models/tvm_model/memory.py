"""Bytes that a kernel moves between memory and the caches.

The rule, for one run of a network:
- Weights and biases come from memory: before a kernel runs again, the rest of the network has passed through the cache.
- A kernel's activations, read and written, stay in the second level cache if all of them fit into it: the kernel
  before has just written its input. If they do not fit, all of them pass to or from memory: a cache that is read in
  order and is a little too small keeps next to nothing.

First level misses, write allocation, translation misses and the traffic of other cores are left out.
"""

from __future__ import annotations

FLOAT_BYTES = 4


def bytes_moved(activations: int, weight_bytes: int, l2_kb: float) -> int:
    """Bytes to and from memory for one call of a kernel.

    Args:
        activations: float32 numbers in its inputs and output together.
        weight_bytes: of weights and biases as the kernel reads them.
        l2_kb: second level cache; 1 KB = 1024 bytes.
    """
    held = FLOAT_BYTES * activations
    return weight_bytes + (held if held > l2_kb * 1024 else 0)
