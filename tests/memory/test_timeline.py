"""The memory timeline: rectangles that never overlap, the peak where it is, in SVG, PNG, text, HTML and JSON."""

from __future__ import annotations

import json
import pickle
import struct
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_support import sweep, traced
from torch import nn

import ascend_dynamo
from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.errors import MissingExtraError
from ascend_dynamo.memory import Lifetime, Liveness, liveness
from ascend_dynamo.memory.record import MemoryRecord, distinct_bytes, record_memory
from ascend_dynamo.memory.timeline import caption, live_bytes, rectangles, svg, ticks
from ascend_dynamo.memory.timeline_png import write_png
from ascend_dynamo.report.records import CompileRecord
from ascend_dynamo.report.tables import memory as memory_table

NOTHING = torch.fx.GraphModule(nn.Module(), torch.fx.Graph())
NOTHING.graph.output(())


def recorded(lives: list[Lifetime]) -> MemoryRecord:
    steps = max((x.end for x in lives), default=0)
    return record_memory(GraphUnit(NOTHING, NOTHING), Liveness(tuple(lives), steps))


def drawn(data: list[tuple[int, int, int, bool]]) -> list[Lifetime]:
    return [Lifetime(f"b{i}", s, s + n, size, op=f"op{i % 3}", output=out) for i, (s, n, size, out) in enumerate(data)]


blocks = st.lists(st.tuples(st.integers(0, 15), st.integers(1, 9), st.integers(0, 5000), st.booleans()), max_size=20)


@given(blocks)
@settings(deadline=None)
def test_rectangles_never_overlap_and_the_curve_is_what_is_live(data):
    lives = drawn(data)
    record = recorded(lives)
    placed = rectangles(record)
    assert sum(r.high - r.low for r in placed) == sum(x.bytes for x in lives)
    for i, a in enumerate(placed):
        assert a.high <= record.arena if a.kind == "arena" else a.low >= record.arena
        for b in placed[i + 1 :]:
            assert a.right <= b.left or b.right <= a.left or a.high <= b.low or b.high <= a.low
    assert record.peak == sweep([(x.start, x.end, x.bytes) for x in lives])
    assert max([size for _, size in live_bytes(record)], default=0) == record.peak
    assert sum(b.bytes for b in record.live()) == record.peak
    assert record.lower_bound == sweep([(x.start, x.end, x.bytes) for x in lives if not x.output]) <= record.arena
    assert record.total == record.arena + sum(x.bytes for x in lives if x.output)


@given(blocks)
@settings(deadline=None, max_examples=30)
def test_the_svg_is_well_formed_and_stays_in_its_frame(data):
    record = recorded(drawn(data))
    root = ElementTree.fromstring(svg(record))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    found = root.findall("rect")
    assert len(found) == len(rectangles(record))
    for r in found:
        x, y, w, h = (float(r.attrib[k]) for k in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
        assert r.find("title") is not None


def test_the_peak_is_marked_where_it_is():
    record = recorded(
        [Lifetime("a", 0, 2, 100, op="<x>"), Lifetime("b", 4, 8, 300), Lifetime("c", 5, 6, 50, output=True)]
    )
    assert (record.step, record.peak, record.arena, record.outputs) == (5, 350, 300, 50)
    root = ElementTree.fromstring(svg(record))
    (line,) = [e for e in root.findall("line") if e.attrib.get("class") == "peak"]
    (b,) = [e for e in root.findall("rect") if (e.findtext("title") or "").startswith(" %b")]
    left = float(b.attrib["x"])
    per_step = float(b.attrib["width"]) / 4
    assert abs(float(line.attrib["x1"]) - (left + 1.5 * per_step)) < 0.2
    assert "peak with outputs 350 B at step 5 of 8" in caption(record)
    assert root.findtext("title") == caption(record)


@pytest.mark.parametrize("high", [0, 1, 7, 1000, 123_456_789])
def test_ticks_are_few_and_round(high):
    found = ticks(high)
    assert found[0] == 0 and len(found) <= 11 and found[-1] <= high
    assert len(found) >= 5 or high < 5


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("lives", [[], [Lifetime("a", 0, 2, 100), Lifetime("b", 1, 3, 10, output=True)]])
def test_the_png_is_one(lives, tmp_path):
    path = write_png(recorded(lives), tmp_path / "deep" / "m.png", title="Net", dpi=50)
    width, height = png_size(path)
    assert width == 600 and height > 250


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ascend-dynamo\[report\]'"):
        write_png(recorded([]), tmp_path / "m.png")
    assert not list(tmp_path.iterdir())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(torch.tanh(self.up(x)).exp()).sum(-1)


def test_explain_shows_memory_everywhere(tmp_path):
    e = ascend_dynamo.explain(Net().eval(), torch.randn(8, 16), options={"target": "reference"})
    record = e.records[0].memory
    assert record is not None and record.weights == 4 * (16 * 64 * 2 + 64 + 16) and record.inputs == 8 * 16 * 4
    top = record.live()[0]
    assert top.bytes == 8 * 64 * 4 and top.src is not None and top.src[0] == __file__
    text = e.text(diff=False)
    assert "Live at the peak of memory" in text and "Arena 4.00 KB" in text and "test_timeline.py:" in text
    assert all(len(line) <= 120 for line in text.split("Live at the peak")[1].splitlines()[2:4])  # the note is wrapped
    page = e.html(tmp_path / "page.html").read_text()
    assert "Memory timeline" in page and '<svg class="memory"' in page and "http" not in page.split("<svg")[1]
    assert png_size(e.memory_png(tmp_path / "m.png"))[0] > 1000
    data = json.loads(e.to_json())["graphs"][0]["memory"]
    assert data["peak"] == record.peak and len(data["blocks"]) == len(record.blocks)
    assert pickle.loads(pickle.dumps(e.records))[0].memory == record
    with pytest.raises(LookupError, match=r"graph 7; there are predictions for \[0\]"):
        e.memory_png(tmp_path / "n.png", graph=7)


def test_a_record_evaluates_for_other_sizes_from_its_own_text():
    gm = traced(lambda x: (x @ x.T).softmax(-1)[:, ::2].sum(), torch.randn(6, 16), symbolic=True)
    found = liveness(gm)
    record = record_memory(GraphUnit(gm, NOTHING), found)
    again = pickle.loads(pickle.dumps(record)).lifetimes()
    for n in (6, 7, 50):
        sizes = {s.name: n for s in found.symbols if s.hint == 6}
        assert again.peak(sizes).bytes == found.peak(sizes).bytes
        assert again.buffers(sizes) == found.buffers(sizes)


def test_sizes_that_only_data_tells_are_named():
    lives = [Lifetime("a", 0, 2, 100), Lifetime("b", 1, 2, liveness_symbol() * 8)]
    record = recorded(lives)
    assert record.unknown == ["u0"] and record.arena == 100 and "without what depends on data (u0)" in caption(record)


def liveness_symbol() -> Any:
    import sympy

    return sympy.Symbol("u0", integer=True)


def test_the_table_joins_equal_rows_and_says_what_was_recorded():
    src = ("model.py", 7)
    record = recorded([Lifetime(f"n{i}", 0, 1, 1024, "aten.mm.default", src) for i in range(4)])
    record.recorded = 4096
    table = memory_table(CompileRecord(memory=record))
    assert table.rows == (("1.00 KB", "4", "aten.mm.default", "%n0", "model.py:7"),)
    assert "A recorded call had 4.00 KB of intermediates: the plan is 1.00 of it." in table.note
    assert memory_table(CompileRecord()).rows == ()


def test_storages_are_counted_once():
    x = torch.zeros(100)
    assert distinct_bytes([x, x[:10], x.view(10, 10)]) == 400
    assert distinct_bytes([x, torch.zeros(5)]) == 420


def test_the_command_line_draws_it(tmp_path, capsys, monkeypatch):
    from ascend_dynamo.cli import main

    script = tmp_path / "small_model.py"
    script.write_text("import torch\ndef build():\n    return torch.nn.Linear(8, 8).eval(), (torch.randn(2, 8),)\n")
    path = tmp_path / "m.png"
    code = main(["explain", f"{script}:build", "-o", "target=reference", "--memory-png", str(path)])
    assert code == 0 and png_size(path)[0] > 1000
    assert f"wrote {path}" in capsys.readouterr().err
