"""The kernels of the mixture of experts against the float64 formulas: odd sizes, idle experts, foreign ids, threads."""

from __future__ import annotations

import pytest
import torch

from ascend_dynamo.dialect import SPECS
from ascend_dynamo.lowering.cpu import kernels

kernels.load()
ops = torch.ops.ascend_cpu
EXPERTS = SPECS["moe_experts"]
OSS = {"interleaved": True, "alpha": 1.702, "limit": 0.7, "up_shift": 1.0}


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def case(tokens, top_k, experts, wide, inner, dtype, *, biases=False, skew=False):
    g = torch.Generator().manual_seed(tokens * 1000 + wide)
    draw = lambda *shape: (torch.randn(shape, generator=g) * 0.3).to(dtype)  # noqa: E731
    x = draw(tokens, wide) * 3
    some = 2 if skew else experts  # skewed: all tokens crowd on the first experts
    chosen = [torch.randperm(some, generator=g)[:top_k] for _ in range(tokens)]
    ids = torch.stack(chosen) if tokens else torch.empty(0, top_k)
    weights = torch.rand(tokens, top_k, generator=g)
    args = (x, weights, ids.int(), draw(experts, 2 * inner, wide), draw(experts, wide, inner))
    return args, ({"b_gate_up": draw(experts, 2 * inner), "b_down": draw(experts, wide)} if biases else {})


def check(op, args, kwargs):
    dtype = args[0].dtype
    found = EXPERTS.judge(op(*args, **kwargs), *args, dtype=dtype, **kwargs)
    assert found is None, found


SIZES = [
    (1, 2, 4, 64, 32),
    (1, 4, 4, 17, 5),
    (2, 2, 3, 31, 7),
    (3, 1, 2, 1, 1),
    (5, 3, 8, 130, 33),
    (40, 2, 3, 48, 65),
    (70, 2, 2, 100, 20),
    (130, 4, 6, 33, 70),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_odd_sizes(sizes, dtype, threads):
    for skew in (False, True):
        if skew and sizes[1] > 2:
            continue
        args, kwargs = case(*sizes, dtype, skew=skew)
        check(ops.moe_experts, args, {**kwargs, "activation": "silu"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations(activation, dtype):
    args, kwargs = case(9, 2, 3, 40, 24, dtype, biases=True)
    check(ops.moe_experts, args, {**kwargs, "activation": activation})


@pytest.mark.parametrize("op", [ops.moe_experts, ops.moe_experts_portable], ids=["kernel", "portable"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [2, 60])
def test_gpt_oss(tokens, dtype, op):
    args, kwargs = case(tokens, 2, 3, 40, 21, dtype, biases=True)
    check(op, args, {**kwargs, **OSS, "activation": "silu"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES[::2], ids=str)
def test_portable(sizes, dtype):
    args, kwargs = case(*sizes, dtype)
    check(ops.moe_experts_portable, args, {**kwargs, "activation": "silu"})


@pytest.mark.parametrize("op", [ops.moe_experts, ops.moe_experts_portable], ids=["kernel", "portable"])
def test_ids_of_other_ranks_contribute_nothing(op):
    (x, weights, ids, up, down), _ = case(7, 2, 3, 24, 16, torch.bfloat16)
    ids[0], ids[1, 0], ids[2, 1], ids[3, 0] = -1, 3, -7, 2**31 - 1
    check(op, (x, weights, ids, up, down), {"activation": "silu"})
    assert (op(x, weights, ids, up, down, activation="silu")[0] == 0).all()
    check(op, (x, weights, torch.full_like(ids, -1), up, down), {"activation": "silu"})


@pytest.mark.parametrize("op", [ops.moe_experts, ops.moe_experts_portable], ids=["kernel", "portable"])
def test_no_tokens(op):
    args, _ = case(0, 2, 3, 24, 16, torch.bfloat16)
    assert op(*args, activation="silu").shape == (0, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_poisoned_token_stays_alone(dtype):
    (x, weights, ids, up, down), _ = case(40, 2, 3, 48, 20, dtype)
    sound = ops.moe_experts(x, weights, ids, up, down, activation="silu")
    x = x.clone()
    x[5] = float("nan")
    got = ops.moe_experts(x, weights, ids, up, down, activation="silu")
    assert got[5].isnan().all()
    others = torch.arange(40) != 5
    assert torch.equal(got[others], sound[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layouts(dtype):
    (x, weights, ids, up, down), _ = case(9, 2, 3, 40, 24, dtype)
    given = (
        torch.cat([x, x], 1)[:, 40:],
        weights.t().contiguous().t().to(torch.bfloat16),
        ids.long(),
        torch.cat([up, up], 2)[:, :, :40],
        down.transpose(1, 2).contiguous().transpose(1, 2),
    )
    check(ops.moe_experts, given, {"activation": "silu"})


def test_bad_arguments_are_named():
    (x, weights, ids, up, down), _ = case(4, 2, 3, 24, 16, torch.bfloat16)
    with pytest.raises(ValueError, match="must be"):
        ops.moe_experts(x, weights, ids, up[:, :-1], down, activation="silu")
    with pytest.raises(ValueError, match="activation must be"):
        ops.moe_experts(x, weights, ids, up, down, activation="tanh")
    with pytest.raises(ValueError, match="a bias must be"):
        ops.moe_experts(x, weights, ids, up, down, activation="silu", b_down=x)
    with pytest.raises(ValueError, match="scoring must be"):
        ops.moe_gate(x, None, top_k=2, scoring="relu", normalize=True)


GATE = SPECS["moe_gate"]
ROUTERS = [
    {"top_k": 4, "scoring": "softmax", "normalize": True},
    {"top_k": 1, "scoring": "softmax", "normalize": False},
    {"top_k": 16, "scoring": "sigmoid", "normalize": True, "eps": 0.0},
    {"top_k": 3, "scoring": "sigmoid", "normalize": True, "scale": 2.5, "n_group": 4, "topk_group": 2},
    {"top_k": 4, "scoring": "topk_softmax", "normalize": False},
    {"top_k": 3, "scoring": "sigmoid", "normalize": True, "sorted": False},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("options", ROUTERS, ids=str)
def test_gate(options, biased, dtype, threads):
    g = torch.Generator().manual_seed(0)
    for tokens in (0, 1, 5, 700):
        rows = [torch.randperm(16, generator=g) for _ in range(tokens)]
        logits = (torch.stack(rows).to(dtype) if rows else torch.empty(0, 16, dtype=dtype)) / 4 - 2
        bias = torch.randperm(16, generator=g) / 100 if biased else None
        if tokens == 0:
            assert ops.moe_gate(logits, bias, **options)[0].shape == (0, options["top_k"])
            continue
        found = GATE.judge(ops.moe_gate(logits, bias, **{**options, "sorted": True}), logits, bias,
                           **{**options, "sorted": True})  # fmt: skip
        assert found is None, found
        assert torch.equal(
            *(ops.moe_gate(logits, bias, **{**options, "sorted": s})[1].sort()[0] for s in (True, False))
        )


def test_a_row_of_nan_gives_nan_and_sound_ids():
    logits = torch.randn(3, 8)
    logits[1] = float("nan")
    weights, ids = ops.moe_gate(logits, None, top_k=2, scoring="softmax", normalize=True)
    assert weights[1].isnan().all() and not weights[0].isnan().any() and ((ids >= 0) & (ids < 8)).all()
