"""Each promise of a graph, broken on purpose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.capture import trace
from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.errors import VerifyError
from ascend_dynamo.ir.verify import promise, verify

aten = torch.ops.aten


def unit() -> GraphUnit:
    made = trace(lambda x, y: (x + 1, y.exp()), [torch.ones(2, 3), torch.ones(2, 3)])
    for node in made.gm.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        node.meta["stack_trace"] = 'File "/me/model.py", line 3, in forward\n'
    return made


def call(u: GraphUnit, target: torch._ops.OpOverload) -> fx.Node:
    return u.gm.graph.find_nodes(op="call_function", target=target)[0]


def output(u: GraphUnit) -> fx.Node:
    return u.gm.graph.find_nodes(op="output")[0]


def _late_use(u: GraphUnit) -> None:
    call(u, aten.add.Tensor).args = (call(u, aten.exp.default), 1)


def _no_value(u: GraphUnit) -> None:
    del call(u, aten.add.Tensor).meta["val"]


def _packet(u: GraphUnit) -> None:
    call(u, aten.add.Tensor).target = aten.add


def _late_input(u: GraphUnit) -> None:
    with u.gm.graph.inserting_before(output(u)):
        u.gm.graph.placeholder("late")


def _prologue(u: GraphUnit) -> None:
    next(iter(u.gm.graph.nodes)).meta["ascend_prologue"] = ("concat0", ())


def _fewer(u: GraphUnit) -> None:
    output(u).args = (output(u).args[0][:1],)  # type: ignore[index]


def _other_shape(u: GraphUnit) -> None:
    add = call(u, aten.add.Tensor)
    add.meta["val"] = add.meta["val"][0]


def _other_dtype(u: GraphUnit) -> None:
    exp = call(u, aten.exp.default)
    exp.meta["val"] = exp.meta["val"].half()


def _input_as_output(u: GraphUnit) -> None:
    output(u).args = ((next(iter(u.gm.graph.nodes)), call(u, aten.exp.default)),)


def _one_for_two(u: GraphUnit) -> None:
    output(u).args = ((call(u, aten.exp.default),) * 2,)


def _number(u: GraphUnit) -> None:
    output(u).args = ((None, call(u, aten.exp.default)),)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_late_use, r"uses %exp, which comes later.*|.*\(model.py:3\)"),
        (_no_value, r"%add = aten.add.Tensor \(model.py:3\) has no value"),
        (_packet, "overload packet"),
        (_late_input, "input behind the first call"),
        (_prologue, "takes 1 prologue values, but the prologue computes 0"),
        (_fewer, "returned 2 values, and now returns 1"),
        (_other_shape, r"output 0 was float32\[2, 3\], and now is float32\[3\]"),
        (_other_dtype, r"output 1 was float32\[2, 3\], and now is float16"),
        (_input_as_output, "output 0 may now share memory with input 0"),
        (_one_for_two, "output 1 may now share memory with output 0"),
        (_number, "output 0 was float32"),
    ],
)
def test_damage_is_found(damage: Callable[[GraphUnit], None], message: str) -> None:
    u = unit()
    before = promise(u)
    verify(u, before)
    damage(u)
    with pytest.raises(VerifyError, match=message):
        verify(u, before)


def test_recorded_values_are_derived_again() -> None:
    u = unit()
    add = call(u, aten.add.Tensor)
    verify(u, changed=u.gm.graph.nodes)
    add.meta["val"] = add.meta["val"].to(torch.int32)
    with pytest.raises(VerifyError, match=r"recorded as int32\[2, 3\], but computes float32\[2, 3\]"):
        verify(u, changed=[add])
    add.args = (add.args[0], "one")
    with pytest.raises(VerifyError, match="cannot run on its arguments"):
        verify(u, changed=[add])


def test_new_guards_and_lost_writes_are_found() -> None:
    mode, (x,) = compat.symbolic_fakes([torch.ones(5, 7)])
    u = trace(lambda t: (t.add_(1).sum(),), [x])
    before = promise(u)
    copy = call(u, aten.copy_.default)
    removed = trace(lambda t: (t.add_(1).sum(),), [x])
    removed.gm.graph.erase_node(call(removed, aten.copy_.default))
    with pytest.raises(VerifyError, match="made 1 writes to memory, and now makes 0"):
        verify(removed, before)
    assert bool(x.shape[0] != x.shape[1])
    with pytest.raises(VerifyError, match="added 1 guards"):
        verify(u, before)
    assert copy in copy.graph.nodes
    assert compat.guard_count(mode) == 1


def test_another_input_that_is_written_is_found() -> None:
    u = trace(lambda t, s: (t.add_(1).sum(), s * 2), [torch.ones(3), torch.ones(3)])
    before = promise(u)
    copy = call(u, aten.copy_.default)
    copy.args = (u.gm.graph.find_nodes(op="placeholder")[1], copy.args[1])
    with pytest.raises(VerifyError, match="wrote its input 0, and now does not"):
        verify(u, before)
    u = trace(lambda t, s: (t.add_(1).sum(), s * 2), [torch.ones(3), torch.ones(3)])
    before = promise(u)
    copy = call(u, aten.copy_.default)
    with u.gm.graph.inserting_after(copy):
        second = u.gm.graph.call_function(
            aten.copy_.default, (u.gm.graph.find_nodes(op="placeholder")[1], copy.args[1])
        )
    second.meta["val"] = copy.meta["val"]
    with pytest.raises(VerifyError, match="now writes its input 1, which it only read"):
        verify(u, before)
