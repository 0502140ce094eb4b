"""The examples in docs/writing_a_pattern.md are complete: they run, fire and survive the fuzzer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ascend_dynamo.backend import Backend
from ascend_dynamo.match import Registry
from ascend_dynamo.match.fuzz import fuzz
from ascend_dynamo.match.lint import lint

PAGE = (Path(__file__).parents[2] / "docs" / "writing_a_pattern.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
MODELS = {"add_relu": lambda x, y: x + torch.relu(y), "neg_of_neg": lambda x, y: (x * y).neg().neg()}


@pytest.mark.parametrize("name", MODELS)
def test_examples_work_as_shown(name):
    source = next(b for b in BLOCKS if f'"{name}"' in b)
    namespace: dict[str, object] = {"__name__": f"docs_{name}"}
    exec(compile(source, str(name), "exec"), namespace)
    (pattern,) = namespace["PATTERNS"]
    assert pattern.name == name and lint(Registry((pattern,))) == [] and fuzz(pattern, budget=8) == []
    backend = Backend({"target": "reference", "strict": True, "patterns": [pattern]})
    args = torch.randn(3, 4), torch.randn(3, 4)
    with torch.no_grad():
        result = torch.compile(MODELS[name], backend=backend)(*args)
    torch.testing.assert_close(result, MODELS[name](*args))
    assert backend.records[0].count(name) == 1
