"""The demo finds what it imports, in a process of its own."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_demo_imports() -> None:
    done = subprocess.run([sys.executable, "-c", "import demo"], cwd=EXAMPLES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
