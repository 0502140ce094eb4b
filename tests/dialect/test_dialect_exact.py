"""Bit for bit what models write: Llama's and Gemma's norms, aten's norms, transformers' rotary, routers, experts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ascend_dynamo.dialect.equal import agree_choice, bitwise

ops = torch.ops.ascend
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(dtype):
    return torch.randn(4, 33, 80).to(dtype), torch.randn(80).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(dtype):
    x, w = inputs(dtype)
    wide = x.float()
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert bitwise(ops.rms_norm(x, w, 1e-6, cast_before_weight=True), w * n.to(dtype)) is None  # Llama, Qwen
    gemma = (n * (1.0 + w.float())).to(dtype)
    assert bitwise(ops.rms_norm(x, w, 1e-6, weight_offset=1.0), gemma) is None
    assert bitwise(ops.rms_norm(x, w, 1e-6), F.rms_norm(x, (80,), w, 1e-6)) is None
    t5 = x * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)  # only the variance is upcast
    t5 = w * (t5.to(dtype) if dtype != torch.float32 else t5)
    assert bitwise(ops.rms_norm(x, w, 1e-6, cast_before_weight=True), t5) is None
    mixed = w.float() * n.to(dtype)
    assert bitwise(ops.rms_norm(x, w.float(), 1e-6, cast_before_weight=True, out=torch.float32), mixed) is None
    if dtype == torch.bfloat16:  # the two orders are different functions
        assert bitwise(ops.rms_norm(x, w, 1e-6, cast_before_weight=True), F.rms_norm(x, (80,), w, 1e-6)) is not None
    double = F.rms_norm(x.double(), (80,), w.double(), 1e-6)
    assert bitwise(ops.rms_norm(x.double(), w.double(), 1e-6, compute=torch.float64), double) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_norms_round_the_sum_first(dtype):
    x, w = inputs(dtype)
    r, b = torch.randn_like(x), torch.randn_like(w)
    h = x + r
    y, new = ops.add_rms_norm(x, r, w, 1e-6, cast_before_weight=True)
    assert bitwise((y, new), (ops.rms_norm(h, w, 1e-6, cast_before_weight=True), h)) is None
    y, new = ops.add_layer_norm(x, r, w, b, 1e-5)
    assert bitwise((y, new), (F.layer_norm(h, (80,), w, b, 1e-5), h)) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(dtype):
    x, y = torch.randn(5, 16).to(dtype), torch.randn(5, 16).to(dtype)
    for approximate in ("none", "tanh"):
        g = F.gelu(x, approximate=approximate)
        assert bitwise(ops.gelu_add(x, y, approximate=approximate), g + y) is None
        assert bitwise(ops.gelu_mul(x, y, approximate=approximate), g * y) is None
        biased = F.gelu(x + y[0], approximate=approximate)
        assert bitwise(ops.bias_gelu(x, y[0], approximate=approximate), biased) is None
    merged = torch.cat((x, y), -1)
    gate, up = merged.chunk(2, dim=-1)  # halves of one tensor: aten's silu rounds by strides, in one bit
    assert bitwise(ops.swiglu(merged), F.silu(gate) * up) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_of_transformers(dtype):
    from transformers.models.cohere import modeling_cohere as cohere
    from transformers.models.llama import modeling_llama as llama

    q, k = torch.randn(2, 4, 7, 16).to(dtype), torch.randn(2, 2, 7, 16).to(dtype)
    angles = torch.randn(2, 7, 8)
    half, twice = torch.cat((angles, angles), -1), angles.repeat_interleave(2, -1)
    for module, table, interleaved in ((llama, half, False), (cohere, twice, True)):
        cos, sin = table.cos().to(dtype), table.sin().to(dtype)
        wanted = module.apply_rotary_pos_emb(q, k, cos, sin)
        # Cohere rotates in float32 and casts back; the operator rotates in what it is given
        up = (lambda t: t.float()) if module is cohere else (lambda t: t)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        got = tuple(ops.rotary(up(t), cos, sin, interleaved=interleaved).to(dtype) for t in (q, k))
        assert bitwise(got, tuple(wanted)) is None


def test_rotary_in_complex_form():
    x, angles = torch.randn(2, 5, 3, 8), torch.randn(5, 1, 4)
    z = torch.view_as_complex(x.reshape(2, 5, 3, 4, 2)) * torch.polar(torch.ones_like(angles), angles)
    cos, sin = (t.repeat_interleave(2, -1) for t in (angles.cos(), angles.sin()))
    torch.testing.assert_close(ops.rotary(x, cos, sin, interleaved=True), torch.view_as_real(z).flatten(-2))


def test_router_and_experts_of_deepseek_v3_and_qwen3():
    from transformers import DeepseekV3Config, Qwen3MoeConfig
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
    from transformers.models.qwen3_moe import modeling_qwen3_moe as q3

    x = torch.randn(9, 32)
    config = DeepseekV3Config(
        hidden_size=32, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, moe_intermediate_size=8
    )
    router = v3.DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.e_score_correction_bias, std=0.1)
    logits, weights, ids = router(x)
    options = {"top_k": 4, "scoring": "sigmoid", "n_group": 4, "topk_group": 2, "normalize": True}
    got_weights, got_ids = ops.moe_gate(
        logits, router.e_score_correction_bias, **options, scale=router.routed_scaling_factor
    )
    assert agree_choice(got_ids, ids, logits.double().sigmoid() + router.e_score_correction_bias, 0.0) is None
    order, wanted_order = got_ids.long().argsort(-1), ids.argsort(-1)
    torch.testing.assert_close(got_weights.gather(-1, order), weights.gather(-1, wanted_order))

    config = Qwen3MoeConfig(hidden_size=32, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=8)
    gate, experts = q3.Qwen3MoeTopKRouter(config), q3.Qwen3MoeExperts(config)
    for parameter in (gate.weight, experts.gate_up_proj, experts.down_proj):
        torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        logits, weights, ids = gate(x)
        got = ops.moe_gate(logits, None, top_k=2, scoring="softmax", normalize=bool(gate.norm_topk_prob))
        assert bitwise(got, (weights, ids.to(torch.int32))) is None
        wanted = experts(x, ids, weights)
        got = ops.moe_experts(x, weights, got[1], experts.gate_up_proj, experts.down_proj, activation="silu")
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
