"""Latent attention in the models of transformers: decoding with their caches, prompts, every family that has it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

from ascend_dynamo.backend import Backend

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from _models import build

tf.logging.set_verbosity_error()


def tiny(family, attention="sdpa", dtype=torch.float32, **changes):
    """One or two layers of a family with latent attention; dense, so that experts cannot break the graph."""
    layers = changes.pop("layers", 1)
    config = tf.AutoConfig.for_model(family, **(COMMON | {"num_hidden_layers": layers} | FAMILIES[family] | changes))
    config._attn_implementation = attention
    torch.manual_seed(0)
    factory = getattr(tf, type(config).__name__.replace("Config", "ForCausalLM"))
    return factory(config).eval().requires_grad_(False).to(dtype)


COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "first_k_dense_replace": 2,
}
FULL = {"layer_types": ["full_attention"], "mlp_layer_types": ["dense"]}
FAMILIES = {
    "deepseek_v2": {},
    "deepseek_v3": {},
    "deepseek_v32": {"mlp_layer_types": ["dense"], "index_head_dim": 32, "index_n_heads": 2, "index_topk": 4},
    "glm4_moe_lite": {"mlp_layer_types": ["dense"]},
    "kimi_linear": FULL,
    "minicpm3": {},
    "youtu": {},
}


def steps(model, compiled, cache, count=3):
    """Tokens fed one by one to ``model`` and to ``compiled``, with equal caches; the pairs of logits."""
    tokens = torch.randint(1, 128, (2, 6 + count), generator=torch.Generator().manual_seed(1))
    results = []
    for call in (model, compiled):
        past = cache()
        model(tokens[:, :6], past_key_values=past, use_cache=True)
        results.append(
            [call(tokens[:, i : i + 1], past_key_values=past, use_cache=True).logits for i in range(6, 6 + count)]
        )
    return zip(*results, strict=True)


def compiled_by(model):
    backend = Backend({"target": "reference", "strict": True, "validate": True}, texts=True)
    torch._dynamo.reset()
    return torch.compile(model, backend=backend), backend


PLAIN = {"q_lora_rank": None, "rope_interleave": False}


@pytest.mark.parametrize(
    ("family", "variant"),
    [*((name, {}) for name in FAMILIES), ("deepseek_v3", PLAIN)],
    ids=[*FAMILIES, "deepseek_v3_plain"],
)
@torch.no_grad()
def test_families_of_transformers(family, variant):
    model = tiny(family, **variant)
    compiled, backend = compiled_by(model)
    for want, got in steps(model, compiled, lambda: tf.DynamicCache(config=model.config), 1):
        torch.testing.assert_close(got, want)
    (record,) = backend.records
    assert record.count("mla_absorb") == record.count("flash_attention") == 1


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_decoding_with_the_caches_of_transformers(kind, attention):
    """Two layers; the second and third step must not compile for each length."""
    dtype = torch.float64 if attention == "sdpa" else torch.float32  # the eager softmax is in float32, always
    model = tiny("deepseek_v3", attention, dtype, layers=2)
    config = model.config
    cache = {
        "dynamic": lambda: tf.DynamicCache(config=config),
        "static": lambda: tf.StaticCache(config=config, max_cache_len=16),
    }[kind]
    compiled, backend = compiled_by(model)
    for want, got in steps(model, compiled, cache):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # the norms of the model compute in float32
    assert len(backend.records) <= 2
    expanded = f"{config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)}] = aten.linear"
    for record in backend.records:
        assert record.count("mla_absorb") == record.count("flash_attention") == 2
        assert expanded in record.before and expanded not in record.after
        absorbed = [f for f in record.fired if f.pattern == "mla_absorb"]
        assert all(any(a.startswith(f"kv cache ({kind})") for a in f.assumes) for f in absorbed)


@torch.no_grad()
def test_a_prompt_keeps_its_expanded_keys():
    model = tiny("deepseek_v3")
    compiled, backend = compiled_by(model)
    tokens = torch.randint(1, 128, (1, 9))
    torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)
    (record,) = backend.records
    assert record.count("mla_absorb") == 0 and record.count("flash_attention") == 1
    assert any(m.pattern == "mla_absorb" and m.code == "cost" for m in record.missed)


@torch.no_grad()
def test_real_head_sizes_and_experts():
    """``tiny-ds3`` of the benchmarks: 128 + 64 wide keys, experts, greedy tokens of a float32 model."""
    model = build("tiny-ds3", dtype=torch.float32, check=False)
    compiled, backend = compiled_by(model)
    for want, got in steps(model, compiled, lambda: tf.DynamicCache(config=model.config), 2):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
        assert torch.equal(got.argmax(-1), want.argmax(-1))
    for record in backend.records:
        assert record.count("mla_absorb") == record.count("flash_attention")
    assert backend.records[0].count("mla_absorb") == model.config.num_hidden_layers
