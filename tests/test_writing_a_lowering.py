"""The page for device authors is true: its lowering, installed by entry point, runs a model."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ascend_dynamo.backend import Backend
from ascend_dynamo.errors import OptionError
from ascend_dynamo.report.records import Lowered

PAGE = (Path(__file__).parent.parent / "docs" / "writing_a_lowering.md").read_text()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as pip would leave it: the module of the page, and metadata with its entry point."""
    blocks = dict(re.findall(r"```(python|toml)\n(.*?)```", PAGE, re.DOTALL)[::-1])  # the first of each kind
    site = tmp_path_factory.mktemp("site")
    (site / "acme_lowering.py").write_text(blocks["python"])
    info = site / "acme_lowering-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-lowering\nVersion: 1\n")
    point = blocks["toml"].split("\n", 1)[1]
    (info / "entry_points.txt").write_text("[ascend_dynamo.lowerings]\n" + textwrap.dedent(point).replace('"', ""))
    return site


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, width), nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.gate(x)) * self.up(x)


def run(width: int, dtype: torch.dtype) -> list[Lowered]:
    model, x = Gated(width).to(dtype), torch.randn(3, 8, dtype=dtype)
    backend = Backend({"target": "acme", "expect": {"swiglu": 1}})
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    (record,) = backend.records
    assert record.target == "acme" and not record.quarantined
    return record.lowered


def test_the_lowering_of_the_page_runs_a_model(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(installed))
    (kernel,) = run(32, torch.float32)
    assert (kernel.op, kernel.path) == ("ascend.swiglu.default", "kernel")
    (odd,) = run(24, torch.float32)
    assert odd.path == "reference" and "a width that is a multiple of 16, found 24" in odd.reason
    (double,) = run(32, torch.float64)
    assert double.path == "reference" and "float32 or bfloat16, found torch.float64" in double.reason
    assert "test_writing_a_lowering.py" in double.reason


def test_a_target_that_nobody_installed_is_refused() -> None:
    with pytest.raises(OptionError, match="'acme' is not legal"):
        Backend({"target": "acme"})
