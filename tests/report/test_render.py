"""Text, HTML and JSON of a hand-made explanation."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ascend_dynamo.report import CompileRecord, Explanation, Fired, Lowered, Missed, Quarantined
from ascend_dynamo.report.explain import _brief
from ascend_dynamo.report.tables import missed, where

BEFORE = """\
%1: f32[2, 8] = aten.linear(%x, %w)  # model.py:8
%2: f32[2, 8] = aten.gelu(%1)  # model.py:9
%3: f32[2, 8] = aten.add.Tensor(%2, %x)  # model.py:9
return (%3,)"""
AFTER = """\
%1: f32[2, 8] = aten.linear(%x, %w)  # model.py:8
%2: f32[2, 8] = ascend.gelu_add(%1, %x)  # model.py:9
return (%2,)"""
LINE = (os.path.join(os.getcwd(), "model.py"), 9)


def record() -> CompileRecord:
    return CompileRecord(
        target="cpu",
        before=BEFORE,
        after=AFTER,
        nodes_before=4,
        nodes_after=3,
        fired=[Fired("gelu_add", "add", LINE, 2, ("same dtype",))] * 2,
        missed=[
            Missed("rms_norm", "mul", "dtype", "dtype: expected float32 <here>, found int64", 0.4, LINE),
            *[Missed("swiglu", "mul", "arg", "arg: expected alpha 1, found 2", 0.8, LINE, "drop alpha")] * 3,
        ],
        quarantined=[Quarantined("broken", "ValueError: no", "mul")],
        lowered=[Lowered("ascend.gelu_add", "n", "reference", "dearer than Inductor's fusion")],
        seconds={"normalize": 0.003, "patterns": 0.001},
        notes=["tied weights were left alone"],
    )


def explanation(*records: CompileRecord) -> Explanation:
    breaks = {"print <is> not traceable": 2}
    return Explanation("Net<T>", list(records), {"level": 2, "plugins": (object,)}, breaks, 1.25)


def test_text_report_says_everything():
    text = str(explanation(record()))
    for line in [
        "Net<T>: 1 graph compiled, first call 1.25 s, target cpu",
        "fired: gelu_add x2",
        "graph break (2x): print <is> not traceable",
        "graph 0: 4 -> 3 nodes",
        "note: tied weights were left alone",
    ]:
        assert line in text.splitlines()
    assert re.search(r"gelu_add +2 +4 +model.py:9 +same dtype", text)
    assert re.search(r"swiglu +80% +3 +model.py:9 +arg: expected alpha 1, found 2 +drop alpha", text)
    assert text.index("swiglu") < text.index("rms_norm")
    assert re.search(r"broken +mul +ValueError: no", text)
    assert re.search(r"ascend.gelu_add +reference +1 +dearer than", text)
    assert re.search(r"normalize +3.0 +75%", text)
    assert "-%3: f32[2, 8] = aten.add.Tensor(%2, %x)  # model.py:9" in text
    assert "%1: f32[2, 8] = aten.gelu" not in text and "\x1b" not in text
    assert "\x1b[32m" in explanation(record()).text(colour=True)
    assert "aten" not in explanation(record()).text(diff=False)


def test_nothing_to_say():
    text = str(explanation(CompileRecord(index=3, before=BEFORE, after=BEFORE, training=True)))
    assert "fired: nothing" in text and "The graph did not change." in text
    assert "graph 3: 0 -> 0 nodes, training graph: compiled without fusions" in text
    assert "Near misses" not in text
    assert str(Explanation("f", [])).startswith("f: 0 graphs compiled")


def test_counters_and_ranking_over_graphs():
    e = explanation(record(), record())
    assert e.fired == {"gelu_add": 4}
    assert [m.pattern for m in e.missed] == ["swiglu"] * 6 + ["rms_norm"] * 2


def test_the_same_miss_in_every_layer_is_one_row():
    reasons = [f"op: expected a sum, found %view_{n} at %norm_{n} (model.py:9); add first" for n in range(1, 29)]
    r = CompileRecord(missed=[Missed("add_norm", "norm", "op", x, 0.5, LINE, "add first") for x in reasons])
    (row,) = missed(r).rows
    expected = ("add_norm", "50%", "28", "model.py:9", "op: expected a sum, found %view_1", "add first")
    assert row == expected


def test_a_limit_is_said():
    table = missed(record(), 1)
    assert len(table.rows) == 1 and "1 of 2" in table.note


def test_long_reasons_wrap_in_their_column():
    r = CompileRecord(missed=[Missed("p", "n", "op", "word " * 40, 0.5, None)])
    text = explanation(r).text(diff=False)
    assert max(map(len, text.splitlines())) < 120 and "?" in text


def test_where_is_short():
    assert where(LINE) == "model.py:9"
    assert where(("/x/site-packages/transformers/a.py", 3)) == os.path.join("transformers", "a.py") + ":3"
    assert where(("/elsewhere/a.py", 3)) == "/elsewhere/a.py:3"


def test_json_round_trip():
    data = json.loads(explanation(record()).to_json())
    assert data["fired"] == {"gelu_add": 2} and data["graphs"][0]["missed"][1]["fix"] == "drop alpha"
    assert data["options"]["level"] == 2 and "object" in data["options"]["plugins"]


class Checker(HTMLParser):
    """Every tag is closed in order, and nothing is fetched."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.external: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.external += [v or "" for k, v in attrs if k in ("src", "href", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("count", [0, 1, 2])
def test_html_is_standalone_and_well_formed(tmp_path: Path, count: int):
    path = explanation(*[record() for _ in range(count)]).html(tmp_path / "new" / "report.html")
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert checker.open == [] and checker.external == []
    assert "http" not in text and "@import" not in text and "$" not in text
    assert "Net&lt;T&gt;" in text and "Net<T>" not in text
    assert checker.seen.count("section") == count
    if count:
        assert "&lt;here&gt;" in text and "Diff: 2 lines removed, 1 added" in text
        assert ("<details open>" in text) == (count == 1)


def test_html_of_an_unchanged_graph():
    from ascend_dynamo.report.html import page

    assert "The graph did not change." in page(explanation(CompileRecord(before=BEFORE, after=BEFORE)))


def test_graph_break_reasons_are_shortened():
    reason = "Failed to trace\n  Explanation: no print\n  Hint: remove it\n  Hint: no\n\n  Developer debug context: x"
    assert _brief(reason) == "Failed to trace Explanation: no print Hint: remove it"
