"""Operands of an attention that are gathered from pages, and the packed form that attention over pages wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Facts, NoMatch

from ._calls import LAYOUT, arguments, ascend, aten, convert, dtype, is_call, refuse
from ._mla_parts import between


@dataclass(frozen=True)
class Gathered:
    """``kv_gather(cache, table, length, scale)``; ``nodes`` are the gather and the casts and layout behind it."""

    cache: fx.Node
    table: fx.Node
    length: Any
    scale: fx.Node | None
    nodes: tuple[fx.Node, ...]


def gathered(facts: Facts, operand: fx.Node, shape: Sequence[int] = (0, 1, 2, 3)) -> Gathered | NoMatch:
    """``operand`` as gathered pages, perhaps cast; its axes are the axes ``shape`` of the gather's [B, Hk, L, D]."""
    nodes: list[fx.Node] = []
    n = operand
    while True:
        source, labels = facts.axes(n)
        if labels != tuple(f"d{i}" for i in shape):
            return refuse(facts, "op", operand, "kv_gather of pages", f"%{n.name}", 0.1)
        nodes += between(n, source)
        if not is_call(source, convert):
            break
        nodes.append(source)
        n, shape = source.args[0], tuple(range(facts.val(source).dim()))  # type: ignore[assignment]
    if not is_call(source, ascend.kv_gather.default):
        return refuse(facts, "op", operand, "kv_gather of pages", f"%{source.name}", 0.1)
    call = arguments(source)
    if dtype(facts, call["block_table"]) != torch.int32:
        found = f"{dtype(facts, call['block_table'])}"
        return refuse(facts, "dtype", source, "a block table of int32", found, 0.5, "make the table int32")
    return Gathered(call["cache"], call["block_table"], call["length"], call["scale"], (*nodes, source))


def one_batch(facts: Facts, anchor: fx.Node, a: Gathered, b: Gathered) -> NoMatch | None:
    """A refusal unless both are read through one table, to one length, and not overwritten in between."""
    lengths = [facts.val(g.length) if isinstance(g.length, fx.Node) else g.length for g in (a, b)]
    if a.table is not b.table or not facts.known(lengths[0] == lengths[1]):
        found = f"%{a.table.name} to {lengths[0]}, %{b.table.name} to {lengths[1]}"
        return refuse(facts, "arg", anchor, "keys and values through one block table, to one length", found, 0.7)
    first = min((*a.nodes, *b.nodes))
    for effect in facts.effects_between(first, anchor):
        if any(facts.may_alias(x, t) for x in (a.cache, b.cache, a.table) for t in effect.all_input_nodes):
            found = f"a write by %{effect.name} in between"
            return refuse(
                facts, "mutation", effect, "pages that stay as they are until they are attended to", found, 0.8
            )
    return None


def replaced(facts: Facts, anchor: fx.Node, gathers: Sequence[Gathered]) -> frozenset[fx.Node] | NoMatch:
    """What goes: the attention, and what only it reads. A gather that something else than an attention reads stays in
    the graph anyway, and then attending to it costs less than to the pages."""
    nodes = {n for g in gathers for n in g.nodes}
    own: set[fx.Node] = {anchor}
    for n in sorted(nodes, reverse=True):
        others = [u for u in n.users if u not in nodes and _alive(u)]
        if others:
            what = "the graph's output" if others[0].op == "output" else f"%{others[0].name}"
            return refuse(facts, "users", n, "gathered tokens that only attention reads", f"also read by {what}", 0.8)
        if all(u in own for u in n.users):
            own.add(n)
    return frozenset(own)


def _alive(n: fx.Node) -> bool:
    """False for attention, and for what earlier rewrites have left unused."""
    if is_call(n, ascend.flash_attention.default):
        return False
    return n.op == "output" or not is_call(n, *LAYOUT, convert) or any(map(_alive, n.users))


def packed(b: Builder, x: fx.Node) -> fx.Node:
    """[B, H, S, D] -> [B * S, H, D]."""
    batch, heads, tokens, width = x.meta["val"].shape
    return b.op(aten.reshape.default, b.op(aten.permute.default, x, [0, 2, 1, 3]), [batch * tokens, heads, width])


def unpacked(b: Builder, x: fx.Node, batch: Any, tokens: Any) -> fx.Node:
    """[B * S, H, D] -> [B, H, S, D]."""
    heads, width = x.meta["val"].shape[1:]
    return b.op(aten.permute.default, b.op(aten.reshape.default, x, [batch, tokens, heads, width]), [0, 2, 1, 3])


@dataclass
class Lengths:
    """q_start [B+1] and kv_len [B] of a batch whose sequences have ``queries`` and ``keys`` each: one pair a graph."""

    batch: Any
    queries: Any
    keys: Any
    memo: dict[Any, tuple[fx.Node, fx.Node]]
    key: Any

    @classmethod
    def of(cls, facts: Facts, batch: Any, queries: Any, keys: Any) -> Lengths:
        keys = facts.val(keys) if isinstance(keys, fx.Node) else keys
        key = tuple(facts.size(s) for s in (batch, queries, keys))
        return cls(batch, queries, keys, facts.memo.setdefault("lengths of packed batches", {}), key)

    def ready(self, before: fx.Node) -> tuple[fx.Node, ...]:
        """The pair and what computes it, if an earlier attention has made it."""
        found = self.memo.get(self.key)
        if found is None or any(n.prev.next is not n or not n < before for n in found):
            return ()
        return (*found, *(n for n in found[0].all_input_nodes if n.op == "call_function"))

    def emit(self, b: Builder, ready: Sequence[fx.Node]) -> tuple[fx.Node, fx.Node]:
        """Host tensors of int32."""
        if ready:
            return ready[0], ready[1]
        host = {"dtype": torch.int32, "device": torch.device("cpu")}
        steps = b.op(aten.arange.default, self.batch + 1, **host)
        starts = b.op(aten.mul.Tensor, steps, self.queries)
        keys = b.op(aten.full.default, [self.batch], self.keys, **host)
        self.memo[self.key] = starts, keys
        return starts, keys


def per_token_mask(facts: Facts, anchor: fx.Node, mask: fx.Node, shape: Sequence[Any]) -> NoMatch | None:
    """A refusal unless a mask of an attention over ``shape`` [B, Hq, Sq, L] treats all heads alike."""
    have = facts.val(mask).shape
    if len(have) >= 3 and not facts.known(have[-3] == 1):
        return refuse(facts, "shape", anchor, "a mask that is the same for all heads", f"one of {list(have)}", 0.9)
    return None


def packed_mask(b: Builder, mask: fx.Node, batch: Any, queries: Any, keys: Any) -> fx.Node:
    """A mask [.., 1, Sq or 1, L or 1] as [B * Sq, L]."""
    shape = list(mask.meta["val"].shape)
    shape = [*[1] * (4 - len(shape)), *shape]
    if len(mask.meta["val"].shape) < 4:
        mask = b.op(aten.reshape.default, mask, shape)
    wide = b.op(aten.expand.default, mask, [batch, 1, queries, keys])
    return b.op(aten.reshape.default, wide, [batch * queries, keys])


def visibility(facts: Facts, anchor: fx.Node, call: dict[str, Any], queries: Any, keys: Any) -> bool | NoMatch:
    """``causal`` of attention over pages that means what the attention's own flags mean; the reason if there is none.

    Over pages the queries are the last tokens of their sequence. Where a row may see no key, it must give 0.
    """
    if call["bias"] is not None:
        fix = "a boolean mask says what may be seen without adding to the scores (attn_implementation='sdpa')"
        return refuse(facts, "arg", anchor, "attention without an additive bias", "a bias", 0.9, fix)
    causal, window = call["causal"], call["window"]
    square = facts.known(queries == keys)
    if (causal == "top_left" or (causal == "none" and window >= 0)) and not square:
        expected = "queries that are the last tokens (causal from the bottom right), or all of them"
        return refuse(
            facts, "unproven", anchor, expected, f"{causal}, window {window}, {queries} queries, {keys} keys", 0.9
        )
    moot = call["sinks"] is not None or (
        call["mask"] is None and window != 0 and (facts.known(queries <= keys) or causal == "none") and
        facts.known(keys >= 1)
    )  # fmt: skip
    if call["empty_row"] != "zero" and not moot:
        found = f'rows that see no key may occur, and give "{call["empty_row"]}"'
        fix = "attn_implementation='sdpa' gives 0 there"
        return refuse(facts, "arg", anchor, "rows without keys that give 0, or none", found, 0.9, fix)
    if not facts.known(queries <= keys):
        return refuse(facts, "unproven", anchor, "no more queries than keys", f"{queries} and {keys}", 0.9)
    return causal != "none"
