"""The text form is stable: it does not depend on node names, symbol names or the place where a test runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.capture import trace
from ascend_dynamo.ir.text import dtype_name, graph_text, op_name
from ascend_dynamo.normalize import normalize


def model(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = F.linear(x, w)
    first, _ = h.max(-1)
    return first, torch.rms_norm(h, (3,), None, 1e-5)


def test_the_form() -> None:
    _, (x, w) = compat.symbolic_fakes([torch.ones(4, 8), torch.ones(3, 8)])
    unit = trace(model, [x, w])
    normalize(unit)
    for node in unit.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        node.meta["stack_trace"] = 'File "/secret/dir/model.py", line 88, in forward\n    return x\n'
    unit.params = (unit.gm.graph.find_nodes(op="placeholder")[1].name,)
    text = graph_text(unit)
    lines = text.splitlines()
    assert lines[0] == "%x0: f32[s0, s1] = input"
    assert lines[1] == "%w0: f32[3, s1] = param"
    assert lines[2] == "%0: f32[s0, 3] = aten.linear(%x0, %w0)  # model.py:88"
    assert lines[3] == "%1: (f32[s0], i64[s0]) = aten.max.dim(%0, -1)"
    assert lines[4] == "%2: f32[s0] = getitem(%1, 0)"
    assert lines[-1] == "return (%2, %3)"
    assert "secret" not in text
    assert "#" not in graph_text(unit, sources=False)
    assert graph_text(unit.gm, params=unit.params) == text


def test_names_do_not_matter() -> None:
    unit = trace(model, [torch.ones(4, 8), torch.ones(3, 8)])
    text = graph_text(unit)
    for i, node in enumerate(unit.gm.graph.nodes):
        node._rename(f"renamed_{i}")
    assert graph_text(unit) == text


def test_constants_show_their_content() -> None:
    def text(scalar: float, table: list[float]) -> str:
        s, t = torch.tensor(scalar), torch.tensor(table)
        unit = trace(lambda x: x * s + t, [torch.ones(2)])
        normalize(unit)
        return graph_text(unit)

    assert "const 0.5" in text(0.5, [1.0, 2.0])
    assert text(0.5, [1.0, 2.0]) == text(0.5, [1.0, 2.0])
    assert text(0.5, [1.0, 2.0]) != text(0.5, [1.0, 3.0])


def test_arguments_of_all_kinds() -> None:
    unit = trace(
        lambda x: (torch.full((2,), 1e-6, dtype=torch.bfloat16), x.clone(memory_format=torch.contiguous_format)),
        [torch.ones(2)],
    )
    text = graph_text(unit)
    assert "aten.full([2], 1e-06, device=cpu, dtype=bf16, pin_memory=False)" in text
    assert "memory_format=contiguous_format" in text


def test_names_of_dtypes_and_operators() -> None:
    assert dtype_name(torch.bool) == "b8"
    assert dtype_name(torch.float8_e4m3fn) == "float8_e4m3fn"
    assert op_name(torch.ops.aten.linear.default) == "aten.linear"
    assert op_name(torch.ops.aten.add.Tensor) == "aten.add.Tensor"
    assert op_name(torch.sym_max) == "sym_max"
