"""Structs that Python fills are those that the CUDA sources read."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import cuda_on_cpu
import pytest

from pynas.kernels import cuda_infer, cuda_mbconv, cuda_sampling

pytestmark = pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="no C++ compiler to lay structs out with")

STRUCTS: list[tuple[str, str, type[ctypes.Structure], dict[str, str]]] = [
    ("mbconv.h", "Option", cuda_mbconv._Option, {"tensors": "expand", "gradients": "expand_out"}),
    ("mbconv.h", "Layer", cuda_mbconv._Layer, {}),
    ("mbconv_update.cu", "Update", cuda_mbconv._Update, {"norms": "norm"}),
    ("mbconv_infer.cu", "Folded", cuda_infer._Folded, {}),
    ("sampling.cu", "Gates", cuda_sampling._Gates, {}),
    ("sampling.cu", "GateResults", cuda_sampling._Results, {}),
    ("sampling.cu", "GateGradients", cuda_sampling._Gradients, {}),
    ("sampling.cu", "Paths", cuda_sampling._Paths, {}),
    ("sampling.cu", "Rounds", cuda_sampling._Rounds, {}),
]


def test_structs_are_those_of_the_sources(tmp_path: Path) -> None:
    """Sizes and places of all fields, as a compiler has them."""
    sources = {name: (cuda_on_cpu.SOURCES / "cuda" / name).read_text(encoding="utf-8") for name, *_ in STRUCTS}
    whole = "\n".join(sources.values())
    constants = dict(re.findall(r"\b(kMost\w+|kNorms) = (\d+)", whole))
    code = ["#include <cstddef>", "#include <cstdint>", "#include <cstdio>"]
    code += [f"constexpr int {name} = {value};" for name, value in constants.items()]
    prints, expected = [], []
    for struct in dict.fromkeys(["UpdatedNorm", *(struct for _, struct, *_ in STRUCTS)]):
        found = re.search(rf"^struct {struct} \{{.*?^\}};", whole, re.M | re.S)
        assert found is not None
        code.append(found[0])
    for _, struct, python, names in STRUCTS:
        prints.append(f'printf("{struct} %zu\\n", sizeof({struct}));')
        expected.append(f"{struct} {ctypes.sizeof(python)}")
        for field, *_ in python._fields_:
            name = names.get(field, field)
            prints.append(f'printf("{struct}.{name} %zu\\n", offsetof({struct}, {name}));')
            expected.append(f"{struct}.{name} {getattr(python, field).offset}")
    (tmp_path / "layout.cpp").write_text("\n".join([*code, "int main() {", *prints, "}"]), encoding="utf-8")
    subprocess.run(
        [cuda_on_cpu.COMPILER, "-std=c++17", "-o", str(tmp_path / "layout"), str(tmp_path / "layout.cpp")], check=True
    )
    told = subprocess.run([str(tmp_path / "layout")], check=True, capture_output=True, text=True).stdout
    assert told.splitlines() == expected
