"""A seeded sample of the operator sweep (``benchmarks/opinfo.py``), and the sweep's own judgement."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import opinfo

OPS = opinfo.database()
# Views, in-place writes underneath, composites that we keep whole, random, index and size-dependent operators.
CHOSEN = [
    "cat",
    "clone",
    "cumsum",
    "diagonal",
    "einsum",
    "expand",
    "index_copy",
    "index_put",
    "linalg.multi_dot",
    "matmul",
    "nn.functional.dropout",
    "nn.functional.gelu",
    "nn.functional.layer_norm",
    "nn.functional.linear",
    "nn.functional.rms_norm",
    "nn.functional.scaled_dot_product_attention",
    "nonzero",
    "repeat",
    "softmax",
    "split",
    "squeeze",
    "where",
]
DRAWN = sorted(random.Random(20).sample(sorted(set(OPS) - set(CHOSEN)), 12))


@pytest.mark.parametrize("name", [*CHOSEN, *DRAWN])
def test_ours_agrees_with_eager_wherever_aot_eager_does(name: str):
    op = OPS[name]
    for case in opinfo.cases({name: op}):
        if case.dtype == "float32":
            outcome = opinfo.run_case(op, case, samples=1)
            assert outcome.state in ("agree", "skip"), f"{case.key}: {outcome}"


def test_the_cases_cover_two_dtypes_and_both_shape_modes():
    keys = [c.key for c in opinfo.cases({"cat": OPS["cat"]})]
    assert keys == [f"cat {d} {m} reference" for d in ("float32", "int64") for m in ("static", "dynamic")]
    assert [c.key for c in opinfo.cases({"cat": OPS["cat"]}, target="cpu")] == ["cat float32 static cpu"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (torch.ones(2, 3), ""),
        (torch.ones(2, 3) * 1.01, "Tensor-likes are not close"),
        (torch.ones(2, 3, dtype=torch.float64), "dtype"),
        (torch.ones(3, 2), "shape"),
        (torch.ones(3, 2).t(), "stride"),
        (3.0, "became float"),
        (RuntimeError("no\nkernel"), "RuntimeError: no"),
    ],
)
def test_a_difference_is_seen(changed: object, said: str):
    expected = ([torch.ones(2, 3)], [torch.zeros(1)])
    got = changed if isinstance(changed, Exception) else ([changed], [torch.zeros(1)])
    found = opinfo.difference(expected, got)
    assert said in found and bool(said) == bool(found)


def test_a_changed_input_and_a_missing_value_are_seen():
    ones = torch.ones(2)
    assert "input: " in opinfo.difference(([ones], [ones]), ([ones], [ones + 1]))
    assert "2 values, got 1" in opinfo.difference(([ones, ones], []), ([ones], []))
    assert "1 became 2" in opinfo.difference(([1], []), ([2], []))


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path):
    state = tmp_path / "state.jsonl"
    todo = [c for c in opinfo.cases({"relu": OPS["nn.functional.relu"]}) if c.dtype == "float32"]
    state.write_text(json.dumps({"key": todo[0].key, "state": "crash"}) + "\n")
    outcomes = opinfo.sweep(todo, {"relu": OPS["nn.functional.relu"]}, state, samples=1)
    assert outcomes[todo[0].key] == opinfo.Outcome("crash", "the process died here")
    assert outcomes[todo[1].key].state == "agree"
    again = opinfo.sweep(todo, {}, state, samples=1)
    assert again == outcomes
