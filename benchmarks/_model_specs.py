"""The configurations of the models of ``_models``: real sizes by name, and ``tiny-*``, small ones of every family.

``tiny-*`` have two layers (or the fewest that show each kind of layer), the family's real head size, and a small
vocabulary and width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Spec:
    """One model: transformers' ``model_type``, the configuration, and how its random weights are scaled.

    ``attention`` multiplies the initial q/k projections and their norms, ``values`` the v/o projections, ``head`` the
    output head. ``eager_only`` marks a family that transformers cannot run through SDPA (softcapped scores, sinks).
    ``auto`` names the class that makes the model (default: by ``causal``).
    """

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    attention: float = 3.0  # deep models take 1 for both: more makes them chaotic, and rounding is all one sees
    values: float = 4.0
    head: float = 1.0
    eager_only: bool = False
    auto: str = ""

    @property
    def factory(self) -> str:
        return self.auto or ("AutoModelForCausalLM" if self.causal else "AutoModel")


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


_TINY = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT = {"vocab_size": 512, "n_positions": 2048, "n_layer": 2, "tie_word_embeddings": False, **_IDS}
_ENCODER = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_MLA = {
    "q_lora_rank": 384,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 512,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}

SPECS: dict[str, Spec] = {
    "qwen3-0.6b": Spec(
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "rope_parameters": _rope(1e6),
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        },
        attention=1.0,
        values=1.0,
    ),
    "ds3-small": Spec(
        "deepseek_v3",
        {
            "vocab_size": 32000,
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 40960,
            "n_routed_experts": 32,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": _rope(1e4),
            **_MLA,
        },
        attention=1.0,
        values=1.0,
    ),
    "q3moe-small": Spec(
        "qwen3_moe",
        {
            "vocab_size": 32000,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 512,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
            "rope_parameters": _rope(1e6),
        },
        attention=1.5,
        values=1.0,
    ),
    "bert-base": Spec("bert", {}, dtype=torch.float32, causal=False),
    "bert-long": Spec("bert", {"max_position_embeddings": 32768}, dtype=torch.float32, causal=False),
    "tiny-llama": Spec("llama", {**_TINY, "head_dim": 128, "rope_parameters": _rope(5e5)}),
    "tiny-mistral": Spec("mistral", {**_TINY, "head_dim": 128, "sliding_window": 64, "rope_parameters": _rope(1e6)}),
    "tiny-qwen2": Spec("qwen2", {**_TINY, "hidden_size": 512, "rope_parameters": _rope(1e6)}),
    "tiny-qwen3": Spec("qwen3", {**_TINY, "head_dim": 128, "rope_parameters": _rope(1e6)}),
    "tiny-gemma": Spec("gemma", {**_TINY, "head_dim": 256, "rope_parameters": _rope(1e4)}),
    "tiny-gemma2": Spec(
        "gemma2",
        {**_TINY, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 64, "rope_parameters": _rope(1e4)},
        eager_only=True,
    ),
    "tiny-phi3": Spec("phi3", {**_TINY, "hidden_size": 384, "rope_parameters": _rope(1e4)}),
    "tiny-olmo2": Spec("olmo2", {**_TINY, "hidden_size": 512, "rope_parameters": _rope(5e5)}),
    "tiny-granite": Spec("granite", {**_TINY, "rope_parameters": _rope(1e4)}),
    "tiny-glm4": Spec("glm4", {**_TINY, "head_dim": 128, "rope_parameters": _rope(1e4, partial_rotary_factor=0.5)}),
    "tiny-ds3": Spec(
        "deepseek_v3",
        {
            **_TINY,
            **_MLA,
            "q_lora_rank": 96,
            "kv_lora_rank": 128,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 128,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "rope_parameters": _rope(1e4),
        },
    ),
    "tiny-q3moe": Spec(
        "qwen3_moe",
        {
            **_TINY,
            "head_dim": 128,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "norm_topk_prob": True,
            "rope_parameters": _rope(1e6),
        },
    ),
    "tiny-bert": Spec("bert", _ENCODER, dtype=torch.float32, causal=False),
    "tiny-mixtral": Spec(
        "mixtral",
        {**_TINY, "head_dim": 128, "num_local_experts": 8, "num_experts_per_tok": 2, "rope_parameters": _rope(1e6)},
    ),
    "tiny-q2moe": Spec(
        "qwen2_moe",
        {
            **_TINY,
            "hidden_size": 512,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 256,
            "rope_parameters": _rope(1e6),
        },
    ),
    "tiny-ds2": Spec(
        "deepseek_v2",
        {
            **_TINY,
            **_MLA,
            "q_lora_rank": 96,
            "kv_lora_rank": 128,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 128,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,
            "rope_parameters": _rope(1e4),
        },
    ),
    "tiny-gemma3": Spec(
        "gemma3_text",
        {
            **_TINY,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"sliding_attention": _rope(1e4), "full_attention": _rope(1e6)},
        },
    ),
    "tiny-glm4moe": Spec(
        "glm4_moe",
        {
            **_TINY,
            "head_dim": 128,
            "attention_bias": True,
            "use_qk_norm": True,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "rope_parameters": _rope(1e6, partial_rotary_factor=0.5),
        },
    ),
    "tiny-gptoss": Spec(
        "gpt_oss",
        {
            **_TINY,
            "head_dim": 64,
            "intermediate_size": 128,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": _rope(1.5e5),
        },
        eager_only=True,
    ),
    "tiny-gpt2": Spec("gpt2", {**_GPT, "n_embd": 256, "n_head": 4}),
    "tiny-gptj": Spec("gptj", {**_GPT, "n_embd": 512, "n_head": 2, "rotary_dim": 64}, eager_only=True),
    "tiny-gptneox": Spec("gpt_neox", {**_TINY, "rope_parameters": _rope(1e4, partial_rotary_factor=0.25)}),
    "tiny-falcon": Spec(
        "falcon", {**_TINY, "multi_query": True, "parallel_attn": True, "bias": False, "rope_parameters": _rope(1e4)}
    ),
    "tiny-bloom": Spec(
        "bloom",
        {"vocab_size": 512, "hidden_size": 256, "n_layer": 2, "n_head": 4, "tie_word_embeddings": False, **_IDS},
        eager_only=True,
    ),
    "tiny-opt": Spec("opt", {**_TINY, "ffn_dim": 512, "word_embed_proj_dim": 256}),
    "tiny-roberta": Spec("roberta", {**_ENCODER, "type_vocab_size": 1}, dtype=torch.float32, causal=False),
    "tiny-deberta": Spec(
        "deberta-v2",
        {
            **_ENCODER,
            "relative_attention": True,
            "position_buckets": 32,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
        dtype=torch.float32,
        causal=False,
        eager_only=True,
    ),
    "tiny-t5": Spec(
        "t5",
        {
            "vocab_size": 512,
            "d_model": 256,
            "d_kv": 64,
            "num_heads": 4,
            "d_ff": 512,
            "num_layers": 2,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
            "tie_word_embeddings": False,
        },
        causal=False,
        auto="AutoModelForSeq2SeqLM",
    ),
    "tiny-whisper": Spec(
        "whisper",
        {
            "vocab_size": 512,
            "d_model": 128,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 256,
            "decoder_ffn_dim": 256,
            "max_source_positions": 64,
            "max_target_positions": 256,
            "decoder_start_token_id": 1,
            **_IDS,
        },
        causal=False,
        auto="AutoModelForSpeechSeq2Seq",
    ),
    "tiny-vit": Spec("vit", {**_ENCODER, "image_size": 64}, causal=False),
    "tiny-swin": Spec(
        "swin",
        {"image_size": 64, "embed_dim": 64, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        causal=False,
    ),
    "tiny-clip": Spec(
        "clip",
        {
            "text_config": {**_ENCODER, "max_position_embeddings": 128, **_IDS},
            "vision_config": {**_ENCODER, "image_size": 64, "patch_size": 16},
            "projection_dim": 64,
        },
        causal=False,
    ),
    "tiny-qwen3next": Spec(
        "qwen3_next",
        {
            **_TINY,
            "head_dim": 256,
            "layer_types": ["full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
            "rope_parameters": _rope(1e7, partial_rotary_factor=0.25),
        },
    ),
    "tiny-llava": Spec(
        "llava",
        {
            "image_token_index": 15,
            "text_config": {"model_type": "llama", **_TINY, "head_dim": 128, "rope_parameters": _rope(1e4)},
            "vision_config": {"model_type": "clip_vision_model", **_ENCODER, "image_size": 64, "patch_size": 16},
        },
        causal=False,
        auto="AutoModelForImageTextToText",
    ),
}
