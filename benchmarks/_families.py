"""The model families of ``coverage.py``: which model stands for each, and how much there is to fuse in it.

What is expected follows from the configuration by the formulas below, never from what an earlier run has found. Counts
are of one forward call: ``stage`` is "prefill" (a whole prompt; encoders too) or "decode" (one token, caches filled).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Counts:
    """How often each thing is computed; None: not said, whatever is found is shown.

    ``attention``: softmax attentions. ``norms``: RMS and layer norms. ``residual``: those of them that read a residual
    sum (at least: a first norm may take in the sum of token and position embeddings too). ``rotary``: tensors that are
    rotated (queries and keys of a layer: two). ``gated``: activation(gate) * up outside the routed experts. ``qkv``:
    linears of an attention that share their input with another one, counted one by one. ``gate``: routers.
    ``experts``: blocks of routed experts.
    """

    attention: int | None = 0
    norms: int | None = 0
    residual: int | None = 0
    rotary: int | None = 0
    gated: int | None = 0
    qkv: int | None = 0
    gate: int | None = 0
    experts: int | None = 0

    def items(self) -> list[tuple[str, int | None]]:
        return list(asdict(self).items())


KINDS = tuple(Counts.__dataclass_fields__)
UNSAID = Counts(*[None] * len(KINDS))
Formula = Callable[[Any, str], Counts]


@dataclass(frozen=True)
class Family:
    """``model``: a name of ``_models``. ``inputs``: what it reads (see ``_coverage_inputs``). ``exempt``: the committed
    counterexample that shows why a rewrite would change its values."""

    model: str
    expected: Formula
    inputs: str = "text"
    exempt: str = ""
    required: bool = True


def llama(c: Any, stage: str) -> Counts:
    """Two norms a layer and the last; all but the very first read a residual sum."""
    n = c.num_hidden_layers
    return Counts(attention=n, norms=2 * n + 1, residual=2 * n, rotary=2 * n, gated=n, qkv=3 * n)


def qwen3(c: Any, stage: str) -> Counts:
    """And a norm for the heads of the queries and one for those of the keys."""
    return replace(llama(c, stage), norms=4 * c.num_hidden_layers + 1)


def mixtral(c: Any, stage: str) -> Counts:
    """Routed experts in place of every MLP."""
    n = c.num_hidden_layers
    return replace(llama(c, stage), gated=0, gate=n, experts=n)


def qwen2_moe(c: Any, stage: str) -> Counts:
    """Every layer has routed experts and a shared one, which is a gated MLP."""
    n = c.num_hidden_layers
    return replace(llama(c, stage), gate=n, experts=n)


def qwen3_moe(c: Any, stage: str) -> Counts:
    n = c.num_hidden_layers
    return replace(qwen3(c, stage), gated=0, gate=n, experts=n)


def deepseek(c: Any, stage: str) -> Counts:
    """Norms of both latents (of the queries' only with q_lora). The projection of the queries, or of their latent, and
    that of the keys' and values' latent read one tensor. A gated MLP is the dense layers' and the shared experts'."""
    n, sparse = c.num_hidden_layers, c.num_hidden_layers - c.first_k_dense_replace
    latents = (2 if c.q_lora_rank else 1) * n
    return replace(llama(c, stage), norms=2 * n + 1 + latents, qkv=2 * n, gate=sparse, experts=sparse)


def gemma2(c: Any, stage: str) -> Counts:
    """Norms before and after attention and MLP; those after read no sum, they feed one."""
    return replace(llama(c, stage), norms=4 * c.num_hidden_layers + 1)


def gemma3(c: Any, stage: str) -> Counts:
    return replace(llama(c, stage), norms=6 * c.num_hidden_layers + 1)


def glm4_moe(c: Any, stage: str) -> Counts:
    """The shared expert of a sparse layer is a gated MLP, like the dense layers' own."""
    n, sparse = c.num_hidden_layers, c.num_hidden_layers - c.first_k_dense_replace
    heads = 2 * n if c.use_qk_norm else 0
    return replace(llama(c, stage), norms=2 * n + 1 + heads, gate=sparse, experts=sparse)


def phi3(c: Any, stage: str) -> Counts:
    """One projection makes queries, keys and values: nothing to merge."""
    return replace(llama(c, stage), qkv=0)


def gpt2(c: Any, stage: str) -> Counts:
    """Learned positions, one projection, an MLP without a gate."""
    n = c.num_hidden_layers
    return Counts(attention=n, norms=2 * n + 1, residual=2 * n)


def gpt_neox(c: Any, stage: str) -> Counts:
    """Attention and MLP side by side: one sum per layer, read by both norms of the next, of which one can take it."""
    n = c.num_hidden_layers
    sums = n if c.use_parallel_residual else 2 * n
    return Counts(attention=n, norms=2 * n + 1, residual=sums, rotary=2 * n)


def gptj(c: Any, stage: str) -> Counts:
    """Attention and MLP side by side behind one norm."""
    n = c.num_hidden_layers
    return Counts(attention=n, norms=n + 1, residual=n, rotary=2 * n, qkv=3 * n)


def olmo2(c: Any, stage: str) -> Counts:
    """Norms of queries and keys, and after attention and MLP; only the last one of the model reads a residual sum."""
    return replace(llama(c, stage), norms=4 * c.num_hidden_layers + 1, residual=1)


def falcon(c: Any, stage: str) -> Counts:
    """7B: attention and MLP side by side behind one norm, one projection."""
    assert c.parallel_attn and not c.new_decoder_architecture
    n = c.num_hidden_layers
    return Counts(attention=n, norms=n + 1, residual=n, rotary=2 * n)


def bloom(c: Any, stage: str) -> Counts:
    """A norm of the embeddings comes first, and the first layer's norm reads it without a sum."""
    n = c.num_hidden_layers
    return Counts(attention=n, norms=2 * n + 2, residual=2 * n)


def opt(c: Any, stage: str) -> Counts:
    return replace(gpt2(c, stage), qkv=3 * c.num_hidden_layers)


def bert(c: Any, stage: str) -> Counts:
    """Norms after the sums; one more of the embeddings."""
    n = c.num_hidden_layers
    return Counts(attention=n, norms=2 * n + 1, residual=2 * n, qkv=3 * n)


def vit(c: Any, stage: str) -> Counts:
    return opt(c, stage)


def clip(c: Any, stage: str) -> Counts:
    """The vision tower has a norm of the embeddings, which its first layer reads, and the last one reads a single
    position of the sum."""
    t, v = c.text_config.num_hidden_layers, c.vision_config.num_hidden_layers
    norms, sums = (2 * t + 1) + (2 * v + 2), 2 * t + (2 * v - 1)
    return Counts(attention=t + v, norms=norms, residual=sums, qkv=3 * (t + v))


def t5(c: Any, stage: str) -> Counts:
    """Self attention in both stacks, cross attention in the decoder. The keys and values of all cross attentions read
    the encoder's output; they are made in the first call only."""
    e, d = c.num_layers, c.num_decoder_layers
    gated = c.is_gated_act
    decoder = Counts(attention=2 * d, norms=3 * d + 1, residual=3 * d, gated=gated * d, qkv=3 * d)
    if stage == "decode":
        return decoder
    return Counts(
        attention=e + 2 * d,
        norms=2 * e + 1 + 3 * d + 1,
        residual=2 * e + 3 * d,
        gated=gated * (e + d),
        qkv=3 * e + 3 * d + 2 * d,
    )


def whisper(c: Any, stage: str) -> Counts:
    """As T5, without gates. The projection of the keys has no bias, the others have one."""
    e, d = c.encoder_layers, c.decoder_layers
    if stage == "decode":
        return Counts(attention=2 * d, norms=3 * d + 1, residual=3 * d, qkv=3 * d)
    return Counts(attention=e + 2 * d, norms=2 * e + 1 + 3 * d + 1, residual=2 * e + 3 * d, qkv=3 * e + 3 * d + 2 * d)


def unsaid(c: Any, stage: str) -> Counts:
    """Whatever is found; the run must be correct."""
    return UNSAID


FAMILIES: Mapping[str, Family] = {
    "llama": Family("tiny-llama", llama),
    "mistral": Family("tiny-mistral", llama),
    "mixtral": Family("tiny-mixtral", mixtral),
    "qwen2": Family("tiny-qwen2", llama),
    "qwen2-moe": Family("tiny-q2moe", qwen2_moe),
    "qwen3": Family("tiny-qwen3", qwen3),
    "qwen3-moe": Family("tiny-q3moe", qwen3_moe),
    "deepseek-v2": Family("tiny-ds2", deepseek),
    "deepseek-v3": Family("tiny-ds3", deepseek),
    "gemma2": Family("tiny-gemma2", gemma2),
    "gemma3": Family("tiny-gemma3", gemma3),
    "glm-4": Family("tiny-glm4", gemma2),  # the same places for norms
    "glm-4-moe": Family("tiny-glm4moe", glm4_moe),
    "phi-3": Family("tiny-phi3", phi3),
    "gpt-2": Family("tiny-gpt2", gpt2),
    "gpt-neox": Family("tiny-gptneox", gpt_neox),
    "gpt-j": Family("tiny-gptj", gptj),
    "gpt-oss": Family("tiny-gptoss", mixtral),
    "olmo2": Family("tiny-olmo2", olmo2),
    "falcon": Family("tiny-falcon", falcon),
    "bloom": Family("tiny-bloom", bloom),
    "opt": Family("tiny-opt", opt),
    "bert": Family("tiny-bert", bert, "encoder"),
    "roberta": Family("tiny-roberta", bert, "encoder"),
    "t5": Family("tiny-t5", t5, "seq2seq"),
    "vit": Family("tiny-vit", vit, "image"),
    "clip": Family("tiny-clip", clip, "clip"),
    "whisper": Family("tiny-whisper", whisper, "audio"),
    "qwen3-next": Family("tiny-qwen3next", unsaid, required=False),
    "deberta-v2": Family("tiny-deberta", unsaid, "encoder", required=False),
    "swin": Family("tiny-swin", unsaid, "image", required=False),
    "llava": Family("tiny-llava", unsaid, "vlm", required=False),
}
