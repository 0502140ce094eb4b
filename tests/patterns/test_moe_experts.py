"""Experts: sorted, batched and added up, as moe_experts; what is not provably the same is left alone."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from pattern_support import assert_same, fuse, snapshot

from ascend_dynamo.patterns.spellings import experts

T, K, E, H, I = 5, 2, 4, 16, 8


def inputs(fn, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return experts.fuzz_inputs(random.Random(3), dtype, experts.SPELLINGS.index(fn))


@pytest.mark.parametrize("fn", experts.SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling(fn):
    args = inputs(fn)
    result = fuse(fn, args, "moe_experts")
    assert result.fired == ["moe_experts"] and result.ops("ascend.moe_experts") == 1
    assert result.ops("aten._grouped_mm") == result.ops("aten.matmul") == result.ops("aten.sort") == 0
    assert_same(fn, args, result)


@pytest.mark.parametrize("fn", [experts.batched, experts.many], ids=lambda f: f.__name__)
def test_in_float32(fn):
    args = inputs(fn, torch.float32)
    result = fuse(fn, args, "moe_experts")
    assert result.fired == ["moe_experts"]
    assert_same(fn, args, result)


@pytest.mark.parametrize("fn", experts.SPELLINGS, ids=lambda f: f.__name__)
def test_behind_its_router(fn):
    args = inputs(fn)
    result = fuse(fn, args)
    assert set(result.fired) == {"moe_gate", "moe_experts"}
    assert_same(fn, args, result)


def test_gpt_oss_options():
    after = fuse(experts.gpt_oss, inputs(experts.gpt_oss), "moe_experts").after
    for option in ("interleaved=True", "alpha=1.702", "limit=0.7", "up_shift=1.0", "b_gate_up=%x4", "b_down=%x5"):
        assert option in after


def test_the_transposed_weight_is_read_as_it_lies():
    assert "aten.permute" not in fuse(experts.grouped, inputs(experts.grouped), "moe_experts").after


def test_one_expert_per_token():
    def fn(x, logits, up, down):
        weights, ids = torch.softmax(logits.float(), -1).topk(1)
        by_expert, perm = ids.reshape(-1).sort()
        offs = torch.histc(by_expert.float(), bins=4, min=0, max=3).cumsum(0, dtype=torch.int32)
        gate, up_ = F.grouped_mm(x[perm // 1], up.mT, offs=offs).chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up_, down.mT, offs=offs) * weights.reshape(-1)[perm].unsqueeze(-1)
        return y[perm.argsort()].view(5, 1, 16).sum(1).to(x.dtype)

    args = operands()
    result = fuse(fn, args, "moe_experts")
    assert result.fired == ["moe_experts"]
    assert_same(fn, args, result)


def test_snapshot():
    snapshot("moe_experts", *(fuse(f, inputs(f), "moe_experts") for f in (experts.grouped, experts.gpt_oss)))


def operands(dtype=torch.bfloat16):
    torch.manual_seed(1)
    x, logits = torch.randn(T, H, dtype=dtype), torch.randn(T, E, dtype=dtype)
    return x, logits, torch.randn(E, 2 * I, H, dtype=dtype) / 4, torch.randn(E, H, I, dtype=dtype) / 4


def template(x, logits, up, down, *, by=None, token=None, back=None, second=None, place=None, act=None, ids_of=None):
    """``experts.grouped`` with one step exchanged; a step takes what it would be and what there is to make another."""
    weights, ids = torch.softmax(logits.float(), -1).topk(K)
    ids = ids_of(ids) if ids_of else ids
    by_expert, perm = ids.reshape(-1).sort()
    counts = torch.histc((by(by_expert, perm) if by else by_expert).float(), bins=E, min=0, max=E - 1)
    offs = counts.cumsum(0, dtype=torch.int32)
    tokens = token(perm) if token else perm // K
    gate, up_ = F.grouped_mm(x[tokens], up.mT, offs=offs).chunk(2, -1)
    h = act(gate, up_) if act else F.silu(gate) * up_
    y = F.grouped_mm(h, down.mT, offs=second(offs) if second else offs)
    y = y * (weights.to(x.dtype).reshape(-1)[place(perm) if place else perm]).unsqueeze(-1)
    return y[back(perm) if back else perm.argsort()].view(T, K, H).sum(1)


def _near(**steps):
    return lambda *args: template(*args, **steps)


def test_the_template_itself_is_recognised():
    args = operands()
    result = fuse(template, args, "moe_experts")
    assert result.fired == ["moe_experts"]
    assert_same(template, args, result)


NEAR = {
    "tokens by a remainder": (_near(token=lambda p: p % T), "op", "rows of x"),
    "tokens by another k": (_near(token=lambda p: p // (K + 1)), "op", "rows of x"),
    "not put back": (_near(back=lambda p: p), "unproven", "back in token order"),
    "put back twice": (_near(back=lambda p: p.argsort().argsort()), "op", "a weight each"),
    "put back descending": (_near(back=lambda p: p.argsort(descending=True)), "unproven", "back in token order"),
    "counts of other numbers": (_near(by=lambda e, p: p.clamp(max=3)), "unproven", "count the slots"),
    "other offsets for the second": (_near(second=lambda o: o.flip(0)), "unproven", "count the slots"),
    "weights in token order": (_near(place=lambda p: torch.arange(T * K)), "op", "a weight each"),
    "up before gate": (_near(act=lambda g, u: g * F.silu(u)), "op", "the gate first"),
    "no gate": (_near(act=lambda g, u: F.silu(g) * F.silu(g)), "op", "the gate first"),
    "another activation": (_near(act=lambda g, u: torch.tanh(g) * u), "op", "silu, gelu or relu"),
    "one bound for both": (_near(act=lambda g, u: F.silu(g.clamp(-1, 1)) * u.clamp(-1, 1)), "arg", "one limit"),
    "two limits": (_near(act=lambda g, u: F.silu(g.clamp(max=1)) * u.clamp(-2, 2)), "arg", "one limit"),
    "ids that may be out of range": (_near(ids_of=lambda i: (i + 1) % E), "unproven", "ids below 4"),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_say_what_stopped_them(name):
    fn, code, expected = NEAR[name]
    result = fuse(fn, operands(), "moe_experts")
    missed = result.missed("moe_experts")
    assert result.fired == [] and missed.code == code and expected in missed.reason, missed


def test_more_scores_than_experts_are_refused():
    def fn(x, logits, up, down):
        return experts.batched(x, logits, up, down)

    x, _, up, down = operands()
    result = fuse(fn, (x, torch.randn(T, E + 1, dtype=x.dtype), up, down), "moe_experts")
    assert result.fired == [] and result.missed("moe_experts").code == "unproven"


def test_two_sets_of_ids_are_refused():
    def fn(x, logits, up, down):
        weights, ids = torch.softmax(logits.float(), -1).topk(K)
        other = torch.softmax(-logits.float(), -1).topk(K).indices
        gate, up_ = (up[ids] @ x[:, None, :, None]).squeeze(-1).chunk(2, -1)
        y = (down[other] @ (F.silu(gate) * up_).unsqueeze(-1)).squeeze(-1)
        return (y * weights.to(x.dtype).unsqueeze(-1)).sum(1)

    assert fuse(fn, operands(), "moe_experts").fired == []


def test_a_sum_that_stays_wide_is_refused():
    def fn(x, logits, up, down):
        weights, ids = torch.softmax(logits.float(), -1).topk(K)
        gate, up_ = (up[ids] @ x[:, None, :, None]).squeeze(-1).chunk(2, -1)
        y = (down[ids] @ (F.silu(gate) * up_).unsqueeze(-1)).squeeze(-1)
        return (y * weights.unsqueeze(-1)).sum(1)

    result = fuse(fn, operands(), "moe_experts")
    assert result.fired == [] and result.missed("moe_experts").code == "dtype"


def test_a_result_used_inside_is_refused():
    def fn(x, logits, up, down):
        weights, ids = torch.softmax(logits.float(), -1).topk(K)
        gate, up_ = (up[ids] @ x[:, None, :, None]).squeeze(-1).chunk(2, -1)
        h = F.silu(gate) * up_
        y = (down[ids] @ h.unsqueeze(-1)).squeeze(-1)
        return (y * weights.to(x.dtype).unsqueeze(-1)).sum(1), h

    result = fuse(fn, operands(), "moe_experts")
    assert result.fired == [] and result.missed("moe_experts").code == "users"
