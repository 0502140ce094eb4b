"""The pass manager orders by declaration and refuses contradictions."""

from dataclasses import dataclass

import pytest
import torch

from ascend_dynamo.capture import trace
from ascend_dynamo.contracts import PassResult
from ascend_dynamo.options import Options
from ascend_dynamo.passes.manager import ordered, run_passes
from ascend_dynamo.report.records import CompileRecord


@dataclass
class Step:
    name: str
    before: frozenset = frozenset()
    after: frozenset = frozenset()

    def run(self, g, options):  # type: ignore[no-untyped-def]
        return PassResult(True, (f"{self.name} ran",))


def names(*steps: Step) -> list[str]:
    return [p.name for p in ordered(steps)]


def test_declared_order_wins_and_ties_keep_the_given_one() -> None:
    assert names(Step("c"), Step("b", before=frozenset({"c"})), Step("a", before=frozenset({"b"}))) == ["a", "b", "c"]
    assert names(Step("b"), Step("a")) == ["b", "a"]
    assert names(Step("x", after=frozenset({"y", "absent"})), Step("y")) == ["y", "x"]


def test_contradictions_are_named() -> None:
    with pytest.raises(ValueError, match="contradict"):
        names(Step("a", before=frozenset({"b"})), Step("b", before=frozenset({"a"})))
    with pytest.raises(ValueError, match="same name"):
        names(Step("a"), Step("a"))


def test_notes_and_times_are_recorded() -> None:
    record = CompileRecord()
    run_passes([Step("b", after=frozenset({"a"})), Step("a")], trace(torch.sin, (torch.ones(2),)), Options(), record)
    assert record.notes == ["a ran", "b ran"] and set(record.seconds) == {"a", "b"}
