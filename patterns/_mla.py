"""Multi-head latent attention (DeepSeek-V2 and its kin) seen behind an ``ascend.flash_attention``.

Keys and values of all heads are made from one latent ``c: [B, S, R]`` per token, beside one rotary key ``r: [B, S, P]``
that all heads share::

    k = cat([c @ W_UK[h].T, r], -1)         W_UK: [H, N, R]
    v = c @ W_UV[h].T                       W_UV: [H, V, R]

``find_latent`` reads this off the operands of an attention and returns a ``LatentAttention``: where latent, rotary key,
W_UK, W_UV and the two parts of the queries are. ``mla_absorb`` rewrites with it. Where the latents live in pages, the
same value gives ``ascend.mla_attention``: its ``q_latent`` is W_UK applied to the ``nope`` part of the queries, its
caches hold ``latent`` and ``rope``, its scale and causality are the attention's, and W_UV follows it; what is appended
to ``latent.node`` and ``rope.node`` is what ``ascend.mla_kv_write`` takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ascend_dynamo.contracts import Builder, Facts, NoMatch

from ._calls import arg, arguments, aten, dtype, is_call, refuse
from ._mla_parts import HeadWeights, Labels, Projection, Rows, Sizes, axis, between, per_token, projection, through


@dataclass(frozen=True)
class LatentAttention:
    """The parts of one latent attention.

    ``nodes`` are the calls that expand the latents and the attention itself; also the concatenation of the queries, if
    it is one that nobody else reads.
    """

    attention: fx.Node
    q: fx.Node
    nope: tuple[int, int]
    """Where in the last axis of ``q`` the part lies that meets the latents; ``roped`` is the other."""
    roped: tuple[int, int]
    latent: Rows
    rope: Rows
    w_uk: HeadWeights
    w_uv: HeadWeights
    nodes: frozenset[fx.Node]

    @property
    def queries(self) -> Any:
        return self.q.meta["val"].shape[2]

    def query(self, b: Builder, part: tuple[int, int]) -> fx.Node:
        """The ``nope`` or ``roped`` part of the queries, [B, H, Sq, N] or [B, H, Sq, P]."""
        if self.q in self.nodes:
            start = 0
            for piece in arg(self.q, 0):
                end = start + piece.meta["val"].shape[3]
                if (start, end) == part:
                    return piece
                start = end
        return b.op(aten.slice.Tensor, self.q, 3, *part, 1)


def find_latent(facts: Facts, attention: fx.Node) -> LatentAttention | NoMatch:
    """What an ``ascend.flash_attention`` attends to, if its keys and values are made from one latent per token."""
    call = arguments(attention)
    q, k, v = call["q"], call["k"], call["v"]
    pieces = _pieces(facts, k)
    if pieces is None:
        return refuse(facts, "op", attention, "keys that are cat([nope, rope], -1)", f"%{k.name}")
    sizes = Sizes(*facts.val(k).shape[:3])
    if facts.known(sizes.heads == 1):
        return refuse(facts, "shape", attention, "keys of several heads", "one key head: nothing to absorb")
    at, shared = next(((1 - i, rows) for i in (1, 0) if (rows := _shared(facts, *pieces[i], sizes))), (0, None))
    if shared is None:
        found = "one for each head, or none"
        return refuse(facts, "shape", attention, "a rotary key that all heads share, expanded to them", found, 0.3)
    value = projection(facts, v, facts.axes(v)[1], sizes)
    if isinstance(value, NoMatch):
        return value
    key = projection(facts, *pieces[at], sizes)
    if isinstance(key, NoMatch):
        return key
    refusal = _disagree(facts, attention, q, key, value, shared)
    if refusal is not None:
        return refusal
    nope, rope = key.weights.size, shared.shape[3]
    plain, roped = ((0, nope), (nope, nope + rope)) if at == 0 else ((rope, rope + nope), (0, rope))
    source = facts.axes(k)[0]
    joined = is_call(q, aten.cat.default) and arg(q, 1) == 3 and list(q.users) == [attention]
    nodes = frozenset((attention, source, *between(k, source), *key.nodes, *value.nodes, *([q] if joined else [])))
    return LatentAttention(attention, q, plain, roped, key.latent, shared, key.weights, value.weights, nodes)


def _pieces(facts: Facts, k: fx.Node) -> list[tuple[fx.Node, Labels]] | None:
    """The two pieces that the last axis of ``k`` is made of, each with the labels of its axes B, H, S, D."""
    source, labels = facts.axes(k)
    if not is_call(source, aten.cat.default) or len(arg(source, 0)) != 2 or labels[3] != f"d{arg(source, 1)}":
        return None
    found = [(piece, through(labels, facts.axes(piece)[1])) for piece in arg(source, 0)]
    return None if any(inner is None for _, inner in found) else found  # type: ignore[return-value]


def _shared(facts: Facts, n: fx.Node, labels: Labels, sizes: Sizes) -> Rows | None:
    """``n`` [B, H, S, P] as one key per token, repeated for each head."""
    batch, head, token, last = labels
    if not head.startswith("x") or not head[1:].isdigit() or axis(last) is None:
        return None
    return per_token(facts, facts.axes(n)[0], (batch, token, last), sizes)


def _disagree(
    facts: Facts, attention: fx.Node, q: fx.Node, key: Projection, value: Projection, shared: Rows
) -> NoMatch | None:
    """Why these are not the parts of one latent attention."""
    if key.latent.node is not value.latent.node or key.latent.dims != value.latent.dims:
        found = f"%{key.latent.node.name} and %{value.latent.node.name}"
        return refuse(facts, "arg", attention, "keys and values made from the same latents", found, 0.8)
    heads, width = facts.val(q).shape[1], facts.val(q).shape[3]
    if not facts.known(heads == key.weights.heads):
        return refuse(facts, "shape", attention, "as many key as query heads", f"{heads} query heads", 0.8)
    if not facts.known(width == key.weights.size + shared.shape[3]):
        return refuse(facts, "shape", attention, "queries of the width of the keys", f"{width}", 0.8)
    weights = (key.weights.weight, value.weights.weight)
    if len({dtype(facts, n) for n in (q, key.latent.node, shared.node, *weights)}) != 1:
        return refuse(facts, "dtype", attention, "queries, latents and rotary keys of one dtype", "several", 0.8)
    return None
