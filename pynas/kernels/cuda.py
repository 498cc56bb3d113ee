"""Finds the compiled CUDA kernels, or says why there are none; and how Python calls them.

The library `libpynas_cuda` is built where nvcc is (csrc/cuda/), holds its own CUDA runtime and no torch, and loads on a
machine without a GPU or a driver. Its functions take the address of a struct of sizes and addresses and a stream, and
return null or what went wrong.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAME = "lib/libpynas_cuda.so"  # in a folder that is no package, or it would look like a module of pynas


class Library:
    """The functions of a built library of CUDA kernels.

    Args:
        path: Of the shared library.
        device: Type of the device whose memory it reads: "cuda"; tests have one that plays a GPU on "cpu".

    Raises:
        OSError: It cannot be loaded.
    """

    def __init__(self, path: str | Path, device: str = "cuda") -> None:
        self.path, self.device = Path(path), device
        self._functions = ctypes.CDLL(str(path))

    def function(self, name: str, restype: Any, *argtypes: Any) -> Any:
        """A function of the library."""
        found = getattr(self._functions, name)
        found.restype, found.argtypes = restype, list(argtypes)
        return found

    def shared_bytes(self, x: Tensor) -> int:
        """Shared memory that a block of threads can have on a tensor's GPU."""
        if not x.is_cuda:
            return 227 * 1024
        facts: Any = torch.cuda.get_device_properties(x.device)  # whose type does not tell of all that it has
        return int(facts.shared_memory_per_block_optin)

    def stream(self, x: Tensor) -> int:
        """The stream that work on a tensor's device is put into."""
        return int(torch.cuda.current_stream(x.device).cuda_stream) if x.is_cuda else 0


def _find() -> tuple[Library | None, str]:
    path = Path(__file__).parent.parent / NAME
    if not path.exists():
        return None, (
            "not built: nvcc was not found when pynas was installed. With the CUDA toolkit on PATH, install pynas from "
            "its source folder again: pip install --force-reinstall --no-deps ."
        )
    try:
        return Library(path), "built for sm_80 and sm_90, and as PTX for later GPUs"
    except OSError as error:
        return None, f"built, but cannot be loaded ({error})"


_library, STATE = _find()


def library(x: Tensor) -> Library | None:
    """The library that works on a tensor's device."""
    return _library if _library is not None and x.device.type == _library.device else None


def built() -> bool:
    """Whether there are CUDA kernels, with a GPU or without."""
    return _library is not None


@contextmanager
def using(other: Library | None) -> Iterator[None]:
    """Puts another library in place of the built one, and it back at the end. For tests."""
    global _library
    before, _library = _library, other
    try:
        yield
    finally:
        _library = before


def state() -> str:
    """What `pynas info` says: whether the kernels are built, and whether there is a GPU for them."""
    if _library is None or torch.cuda.is_available():
        return STATE
    return f"{STATE}; torch sees no CUDA device here"


def dense(x: Tensor) -> Tensor:
    """The values of a tensor, side by side in memory as kernels read them."""
    return x.resolve_neg().contiguous()


def aligned(x: Tensor) -> Tensor:
    """The same dense tensor where four floats can be read at once; a part of another may begin anywhere."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes a tensor's GPU the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def check(failure: bytes | None) -> None:
    """Raises RuntimeError with what a function returned, unless that is null."""
    if failure is not None:
        raise RuntimeError(f"A CUDA kernel of pynas failed: {failure.decode()}.")
