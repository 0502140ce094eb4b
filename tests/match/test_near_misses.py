"""Near misses name the pattern, the node, what was expected and found, the user's line, and what would help."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from match_support import RELU_ADD, SAME, captured, fused, ops, pair_of

from ascend_dynamo.contracts import Domain
from ascend_dynamo.match import Registry, declare, run_patterns
from ascend_dynamo.options import Options
from ascend_dynamo.report.records import CompileRecord


def missed(fn, args, *patterns, **options):
    record = CompileRecord()
    run_patterns(captured(fn, *args), Registry(patterns), Options(**options), record)
    return record.missed


def norm(x, w):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


NORM = declare(
    "norm", eager=norm, replace=lambda x, w: ops.single(x) * w, domain=Domain(shapes={"x": ("*B", "H"), "w": ("H",)})
)


def test_the_deepest_difference_is_the_one_reported():
    def sqrt_inside(x, w):
        h = x.float()
        return (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w

    def other_eps(x, w):
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w

    args = (torch.randn(3, 5).bfloat16(), torch.randn(5).bfloat16())
    (miss,) = missed(other_eps, args, NORM)
    assert miss.code == "arg" and "1e-06" in miss.reason and "1e-05" in miss.reason and miss.progress > 0.5
    near = missed(sqrt_inside, args, NORM)  # the index rules this site out; the report still has it, if near enough
    assert all(m.code == "op" for m in near)


def test_a_site_that_the_index_ruled_out_is_reported_if_much_of_the_pattern_is_there():
    chain = declare(
        "chain",
        eager=lambda x: torch.tanh(torch.exp(torch.sigmoid(torch.neg(x)))),
        replace=lambda x: ops.single(x),
        domain=Domain(shapes={"x": ("*B", "H")}),
    )
    (miss,) = missed(lambda x: torch.tanh(torch.exp(torch.sigmoid(torch.abs(x)))), (torch.randn(3, 5),), chain)
    assert miss.progress == 0.75 and "aten.neg.default" in miss.reason and "aten.abs.default" in miss.reason
    assert missed(lambda x: torch.tanh(torch.abs(x)), (torch.randn(3, 5),), chain) == []


def test_only_the_dtypes_of_the_graph_are_traced_for_a_report():
    dtypes = []

    def spelled(x, y):
        dtypes.append(x.dtype)
        return torch.relu(x + y)

    p = declare("traced", eager=spelled, replace=fused, domain=SAME)
    missed(lambda x, y: torch.relu(torch.add(x, y, alpha=2)), pair_of(3, 5), p)
    assert set(dtypes) == {torch.float32}


def test_without_explain_nothing_is_searched():
    record = CompileRecord()
    unit = captured(lambda x, y: F.relu(torch.add(x, y, alpha=2)), *pair_of(3, 5))
    run_patterns(unit, Registry([RELU_ADD]), Options(), record, explain=False)
    assert record.missed == []


def test_the_users_line_is_in_the_report():
    from ascend_dynamo import Backend

    p = declare("lined", eager=lambda x, y: torch.relu(x + y), replace=fused, domain=SAME)
    backend = Backend({"patterns": {"*": False, "lined": True}, "plugins": (p,), "target": "reference"}, texts=True)

    def model(x, y):
        return torch.relu(torch.add(x, y, alpha=2))

    with torch.no_grad():
        torch.compile(model, backend=backend)(*pair_of(3, 5))
    (miss,) = backend.records[0].missed
    assert miss.src is not None and miss.src[0] == __file__
