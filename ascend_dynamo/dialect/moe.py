"""Mixture of experts: moe_gate chooses experts per token (DeepSeek-V3, 2024), moe_experts applies them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from ascend_dynamo._torch_compat import known
from ascend_dynamo.dialect.activation import gelu_f64, silu_f64
from ascend_dynamo.dialect.spec import Draw, OpSpec, Sample


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = MappingProxyType(
    {
        "silu": (F.silu, silu_f64),
        "gelu": (F.gelu, lambda x: gelu_f64(x, "none")),
        "gelu_tanh": (_gelu_tanh, lambda x: gelu_f64(x, "tanh")),
        "relu": (F.relu, lambda x: x.clamp(min=0)),
    }
)


def moe_gate(
    logits: Tensor,
    bias: Tensor | None,
    *,
    top_k: int,
    scoring: str,
    n_group: int = 1,
    topk_group: int = 1,
    normalize: bool,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Scores, limited to the best groups, the best experts among those, and their weights.

    logits [T,E], bias [E] or None. Scores are softmax or sigmoid of the logits in float32 (float64 for float64);
    experts are chosen by score + bias, weighted by score alone. With n_group > 1 only the topk_group best groups of E
    / n_group neighbouring experts take part, a group's worth being the sum of its two best (with bias: DeepSeek-V3's
    noaux_tc) or its best (without: DeepSeek-V2's group_limited_greedy). normalize divides by the chosen weights' sum
    + 1e-20; scale comes last. Returns weights [T,top_k] in the scores' dtype and ids [T,top_k] int32, best first.

    Raises:
        ValueError: scoring is neither softmax nor sigmoid.
    """
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"moe_gate: scoring={scoring!r}; expected 'softmax' or 'sigmoid'")
    wide = logits.to(_score_dtype(logits))
    scores = torch.softmax(wide, dim=-1) if scoring == "softmax" else torch.sigmoid(wide)
    choice = scores if bias is None else scores + bias
    if n_group > 1:
        grouped = choice.unflatten(-1, (n_group, -1))
        worth = grouped.amax(-1) if bias is None else grouped.topk(2, dim=-1).values.sum(-1)
        best = worth.topk(topk_group, dim=-1, sorted=False).indices
        allowed = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, best, True)
        choice = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)
    ids = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return (weights * scale).contiguous(), ids.to(torch.int32)


def _score_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _moe_gate_fake(logits: Tensor, bias: Tensor | None, *, top_k: int, **_: object) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-1], top_k)
    return logits.new_empty(shape, dtype=_score_dtype(logits)), logits.new_empty(shape, dtype=torch.int32)


def _moe_gate_f64(
    logits: Tensor,
    bias: Tensor | None,
    *,
    top_k: int,
    scoring: str,
    n_group: int = 1,
    topk_group: int = 1,
    normalize: bool,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """By sorting lists, one token at a time."""
    weights, ids = [], []
    size = logits.shape[-1] // n_group
    for row in logits:
        e = torch.exp(row - row.max())
        scores = (e / e.sum() if scoring == "softmax" else 1 / (1 + torch.exp(-row))).tolist()
        choice = scores if bias is None else [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(n_group)]
        worth = [sum(group[:2]) if bias is not None else group[0] for group in groups]
        open_groups = sorted(range(n_group), key=lambda g: -worth[g])[:topk_group]
        candidates = [i for i in range(len(scores)) if i // size in open_groups]
        chosen = sorted(candidates, key=lambda i: -choice[i])[:top_k]
        total = sum(scores[i] for i in chosen) + 1e-20 if normalize else 1.0
        weights.append([scores[i] / total * scale for i in chosen])
        ids.append(chosen)
    shape = (*logits.shape[:-1], top_k)
    return (
        torch.tensor(weights, dtype=torch.float64).reshape(shape),
        torch.tensor(ids, dtype=torch.int32).reshape(shape),
    )


def _moe_gate_samples(d: Draw) -> Iterator[Sample]:
    # distinct logits, so that no rounding of the input makes a tie
    def logits() -> Tensor:
        return torch.stack([d.permutation(16) for _ in range(5)]).to(d.dtype) / 4 - 2

    bias = d.permutation(16).float() / 100
    yield Sample((logits(), None), {"top_k": 4, "scoring": "softmax", "normalize": True}, "Qwen3")
    yield Sample((logits(), None), {"top_k": 2, "scoring": "softmax", "normalize": False}, "Mixtral, unnormalised")
    v3 = {"top_k": 4, "scoring": "sigmoid", "n_group": 4, "topk_group": 2, "normalize": True, "scale": 2.5}
    yield Sample((logits(), bias), v3, "DeepSeek-V3")
    v2 = {"top_k": 3, "scoring": "softmax", "n_group": 4, "topk_group": 2, "normalize": False, "scale": 16.0}
    yield Sample((logits(), None), v2, "DeepSeek-V2")


def moe_experts(
    x: Tensor, weights: Tensor, ids: Tensor, w_gate_up: Tensor, w_down: Tensor, *, activation: str
) -> Tensor:
    """Sum over each token's experts of weight * (act(x gate^T) * (x up^T)) down^T.

    x [T,H]; weights and ids [T,k]; w_gate_up [E,2I,H], gate above up; w_down [E,H,I]; result [T,H] in x.dtype.
    activation: silu | gelu | gelu_tanh | relu. Linears and activation round in x.dtype; weighting and sum are done in
    the promoted dtype of x and weights. An id that is negative or >= E contributes nothing (an expert of another
    rank).

    Raises:
        ValueError: unknown activation.
    """
    act = _activation(activation)
    experts = w_gate_up.shape[0]
    if known(ids.shape[0] * ids.shape[1] <= experts):  # few tokens: read only the experts that they use
        local = (ids >= 0) & (ids < experts)
        chosen = torch.where(local, ids, 0).to(torch.int64)
        h = torch.matmul(w_gate_up[chosen], x.unsqueeze(1).unsqueeze(-1)).squeeze(-1)
        gate, up = h.chunk(2, dim=-1)
        y = torch.matmul(w_down[chosen], (act(gate) * up).unsqueeze(-1)).squeeze(-1)
        return torch.where(local.unsqueeze(-1), y * weights.unsqueeze(-1), 0).sum(1).to(x.dtype)
    h = torch.matmul(x, w_gate_up.transpose(1, 2))  # [E,T,2I]: every expert on every token
    gate, up = h.chunk(2, dim=-1)
    y = torch.matmul(act(gate) * up, w_down.transpose(1, 2))
    hit = ids.unsqueeze(0) == torch.arange(experts, device=ids.device).view(-1, 1, 1)  # [E,T,k]
    weight = torch.where(hit, weights, 0).sum(-1, keepdim=True)
    return torch.where(hit.any(-1, keepdim=True), y * weight, 0).sum(0).to(x.dtype)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in _ACTIVATIONS:
        raise ValueError(f"moe_experts: activation={name!r}; expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name][0]


def _moe_experts_eager(
    x: Tensor, weights: Tensor, ids: Tensor, w_gate_up: Tensor, w_down: Tensor, *, activation: str
) -> Tensor:
    """Each expert that is used at all, on its own tokens."""
    act = _activation(activation)
    y = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, weights.dtype), device=x.device)
    for expert in torch.unique(ids).tolist():
        if 0 <= expert < w_gate_up.shape[0]:
            token, place = torch.where(ids == expert)
            gate, up = F.linear(x[token], w_gate_up[expert]).chunk(2, dim=-1)
            out = F.linear(act(gate) * up, w_down[expert])
            y.index_add_(0, token, (out * weights[token, place].unsqueeze(-1)).to(y.dtype))
    return y.to(x.dtype)


def _moe_experts_fake(x: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape)


def _moe_experts_f64(
    x: Tensor, weights: Tensor, ids: Tensor, w_gate_up: Tensor, w_down: Tensor, *, activation: str
) -> Tensor:
    y = torch.zeros_like(x)
    inner = w_down.shape[-1]
    for t, chosen in enumerate(ids.tolist()):
        for place, expert in enumerate(chosen):
            if 0 <= expert < w_gate_up.shape[0]:
                h = torch.mv(w_gate_up[expert], x[t])
                h = _ACTIVATIONS[activation][1](h[:inner]) * h[inner:]
                y[t] += weights[t, place] * torch.mv(w_down[expert], h)
    return y


def _moe_experts_scale(
    x: Tensor, weights: Tensor, ids: Tensor, w_gate_up: Tensor, w_down: Tensor, *, activation: str
) -> Tensor:
    """sum |a||b| through both linears."""
    h = torch.einsum("th,eih->tei", x.abs(), w_gate_up.abs())
    gate, up = h.chunk(2, dim=-1)
    y = torch.einsum("tei,ehi->teh", gate * up, w_down.abs())
    local = ((ids >= 0) & (ids < len(w_gate_up))).unsqueeze(-1)
    picked = y.gather(1, ids.clamp(0, len(w_gate_up) - 1).long().unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return (picked * weights.abs().unsqueeze(-1) * local).sum(1).amax(-1, keepdim=True)


def _moe_experts_samples(d: Draw) -> Iterator[Sample]:
    up, down = d.normal(6, 8, 12, scale=0.3), d.normal(6, 12, 4, scale=0.3)
    for tokens, activation, note in ((7, "silu", "prefill"), (1, "silu", "decode"), (5, "gelu_tanh", "tanh gelu")):
        ids = torch.stack([d.permutation(6)[:3] for _ in range(tokens)]).to(torch.int32)
        weights = d.uniform(tokens, 3, low=0.1, high=1.0, dtype=torch.float32)
        yield Sample((d.normal(tokens, 12), weights, ids, up, down), {"activation": activation}, note)
    ids = torch.tensor([[0, -1], [5, 2], [7, 6], [1, 3]], dtype=torch.int32)
    yield Sample((d.normal(4, 12), d.normal(4, 2), ids, up, down), {"activation": "gelu"}, "experts of other ranks")
    yield Sample(
        (d.normal(2, 12), d.normal(2, 2), ids[:2], up, down), {"activation": "relu"}, "few tokens, other ranks"
    )


SPECS = (
    OpSpec(
        "moe_gate",
        "(Tensor logits, Tensor? bias, *, int top_k, str scoring, int n_group=1, int topk_group=1, bool normalize,"
        " float scale=1.) -> (Tensor weights, Tensor ids)",
        moe_gate,
        _moe_gate_fake,
        _moe_gate_f64,
        c_ulp=8.0,
        samples=_moe_gate_samples,
    ),
    OpSpec(
        "moe_experts",
        "(Tensor x, Tensor weights, Tensor ids, Tensor w_gate_up, Tensor w_down, *, str activation) -> Tensor",
        moe_experts,
        _moe_experts_fake,
        _moe_experts_f64,
        c_ulp=4.0,
        samples=_moe_experts_samples,
        kernel=_moe_experts_eager,
        row_scale=_moe_experts_scale,
    ),
)
