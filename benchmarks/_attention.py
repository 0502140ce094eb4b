"""What benchmarks/attention.py runs, ready to time: a hand-written layer, two Hugging Face models, the single forms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import _models
import torch
import torch.nn.functional as F
from _attention_forms import FORMS
from _worker import Prepared
from torch import Tensor, nn

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYERS = 2
PADDED = 0.1  # share of the encoder's tokens that are padding

_built: dict[str, Any] = {}  # the worker's one model, kept from row to row


class Layer(nn.Module):
    """Causal self-attention as people write it, of qwen3-0.6b's shape: 16 query heads of 128 over 8 key heads."""

    def __init__(self, eager: bool, width: int = 1024, heads: int = 16, groups: int = 8, dim: int = 128) -> None:
        super().__init__()
        self.eager, self.heads, self.groups, self.dim = eager, heads, groups, dim
        self.q = nn.Linear(width, heads * dim, bias=False)
        self.k = nn.Linear(width, groups * dim, bias=False)
        self.v = nn.Linear(width, groups * dim, bias=False)
        self.o = nn.Linear(heads * dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, -1, self.dim).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = (
            self.spelled(q, k, v)
            if self.eager
            else F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        )
        return self.o(y.transpose(1, 2).reshape(b, s, -1))

    def spelled(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s, times = q.shape[-2], self.heads // self.groups
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        scores = torch.matmul(q, k.transpose(-1, -2)) * self.dim**-0.5
        hidden = torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
        return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), v)


def _make(name: str, eager: bool, dtype: torch.dtype) -> Any:
    """The same weights for the same name and dtype, whatever the spelling."""
    if name == "layer":
        torch.manual_seed(0)
        layer = Layer(eager)
        layer.q.weight.data.mul_(4)  # else every score is near 0 and every weight the same
        return layer.to(dtype).eval().requires_grad_(False)
    model = _models.build(name, dtype=dtype, layers=LAYERS, check=False, attention="eager" if eager else "sdpa")
    return model.base_model  # without the output head


def compiled(model: Any, contender: str) -> Any:
    """``model`` (or a function) as the contender runs it."""
    torch._dynamo.reset()
    if contender == "eager":
        return model
    return torch.compile(model, backend="ascend_opt" if contender.startswith("ours") else "inductor", dynamic=False)


def prepare(case: dict[str, Any], contender: str) -> Prepared:
    """Runs in the worker: the case's model in the contender's spelling, compiled, ready to be timed."""
    if "form" in case:
        return _form(case["form"], contender)
    eager = not contender.endswith("sdpa")
    key = f"{case['model']} {case['dtype']} {eager}"
    if key not in _built:
        _built.clear()
        _built[key] = _make(case["model"], eager, DTYPES[case["dtype"]])
    model, run = _built[key], _input(case)
    call = compiled(model, contender)

    def reference() -> Tensor:
        exact = _make(case["model"], eager=False, dtype=DTYPES[case["dtype"]])  # SDPA: linear memory at any length
        return run(copy.deepcopy(exact).float())

    return Prepared(lambda: run(call), reference=reference, work=work(model, case))


def _form(name: str, contender: str) -> Prepared:
    """A single attention; its reference is the same formula in float32."""
    form = FORMS[name]
    args = form.arguments()
    call = compiled(form.call, contender)

    def reference() -> Tensor:
        return form.call(*(a.float() if a.is_floating_point() else a for a in args))

    return Prepared(lambda: call(*args), reference=reference)


def _input(case: dict[str, Any]) -> Callable[[Any], Tensor]:
    """A function from a model to its result on the case's input."""
    length = case["seq"]
    if case["model"] == "layer":
        x = torch.randn(1, length, 1024, generator=torch.Generator().manual_seed(1)).to(DTYPES[case["dtype"]])
        return lambda f: f(x.to(next(f.parameters()).dtype))
    ids = _models.token_ids(30000, 1, length)
    if case["model"] == "qwen3-0.6b":
        return lambda f: f(ids, use_cache=False).last_hidden_state
    mask = torch.ones_like(ids)
    mask[:, length - int(PADDED * length) :] = 0
    return lambda f: f(ids, attention_mask=mask).last_hidden_state


def work(model: Any, case: dict[str, Any]) -> dict[str, float]:
    """Bytes that one call must read and FLOPs that it must do: linears, and attention (half of it if causal)."""
    length = case["seq"]
    linears = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    if case["model"] == "layer":
        layers, width = 1, model.heads * model.dim
    else:
        config = model.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers, width = config.num_hidden_layers, config.num_attention_heads * dim
    attention = 4 * length * length * width * layers * (1.0 if case["model"] == "bert-long" else 0.5)
    return {
        "bytes": float(sum(w.nbytes for w in linears)),
        "flops": 2.0 * length * sum(w.numel() for w in linears) + attention,
    }
