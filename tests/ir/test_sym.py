"""Sizes as sympy expressions and back to nodes, without a guard."""

from __future__ import annotations

import operator
import random
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.capture import trace
from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.errors import VerifyError
from ascend_dynamo.ir.sym import SymEmitter, expr, known, known_eq, numel, same_shape


def unit_of(*shapes: tuple[int, ...]) -> tuple[Any, GraphUnit]:
    mode, fakes = compat.symbolic_fakes([torch.ones(s) for s in shapes])
    return mode, trace(lambda *xs: tuple(x + 1 for x in xs), fakes)


def test_what_is_known_needs_no_guard() -> None:
    mode, unit = unit_of((5, 7))
    a, b = next(iter(unit.gm.graph.nodes)).meta["val"].shape
    assert known(a == a)
    assert known(a >= 0)
    assert not known(a == b)
    assert not known(a == 5)
    assert known_eq(a + b, b + a)
    assert known_eq((2 * a) // 2, a)
    assert not known_eq(a, b)
    assert known_eq(3, 3)
    assert not known_eq(3, 4)
    assert same_shape((a, 2), (a, 2))
    assert not same_shape((a, 2), (a,))
    assert known(sympy.Ge(expr(a), 1), mode.shape_env)
    assert not known(sympy.Eq(expr(a), expr(b)), mode.shape_env)
    assert numel((a, 2, b)) == 2 * expr(a) * expr(b)
    assert known(sympy.true)
    assert compat.guard_count(mode) == 0


def test_sizes_are_read_once_behind_the_placeholders() -> None:
    mode, unit = unit_of((5, 7))
    graph = unit.gm.graph
    x, call, *_ = graph.nodes
    sizes = SymEmitter(graph)
    first = sizes.emit(call.meta["val"].shape[0], call)
    assert isinstance(first, fx.Node)
    assert first.prev is x
    assert sizes.emit(call.meta["val"].shape[0], call) is first
    assert sizes.emit(4, call) == 4
    again = SymEmitter(graph)
    assert again.emit(call.meta["val"].shape[0], call) is first
    assert compat.guard_count(mode) == 0


@given(seed=st.integers(0, 10**9))
def test_emitted_nodes_compute_the_expression(seed: int) -> None:
    rng = random.Random(seed)
    mode, unit = unit_of((5, 7), (11,))
    graph = unit.gm.graph
    placeholders = graph.find_nodes(op="placeholder")
    a, b = placeholders[0].meta["val"].shape
    (c,) = placeholders[1].meta["val"].shape
    size = rng.choice([a, b, c])
    for _ in range(rng.randint(1, 4)):
        other = rng.choice([a, b, c, 2, 3])
        op = rng.choice(
            [operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, torch.sym_max, torch.sym_min]
        )
        size = op(size, other)
        if isinstance(size, int):
            return
    (output,) = graph.find_nodes(op="output")
    node = SymEmitter(graph).emit(size, output)
    graph.create_node("call_function", operator.add, (node, 0))
    output.args = (node,)
    graph.lint()
    real = {expr(a): 5, expr(b): 7, expr(c): 11}
    expected = expr(size) if isinstance(expr(size), int) else int(expr(size).subs(real))
    assert fx.Interpreter(unit.gm).run(torch.ones(5, 7), torch.ones(11)) == expected
    assert compat.guard_count(mode) == 0


def test_unbacked_sizes_come_from_the_node_that_makes_them() -> None:
    mode, (x,) = compat.symbolic_fakes([torch.ones(9)])
    mode.shape_env._allow_scalar_outputs = True
    mode.allow_scalar_outputs = True
    unit = trace(lambda x: (x.nonzero() + 1, x * 2), [x])
    graph = unit.gm.graph
    (nonzero,) = graph.find_nodes(op="call_function", target=torch.ops.aten.nonzero.default)
    (output,) = graph.find_nodes(op="output")
    rows = nonzero.meta["val"].shape[0]
    node = SymEmitter(graph).emit(rows * 2, output)
    assert isinstance(node, fx.Node)
    assert nonzero < node < output
    graph.lint()
    with pytest.raises(VerifyError, match="no source"):
        SymEmitter(graph).emit(rows, nonzero)


def test_an_expression_without_a_spelling_is_refused() -> None:
    _, unit = unit_of((5, 7))
    (output,) = unit.gm.graph.find_nodes(op="output")
    a = expr(next(iter(unit.gm.graph.nodes)).meta["val"].shape[0])
    with pytest.raises(VerifyError, match="cannot be computed"):
        SymEmitter(unit.gm.graph).emit(sympy.sin(a), output)
    halved = SymEmitter(unit.gm.graph).emit(a * sympy.Rational(1, 2), output)
    assert isinstance(halved, fx.Node)
    assert halved.target is operator.floordiv
