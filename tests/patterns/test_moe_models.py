"""Mixtures of experts of transformers: one graph, a router and a set of experts per sparse layer, eager's results."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from ascend_dynamo import hf
from ascend_dynamo.backend import Backend

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import _models

tf.logging.set_verbosity_error()
BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "pad_token_id": 0,
}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
# Every match is run against what it replaces.
OPTIONS = {"target": "reference", "validate": True, "strict": True}
# model_type: (what differs from BASE, how many of the two layers are sparse)
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "mixtral": ({"num_local_experts": 6}, 2),
    "qwen2_moe": ({"num_experts": 6, "shared_expert_intermediate_size": 32, "norm_topk_prob": False}, 2),
    "qwen3_moe": ({"num_experts": 6, "head_dim": 32, "norm_topk_prob": True}, 2),
    "olmoe": ({"num_experts": 6}, 2),
    "deepseek_v2": (
        {
            **LATENT,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "first_k_dense_replace": 1,
        },
        1,
    ),
    "deepseek_v3": ({**LATENT, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}, 1),
    "glm4_moe": ({"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}, 1),
    "gpt_oss": ({"num_local_experts": 6, "head_dim": 32, "intermediate_size": 32}, 2),
}


def make(name: str, dtype: torch.dtype) -> Any:
    """The model with weights large enough that routing differs between tokens, and biases that are not zero."""
    torch.manual_seed(0)
    config = tf.AutoConfig.for_model(name, **{**BASE, **FAMILIES[name][0]})
    model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for key, p in (*model.named_parameters(), *model.named_buffers()):
            if p.dim() >= 2:
                p.normal_(0, p.shape[-1] ** -0.5)
            elif "bias" in key or "sinks" in key:
                p.normal_(0, 0.1)
    return model.requires_grad_(False)


def run(model: Any, tokens: torch.Tensor, backend: Backend) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        torch._dynamo.reset()
        return torch.compile(model, backend=backend)(tokens, use_cache=False).logits, expected


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, dtype):
    backend = Backend(OPTIONS)
    got, expected = run(make(name, dtype), torch.randint(1, 128, (2, 5)), backend)
    fired = Counter(f.pattern for f in backend.records[0].fired)
    sparse = FAMILIES[name][1]
    assert len(backend.records) == 1 and fired["moe_gate"] == fired["moe_experts"] == sparse
    # in bfloat16 one token that another rounding sends to another expert may differ; most must not
    off = (got - expected).abs().amax(-1) / expected.abs().max()
    assert (off < (1e-4 if dtype == torch.float32 else 5e-2)).float().mean() > (0.99 if dtype == torch.float32 else 0.7)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_both_ways_of_running_experts(implementation):
    model = make("qwen3_moe", torch.bfloat16)
    model.set_experts_implementation(implementation)
    backend = Backend(OPTIONS)
    got, expected = run(model, torch.randint(1, 128, (1, 7)), backend)
    assert backend.records[0].count("moe_experts") == 2
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-2 * expected.abs().max().item())


@pytest.mark.slow
def test_the_loop_over_experts_breaks_the_graph_unless_it_is_exchanged():
    model = make("qwen3_moe", torch.float32)
    model.set_experts_implementation("eager")
    backend = Backend({"target": "reference"})
    run(model, torch.randint(1, 128, (1, 5)), backend)
    assert len(backend.records) > 1
    assert hf.use_grouped_experts(model) and not hf.use_grouped_experts(model)
    backend = Backend({"target": "reference"})
    got, expected = run(model, torch.randint(1, 128, (1, 5)), backend)
    assert len(backend.records) == 1 and backend.records[0].count("moe_experts") == 2
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-q3moe", "tiny-ds3"])
def test_other_prompts_are_routed_otherwise_by_the_same_graph(name):
    model = _models.build(name, check=False)
    sparse = sum(hasattr(layer.mlp, "experts") for layer in model.model.layers)
    backend = Backend({"target": "reference"})
    compiled = torch.compile(model, backend=backend)
    for seed in range(3):
        tokens = _models.token_ids(512, 1, 6, seed)
        with torch.no_grad():
            expected = model(tokens, use_cache=False).logits
            got = compiled(tokens, use_cache=False).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=5e-2 * expected.abs().max().item())
    assert len(backend.records) == 1
    assert backend.records[0].count("moe_gate") == backend.records[0].count("moe_experts") == sparse > 0
    # the shared expert of DeepSeek, and the dense layer, are gated MLPs of their own
    assert backend.records[0].count("swiglu") == (2 if name == "tiny-ds3" else 0)
