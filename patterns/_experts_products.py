"""Reading one expert layer: the two products with per-expert weights, and the gated activation between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Facts, NoMatch

from ._calls import arg, arguments, ascend, aten, commuted, convert, dtype, is_call, number, rank, refuse
from ._experts import Slots
from ._window import joined, window, woven


@dataclass(frozen=True)
class Product:
    """rows @ weight^T + bias, each row with its expert's weight: ``weight`` is [E, N, K], or [E, K, N] if swapped.

    ``spread``: the product broadcasts one row per token to its k places.
    """

    rows: Any
    weight: fx.Node
    swapped: bool
    bias: fx.Node | None
    spread: bool = False


def read_product(slots: Slots, n: Any) -> Product | NoMatch:
    """The product whose results ``n`` holds, in the slots' order."""
    facts = slots.facts
    n = slots.peel(n)
    bias = None
    if is_call(n, aten.add.Tensor) and arguments(n)["alpha"] == 1:
        for rows, other in commuted(n):
            found = slots.picked(slots.peel(other)) if isinstance(other, fx.Node) else None
            if found is not None and rank(facts, found[0]) == 2 and _one_to_one(facts, n, rows, other):
                if not slots.is_ordered_ids(found[1]):
                    return refuse(facts, "op", other, "each row's expert's bias", "rows picked otherwise", 0.7)
                slots.seen(n, slots.peel(other))
                bias = found[0]
                n = slots.peel(rows)
                break
    if _is_grouped(n):
        return _grouped(slots, n, bias)
    if is_call(n, aten.matmul.default, aten.bmm.default):
        return _batched(slots, n, bias)
    found_op = n.target if isinstance(n, fx.Node) else n
    at = n if isinstance(n, fx.Node) else next(iter(slots.core))
    return refuse(facts, "op", at, "a product with each row's expert's weight", f"{found_op}", 0.5)


def _one_to_one(facts: Facts, out: fx.Node, *operands: Any) -> bool:
    """True if no operand is broadcast."""
    shape = facts.val(out).shape
    return all(
        isinstance(n, fx.Node)
        and rank(facts, n) == len(shape)
        and all(facts.known(a == b) for a, b in zip(facts.val(n).shape, shape, strict=True))
        for n in operands
    )


def _is_grouped(n: Any) -> bool:
    """``torch._grouped_mm``, or what transformers puts in its place while compiling (other dtypes than bfloat16)."""
    if not isinstance(n, fx.Node) or n.op != "call_function":
        return False
    return n.target is aten._grouped_mm.default or str(n.target) == "transformers.grouped_mm_fallback.default"


def _grouped(slots: Slots, n: fx.Node, bias: fx.Node | None) -> Product | NoMatch:
    facts = slots.facts
    call = arguments(n)
    rows, weight, offs = arg(n, 0), arg(n, 1), call["offs"]
    if call.get("bias") is not None or call.get("out_dtype") not in (None, dtype(facts, rows)):
        return refuse(facts, "arg", n, "grouped_mm without bias or another dtype", "one of them", 0.6)
    if rank(facts, rows) != 2 or rank(facts, weight) != 3 or not isinstance(facts.val(weight).shape[0], int):
        return refuse(facts, "shape", n, "rows [S, K] and weights [E, K, N]", f"{list(facts.val(rows).shape)}", 0.6)
    if slots.order is None:
        return refuse(facts, "op", n, "rows sorted by expert", "rows in token order", 0.6)
    slots.seen(n)
    if not slots.is_offsets(offs, facts.val(weight).shape[0]):
        found = f"%{offs.name}" if isinstance(offs, fx.Node) else "none"
        return refuse(facts, "unproven", n, "offsets that count the slots of each expert", found, 0.7)
    return Product(rows, weight, True, bias)


def _batched(slots: Slots, n: fx.Node, bias: fx.Node | None) -> Product | NoMatch:
    """matmul(weight[ids], rows[..., None]) or matmul(rows[..., None, :], weight[ids])."""
    facts = slots.facts
    if slots.order is not None:
        return refuse(facts, "op", n, "a grouped product of sorted rows", f"{n.target}", 0.6)
    for i in (0, 1):
        picked = slots.picked(arg(n, i))
        if picked is None or rank(facts, picked[0]) != 3 or not isinstance(facts.val(picked[0]).shape[0], int):
            continue
        rows = arg(n, 1 - i)
        column = facts.val(rows).shape[-1 if i == 0 else -2]
        batch = facts.val(n).shape[:-2]
        if not (isinstance(column, int) and column == 1) or rank(facts, rows) != rank(facts, n):
            return refuse(facts, "shape", n, "one row per chosen expert", f"{list(facts.val(rows).shape)}", 0.6)
        if not slots.each(n, batch) or not slots.each(n, facts.val(picked[1]).shape) or not slots.is_ids(picked[1]):
            return refuse(facts, "op", n, "weights picked by the experts' ids", f"%{picked[1].name}", 0.6)
        mine = facts.val(rows).shape[:-2]
        spread = not slots.each(rows, mine)
        once = len(mine) == 2 and isinstance(mine[1], int) and mine[1] == 1 and facts.known(mine[0] == slots.tokens)
        if rank(facts, picked[1]) != len(batch) or (spread and not once):
            return refuse(facts, "shape", n, "one row per chosen expert", f"{list(facts.val(rows).shape)}", 0.6)
        slots.seen(n, arg(n, i))
        return Product(rows, picked[0], i == 1, bias, spread)
    return refuse(facts, "op", n, "a product with weights picked by expert", "another product", 0.5)


@dataclass(frozen=True)
class Gate:
    """How [.., 2I] becomes [.., I]: the source, and the options of ``ascend.moe_experts``."""

    source: fx.Node
    options: dict[str, Any]


def read_gate(slots: Slots, n: Any) -> Gate | NoMatch:
    """act(gate) * up, with gate and up two halves (or every other column) of one product."""
    facts = slots.facts
    n = slots.peel(n)
    if is_call(n, ascend.swiglu.default):
        slots.seen(n)
        return Gate(arg(n, 0), {"activation": "silu"})
    if not isinstance(n, fx.Node):
        return refuse(facts, "op", next(iter(slots.core)), "act(gate) * up between the products", f"{n}", 0.7)
    glu = read_glu(facts, n)
    if isinstance(glu, NoMatch):
        return glu
    source, turns = halves(facts, glu)
    if source is None:
        return refuse(facts, "op", n, "gate and up from one product, the gate first", "others", 0.8)
    slots.seen(*glu.nodes, glu.gate, glu.up)
    return Gate(source, {**glu.options, **({"interleaved": True} if turns else {})})


@dataclass(frozen=True)
class Glu:
    """act(gate) * up: both [.., I], the options of ``ascend.moe_experts``, and the calls behind the two."""

    gate: fx.Node
    up: fx.Node
    options: dict[str, Any]
    nodes: tuple[fx.Node, ...]


def read_glu(facts: Facts, n: fx.Node) -> Glu | NoMatch:
    """act(gate) * up, wherever gate and up come from."""
    if not is_call(n, aten.mul.Tensor):
        return refuse(facts, "op", n, "act(gate) * up between the products", f"{n.target}", 0.7)
    for left, right in commuted(n):
        glu = _activation(left)
        if glu is None or not isinstance(right, fx.Node):
            continue
        gate, options, inner = glu
        up, shift, more = _shifted(right)
        gate, high, clamped = _clamp(gate)
        up, bounds, cut = _clamp(up)
        if (high is None) != (bounds is None) or (high is not None and (high[0] is not None or bounds != _both(high))):
            return refuse(facts, "arg", n, "gate and up clamped by one limit", f"{high} and {bounds}", 0.8)
        options |= {"limit": high[1]} if high is not None else {}
        options |= {"up_shift": shift} if shift else {}
        return Glu(gate, up, options, (n, *inner, *more, *clamped, *cut))
    return refuse(facts, "op", n, "silu, gelu or relu of the gate", "another product", 0.7)


def halves(facts: Facts, glu: Glu) -> tuple[fx.Node | None, bool]:
    """(what gate and up are all of, whether they take turns)."""
    gate, up = window(facts, glu.gate), window(facts, glu.up)
    for both, turns in ((joined(gate, up), False), (woven(gate, up), True)):
        if both is None or both.start != 0 or both.step != 1:
            continue
        if facts.known(facts.val(both.source).shape[-1] == both.count):
            return both.source, turns
    return None, False


def _activation(n: Any) -> tuple[fx.Node, dict[str, Any], tuple[fx.Node, ...]] | None:
    """(gate, options, nodes) of an activated gate."""
    if is_call(n, aten.silu.default):
        return arg(n, 0), {"activation": "silu"}, (n,)
    if is_call(n, aten.relu.default):
        return arg(n, 0), {"activation": "relu"}, (n,)
    if is_call(n, aten.gelu.default):
        tanh = arguments(n)["approximate"] == "tanh"
        return arg(n, 0), {"activation": "gelu_tanh" if tanh else "gelu"}, (n,)
    if not is_call(n, aten.mul.Tensor):
        return None
    for gate, sigmoid in commuted(n):
        if not is_call(sigmoid, aten.sigmoid.default) or not isinstance(gate, fx.Node):
            continue
        inside = arg(sigmoid, 0)
        if inside is gate:
            return gate, {"activation": "silu"}, (n, sigmoid)
        if is_call(inside, aten.mul.Tensor):
            for x, alpha in commuted(inside):
                if x is gate and number(alpha) is not None and number(alpha) != 0:
                    return gate, {"activation": "silu", "alpha": number(alpha)}, (n, sigmoid, inside)
    return None


def _shifted(n: fx.Node) -> tuple[fx.Node, float, tuple[fx.Node, ...]]:
    """(up, c, nodes) of ``up + c``."""
    if is_call(n, aten.add.Tensor) and arguments(n)["alpha"] == 1:
        for x, c in commuted(n):
            shift = number(c)
            if isinstance(x, fx.Node) and shift is not None:
                return x, shift, (n,)
    return n, 0.0, ()


def _clamp(n: fx.Node) -> tuple[fx.Node, tuple[float | None, float] | None, tuple[fx.Node, ...]]:
    """(x, (low, high), nodes) of a clamp with an upper bound."""
    if is_call(n, aten.clamp.default):
        call = arguments(n)
        high, low = number(call["max"]), number(call["min"])
        if high is not None and (low is not None or call["min"] is None):
            return call["self"], (low, high), (n,)
    if is_call(n, aten.clamp_max.default) and (high := number(arg(n, 1))) is not None:
        return arg(n, 0), (None, high), (n,)
    return n, None, ()


def _both(bounds: tuple[float | None, float]) -> tuple[float, float]:
    return (-bounds[1], bounds[1])


def sum_in(facts: Facts, anchor: fx.Node, wanted: torch.dtype) -> fx.Node | NoMatch:
    """The sum over experts, or the cast behind it to the dtype of x."""
    if dtype(facts, anchor) == wanted:
        return anchor
    users = list(anchor.users)
    if len(users) == 1 and is_call(users[0], convert) and dtype(facts, users[0]) == wanted:
        return users[0]
    return refuse(facts, "dtype", anchor, f"a sum that is cast to {wanted}", f"{dtype(facts, anchor)}", 0.9)
