"""timm finds networks of this package by its own name for a folder, whichever of the two is imported first."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import pynas

pytestmark = [
    pytest.mark.timm,
    pytest.mark.skipif(find_spec("timm") is None, reason="needs pip install timm"),
]

BOTH = ["import timm, pynas", "import pynas, timm", "import timm.models, pynas", "import pynas, timm.models"]

USE = """
import sys, torch
{imports}
import timm
folder = sys.argv[1]
x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ours = pynas.from_pretrained(folder)
theirs = timm.create_model(f"local-dir:{{folder}}", pretrained=True).eval()
assert torch.equal(ours(x), theirs(x))
assert theirs.pretrained_cfg["label_names"] == ours.pretrained_cfg["label_names"]
assert timm.data.resolve_model_data_config(theirs)["input_size"] == (3, 8, 8)
fresh = timm.create_model(f"local-dir:{{folder}}")
assert fresh(x).shape == (2, 10)
tuned = timm.create_model(f"local-dir:{{folder}}", pretrained=True, num_classes=4)
assert tuned(x).shape == (2, 4) and tuned.num_classes == 4
names = [name for name, _ in ours.named_parameters() if not name.startswith(("head.classifier", "classifier"))]
state = tuned.state_dict()
assert sum(torch.equal(ours.state_dict()[name], state[name]) for name in names) >= len(names) - 2
for wrong in (dict(pretrained=False, drop_rate=0.5), dict(features_only=True)):
    try:
        timm.create_model(f"local-dir:{{folder}}", **wrong)
    except ValueError as error:
        assert "take no" in str(error), error
    else:
        raise SystemExit(f"{{wrong}} was taken")
"""


@pytest.fixture(scope="module")
def saved(unbroken: pynas.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unbroken.save_pretrained(tmp_path_factory.mktemp("timm") / "net")


@pytest.mark.parametrize("imports", BOTH)
def test_timm_creates_the_net(imports: str, saved: Path) -> None:
    code = USE.format(imports=imports)
    result = subprocess.run([sys.executable, "-P", "-c", code, str(saved)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_importing_pynas_leaves_timm_alone() -> None:
    code = (
        "import sys, pynas; assert 'timm' not in sys.modules; import timm; assert timm.__spec__.loader.name == 'timm'"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
