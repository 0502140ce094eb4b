"""``"ascend_paged"``: the attention of a transformers model over a ``PagedBatch``, by its public interfaces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ascend_dynamo.errors import UnsupportedCacheError
from ascend_dynamo.runtime.kv.batch import PagedBatch
from ascend_dynamo.runtime.kv.store import PageStore

NAME = "ascend_paged"
_KNOWN = {"position_ids", "cache_position"}  # tensors that models hand down and that attention does not depend on


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    paged: PagedBatch | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1,Hq,T,D] packed; what ``key`` and ``value`` hold is in the pages already. Result [1,T,Hq,Dv].

    Raises UnsupportedCacheError without a batch, for a model that is not causal, and for what pages cannot serve.
    """
    if paged is None:
        raise UnsupportedCacheError(
            f'attention "{NAME}" runs packed steps: model(**requests.step(...).inputs()); for generate(), set another'
            " attention implementation and pass a PagedKVCache"
        )
    if attention_mask is not None or dropout:
        raise UnsupportedCacheError(f'attention "{NAME}" takes no mask (requests are kept apart) and no dropout')
    if not getattr(module, "is_causal", True):
        raise UnsupportedCacheError(f"{type(module).__name__} is not causal: its keys cannot be kept in pages")
    unknown = [name for name, value in others.items() if isinstance(value, Tensor) and name not in _KNOWN]
    if unknown:
        raise UnsupportedCacheError(f'{type(module).__name__} gives its attention {unknown}, which "{NAME}" knows not')
    layer: int = module.layer_idx  # type: ignore[assignment]
    store: PageStore = paged.view.layers[layer].store
    kept = paged.view.layers[layer].group.pool.window
    if kept is not None and kept != sliding_window:
        raise UnsupportedCacheError(
            f"layer {layer} keeps a window of {kept} tokens and its attention says {sliding_window}: chunked attention"
            " cannot run in packed steps"
        )
    table = paged.block_tables[paged.view.group_of[layer]]
    q = query[0].transpose(0, 1)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if hasattr(module, "kv_b_proj") and store.keys.shape[2] == 1 and store.keys.shape[3] != q.shape[-1]:
        return _latent(module, q, store, table, paged, scale).unsqueeze(0), None
    y = torch.ops.ascend.paged_attention(
        q,
        store.keys,
        store.values,
        table,
        paged.q_start,
        paged.kv_len,
        scale=scale,
        window=-1 if sliding_window is None else sliding_window,
        softcap=0.0 if softcap is None else softcap,
        sinks=s_aux,
        k_scale=store.k_scale,
        v_scale=store.v_scale,
    )
    return y.unsqueeze(0), None


def _latent(module: Any, q: Tensor, store: PageStore, table: Tensor, paged: PagedBatch, scale: float) -> Tensor:
    """DeepSeek's attention with the expansion of latents absorbed into queries and outputs (DeepSeek-V2, 2024, 2.1.2).

    q [T,H,nope + rope]; result [T,H,Dv]. What the model expanded of the new tokens is not used.
    """
    nope, rope = module.qk_nope_head_dim, module.qk_rope_head_dim
    if store.k_scale is not None:
        raise UnsupportedCacheError("latents in int8 pages cannot be attended to as they are; use quantization=None")
    if module.kv_b_proj.bias is not None:
        raise UnsupportedCacheError("the expansion of the latents has a bias, which cannot be absorbed")
    weight = module.kv_b_proj.weight.view(q.shape[1], nope + module.v_head_dim, -1)
    q_nope, q_rope = q.split([nope, rope], dim=-1)
    y = torch.ops.ascend.mla_attention(
        torch.einsum("thn,hnr->thr", q_nope, weight[:, :nope]),
        q_rope,
        store.keys.squeeze(2),
        store.values.squeeze(2),
        table,
        paged.q_start,
        paged.kv_len,
        scale=scale,
    )
    return torch.einsum("thr,hvr->thv", y, weight[:, nope:])


def no_mask(*_: Any, **__: Any) -> None:
    """Requests are kept apart by ``q_start`` and ``kv_len``: no mask is made."""


def register() -> None:
    """Make ``attn_implementation="ascend_paged"`` known to transformers; again and again if you like."""
    AttentionInterface.register(NAME, paged_attention_forward)
    AttentionMaskInterface.register(NAME, no_mask)
