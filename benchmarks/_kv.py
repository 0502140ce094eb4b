"""The contenders of the KV benchmark: one decode step of a whole model, or of its attention and caches alone."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import _kv_caches as caches
import _kv_probe as probe
import _memory
import _models
import torch
from _worker import Prepared
from torch import Tensor, nn

from ascend_dynamo import hf

FULL = {"qwen3-0.6b": 28, "ds3-small": 8}
WIDE = 1 << 30  # bytes of a cache up to which the step is also computed in float32
RESET = 8  # steps between two rewinds
TRACES = 5  # steps that are looked at


@dataclass(frozen=True)
class Way:
    """One contender: which cache, and how the step is compiled ("" is eager)."""

    cache: str
    backend: str = ""


WAYS = {
    "hf-dynamic": Way("dynamic"),
    "hf-static": Way("static"),
    "inductor": Way("static", "inductor"),
    "ours-dynamic": Way("dynamic", "ascend_opt"),
    "ours-static": Way("static", "ascend_opt"),
    "ours-paged": Way("paged", "ascend_opt"),
    "ours-packed": Way("packed", "ascend_opt"),
}


@dataclass(frozen=True)
class Sizes:
    """Bytes: the smallest tensor of stored keys or values of one layer, and the largest activation of a step."""

    cache: int
    activation: int


_built: dict[str, Any] = {}  # the worker's one model, kept from row to row


def model_of(case: dict[str, Any]) -> Any:
    """The model of a row. Where layers are left out, the vocabulary shrinks with them, so that the output head keeps
    its share of a step."""
    name, layers = case["model"], case["layers"]
    key = f"{name} {layers}"
    if key not in _built:
        _built.clear()
        model = _models.build(name, dtype=torch.bfloat16, layers=layers, check=False)
        if (full := FULL.get(name, layers)) > layers:
            model.resize_token_embeddings(model.config.vocab_size * layers // full // 64 * 64)
        _built[key] = model.eval().requires_grad_(False)
    _built[key].set_attn_implementation("sdpa")
    return _built[key]


class Attention(nn.Module):
    """Every layer's cache update and attention, as transformers calls them, and nothing else.

    ``forward(q, k, v, past_key_values)``: q [B,Hq,1,D], k and v [B,Hk,1,D]; the outputs of all layers, [L,B,1,Hq,D].
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.is_causal = True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_key_values: Any) -> Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import create_causal_mask

        position = (torch.arange(1) + past_key_values.get_seq_length()).unsqueeze(0)
        mask = create_causal_mask(self.config, q[:, 0], None, past_key_values, position)
        outputs = []
        for layer in range(self.config.num_hidden_layers):
            keys, values = past_key_values.update(k + layer, v + layer, layer)
            outputs.append(sdpa_attention_forward(self, q, keys, values, mask, scaling=self.scaling)[0])
        return torch.stack(outputs)


def compiled(module: nn.Module, way: Way) -> Callable[..., Any]:
    """The module as the contender runs it."""
    if not way.backend:
        return module
    torch._inductor.config.cpp.enable_kernel_profile = True  # generated kernels are seen by the profiler, by name
    # A static cache has one graph; a dynamic one a graph of its first size and one of all sizes.
    return torch.compile(module, backend=way.backend, dynamic=False if way.cache == "static" else None)


def prepare(case: dict[str, Any], contender: str) -> Prepared:
    """Runs in the worker: a filled cache and a step, compiled, counted and probed, ready to be timed.

    Raises AssertionError if a contender that compiles did not, or compiled again once it was warm.
    """
    torch._dynamo.reset()
    way, model = WAYS[contender], model_of(case)
    batch, context = case["batch"], case["context"]
    module: nn.Module = model if case["kind"] == "step" else Attention(model.config)
    kind = Packed if way.cache == "packed" else Batch
    decoder = kind(way, compiled(module, way), model, case)
    prepared = Prepared(decoder.step, decoder.rewind, RESET)
    shape = caches.shape_of(model.config)
    smallest = batch * context * shape.heads * min(shape.keys, shape.values) * shape.itemsize
    prepared.notes = notes(decoder, way, Sizes(smallest, largest_activation(module, batch)))
    stored = batch * context * shape.token_bytes
    prepared.notes["stored"] = stored
    prepared.work = {"bytes": stored + weights(module), "flops": 0.0}
    if not way.backend and stored <= WIDE and case["kind"] == "step":
        prepared.reference = lambda: in_float32(model, way, case, arguments(case, model))
    return prepared


class Batch:
    """A batch of sequences of the same length in a transformers cache."""

    def __init__(self, way: Way, call: Callable[..., Any], model: Any, case: dict[str, Any]) -> None:
        self.call, self.context = call, case["context"]
        self.cache = caches.make(way.cache, model.config, case["batch"], self.context)
        with torch.no_grad():
            caches.fill(self.cache, model.config, case["batch"], self.context)
        self.inputs = arguments(case, model)

    def step(self) -> Tensor:
        out = self.call(*self.inputs, past_key_values=self.cache)
        return out if isinstance(out, Tensor) else out.logits

    def rewind(self) -> None:
        caches.rewind(self.cache, self.context)


class Packed:
    """As many requests over the pages of one cache, packed: what a server runs, its bookkeeping included."""

    def __init__(self, way: Way, call: Callable[..., Any], model: Any, case: dict[str, Any]) -> None:
        from ascend_dynamo.runtime.kv import PagedRequests

        hf.use_paged_attention(model)
        self.call, self.context = call, case["context"]
        self.cache = caches.make("paged", model.config, case["batch"], self.context)
        self.requests = PagedRequests(self.cache)
        self.open = [self.requests.open([]) for _ in range(case["batch"])]
        self.tokens = arguments(case, model)[0].tolist()
        with torch.no_grad():
            view = self.requests.step({r: [0] * self.context for r in self.open}).view
            for layer, kept in enumerate(caches.tokens(model.config, case["batch"], self.context)):
                view.update(*(t.transpose(0, 1).flatten(1, 2).unsqueeze(0) for t in kept), layer)

    def step(self) -> Tensor:
        batch = self.requests.step(dict(zip(self.open, self.tokens, strict=True)))
        return self.call(**batch.inputs()).logits.transpose(0, 1)

    def rewind(self) -> None:
        for request in self.open:
            self.requests.crop(request, self.context)


def arguments(case: dict[str, Any], model: Any) -> tuple[Tensor, ...]:
    """One new token per sequence; or its query, key and value."""
    batch, config = case["batch"], model.config
    if case["kind"] == "step":
        return (_models.token_ids(config.vocab_size, batch, 1),)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    return tuple(caches.draw((batch, h, 1, config.head_dim), 1000 + i) for i, h in enumerate(heads))


def in_float32(model: Any, way: Way, case: dict[str, Any], inputs: tuple[Tensor, ...]) -> Tensor:
    """The step on the same (rounded) weights and tokens, computed in float32."""
    wide = copy.deepcopy(model).float()  # a copy: there and back would round the model's own float32 buffers
    cache = caches.make(way.cache, model.config, case["batch"], case["context"])
    caches.fill(cache, model.config, case["batch"], case["context"], torch.float32)
    return wide(*inputs, past_key_values=cache).logits


def weights(module: nn.Module) -> float:
    """Bytes of the matrices that a step reads."""
    return float(sum(m.weight.nbytes for m in module.modules() if isinstance(m, nn.Linear)))


def largest_activation(module: nn.Module, batch: int) -> int:
    """Bytes of the largest tensor that a step makes of its tokens alone: what any linear puts out, in float32."""
    widths = [m.out_features for m in module.modules() if isinstance(m, nn.Linear)]
    return 4 * batch * max(widths, default=0)


@torch.no_grad()
def notes(decoder: Batch | Packed, way: Way, sizes: Sizes) -> dict[str, Any]:
    """Compile, warm up, and look at one step: graphs, bytes held, copied and written, time in append and attention."""
    counters = torch._dynamo.utils.counters["stats"]
    start = counters["unique_graphs"]
    for _ in range(3):  # a growing cache: its first size, then all sizes, then nothing new
        decoder.step()
    warm = counters["unique_graphs"]
    decoder.step()
    graphs, again = warm - start, counters["unique_graphs"] - warm
    assert (graphs > 0) == bool(way.backend) and not again, f"{graphs} graphs were compiled, {again} of them late"
    with contextlib.nullcontext() if way.backend else probe.marked(decoder.cache):
        seen = [probe.trace(decoder.step) for _ in range(TRACES)]  # no rewind: the tokens go where none were
    held = caches.allocated(caches.buffers(decoder.cache))
    found: dict[str, Any] = {"graphs": graphs, "resident": _memory.resident(), "allocated": held}
    for name, events in (("append", probe.APPENDS), ("attention", probe.ATTENTION)):
        found[name] = statistics.median(s.seconds(events) for s in seen)
        found[f"{name}_share"] = statistics.median(s.share(events) for s in seen)
    if sizes.cache > 2 * sizes.activation:
        found["copied"] = statistics.mean(s.copied(sizes.cache) for s in seen)
    if held <= 2 * WIDE:
        done = probe.writes(decoder.step, lambda: caches.buffers(decoder.cache))
        found |= {"moved": done.moved, "changed": done.changed}
    decoder.rewind()
    return found
