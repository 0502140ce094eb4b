"""Faults of the stock matchers, one test each: none of them may come back here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from match_support import captured, count, ops, pair_of, rewritten

from ascend_dynamo.contracts import Domain
from ascend_dynamo.match import Registry, declare, run_patterns
from ascend_dynamo.options import Options
from ascend_dynamo.patterns import registry
from ascend_dynamo.report.records import CompileRecord

aten = torch.ops.aten
ATTENTION = {
    "dims": {"B": (1, None)},
    "shapes": {
        "q": ("B", "N", "S", "D"),
        "k": ("B", "N", "T", "D"),
        "v": ("B", "N", "T", "D"),
        "m": ("B", "1", "S", "T"),
    },
}


def attention(q, k, v, m):
    return torch.softmax(torch.add(q @ k.transpose(-1, -2) * 0.25, m), -1) @ v


def sdpa(q, k, v, m):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=0.25)


SDPA = declare("sdpa", eager=attention, replace=sdpa, domain=Domain(dtypes=(torch.float32,), **ATTENTION))


def qkvm(b=2, n=2, s=4, t=4, d=16):
    return torch.randn(b, n, s, d), torch.randn(b, n, t, d), torch.randn(b, n, t, d), torch.randn(b, 1, s, t)


def variants():
    def alpha(q, k, v, m):
        return torch.softmax(torch.add(q @ k.transpose(-1, -2) * 0.25, m, alpha=2), -1) @ v

    yield "alpha=2", alpha
    for dim in (-2, -3, 0):

        def other(q, k, v, m, dim=dim):
            return torch.softmax(torch.add(q @ k.transpose(-1, -2) * 0.25, m), dim) @ v

        yield f"softmax over {dim}", other

    def returned(q, k, v, m):
        w = torch.softmax(torch.add(q @ k.transpose(-1, -2) * 0.25, m), -1)
        return w @ v, w

    yield "weights returned too", returned

    def scaled_mask(q, k, v, m):
        return torch.softmax((q @ k.transpose(-1, -2) + m) * 0.25, -1) @ v

    yield "mask scaled", scaled_mask


@pytest.mark.parametrize("name, fn", variants())
@pytest.mark.parametrize("patterns", [(SDPA,), tuple(registry())], ids=["declared", "built-in"])
def test_what_only_looks_like_attention_is_never_miscompiled(name, fn, patterns):
    rewritten(fn, qkvm(), *patterns)  # compares with eager
    if patterns == (SDPA,):
        assert not rewritten(fn, qkvm(), *patterns)[1].fired, name


def test_attention_itself_is_found_commuted_too():
    assert rewritten(attention, qkvm(), SDPA)[1].count("sdpa") == 1

    def commuted(q, k, v, m):
        return torch.softmax(m + 0.25 * (q @ k.transpose(-1, -2)), -1) @ v

    assert rewritten(commuted, qkvm(), SDPA)[1].count("sdpa") == 1


def test_a_fully_masked_row_stays_nan():
    q, k, v, m = qkvm()
    m[:, :, 0] = float("-inf")

    def compare(patterns):
        unit, record = captured(attention, q, k, v, m), CompileRecord()
        run_patterns(unit, Registry(patterns), Options(strict=True), record)
        return record, unit.gm(q, k, v, m)[0], attention(q, k, v, m)

    record, got, want = compare(registry())
    assert record.fired and torch.equal(got.isnan(), want.isnan())


def test_a_pattern_spelled_once_is_found_in_every_dtype():
    """A stock pattern traced in float32 misses bfloat16, where capture inserts casts."""

    def norm(x, w):
        h = x.float()
        return (h * torch.rsqrt((h * h).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    domain = Domain(dtypes=dtypes, shapes={"x": ("*B", "H"), "w": ("H",)})
    p = declare("norm", eager=norm, replace=lambda x, w: ops.fused(x, x) * w, domain=domain)
    for dtype in dtypes:
        unit, record = captured(norm, torch.randn(3, 5).to(dtype), torch.randn(5).to(dtype)), CompileRecord()
        run_patterns(unit, Registry([p]), Options(strict=True), record)
        assert record.count("norm") == 1
        assert count(unit, torch.ops.prims.convert_element_type.default) == 0


def test_gated_activation_is_found_in_both_orders():
    p = declare("gate", eager=lambda x, y: F.silu(x) * y, replace=lambda x, y: x * torch.sigmoid(x) * y * 1.0,
                domain=Domain(shapes={"x": ("*B", "H"), "y": ("*B", "H")}))  # fmt: skip
    for fn in (lambda x, y: F.silu(x) * y, lambda x, y: y * F.silu(x)):
        assert rewritten(fn, pair_of(3, 5), p)[1].count("gate") == 1


def test_a_number_never_matches_a_value():
    """``ignore_literals=True`` lets ``a * 0.25`` match ``a * sigmoid(a)``."""
    p = declare("quarter", eager=lambda x: F.relu(x * 0.25), replace=lambda x: ops.single(x * 0.25),
                domain=Domain(shapes={"x": ("*B", "H")}))  # fmt: skip
    assert not rewritten(lambda x: F.relu(x * torch.sigmoid(x)), (torch.randn(3, 5),), p)[1].fired


def test_registering_a_pattern_twice_is_no_state():
    """A stock pattern can be registered once per process; ours are values, in as many registries as one likes."""
    for _ in range(2):
        assert Registry([SDPA]).names == ("sdpa",)


def test_one_tensor_for_two_inputs_is_two_variables_of_one_value():
    """A shared example argument aliases the placeholders of a stock pattern."""
    p = declare("sum", eager=lambda x, y: F.relu(x + y), replace=lambda x, y: ops.fused(x, y),
                domain=Domain(shapes={"x": ("*B", "H"), "y": ("*B", "H")}))  # fmt: skip
    assert rewritten(lambda x, y: F.relu(x + y), pair_of(3, 5), p)[1].count("sum") == 1
    assert rewritten(lambda x: F.relu(x + x), (torch.randn(3, 5),), p)[1].count("sum") == 1


def test_the_step_of_a_slice_counts():
    p = declare("half", eager=lambda x: torch.neg(x[..., : x.shape[-1] // 2]), replace=lambda x: ops.single(
        x[..., : x.shape[-1] // 2]), domain=Domain(shapes={"x": ("*B", "2*H")}))  # fmt: skip
    assert not rewritten(lambda x: torch.neg(x[..., ::2]), (torch.randn(3, 8),), p)[1].fired
    assert not rewritten(lambda x: torch.neg(x[..., 4:]), (torch.randn(3, 8),), p)[1].fired


def test_tanh_gelu_is_not_erf_gelu():
    p = declare("erf", eager=lambda x, y: F.gelu(x) + y, replace=lambda x, y: torch.ops.ascend.gelu_add(
        x, y, approximate="none"), domain=Domain(shapes={"x": ("*B", "H"), "y": ("*B", "H")}))  # fmt: skip
    assert rewritten(lambda x, y: F.gelu(x) + y, pair_of(3, 5), p)[1].fired
    assert not rewritten(lambda x, y: F.gelu(x, approximate="tanh") + y, pair_of(3, 5), p)[1].fired
