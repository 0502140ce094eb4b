"""What matches and what does not: arguments, literals, commuting, variables, dtypes, shapes, scalars, choices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from match_support import RELU_ADD, SAME, count, ops, pair_of, relu_add, rewritten

from ascend_dynamo.contracts import Domain
from ascend_dynamo.match import declare, optional

aten = torch.ops.aten


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (2, 1, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fires_for_every_rank_and_dtype(shape, dtype):
    unit, record = rewritten(relu_add, pair_of(*shape, dtype=dtype), RELU_ADD, validate=True)
    assert record.count("relu_add") == 1
    assert count(unit, ops.fused.default) == 1 and count(unit, aten.relu.default) == 0


def test_an_argument_that_the_pattern_does_not_mention_is_a_mismatch_with_a_reason():
    _, record = rewritten(lambda x, y: torch.relu(torch.add(x, y, alpha=2)), pair_of(3, 5), RELU_ADD)
    assert not record.fired
    (miss,) = record.missed
    assert miss.code == "arg" and "2" in miss.reason and miss.pattern == "relu_add"


def test_commutative_calls_match_either_way_with_backtracking():
    def gate(x, y):
        return (torch.sigmoid(x) * torch.tanh(y)) + torch.exp(x)

    def replace(x, y):
        return ops.fused(x, y)

    p = declare("gate", eager=gate, replace=replace, domain=SAME)
    for fn in (
        gate,
        lambda x, y: torch.exp(x) + torch.sigmoid(x) * torch.tanh(y),
        lambda x, y: torch.exp(x) + torch.tanh(y) * torch.sigmoid(x),
    ):
        unit = rewritten_only(fn, p)
        assert count(unit, ops.fused.default) == 1
    # The repeated variable must be one node: here exp reads the other input.
    unit = rewritten_only(lambda x, y: torch.exp(y) + torch.sigmoid(x) * torch.tanh(y), p)
    assert count(unit, ops.fused.default) == 0


def rewritten_only(fn, p):
    from match_support import captured

    from ascend_dynamo.match import Registry, run_patterns
    from ascend_dynamo.options import Options
    from ascend_dynamo.report.records import CompileRecord

    unit = captured(fn, *pair_of(3, 5))
    run_patterns(unit, Registry([p]), Options(strict=True), CompileRecord())
    return unit


def test_operands_that_only_shapes_tell_apart_are_exchanged():
    def biased(x, b):
        return torch.relu(x + b)

    p = declare("biased", eager=biased, replace=lambda x, b: ops.fused(x, b), domain=Domain(
        shapes={"x": ("*B", "H"), "b": ("H",)}))  # fmt: skip
    for fn in (lambda x, b: torch.relu(x + b), lambda x, b: torch.relu(b + x)):
        unit, record = rewritten(fn, (torch.randn(4, 6), torch.randn(6)), p)
        assert record.count("biased") == 1
        (node,) = unit.gm.graph.find_nodes(op="call_function", target=ops.fused.default)
        assert [tuple(a.meta["val"].shape) for a in node.args] == [(4, 6), (6,)]


def test_softmax_over_another_dim_does_not_match():
    p = declare(
        "soft",
        eager=lambda x: torch.softmax(x, -1),
        replace=lambda x: ops.single(x),
        domain=Domain(shapes={"x": ("*B", "H")}),
    )
    _, record = rewritten(lambda x: torch.softmax(x, -2), (torch.randn(4, 4),), p)
    assert not record.fired and "-1" in record.missed[0].reason


def test_softmax_by_positive_dim_matches():
    p = declare(
        "soft",
        eager=lambda x: torch.softmax(x, -1),
        replace=lambda x: torch.exp(x) / torch.exp(x).sum(-1, keepdim=True),
        domain=Domain(shapes={"x": ("*B", "H")}),
    )
    _, record = rewritten(lambda x: torch.softmax(x, 2), (torch.randn(4, 4, 3),), p)
    assert record.count("soft") == 1


def test_a_literal_never_matches_a_node_and_an_input_never_binds_a_literal():
    quarter = declare(
        "quarter",
        eager=lambda x: torch.relu(x * 0.25),
        replace=lambda x: ops.single(x * 0.25),
        domain=Domain(shapes={"x": ("*B", "H")}),
    )
    _, record = rewritten(lambda x, y: torch.relu(x * torch.sigmoid(y)), pair_of(3, 5), quarter)
    assert not record.fired
    product = declare(
        "product", eager=lambda x, y: torch.relu(x * y), replace=lambda x, y: ops.single(x * y), domain=SAME
    )
    _, record = rewritten(lambda x: torch.relu(x * 0.25), (torch.randn(3, 5),), product)
    assert not record.fired and "a tensor" in record.missed[0].reason


def test_dtypes_of_inputs_must_agree():
    _, record = rewritten(
        lambda x, y: torch.relu(x.float() + y), (torch.randn(3, 5).bfloat16(), torch.randn(3, 5)), RELU_ADD
    )
    assert record.count("relu_add") == 1  # the cast is the input here
    only = declare("only", eager=relu_add, replace=lambda x, y: ops.fused(x, y),
                   domain=Domain(dtypes=(torch.float32,), shapes=SAME.shapes))  # fmt: skip
    _, record = rewritten(relu_add, pair_of(3, 5, dtype=torch.bfloat16), only)
    assert not record.fired


def test_broadcast_operands_do_not_match_equal_shapes():
    _, record = rewritten(relu_add, (torch.randn(3, 5), torch.randn(5)), RELU_ADD)
    assert not record.fired and record.missed[0].code == "shape"


def scaled(x, y, s):
    return torch.relu(x + y) * s


def test_scalars_are_read_off_the_graph_within_their_range():
    p = declare(
        "scaled", eager=scaled, replace=lambda x, y, s: ops.fused(x, y, s), domain=SAME, scalars={"s": (0.1, 4.0)}
    )
    unit, record = rewritten(lambda x, y: torch.relu(x + y) * 0.7, pair_of(3, 5), p, validate=True)
    assert record.count("scaled") == 1
    (node,) = unit.gm.graph.find_nodes(op="call_function", target=ops.fused.default)
    assert node.args[2] == 0.7
    _, record = rewritten(lambda x, y: torch.relu(x + y) * 2, pair_of(3, 5), p)
    assert record.count("scaled") == 1
    _, record = rewritten(lambda x, y: torch.relu(x + y) * 7.0, pair_of(3, 5), p)
    assert not record.fired and "within 0.1 .. 4.0" in record.missed[0].reason


@pytest.mark.parametrize("form", [lambda s: 1 / s, lambda s: -s, lambda s: s**0.5, lambda s: s * s, lambda s: s**-0.5])
def test_derived_scalars_are_inverted(form):
    p = declare(
        "derived",
        eager=lambda x, y, s: torch.relu(x + y) * form(s),
        replace=lambda x, y, s: ops.fused(x, y, form(s)),
        domain=SAME,
        scalars={"s": (0.1, 4.0)},
    )
    _, record = rewritten(lambda x, y: torch.relu(x + y) * form(0.7), pair_of(3, 5), p, validate=True)
    assert record.count("derived") == 1


def test_a_scalar_used_twice_must_be_one_number():
    p = declare(
        "twice",
        eager=lambda x, y, s: torch.relu(x + s) * s + y,
        replace=lambda x, y, s: ops.fused(x, torch.full_like(x, s), s) + y,
        domain=SAME,
        scalars={"s": (0.1, 4.0)},
    )
    _, record = rewritten(lambda x, y: torch.relu(x + 0.5) * 0.5 + y, pair_of(3, 5), p)
    assert record.count("twice") == 1
    _, record = rewritten(lambda x, y: torch.relu(x + 0.5) * 0.25 + y, pair_of(3, 5), p)
    assert not record.fired


def test_a_float_that_follows_a_size():
    p = declare(
        "by_size",
        eager=lambda x, y: torch.relu(x + y) * x.shape[-1] ** -0.5,
        replace=lambda x, y: ops.fused(x, y, x.shape[-1] ** -0.5),
        domain=SAME,
    )
    _, record = rewritten(lambda x, y: torch.relu(x + y) * 16**-0.5, pair_of(3, 16), p, validate=True)
    assert record.count("by_size") == 1
    _, record = rewritten(lambda x, y: torch.relu(x + y) * 16**-0.5, pair_of(3, 15), p)
    assert not record.fired


def test_choices_and_optional_parts():
    def spelled(x, y, approximate):
        return F.gelu(optional(torch.neg, x), approximate=approximate) + y

    def replace(x, y, approximate):
        return F.gelu(x, approximate=approximate).add(y)

    def with_neg(x, y, approximate):
        return F.gelu(optional(torch.neg, x), approximate=approximate) - (-y)

    p = declare("opt", eager=spelled, replace=with_neg, domain=SAME, choices={"approximate": ("none", "tanh")})
    calls = [sum(c.op is aten.neg.default for c in a.calls) for a in p.alternatives(torch.float32)]
    assert sorted(calls) == [0, 0, 1, 1]


def test_a_spelling_without_an_input_gives_none():
    seen = []

    def replace(x, y):
        seen.append(y is None)
        return ops.single(x) if y is None else ops.fused(x, y)

    p = declare("maybe", eager=lambda x, y: torch.relu(optional(lambda t: t + y, x)), replace=replace, domain=SAME)
    unit, _ = rewritten(relu_add, pair_of(3, 5), p)
    assert count(unit, ops.fused.default) == 1
    unit, _ = rewritten(lambda x: torch.relu(x), (torch.randn(3, 5),), p)
    assert count(unit, ops.single.default) == 1
    assert True in seen and False in seen


def test_variadic_inputs():
    p = declare(
        "cat_relu",
        eager=lambda *xs: torch.relu(torch.cat(xs, -1)),
        replace=lambda *xs: ops.single(torch.cat(xs, -1)),
        domain=Domain(shapes={"xs": ("*B", "H")}),
    )
    for n in (2, 3, 4):
        _, record = rewritten(lambda *xs: torch.relu(torch.cat(xs, -1)), [torch.randn(2, 3) for _ in range(n)], p)
        assert record.count("cat_relu") == 1
    unit, _ = rewritten(lambda *xs: torch.relu(torch.cat(xs, 0)), [torch.randn(2, 3) for _ in range(2)], p)
    assert count(unit, aten.cat.default) == 1  # only the case of one tensor, relu(x), is found in it


def heads(x, w):
    b, s, _ = x.shape
    return F.linear(x, w).reshape(b, s, -1, 4).permute(0, 2, 1, 3)


def test_sizes_are_expressions_of_the_inputs():
    p = declare(
        "heads",
        eager=heads,
        replace=lambda x, w: F.linear(x, w).neg().unflatten(-1, (-1, 4)).transpose(1, 2),  # not equal
        domain=Domain(shapes={"x": ("B", "S", "D"), "w": ("4*H", "D")}),
    )
    general = [a for a in p.alternatives(torch.float32) if not a.fixed]
    assert [str(c.shape) for c in general[0].calls if c.shape] == ["(B, S, H, 4)"]
    _, record = rewritten_plain(heads, (torch.randn(2, 3, 5), torch.randn(24, 5)), p)
    assert record.count("heads") == 1
    _, record = rewritten_plain(heads, (torch.randn(2, 1, 5), torch.randn(24, 5)), p)
    assert record.count("heads") == 1
    _, record = rewritten_plain(
        lambda x, w: F.linear(x, w).reshape(2, 3, 4, 6).permute(0, 2, 1, 3),
        (torch.randn(2, 3, 5), torch.randn(24, 5)),
        p,
    )
    assert not record.fired


def rewritten_plain(fn, args, p):
    from match_support import captured

    from ascend_dynamo.match import Registry, run_patterns
    from ascend_dynamo.options import Options
    from ascend_dynamo.report.records import CompileRecord

    unit, record = captured(fn, *args), CompileRecord()
    run_patterns(unit, Registry([p]), Options(strict=True), record)
    return unit, record


def test_slices_follow_sizes():
    def halves(x):
        h = x.shape[-1] // 2
        return torch.cat((-x[..., h:], x[..., :h]), -1)

    p = declare("halves", eager=halves, replace=lambda x: ops.single(x), domain=Domain(shapes={"x": ("*B", "2*H")}))
    args = (torch.randn(2, 3, 8),)
    assert rewritten_plain(halves, args, p)[1].count("halves") == 1
    swapped = rewritten_plain(lambda x: torch.cat((-x[..., :4], x[..., 4:]), -1), args, p)
    uneven = rewritten_plain(lambda x: torch.cat((-x[..., 3:], x[..., :3]), -1), args, p)
    strided = rewritten_plain(lambda x: torch.cat((-x[..., 1::2], x[..., ::2]), -1), args, p)
    assert not any(r.fired for _, r in (swapped, uneven, strided))


def test_symbolic_sizes_unify_without_guards():
    from match_support import captured

    from ascend_dynamo import _torch_compat as compat
    from ascend_dynamo.match import Registry, run_patterns
    from ascend_dynamo.options import Options
    from ascend_dynamo.report.records import CompileRecord

    mode, (x, y) = compat.symbolic_fakes(list(pair_of(5, 7)))
    before = compat.guard_count(mode)
    unit, record = captured(relu_add, x, y), CompileRecord()
    run_patterns(unit, Registry([RELU_ADD]), Options(strict=True), record)
    assert record.count("relu_add") == 1 and compat.guard_count(mode) == before


def test_requires_has_the_last_word():
    from ascend_dynamo.contracts import NoMatch
    from ascend_dynamo.errors import PatternError

    def even(m, facts):
        size = facts.val(m.inputs["x"]).shape[-1]
        return None if facts.known(size % 2 == 0) else NoMatch("shape", m.anchor, "an even last size", str(size))

    p = declare(
        "even", eager=relu_add, replace=lambda x, y: ops.fused(x, y), domain=Domain(shapes=SAME.shapes, requires=even)
    )
    assert rewritten(relu_add, pair_of(3, 4), p)[1].count("even") == 1
    _, record = rewritten(relu_add, pair_of(3, 5), p)
    assert not record.fired and "an even last size" in record.missed[0].reason
    factory = declare("factory", eager=relu_add, replace=lambda x, y: ops.fused(x, y),
                      domain=Domain(shapes=SAME.shapes, requires=lambda m, f: even))  # fmt: skip
    with pytest.raises(PatternError, match="function that makes the check"):
        rewritten(relu_add, pair_of(3, 4), factory)
