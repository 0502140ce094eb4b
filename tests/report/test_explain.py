"""``explain`` on real models through the real backend (reference target)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ascend_dynamo
from ascend_dynamo.errors import OptionError

REFERENCE = {"target": "reference"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return F.gelu(self.up(x)) * scale + x


def test_it_says_what_fired_and_where():
    model, x = Block(), torch.randn(2, 8)
    e = ascend_dynamo.explain(model, x, options=REFERENCE)
    assert e.fired["gelu_add"] == 1 and len(e.records) == 1 and e.graph_breaks == {}
    assert torch.allclose(e.output, model(x), atol=1e-6)
    (fired,) = [f for f in e.records[0].fired if f.pattern == "gelu_add"]
    assert fired.src is not None and Path(fired.src[0]).name == Path(__file__).name
    text = str(e)
    assert "Block: 1 graph compiled" in text and "ascend.gelu_add" in text and Path(__file__).name in text
    assert json.loads(e.to_json())["graphs"][0]["target"] == "reference"


def test_a_near_miss_has_a_reason():
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.add(F.gelu(x), y, alpha=2)

    e = ascend_dynamo.explain(f, torch.randn(2, 8), torch.randn(2, 8), options=REFERENCE)
    assert not e.fired["gelu_add"]
    near = [m for m in e.missed if m.pattern == "gelu_add"]
    assert near and near[0].code == "arg" and "found 2" in near[0].reason
    assert "f: 1 graph compiled" in str(e).replace(f.__qualname__, "f") and "found 2" in str(e)


def test_keyword_arguments_and_compiled_modules_are_taken():
    model, x = Block(), torch.randn(2, 8)
    e = ascend_dynamo.explain(torch.compile(model, backend="eager"), x, scale=1.0, options=REFERENCE)
    assert e.model == "Block" and torch.allclose(e.output, model(x), atol=1e-6)


def test_what_was_compiled_before_stays_compiled():
    compiles = []

    def counting(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]):  # type: ignore[no-untyped-def]
        compiles.append(gm)
        return gm.forward

    model, x = Block(), torch.randn(2, 8)
    compiled = torch.compile(model, backend=counting)
    with torch.no_grad():
        compiled(x)
        ascend_dynamo.explain(model, x, options=REFERENCE)
        ascend_dynamo.explain(model, x, options=REFERENCE)
        compiled(x)
    assert len(compiles) == 1


def test_it_compiles_anew_every_time_and_keeps_training_out():
    model, x = Block(), torch.randn(2, 8)
    first, second = (ascend_dynamo.explain(model, x, options=REFERENCE) for _ in range(2))
    assert len(first.records) == len(second.records) == 1
    assert not second.records[0].training and second.fired == first.fired


def test_graph_breaks_are_named():
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()

    e = ascend_dynamo.explain(f, torch.randn(3), options=REFERENCE)
    assert len(e.records) == 2 and sum(e.graph_breaks.values()) == 1
    (reason,) = e.graph_breaks
    assert "graph_break" in reason and "http" not in reason and "graph break (1x)" in str(e)


def test_a_wrong_option_is_refused_before_anything_runs():
    model = Block()
    with pytest.raises(OptionError, match="targett"):
        ascend_dynamo.explain(model, torch.randn(2, 8), options={"targett": "cpu"})
