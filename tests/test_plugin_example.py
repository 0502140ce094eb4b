"""The example plugin, built and installed as a stranger would, fires without being imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "examples" / "plugin_pattern"

PROGRAM = """
import json
import sys
import torch


class MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x):
        h = self.up(x).relu()
        return self.down(h * h)


options = json.loads(sys.argv[1])
torch.manual_seed(0)
model, x = MLP(), torch.randn(4, 8)
with torch.no_grad():
    same = torch.equal(torch.compile(model, backend="ascend_opt", options=options)(x), model(x))
print(json.dumps({"same": same, "imported": "ascend_dynamo_example_plugin" in sys.modules}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the plugin in it, installed from a wheel that was built from a copy of its source."""
    root = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(SOURCE, root / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(root), str(source)]
    subprocess.run(build, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    (wheel,) = root.glob("*.whl")
    target = root / "site"
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return target


def run(site: Path | None, *command: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("ASCEND_DYNAMO_")}
    environ["OMP_NUM_THREADS"] = "1"
    if site is not None:
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *command], env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )


def compiled(site: Path | None, **options: object) -> subprocess.CompletedProcess[str]:
    return run(site, "-c", PROGRAM, json.dumps({"target": "reference", **options}))


def test_it_fires_without_being_imported_and_bit_exact(installed: Path) -> None:
    done = compiled(installed, expect={"squared_relu": 1}, strict=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"same": True, "imported": True}


def test_it_can_be_switched_off_by_name(installed: Path) -> None:
    done = compiled(installed, expect={"squared_relu": 0}, patterns={"squared_relu": False})
    assert done.returncode == 0, done.stderr


def test_without_it_the_expectation_is_an_error() -> None:
    done = compiled(None, expect={"squared_relu": 1})
    assert done.returncode != 0
    assert 'option "expect": no pattern is named "squared_relu"' in done.stderr


def test_it_passes_lint_and_fuzz(installed: Path) -> None:
    arguments = ("patterns", "check", "--only", "squared_relu", "--budget", "5")
    done = run(installed, "-m", "ascend_dynamo.cli", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("1 pattern") and "no findings" in done.stdout
