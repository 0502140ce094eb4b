"""The dump directory: one folder per graph, never overwritten."""

from __future__ import annotations

import json
from pathlib import Path

from ascend_dynamo.report import CompileRecord
from ascend_dynamo.report.dump import dump_record


def test_each_graph_gets_a_folder(tmp_path: Path):
    record = CompileRecord(index=0, before="%1: f32 = aten.a()", after="%1: f32 = aten.b()", nodes_before=1)
    first, second = (dump_record(record, tmp_path / "new") for _ in range(2))
    assert [first.name, second.name] == ["graph_0000", "graph_0001"]
    assert sorted(p.name for p in first.iterdir()) == [
        "after.txt",
        "before.txt",
        "diff.txt",
        "record.json",
        "report.html",
    ]
    assert (first / "diff.txt").read_text() == "-%1: f32 = aten.a()\n+%1: f32 = aten.b()\n"
    assert json.loads((first / "record.json").read_text())["nodes_before"] == 1


def test_a_taken_number_is_skipped(tmp_path: Path):
    (tmp_path / "graph_0001").mkdir()
    record = CompileRecord()
    assert [dump_record(record, tmp_path).name for _ in range(2)] == ["graph_0002", "graph_0003"]
