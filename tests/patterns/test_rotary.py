"""Rotary embedding: rotate_half, interleaved, halves, complex, partial; and everything that only looks like it."""

from __future__ import annotations

import pytest
import torch
from pattern_support import assert_same, fuse, snapshot

from ascend_dynamo.patterns import rotary, rotary_complex, rotary_halves, rotary_partial

ROTARY = ("rotary", "rotary_halves", "rotary_complex", "rotary_partial")


def inputs(dtype=torch.float32, width=8, table=8):
    tables = (torch.randn(2, 5, table, dtype=dtype) for _ in range(2))
    return (torch.randn(2, 3, 5, width, dtype=dtype), *tables)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fn", rotary.Rotary.eager, ids=lambda f: f.__name__)
def test_both_layouts_are_bit_exact(fn, dtype):
    result = fuse(fn, inputs(dtype), *ROTARY, level=1)
    assert result.fired == ["rotary"]
    assert ("interleaved=True" in result.after) == (fn is rotary.every_two)
    assert_same(fn, inputs(dtype), result, exact=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fn", rotary_halves.RotaryHalves.eager, ids=lambda f: f.__name__)
def test_half_width_tables(fn, dtype):
    args = inputs(dtype, table=4)
    result = fuse(fn, args, *ROTARY, level=1)
    assert result.fired == ["rotary_halves"]
    assert_same(fn, args, result, exact=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_complex_product(dtype):
    args = (torch.randn(2, 5, 3, 8, dtype=dtype), torch.randn(2, 5, 4, dtype=dtype))
    result = fuse(rotary_complex.llama_original, args, *ROTARY)
    assert result.fired == ["rotary_complex"]
    assert_same(rotary_complex.llama_original, args, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_partial(dtype):
    args = inputs(dtype, width=20)
    result = fuse(rotary_partial.neox, args, *ROTARY, level=1)
    assert result.fired == ["rotary", "rotary_partial"] and "rotary_dim=8" in result.after
    assert_same(rotary_partial.neox, args, result, exact=True)


def _both(q, k, cos, sin):
    return rotary.half(q, cos, sin), rotary.half(k, cos, sin)


def test_queries_and_keys_of_grouped_heads():
    q, cos, sin = inputs(torch.bfloat16)
    args = (q, torch.randn(2, 1, 5, 8, dtype=torch.bfloat16), cos, sin)
    result = fuse(_both, args, *ROTARY)
    assert result.fired == ["rotary", "rotary"]
    assert_same(_both, args, result, exact=True)


def test_float32_tables_promote():
    x, cos, sin = inputs()
    args = (x.bfloat16(), cos, sin)
    result = fuse(rotary.half, args, *ROTARY)
    assert result.fired == ["rotary"]
    assert_same(rotary.half, args, result, exact=True)


def test_inside_a_fused_projection():
    def neox(qkv, cos, sin):  # q and its parts are all slices of one tensor
        q = qkv[..., 16:32]
        rot, rest = q[..., :8], q[..., 8:]
        x1, x2 = rot[..., :4], rot[..., 4:]
        turned = rot * cos.unsqueeze(1) + torch.cat((-x2, x1), -1) * sin.unsqueeze(1)
        return torch.cat((turned, rest), -1)

    args = inputs(width=48)
    result = fuse(neox, args, *ROTARY)
    assert result.fired == ["rotary", "rotary_partial"]
    assert_same(neox, args, result, exact=True)


def test_interleaved_and_partial():
    def glm(x, cos, sin):  # the slice with a step is not merged with the one around it
        rot, rest = x[..., :8], x[..., 8:]
        turned = torch.stack((-rot[..., 1::2], rot[..., ::2]), -1).flatten(-2)
        return torch.cat((rot * cos.unsqueeze(1) + turned * sin.unsqueeze(1), rest), -1)

    args = inputs(width=20)
    result = fuse(glm, args, *ROTARY)
    assert result.fired == ["rotary", "rotary_partial"] and "interleaved=True, rotary_dim=8" in result.after
    assert_same(glm, args, result, exact=True)


def test_snapshot():
    pairs = [(rotary.half, 8), (rotary.every_two, 8), (rotary_halves.reads_interleaved, 4)]
    results = [fuse(fn, inputs(table=n), *ROTARY) for fn, n in pairs]
    snapshot("rotary", *results, fuse(rotary_partial.neox, inputs(width=20), *ROTARY))


def _turn(x, a, b):
    return torch.cat((a(x[..., :4]), b(x[..., 4:])), -1)


def _mixed(x, c, s, turned):
    return x * c.unsqueeze(1) + turned * s.unsqueeze(1)


WRONG = {
    "swapped halves": lambda x, c, s: _mixed(x, c, s, torch.cat((-x[..., :4], x[..., 4:]), -1)),
    "sign on the other half": lambda x, c, s: _mixed(x, c, s, torch.cat((x[..., 4:], -x[..., :4]), -1)),
    "no sign": lambda x, c, s: _mixed(x, c, s, torch.cat((x[..., 4:], x[..., :4]), -1)),
    "cut elsewhere": lambda x, c, s: _mixed(x, c, s, torch.cat((-x[..., 3:], x[..., :3]), -1)),
    "another axis": lambda x, c, s: _mixed(x, c, s, torch.cat((-x[..., 4:], x[..., :4]), -1).flip(-1)),
    "step 2 in halves": lambda x, c, s: _mixed(x, c, s, torch.cat((-x[..., 1::2], x[..., ::2]), -1)),
    "interleaved, swapped": lambda x, c, s: _mixed(x, c, s, torch.stack((-x[..., ::2], x[..., 1::2]), -1).flatten(-2)),
    "other tensor": lambda x, c, s: _mixed(x, c, s, torch.cat((-(x + 1)[..., 4:], (x + 1)[..., :4]), -1)),
    "half of another": lambda x, c, s: _mixed(x, c, s, torch.cat((-x[..., 4:], (x * 2)[..., :4]), -1)),
    "alpha": lambda x, c, s: torch.add(
        x * c.unsqueeze(1), torch.cat((-x[..., 4:], x[..., :4]), -1) * s.unsqueeze(1), alpha=2
    ),
    "difference": lambda x, c, s: x * c.unsqueeze(1) - torch.cat((-x[..., 4:], x[..., :4]), -1) * s.unsqueeze(1),
}


COMPLEX = {
    "keys without a head axis": rotary_complex.deepseek_keys,
    "pairs that were pairs before": lambda x, a: torch.view_as_real(
        torch.view_as_complex(x.view(2, 5, 3, 4, 2) * 1) * torch.polar(torch.ones_like(a), a)
    ),
    "the factor first": lambda x, a: torch.view_as_real(
        torch.polar(torch.ones_like(a), a) * torch.view_as_complex(x.view(2, 5, 3, 4, 2))
    ).flatten(2),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_products_in_any_shape(name):
    args = (torch.randn(2, 5, 1, 8) if "keys" in name else torch.randn(2, 5, 3, 8), torch.randn(2, 5, 4))
    if "keys" not in name:
        args = (args[0], args[1][:, :, None])
    result = fuse(COMPLEX[name], args, *ROTARY)
    assert result.fired == ["rotary_complex"] and result.ops("aten.view_as_complex") == 0
    assert_same(COMPLEX[name], args, result)


NOT_COMPLEX = {
    "one real factor": lambda x, a: torch.view_as_real(torch.view_as_complex(x.view(2, 5, 3, 4, 2)) * a),
    "a sum": lambda x, a: torch.view_as_real(torch.view_as_complex(x.view(2, 5, 3, 4, 2)) + torch.polar(a, a)),
    "a table that widens": lambda x, a: torch.view_as_real(
        torch.view_as_complex(x[:, :, :1].reshape(2, 5, 1, 4, 2)) * torch.polar(a, a).expand(2, 5, 3, 4)
    ),
    "product used twice": lambda x, a: (lambda p: (torch.view_as_real(p), p.abs()))(
        torch.view_as_complex(x.view(2, 5, 3, 4, 2)) * torch.polar(a, a)
    ),
}


@pytest.mark.parametrize("name", NOT_COMPLEX)
def test_other_complex_products_stay(name):
    args = (torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 4))
    result = fuse(NOT_COMPLEX[name], args, *ROTARY)
    assert result.fired == []
    assert_same(NOT_COMPLEX[name], args, result)


@pytest.mark.parametrize("name", WRONG)
def test_what_only_looks_like_a_rotation_stays(name):
    result = fuse(WRONG[name], inputs(), *ROTARY)
    assert result.fired == []


def test_reasons():
    other = fuse(WRONG["other tensor"], inputs(), *ROTARY).missed("rotary")
    assert other.code == "op" and "itself times cos" in other.reason
    alpha = fuse(WRONG["alpha"], inputs(), *ROTARY).missed("rotary")
    assert alpha.code == "arg" and "alpha=2" in alpha.reason

    def returned(x, c, s):
        turned = torch.cat((-x[..., 4:], x[..., :4]), -1)
        return _mixed(x, c, s, turned), turned

    users = fuse(returned, inputs(), *ROTARY).missed("rotary")
    assert users.code == "users" and "output" in users.reason

    def wide_table(x, c, s):
        return _mixed(x[:, :1], c, s[:, None].expand(2, 3, 5, 8)[:, 0], torch.cat((-x[..., 4:], x[..., :4]), -1)[:, :1])

    assert fuse(wide_table, inputs(), *ROTARY).fired in ([], ["rotary"])


def test_halves_must_be_the_same_four_products():
    def crossed(x, c, s):
        x1, x2 = x.chunk(2, -1)
        c, s = c.unsqueeze(1), s.unsqueeze(1)
        return torch.cat((x1 * c - x2 * s, x2 * s + x1 * c), -1)

    missed = fuse(crossed, inputs(table=4), *ROTARY).missed("rotary_halves")
    assert missed.code == "op"


def test_partial_needs_the_rest_of_the_same_tensor():
    def fn(x, y, c, s):
        return torch.cat((rotary.half(x[..., :8], c, s), y[..., 8:]), -1)

    x, c, s = inputs(width=20)
    result = fuse(fn, (x, torch.randn_like(x), c, s), *ROTARY)
    missed = result.missed("rotary_partial")
    assert result.fired == ["rotary"] and missed.code == "op" and "two tensors" in missed.reason

    def gap(x, c, s):
        return torch.cat((rotary.half(x[..., :8], c, s), x[..., 9:]), -1)

    missed = fuse(gap, (x, c, s), *ROTARY).missed("rotary_partial")
    assert missed.code == "shape" and "9:20]" in missed.reason
