"""Layers of real model families: how often each fusion fires follows from the config, and every match is validated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf

from ascend_dynamo.backend import Backend

tf.logging.set_verbosity_error()
L = 2
TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 5e-2,
}  # of the largest logit; each match has its own, tight, validation
SMALL = {"vocab_size": 128, "num_hidden_layers": L, "max_position_embeddings": 64, "pad_token_id": 0}
LLAMA = SMALL | {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
BERT = {
    "vocab_size": 128,
    "num_hidden_layers": L,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_attention_heads": 2,
}
GPT2 = {"vocab_size": 128, "n_layer": L, "n_embd": 128, "n_head": 2, "n_positions": 64}
T5 = {"vocab_size": 128, "num_layers": L, "d_model": 128, "d_kv": 64, "d_ff": 96, "num_heads": 2}
NEOX = SMALL | {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 2, "rotary_pct": 0.25}
DEEPSEEK = SMALL | {
    "hidden_size": 128,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
}


@dataclass(frozen=True)
class Family:
    """A config, and what must fire: names of patterns with counts, attention aside, which is L times ``attention``."""

    config: type
    options: dict[str, Any]
    fires: dict[str, int]
    attention: int = L
    model: Callable[..., Any] = tf.AutoModelForCausalLM.from_config


def llama(**changes: int) -> dict[str, int]:
    """Two norms a layer and the last one; all but the first follow a residual add; QKV and gate/up merge."""
    counts = {"rms_norm": 2 * L + 1, "add_rms_norm": 2 * L, "rotary": 2 * L, "merge_linears": 2 * L, "swiglu": L}
    return {name: n for name, n in (counts | changes).items() if n}


FAMILIES = {
    "llama": Family(tf.LlamaConfig, LLAMA | {"head_dim": 64}, llama()),
    # a norm for queries and one for keys
    "qwen3": Family(tf.Qwen3Config, LLAMA | {"head_dim": 64}, llama(rms_norm=4 * L + 1)),
    # four norms a layer, of which two follow an add; GeGLU
    "gemma2": Family(
        tf.Gemma2Config,
        LLAMA | {"head_dim": 64, "sliding_window": 8},
        llama(rms_norm=4 * L + 1, swiglu=0, gelu_mul=L),
    ),
    # one projection for QKV and one for gate and up
    "phi3": Family(tf.Phi3Config, LLAMA, llama(merge_linears=0)),
    # experts are stacked: no gate and up to merge
    "mixtral": Family(
        tf.MixtralConfig,
        LLAMA | {"num_local_experts": 4},
        llama(merge_linears=L, swiglu=0, moe_gate=L, moe_experts=L),
    ),
    # norms of both latents; their two projections merge; dense and shared experts have gate and up
    "deepseek_v3": Family(
        tf.DeepseekV3Config,
        DEEPSEEK,
        llama(rms_norm=4 * L + 1, rotary=0, rotary_halves=2 * L, moe_gate=L - 1, moe_experts=L - 1),
    ),
    # parallel residual: one add for both norms of the next layer, and one for the last norm
    "gpt_neox": Family(tf.GPTNeoXConfig, NEOX, {"add_layer_norm": L, "rotary": 2 * L, "rotary_partial": 2 * L}),
    # the position embedding broadcasts, so the first norm stands alone
    "gpt2": Family(tf.GPT2Config, GPT2, {"add_layer_norm": 2 * L, "gelu_tanh": L}),
    "bert": Family(tf.BertConfig, BERT, {"add_layer_norm": 2 * L, "merge_linears": L}, model=tf.AutoModel.from_config),
    # encoder and decoder; the cross attentions' keys and values of all layers read one tensor and merge into one linear
    "t5": Family(
        tf.T5Config,
        T5,
        {"rms_norm": 5 * L + 2, "add_rms_norm": 5 * L, "merge_linears": 2 * L + 1},
        attention=3 * L,
        model=tf.AutoModel.from_config,
    ),
}


def compare(
    family: Family,
    implementation: str,
    dtype: torch.dtype,
    lengths: tuple[int, ...] = (9,),
    dynamic: bool | None = None,
) -> Counter[str]:
    """What fires in the one compilation that serves all ``lengths``; results must be eager's, within the dtype."""
    torch.manual_seed(0)
    model = family.model(family.config(**family.options), attn_implementation=implementation, dtype=dtype).eval()
    backend = Backend({"target": "reference", "validate": True, "strict": True})
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    for length in lengths:
        inputs: dict[str, Any] = {"input_ids": torch.randint(1, 128, (2, length))}
        if family.config is tf.T5Config:
            inputs["decoder_input_ids"] = torch.randint(1, 128, (2, length - 2))
        if family.config is not tf.BertConfig:
            inputs["use_cache"] = False
        with torch.no_grad():
            expected = model(**inputs)[0]
            result = compiled(**inputs)[0]
        error = (result.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert result.dtype == dtype and error < TOLERANCE[dtype]
    assert len(backend.records) == 1
    return Counter(f.pattern for f in backend.records[0].fired)


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "dtype"), [("eager", torch.float32), ("sdpa", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_counts_follow_from_the_config(name, implementation, dtype):
    family = FAMILIES[name]
    if name == "gemma2":
        implementation = "eager"  # transformers has no sdpa with a softcap
    attention = "eager_attention" if implementation == "eager" else "sdpa"
    assert compare(family, implementation, dtype) == family.fires | {attention: family.attention}


@pytest.mark.slow
def test_eager_half_precision_fuses_as_well():
    family = FAMILIES["llama"]
    assert compare(family, "eager", torch.bfloat16) == family.fires | {"eager_attention": family.attention}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "implementation"), [("qwen3", "eager"), ("deepseek_v3", "sdpa"), ("gpt_neox", "eager")]
)
def test_symbolic_sizes_change_nothing(name, implementation):
    family = FAMILIES[name]
    attention = "eager_attention" if implementation == "eager" else "sdpa"
    fired = compare(family, implementation, torch.float32, lengths=(9, 13, 21), dynamic=True)
    assert fired == family.fires | {attention: family.attention}
