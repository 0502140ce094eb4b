"""The graph diff ignores renumbering and shows nothing but real changes."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_dynamo.report.align import align, line_key
from ascend_dynamo.report.diff import hunks, side_by_side, unified

LAYER = """\
%{a}: f32[2, 8] = aten.linear(%{x}, %p_{n}_up)  # model.py:8
%{b}: f32[2, 8] = aten.gelu(%{a})  # model.py:9
%{c}: f32[2, 8] = aten.add.Tensor(%{b}, %{x})  # model.py:9
"""
FUSED = """\
%{a}: f32[2, 8] = aten.linear(%{x}, %p_{n}_up)  # model.py:8
%{b}: f32[2, 8] = ascend.gelu_add(%{a}, %{x})  # model.py:9
"""


def graph(layers: int, template: str, step: int) -> str:
    out, x = [], 0
    for n in range(layers):
        a = 1 + n * step
        out.append(template.format(a=a, b=a + 1, c=a + 2, x=x, n=n))
        x = a + step - 1
    return "".join(out)


def test_a_renumbered_graph_is_the_same():
    text = graph(3, LAYER, 3)
    renumbered = re.sub(r"%(\d+)", lambda m: f"%{int(m[1]) + 40}", text)
    assert text != renumbered
    assert unified(text, renumbered) == "" == side_by_side(text, renumbered)


def test_only_the_fused_lines_show_in_every_layer():
    diff = unified(graph(28, LAYER, 3), graph(28, FUSED, 2), context=0)
    assert diff.count("\n-") == 2 * 28 and diff.count("\n+") == 28
    assert "-%2: f32[2, 8] = aten.gelu(%1)  # model.py:9" in diff
    assert not [line for line in diff.splitlines() if "aten.linear" in line]
    assert diff.startswith("@@ 1 line unchanged @@")


def test_a_changed_dtype_shape_or_weight_is_a_change():
    base = "%1: f32[2, 8] = aten.linear(%x, %w)"
    for other in (base.replace("f32", "bf16"), base.replace("[2", "[3"), base.replace("%w", "%v")):
        assert unified(base, other) == f"-{base}\n+{other}"


def test_side_by_side_puts_replacements_beside_each_other():
    left, right = graph(1, LAYER, 3), graph(1, FUSED, 2)
    lines = side_by_side(left, right, width=140).splitlines()
    assert " | " in lines[1] and "gelu(%1)" in lines[1] and "gelu_add" in lines[1]
    assert lines[2].endswith("<")
    assert all(len(line) <= 140 for line in lines)


def test_long_lines_are_cut_not_wrapped():
    assert "…" in side_by_side("%1: f32 = aten.a(" + "9" * 90 + ")", "%1: f32 = aten.b()", width=80)


def test_colour_is_only_added_when_asked_for():
    left, right = graph(1, LAYER, 3), graph(1, FUSED, 2)
    assert "\x1b" not in unified(left, right) + side_by_side(left, right)
    painted = unified(left, right, colour=True)
    assert re.sub(r"\x1b\[\d*m", "", painted) == unified(left, right)
    assert "\x1b[31m-" in painted and "\x1b[32m+" in painted
    assert "\x1b[31m" in side_by_side(left, right, colour=True)


def test_a_negative_context_keeps_everything():
    left, right = graph(4, LAYER, 3), graph(4, FUSED, 2)
    full = unified(left, right, context=-1)
    assert [line[1:] for line in full.splitlines() if line[0] != "-"] == right.splitlines()


def test_large_graphs_are_aligned_quickly():
    rows = align(graph(2000, LAYER, 3), graph(2000, FUSED, 2))
    assert sum(row.kind == "same" for row in rows) == 2000


LINES = st.lists(st.sampled_from([f"%1: f32 = aten.op{n}(%0)" for n in range(4)] + ["%w: f32"]), max_size=12)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(LINES, LINES, st.integers(0, 3))
def test_the_alignment_gives_both_texts_back(a: list[str], b: list[str], context: int):
    rows = align("\n".join(a), "\n".join(b))
    assert [r.left for r in rows if r.left is not None] == a
    assert [r.right for r in rows if r.right is not None] == b
    for row in rows:
        assert (row.kind == "same") == (row.left is not None and row.right is not None)
        if row.kind == "same":
            assert line_key(row.left) == line_key(row.right)
    if any(row.kind != "same" for row in rows):
        parts = list(hunks(rows, context))
        assert sum(len(shown) + hidden for shown, hidden in parts) == len(rows)
