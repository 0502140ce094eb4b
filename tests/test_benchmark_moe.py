"""The mixture-of-experts benchmark: what it calls work, routings and recompiles. Nothing here judges a time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import _harness as h
import _models
import moe


@pytest.mark.parametrize("name", ["tiny-q3moe", "tiny-ds3"])
@pytest.mark.parametrize(("kind", "seq"), [("prefill", 6), ("decode", 1)])
def test_eager_runs_and_is_routed_in_several_ways(name, kind, seq):
    case = {"model": name, "kind": kind, "seq": seq, "dtype": "bf16"}
    prepared = moe.prepare(case, "eager")
    assert prepared.notes["graphs"] == prepared.notes["recompiles"] == 0 and prepared.notes["routings"] > 1
    prepared.reset()
    with torch.no_grad():
        assert prepared.run().shape == (1, 1, 512)


def test_graphs_are_counted_per_block():
    with moe.graphs() as made:
        assert made() == 0
        compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
        compiled(torch.ones(2))
        compiled(torch.ones(2))
        assert made() == 1
        compiled(torch.ones(3))
        assert made() == 2


def test_work_counts_the_chosen_experts_only():
    model = _models.build("tiny-q3moe", check=False)
    case = {"model": "tiny-q3moe", "kind": "decode", "seq": 1, "dtype": "bf16"}
    one, many = moe.work(model, case), moe.work(model, {**case, "seq": 64})
    expert = 3 * 256 * 128 * 2  # bytes of one expert
    assert many["bytes"] - one["bytes"] == 2 * (8 - 2) * expert
    assert many["flops"] > 32 * one["flops"]


def test_summary_counts_a_failed_row_as_a_recompile():
    row = h.Row({"dtype": "bf16"}, {c: h.Timing(error="no") for c in moe.CONTENDERS}, agreed=False)
    values, goals = moe.summary([row])
    assert values["recompiles"] == 1 and values["agreed"] == "0/1" and goals["worst_row"] == 1.5
