"""Where a match may be replaced: users, several outputs, order, writes, streams, regions, graph outputs, levels."""

from __future__ import annotations

import pytest
import torch
from match_support import RELU_ADD, SAME, captured, count, fused, ops, pair_of, relu_add, rewritten

from ascend_dynamo.errors import ExpectError
from ascend_dynamo.match import Registry, declare, run_patterns
from ascend_dynamo.match.evaluate import run_unit
from ascend_dynamo.options import Options
from ascend_dynamo.report.records import CompileRecord

aten = torch.ops.aten


def run(unit, *patterns, **options):
    record = CompileRecord()
    run_patterns(unit, Registry(patterns), Options(**options), record)
    return record


def shared(x, y):
    s = x + y
    return torch.relu(s), torch.exp(s)


def test_a_shared_intermediate_is_refused_with_a_reason():
    _, record = rewritten(shared, pair_of(3, 5), RELU_ADD)
    assert not record.fired
    (miss,) = record.missed
    assert miss.code == "users" and "used by" in miss.reason and "duplicate" in miss.fix


def test_a_returned_intermediate_is_refused_too():
    _, record = rewritten(lambda x, y: (torch.relu(x + y), x + y), pair_of(3, 5), RELU_ADD)
    assert not record.fired and "returned" in record.missed[0].reason


def test_duplicate_keeps_the_intermediate_alive():
    p = declare("dup", eager=relu_add, replace=fused, domain=SAME, users="duplicate")
    unit, record = rewritten(shared, pair_of(3, 5), p)
    assert record.count("dup") == 1 and count(unit, aten.add.Tensor) == 1 and count(unit, ops.fused.default) == 1


def two(x, y, s):
    h = x + y
    return torch.relu(h) * s, h


PAIR = declare("pair", eager=two, replace=lambda x, y, s: ops.pair(x, y, s), domain=SAME, scalars={"s": (0.1, 4.0)})


def test_several_outputs_with_users_between_them():
    def model(x, y):
        h = x + y
        before = torch.exp(h)
        n = torch.relu(h) * 0.5
        return before + n, torch.tanh(h)

    unit, record = rewritten(model, pair_of(3, 5), PAIR)
    assert record.count("pair") == 1
    assert count(unit, ops.pair.default) == 1 and count(unit, aten.add.Tensor) == 1


def test_an_input_that_comes_after_a_use_of_an_output_is_refused():
    def scaled(x, y, w):
        h = x + y
        return torch.relu(h) * w, h

    p = declare(
        "late",
        eager=scaled,
        replace=lambda x, y, w: (torch.relu(x + y) * w * 1.0 + w * 0, x + y),
        domain=type(SAME)(shapes={**SAME.shapes, "w": ("*B", "H")}),
    )

    def model(x, y):
        h = x + y
        w = torch.exp(h)  # needs h
        return torch.relu(h) * w

    unit = captured(model, *pair_of(3, 5))
    record = run(unit, p)
    assert not record.fired and record.missed[0].code == "unproven"


def test_independent_roots_of_one_input():
    def both(x, y):
        return torch.sigmoid(x), torch.tanh(x) + y

    p = declare("both", eager=both, replace=lambda x, y: (torch.exp(x), torch.exp(y)), domain=SAME)
    unit = captured(lambda x, y: torch.tanh(x) * 2 + torch.sigmoid(x) + (torch.tanh(x) + y), *pair_of(3, 5))
    assert not run(unit, p).fired  # tanh(x) is used elsewhere
    unit = captured(lambda x, y: torch.sigmoid(x) * (y + torch.tanh(x)), *pair_of(3, 5))
    assert run(unit, p).count("both") == 1
    assert count(unit, aten.exp.default) == 2


@pytest.mark.parametrize("target, fires", [("x", False), ("y", False), ("other", True)])
def test_a_write_to_what_the_match_reads_stops_it(target, fires):
    unit = captured(lambda x, y, z: torch.relu(x + y) + z, *pair_of(3, 5), torch.randn(3, 5))
    x, y, z = unit.gm.graph.find_nodes(op="placeholder")
    (relu,) = unit.gm.graph.find_nodes(op="call_function", target=aten.relu.default)
    with unit.gm.graph.inserting_before(relu):
        unit.gm.graph.call_function(ops.poke.default, ({"x": x, "y": y, "other": z}[target],))
    record = run(unit, RELU_ADD)
    assert bool(record.fired) == fires
    if not fires:
        assert record.missed[0].code == "mutation" and "poke" in record.missed[0].reason


def custom(unit, target, **meta):
    for node in unit.gm.graph.find_nodes(op="call_function", target=target):
        node.meta["custom"] = meta


def test_streams_and_regions_are_borders():
    unit = captured(relu_add, *pair_of(3, 5))
    custom(unit, aten.add.Tensor, stream=1)
    assert run(unit, RELU_ADD).missed[0].code == "stream"
    unit = captured(relu_add, *pair_of(3, 5))
    custom(unit, aten.add.Tensor, ascend_region="fuse:relu_add@a.py:1#0")
    assert run(unit, RELU_ADD).missed[0].code == "region"
    for node_region, fires in (("no_fuse@a.py:1#0", False), ("fuse:relu_add@a.py:1#0", True)):
        unit = captured(relu_add, *pair_of(3, 5))
        for target in (aten.add.Tensor, aten.relu.default):
            custom(unit, target, ascend_region=node_region)
        record = run(unit, RELU_ADD)
        assert bool(record.fired) == fires
        if fires:
            assert record.fired[0].region == node_region


def test_a_forced_region_that_does_not_fuse_is_an_error_in_strict_mode():
    def build():
        unit = captured(lambda x, y: torch.relu(torch.add(x, y, alpha=2)), *pair_of(3, 5))
        for target in (aten.add.Tensor, aten.relu.default):
            custom(unit, target, ascend_region="fuse:relu_add@a.py:1#0")
        return unit

    assert not run(build(), RELU_ADD).fired
    with pytest.raises(ExpectError, match="did not fire"):
        run(build(), RELU_ADD, strict=True)


def test_expect_names_the_nearest_miss():
    unit = captured(lambda x, y: torch.relu(torch.add(x, y, alpha=2)), *pair_of(3, 5))
    with pytest.raises(ExpectError, match=r"relu_add.*1 times.*(?s:.*)literal 1, found 2"):
        run(unit, RELU_ADD, expect={"relu_add": 1})
    unit = captured(relu_add, *pair_of(3, 5))
    assert run(unit, RELU_ADD, expect={"relu_add": 1}).count("relu_add") == 1


def test_a_pattern_above_the_level_is_reported_and_not_applied():
    p = declare("lossy", eager=relu_add, replace=fused, domain=SAME, level=3)
    _, record = rewritten(relu_add, pair_of(3, 5), p)
    assert not record.fired
    (miss,) = record.missed
    assert miss.code == "level" and "level" in miss.fix
    _, record = rewritten(relu_add, pair_of(3, 5), p, level=3)
    assert record.count("lossy") == 1


def test_a_pattern_can_be_switched_off_by_name():
    _, record = rewritten(relu_add, pair_of(3, 5), RELU_ADD, patterns={"relu_add": False})
    assert not record.fired


def test_an_output_of_the_graph_gains_no_alias():
    p = declare("identity", eager=lambda x: torch.neg(torch.neg(x)), replace=lambda x: x, domain=type(SAME)(
        shapes={"x": ("*B", "H")}))  # fmt: skip
    unit, record = rewritten(lambda x: torch.neg(torch.neg(x)), (torch.randn(3, 5),), p)
    assert record.count("identity") == 1 and count(unit, aten.clone.default) == 1
    x = torch.randn(3, 5)
    assert run_unit(unit, [x])[0].data_ptr() != x.data_ptr()


def test_src_and_replaced_are_recorded():
    _, record = rewritten(relu_add, pair_of(3, 5), RELU_ADD)
    (fired,) = record.fired
    assert fired.pattern == "relu_add" and fired.replaced == 2 and fired.anchor == "relu"
