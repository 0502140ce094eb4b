"""The CPU target's own operators, ``torch.ops.ascend_cpu.*``, and what they gain.

``linear(x, w, bias=None, epilogue="none", other=None)``: x [..., K], w [N, K] as the model holds it (nothing is packed
or copied, so writes to the weight show), bias [N]; y = act(x @ w.T + bias) + other, contiguous [..., N]. ``epilogue``
is none, relu, silu, gelu or gelu_tanh; with ``_mul`` appended (or ``"mul"`` alone) other is multiplied in instead of
added; ``"swiglu"`` takes w [2N, K] (gate rows, then up rows) and gives silu(gate) * up. Sums, activation and epilogue
are fp32, rounded once. bf16 and fp32 have kernels; what they do not cover (other dtypes, processors, layouts) runs on
ATen, with the same meaning.

``flash_attention(q, k, v, *, bias, mask, sinks, scale, causal, window, softcap, empty_row)`` is the dialect's operator
of that name without ``empty_row="uniform"``. The result is [B, Hq, Sq, Dv] laid out as [B, Sq, Hq, Dv]: the head merge
that follows is a view.

``moe_gate`` and ``moe_experts`` are the dialect's operators of those names, from the plain weights [E, 2I, H] and
[E, H, I]; the router takes no float64, and orders its choice also where that is left open.

``kv_write``, ``mla_kv_write``, ``paged_attention`` and ``mla_attention`` are the dialect's operators of those names.
Caches may have any strides, but neighbours along their last axis must be 1 apart for the kernels to read them. float16
and int8 caches are widened in registers. One decode step gives the same bits as ``flash_attention`` of the same tokens,
and every result is the same for any number of threads. Pages before the window of all queries are not read.

The ``*_portable`` twins never enter our kernels; tests compare with them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ascend_dynamo.lowering.cpu import build

EPILOGUES = ("none", "relu", "silu", "gelu", "gelu_tanh", "swiglu")


def _linear_fake(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    epilogue: str = "none",
    other: torch.Tensor | None = None,
) -> torch.Tensor:
    rows = w.shape[0] // 2 if epilogue.removesuffix("_mul") == "swiglu" else w.shape[0]
    return x.new_empty((*x.shape[:-1], rows))


def _attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


def _experts_fake(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _paged_fake(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v_cache.shape[-1]))


def _write_fake(*_: Any, **__: Any) -> None:
    return None


def _gate_fake(
    logits: torch.Tensor, bias: torch.Tensor | None, *, top_k: int, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


@functools.cache
def load() -> None:
    """Compile (the first time) and register everything in ``torch.ops.ascend_cpu``. LoweringError if impossible."""
    build.load()
    for suffix in ("", "_portable"):
        torch.library.register_fake(f"ascend_cpu::linear{suffix}", _linear_fake)
        torch.library.register_fake(f"ascend_cpu::flash_attention{suffix}", _attention_fake)
        torch.library.register_fake(f"ascend_cpu::moe_experts{suffix}", _experts_fake)
        torch.library.register_fake(f"ascend_cpu::paged_attention{suffix}", _paged_fake)
        torch.library.register_fake(f"ascend_cpu::mla_attention{suffix}", _experts_fake)
    for name in ("kv_write", "mla_kv_write"):
        torch.library.register_fake(f"ascend_cpu::{name}", _write_fake)
    torch.library.register_fake("ascend_cpu::moe_gate", _gate_fake)


def isa() -> str:
    """What the kernels use here: ``portable``, ``avx512_bf16`` or ``amx_bf16``."""
    load()
    return str(torch.ops.ascend_cpu.isa())
