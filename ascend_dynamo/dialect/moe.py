"""Mixture of experts: moe_gate chooses experts per token (DeepSeek-V3, 2024), moe_experts applies them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    eps: float = 1e-20,
    sorted: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scores, limited to the best groups, the best experts among those, and their weights.

    logits [T,E], bias [E] or None. Scores are softmax or sigmoid of the logits in float32 (float64 for float64);
    experts are chosen by score + bias, weighted by score alone. scoring="topk_softmax" chooses by the logits and
    weights by the softmax over the chosen ones (GPT-OSS). With n_group > 1 only the topk_group best groups of E
    / n_group neighbouring experts take part, a group's worth being the sum of its two best (with bias: DeepSeek-V3's
    noaux_tc) or its best (without: DeepSeek-V2's group_limited_greedy). normalize divides by the chosen weights' sum
    + eps; scale comes last. Returns weights [T,top_k] in the scores' dtype and ids [T,top_k] int32, best first;
    sorted=False leaves the order open, as topk's does.

    Raises:
        ValueError: scoring is none of softmax, sigmoid and topk_softmax.
    """
    if scoring not in ("softmax", "sigmoid", "topk_softmax"):
        raise ValueError(f"moe_gate: scoring={scoring!r}; expected 'softmax', 'sigmoid' or 'topk_softmax'")
    scores = logits.to(_score_dtype(logits))
    if scoring != "topk_softmax":
        scores = torch.softmax(scores, dim=-1) if scoring == "softmax" else torch.sigmoid(scores)
    choice = scores if bias is None else scores + bias
    if n_group > 1:
        grouped = choice.unflatten(-1, (n_group, -1))
        worth = grouped.amax(-1) if bias is None else grouped.topk(2, dim=-1).values.sum(-1)
        best = worth.topk(topk_group, dim=-1, sorted=False).indices
        allowed = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, best, True)
        choice = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)
    ids = choice.topk(top_k, dim=-1, sorted=sorted).indices
    weights = scores.gather(-1, ids)
    if scoring == "topk_softmax":
        weights = torch.softmax(weights, dim=-1)
    if normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + eps)
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
    eps: float = 1e-20,
    sorted: bool = True,
) -> tuple[Tensor, Tensor]:
    """By sorting lists, one token at a time."""
    weights, ids = [], []
    size = logits.shape[-1] // n_group
    for row in logits:
        e = torch.exp(row - row.max())
        kinds = {"softmax": e / e.sum(), "sigmoid": 1 / (1 + torch.exp(-row)), "topk_softmax": row}
        scores = kinds[scoring].tolist()
        choice = scores if bias is None else [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        groups = [[choice[i] for i in _descending(range(g * size, (g + 1) * size), choice)] for g in range(n_group)]
        worth = [sum(group[:2]) if bias is not None else group[0] for group in groups]
        open_groups = _descending(range(n_group), worth)[:topk_group]
        chosen = _descending([i for i in range(len(scores)) if i // size in open_groups], choice)[:top_k]
        if scoring == "topk_softmax":
            scores = [math.exp(s - max(scores)) for s in scores]
            scores = [s / sum(scores[i] for i in chosen) for s in scores]
        total = sum(scores[i] for i in chosen) + eps if normalize else 1.0
        weights.append([scores[i] / total * scale for i in chosen])
        ids.append(chosen)
    shape = (*logits.shape[:-1], top_k)
    return (
        torch.tensor(weights, dtype=torch.float64).reshape(shape),
        torch.tensor(ids, dtype=torch.int32).reshape(shape),
    )


def _descending(items: Iterable[int], key: Sequence[float]) -> list[int]:
    return sorted(items, key=lambda i: -key[i])


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
    yield Sample((logits(), None), {"top_k": 4, "scoring": "topk_softmax", "normalize": False}, "GPT-OSS")
    # of two, topk gives the better one first also where that is not asked for
    unsorted = {"top_k": 2, "scoring": "sigmoid", "normalize": True, "eps": 0.0, "sorted": False}
    yield Sample((logits(), bias), unsorted, "any order, no eps")


def moe_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    *,
    activation: str,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
) -> Tensor:
    """Sum over each token's experts of weight * ((act(x gate^T) * (x up^T)) down^T).

    x [T,H]; weights and ids [T,k]; w_gate_up [E,2I,H], gate above up, or row by row in turn if interleaved; w_down
    [E,H,I]; b_gate_up [E,2I] and b_down [E,H] or None; result [T,H] in x.dtype. activation: silu | gelu | gelu_tanh |
    relu; alpha makes silu g * sigmoid(alpha * g); limit bounds the gate from above and up on both sides before that;
    up_shift is added to up (GPT-OSS: alpha 1.702, limit 7, up_shift 1). Linears and activation round in x.dtype;
    weighting and sum are done in the promoted dtype of x and weights. An id that is negative or >= E contributes
    nothing (an expert of another rank).

    Raises:
        ValueError: unknown activation, or alpha without silu.
    """
    gated = _gated(activation, interleaved, alpha, limit, up_shift)
    experts = w_gate_up.shape[0]
    if known(ids.shape[0] * ids.shape[1] <= experts):  # few tokens: read only the experts that they use
        local = (ids >= 0) & (ids < experts)
        chosen = torch.where(local, ids, 0).to(torch.int64)
        h = torch.matmul(w_gate_up[chosen], x.unsqueeze(1).unsqueeze(-1)).squeeze(-1)
        h = h if b_gate_up is None else h + b_gate_up[chosen]
        y = torch.matmul(w_down[chosen], gated(h).unsqueeze(-1)).squeeze(-1)
        y = y if b_down is None else y + b_down[chosen]
        return torch.where(local.unsqueeze(-1), y * weights.unsqueeze(-1), 0).sum(1).to(x.dtype)
    h = torch.matmul(x, w_gate_up.transpose(1, 2))  # [E,T,2I]: every expert on every token
    h = h if b_gate_up is None else h + b_gate_up.unsqueeze(1)
    y = torch.matmul(gated(h), w_down.transpose(1, 2))
    y = y if b_down is None else y + b_down.unsqueeze(1)
    hit = ids.unsqueeze(0) == torch.arange(experts, device=ids.device).view(-1, 1, 1)  # [E,T,k]
    weight = torch.where(hit, weights, 0).sum(-1, keepdim=True)
    return torch.where(hit.any(-1, keepdim=True), y * weight, 0).sum(0).to(x.dtype)


def _gated(
    activation: str, interleaved: bool, alpha: float, limit: float | None, up_shift: float
) -> Callable[[Tensor], Tensor]:
    """[..., 2I] -> [..., I]."""
    act = _activation(activation)
    if alpha != 1.0 and activation != "silu":
        raise ValueError(f"moe_experts: alpha={alpha} is for activation='silu', not {activation!r}")

    def apply(h: Tensor) -> Tensor:
        gate, up = (h[..., 0::2], h[..., 1::2]) if interleaved else h.chunk(2, dim=-1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        glu = act(gate) if alpha == 1.0 else gate * torch.sigmoid(gate * alpha)
        return glu * (up + up_shift if up_shift else up)

    return apply


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in _ACTIVATIONS:
        raise ValueError(f"moe_experts: activation={name!r}; expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name][0]


def _moe_experts_eager(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    *,
    activation: str,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
) -> Tensor:
    """Each expert that is used at all, on its own tokens."""
    gated = _gated(activation, interleaved, alpha, limit, up_shift)
    y = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, weights.dtype), device=x.device)
    for expert in torch.unique(ids).tolist():
        if 0 <= expert < w_gate_up.shape[0]:
            token, place = torch.where(ids == expert)
            h = F.linear(x[token], w_gate_up[expert], None if b_gate_up is None else b_gate_up[expert])
            out = F.linear(gated(h), w_down[expert], None if b_down is None else b_down[expert])
            y.index_add_(0, token, (out * weights[token, place].unsqueeze(-1)).to(y.dtype))
    return y.to(x.dtype)


def _moe_experts_fake(x: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape)


def _moe_experts_f64(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    *,
    activation: str,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
) -> Tensor:
    y = torch.zeros_like(x)
    inner = w_down.shape[-1]
    for t, chosen in enumerate(ids.tolist()):
        for place, expert in enumerate(chosen):
            if 0 <= expert < w_gate_up.shape[0]:
                h = torch.mv(w_gate_up[expert], x[t])
                h = h if b_gate_up is None else h + b_gate_up[expert]
                gate, up = (h.view(inner, 2).unbind(1)) if interleaved else (h[:inner], h[inner:])
                if limit is not None:
                    gate, up = torch.minimum(gate, gate.new_tensor(limit)), up.clip(-limit, limit)
                act = _ACTIVATIONS[activation][1](gate * alpha) / alpha  # silu(alpha g) / alpha = g sigmoid(alpha g)
                out = torch.mv(w_down[expert], act * (up + up_shift))
                y[t] += weights[t, place] * (out if b_down is None else out + b_down[expert])
    return y


def _moe_experts_scale(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    *,
    activation: str = "",
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
) -> Tensor:
    """sum |a||b| through both linears."""
    h = torch.einsum("th,eih->tei", x.abs(), w_gate_up.abs())
    h = h if b_gate_up is None else h + b_gate_up.abs()
    gate, up = (h[..., 0::2], h[..., 1::2]) if interleaved else h.chunk(2, dim=-1)
    y = torch.einsum("tei,ehi->teh", gate * (up + abs(up_shift)), w_down.abs())
    y = y if b_down is None else y + b_down.abs()
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
    oss = {"activation": "silu", "interleaved": True, "alpha": 1.702, "limit": 0.7, "up_shift": 1.0}
    biases = {"b_gate_up": d.normal(6, 8, scale=0.3), "b_down": d.normal(6, 12, scale=0.3)}
    for tokens, note in ((5, "GPT-OSS prefill"), (2, "GPT-OSS decode")):
        some = torch.stack([d.permutation(6)[:3] for _ in range(tokens)])
        yield Sample((d.normal(tokens, 12), d.normal(tokens, 3), some, up, down), {**oss, **biases}, note)


SPECS = (
    OpSpec(
        "moe_gate",
        "(Tensor logits, Tensor? bias, *, int top_k, str scoring, int n_group=1, int topk_group=1, bool normalize,"
        " float scale=1., float eps=1e-20, bool sorted=True) -> (Tensor weights, Tensor ids)",
        moe_gate,
        _moe_gate_fake,
        _moe_gate_f64,
        c_ulp=8.0,
        samples=_moe_gate_samples,
    ),
    OpSpec(
        "moe_experts",
        "(Tensor x, Tensor weights, Tensor ids, Tensor w_gate_up, Tensor w_down, *, str activation,"
        " Tensor? b_gate_up=None, Tensor? b_down=None, bool interleaved=False, float alpha=1., float? limit=None,"
        " float up_shift=0.) -> Tensor",
        moe_experts,
        _moe_experts_fake,
        _moe_experts_f64,
        c_ulp=4.0,
        samples=_moe_experts_samples,
        kernel=_moe_experts_eager,
        row_scale=_moe_experts_scale,
    ),
)
