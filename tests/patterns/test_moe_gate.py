"""Routers: every family's spelling becomes moe_gate with the right options, and what looks like one is left alone."""

from __future__ import annotations

import pytest
import torch
from pattern_support import assert_same, fuse, run, snapshot

from ascend_dynamo.patterns.spellings import router

WITH_BIAS = (router.deepseek_v3, router.glm4_moe, router.grouped_boolean)


def logits(dtype=torch.float32, tokens=5, experts=16):
    return torch.stack([torch.randperm(experts) for _ in range(tokens)]).to(dtype) / 4 - 2


def inputs(fn, dtype=torch.float32):
    bias = (torch.randperm(16).float() / 100,) if fn in WITH_BIAS else ()
    return (logits(dtype), *bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fn", router.SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling(fn, dtype):
    args = inputs(fn, dtype)
    result = fuse(fn, args, "moe_gate")
    assert result.fired == ["moe_gate"] and result.ops("ascend.moe_gate") == 1 and result.ops("aten.topk") == 0
    if fn is not router.gpt_oss:
        assert_same(fn, args, result, exact=True)
        return
    # a softmax in half precision rounds its exponentials another way; the choice is the same
    (weights, ids), (eager_weights, eager_ids) = run(result.unit, args), fn(*args)
    assert torch.equal(ids, eager_ids)
    torch.testing.assert_close(weights, eager_weights, rtol=2 * torch.finfo(dtype).eps, atol=0)


OPTIONS = [
    (router.mixtral, ["scoring='softmax'", "normalize=True", "eps=0.0"]),
    (router.olmoe, ["scoring='softmax'", "normalize=False"]),
    (router.gpt_oss, ["scoring='topk_softmax'", "normalize=False"]),
    (router.sigmoid_greedy, ["scoring='sigmoid'", "normalize=True", "eps=1e-09"]),
    (router.deepseek_v2, ["normalize=False", "scale=16.0", "n_group=4", "topk_group=2", "sorted=False"]),
    (router.deepseek_v3, ["normalize=True", "scale=2.5", "n_group=4", "topk_group=2", "sorted=False"]),
    (router.glm4_moe, ["scoring='sigmoid'", "normalize=True", "sorted=False"]),
    (router.grouped_boolean, ["normalize=False", "n_group=4", "topk_group=2"]),
]
EVERY = ("scale", "n_group", "topk_group", "sorted")


@pytest.mark.parametrize(("fn", "options"), OPTIONS, ids=lambda p: getattr(p, "__name__", ""))
def test_options_say_what_the_spelling_did(fn, options):
    after = fuse(fn, inputs(fn), "moe_gate").after
    given = " ".join(options)
    assert all(o in after for o in options), after
    assert not any(f" {name}=" in after for name in EVERY if f"{name}=" not in given), after


def test_logits_of_three_axes():
    def fn(x):
        weights, ids = torch.softmax(x, -1).topk(3)
        return weights, ids

    args = (logits().reshape(1, 5, 16),)
    result = fuse(fn, args, "moe_gate")
    assert result.fired == ["moe_gate"]
    assert_same(fn, args, result, exact=True)


def test_a_scale_used_beside_the_unscaled_weights_stays_outside():
    def fn(x):
        weights, ids = torch.softmax(x, -1).topk(3)
        return weights * 2.0, weights, ids

    args = (logits(),)
    result = fuse(fn, args, "moe_gate")
    assert result.fired == ["moe_gate"] and "scale" not in result.after
    assert_same(fn, args, result, exact=True)


def test_snapshot():
    snapshot("moe_gate", *(fuse(f, inputs(f, torch.bfloat16), "moe_gate") for f in (router.qwen, router.deepseek_v3)))


def _smallest(x, b):
    return torch.softmax(x, -1).topk(3, largest=False)


def _other_axis(x, b):
    return torch.softmax(x, -1).topk(3, dim=0)


def _softmax_over_tokens(x, b):
    return torch.softmax(x, 0).topk(3)


def _rounded_scores(x, b):
    return torch.softmax(x.bfloat16(), -1).topk(3)


def _values_only(x, b):
    return torch.softmax(x, -1).topk(3).values


def _bias_in_the_weights(x, b):
    weights, ids = (x.sigmoid() + b).topk(3)
    return weights, ids


def _bias_twice(x, b):
    ids = torch.add(x.sigmoid(), b, alpha=2).topk(3).indices
    return x.sigmoid().gather(1, ids), ids


def _bias_per_token(x, b):
    scores = x.sigmoid()
    ids = (scores + x[:, :1]).topk(3).indices
    return scores.gather(1, ids), ids


def _scores_too(x, b):
    scores = torch.softmax(x, -1)
    weights, ids = scores.topk(3)
    return weights, ids, scores


def _grouped(x, b, size=4, kept=2, fill=-torch.inf, worth="two", of="choice", value=1):
    scores = x.sigmoid()
    choice = scores + b
    groups = x.shape[-1] // size
    ranked = (choice if of == "choice" else scores).view(-1, groups, size)
    best = (ranked.topk(2, dim=-1)[0].sum(-1) if worth == "two" else ranked.amax(-1)).topk(kept, sorted=False)[1]
    mask = torch.zeros(x.shape[0], groups).scatter_(1, best, value)
    mask = mask.unsqueeze(-1).expand(-1, groups, size).reshape(x.shape)
    ids = choice.masked_fill(~mask.bool(), fill).topk(3)[1]
    return scores.gather(1, ids), ids


def _ranked_without_bias(x, b):
    return _grouped(x, b, of="scores")


def _ranked_by_best(x, b):
    return _grouped(x, b, worth="best")


def _filled_with_zero_under_a_bias(x, b):
    return _grouped(x, b, fill=0.0)


def _too_few_left(x, b):
    return _grouped(x, b, size=2, kept=1)


def _zeros_scattered(x, b):
    return _grouped(x, b, value=0)


def _interleaved_groups(x, b):
    scores = x.sigmoid()
    choice = scores + b
    best = choice.view(-1, 4, 4).topk(2, dim=-1)[0].sum(-1).topk(2, sorted=False)[1]
    mask = torch.zeros(x.shape[0], 4).scatter_(1, best, 1)
    mask = mask.unsqueeze(1).expand(-1, 4, 4).reshape(x.shape)  # every fourth expert instead of neighbours
    ids = choice.masked_fill(~mask.bool(), -torch.inf).topk(3)[1]
    return scores.gather(1, ids), ids


NEAR = [
    (_smallest, "arg", "largest=False"),
    (_other_axis, "arg", "dim=0"),
    (_softmax_over_tokens, "arg", "dim="),
    (_rounded_scores, "dtype", "bfloat16"),
    (_values_only, "op", "only its values"),
    (_bias_in_the_weights, "op", "no use of them"),
    (_bias_twice, "arg", "alpha=2"),
    (_bias_per_token, "shape", "a bias per expert"),
    (_scores_too, "users", "the graph's output"),
    (_ranked_without_bias, "op", "ranked by what the mask is laid over"),
    (_ranked_by_best, "arg", "two best with a bias"),
    (_filled_with_zero_under_a_bias, "unproven", "below every score"),
    (_too_few_left, "arg", "3 experts in the groups kept"),
    (_zeros_scattered, "op", "ones scattered"),
    (_interleaved_groups, "op", "a mask of whole groups"),
]


@pytest.mark.parametrize(("fn", "code", "found"), NEAR, ids=lambda p: getattr(p, "__name__", None))
def test_near_misses_say_what_stopped_them(fn, code, found):
    result = fuse(fn, (logits(), torch.randperm(16) / 100), "moe_gate")
    assert result.fired == []
    misses = [m for m in result.record.missed if m.pattern == "moe_gate"]
    assert any(m.code == code and found in m.reason for m in misses), misses


def test_weights_normalised_over_another_axis_are_not_normalised_by_the_gate():
    def fn(x):
        weights, ids = torch.softmax(x, -1).topk(3)
        return weights / weights.sum(0, keepdim=True), ids

    args = (logits(),)
    result = fuse(fn, args, "moe_gate")
    assert result.fired == ["moe_gate"] and "normalize=False" in result.after
    assert_same(fn, args, result, exact=True)


def test_sampling_from_a_vocabulary_is_no_router():
    def fn(x):
        return torch.softmax(x, -1).topk(40)

    assert fuse(fn, (torch.randn(2, 4000),), "moe_gate").fired == []
